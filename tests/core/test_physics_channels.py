"""Channels around deepinv's physics: linear ones are linear, and all of them simulate what they
say."""

import functools
import math

import pytest
import torch
from deepinv.physics import Denoising, Physics
from torch import Tensor

from diffem_core import (
    Augmentation,
    Channel,
    Denoiser,
    GaussianPosterior,
    MMPSPosterior,
    PhysicsChannel,
    PseudoInverse,
    Scaling,
    UNet,
    VELogLinear,
    accelerated_mri,
    compressed_sensing,
    constant_rate,
    denoising,
    dpm_solver,
    em,
    fit_gaussian_prior,
    gaussian_blur,
    jpeg,
    log_linear_grid,
    poisson,
    quantization,
    seeded_initialization,
    super_resolution,
)
from diffem_core.channel import gaussian_noise

SHAPE = (1, 8, 8)
LINEAR = {
    "denoising": lambda: denoising(SHAPE, noise_std=0.5),
    "super_resolution": lambda: super_resolution((2, 8, 8), factor=2, noise_std=0.1),
    "super_resolution_fixed": lambda: super_resolution(
        (2, 8, 8), factor=2, noise_std=0.1, shifts=False
    ),
    "gaussian_blur": lambda: gaussian_blur((2, 8, 6), sigma=(0.4, 1.0), noise_std=0.1),
    "gaussian_blur_fixed": lambda: gaussian_blur(SHAPE, sigma=1.0, noise_std=0.1),
    "compressed_sensing": lambda: compressed_sensing(SHAPE, measurements=20, noise_std=0.1),
    "compressed_sensing_fixed": lambda: compressed_sensing(
        SHAPE, measurements=20, noise_std=0.1, fixed=True
    ),
    "mri": lambda: accelerated_mri((8, 8), acceleration=2.0, center=0.25, noise_std=0.05),
}
NON_LINEAR = {
    "poisson": lambda: poisson(SHAPE, gain=0.5),
    "quantization": lambda: quantization(SHAPE, low=0.0, high=16.0, levels=5, noise_std=0.3),
    "jpeg": lambda: jpeg(SHAPE, quality=30, low=0.0, high=16.0),
    "jpeg_colour": lambda: jpeg((3, 16, 16), quality=50, low=0.0, high=16.0),
}
ALL = LINEAR | NON_LINEAR


def images(n: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 16 * torch.rand(n, *shape, generator=generator)


def observe(channel: Channel, x: Tensor, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    params = channel.draw_params(len(x), generator=generator)
    return channel.corrupt(x, params, generator=generator), params


@pytest.mark.parametrize("name", ALL)
def test_shapes_and_conditions(name: str) -> None:
    channel = ALL[name]()
    x = images(5, channel.x_shape)
    y, params = observe(channel, x)
    assert y.shape == (5, *channel.y_shape)
    assert {k: tuple(v.shape[1:]) for k, v in params.items()} == channel.params_spec
    condition = channel.condition(y, params, Scaling.from_range(0, 16))
    assert condition.shape == (5, channel.condition_channels, *channel.x_shape[1:])
    assert torch.equal(observe(channel, x)[0], y)


@pytest.mark.parametrize("name", LINEAR)
def test_adjoint_and_matrix(name: str) -> None:
    # deepinv keeps filters and matrices in float32: identities hold to its precision.
    channel = LINEAR[name]()
    x = torch.randn(4, *channel.x_shape, generator=torch.Generator().manual_seed(2))
    y, params = observe(channel, x)
    v = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    left = (channel.A(x, params) * v).flatten(1).sum(1)
    right = (x * channel.A_adjoint(v, params)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    matrix = channel.matrix(params, dtype=torch.float32)
    assert len(matrix) == (4 if params else 1)
    product = (matrix @ x.flatten(1).unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(product, channel.A(x, params).flatten(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "super_resolution",
        "super_resolution_fixed",
        "compressed_sensing",
        "compressed_sensing_fixed",
        "mri",
    ],
)
def test_pseudo_inverse(name: str) -> None:
    channel = LINEAR[name]()
    x = torch.randn(4, *channel.x_shape, generator=torch.Generator().manual_seed(2))
    _, params = observe(channel, x)
    back = channel.A_dagger(channel.A(x, params), params)
    torch.testing.assert_close(channel.A(back, params), channel.A(x, params), rtol=1e-3, atol=1e-4)
    # It is the solution of least norm: nothing is invented where nothing is measured.
    torch.testing.assert_close(
        back, channel.A_dagger(channel.A(back, params), params), rtol=1e-3, atol=1e-4
    )
    assert (back.flatten(1).norm(dim=1) < x.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("name", LINEAR)
def test_noise(name: str) -> None:
    channel = LINEAR[name]()
    assert channel.noise_std is not None
    x = images(3000, channel.x_shape)
    y, params = observe(channel, x)
    noise = (y - channel.A(x, params)) / channel.noise_std
    measured = torch.ones_like(noise, dtype=torch.bool)
    if "mask" in params:
        measured = params["mask"] > 0
    values = noise[measured].double()
    assert abs(float(values.mean())) < 5 / math.sqrt(len(values))
    assert abs(float(values.var()) - 1) < 5 * math.sqrt(2 / len(values)) + 1e-3
    assert (noise[~measured] == 0).all()


def test_lines_of_k_space() -> None:
    channel = accelerated_mri((8, 16), acceleration=4.0, center=0.125, noise_std=0.0)
    params = channel.draw_params(4000, generator=torch.Generator().manual_seed(0))
    mask = params["mask"]
    assert mask.shape == (4000, 2, 8, 16)
    lines = mask[:, 0, 0]
    assert torch.equal(mask, lines[:, None, None].expand_as(mask)), "whole columns, both parts"
    assert (lines[:, 7:9] == 1).all()
    # 16 / 4 lines on average; two are certain, 14 are drawn with probability 1/7.
    spread = math.sqrt(14 * (1 / 7) * (6 / 7) / 4000)
    assert abs(float(lines.sum(1).mean()) - 4) < 5 * spread
    condition = channel.condition(
        channel.A(images(3, (2, 8, 16)), {"mask": mask[:3]}),
        {"mask": mask[:3]},
        Scaling.identity(),
    )
    assert torch.equal(condition[:, 2:], mask[:3])


def test_the_network_sees_zero_where_the_centre_is() -> None:
    scaling = Scaling.from_range(0, 16)
    for name, build in LINEAR.items():
        channel = build()
        x = torch.full((2, *channel.x_shape), scaling.center)
        params = channel.draw_params(2, generator=torch.Generator().manual_seed(0))
        condition = channel.condition(channel.A(x, params), params, scaling)
        seen = condition[:, : channel.x_shape[0]]
        assert seen.abs().max() < 1e-3, name  # deepinv's blur filter sums to 1 - 1e-4.


def test_poisson_counts_photons() -> None:
    channel = NON_LINEAR["poisson"]()
    assert (channel.linear, channel.noise_std) == (False, None)
    y, _ = observe(channel, torch.full((4000, *SHAPE), 3.0))
    n = y.numel()
    assert abs(float(y.mean()) - 3.0) < 5 * math.sqrt(0.5 * 3.0 / n)
    assert abs(float(y.var()) / (0.5 * 3.0) - 1) < 5 * math.sqrt(2.2 / n)
    assert torch.equal(y, (y / 0.5).round() * 0.5)
    assert (observe(channel, torch.full((2, *SHAPE), -1.0))[0] == 0).all()


def test_quantization_has_its_levels() -> None:
    channel = quantization(SHAPE, low=0.0, high=16.0, levels=5)
    y, _ = observe(channel, images(50, SHAPE) * 2 - 8)
    assert sorted(y.unique().tolist()) == [0.0, 4.0, 8.0, 12.0, 16.0]


def test_jpeg_loses_detail_and_keeps_the_range() -> None:
    x = torch.linspace(0, 16, 64).reshape(1, 1, 8, 8)
    coarse, fine = (
        (observe(jpeg(SHAPE, quality=q, low=0.0, high=16.0), x)[0] - x).abs().mean()
        for q in (5, 95)
    )
    assert 0 < fine < coarse < 4


@pytest.mark.parametrize(
    "name",
    ["denoising", "super_resolution_fixed", "gaussian_blur_fixed", "compressed_sensing_fixed"],
)
def test_the_gaussian_start_serves_operators_without_parameters(name: str) -> None:
    channel = LINEAR[name]()
    generator = torch.Generator().manual_seed(5)
    size = math.prod(channel.x_shape)
    factor = torch.randn(size, 3, generator=generator)
    x = 8 + torch.randn(60, 3, generator=generator) @ factor.mT
    x = x.reshape(60, *channel.x_shape)
    y, params = observe(channel, x)
    history: list[float] = []
    prior = fit_gaussian_prior(
        y, params, channel, iterations=5, on_progress=lambda k, value: history.append(value)
    )
    assert history == sorted(history)
    posterior = GaussianPosterior(prior, channel)
    samples = posterior.sample(y, params, seeds=range(60))
    # A posterior sample explains its observation about as well as the truth does.
    assert channel.noise_std is not None
    misfit = (channel.A(samples, params) - y).square().mean().sqrt() / channel.noise_std
    assert 0.5 < float(misfit) < 1.5
    # And it is the textbook's posterior mean.
    A = channel.matrix(params)[0].double()
    S, eye = prior.covariance(), torch.eye(len(A), dtype=torch.float64)
    gain = S @ A.mT @ torch.linalg.inv(A @ S @ A.mT + channel.noise_std**2 * eye)
    mean = prior.mean + (y.flatten(1).double() - prior.mean @ A.mT) @ gain.mT
    torch.testing.assert_close(
        posterior.mean(y, params).flatten(1).double(), mean, rtol=1e-3, atol=1e-2
    )


def test_shifted_blocks_are_averages_of_the_pixels_they_cover() -> None:
    channel = super_resolution((1, 4, 6), factor=2, noise_std=0.0)
    x = torch.arange(24.0).reshape(1, 1, 4, 6).repeat(2, 1, 1, 1)
    y = channel.A(x, {"shift": torch.tensor([[0.0, 0.0], [1.0, 1.0]])})
    assert y.shape == (2, 1, 2, 3)
    assert y[0, 0, 0, 0] == (0 + 1 + 6 + 7) / 4
    assert y[1, 0, 0, 0] == (7 + 8 + 13 + 14) / 4, "the block begins at row 1, column 1"
    assert y[1, 0, 0, 2] == (11 + 6 + 17 + 12) / 4, "and the last one goes around the edge"
    shifts = channel.draw_params(4000, generator=torch.Generator().manual_seed(0))["shift"]
    counts = (2 * shifts[:, 0] + shifts[:, 1]).long().bincount()
    # Four equal cells: the standard deviation of a count is sqrt(4000 * 3 / 16) = 27.4.
    assert (counts - 1000).abs().max() < 5 * 27.4


def test_the_network_sees_where_the_blocks_are() -> None:
    channel = super_resolution((1, 4, 4), factor=2, noise_std=0.0)
    scaling = Scaling.from_range(0, 16)
    y = torch.full((4, 1, 2, 2), 8.0)
    shifts = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    maps = channel.condition(y, {"shift": shifts}, scaling)[:, 1:]
    assert maps[0, 0, :, 0].tolist() == [1, 1, -1, -1]
    assert maps[2, 0, :, 0].tolist() == [-1, 1, 1, -1]
    assert maps[1, 1, 0].tolist() == [-1, 1, 1, -1]
    assert len({tuple(m.flatten().tolist()) for m in maps}) == 4


def test_a_blur_of_its_own_for_each_sample() -> None:
    channel = gaussian_blur((1, 16, 16), sigma=(0.5, 1.5), noise_std=0.0)
    point = torch.zeros(2, 1, 16, 16)
    point[:, 0, 8, 8] = 1.0
    sigma = torch.tensor([[1.0], [1.4]])  # narrower ones are cut off at the grid's frequency
    y = channel.A(point, {"sigma": sigma}).double()
    offset = torch.arange(16.0).double() - 8
    torch.testing.assert_close(y.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64))
    # The variance of the spread point is sigma^2, up to what wraps around 16 pixels.
    variance = (y[:, 0].sum(2) * offset.square()).sum(1)
    torch.testing.assert_close(variance, sigma[:, 0].double().square(), rtol=2e-2, atol=0)
    drawn = channel.draw_params(4000, generator=torch.Generator().manual_seed(0))["sigma"]
    assert 0.5 <= float(drawn.min()) < 0.51
    assert 1.49 < float(drawn.max()) <= 1.5
    assert abs(float(drawn.mean()) - 1.0) < 5 * math.sqrt(1 / 12 / 4000)
    seen = channel.condition(y.float(), {"sigma": sigma}, Scaling.identity())
    assert torch.equal(seen[:, 1], sigma.reshape(2, 1, 1).expand(2, 16, 16))


def test_random_projections_are_coefficients_in_one_orthonormal_basis() -> None:
    channel = compressed_sensing(SHAPE, measurements=20, noise_std=0.0, seed=3)
    params = channel.draw_params(3000, generator=torch.Generator().manual_seed(0))
    assert (params["mask"].flatten(1).sum(1) == 20).all()
    # Each of 64 coefficients is taken with probability 20 / 64.
    share = params["mask"].flatten(1).mean(0)
    assert (share - 20 / 64).abs().max() < 5 * math.sqrt(20 / 64 * 44 / 64 / 3000)
    everything = {"mask": torch.ones(64, *SHAPE)}
    basis = channel.A(torch.eye(64).reshape(64, *SHAPE), everything).flatten(1)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(64), rtol=0, atol=1e-5)
    again = compressed_sensing(SHAPE, measurements=20, noise_std=0.0, seed=3)
    other = compressed_sensing(SHAPE, measurements=20, noise_std=0.0, seed=4)
    x = images(64, SHAPE)
    assert torch.equal(again.A(x, everything), channel.A(x, everything))
    assert not torch.allclose(other.A(x, everything), channel.A(x, everything))


def test_bad_channels() -> None:
    with pytest.raises(ValueError, match=r"sigma \(2\.0, 1\.0\); give a positive number"):
        gaussian_blur(SHAPE, sigma=(2.0, 1.0), noise_std=0.1)
    with pytest.raises(ValueError, match="65 measurements for 64 entries; give 1 to 64"):
        compressed_sensing(SHAPE, measurements=65, noise_std=0.1)
    with pytest.raises(ValueError, match="factor 3 for images of 8 x 8; give a divisor"):
        super_resolution(SHAPE, factor=3, noise_std=0.1)
    with pytest.raises(ValueError, match="gain 0; it must be positive"):
        poisson(SHAPE, gain=0)
    with pytest.raises(ValueError, match=r"1 levels from 0\.0 to 1\.0"):
        quantization(SHAPE, low=0.0, high=1.0, levels=1)
    with pytest.raises(ValueError, match="2 bands and quality 50"):
        jpeg((2, 8, 8), quality=50, low=0.0, high=1.0)
    with pytest.raises(ValueError, match="must not be more than a fraction 1 / acceleration"):
        accelerated_mri((8, 8), acceleration=8.0, center=0.5, noise_std=0.0)
    with pytest.raises(ValueError, match="'nothing'; known are 'y', 'A_adjoint', 'A_dagger'"):
        PhysicsChannel(Denoising(), x_shape=SHAPE, estimate="nothing")
    with pytest.raises(ValueError, match="for a physics that is not linear; take 'y'"):
        PhysicsChannel(Physics(), x_shape=SHAPE, estimate="A_adjoint")
    with pytest.raises(
        ValueError, match=r"the map 'mask'; the generator's parameters .* are \[\]"
    ):
        PhysicsChannel(Denoising(), x_shape=SHAPE, estimate="y", maps=("mask",))
    blocks = LINEAR["super_resolution_fixed"]().physics
    with pytest.raises(
        ValueError, match=r"estimate 'y' of y has shape \(1, 4, 4\) but x has \(1, 8, 8\)"
    ):
        PhysicsChannel(blocks, x_shape=SHAPE, estimate="y")
    counts = Physics(A=lambda x, **kwargs: x.square().sum((2, 3)))
    bent = PhysicsChannel(Physics(), x_shape=SHAPE, estimate="y")
    bent.physics, bent.y_shape = counts, (1,)
    with pytest.raises(
        ValueError,
        match=r"not linear and whose observations have shape \(1,\), not .* \(1, 8, 8\)",
    ):
        PseudoInverse(bent)


@pytest.mark.parametrize("name", ["poisson", "quantization", "jpeg"])
def test_the_simplest_start_of_a_non_linear_channel_is_y(name: str) -> None:
    channel = NON_LINEAR[name]()
    y, params = observe(channel, images(3, channel.x_shape))
    assert torch.equal(PseudoInverse(channel).sample(y, params, seeds=[1, 2, 3]), y)


def test_the_simplest_start_of_a_linear_channel_is_a_dagger_y() -> None:
    channel = LINEAR["gaussian_blur"]()
    assert channel.x_shape == channel.y_shape, "y would fit as well"
    y, params = observe(channel, images(3, channel.x_shape))
    start = PseudoInverse(channel).sample(y, params, seeds=[1, 2, 3])
    assert torch.equal(start, channel.A_dagger(y, params))
    assert not torch.equal(start, y)


def test_noise_of_one_s_own_is_found() -> None:
    assert PhysicsChannel(Denoising(gaussian_noise(0.25)), x_shape=SHAPE).noise_std == 0.25
    assert PhysicsChannel(Denoising(gaussian_noise(0.0)), x_shape=SHAPE).noise_std == 0.0


# --------------------------------------------------------------------------------- the whole loop


def model(condition_channels: int) -> Denoiser:
    with seeded_initialization(0):
        return Denoiser(
            UNet(
                in_channels=1,
                condition_channels=condition_channels,
                out_channels=1,
                channels=(8, 8),
                blocks=(1, 1),
                embedding=8,
                dropout=0.0,
            )
        )


@pytest.mark.parametrize("name", ["denoising", "quantization", "poisson"])
def test_em_in_memory(name: str) -> None:
    channel = ALL[name]()
    x = images(24, SHAPE).sort(dim=-1).values
    y, params = observe(channel, x)

    class AsObserved:
        def sample(
            self, y: Tensor, params: object, *, seeds: object, temperature: float = 1.0
        ) -> Tensor:
            return y

    steps: list[int] = []

    def rate(step: int) -> float:
        steps.append(step)
        return 3e-3

    def run() -> list[Tensor]:
        rounds = em(
            y,
            params,
            channel,
            model(channel.condition_channels),
            AsObserved(),
            scaling=Scaling.from_range(0, 16),
            sampler=functools.partial(dpm_solver, sigmas=log_linear_grid(10.0, 0.1, 4)),
            schedule=VELogLinear(sigma_min=0.1, sigma_max=10.0),
            iterations=3,
            steps=6,
            batch_size=12,
            learning_rate=rate,
        )
        return [r.x_hat for r in rounds]

    first, again = run(), run()
    assert steps == [*range(18)] * 2, "the rate is a function of the run's steps"
    assert torch.equal(first[0], y), "the first E-step draws from the given start"
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], first[2])


def test_em_mmps_in_memory() -> None:
    channel = LINEAR["super_resolution"]()
    channel = super_resolution(SHAPE, factor=2, noise_std=0.3)
    scaling = Scaling.from_range(0, 16)
    y, params = observe(channel, images(16, SHAPE).sort(dim=-1).values)
    sampler = functools.partial(dpm_solver, sigmas=log_linear_grid(10.0, 0.1, 4))
    rounds = em(
        y,
        params,
        channel,
        model(0),
        PseudoInverse(channel),
        scaling=scaling,
        sampler=sampler,
        schedule=VELogLinear(sigma_min=0.1, sigma_max=10.0),
        iterations=2,
        steps=6,
        batch_size=16,
        learning_rate=constant_rate(3e-3),
        posterior=lambda f: MMPSPosterior(f, channel, scaling, sampler),
    )
    first, second = list(rounds)
    assert isinstance(second.posterior, MMPSPosterior)
    torch.testing.assert_close(first.x_hat, channel.A_dagger(y, params))
    # Moment matching pulls samples onto their observations.
    misfit = (channel.A(second.x_hat, params) - y).square().mean().sqrt()
    spread = (y - y.mean(0)).square().mean().sqrt()
    assert misfit < 0.6 * spread


def test_no_iterations_are_refused() -> None:
    channel = LINEAR["denoising"]()
    y, params = observe(channel, images(2, SHAPE))
    rounds = em(
        y,
        params,
        channel,
        model(1),
        PseudoInverse(channel),
        scaling=Scaling.identity(),
        sampler=functools.partial(dpm_solver, sigmas=log_linear_grid(10.0, 0.1, 4)),
        schedule=VELogLinear(),
        iterations=0,
        steps=1,
        learning_rate=constant_rate(1e-3),
    )
    with pytest.raises(ValueError, match="0 iterations"):
        next(rounds)


# --------------------------------------------------------------------------------- augmentation


def test_flips_mirror_half_of_the_images() -> None:
    x = images(1000, SHAPE)
    out = Augmentation(flip=True)(x, generator=torch.Generator().manual_seed(0))
    same = (out == x).flatten(1).all(1)
    mirrored = (out == x.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert abs(float(mirrored.double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(1000)


def test_colours_turn_around_grey() -> None:
    augment = Augmentation(flip=False, hue=0.1, saturation=(0.5, 1.5))
    generator = torch.Generator().manual_seed(0)
    grey = torch.rand(20, 1, 4, 4, generator=generator).expand(-1, 3, -1, -1)
    torch.testing.assert_close(augment(grey, generator=generator), grey, rtol=1e-4, atol=1e-4)
    x = torch.rand(200, 3, 4, 4, generator=generator)
    out = augment(x, generator=generator)
    weights = torch.tensor([0.299, 0.587, 0.114])

    def luma(v: Tensor) -> Tensor:
        return torch.einsum("c,nchw->nhw", weights, v)

    torch.testing.assert_close(luma(out), luma(x), rtol=1e-4, atol=1e-4)
    assert (out - x).abs().mean() > 0.02
    # Any units: the map is linear.
    twice = augment(4 * x - 2, generator=torch.Generator().manual_seed(7))
    once = augment(x, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(twice, 4 * once - 2, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="need 3 bands but the images have 1"):
        augment(images(1, SHAPE), generator=generator)
    with pytest.raises(ValueError, match=r"hue 0\.7"):
        Augmentation(hue=0.7)
