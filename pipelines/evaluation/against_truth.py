"""What is measured against clean samples, where they are known: errors, calibration, distances."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import assert_never

import torch
from torch import Tensor

from diffem_core.calibration import calibration
from diffem_core.channel import Channel
from diffem_core.metrics import (
    frechet_distance,
    masked_rmse,
    psnr,
    rmse,
    sinkhorn_divergence,
    sliced_image_distance,
)
from diffem_core.scaling import Scaling
from pipelines.evaluation.chosen import likenesses, set_metrics
from pipelines.evaluation.metric import as_metric, finite
from pipelines.evaluation.samples import Observed, Truth, spread
from storage_schemas.config import (
    EvaluationConfig,
    FrechetDistance,
    SinkhornDistance,
    SlicedWassersteinDistance,
)
from storage_schemas.metrics import Metric

__all__ = ["calibrations", "chosen_metrics", "distance_to_clean", "distances", "errors"]


def errors(
    draws: Tensor, truth: Truth, channel: Channel, scaling: Scaling, holdout: Observed
) -> dict[str, Metric]:
    """Measure the error of one sample (all draws counted) and of the mean of the draws."""
    x = truth.holdout
    mean = draws.mean(dim=0)
    many = x.expand_as(draws).flatten(0, 1)
    values: dict[str, Metric] = {}
    data_range = _peak(channel, scaling)
    selection = channel.selection(holdout.params)
    for name, what, estimate, clean in (
        ("sample", "one posterior sample", draws.flatten(0, 1), many),
        ("mean", f"the mean of {len(draws)} posterior samples", mean, x),
    ):
        values[f"psnr_{name}"] = Metric(
            value=finite(psnr(estimate, clean, data_range=data_range)),
            long_name=f"peak signal-to-noise ratio of {what}, held out",
            units="dB",
            better="higher",
        )
        values[f"rmse_{name}"] = Metric(
            value=rmse(estimate, clean) * scaling.scale,
            long_name=f"root mean squared error of {what}, held out, network units",
            better="lower",
        )
        if selection is not None:
            mask = selection.reshape(x.shape)
            repeated = mask.expand_as(draws).flatten(0, 1) if name == "sample" else mask
            hidden, _ = masked_rmse(estimate, clean, repeated)
            values[f"hidden_rmse_{name}"] = Metric(
                value=finite(hidden * scaling.scale),
                long_name=f"root mean squared error of {what} on hidden entries, held out, "
                "network units",
                better="lower",
            )
    values["spread_ratio"] = _spread_ratio(draws, mean, x, selection)
    return values


def _peak(channel: Channel, scaling: Scaling) -> float:
    """Return the signal's peak for the PSNR, in data units.

    For real images, white minus black. Complex ones (two bands) have magnitudes up to w, where
    their range is [-w, w], and as their squared error that of both bands together; `psnr` takes
    the mean over bands, half of it, so that the peak w becomes w / sqrt(2). Then a complex image
    has the PSNR of its magnitude, if the phase is right.
    """
    width = 4 / scaling.scale
    complex_image = len(channel.x_shape) == 3 and channel.x_shape[0] == 2
    return width / 2 / math.sqrt(2) if complex_image else width


def _spread_ratio(draws: Tensor, mean: Tensor, x: Tensor, selection: Tensor | None) -> Metric:
    """Compare the spread of the draws with the error of their mean.

    Where x and S draws come from one posterior of variance v, the mean of the draws is off by
    v (1 + 1/S) in mean square, so that sqrt(v (1 + 1/S)) over the error is 1.
    """
    counted = torch.ones_like(x, dtype=torch.bool)
    if selection is not None:
        counted = ~selection.reshape(x.shape)
    variance = draws.double().var(dim=0)[counted].mean() * (1 + 1 / len(draws))
    error = (mean - x).double()[counted].square().mean()
    ratio = math.sqrt(float(variance / error)) if float(error) > 0 else math.nan
    where = "" if selection is None else " on hidden entries"
    return Metric(
        value=finite(ratio),
        long_name=f"spread of posterior samples over the error of their mean{where}; 1 is "
        "calibrated, less is too sure",
    )


def calibrations(
    draws: Tensor, truth: Truth, channel: Channel, holdout: Observed, seed: int
) -> dict[str, Metric]:
    """Measure whether posterior samples scatter as much as they are wrong.

    Arguments:
        draws: Posterior samples of the held-out observations, shape (S, n, *x_shape).
        truth: The clean samples.
        channel: The channel, which may know what is hidden.
        holdout: The held-out observations.
        seed: Seed of what breaks ties.

    Returns:
        `coverage_50`, `coverage_90` and `ranks`, on hidden entries where the channel selects.
    """
    selection = channel.selection(holdout.params)
    hidden = None if selection is None else ~selection.reshape(truth.holdout.shape)
    found = calibration(draws, truth.holdout, counted=hidden, levels=(0.5, 0.9), seed=seed)
    where = "" if hidden is None else " hidden"
    values = {
        f"coverage_{100 * level:.0f}": as_metric(
            measured,
            f"share of{where} entries inside their central {100 * level:.0f} % credible interval "
            f"(by ranks among {len(draws)} samples), held out; {level} is calibrated, less is too "
            "sure",
        )
        for level, measured in found.coverage.items()
    }
    values["ranks"] = as_metric(
        found.ranks,
        f"spread of the ranks of true{where} entries among {len(draws)} samples, held out; 1 is "
        "calibrated, more is too sure; p-value of a flat rank histogram",
    )
    return values


def distances(
    reconstructions: Tensor,
    draws: Tensor,
    truth: Truth,
    rows: Tensor,
    floors: Mapping[str, Metric] | None,
    config: EvaluationConfig,
    scaling: Scaling,
) -> dict[str, Metric]:
    """Measure how far the reconstructions' distribution is from that of clean samples.

    The clean samples are of other observations than those that were reconstructed, so that a
    distance cannot profit from seeing the same ones; the floor takes the clean samples of the
    reconstructed observations instead of the reconstructions.
    """
    others = torch.ones(len(truth.training), dtype=torch.bool)
    others[rows] = False
    clean, same = truth.training[others], truth.training[rows]
    found = distance_to_clean(reconstructions, truth, clean, config, scaling)
    if "distance" not in found or found["distance"].value is None:
        return found
    if floors is None:
        floor = distance_to_clean(same, truth, clean, config, scaling)["distance"]
        found["distance_floor"] = Metric(
            value=floor.value, long_name="the same between two sets of clean samples"
        )
    if isinstance(config.distance, FrechetDistance):
        found |= _accuracies(draws, truth, floors)
    return found


def chosen_metrics(
    reconstructions: Tensor,
    draws: Tensor,
    truth: Truth,
    rows: Tensor,
    floors: Mapping[str, Metric] | None,
    config: EvaluationConfig,
    scaling: Scaling,
    seed: int,
    device: torch.device,
) -> dict[str, Metric]:
    """Measure what `evaluation.metrics` names, with the same care as `distances`."""
    if not config.metrics:
        return {}
    others = torch.ones(len(truth.training), dtype=torch.bool)
    others[rows] = False
    return likenesses(
        config.metrics, draws, truth.holdout, scaling=scaling, device=device
    ) | set_metrics(
        config.metrics,
        reconstructions,
        others=truth.training[others],
        everything=truth.training,
        scaling=scaling,
        classifier=truth.classifier,
        seed=seed,
        same=truth.training[rows] if floors is None else None,
        device=device,
    )


def distance_to_clean(
    samples: Tensor, truth: Truth, clean: Tensor, config: EvaluationConfig, scaling: Scaling
) -> dict[str, Metric]:
    """Measure the configured distance between samples and clean samples.

    Arguments:
        samples: Reconstructions, or samples of a prior, shape (n, *x_shape), in data units.
        truth: What is known; its classifier is used.
        clean: Clean samples, shape (m, *x_shape), in data units.
        config: Which distance.
        scaling: The change to network units.

    Returns:
        `distance`, or nothing where none is configured; its value is None where it cannot be
        known.
    """
    if config.distance is None:
        return {}
    if len(clean) < 2:
        reason = "not known: every clean sample belongs to a reconstruction; lower reconstructions"
        return {"distance": Metric(value=None, long_name=reason)}
    match config.distance:
        case FrechetDistance():
            if truth.classifier is None or truth.holdout_labels is None:
                reason = "not known: the samples have no labels"
                return {"distance": Metric(value=None, long_name=reason)}
            features = truth.classifier.features
            value = frechet_distance(features(samples), features(clean))
            name = "Fréchet distance to clean samples in a classifier's features"
        case SinkhornDistance(samples=wanted, regularization=regularization):
            count = min(wanted, len(samples), len(clean))
            value = sinkhorn_divergence(
                samples[:count], clean[:count], regularization=regularization
            )
            name = "Sinkhorn divergence between reconstructions and clean samples"
        case SlicedWassersteinDistance(projections=projections, texture=texture):
            count = min(len(samples), len(clean))
            value = sliced_image_distance(
                scaling.to_network(samples[spread(len(samples), count)]),
                scaling.to_network(clean[spread(len(clean), count)]),
                projections=projections,
                texture=texture,
            )
            name = (
                "relative sliced Wasserstein distance to clean samples, of whole images and of "
                "their texture"
            )
        case _:
            assert_never(config.distance)
    return {"distance": Metric(value=value, long_name=name, better="lower")}


def _accuracies(
    draws: Tensor, truth: Truth, floors: Mapping[str, Metric] | None
) -> dict[str, Metric]:
    """Measure how often the classifier takes held-out samples for their clean images' class."""
    assert truth.classifier is not None
    assert truth.holdout_labels is not None
    labels = truth.holdout_labels
    found = {
        "accuracy": Metric(
            value=truth.classifier.accuracy(draws.flatten(0, 1), labels.repeat(len(draws))),
            long_name="fraction of held-out posterior samples classified as their clean image",
            better="higher",
        )
    }
    if floors is None:
        found["accuracy_clean"] = Metric(
            value=truth.classifier.accuracy(truth.holdout, labels),
            long_name="the same for the clean held-out images",
        )
    return found
