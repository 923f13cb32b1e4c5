"""What is measured of a posterior. Nothing here feeds back into the training.

Always: the divergence in observation space, between held-out observations and re-corrupted
reconstructions of other observations, beside its floor. Where the clean samples are known
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
from diffem_core.metrics import frechet_distance, masked_rmse, psnr, rmse, sinkhorn_divergence
from diffem_core.monitors import observation_divergence
from diffem_core.posterior import Posterior
from diffem_core.scaling import Scaling
from diffem_core.seeds import derive_seed
from storage_schemas.config import EvaluationConfig, FrechetDistance, SinkhornDistance
from storage_schemas.metrics import Metric, Metrics

__all__ = ["Evaluation", "Observed", "Truth", "evaluate", "work_of"]


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

    values = _divergences(channel, scaling, reconstructions, holdout, subset, floors, seed)
    if truth is not None:
        values |= _errors(draws, truth, channel, scaling, holdout)
        values |= _distances(reconstructions, draws, truth, rows, floors, config)
    return Evaluation(metrics=Metrics(values=values), draws=draws, reconstructions=reconstructions)


def _divergences(
    channel: Channel,
    scaling: Scaling,
    reconstructions: Tensor,
    holdout: Observed,
    others: Observed,
    floors: Mapping[str, Metric] | None,
    seed: int,
) -> dict[str, Metric]:
    """Compare held-out observations with re-corrupted reconstructions, and with real ones."""
    sliced = observation_divergence(
        channel,
        scaling,
        reconstructions,
        holdout.y,
        holdout.params,
        reference=None if floors else (others.y, others.params),
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
    if floors is None:
        values["sliced_wasserstein_floor"] = Metric(
            value=sliced.floor, long_name="the same between two sets of real observations"
        )
    fresh = _recorrupted(channel, reconstructions, derive_seed(seed, "recorruption"))
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
    if floors is None:
        value, error = pairs(others)
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
    data_range = 4 / scaling.scale
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
) -> dict[str, Metric]:
    """Measure how far the reconstructions' distribution is from that of clean samples.

    The clean samples are of other observations than those that were reconstructed, so that a
    distance cannot profit from seeing the same ones; the floor takes the clean samples of the
    reconstructed observations instead of the reconstructions.
    """
    others = torch.ones(len(truth.training), dtype=torch.bool)
    others[rows] = False
    clean, same = truth.training[others], truth.training[rows]
    if len(clean) < 2:
        reason = "not known: every clean sample belongs to a reconstruction; lower reconstructions"
        return {"distance": Metric(value=None, long_name=reason)}
    match config.distance:
        case None:
            return {}
        case FrechetDistance():
            return _classifier_distances(reconstructions, draws, truth, clean, same, floors)
        case SinkhornDistance() as sinkhorn:
            count = min(sinkhorn.samples, len(reconstructions), len(clean))

            def distance(cloud: Tensor) -> float:
                a, b = cloud[:count], clean[:count]
                return sinkhorn_divergence(a, b, regularization=sinkhorn.regularization)

            found = {
                "distance": Metric(
                    value=distance(reconstructions),
                    long_name="Sinkhorn divergence between reconstructions and clean samples",
                    better="lower",
                )
            }
            if floors is None:
                found["distance_floor"] = Metric(
                    value=distance(same), long_name="the same between two sets of clean samples"
                )
            return found
    assert_never(config.distance)


def _classifier_distances(
    reconstructions: Tensor,
    draws: Tensor,
    truth: Truth,
    clean: Tensor,
    same: Tensor,
    floors: Mapping[str, Metric] | None,
) -> dict[str, Metric]:
    classifier, labels = truth.classifier, truth.holdout_labels
    if classifier is None or labels is None:
        return {"distance": Metric(value=None, long_name="not known: the samples have no labels")}
    features = classifier.features(clean)
    found = {
        "distance": Metric(
            value=frechet_distance(classifier.features(reconstructions), features),
            long_name="Fréchet distance to clean samples in a classifier's features",
            better="lower",
        ),
        "accuracy": Metric(
            value=classifier.accuracy(draws.flatten(0, 1), labels.repeat(len(draws))),
            long_name="fraction of held-out posterior samples classified as their clean image",
            better="higher",
        ),
    }
    if floors is None:
        found["distance_floor"] = Metric(
            value=frechet_distance(classifier.features(same), features),
            long_name="the same between two sets of clean samples",
        )
        found["accuracy_clean"] = Metric(
            value=classifier.accuracy(truth.holdout, labels),
            long_name="the same for the clean held-out images",
        )
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
