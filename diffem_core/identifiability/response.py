"""What a channel that is not linear does to small changes of x: secants of its mean response.

    r(x) = E[y | x]         J(x) v = (r(x + s v) - r(x - s v)) / (2 s)

for a step s in the data's units. Where the sensor leaves y as it is, r is the operator alone and
nothing is random; otherwise the mean is taken over simulated observations, with the same noise on
both sides. A response that is smooth has the same secants at any small step. Rounding is not: at a
small step most secants are 0 and a few are large, so that their mean square grows as the step
shrinks. `roughness` is the ratio of the mean squares at a small and at a large step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.seeds import derive_seed

__all__ = ["has_plain_response", "roughness", "secant_matrices", "simulated_noise"]

_VALUES = 2**22
_FINER = 32.0  # How much smaller the small step is.

Params = Mapping[str, Tensor]
Response = Callable[[Tensor, Params, int], Tensor]


def has_plain_response(channel: Channel) -> bool:
    """Tell whether the mean observation is the operator's output: the sensor changes nothing."""
    sensor = getattr(channel.physics, "sensor_model", None)
    if sensor is None:
        return True
    y = torch.rand(2, *channel.y_shape, generator=torch.Generator().manual_seed(0))
    probed = torch.cat([y, -3.7 * y, 100 * y])
    return bool(torch.equal(sensor(probed), probed))


def secant_matrices(
    channel: Channel, x: Tensor, params: Params, *, step: float, repeats: int, seed: int
) -> Tensor:
    """Compute J at some samples, in all directions of the entries of x.

    Arguments:
        channel: Any channel.
        x: Samples of shape (n, *x_shape).
        params: Their parameters.
        step: The step s, in the data's units.
        repeats: Simulated observations to average over, where the response is random.
        seed: Seed of the noise.

    Returns:
        Shape (n, M, D), float64.
    """
    size = math.prod(channel.x_shape)
    respond = _response(channel, repeats)
    out = torch.zeros(len(x), math.prod(channel.y_shape), size, dtype=torch.float64)
    width = max(1, _VALUES // size)
    unit = torch.eye(size).reshape(size, *channel.x_shape)
    for i in range(len(x)):
        for start in range(0, size, width):
            v = step * unit[start : start + width]
            own = {
                name: value[i : i + 1].expand(len(v), *value.shape[1:]).contiguous()
                for name, value in params.items()
            }
            change = respond(x[i] + v, own, seed) - respond(x[i] - v, own, seed)
            out[i, :, start : start + width] = (change.flatten(1) / (2 * step)).double().mT
    return out


def roughness(
    channel: Channel, x: Tensor, params: Params, *, step: float, repeats: int, seed: int
) -> float:
    """Compute by how much secants grow as the step shrinks 32 times; 1 for a smooth response.

    The mean square is the product of two means over separate noise, which is unbiased.

    Arguments:
        channel: Any channel.
        x: Samples of shape (n, *x_shape).
        params: Their parameters.
        step: The large step, in the data's units.
        repeats: Simulated observations to average over, where the response is random.
        seed: Seed of noise and directions.
    """
    respond = _response(channel, repeats)
    generator = torch.Generator().manual_seed(derive_seed(seed, "directions"))
    squares = {step: 0.0, step / _FINER: 0.0}
    for i in range(len(x)):
        v = 2.0 * torch.randint(2, (1, *channel.x_shape), generator=generator).float() - 1.0
        own = {name: value[i : i + 1] for name, value in params.items()}
        for s in squares:
            halves = [
                (
                    respond(x[i : i + 1] + s * v, own, derive_seed(seed, half))
                    - respond(x[i : i + 1] - s * v, own, derive_seed(seed, half))
                )
                / (2 * s)
                for half in range(2)
            ]
            squares[s] += float((halves[0] * halves[1]).double().sum())
    large, small = squares[step], squares[step / _FINER]
    return small / large if large > 0 else math.inf


def simulated_noise(channel: Channel, x: Tensor, params: Params, *, seed: int) -> float:
    """Measure the standard deviation of y given x, over the entries of y that carry noise.

    Arguments:
        channel: Any channel.
        x: Samples of shape (n, *x_shape).
        params: Their parameters.
        seed: Seed of the noise.

    Returns:
        The root mean square, in the data's units; 0 where y is a function of x.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = [channel.corrupt(x, params, generator=generator) for _ in range(2)]
    square = (pairs[0] - pairs[1]).double().square() / 2
    noisy = square > 0
    return math.sqrt(float(square[noisy].mean())) if bool(noisy.any()) else 0.0


def _response(channel: Channel, repeats: int) -> Response:
    if has_plain_response(channel):
        return lambda x, params, seed: channel.A(x, params)
    random = channel.noise_std != 0.0

    def simulated(x: Tensor, params: Params, seed: int) -> Tensor:
        total: Tensor | None = None
        for repeat in range(repeats if random else 1):
            # The same seed on both sides of a secant: common random numbers.
            generator = torch.Generator().manual_seed(derive_seed(seed, repeat))
            y = channel.corrupt(x, params, generator=generator)
            total = y if total is None else total + y
        assert total is not None
        return total / (repeats if random else 1)

    return simulated
