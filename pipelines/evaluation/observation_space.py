"""Held-out observations against re-corrupted reconstructions of others: needs no clean samples.

The divergence is of grey-level pairs where the channel selects pixels, and the sliced Wasserstein
distance of what the network sees of an observation for any other channel. Beside it stand the
monitors that the config names, each with its floor: the same between held-out observations and as
many real ones of the training split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.classifier_test import classifier_test
from diffem_core.cooccurrence import cooccurrence_divergence
from diffem_core.feature_distance import PrincipalComponents, frechet_test
from diffem_core.measurement import Measurement
from diffem_core.monitors import observation_divergence, observation_features
from diffem_core.scaling import Scaling
from diffem_core.seeds import derive_seed
from diffem_core.two_sample import energy_test, mmd_test, subsample
from pipelines import build
from pipelines.evaluation.metric import as_metric, finite, left_out, taken_over
from pipelines.evaluation.samples import Observed, spread
from storage_schemas.config import (
    ClassifierMonitor,
    EnergyMonitor,
    FrechetMonitor,
    MmdMonitor,
    MonitorConfig,
    SlicedMonitor,
)
from storage_schemas.metrics import Metric

__all__ = ["TWO_SAMPLE", "divergences", "recorrupted"]

TWO_SAMPLE = ("divergence", "sliced_wasserstein", "energy", "mmd", "classifier", "frechet")
"""Metrics that compare two sets of observations; `NAME_floor` stands beside each."""

# Real observations, at most, that principal components are fitted to.
_FITTED = 4096

_FLOOR = "the same between two sets of real observations"

Test = Callable[[Tensor, Tensor], Measurement]


def divergences(
    channel: Channel,
    scaling: Scaling,
    samples: Tensor,
    holdout: Observed,
    others: Observed | None,
    floors: Mapping[str, Metric] | None,
    seed: int,
    *,
    monitors: Sequence[MonitorConfig] = (SlicedMonitor(),),
    spare: Observed | None = None,
    fresh: Observed | None = None,
) -> dict[str, Metric]:
    """Compare held-out observations with corrupted samples, and with real ones.

    Arguments:
        channel: The channel, which corrupts the samples once, for every monitor.
        scaling: The change to network units.
        samples: Reconstructions of other observations, or samples of a prior, shape (m,
            *x_shape), in data units.
        holdout: Held-out observations.
        others: Other observations, of which floors are computed; needed where `floors` is None.
        floors: Metrics whose floors are taken over; None computes them.
        seed: Seed of the corruption, of directions, permutations and subsamples.
        monitors: What to measure beside the divergence; kinds that compare no two sets of
            observations are passed over.
        spare: Real observations that are on no side, to which features are fitted.
        fresh: The samples corrupted already; None corrupts them here.

    Returns:
        `divergence` and the monitors by their kind, each with its floor.
    """
    if fresh is None:
        fresh = recorrupted(channel, samples, derive_seed(seed, "recorruption"))
    computed = others if floors is None else None
    found = _divergence(channel, scaling, samples, holdout, computed, fresh, seed, monitors)

    def features(observed: Observed) -> Tensor:
        return observation_features(channel, scaling, observed.y, observed.params).cpu()

    tests: list[tuple[str, Test, str]] = []
    for monitor in monitors:
        known = _test_of(monitor, None if spare is None else features(spare), seed)
        if known is not None:
            tests.append((monitor.kind, *known))
    if tests:
        ours, theirs = features(holdout), features(fresh)
        real = None if computed is None else features(computed)
        for name, test, long_name in tests:
            found[name] = as_metric(test(ours, theirs), long_name, better="lower")
            if real is not None:
                found[f"{name}_floor"] = as_metric(test(ours, real), _FLOOR)
    return found | taken_over(floors)


def recorrupted(channel: Channel, x: Tensor, seed: int) -> Observed:
    """Corrupt samples with fresh operators and noise."""
    generator = torch.Generator().manual_seed(seed)
    params = channel.draw_params(len(x), generator=generator)
    y = channel.corrupt(x, params, generator=generator)
    return Observed(sample_ids=range(len(x)), y=y, params=params)


def _divergence(
    channel: Channel,
    scaling: Scaling,
    samples: Tensor,
    holdout: Observed,
    computed: Observed | None,
    fresh: Observed,
    seed: int,
    monitors: Sequence[MonitorConfig],
) -> dict[str, Metric]:
    """Measure `divergence` and, where that is another one, the sliced Wasserstein distance."""
    first = _seen_images(channel, scaling, holdout)
    asked = [monitor for monitor in monitors if isinstance(monitor, SlicedMonitor)]
    sliced: dict[str, Metric] = {}
    if asked or first is None:
        name = "divergence" if first is None else "sliced_wasserstein"
        result = observation_divergence(
            channel,
            scaling,
            samples,
            holdout.y,
            holdout.params,
            reference=None if computed is None else (computed.y, computed.params),
            recorrupted=(fresh.y, fresh.params),
            seed=derive_seed(seed, "divergence"),
            projections=(asked or [SlicedMonitor()])[0].projections,
        )
        sliced[name] = Metric(
            value=result.value,
            standard_error=finite(result.standard_error),
            long_name="sliced Wasserstein distance in observation space, network units",
            better="lower",
        )
        if computed is not None:
            sliced[f"{name}_floor"] = Metric(value=result.floor, long_name=_FLOOR)
    if first is None:
        return sliced
    long_name = (
        "squared Hellinger distance of grey-level pairs of neighbours in observation space, %"
    )
    found = {"divergence": _pairs(first, _seen_images(channel, scaling, fresh), long_name)}
    if computed is not None:
        second = _seen_images(channel, scaling, computed)
        found["divergence_floor"] = _pairs(first, second, _FLOOR).model_copy(
            update={"better": None}
        )
    return found | sliced


def _pairs(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None, long_name: str
) -> Metric:
    assert second is not None, "one channel made both"
    try:
        result = cooccurrence_divergence(*first, *second)
    except ValueError as problem:  # too few neighbours are seen together, and it says so
        return left_out(str(problem))
    error = finite(result.standard_error)
    return Metric(
        value=100 * result.value,
        standard_error=None if error is None else 100 * error,
        long_name=long_name,
        units="%",
        better="lower",
    )


def _seen_images(
    channel: Channel, scaling: Scaling, observed: Observed
) -> tuple[Tensor, Tensor] | None:
    """Return images in network units and which pixels are seen, where A selects pixels."""
    selection = channel.selection(observed.params)
    if selection is None or len(channel.x_shape) != 3:
        return None
    x = scaling.to_network(channel.A_dagger(observed.y, observed.params))
    return x, selection.reshape(x.shape)


def _test_of(monitor: MonitorConfig, spare: Tensor | None, seed: int) -> tuple[Test, str] | None:
    """Return the test of a monitor, of two sets of features, and what it measures."""
    seed = derive_seed(seed, "monitor", monitor.kind)

    def some(rows: Tensor, count: int) -> Tensor:
        return subsample(rows.flatten(1), count, seed=derive_seed(seed, "subsample"))

    match monitor:
        case EnergyMonitor(samples=count, permutations=permutations):
            return (
                lambda a, b: energy_test(
                    some(a, count), some(b, count), permutations=permutations, seed=seed
                ),
                "energy distance in observation space, network units",
            )
        case MmdMonitor(samples=count, permutations=permutations, bandwidth=bandwidth):
            return (
                lambda a, b: mmd_test(
                    some(a, count),
                    some(b, count),
                    bandwidth=bandwidth,
                    permutations=permutations,
                    seed=seed,
                ),
                "squared maximum mean discrepancy in observation space",
            )
        case ClassifierMonitor(samples=count, model=model, components=components):
            return (
                lambda a, b: classifier_test(
                    some(a, count), some(b, count), model=model, components=components, seed=seed
                ),
                f"area under the ROC curve of a {model} classifier of real observations and "
                "corrupted reconstructions; 0.5 is a guess",
            )
        case FrechetMonitor():
            return _frechet(monitor, spare, seed)
        case _:
            return None


def _frechet(monitor: FrechetMonitor, spare: Tensor | None, seed: int) -> tuple[Test, str]:
    permutations = monitor.permutations
    own = build.build_features(monitor)
    if own is not None:
        return (
            lambda a, b: frechet_test(own(a), own(b), permutations=permutations, seed=seed),
            f"Fréchet distance in observation space, features of {monitor.features}",
        )
    least = 2 * monitor.components
    if spare is None or len(spare) < least:
        count = 0 if spare is None else len(spare)
        reason = (
            f"principal components need {least} real observations that are not reconstructed, "
            f"there are {count}; lower evaluation.reconstructions or components"
        )
        return lambda a, b: Measurement.left_out(reason), ""
    rows = spare.flatten(1)
    if not bool((rows != rows[0]).any()):
        return lambda a, b: Measurement.left_out("every real observation is the same"), ""
    principal = PrincipalComponents.fit(
        rows[spread(len(rows), min(_FITTED, len(rows)))], monitor.components
    )

    def test(a: Tensor, b: Tensor) -> Measurement:
        a, b = principal(a.flatten(1)), principal(b.flatten(1))
        return frechet_test(a, b, permutations=permutations, seed=seed)

    return (
        test,
        f"Fréchet distance in observation space, {principal.directions.shape[1]} principal "
        "components of unit variance",
    )
