"""The folder of a pipeline that diffusers loads."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffem_core.networks.diffusers_unet import DiffusersUNet
from diffem_core.preconditioning import EDMPreconditioning
from pipelines import build
from pipelines.export.subject import Subject
from storage_schemas.config import KarrasGrid

__all__ = ["hub_files", "require_hub"]


def require_hub(subject: Subject) -> None:
    """Refuse networks that diffusers does not know.

    Raises:
        ValueError: The network is another than diffusers' own, or preconditioned otherwise.
    """
    if not isinstance(subject.denoiser.network, DiffusersUNet):
        kind = subject.run.config.network.kind
        why = " (a joint prior's is wrapped)" if kind == "diffusers" else ""
        raise ValueError(
            f"--format diffusers needs a network of diffusers but network.kind is {kind!r}{why}; "
            "take --format safetensors, torch-export or onnx, or train a run with network.kind: "
            "diffusers"
        )
    if not isinstance(subject.denoiser.preconditioning, EDMPreconditioning):
        raise ValueError(
            "--format diffusers needs EDM's preconditioning, which its scheduler does, but this "
            "denoiser is built around a Gaussian posterior (condition: gaussian_posterior); take "
            "--format safetensors, torch-export or onnx"
        )


def hub_files(subject: Subject) -> dict[str, bytes]:
    """Return the files of a pipeline: network, scheduler, index and code.

    Raises:
        ValueError: The network is another than diffusers' own.
    """
    require_hub(subject)
    from diffusers import EDMEulerScheduler, __version__

    network: Any = subject.denoiser.network
    config = subject.run.config
    scaling = build.build_scaling(config.data)
    sampler = build.sampler_of(config.e_step)
    karras = isinstance(sampler.grid, KarrasGrid)
    scheduler = EDMEulerScheduler(
        sigma_min=sampler.sigma_end or config.schedule.sigma_min,
        sigma_max=sampler.sigma_start or config.schedule.sigma_max,
        sigma_data=subject.denoiser.sigma_data,
        sigma_schedule="karras" if karras else "exponential",
        rho=sampler.grid.rho if isinstance(sampler.grid, KarrasGrid) else 7.0,
        prediction_type="epsilon",
        final_sigmas_type="zero",
    )
    with tempfile.TemporaryDirectory(prefix="diffem-") as folder, _quiet():
        network.unet.save_pretrained(Path(folder) / "unet", safe_serialization=True)
        scheduler.save_pretrained(Path(folder) / "scheduler")
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }
    index = {
        "_class_name": ["pipeline", "DiffEMPipeline"],
        "_diffusers_version": __version__,
        "center": scaling.center,
        "scale": scaling.scale,
        "steps": sampler.steps,
        "scheduler": ["diffusers", "EDMEulerScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    files["model_index.json"] = (json.dumps(index, indent=2) + "\n").encode()
    files["pipeline.py"] = Path(__file__).with_name("hub_pipeline.py").read_bytes()
    return files


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers from drawing bars."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
