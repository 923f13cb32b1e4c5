"""What a channel lets one know of x: planted cases, and every number against dense algebra."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from deepinv.physics import Denoising
from torch import Tensor

from diffem_core import (
    Channel,
    FittedPrior,
    Identifiability,
    PhysicsChannel,
    RandomMask,
    RandomMatrix,
    StandInPrior,
    accelerated_mri,
    compressed_sensing,
    deepinv_channel,
    denoising,
    gaussian_blur,
    identify,
    jpeg,
    poisson,
    quantization,
    super_resolution,
)
from diffem_core.channel import gaussian_noise
from diffem_core.gaussian_prior import GaussianPrior
from diffem_core.identifiability.lanczos import spectral_measure
from diffem_core.identifiability.normals import ChannelNormals, coverage
from diffem_core.identifiability.pairs import pairs_of_few

SHAPE = (1, 8, 8)
Params = dict[str, Tensor]


def drawn(channel: Channel, n: int = 256, seed: int = 0) -> Params:
    return channel.draw_params(n, generator=torch.Generator().manual_seed(seed))


def looked_at(
    channel: Channel,
    params: Params | None = None,
    *,
    observations: int = 1500,
    std: float = 4.0,
    **options: int,
) -> Identifiability:
    center = 8.0 if len(channel.x_shape) == 3 else 0.0
    return identify(
        channel,
        drawn(channel) if params is None else params,
        prior=StandInPrior(x_shape=channel.x_shape, center=center, std=std),
        observations=observations,
        **options,
    )


def masks(n: int, change: Callable[[Tensor], None] | None = None, keep: float = 0.5) -> Params:
    generator = torch.Generator().manual_seed(7)
    mask = (torch.rand(n, 1, 8, 8, generator=generator) < keep).float()
    if change is not None:
        change(mask)
    return {"mask": mask}


def without_a_pixel(mask: Tensor) -> None:
    mask[:, :, 2, 3] = 0


def without_the_lower_half(mask: Tensor) -> None:
    mask[:, :, 4:] = 0


def left_or_right(mask: Tensor) -> None:
    mask[::2, :, :, :4] = 0
    mask[1::2, :, :, 4:] = 0


class UpperHalf(PhysicsChannel):
    """A channel of one's own, whose instrument never scans the lower half."""

    def __init__(self) -> None:
        super().__init__(Denoising(noise_model=gaussian_noise(0.4)), x_shape=SHAPE, estimate="y")

    def A(self, x: Tensor, params: object) -> Tensor:
        y = x.clone()
        y[..., 4:, :] = 0
        return y

    def A_adjoint(self, y: Tensor, params: object) -> Tensor:
        return self.A(y, params)


def fewer_rows(channel: Channel) -> Params:
    """Subsets of one basis in which three coefficients are never chosen."""
    params = drawn(channel)
    params["mask"].flatten(1)[:, [5, 17, 40]] = 0
    return params


MASK = RandomMask(SHAPE, keep=0.5, noise_std=0.4)
SENSING = compressed_sensing(SHAPE, measurements=32, noise_std=0.4)
FIXED_MASK = {"mask": masks(1)["mask"].expand(64, -1, -1, -1)}
CASES: dict[str, tuple[Callable[[], Identifiability], str, int]] = {
    # name: (analysis, verdict, rank, or -1 where it is not known)
    "random mask": (lambda: looked_at(MASK), "identifiable", 64),
    "one pixel never": (lambda: looked_at(MASK, masks(256, without_a_pixel)), "partly", 63),
    "one mask for all": (
        lambda: looked_at(MASK, FIXED_MASK),
        "not",
        int(masks(1)["mask"].sum()),
    ),
    "lower half never": (lambda: looked_at(MASK, masks(256, without_the_lower_half)), "not", 32),
    "lower half never, custom": (lambda: looked_at(UpperHalf()), "not", 32),
    "left or right half": (lambda: looked_at(MASK, masks(256, left_or_right)), "partly", 64),
    "too few masks to tell": (lambda: looked_at(MASK, masks(24, keep=0.05)), "undetermined", -1),
    "one blur": (
        lambda: looked_at(gaussian_blur(SHAPE, sigma=1.2, noise_std=0.4)),
        "not",
        # exp(-4 pi^2 1.44 f^2) > 1e-6: f in cycles per pixel, on the grid of 1/8.
        sum(
            math.exp(-4 * math.pi**2 * 1.44 * (a * a + b * b) / 64) > 1e-6
            for a in range(-4, 4)
            for b in range(-4, 4)
        ),
    ),
    "one blur, weak": (
        lambda: looked_at(gaussian_blur(SHAPE, sigma=0.4, noise_std=0.4)),
        "identifiable",
        64,
    ),
    "blurs of many widths": (
        lambda: looked_at(gaussian_blur(SHAPE, sigma=(0.3, 1.2), noise_std=0.4)),
        "identifiable",
        64,
    ),
    "blocks": (
        lambda: looked_at(super_resolution(SHAPE, factor=2, noise_std=0.4, shifts=False)),
        "not",
        16,
    ),
    # A mean over two neighbours never shows what alternates: 15 of 64 frequencies.
    "blocks, shifted": (
        lambda: looked_at(super_resolution(SHAPE, factor=2, noise_std=0.4)),
        "partly",
        49,
    ),
    "the same projections": (
        lambda: looked_at(compressed_sensing(SHAPE, measurements=24, noise_std=0.4, fixed=True)),
        "not",
        24,
    ),
    "projections of their own": (lambda: looked_at(SENSING), "identifiable", 64),
    "rows never chosen": (lambda: looked_at(SENSING, fewer_rows(SENSING)), "partly", 61),
    "random lines of k-space": (
        lambda: looked_at(accelerated_mri((8, 8), acceleration=2, center=0.25, noise_std=0.4)),
        "identifiable",
        128,
    ),
    "matrices": (lambda: looked_at(RandomMatrix(5, rows=2, noise_std=0.01)), "identifiable", 5),
    "one row a sample": (
        lambda: looked_at(RandomMatrix(5, rows=1, noise_std=0.01)),
        "identifiable",
        5,
    ),
    "noise": (lambda: looked_at(denoising(SHAPE, noise_std=4.0)), "identifiable", 64),
    "far too much noise": (lambda: looked_at(denoising(SHAPE, noise_std=400.0)), "not", 64),
    "photons": (lambda: looked_at(poisson(SHAPE, gain=0.5)), "identifiable", 64),
    "rounding": (
        lambda: looked_at(quantization(SHAPE, low=0, high=16, levels=5)),
        "undetermined",
        64,
    ),
    "rounding of noise": (
        lambda: looked_at(quantization((1, 3, 3), low=-8, high=24, levels=9, noise_std=4.0)),
        "identifiable",
        9,
    ),
    "one blur of deepinv": (
        lambda: looked_at(
            deepinv_channel(
                SHAPE,
                physics="BlurFFT",
                arguments={"filter": {"name": "gaussian_blur", "sigma": 2.0}},
                noise=("GaussianNoise", {"sigma": 0.4}),
            )
        ),
        "not",
        -1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_planted_cases_get_their_verdict(name: str) -> None:
    analysis, verdict, rank = CASES[name]
    found = analysis()
    assert found.verdict == verdict, found
    if rank >= 0:
        assert found.rank == rank
    assert float(found.share.sum()) == pytest.approx(1)
    assert float(found.energy.sum()) == pytest.approx(1)


def test_a_jpeg_cannot_be_told_and_says_why() -> None:
    found = looked_at(jpeg(SHAPE, quality=30, low=0, high=16))
    assert (found.verdict, found.smooth, found.method) == ("undetermined", False, "linearized")
    large = looked_at(jpeg((3, 24, 24), quality=30, low=0, high=16))
    assert (large.verdict, large.method) == ("undetermined", "none")


def test_the_pixel_that_nobody_sees_is_named() -> None:
    found = looked_at(MASK, masks(256, without_a_pixel))
    assert found.never_seen.tolist() == [[0, 2, 3]]
    assert found.lost_variance is not None
    assert found.lost_variance.nonzero().tolist() == [[0, 2, 3]]
    assert found.hidden_energy == pytest.approx(1 / 64)


def test_pairs_of_separate_halves_are_never_seen_together() -> None:
    found = looked_at(MASK, masks(256, left_or_right))
    assert found.pairs is not None
    assert (found.pairs.unseen, found.pairs.count) == (32 * 32, 64 * 63 // 2)
    for a, b in found.pairs.examples:
        assert (a % 8 < 4) != (b % 8 < 4)
    assert found.together is not None
    # Two pixels of a row that are 4 or more apart are in different halves.
    assert not found.together[:, :4].any()
    assert bool((found.together[7, 4:11] > 0).all())


def test_half_of_the_operators_decide_whether_more_are_needed() -> None:
    many = looked_at(MASK, masks(4096, keep=0.05))
    assert (many.verdict, many.settled) == ("identifiable", True)
    few = looked_at(MASK, masks(24, keep=0.05))
    assert not few.settled


@pytest.mark.parametrize("name", ["blur", "blocks", "sensing", "mri", "matrix"])
def test_levels_and_maps_against_dense_matrices(name: str) -> None:
    channel = {
        "blur": lambda: gaussian_blur(SHAPE, sigma=(0.3, 1.2), noise_std=0.4),
        "blocks": lambda: super_resolution((2, 4, 4), factor=2, noise_std=0.4),
        "sensing": lambda: SENSING,
        "mri": lambda: accelerated_mri((6, 4), acceleration=2, center=0.25, noise_std=0.4),
        "matrix": lambda: RandomMatrix(5, rows=2, noise_std=0.01),
    }[name]()
    params = drawn(channel, 40)
    matrix = channel.matrix(params)
    h = (matrix.mT @ matrix).mean(0)
    found = looked_at(channel, params)
    # deepinv's operators are float32.
    expected = torch.linalg.eigvalsh(h).flip(0)
    torch.testing.assert_close(found.level, expected, rtol=1e-4, atol=1e-5)
    assert found.rank == int(torch.linalg.matrix_rank(h, atol=1e-6 * float(expected[0])))
    assert found.entries is not None
    torch.testing.assert_close(found.entries.flatten(), h.diagonal(), rtol=1e-4, atol=1e-6)
    ranks = torch.linalg.matrix_rank(matrix, rtol=1e-3).double() / matrix.shape[2]
    # Fewer operators may have been looked at one by one.
    if name in {"blur", "sensing", "mri"}:
        assert found.seen_once == pytest.approx(float(ranks.mean()), abs=0.05)
    else:
        assert found.seen_once == pytest.approx(float(ranks.mean()))
    if len(channel.x_shape) == 3:
        assert found.frequencies is not None
        torch.testing.assert_close(
            found.frequencies, by_hand(h, channel.x_shape), rtol=1e-4, atol=1e-6
        )


def by_hand(h: Tensor, x_shape: tuple[int, ...]) -> Tensor:
    """Compute e* H e for every frequency's e, a complex image being two bands."""
    bands, height, width = x_shape
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64),
        torch.arange(width, dtype=torch.float64),
        indexing="ij",
    )
    power = torch.zeros(height, width, dtype=torch.float64)
    for a in range(height):
        for b in range(width):
            phase = 2 * math.pi * (rows * a / height + columns * b / width)
            cos, sin = (f(phase) / math.sqrt(height * width) for f in (torch.cos, torch.sin))
            if bands == 2:
                pairs = [torch.stack([cos, sin]), torch.stack([-sin, cos])]
                value = sum(float(v.flatten() @ h @ v.flatten()) for v in pairs) / 2
            else:
                value = 0.0
                for c in range(bands):
                    for part in (cos, sin):
                        v = torch.zeros(x_shape, dtype=torch.float64)
                        v[c] = part
                        value += float(v.flatten() @ h @ v.flatten()) / bands
            power[a, b] = value
    return torch.fft.fftshift(power)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_second_moments_against_the_kronecker_product(rows: int) -> None:
    channel = RandomMatrix(4, rows=rows, noise_std=0.01)
    params = drawn(channel, 3 if rows == 1 else 30)
    p = channel.matrix(params).mT @ channel.matrix(params)
    # <D, P D P> = vec(D)' (P x P) vec(D); symmetric matrices are 10 of the 16 dimensions.
    t = torch.stack([torch.kron(one, one) for one in p]).mean(0)
    basis = []
    for a in range(4):
        for b in range(a, 4):
            e = torch.zeros(4, 4, dtype=torch.float64)
            e[a, b] = e[b, a] = 1.0
            basis.append((e / torch.linalg.vector_norm(e)).flatten())
    s = torch.stack(basis, dim=1)
    values = torch.linalg.eigvalsh(s.mT @ t @ s)
    found = pairs_of_few(ChannelNormals(channel, params), torch.eye(4, dtype=torch.float64))
    assert found.count == 10
    assert found.unseen == int((values < 1e-6 * values.max()).sum())
    positive = values[values >= 1e-6 * values.max()]
    assert found.least == pytest.approx(float(positive.min() / values.max()), rel=1e-4)
    # Three rows see three of ten numbers.
    assert found.unseen == (7 if rows == 1 else 0)


def test_a_quadrature_is_exact_for_polynomials() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    h, z = a.mT @ a / 40, torch.randn(30, 3, generator=generator, dtype=torch.float64)
    theta, tau = spectral_measure(lambda v: h @ v, z, steps=6)
    unit = z / torch.linalg.vector_norm(z, dim=0)
    power = unit
    for degree in range(2 * 6):
        exact = (unit * power).sum(0)
        torch.testing.assert_close((tau * theta**degree).sum(1), exact, rtol=1e-9, atol=1e-12)
        power = h @ power


def test_a_quadrature_survives_the_end_of_its_space() -> None:
    h = torch.diag(torch.tensor([0.0] * 20 + [2.0] * 10, dtype=torch.float64))
    z = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta, tau = spectral_measure(lambda v: h @ v, z, steps=12)
    unit = z / torch.linalg.vector_norm(z, dim=0)
    upper = (tau * (theta > 1)).sum(1)
    torch.testing.assert_close(upper, unit[20:].square().sum(0))
    assert bool(((theta < 1e-9) | (theta > 2 - 1e-9) | (tau < 1e-12)).all())


@pytest.mark.parametrize("sigma", [0.5, (0.3, 1.2)])
def test_maps_from_signs_keep_their_stated_error(sigma: float | tuple[float, float]) -> None:
    channel = gaussian_blur((1, 16, 16), sigma=sigma, noise_std=0.4)
    params = drawn(channel, 32)
    draws = 512
    entries, power = coverage(
        channel, params, draws=draws, generator=torch.Generator().manual_seed(0)
    )
    matrix = channel.matrix(params)
    p = matrix.mT @ matrix
    # Bounds of the standard error: sqrt(2 / n E[l^2]) / E[l]. The entries of a map share draws;
    # 256 of them stay within 4.5 standard errors.
    levels = p.diagonal(dim1=1, dim2=2)
    error = (2 / draws * levels.square().mean(0)).sqrt() / levels.mean(0)
    off = (entries / levels.mean(0) - 1) / error
    assert float(off.abs().max()) < 4.5
    assert float(off.square().mean()) < 1
    assert power is not None
    spectra = torch.stack([by_hand(one, channel.x_shape) for one in p])
    error = (2 / draws * spectra.square().mean(0)).sqrt() / spectra.mean(0)
    off = (torch.fft.fftshift(power.mean(0)) / spectra.mean(0) - 1) / error
    assert float(off.abs().max()) < 4.5
    assert float(off.square().mean()) < 1
    mask = masks(64, without_a_pixel)
    seen, _ = coverage(MASK, mask, draws=64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen.reshape(8, 8), mask["mask"].mean((0, 1)).double())


@pytest.mark.parametrize("seed", range(3))
def test_the_randomized_rank_keeps_its_stated_error(seed: int) -> None:
    # A matrix for all: of its spectrum 0 is apart, which 20 steps resolve.
    channel = compressed_sensing((1, 16, 16), measurements=96, noise_std=0.1, fixed=True)
    found = looked_at(channel, dense_size=0, seed=seed)
    exact = looked_at(channel)
    assert (found.method, exact.method) == ("randomized", "dense")
    assert found.error == pytest.approx(math.sqrt(2 / (3 * 256)))
    assert abs(found.hidden_share - exact.hidden_share) < 3 * found.error
    assert abs(found.rank - 96) < 3 * found.error * 256
    # One draw of x has the spread of its own spectrum: 3 draws, and the leading frequencies of
    # 1 / f^2 hold most of the variance.
    assert abs(found.hidden_energy - exact.hidden_energy) < 0.35
    assert found.verdict == exact.verdict == "not"


@pytest.mark.parametrize("shifts", [False, True])
def test_frequencies_tell_what_dense_algebra_tells(shifts: bool) -> None:
    if shifts:
        channel = super_resolution((1, 8, 8), factor=2, noise_std=0.4)
        # Of 512 random shifts some are more frequent: only their expectation is a convolution.
        params = drawn(channel, 512)
    else:
        channel, params = gaussian_blur((1, 16, 16), sigma=1.0, noise_std=0.4), {}
    found, exact = looked_at(channel, params, dense_size=0), looked_at(channel, params)
    assert (found.method, found.verdict) == ("frequencies", exact.verdict)
    # Levels are estimates: a level next to a threshold may fall on its other side.
    assert found.rank == pytest.approx(exact.rank, abs=8)
    assert found.hidden_energy == pytest.approx(exact.hidden_energy, abs=0.01)
    assert found.drowned_share == pytest.approx(exact.drowned_share, abs=0.06)
    lost = found.hidden_energy + found.drowned_energy
    assert found.lost_variance is not None
    # 64 draws of x.
    assert float(found.lost_variance.mean()) == pytest.approx(16.0 * lost, rel=0.2)


def test_frequencies_that_more_operators_show_are_not_settled() -> None:
    # Lines of k-space that the first half of the operators never measures, and the second does.
    channel = accelerated_mri((8, 8), acceleration=2, center=0.25, noise_std=0.4)
    params = drawn(channel, 64)
    params["mask"][:, :, :, 0] = 0
    never = looked_at(channel, params, dense_size=0)
    assert (never.method, never.verdict, never.settled) == ("frequencies", "partly", True)
    assert never.rank == 2 * 56
    params["mask"][60:, :, :, 0] = 1
    rarely = looked_at(channel, params, dense_size=0)
    assert (rarely.verdict, rarely.rank) == ("identifiable", 2 * 64)
    params["mask"][:, :, :, 1] = 0
    params["mask"][:, :, :, 0] = 0
    params["mask"][40:, :, :, 0] = 1
    half = looked_at(channel, params, dense_size=0)
    assert (half.verdict, half.settled) == ("undetermined", False)


def test_observations_needed_are_those_of_the_cramer_rao_bound() -> None:
    # y = x + e: the variance of mean(y^2) - sigma^2 is 2 (s^2 + sigma^2)^2 / n, which is s^4 at n.
    found = looked_at(denoising(SHAPE, noise_std=6.0))
    prior = StandInPrior(x_shape=SHAPE, center=8.0, std=4.0)
    spectrum = torch.linalg.eigvalsh(prior.times(torch.eye(64, dtype=torch.float64)))
    expected = 2 * (spectrum + 36.0).square() / spectrum.square()
    torch.testing.assert_close(found.needed.sort().values, expected.sort().values)
    # Where half of the observations see an entry, twice as many are needed.
    known = FittedPrior(
        prior=GaussianPrior(
            mean=torch.zeros(64, dtype=torch.float64),
            factor=torch.zeros(64, 1, dtype=torch.float64),
            diag=torch.full((64,), 16.0, dtype=torch.float64),
        )
    )
    half = masks(2)
    half["mask"][1] = 1 - half["mask"][0]
    seen = identify(MASK, half, prior=known, observations=100)
    expected = torch.full((64,), 2 * 2 * (1 + 0.16 / 16) ** 2, dtype=torch.float64)
    torch.testing.assert_close(seen.needed, expected)


@pytest.mark.parametrize(
    ("observations", "verdict"), [(30, "not"), (300, "partly"), (4000, "identifiable")]
)
def test_what_drowns_depends_on_how_many_observations_there_are(
    observations: int, verdict: str
) -> None:
    found = looked_at(denoising(SHAPE, noise_std=10.0), observations=observations)
    prior = StandInPrior(x_shape=SHAPE, center=8.0, std=4.0)
    spectrum = torch.linalg.eigvalsh(prior.times(torch.eye(64, dtype=torch.float64)))
    drowned = 2 * (1 + 100.0 / spectrum).square() > observations
    assert found.drowned_share == pytest.approx(float(drowned.double().mean()))
    assert found.drowned_energy == pytest.approx(float(spectrum[drowned].sum() / spectrum.sum()))
    assert (found.hidden_share, found.verdict) == (0, verdict)


def test_variance_is_weighed_by_the_fitted_prior() -> None:
    # All variance lies in the upper half, which is all that is seen.
    diag = torch.zeros(64, dtype=torch.float64)
    diag[:32] = 4.0
    factor = torch.zeros(64, 2, dtype=torch.float64)
    factor[0, 0] = 3.0
    prior = GaussianPrior(mean=torch.zeros(64, dtype=torch.float64), factor=factor, diag=diag)
    found = identify(UpperHalf(), {}, prior=FittedPrior(prior=prior), observations=1000)
    assert found.hidden_share == pytest.approx(0.5)
    assert found.hidden_energy == pytest.approx(0, abs=1e-9)
    assert float(found.prior_variance.flatten()[0]) == pytest.approx(13.0)
    # (1/D) sum h s^2 / sigma^2, with h = 1 where anything varies.
    assert found.signal_to_noise == pytest.approx((31 * 4 + 13) / 64 / 0.16, rel=1e-5)


def test_priors_draw_what_they_say() -> None:
    prior = StandInPrior(x_shape=(2, 4, 6), center=3.0, std=2.0)
    covariance = prior.times(torch.eye(48, dtype=torch.float64))
    torch.testing.assert_close(covariance, covariance.mT)
    torch.testing.assert_close(covariance.diagonal(), prior.variances())
    x = prior.draw(20_000, generator=torch.Generator().manual_seed(0)).double()
    assert x.mean().item() == pytest.approx(3.0, abs=0.1)
    # The standard error of a covariance of variances 4 is at most 4 sqrt(2 / n) = 0.04.
    assert float((torch.cov(x.mT) - covariance).abs().max()) < 5 * 0.04
    with pytest.raises(ValueError, match="positive"):
        StandInPrior(x_shape=(3,), std=0.0)


def test_parameters_that_change_nothing_are_one_operator() -> None:
    channel = gaussian_blur(SHAPE, sigma=(0.3, 1.2), noise_std=0.4)
    params = {"sigma": torch.tensor([[1.0], [-1.0]]).repeat(20, 1)}
    found = looked_at(channel, params)
    assert found.fixed
    assert found.verdict == "not"


def test_the_noise_of_other_models_is_measured() -> None:
    channel = poisson(SHAPE, gain=0.5)
    found = looked_at(channel, std=1.0)
    # Var y = gain x, and x is 8 on average; 4,096 entries, of which one in a hundred moves x.
    assert found.noise_simulated
    assert found.noise_std == pytest.approx(2.0, rel=0.05)
    # deepinv's counts refuse negative means: samples stay within the range, 0 to 16.
    refusing = deepinv_channel(
        SHAPE, physics="Denoising", noise=("PoissonNoise", {"gain": 0.5}), estimate="y"
    )
    assert looked_at(refusing).noise_std == pytest.approx(2.0, rel=0.1)


def test_the_same_arguments_give_the_same_numbers() -> None:
    channel = super_resolution((1, 4, 4), factor=2, noise_std=0.4)
    for options in ({}, {"dense_size": 0}):
        one, two = (looked_at(channel, drawn(channel, 9), seed=3, **options) for _ in range(2))
        for name in ("level", "share", "energy", "needed", "entries", "frequencies"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name
        assert (one.pairs, one.seen_once) == (two.pairs, two.seen_once)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="exactly these"):
        looked_at(MASK, {})
    with pytest.raises(ValueError, match="at least 2"):
        looked_at(MASK, masks(1))
    with pytest.raises(ValueError, match="give at least 1"):
        looked_at(MASK, observations=0)


def test_large_images_take_bounded_memory() -> None:
    # H of 3 x 64 x 64 would take 1.2 GB, as would its eigenvectors.
    code = """
import resource, torch
from diffem_core import StandInPrior, gaussian_blur, identify
torch.set_num_threads(1)
channel = gaussian_blur((3, 64, 64), sigma=(0.3, 1.2), noise_std=0.4)
params = channel.draw_params(8, generator=torch.Generator().manual_seed(0))
channel.A_adjoint(channel.A(torch.zeros(8, 3, 64, 64), params), params)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
prior = StandInPrior(x_shape=(3, 64, 64), center=8, std=4)
found = identify(channel, params, prior=prior, observations=1000)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(found.method, found.size, after - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    method, size, kilobytes = done.stdout.split()
    assert (method, size) == ("frequencies", "12288")
    assert int(kilobytes) < 400_000
