"""Metrics of images and of sets of samples: closed forms, planted faults, other libraries."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffem_core.image_quality import Lpips, inception_score, kernel_distance, ms_ssim, ssim
from diffem_core.measurement import Measurement
from diffem_core.metrics import frechet_distance
from diffem_core.neighbour_metrics import neighbour_metrics


def value(measured: Measurement) -> float:
    assert measured.value is not None, measured.reason
    return measured.value


def normal(n: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("side", [6, 8, 32])
def test_ssim_of_constant_images_is_its_luminance_term(side: int) -> None:
    # Without variance, (2 a b + c) / (a^2 + b^2 + c) with c = 0.01^2 is all that is left.
    a, b = 0.3, 0.6
    x = torch.full((3, 1, side, side), a)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert value(ssim(torch.full_like(x, b), x)) == pytest.approx(expected, abs=1e-6)
    assert value(ssim(x, x)) == pytest.approx(1, abs=1e-9)


def test_ssim_falls_with_noise_and_knows_its_error() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(40, 3, 16, 16, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    found = [ssim((x + level * noise).clamp(0, 1), x) for level in (0.02, 0.1, 0.4)]
    values = [value(one) for one in found]
    assert 1 > values[0] > values[1] > values[2] > 0
    error = found[1].standard_error
    assert error is not None
    assert 0 < error < 0.01


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (ssim(torch.zeros(2, 1, 5, 9), torch.zeros(2, 1, 5, 9)), "6 pixels or more.* 5 x 9"),
        (ms_ssim(torch.zeros(2, 1, 64, 64), torch.zeros(2, 1, 64, 64)), "more than 176"),
        (kernel_distance(torch.zeros(1, 3), torch.zeros(9, 3), seed=0), "needs 2 samples"),
        (inception_score(torch.zeros(19, 4), seed=0), "need 20 samples, there are 19"),
        (neighbour_metrics(normal(5, 2, 0), normal(9, 2, 1))["recall"], "need 6 .* there are 5"),
        (neighbour_metrics(normal(9, 2, 0), torch.ones(9, 2))["density"], "9 real .* the same"),
        (neighbour_metrics(torch.ones(9, 2), normal(9, 2, 0))["recall"], "9 generated"),
    ],
)
def test_what_cannot_be_measured_is_left_out_with_the_reason(
    measured: Measurement, reason: str
) -> None:
    assert measured.value is None
    assert measured.reason is not None
    assert re.search(reason, measured.reason)


def test_pairs_must_be_pairs() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1, 8, 8\) and \(3, 1, 8, 8\)"):
        ssim(torch.zeros(2, 1, 8, 8), torch.zeros(3, 1, 8, 8))


# --- neighbours


def test_density_and_coverage_of_equal_distributions_are_what_theory_expects() -> None:
    n = m = 400
    k = 5
    runs = [neighbour_metrics(normal(m, 3, s), normal(n, 3, 1000 + s)) for s in range(8)]
    coverage = sum(value(run["coverage"]) for run in runs) / len(runs)
    density = sum(value(run["density"]) for run in runs) / len(runs)
    # Naeem et al., equation 9: 1 - prod_i (n - i) / (m + n - i), i = 1 ... k.
    expected = 1 - math.prod((n - i) / (m + n - i) for i in range(1, k + 1))
    # A share of 8 x 400 points, correlated: five times its error if each counted a tenth.
    assert coverage == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / 320))
    # A ball holds k of n - 1 others, so m k / (n - 1) of the samples on average.
    assert density == pytest.approx(m / (n - 1), rel=0.1)


def test_a_missing_mode_lowers_recall_and_coverage_alone() -> None:
    real = normal(600, 2, 0) + 20 * (torch.arange(600) % 2)[:, None]
    samples = normal(600, 2, 1)  # one of both modes
    found = neighbour_metrics(samples, real)
    assert value(found["precision"]) > 0.95
    assert value(found["recall"]) == pytest.approx(0.5, abs=0.03)
    assert value(found["coverage"]) == pytest.approx(0.5, abs=0.03)


def test_samples_that_are_far_off_lower_precision_and_density() -> None:
    real = normal(600, 2, 0)
    samples = torch.cat([normal(300, 2, 1), normal(300, 2, 2) + 50])
    found = neighbour_metrics(samples, real)
    assert value(found["precision"]) == pytest.approx(0.5, abs=0.03)
    assert value(found["density"]) == pytest.approx(0.5, abs=0.06)
    assert value(found["recall"]) > 0.9


def test_one_outlier_among_the_real_ones_moves_precision_and_not_density() -> None:
    # Its ball reaches back to the others and holds half a plane.
    real = torch.cat([normal(400, 2, 0), torch.tensor([[30.0, 0.0]], dtype=torch.float64)])
    samples = normal(400, 2, 1) * 0.1 + torch.tensor([15.0, 0.0])
    found = neighbour_metrics(samples, real, neighbours=5)
    assert value(found["precision"]) == 1
    assert value(found["density"]) == pytest.approx(1 / 5)


def test_equal_rows_are_neighbours_like_any_other_and_large_sets_go_in_parts() -> None:
    rows = normal(30, 2, 0)
    twice = torch.cat([rows, rows])
    # The nearest other row of each is its copy: balls without extent, which hold equal rows only.
    assert value(neighbour_metrics(twice + 1e-3, twice, neighbours=1)["precision"]) == 0
    assert value(neighbour_metrics(twice + 1e-3, twice, neighbours=2)["precision"]) > 0
    many = neighbour_metrics(normal(1500, 2, 1), normal(1300, 2, 2))
    assert value(many["coverage"]) > 0.9


# --- distances of features


def test_the_frechet_distance_is_that_of_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    from diffem_core.image_quality import _Given

    a, b = normal(300, 6, 0) @ normal(6, 6, 9), normal(400, 6, 1) + 0.5
    metric = FrechetInceptionDistance(feature=_Given(6))
    metric.set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_the_kernel_distance_is_its_formula_unbiased_and_sees_a_shift() -> None:
    a, b = normal(60, 5, 0), normal(50, 5, 1)
    kernel = [(u @ v.mT / 5 + 1) ** 3 for u, v in ((a, a), (b, b), (a, b))]
    within = [(k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in kernel[:2]]
    whole = float(within[0] + within[1] - 2 * kernel[2].mean())
    # One subset of everything on the smaller side; many subsets scatter around that of all.
    found = kernel_distance(a[:50], b, subsets=1, subset_size=1000, seed=0)
    small = [(k.sum() - k.diagonal().sum()) / (50 * 49) for k in (kernel[0][:50, :50], kernel[1])]
    expected = float(small[0] + small[1] - 2 * kernel[2][:50].mean())
    assert value(found) == pytest.approx(expected, rel=1e-6)
    many = kernel_distance(a, b, subsets=200, subset_size=30, seed=0)
    assert many.standard_error is not None
    assert value(many) == pytest.approx(whole, abs=4 * many.standard_error / math.sqrt(200) + 0.05)
    assert value(kernel_distance(a + 1, b, seed=0)) > value(found) + 1


def test_the_inception_score_counts_classes_and_is_the_same_again() -> None:
    sure = 30 * torch.eye(7).repeat(20, 1)
    assert value(inception_score(sure, splits=1, seed=0)) == pytest.approx(7, rel=1e-6)
    assert value(inception_score(0 * sure, seed=0)) == pytest.approx(1, rel=1e-6)
    before = torch.random.get_rng_state()
    first, again = (inception_score(sure, splits=4, seed=5) for _ in range(2))
    assert first == again
    assert torch.equal(torch.random.get_rng_state(), before), "nobody else's randomness is used"


# --- LPIPS


def backbone(seed: int) -> dict[str, Tensor]:
    import torchvision.models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torchvision.models.squeezenet1_1(weights=None).state_dict()


def test_lpips_takes_the_weights_that_it_is_given_and_asks_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = torch.hub.get_dir()
    first, second = (Lpips("squeeze", backbone(seed)) for seed in (0, 1))
    assert torch.hub.get_dir() == folder
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 32, 32, generator=generator)
    other = torch.rand(3, 3, 32, 32, generator=generator)
    assert value(first(x, x)) == 0
    assert value(first(other, x)) > 0
    assert value(first(other, x)) != value(second(other, x))
    grey = x.mean(1, keepdim=True)
    assert value(first(grey, grey)) == 0
    small = first(x[..., :16], x[..., :16])
    assert small.reason is not None
    assert "32 pixels or more" in small.reason
    with pytest.raises(ValueError, match="not those of alexnet"):
        Lpips("alex", backbone(0))


def test_weights_are_read_without_unpickling_code(tmp_path: Path) -> None:
    from pipelines.build.features import NoFeatures, build_lpips
    from storage_schemas.config import LpipsMetric

    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("this must not run",)

    path = tmp_path / "weights.pth"
    torch.save({"a": Harmful()}, path)
    with pytest.raises(NoFeatures, match="cannot be read"):
        build_lpips(LpipsMetric(network="squeeze", weights=str(path)), device=torch.device("cpu"))
    torch.save(backbone(0), path)
    config = LpipsMetric(network="squeeze", weights=str(path))
    x = torch.rand(2, 3, 32, 32)
    assert value(build_lpips(config, device=torch.device("cpu"))(x, x)) == 0
