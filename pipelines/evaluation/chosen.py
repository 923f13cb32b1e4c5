"""What `evaluation.metrics` adds: alikeness of pairs, and distances between sets of samples.

Pairs: each posterior sample, and the mean of all samples, beside the clean image. Sets: one sample
of each of many observations, or samples of a prior, beside clean samples. What cannot be measured
says why instead of having a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffem_core.classifier import DigitClassifier
from diffem_core.image_quality import inception_score, kernel_distance, ms_ssim, ssim
from diffem_core.measurement import Measurement
from diffem_core.metrics import frechet_distance, sinkhorn_divergence
from diffem_core.neighbour_metrics import neighbour_metrics
from diffem_core.scaling import Scaling
from diffem_core.seeds import derive_seed
from diffem_core.two_sample import energy_test
from pipelines.build.features import (
    Features,
    NoFeatures,
    as_pictures,
    build_lpips,
    build_set_features,
)
from pipelines.evaluation.metric import as_metric, left_out
from pipelines.evaluation.samples import spread
from storage_schemas.config import (
    EnergyMetric,
    FidMetric,
    InceptionScoreMetric,
    KidMetric,
    LpipsMetric,
    MetricConfig,
    MsSsimMetric,
    NeighboursMetric,
    SinkhornMetric,
    SsimMetric,
)
from storage_schemas.metrics import Metric

__all__ = ["likenesses", "set_metrics"]

_QUARTET = {
    "precision": "share of them that lie among clean samples",
    "recall": "share of clean samples that lie among them",
    "density": "how densely clean samples lie where they do; about 1 for two sets of clean ones",
    "coverage": "share of clean samples that have one of them near",
}
_CPU = torch.device("cpu")


def likenesses(
    metrics: Sequence[MetricConfig],
    draws: Tensor,
    x: Tensor,
    *,
    scaling: Scaling,
    device: torch.device = _CPU,
) -> dict[str, Metric]:
    """Measure how like the clean images posterior samples are, and their mean.

    Arguments:
        metrics: What to measure; kinds that compare sets are passed over.
        draws: Posterior samples, shape (S, n, *x_shape), in data units.
        x: The clean samples, shape (n, *x_shape).
        scaling: The change to network units.
        device: Where networks are put.

    Returns:
        `NAME_sample` and `NAME_mean` of each.
    """
    found: dict[str, Metric] = {}
    for metric in metrics:
        measure, better = _likeness(metric, device)
        if measure is None:
            continue
        mean = draws.mean(dim=0)
        for name, what, estimate in (
            ("sample", "one posterior sample", draws),
            ("mean", f"the mean of {len(draws)} posterior samples", mean[None]),
        ):
            result = _over_draws(measure, estimate, x, scaling)
            words = f"{_LIKE[metric.kind]} of {what} and the clean image, held out"
            found[f"{metric.kind}_{name}"] = as_metric(
                result, words, better="lower" if better == "lower" else "higher"
            )
    return found


_LIKE = {
    "ssim": "structural similarity",
    "ms_ssim": "structural similarity at five scales",
    "lpips": "learned perceptual distance",
}

_Pairs = Callable[[Tensor, Tensor], Measurement]


def _likeness(metric: MetricConfig, device: torch.device) -> tuple[_Pairs | None, str]:
    match metric:
        case SsimMetric():
            return ssim, "higher"
        case MsSsimMetric():
            return ms_ssim, "higher"
        case LpipsMetric():
            try:
                return build_lpips(metric, device=device), "lower"
            except NoFeatures as problem:
                reason = str(problem)
                return lambda *_: Measurement.left_out(reason), "lower"
        case _:
            return None, ""


def _over_draws(measure: _Pairs, draws: Tensor, x: Tensor, scaling: Scaling) -> Measurement:
    """Return the mean over draws; its standard error is that of one draw, the images' share."""
    if x.ndim != 4:
        return Measurement.left_out("the samples are vectors, and this compares images")
    clean = as_pictures(x, scaling)
    found = [measure(as_pictures(one, scaling), clean) for one in draws]
    values = [one.value for one in found if one.value is not None]
    if len(values) < len(found):
        return next(one for one in found if one.value is None)
    errors = [one.standard_error for one in found if one.standard_error is not None]
    return Measurement(
        value=sum(values) / len(values),
        standard_error=sum(errors) / len(errors) if errors else None,
    )


def set_metrics(
    metrics: Sequence[MetricConfig],
    samples: Tensor,
    *,
    others: Tensor,
    everything: Tensor,
    scaling: Scaling,
    classifier: DigitClassifier | None,
    seed: int,
    same: Tensor | None = None,
    device: torch.device = _CPU,
) -> dict[str, Metric]:
    """Measure how far samples are from clean samples, as sets.

    Arguments:
        metrics: What to measure; kinds that compare pairs are passed over.
        samples: Reconstructions, or samples of a prior, shape (m, *x_shape), in data units.
        others: Clean samples of other observations, shape (n, *x_shape).
        everything: Clean samples of the whole training split.
        scaling: The change to network units.
        classifier: The classifier of clean images, where there is one.
        seed: Seed of subsets and permutations.
        same: Clean samples in place of the reconstructions, of which floors are computed; None
            computes none.
        device: Where networks are put.

    Returns:
        The metrics by name, with `NAME_floor` (`NAME_clean` for the inception score).
    """
    found: dict[str, Metric] = {}
    for metric in metrics:
        if isinstance(metric, (SsimMetric, MsSsimMetric, LpipsMetric)):
            continue
        whole = getattr(metric, "reference", "others") == "all"
        clean = everything if whole else others
        if len(clean) < 2:
            reason = "every clean sample belongs to a reconstruction; lower reconstructions, or "
            for name in _names(metric):
                found[name] = left_out(f"{reason}set reference: all")
            continue
        try:
            features = _features(metric, clean, scaling, classifier, device)
        except NoFeatures as problem:
            found |= {name: left_out(str(problem)) for name in _names(metric)}
            continue
        what = f"of {len(samples):,} samples and {len(clean):,} clean ones"
        found |= _measure(metric, features, samples, clean, what, scaling, seed)
        scored = isinstance(metric, InceptionScoreMetric)
        if same is None or (whole and not scored):
            continue
        floors = _measure(metric, features, same, clean, "", scaling, seed)
        suffix = "_clean" if scored else "_floor"
        words = "the same of clean samples" if scored else "the same between two sets of clean "
        for name, floor in floors.items():
            if floor.value is not None:
                text = words if scored else f"{words}samples"
                found[name + suffix] = floor.model_copy(update={"long_name": text, "better": None})
    return found


def _names(metric: MetricConfig) -> list[str]:
    if isinstance(metric, NeighboursMetric):
        prefix = "" if metric.name == "neighbours" else f"{metric.name}_"
        return [f"{prefix}{name}" for name in _QUARTET]
    return [str(getattr(metric, "name", metric.kind))]


def _features(
    metric: MetricConfig,
    clean: Tensor,
    scaling: Scaling,
    classifier: DigitClassifier | None,
    device: torch.device,
) -> Features:
    match metric:
        case FidMetric() | KidMetric() | NeighboursMetric() | InceptionScoreMetric():
            return build_set_features(
                metric, scaling=scaling, clean=clean, classifier=classifier, device=device
            )
        case EnergyMetric():
            return lambda x: scaling.to_network(x).flatten(1)
        case _:
            return lambda x: x.flatten(1)


def _measure(
    metric: MetricConfig,
    features: Features,
    samples: Tensor,
    clean: Tensor,
    what: str,
    scaling: Scaling,
    seed: int,
) -> dict[str, Metric]:
    names = _names(metric)
    seed = derive_seed(seed, "metric", names[0])

    def some(x: Tensor, most: int) -> Tensor:
        return x[spread(len(x), min(most, len(x)))]

    match metric:
        case FidMetric():
            value = frechet_distance(features(samples), features(clean))
            words = f"Fréchet distance in features ({metric.features}) {what}"
            return {names[0]: Metric(value=value, long_name=words, better="lower")}
        case KidMetric():
            result = kernel_distance(
                features(samples),
                features(clean),
                subsets=metric.subsets,
                subset_size=metric.subset_size,
                seed=seed,
            )
            words = f"kernel distance in features ({metric.features}) {what}"
            return {names[0]: as_metric(result, words, better="lower")}
        case InceptionScoreMetric():
            result = inception_score(features(samples), splits=metric.splits, seed=seed)
            words = f"inception score of {len(samples):,} samples ({metric.features})"
            return {names[0]: as_metric(result, words, better="higher")}
        case NeighboursMetric():
            ours, theirs = (features(some(x, metric.samples)) for x in (samples, clean))
            quartet = neighbour_metrics(ours, theirs, neighbours=metric.neighbours)
            return {
                name: as_metric(quartet[key], f"{_QUARTET[key]} ({metric.features})")
                if key == "density"
                else as_metric(
                    quartet[key], f"{_QUARTET[key]} ({metric.features})", better="higher"
                )
                for name, key in zip(names, _QUARTET, strict=True)
            }
        case SinkhornMetric():
            count = min(metric.samples, len(samples), len(clean))
            value = sinkhorn_divergence(
                features(some(samples, count)),
                features(some(clean, count)),
                regularization=metric.regularization,
            )
            words = f"Sinkhorn divergence between {count:,} samples and as many clean ones"
            return {names[0]: Metric(value=value, long_name=words, better="lower")}
        case EnergyMetric():
            result = energy_test(
                features(some(samples, metric.samples)),
                features(some(clean, metric.samples)),
                permutations=metric.permutations,
                seed=seed,
            )
            words = "energy distance to clean samples, network units"
            return {names[0]: as_metric(result, words, better="lower")}
        case _:
            raise AssertionError("the others compare pairs")
