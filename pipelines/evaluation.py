"""What is measured of a posterior. Nothing here feeds back into the training.

Always: the divergence in observation space, between held-out observations and re-corrupted
reconstructions of other observations, beside its floor: of grey-level pairs where the channel
selects pixels, and the sliced Wasserstein distance of what the network sees of an observation for
any other channel. Where the clean samples are known
(benchmarks): the errors of one posterior sample and of the mean of several on held-out
observations, and a distance between the distributions of reconstructions and of clean samples.
Truth enters by the argument `truth` alone; without it the same numbers are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.classifier import DigitClassifier
from diffem_core.cooccurrence import cooccurrence_divergence
from diffem_core.e_step import e_step
from diffem_core.metrics import (
    frechet_distance,
    masked_rmse,
    psnr,
    rmse,
    sinkhorn_divergence,
    sliced_image_distance,
)
from diffem_core.monitors import observation_divergence
from diffem_core.posterior import Posterior
from diffem_core.scaling import Scaling
from diffem_core.seeds import derive_seed
from storage_schemas.config import (
    EvaluationConfig,
    FrechetDistance,
    SinkhornDistance,
    SlicedWassersteinDistance,
)
from storage_schemas.metrics import Metric, Metrics

__all__ = [
    "Evaluation",
    "Observed",
    "Truth",
    "distance_to_clean",
    "divergences",
    "evaluate",
    "work_of",
]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Observations with what belongs to them."""

    sample_ids: Sequence[int]
    """Their ids in the store."""
    y: Tensor
    """Observations, shape (n, *y_shape)."""
    params: Mapping[str, Tensor]
    """Their operator parameters."""

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Clean samples, known only in benchmarks."""

    holdout: Tensor
    """Clean held-out samples, shape (n, *x_shape), aligned with the held-out observations."""
    holdout_labels: Tensor | None
    """Their classes, shape (n,), where there are any."""
    training: Tensor
    """Clean training samples, shape (m, *x_shape)."""
    classifier: DigitClassifier | None
    """Classifier fitted to the clean training samples, for `FrechetDistance`."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What came out."""

    metrics: Metrics
    draws: Tensor
    """Posterior samples of the held-out observations, shape (S, n, *x_shape), in data units."""
    reconstructions: Tensor
    """One posterior sample of each of the other observations, shape (m, *x_shape)."""


def work_of(config: EvaluationConfig, *, holdout: int, others: int) -> int:
    """Count the posterior samples that `evaluate` draws."""
    return config.draws * holdout + _others_used(config, others)


def evaluate(
    posterior: Posterior,
    *,
    channel: Channel,
    scaling: Scaling,
    config: EvaluationConfig,
    holdout: Observed,
    others: Observed,
    truth: Truth | None,
    floors: Mapping[str, Metric] | None,
    seed: int,
    batch_size: int,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Judge a posterior.

    Arguments:
        posterior: The posterior to judge; not changed.
        channel: The channel, which corrupts reconstructions afresh.
        scaling: The change to network units, in which errors are also given.
        config: What to measure.
        holdout: Held-out observations.
        others: Observations of the training split, `others_used` of which are reconstructed.
        truth: Clean samples, or None where nobody knows them.
        floors: Metrics of another posterior, judged with the same config and data, whose floors
            (they depend on the data alone) are taken over; None computes them.
        seed: Seed of all draws of this evaluation.
        batch_size: Observations per call of the posterior.
        on_progress: Called with the number of samples just drawn.

    Returns:
        The metrics and the samples behind them.
    """
    draws = torch.stack(
        [
            _draw(posterior, holdout, (seed, "draw", s), batch_size, on_progress)
            for s in range(config.draws)
        ]
    )
    rows = _spread(len(others), _others_used(config, len(others)))
    subset = Observed(
        sample_ids=[others.sample_ids[i] for i in rows.tolist()],
        y=others.y[rows],
        params={name: value[rows] for name, value in others.params.items()},
    )
    reconstructions = _draw(posterior, subset, (seed, "others"), batch_size, on_progress)

    values = divergences(channel, scaling, reconstructions, holdout, subset, floors, seed)
    if truth is not None:
        values |= _errors(draws, truth, channel, scaling, holdout)
        values |= _distances(reconstructions, draws, truth, rows, floors, config, scaling)
    return Evaluation(metrics=Metrics(values=values), draws=draws, reconstructions=reconstructions)


def divergences(
    channel: Channel,
    scaling: Scaling,
    samples: Tensor,
    holdout: Observed,
    others: Observed | None,
    floors: Mapping[str, Metric] | None,
    seed: int,
) -> dict[str, Metric]:
    """Compare held-out observations with corrupted samples, and with real ones.

    Arguments:
        channel: The channel, which corrupts the samples once, for every divergence.
        scaling: The change to network units.
        samples: Reconstructions of other observations, or samples of a prior, shape (m,
            *x_shape), in data units.
        holdout: Held-out observations.
        others: Other observations, of which floors are computed; needed where `floors` is None.
        floors: Metrics whose floors are taken over; None computes them.
        seed: Seed of the corruption and of the directions.

    Returns:
        `divergence` and, where the channel selects pixels, `sliced_wasserstein`, each with its
        floor.
    """
    fresh = _recorrupted(channel, samples, derive_seed(seed, "recorruption"))
    computed = others if floors is None else None
    sliced = observation_divergence(
        channel,
        scaling,
        samples,
        holdout.y,
        holdout.params,
        reference=None if computed is None else (computed.y, computed.params),
        recorrupted=(fresh.y, fresh.params),
        seed=derive_seed(seed, "divergence"),
    )
    values = {
        "sliced_wasserstein": Metric(
            value=sliced.value,
            standard_error=sliced.standard_error,
            long_name="sliced Wasserstein distance in observation space, network units",
            better="lower",
        ),
    }
    if computed is not None:
        values["sliced_wasserstein_floor"] = Metric(
            value=sliced.floor, long_name="the same between two sets of real observations"
        )
    first = _seen_images(channel, scaling, holdout)
    if first is None:
        names = {
            "sliced_wasserstein": "divergence",
            "sliced_wasserstein_floor": "divergence_floor",
        }
        return {names[name]: metric for name, metric in values.items()} | _taken_over(floors)

    def pairs(observed: Observed) -> tuple[float, float]:
        second = _seen_images(channel, scaling, observed)
        assert second is not None
        result = cooccurrence_divergence(*first, *second)
        return 100 * result.value, 100 * result.standard_error

    name = "squared Hellinger distance of grey-level pairs of neighbours in observation space, %"
    value, error = pairs(fresh)
    found = {
        "divergence": Metric(
            value=value, standard_error=error, long_name=name, units="%", better="lower"
        )
    }
    if computed is not None:
        value, error = pairs(computed)
        found["divergence_floor"] = Metric(
            value=value,
            standard_error=error,
            long_name="the same between two sets of real observations",
            units="%",
        )
    return found | values | _taken_over(floors)


def _taken_over(floors: Mapping[str, Metric] | None) -> dict[str, Metric]:
    """Return the floors among metrics."""
    return {k: m for k, m in (floors or {}).items() if k.endswith(("_floor", "_clean"))}


def _recorrupted(channel: Channel, x: Tensor, seed: int) -> Observed:
    generator = torch.Generator().manual_seed(seed)
    params = channel.draw_params(len(x), generator=generator)
    y = channel.corrupt(x, params, generator=generator)
    return Observed(sample_ids=range(len(x)), y=y, params=params)


def _seen_images(
    channel: Channel, scaling: Scaling, observed: Observed
) -> tuple[Tensor, Tensor] | None:
    """Return images in network units and which pixels are seen, where A selects pixels."""
    selection = channel.selection(observed.params)
    if selection is None or len(channel.x_shape) != 3:
        return None
    x = scaling.to_network(channel.A_dagger(observed.y, observed.params))
    return x, selection.reshape(x.shape)


def _others_used(config: EvaluationConfig, available: int) -> int:
    wanted = config.reconstructions
    if isinstance(config.distance, SinkhornDistance):
        wanted = max(wanted, config.distance.samples)
    return min(wanted, available)


def _spread(available: int, wanted: int) -> Tensor:
    """Choose `wanted` rows spread evenly over `available`."""
    return torch.div(torch.arange(wanted) * available, wanted, rounding_mode="floor")


def _draw(
    posterior: Posterior,
    observed: Observed,
    key: tuple[str | int, ...],
    batch_size: int,
    on_progress: Callable[[int], None] | None,
) -> Tensor:
    return e_step(
        posterior,
        observed.y,
        observed.params,
        seeds=[derive_seed(*key, int(sample)) for sample in observed.sample_ids],
        batch_size=batch_size,
        on_progress=on_progress,
    )


def _errors(
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
            value=_finite(psnr(estimate, clean, data_range=data_range)),
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
                value=_finite(hidden * scaling.scale),
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
        value=_finite(ratio),
        long_name=f"spread of posterior samples over the error of their mean{where}; 1 is "
        "calibrated, less is too sure",
    )


def _distances(
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
                scaling.to_network(samples[_spread(len(samples), count)]),
                scaling.to_network(clean[_spread(len(clean), count)]),
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
