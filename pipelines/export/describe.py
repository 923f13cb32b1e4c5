"""`config.json`: everything that is needed to use an exported model, without this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffem_core.channel import Channel, RandomMask, RandomMatrix
from diffem_core.denoiser import Denoiser
from diffem_core.gaussian_condition import GaussianMeanChannel, GaussianPosteriorChannel
from diffem_core.physics_channels import PhysicsChannel
from diffem_core.preconditioning import FactorPreconditioning, MomentsPreconditioning
from pipelines import build
from pipelines.export.subject import Subject
from storage_schemas.manifests import ObjectRecord

__all__ = ["describe", "describe_condition"]


def describe(
    subject: Subject, format_: str, files: Mapping[str, bytes], licence: str
) -> dict[str, Any]:
    """Return the content of `config.json`.

    Arguments:
        subject: The model.
        format_: The format of the export.
        files: The other files, by path in the folder.
        licence: Licence of the weights.
    """
    run, config = subject.run, subject.run.config
    scaling = build.build_scaling(config.data)
    network = subject.denoiser.network
    return {
        "format": f"diffem {format_}",
        "version": 1,
        "license": licence,
        "what": subject.what,
        "run": {
            "name": config.name,
            "config_digest": run.store.manifest.config_digest,
            "code_version": run.store.manifest.provenance.code_version,
            "method": config.method,
            "em_iteration": subject.iteration.iteration,
            "model_digest": subject.model_digest,
        },
        "x": {
            "shape": list(subject.channel.x_shape),
            "units": run.store.observations().manifest.units,
            "center": scaling.center,
            "scale": scaling.scale,
            "network_units": "(x - center) * scale",
        },
        "denoiser": {
            "estimates": "E[x | x_t, y], x_t = x + sigma_t z, all in network units",
            "inputs": ["x_t", "sigma_t", *(["condition"] if subject.condition_channels else [])],
            **_preconditioning(subject.denoiser),
            "c_noise": "log(sigma_t)",
            "trained_in": config.precision,
        },
        "network": {
            **config.network.model_dump(mode="json"),
            "parameters": sum(p.numel() for p in network.parameters()),
        },
        "condition": describe_condition(subject),
        "schedule": config.schedule.model_dump(mode="json"),
        "sampler": build.sampler_of(config.e_step).model_dump(mode="json"),
        "channel": config.channel.model_dump(mode="json"),
        "files": {
            path: ObjectRecord.of(files[path]).model_dump(mode="json") for path in sorted(files)
        },
    }


def _preconditioning(denoiser: Denoiser) -> dict[str, Any]:
    """Say what surrounds the network."""
    match denoiser.preconditioning:
        case MomentsPreconditioning():
            return {
                "f": "m + c_skip (x_t - m) + c_out F(c_in (x_t - m), c_noise, condition)",
                "m, s": "the posterior mean and standard deviation that the condition ends with",
                "c_skip": "s^2 / (sigma_t^2 + s^2)",
                "c_out": "sigma_t s / sqrt(sigma_t^2 + s^2)",
                "c_in": "1 / sqrt(sigma_t^2 + s^2)",
            }
        case FactorPreconditioning():
            return {
                "f": "g + sigma_t K R'^-1 F(g, c_noise, condition)",
                "g": "m + K R'^-1 R^-1 K' (x_t - m)",
                "m, K": "the posterior mean and the factor that the condition ends with",
                "R": "the Cholesky factor of K' K + sigma_t^2 I",
            }
    return {
        "f": "c_skip x_t + c_out F(c_in x_t, c_noise, condition)",
        "c_skip": "sigma_data^2 / (sigma_t^2 + sigma_data^2)",
        "c_out": "sigma_t sigma_data / sqrt(sigma_t^2 + sigma_data^2)",
        "c_in": "1 / sqrt(sigma_t^2 + sigma_data^2)",
        "sigma_data": denoiser.sigma_data,
    }


def describe_condition(subject: Subject) -> dict[str, Any] | None:
    """Say what the network sees of an observation; None where it sees none."""
    if not subject.condition_channels:
        return None
    return {
        "shape": list(subject.condition_shape),
        "holds": _seen(subject.channel),
        "y_shape": list(subject.channel.y_shape),
        "parameters": {name: list(s) for name, s in sorted(subject.channel.params_spec.items())},
    }


def _seen(channel: Channel) -> str:
    """Say what a channel's `condition` holds, band by band."""
    match channel:
        case GaussianPosteriorChannel():
            spread = "a triangular factor K of its covariance, K K', row by row"
            if not channel.whole:
                spread = "its standard deviation"
            return (
                f"{_seen(channel.channel)}; then the posterior mean m of x and {spread}, in "
                "network units, under N(mean, factor factor' + diag) of "
                "gaussian_prior.safetensors (data units)"
            )
        case GaussianMeanChannel():
            return (
                f"{_seen(channel.channel)}; then the posterior mean of x, in network units, under "
                "N(mean, factor factor' + diag) of gaussian_prior.safetensors (data units)"
            )
        case RandomMask():
            return "(y - center) * scale where a pixel was seen and 0 elsewhere; then the mask"
        case RandomMatrix():
            return "u = (y - A center) * scale; then the entries of A, row by row; then A' u"
        case PhysicsChannel():
            told = f"{channel.estimate}(y - A center) * scale"
            if channel.estimate == "y":
                told = "(y - center) * scale"
            if channel.maps:
                told += f"; then, as maps, {', '.join(channel.maps)}"
            if channel.drawn_maps is not None:
                told += f"; then {channel.drawn_maps[0]} map(s) drawn from the parameters"
            return told
        case _:
            return "what `condition` of the channel builds of y and its parameters"
