"""What `evaluation.metrics` adds to an evaluation, and what it leaves out with which reason."""

import re
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from diffem_core.classifier import DigitClassifier
from diffem_core.scaling import Scaling
from pipelines import build
from pipelines.evaluation import set_metrics
from pipelines.evaluation.chosen import likenesses
from storage_schemas.config import (
    EnergyMetric,
    EvaluationConfig,
    FidMetric,
    InceptionScoreMetric,
    KidMetric,
    LpipsMetric,
    MsSsimMetric,
    NeighboursMetric,
    RunConfig,
    SinkhornMetric,
    SsimMetric,
)
from storage_schemas.metrics import Metric
from tests.conftest import TINY

SCALING = Scaling.from_range(0.0, 16.0)
SETS = (
    FidMetric(components=6),
    KidMetric(components=6, subsets=5),
    NeighboursMetric(components=6),
    SinkhornMetric(samples=64),
    EnergyMetric(samples=64, permutations=19),
)


def images(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(n, 1, 4, 4, generator=generator).repeat_interleave(2, 2)
    return 16 * smooth.repeat_interleave(2, 3)


def of_sets(
    samples: Tensor,
    *metrics: Any,
    others: Tensor | None = None,
    same: Tensor | None = None,
    classifier: DigitClassifier | None = None,
) -> dict[str, Metric]:
    clean = images(120, 1) if others is None else others
    return set_metrics(
        metrics or SETS,
        samples,
        others=clean,
        everything=torch.cat([clean, images(80, 2)]) if others is None else clean,
        scaling=SCALING,
        classifier=classifier,
        seed=0,
        same=same,
    )


NAMES = {
    *("fid", "kid", "precision", "recall", "density", "coverage"),
    *("truth_sinkhorn", "truth_energy"),
}


def test_every_metric_of_sets_is_near_its_floor_for_clean_samples_and_worse_for_pale_ones() -> (
    None
):
    good = of_sets(images(80, 2), same=images(80, 3))
    assert {*good} == NAMES | {f"{name}_floor" for name in NAMES}
    pale = of_sets(0.3 * images(80, 2) + 11.2)
    assert {*pale} == NAMES
    # Pale images may well lie among the clean ones, which is all that precision and density see.
    for name in NAMES - {"density", "precision"}:
        at, floor, off = (m.value for m in (good[name], good[f"{name}_floor"], pale[name]))
        assert at is not None
        assert floor is not None
        assert off is not None
        sign = -1 if good[name].better == "higher" else 1
        # Two sets of clean samples differ by chance; the fault is several times as large.
        assert sign * (off - at) > 3 * abs(at - floor), name
    assert pale["truth_energy"].p_value == pytest.approx(1 / 20)


def test_numbers_do_not_depend_on_who_asks_before() -> None:
    first = of_sets(images(80, 2))
    torch.rand(7)
    assert of_sets(images(80, 2), *reversed(SETS)) == first


def test_the_reference_may_be_the_whole_split_and_then_has_no_floor() -> None:
    whole = FidMetric(components=6, reference="all")
    found = of_sets(images(80, 2), whole, same=images(80, 3))
    assert {*found} == {"fid"}
    # `everything` holds these very samples, so that the distance profits from them.
    others = of_sets(images(80, 2), FidMetric(components=6))["fid"].value
    assert found["fid"].value is not None
    assert others is not None
    assert found["fid"].value < others
    assert "200 clean ones" in found["fid"].long_name


def classifier() -> DigitClassifier:
    labels = (images(120, 1).mean((1, 2, 3)) > 8).long()
    return DigitClassifier.fit(images(120, 1), labels, scaling=SCALING, seed=0, epochs=3)


def test_a_classifier_of_clean_images_gives_features_and_logits() -> None:
    metrics = (
        FidMetric(features="classifier"),
        FidMetric(features="components", name="fd_components", components=4),
        InceptionScoreMetric(features="classifier", splits=2),
    )
    found = of_sets(images(80, 2), *metrics, same=images(80, 3), classifier=classifier())
    assert {*found} == {
        *("fid", "fid_floor", "fd_components", "fd_components_floor"),
        *("inception_score", "inception_score_clean"),
    }
    score = found["inception_score"].value
    assert score is not None
    assert 0.999 <= score <= 2.001


class Means:
    """Features of one's own: what a picture's corners are."""

    def __init__(self, bias: float = 0.0) -> None:
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        assert float(x.min()) >= 0
        assert float(x.max()) <= 1
        return x[:, :, ::7, ::7].flatten(1) + self.bias


def test_features_of_ones_own_are_checked_before_the_run() -> None:
    own = FidMetric(features=f"{__name__}:Means", arguments={"bias": 2.0})
    found = of_sets(images(80, 2), own)["fid"]
    assert found.value is not None
    assert found.value >= 0

    def check(metric: FidMetric) -> None:
        build.check_set_metrics(EvaluationConfig(metrics=(metric,)), (1, 8, 8), SCALING)

    check(own)
    with pytest.raises(ValueError, match=r"metrics.fid.features names 'Nothing'"):
        check(FidMetric(features=f"{__name__}:Nothing"))
    with pytest.raises(ValueError, match=r"metrics.fid.features.*does not take"):
        check(FidMetric(features=f"{__name__}:Means", arguments={"shift": 1}))


@pytest.mark.parametrize(
    ("metric", "name", "reason"),
    [
        (FidMetric(features="inception"), "fid", "names no local file"),
        (
            KidMetric(features="inception", weights="/nowhere.pth"),
            "kid",
            "'/nowhere.pth', where no file is",
        ),
        (InceptionScoreMetric(), "inception_score", "names no local file"),
        (NeighboursMetric(features="classifier"), "recall", "takes labelled, square images"),
        (NeighboursMetric(neighbours=80), "coverage", "need 81 samples, there are 80"),
        (InceptionScoreMetric(features="classifier", splits=50), "inception_score", "need 100"),
    ],
)
def test_sets_that_cannot_be_compared_say_why(metric: Any, name: str, reason: str) -> None:
    known = classifier() if isinstance(metric, InceptionScoreMetric) else None
    found = of_sets(images(80, 2), metric, same=images(80, 3), classifier=known)
    assert found[name].value is None
    assert re.search(reason, found[name].long_name)
    assert not any(
        key.endswith(("_floor", "_clean")) and m.value is None for key, m in found.items()
    )


def test_constant_images_and_too_few_clean_ones_say_why() -> None:
    constant = torch.full((60, 1, 8, 8), 8.0)
    found = of_sets(images(80, 2), others=constant, same=constant)
    told = {name: found[name].long_name for name in ("fid", "kid", "precision")}
    assert all("every clean sample is the same" in text for text in told.values())
    collapsed = of_sets(torch.full((80, 1, 8, 8), 8.0))
    assert collapsed["fid"].value is not None
    assert collapsed["fid"].value > 0.5
    assert "80 generated samples are the same" in collapsed["precision"].long_name
    none = of_sets(images(80, 2), others=images(1, 1))
    assert all("belongs to a reconstruction" in m.long_name for m in none.values())
    assert {*none} == NAMES


def test_likenesses_are_of_single_samples_and_of_their_mean() -> None:
    x = images(30, 0)
    noise = torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(0))
    draws = (x + 3 * noise).clamp(0, 16)
    found = likenesses((SsimMetric(),), draws, x, scaling=SCALING)
    assert {*found} == {"ssim_sample", "ssim_mean"}
    sample, mean = found["ssim_sample"].value, found["ssim_mean"].value
    assert sample is not None
    assert mean is not None
    assert 0 < sample < mean < 1
    assert found["ssim_mean"].better == "higher"


@pytest.mark.parametrize(
    ("metric", "x", "reason"),
    [
        (SsimMetric(), torch.zeros(9, 5), "vectors"),
        (MsSsimMetric(), images(9, 0), "more than 176 pixels, these have 8 x 8"),
        (LpipsMetric(), images(9, 0), "lpips.weights names no local file"),
        (LpipsMetric(weights="/nowhere.pth"), images(9, 0), "where no file is"),
    ],
)
def test_pairs_that_cannot_be_compared_say_why(metric: Any, x: Tensor, reason: str) -> None:
    found = likenesses((metric,), x[None], x, scaling=SCALING)
    assert [m.value for m in found.values()] == [None, None]
    assert all(reason in m.long_name for m in found.values())


def test_names_are_given_once_and_belong_to_nobody_else() -> None:
    with pytest.raises(ValidationError, match="holds fid more than once; give another name"):
        EvaluationConfig(metrics=(FidMetric(), FidMetric(features="classifier")))
    with pytest.raises(ValidationError, match="'divergence', which something else has"):
        EvaluationConfig(metrics=(FidMetric(name="divergence"),))
    with pytest.raises(ValidationError, match="'fid_floor'"):
        EvaluationConfig(metrics=(FidMetric(name="fid_floor"),))


def test_a_config_without_metrics_has_the_digest_that_it_had_before_there_were_any() -> None:
    config = RunConfig.model_validate(TINY)
    assert "metrics" not in config.identity()["evaluation"]
    changed = TINY | {"evaluation": {**TINY["evaluation"], "metrics": [{"kind": "ssim"}]}}  # type: ignore[dict-item]
    assert RunConfig.model_validate(changed).digest != config.digest
