"""The channel: operator, adjoint, pseudo-inverse, noise, parameters and what the network sees."""

import math

import pytest
import torch
from torch import Tensor

from diffem_core import Channel, RandomMask, RandomMatrix, Scaling

CHANNELS = {
    "mask_grey": lambda: RandomMask((1, 8, 8), keep=0.5, noise_std=0.4),
    "mask_colour": lambda: RandomMask((3, 4, 6), keep=0.3, noise_std=0.1),
    "mask_full": lambda: RandomMask((2, 4, 4), keep=1.0, noise_std=0.0),
    "matrix": lambda: RandomMatrix(5, rows=2, noise_std=0.01),
    "matrix_square": lambda: RandomMatrix(3, rows=3, noise_std=0.0),
}


@pytest.fixture(params=CHANNELS)
def channel(request: pytest.FixtureRequest) -> Channel:
    return CHANNELS[request.param]()


def randn(generator: torch.Generator, n: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(n, *shape, generator=generator, dtype=torch.float64)


def test_shapes_are_as_stated(channel: Channel, generator: torch.Generator) -> None:
    params = channel.draw_params(7, generator=generator)
    assert {k: tuple(v.shape[1:]) for k, v in params.items()} == channel.params_spec
    x = torch.randn(7, *channel.x_shape, generator=generator)
    y = channel.corrupt(x, params, generator=generator)
    assert y.shape == (7, *channel.y_shape)
    assert y.dtype == x.dtype
    condition = channel.condition(y, params, Scaling.from_range(0, 16))
    trailing = channel.x_shape[1:] if len(channel.x_shape) == 3 else ()
    assert condition.shape == (7, channel.condition_channels, *trailing)


def test_adjoint(channel: Channel, generator: torch.Generator) -> None:
    params = channel.draw_params(6, generator=generator)
    x = randn(generator, 6, channel.x_shape)
    y = randn(generator, 6, channel.y_shape)
    left = (channel.A(x, params) * y).flatten(1).sum(1)
    right = (x * channel.A_adjoint(y, params)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_pseudo_inverse(channel: Channel, generator: torch.Generator) -> None:
    # The four Penrose conditions, written for the operator and tested on random vectors.
    params = channel.draw_params(6, generator=generator)
    params = {k: v.double() for k, v in params.items()}
    x, x2 = (randn(generator, 6, channel.x_shape) for _ in range(2))
    y, y2 = (randn(generator, 6, channel.y_shape) for _ in range(2))

    def A(v: Tensor) -> Tensor:
        return channel.A(v, params)

    def dagger(v: Tensor) -> Tensor:
        return channel.A_dagger(v, params)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1)

    torch.testing.assert_close(A(dagger(A(x))), A(x))
    torch.testing.assert_close(dagger(A(dagger(y))), dagger(y))
    torch.testing.assert_close(dot(A(dagger(y)), y2), dot(y, A(dagger(y2))))
    torch.testing.assert_close(dot(dagger(A(x)), x2), dot(x, dagger(A(x2))))


def test_the_matrix_is_the_operator(channel: Channel, generator: torch.Generator) -> None:
    params = {k: v.double() for k, v in channel.draw_params(4, generator=generator).items()}
    x = randn(generator, 4, channel.x_shape)
    product = (channel.matrix(params) @ x.flatten(1).unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(product, channel.A(x, params).flatten(1))


def test_parameters_of_one_call_do_not_leak_into_the_next(channel: Channel) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (channel.draw_params(3, generator=generator) for _ in range(2))
    x = torch.randn(3, *channel.x_shape, generator=generator)
    expected = channel.A(x, first)
    channel.A(x, second)
    assert torch.equal(channel.A(x, first), expected)
    # Nor does the type of an earlier call: deepinv casts new parameters to the type of the old
    # ones.
    doubles = {k: v.double() for k, v in first.items()}
    assert channel.A(x.double(), doubles).dtype == torch.float64


@pytest.mark.parametrize("name", ["mask_grey", "mask_colour", "matrix"])
def test_noise_has_the_stated_spread_in_every_band_and_is_independent(name: str) -> None:
    channel = CHANNELS[name]()
    assert channel.noise_std is not None
    generator = torch.Generator().manual_seed(1)
    n = 20000
    params = channel.draw_params(n, generator=generator)
    x = torch.zeros(n, *channel.x_shape)
    noise = channel.corrupt(x, params, generator=generator)
    seen = channel.selection(params)
    weight = torch.ones_like(noise) if seen is None else seen.reshape(noise.shape).float()
    bands = noise.transpose(0, 1).flatten(1).double() / channel.noise_std
    weights = weight.transpose(0, 1).flatten(1).double()
    for band, w in zip(bands, weights, strict=True):
        count = float(w.sum())
        # Mean and variance of `count` unit normals, within 5 standard errors.
        assert abs(float((band * w).sum()) / count) < 5 / math.sqrt(count)
        assert abs(float((band.square() * w).sum()) / count - 1) < 5 * math.sqrt(2 / count)
    if len(bands) > 1:
        # The official code adds one noise to all colour channels; here bands are uncorrelated.
        both = weights[0] * weights[1]
        correlation = float((bands[0] * bands[1] * both).sum() / both.sum())
        assert abs(correlation) < 5 / math.sqrt(float(both.sum()))


def test_a_mask_hides_whole_pixels_with_the_stated_probability() -> None:
    channel = CHANNELS["mask_colour"]()
    generator = torch.Generator().manual_seed(2)
    n = 4000
    params = channel.draw_params(n, generator=generator)
    mask = params["mask"]
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    pixels = mask.numel()
    assert abs(float(mask.mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / pixels)
    y = channel.corrupt(torch.ones(n, 3, 4, 6), params, generator=generator)
    assert torch.equal(y != 0, (mask > 0).expand_as(y)), (
        "hidden entries are exactly 0, seen are not"
    )


def test_matrix_rows_are_uniform_on_the_sphere() -> None:
    channel = RandomMatrix(4, rows=2, noise_std=0.0)
    matrix = channel.draw_params(20000, generator=torch.Generator().manual_seed(3))["matrix"]
    torch.testing.assert_close(matrix.norm(dim=-1), torch.ones(20000, 2))
    rows = matrix.flatten(0, 1).double()
    second = rows.mT @ rows / len(rows)
    # E[a a'] = I / 4; an entry has a standard deviation below 1 / 4.
    torch.testing.assert_close(
        second, torch.eye(4, dtype=torch.float64) / 4, rtol=0, atol=5 * 0.25 / math.sqrt(40000)
    )


def test_the_caller_s_generator_moves_on() -> None:
    # deepinv's GaussianNoise draws from a copy of its generator: without care, the next draw
    # repeats the noise.
    channel = RandomMask((1, 4, 4), keep=1.0, noise_std=1.0)
    generator = torch.Generator().manual_seed(0)
    params = channel.draw_params(1, generator=generator)
    x = torch.zeros(1, 1, 4, 4)
    first = channel.corrupt(x, params, generator=generator)
    assert not torch.equal(first, channel.corrupt(x, params, generator=generator))
    assert not torch.equal(first, torch.randn(1, 1, 4, 4, generator=generator))


def test_corruption_is_a_function_of_the_generator(channel: Channel) -> None:
    def draw() -> Tensor:
        generator = torch.Generator().manual_seed(5)
        params = channel.draw_params(3, generator=generator)
        return channel.corrupt(torch.ones(3, *channel.x_shape), params, generator=generator)

    assert torch.equal(draw(), draw())


def test_the_network_sees_pixels_and_mask() -> None:
    channel = RandomMask((2, 4, 4), keep=0.5, noise_std=0.0)
    scaling = Scaling.from_range(0, 16)
    generator = torch.Generator().manual_seed(4)
    params = channel.draw_params(50, generator=generator)
    x = 16 * torch.rand(50, 2, 4, 4, generator=generator)
    condition = channel.condition(channel.A(x, params), params, scaling)
    assert torch.equal(condition[:, 2:], params["mask"])
    torch.testing.assert_close(condition[:, :2], scaling.to_network(x) * params["mask"])
    assert (condition[:, :2][(params["mask"] == 0).expand(-1, 2, -1, -1)] == 0).all()


def test_the_network_sees_the_matrix() -> None:
    channel = RandomMatrix(5, rows=2, noise_std=0.0)
    scaling = Scaling(center=1.0, scale=0.5)
    generator = torch.Generator().manual_seed(4)
    params = channel.draw_params(9, generator=generator)
    x = torch.randn(9, 5, generator=generator)
    condition = channel.condition(channel.A(x, params), params, scaling)
    u = scaling.to_network(x)
    torch.testing.assert_close(condition[:, :2], channel.A(u, params))
    assert torch.equal(condition[:, 2:12], params["matrix"].flatten(1))
    torch.testing.assert_close(
        condition[:, 12:], channel.A_adjoint(channel.A(u, params), params), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomMask((8, 8), keep=0.5, noise_std=0.1), r"x_shape \(8, 8\).*\(C, H, W\)"),
        (lambda: RandomMask((1, 8, 8), keep=0.0, noise_std=0.1), r"keep 0.0.*\(0, 1\]"),
        (lambda: RandomMask((1, 8, 8), keep=0.5, noise_std=-1.0), r"noise_std -1.0.*>= 0"),
        (lambda: RandomMatrix(5, rows=6, noise_std=0.1), r"6 rows for 5 dimensions; give 1 to 5"),
    ],
)
def test_bad_channels(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_shapes_are_named() -> None:
    channel = RandomMask((1, 8, 8), keep=0.5, noise_std=0.1)
    params = channel.draw_params(8, generator=torch.Generator())
    message = r"`y` has shape \(8, 3, 32, 32\) but RandomMask expects \(n, 1, 8, 8\)"
    with pytest.raises(ValueError, match=message):
        channel.A_dagger(torch.zeros(8, 3, 32, 32), params)


@pytest.mark.parametrize(
    ("low", "high", "value", "expected"),
    [(0.0, 16.0, 0.0, -2.0), (0, 255, 255, 2.0), (-1, 3, 1, 0)],
)
def test_scaling(low: float, high: float, value: float, expected: float) -> None:
    scaling = Scaling.from_range(low, high)
    x = torch.tensor([value], dtype=torch.float64)
    torch.testing.assert_close(
        scaling.to_network(x), torch.tensor([expected], dtype=torch.float64)
    )
    torch.testing.assert_close(scaling.to_data(scaling.to_network(x)), x)


def test_bad_scaling() -> None:
    with pytest.raises(ValueError, match=r"range \[1, 1\]; give low < high"):
        Scaling.from_range(1, 1)
    with pytest.raises(ValueError, match="scale positive"):
        Scaling(center=0.0, scale=0.0)
