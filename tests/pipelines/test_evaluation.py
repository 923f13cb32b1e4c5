"""What the evaluation's numbers mean, on posteriors that are known in closed form."""

import io
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffem_core.channel import Channel, RandomMask
from diffem_core.metrics import sliced_image_distance
from diffem_core.noise import SampleNoise
from diffem_core.physics_channels import (
    accelerated_mri,
    compressed_sensing,
    denoising,
    gaussian_blur,
    jpeg,
    poisson,
    quantization,
    super_resolution,
)
from diffem_core.scaling import Scaling
from pipelines.evaluation import Evaluation, Observed, Truth, divergences, evaluate, work_of
from pipelines.evaluation.observation_space import TWO_SAMPLE
from pipelines.preview import image_preview, observed_images
from pipelines.sources import load_clean_samples
from storage_schemas.config import (
    ClassifierMonitor,
    DigitsData,
    DiversityMonitor,
    EnergyMonitor,
    EvaluationConfig,
    FrechetMonitor,
    HiddenRanksMonitor,
    MmdMonitor,
    MonitorConfig,
    PhotosData,
    PredictiveMonitor,
    SinkhornDistance,
    SlicedMonitor,
    SlicedWassersteinDistance,
)
from storage_schemas.metrics import Metric

SHAPE = (1, 8, 8)
STD = 2.0
SCALING = Scaling.from_range(-4.0, 4.0)


class WhitePosterior:
    """The posterior of x ~ N(0, STD^2 I) under a noiseless mask: what is hidden is drawn anew."""

    def __init__(self, spread: float = STD) -> None:
        self.spread = spread

    def sample(
        self,
        y: Tensor,
        params: Mapping[str, Tensor],
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
    ) -> Tensor:
        z = SampleNoise(seeds).normal(SHAPE) * self.spread * temperature
        return torch.where(params["mask"] > 0.5, y, z)


def observe(n: int, seed: int) -> tuple[Tensor, Observed]:
    generator = torch.Generator().manual_seed(seed)
    channel = RandomMask(SHAPE, keep=0.5, noise_std=0.0)
    x = torch.randn(n, *SHAPE, generator=generator) * STD
    params = channel.draw_params(n, generator=generator)
    y = channel.corrupt(x, params, generator=generator)
    return x, Observed(sample_ids=range(n), y=y, params=params)


def judge(
    posterior: WhitePosterior, config: EvaluationConfig, *, with_truth: bool = True
) -> Evaluation:
    x_holdout, holdout = observe(120, 0)
    x_training, others = observe(400, 1)
    truth = Truth(holdout=x_holdout, holdout_labels=None, training=x_training, classifier=None)
    return evaluate(
        posterior,
        channel=RandomMask(SHAPE, keep=0.5, noise_std=0.0),
        scaling=SCALING,
        config=config,
        holdout=holdout,
        others=others,
        truth=truth if with_truth else None,
        floors=None,
        seed=3,
        batch_size=64,
    )


CONFIG = EvaluationConfig(draws=4, reconstructions=100, preview=0)


def test_the_errors_are_those_of_the_closed_form() -> None:
    values = judge(WhitePosterior(), CONFIG).metrics.numbers()
    # Hidden entries: a draw and the truth are independent, so that the mean square of their
    # difference is 2 STD^2, and STD^2 (1 + 1/4) for the mean of four draws. About 3,840 hidden
    # entries: relative standard errors of the roots of 1/sqrt(2 x 3840) = 0.011 or less.
    scale = SCALING.scale * STD
    assert values["hidden_rmse_sample"] == pytest.approx(scale * math.sqrt(2), rel=5 * 0.011)
    assert values["hidden_rmse_mean"] == pytest.approx(scale * math.sqrt(1.25), rel=5 * 0.011)
    assert values["rmse_mean"] == pytest.approx(
        scale * math.sqrt(1.25 / 2),
        rel=5 * 0.011 + 0.02,  # half of the pixels, +- 0.006
    )
    assert values["spread_ratio"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("spread", "low", "high"), [(0.5 * STD, 0.3, 0.8), (2 * STD, 1.2, 2.2)])
def test_the_spread_ratio_tells_too_sure_from_too_spread(
    spread: float, low: float, high: float
) -> None:
    ratio = judge(WhitePosterior(spread), CONFIG).metrics.numbers()["spread_ratio"]
    assert ratio is not None
    assert low < ratio < high


def test_the_divergence_is_at_its_floor_for_the_true_posterior_and_above_it_for_another() -> None:
    true = judge(WhitePosterior(), CONFIG).metrics.values
    wrong = judge(WhitePosterior(0.3 * STD), CONFIG).metrics.values
    value, floor, error = (
        true["divergence"].value,
        true["divergence_floor"].value,
        true["divergence"].standard_error,
    )
    assert value is not None
    assert floor is not None
    assert error is not None
    assert abs(value - floor) < 5 * error
    assert wrong["divergence"].value is not None
    assert wrong["divergence"].value - floor > 10 * error


def test_without_truth_nothing_of_it_is_measured() -> None:
    with_truth = judge(WhitePosterior(), CONFIG)
    without = judge(WhitePosterior(), CONFIG, with_truth=False)
    two_sample = ("divergence", "sliced_wasserstein", "energy", "classifier", "frechet")
    assert set(without.metrics.values) == {
        *(name + suffix for name in two_sample for suffix in ("", "_floor")),
        *("residual", "predictive", "uncovered", "participation", "participation_start"),
        *("draw_variance", "nearest", "duplicates", "collapse"),
    }
    errors = {"coverage_50", "coverage_90", "ranks", "spread_ratio", "hidden_rmse_mean"}
    assert errors <= set(with_truth.metrics.values)
    assert torch.equal(with_truth.draws, without.draws)
    for name, metric in without.metrics.values.items():
        assert metric == with_truth.metrics.values[name]


def test_floors_are_taken_over() -> None:
    first = judge(WhitePosterior(), CONFIG).metrics.values
    _, holdout = observe(120, 0)
    _, others = observe(400, 1)
    again = evaluate(
        WhitePosterior(0.5 * STD),
        channel=RandomMask(SHAPE, keep=0.5, noise_std=0.0),
        scaling=SCALING,
        config=CONFIG,
        holdout=holdout,
        others=others,
        truth=None,
        floors=first,
        seed=3,
        batch_size=64,
    ).metrics.values
    assert again["divergence_floor"] == first["divergence_floor"]
    assert again["energy_floor"] == first["energy_floor"]
    assert again["participation_start"] == first["participation_start"]
    assert again["divergence"] != first["divergence"]
    assert again["participation"] != first["participation"]


def test_the_work_that_is_announced_is_the_work_that_is_done() -> None:
    done = []
    hidden = HiddenRanksMonitor(draws=3, samples=50)
    config = CONFIG.model_copy(update={"monitors": (hidden,)})
    _, holdout = observe(120, 0)
    _, others = observe(400, 1)
    evaluate(
        WhitePosterior(),
        channel=RandomMask(SHAPE, keep=0.5, noise_std=0.0),
        scaling=SCALING,
        config=config,
        holdout=holdout,
        others=others,
        truth=None,
        floors=None,
        seed=3,
        batch_size=50,
        on_progress=done.append,
    )
    assert sum(done) == work_of(config, holdout=120, others=400) == 4 * 120 + 100 + 3 * 50


def test_a_distance_whose_clean_samples_are_all_taken_says_so() -> None:
    config = sinkhorn_config(reconstructions=400)
    metric = judge(WhitePosterior(), config).metrics.values["distance"]
    assert metric.value is None
    assert "lower reconstructions" in metric.long_name


def sinkhorn_config(*, reconstructions: int) -> EvaluationConfig:
    return EvaluationConfig(
        draws=2,
        reconstructions=reconstructions,
        preview=0,
        distance=SinkhornDistance(samples=64),
    )


class GaussianPosterior:
    """The posterior of x ~ N(0, STD^2 I) under a linear channel with Gaussian noise.

    With K = STD^2 A' (STD^2 A A' + sigma^2)^-1, x' from the prior and y' = A x' + noise, a sample
    is x' + K (y - y').
    """

    def __init__(self, channel: Channel, *, blurred: bool = False) -> None:
        self.channel = channel
        self.blurred = blurred

    def sample(
        self,
        y: Tensor,
        params: Mapping[str, Tensor],
        *,
        seeds: Sequence[int],
        temperature: float = 1.0,
    ) -> Tensor:
        A = self.channel.matrix(params).expand(len(y), -1, -1)
        sigma = self.channel.noise_std
        assert sigma is not None
        noise = SampleNoise(seeds)
        x = noise.normal(self.channel.x_shape).double().flatten(1) * STD
        e = noise.normal(self.channel.y_shape).double().flatten(1) * sigma
        gap = y.double().flatten(1) - (A @ x.unsqueeze(-1)).squeeze(-1) - e
        covariance = STD**2 * A @ A.mT + sigma**2 * torch.eye(A.shape[1], dtype=torch.float64)
        x = x + STD**2 * (A.mT @ torch.linalg.solve(covariance, gap.unsqueeze(-1))).squeeze(-1)
        x = x.reshape(len(y), *self.channel.x_shape).float()
        return smoothed(x) if self.blurred else x


def observe_by(channel: Channel, x: Tensor, seed: int) -> Observed:
    generator = torch.Generator().manual_seed(seed)
    params = channel.draw_params(len(x), generator=generator)
    y = channel.corrupt(x, params, generator=generator)
    return Observed(sample_ids=range(len(x)), y=y, params=params)


def white(n: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return STD * torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


LINEAR: dict[str, Callable[[], Channel]] = {
    "gaussian_blur": lambda: gaussian_blur(SHAPE, sigma=0.7, noise_std=0.5),
    "super_resolution": lambda: super_resolution(SHAPE, factor=2, noise_std=1.0),
    "compressed_sensing": lambda: compressed_sensing(
        SHAPE, measurements=24, noise_std=1.0, fixed=True
    ),
    "mri": lambda: accelerated_mri((8, 8), acceleration=2.0, noise_std=1.0),
}


@pytest.mark.parametrize("kind", LINEAR)
def test_the_true_posterior_reaches_the_floor_whatever_the_channel(kind: str) -> None:
    channel = LINEAR[kind]()
    x_holdout, x_training = white(300, channel.x_shape, 0), white(700, channel.x_shape, 1)
    holdout = observe_by(channel, x_holdout, 2)
    others = observe_by(channel, x_training, 3)

    def judged(posterior: GaussianPosterior) -> Evaluation:
        return evaluate(
            posterior,
            channel=channel,
            scaling=SCALING,
            config=EvaluationConfig(draws=2, reconstructions=300, preview=0),
            holdout=holdout,
            others=others,
            truth=Truth(
                holdout=x_holdout, holdout_labels=None, training=x_training, classifier=None
            ),
            floors=None,
            seed=3,
            batch_size=100,
        )

    true = judged(GaussianPosterior(channel)).metrics.values
    assert {"divergence", "divergence_floor", "rmse_mean", "psnr_mean"} <= set(true)
    assert not {name for name in true if "hidden" in name or "sliced" in name}
    floor, error = true["divergence_floor"].value, true["divergence"].standard_error
    assert floor is not None
    assert error is not None
    assert true["divergence"].value == pytest.approx(floor, abs=3 * error)
    # 300 samples of 64 entries: a relative standard error of 1/sqrt(2 x 19200) = 0.5 % for the
    # error of the mean, and about as much for the spread of 2 draws.
    assert true["spread_ratio"].value == pytest.approx(1, abs=0.04)
    blurred = judged(GaussianPosterior(channel, blurred=True)).metrics.values
    assert blurred["divergence"].value is not None
    assert blurred["divergence"].value > floor + 5 * error


NON_LINEAR: dict[str, Callable[[], Channel]] = {
    "jpeg": lambda: jpeg(SHAPE, quality=40, low=0.0, high=16.0),
    "quantization": lambda: quantization(SHAPE, low=0, high=16, levels=5, noise_std=0.5),
    "poisson": lambda: poisson(SHAPE, gain=1.0),
}


def digits() -> Tensor:
    x = torch.from_numpy(load_clean_samples(DigitsData(), seed=0).x)
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def smoothed(x: Tensor, *, sigma: float = 0.8) -> Tensor:
    """Blur images with a Gaussian."""
    weights = torch.exp(-(torch.arange(-3.0, 4.0) ** 2) / (2 * sigma**2))
    weights = weights / weights.sum()
    bands = x.shape[1]
    kernel = (weights[:, None] * weights).expand(bands, 1, 7, 7)
    return F.conv2d(F.pad(x, (3, 3, 3, 3), mode="replicate"), kernel, groups=bands)


@pytest.mark.parametrize("kind", NON_LINEAR)
def test_the_divergence_of_a_non_linear_channel_tells_true_from_blurred(kind: str) -> None:
    channel, scaling, x = NON_LINEAR[kind](), Scaling.from_range(0, 16), digits()
    holdout, others = observe_by(channel, x[:500], 0), observe_by(channel, x[500:1000], 1)

    def judged(samples: Tensor) -> tuple[float, float, float]:
        found = divergences(channel, scaling, samples, holdout, others, None, 3)
        value, floor = found["divergence"].value, found["divergence_floor"].value
        error = found["divergence"].standard_error
        assert value is not None
        assert floor is not None
        assert error is not None
        return value, floor, error

    # Samples of the true posterior have the distribution of clean samples.
    value, floor, error = judged(x[1000:1500])
    assert value == pytest.approx(floor, abs=3 * error)
    value, floor, error = judged(smoothed(x[1000:1500]))
    assert value > floor + 5 * error


def test_reconstructions_are_corrupted_once_for_all_monitors() -> None:
    calls = []

    class Counting(RandomMask):
        def corrupt(
            self, x: Tensor, params: Mapping[str, Tensor], *, generator: torch.Generator
        ) -> Tensor:
            calls.append(len(x))
            return super().corrupt(x, params, generator=generator)

    _, holdout = observe(120, 0)
    _, others = observe(400, 1)
    channel = Counting(SHAPE, keep=0.5, noise_std=0.0)
    found = divergences(channel, SCALING, torch.ones(50, *SHAPE), holdout, others, None, 3)
    assert {"divergence", "sliced_wasserstein"} <= set(found)
    assert calls == [50]


@pytest.mark.parametrize(
    "data", [DigitsData(), DigitsData(phase="smooth"), PhotosData(), PhotosData(bands=1)]
)
def test_the_sliced_distance_tells_blurred_from_sharp_images(
    data: DigitsData | PhotosData,
) -> None:
    x = torch.from_numpy(load_clean_samples(data, seed=0).x)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    clean, same = x[:400], x[400:800]
    floor = sliced_image_distance(same, clean)
    assert sliced_image_distance(smoothed(same), clean) > 2 * floor
    # Relative to the clean images: a change of units changes nothing.
    assert sliced_image_distance(same / 7 - 2, clean / 7 - 2) == pytest.approx(floor, rel=1e-3)
    assert sliced_image_distance(clean, clean) == 0
    if not isinstance(data, PhotosData):
        return
    # A Gaussian of the right mean and covariance has no edges.
    flat = clean.flatten(1)
    deviation = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    z = torch.randn(400, len(deviation.S), generator=torch.Generator().manual_seed(1))
    gaussian = flat.mean(0) + z * deviation.S / math.sqrt(400) @ deviation.Vh
    assert sliced_image_distance(gaussian.reshape(clean.shape), clean) > 2 * floor


def test_whole_images_alone_do_not_tell_blurred_photographs() -> None:
    x = torch.from_numpy(load_clean_samples(PhotosData(), seed=0).x)
    floor = sliced_image_distance(x[400:800], x[:400], texture=0)
    assert sliced_image_distance(smoothed(x[400:800]), x[:400], texture=0) < 1.2 * floor


def test_the_sliced_distance_is_measured_beside_its_floor() -> None:
    config = EvaluationConfig(
        draws=2, reconstructions=100, preview=0, distance=SlicedWassersteinDistance()
    )
    true = judge(WhitePosterior(), config).metrics.numbers()
    wrong = judge(WhitePosterior(0.3 * STD), config).metrics.numbers()
    floor = true["distance_floor"]
    assert floor is not None
    assert true["distance"] is not None
    assert wrong["distance"] is not None
    assert 0.5 * floor < true["distance"] < 1.5 * floor
    assert wrong["distance"] > 2 * floor
    assert wrong["distance_floor"] == floor
    pixels = SlicedWassersteinDistance(texture=0, projections=16)
    other = judge(WhitePosterior(), config.model_copy(update={"distance": pixels}))
    assert other.metrics.numbers()["distance_floor"] != floor


def test_the_psnr_of_complex_images_is_that_of_their_magnitude() -> None:
    # Errors along the phase of the truth: those of the magnitude, of which 4 is the largest.
    magnitude = 2 + torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    error = torch.randn(120, 1, 8, 8, generator=torch.Generator().manual_seed(1)) / 4

    def psnr_of(x: Tensor, x_hat: Tensor, scaling: Scaling) -> float:
        channel = denoising(tuple(x.shape[1:]), noise_std=1.0)

        class Fixed:
            def sample(
                self, y: Tensor, params: Mapping[str, Tensor], *, seeds: Sequence[int], **_: float
            ) -> Tensor:
                return x_hat[: len(seeds)]

        observed = observe_by(channel, x, 2)
        values = evaluate(
            Fixed(),
            channel=channel,
            scaling=scaling,
            config=EvaluationConfig(draws=2, reconstructions=16, preview=0),
            holdout=observed,
            others=observed,
            truth=Truth(holdout=x, holdout_labels=None, training=x, classifier=None),
            floors=None,
            seed=0,
            batch_size=120,
        ).metrics.numbers()
        assert values["psnr_sample"] is not None
        return values["psnr_sample"]

    real = psnr_of(magnitude, magnitude + error, Scaling.from_range(0, 4))
    turn = torch.tensor([0.6, 0.8]).reshape(1, 2, 1, 1)
    both = psnr_of(magnitude * turn, (magnitude + error) * turn, Scaling.from_range(-4, 4))
    assert both == pytest.approx(real, abs=1e-3)
    assert real == pytest.approx(20 * math.log10(4 / 0.25), abs=0.2)


def test_observations_are_shown_as_images_where_they_are_some() -> None:
    x = digits()[:4]

    def shown(channel: Channel, x: Tensor = x) -> tuple[Tensor | None, Tensor]:
        observed = observe_by(channel, x, 0)
        return observed_images(channel, observed.y, observed.params), observed.y

    for make in NON_LINEAR.values():
        image, y = shown(make())
        assert image is not None
        assert torch.equal(image, y)
    image, y = shown(LINEAR["gaussian_blur"]())  # as it is: its inverse would be noise alone
    assert image is not None
    assert torch.equal(image, y)
    image, y = shown(super_resolution(SHAPE, factor=2, noise_std=1.0, shifts=False))
    assert image is not None
    assert torch.equal(image, y.repeat_interleave(2, -1).repeat_interleave(2, -2))
    image, y = shown(LINEAR["compressed_sensing"]())
    assert y.shape == (4, 24)
    assert image is not None
    assert image.shape == (4, *SHAPE)
    # k-space, though of the shape of x, is not the image.
    full = accelerated_mri((8, 8), acceleration=1.0, center=0.0, noise_std=0.0)
    both = torch.cat([x, x.flip(-1)], dim=1)
    image, y = shown(full, both)
    assert image is not None
    assert not torch.allclose(y, both, atol=1)
    torch.testing.assert_close(image, both, atol=1e-3, rtol=0)
    halves = NON_LINEAR["quantization"]()
    halves.y_shape = (1, 4, 8)
    assert observed_images(halves, torch.zeros(4, 1, 4, 8), {}) is None


def picture(x: Tensor, *, observed: Tensor | None, value_range: tuple[float, float]) -> np.ndarray:
    png = image_preview(
        truth=x.numpy(),
        observed=None if observed is None else observed.numpy(),
        seen=None,
        draws=torch.stack([x, x]).numpy(),
        value_range=value_range,
        title="",
    )
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_complex_images_are_shown_as_their_magnitude() -> None:
    x = digits()[:4]
    turned = torch.cat([0.6 * x, -0.8 * x], dim=1)
    real = picture(x, observed=x, value_range=(0, 16))
    both = picture(turned, observed=turned, value_range=(-16, 16))
    assert real.shape == both.shape
    # Rounding apart, the same picture: no pixel is off by more than a grey level or two.
    assert np.abs(real.astype(int) - both.astype(int)).max() <= 2


def test_colours_are_shown_and_observations_can_be_left_out() -> None:
    red = torch.zeros(2, 3, 8, 8)
    red[:, 0] = 255
    shown = picture(red, observed=red, value_range=(0, 255))
    assert ((shown[..., 0] > 250) & (shown[..., 1:] < 5).all(-1)).mean() > 0.2
    shorter = picture(red, observed=None, value_range=(0, 255))
    assert shorter.shape[0] < shown.shape[0]


EVERY = (*EvaluationConfig().monitors, MmdMonitor(), HiddenRanksMonitor())


def test_metrics_are_numbers_or_say_why_not() -> None:
    # One and five held-out observations are too few for nearly everything.
    for count in (1, 5):
        _, holdout = observe(count, 0)
        _, others = observe(60, 1)
        values = evaluate(
            WhitePosterior(),
            channel=RandomMask(SHAPE, keep=0.5, noise_std=0.0),
            scaling=SCALING,
            config=EvaluationConfig(draws=2, reconstructions=60, preview=0, monitors=EVERY),
            holdout=holdout,
            others=others,
            truth=None,
            floors=None,
            seed=0,
            batch_size=64,
        ).metrics.values
        for name in ("energy", "mmd", "classifier", "frechet", "residual", "uncovered"):
            assert values[name].value is None
            assert values[name].long_name.startswith("not known: ")
        assert "lower evaluation.reconstructions" in values["frechet"].long_name
        assert (values["divergence"].value is None) == (count == 1)
        assert (
            values["divergence"].value
            or "give more observations" in values["divergence"].long_name
        )


def test_constant_images_leave_numbers_out_with_the_reason() -> None:
    class Constant:
        def sample(
            self, y: Tensor, params: Mapping[str, Tensor], *, seeds: Sequence[int], **_: float
        ) -> Tensor:
            return torch.full((len(y), *SHAPE), 1.0)

    channel = denoising(SHAPE, noise_std=0.0)
    observed = observe_by(channel, torch.full((100, *SHAPE), 1.0), 0)
    values = evaluate(
        Constant(),
        channel=channel,
        scaling=SCALING,
        config=EvaluationConfig(draws=2, reconstructions=50, preview=0, monitors=EVERY),
        holdout=observed,
        others=observed,
        truth=None,
        floors=None,
        seed=0,
        batch_size=64,
    ).metrics.values
    for name in ("energy", "mmd", "classifier", "frechet", "participation", "draw_variance"):
        assert values[name].value is None, name
        assert "is the same" in values[name].long_name
    assert values["duplicates"].value == 1
    assert values["collapse"].value == 0  # nothing is less diverse than the data


def numbers(monitor: MonitorConfig, name: str) -> tuple[Metric, Metric]:
    config = CONFIG.model_copy(update={"monitors": (monitor,)})
    values = judge(WhitePosterior(), config).metrics.values
    return values[name], values.get(f"{name}_floor", values[name])


@pytest.mark.parametrize(
    ("monitor", "change"),
    [
        (SlicedMonitor(), {"projections": 16}),
        (EnergyMonitor(), {"samples": 60}),
        (EnergyMonitor(), {"permutations": 24}),
        (MmdMonitor(), {"bandwidth": 0.5}),
        (MmdMonitor(), {"samples": 60}),
        (MmdMonitor(), {"permutations": 24}),
        (ClassifierMonitor(), {"model": "mlp"}),
        (ClassifierMonitor(), {"components": 4}),
        (ClassifierMonitor(), {"samples": 90}),
        (FrechetMonitor(), {"components": 8}),
        (FrechetMonitor(), {"permutations": 24}),
        (FrechetMonitor(), {"features": "tests.pipelines.test_evaluation:Means"}),
        (HiddenRanksMonitor(), {"draws": 3}),
        (HiddenRanksMonitor(), {"fraction": 0.3}),
        (HiddenRanksMonitor(), {"samples": 60}),
        (DiversityMonitor(), {"references": 20}),
        (DiversityMonitor(), {"observations": 30}),
    ],
    ids=str,
)
def test_every_field_of_a_monitor_changes_what_is_measured(
    monitor: MonitorConfig, change: dict[str, object]
) -> None:
    name = {"diversity": "uncovered"}.get(monitor.kind, monitor.kind)
    before = numbers(monitor, name)
    assert before == numbers(monitor, name)
    other = numbers(type(monitor).model_validate({**monitor.model_dump(), **change}), name)
    assert before != other
    assert all(metric.value is not None for metric in (*before, *other))


class Means:
    """Features of one's own: the mean of an image, and of its square."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, seen: Tensor) -> Tensor:
        assert seen.shape[1:] == SHAPE
        flat = self.factor * seen.flatten(1)
        return torch.stack([flat.mean(1), flat.square().mean(1)], dim=1)


def test_features_of_one_s_own_get_their_arguments_and_are_checked() -> None:
    target = "tests.pipelines.test_evaluation:Means"
    once, _ = numbers(FrechetMonitor(features=target), "frechet")
    twice, _ = numbers(FrechetMonitor(features=target, arguments={"factor": 2.0}), "frechet")
    assert once.value is not None
    assert twice.value is not None
    assert twice.value > 3 * once.value
    assert target in once.long_name
    monitor = FrechetMonitor(features=target, arguments={"factor": 1e200})
    with pytest.raises(ValueError, match="return one finite row for each"):
        numbers(monitor, "frechet")
    with pytest.raises(ValueError, match="no such class"):
        numbers(FrechetMonitor(features="tests.pipelines.test_evaluation:Nobody"), "frechet")


def test_monitors_draw_nothing_that_others_depend_on() -> None:
    every = judge(WhitePosterior(), CONFIG.model_copy(update={"monitors": EVERY}))
    none = judge(WhitePosterior(), CONFIG.model_copy(update={"monitors": ()}))
    assert torch.equal(every.draws, none.draws)
    assert torch.equal(every.reconstructions, none.reconstructions)
    for name, metric in none.metrics.values.items():
        assert every.metrics.values[name] == metric


def test_a_collapsed_posterior_is_warned_of_and_the_true_one_is_not() -> None:
    class Collapsed(WhitePosterior):
        def sample(
            self,
            y: Tensor,
            params: Mapping[str, Tensor],
            *,
            seeds: Sequence[int],
            temperature: float = 1.0,
        ) -> Tensor:
            few = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5)) * STD
            return few[[seed % 3 for seed in seeds]]

    config = CONFIG.model_copy(update={"monitors": EVERY})
    true = judge(WhitePosterior(), config).metrics.values
    wrong = judge(Collapsed(), config).metrics.values
    assert true["collapse"].value == 0
    assert wrong["collapse"].value == 1
    assert "held-out observations are farther" in wrong["collapse"].long_name
    for name in ("energy", "mmd", "classifier", "frechet"):
        found, right = wrong[name], true[name]
        assert found.p_value is not None
        assert right.p_value is not None
        assert found.p_value <= 0.01 < right.p_value, name
        assert found.better == "lower"
    assert wrong["duplicates"].value == 1
    assert wrong["ranks"].p_value is not None
    assert wrong["ranks"].p_value < 1e-3


def test_hidden_ranks_ask_the_posterior_for_hidden_pixels() -> None:
    config = CONFIG.model_copy(update={"monitors": (HiddenRanksMonitor(fraction=0.2),)})
    true, sure = (
        judge(WhitePosterior(spread), config, with_truth=False).metrics.values["hidden_ranks"]
        for spread in (STD, 0.3 * STD)
    )
    assert true.p_value is not None
    assert true.p_value > 0.01
    # 120 images with 6 hidden pixels each: 12 (u - 1/2)^2 has a standard deviation of 0.9, so that
    # its mean over 720 is off by 0.033; three times.
    assert true.value == pytest.approx(1, abs=0.1)
    assert sure.value is not None
    assert sure.value > 1.5
    assert sure.bins is not None
    assert sum(sure.bins) == pytest.approx(1)


@pytest.mark.parametrize("kind", NON_LINEAR)
def test_the_predictive_check_serves_every_channel(kind: str) -> None:
    channel, x = NON_LINEAR[kind](), digits()[:300]

    class Answering:
        def __init__(self, answers: Tensor) -> None:
            self.answers = answers

        def sample(
            self, y: Tensor, params: Mapping[str, Tensor], *, seeds: Sequence[int], **_: float
        ) -> Tensor:
            return self.answers[: len(seeds)]

    def predictive(answers: Tensor) -> Metric:
        return evaluate(
            Answering(answers),
            channel=channel,
            scaling=Scaling.from_range(0, 16),
            config=EvaluationConfig(
                draws=2, reconstructions=100, preview=0, monitors=(PredictiveMonitor(),)
            ),
            holdout=observe_by(channel, x, 2),
            others=observe_by(channel, x, 3),
            truth=None,
            floors=None,
            seed=0,
            batch_size=300,
        ).metrics.values["predictive"]

    # The truth is a sample of its own posterior; JPEG repeats itself, so that all are ties.
    right, wrong = predictive(x), predictive(smoothed(x))
    if kind == "jpeg":
        assert right.value is None
    else:
        assert right.p_value is not None
        assert right.p_value > 0.01
    assert wrong.value is not None
    assert wrong.value > 0.9


def test_every_monitor_of_two_samples_is_known_by_name() -> None:
    values = judge(WhitePosterior(), CONFIG.model_copy(update={"monitors": EVERY})).metrics.values
    assert {name for name in values if f"{name}_floor" in values} - {"distance"} == set(TWO_SAMPLE)
