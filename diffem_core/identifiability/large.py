"""Looking at H in many dimensions, through products alone.

Averages over shifts, widths and lines of k-space make H a convolution: F H F* is then diagonal,
and its diagonal, which `coverage` estimates, holds the levels. Whether it is one is tried on a
random vector: up to 2 % of the square of what it does may be anything else, unnoticed (entries
that are never seen are noticed in any case). Any other H is looked at by Lanczos' recursion from
random vectors, which tells how many directions lie where, down to about 1e-3 of the greatest
level: what lies below appears as one level near 0.

Memory: some draws of x, the window of pairs, and for Lanczos 2 x 3 bases of 20 vectors in float32;
for 3 x 256 x 256 entries about 0.7 GB, whatever the number of operators. Time: some hundred A' w
and some thousand A' A v, about half a minute there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffem_core.identifiability.lanczos import spectral_measure
from diffem_core.identifiability.normals import Normals, band_power, coverage, filtered, mean
from diffem_core.identifiability.pairs import pairs_in_window
from diffem_core.identifiability.problem import FLOOR, Look, Problem, spread

__all__ = ["look_at_products"]

_PROBES = 3
_STEPS = 20
_VALUES = 2**28  # Of all products A' A v of a recursion together.
_FLOOR = 1e-5  # Part of the greatest level; products are computed in float32.
_CLOSE = 0.15
_TRIED = 512  # Operators of which the mean may be a convolution.
_DRAWS = 64  # Of x, of which fewer are taken of large images.
_DRAWN_VALUES = 2**21


@dataclass(frozen=True, kw_only=True)
class _Levels:
    level: Tensor
    share: Tensor
    energy: Tensor
    needed: Tensor
    floor: float
    error: float
    settled: bool
    lost_variance: Tensor | None


def look_at_products(problem: Problem, normals: Normals) -> Look:
    """Look at H through products with random vectors.

    Arguments:
        problem: The problem.
        normals: Its operators.
    """
    draws = max(512 if problem.fixed else 64, normals.count)
    entries, power = coverage(
        problem.channel, problem.params, draws=draws, generator=problem.generator("coverage")
    )
    few = spread(normals, max(16, _VALUES // (2 * _PROBES * _STEPS * problem.size)))
    white = torch.randn(problem.size, _PROBES, generator=problem.generator("white"))
    found = None
    if power is not None and _is_convolution(problem, normals, power, white[:, :1]):
        found = _by_frequency(problem, normals, power)
    by_frequency = found is not None
    if found is None:
        found = _by_lanczos(problem, few, white)
    one = few.take(slice(0, 1))
    alone, weight = spectral_measure(lambda v: mean(one, v), white, steps=_STEPS)
    entries = entries.reshape(problem.x_shape)
    return Look(
        method="frequencies" if by_frequency else "randomized",
        operators=normals.count if by_frequency else few.count,
        level=found.level,
        share=found.share,
        energy=found.energy,
        needed=found.needed,
        floor=found.floor,
        error=found.error,
        settled=found.settled,
        seen_once=float(weight[alone > _FLOOR * alone.max()].sum()) / _PROBES,
        entries=entries,
        entries_error=math.sqrt(2 / draws),
        frequencies=None if power is None else torch.fft.fftshift(power.mean(0)),
        lost_variance=found.lost_variance,
        never_seen=(entries == 0).nonzero(),
        pairs=pairs_in_window(few, problem.x_shape) if normals.count > 1 else None,
    )


def _is_convolution(problem: Problem, normals: Normals, power: Tensor, z: Tensor) -> bool:
    """Tell whether E[A' A] z is F* diag(power) F z, on one random vector z of shape (D, 1).

    Operators at hand are never spread evenly. What two halves of them have in common is not
    chance: the inner product of their differences is, but for chance, the square of the true one.
    """
    some = spread(normals, _TRIED)
    every = torch.arange(some.count)
    halves = [every[::2], every[1::2]] if some.count > 1 else [every, every]
    products = [mean(some.take(half), z).mT.reshape(1, *problem.x_shape) for half in halves]
    expected = filtered(z.mT.reshape(1, *problem.x_shape), power.to(z.dtype))
    first, second = ((product - expected).double() for product in products)
    square = float((products[0] * products[1]).double().sum())
    return float((first * second).sum()) <= _CLOSE**2 * square


def _by_frequency(problem: Problem, normals: Normals, power: Tensor) -> _Levels:
    x = problem.deviations(max(16, min(_DRAWS, _DRAWN_VALUES // problem.size)))
    variance = band_power(x).double().mean(0)
    level = power.flatten()
    floor = FLOOR * float(level.max())  # Squares of float32 numbers: far above their rounding.
    needed = problem.needed(torch.where(level > floor, level, 0.0)[None], variance.flatten())
    lost = (level <= floor) | (needed > problem.observations)
    settled = True
    if normals.count > 1 and bool((level <= floor).any()):
        half = {k: v[: normals.count // 2] for k, v in problem.params.items()}
        _, before = coverage(
            problem.channel, half, draws=1, generator=problem.generator("coverage of half")
        )
        assert before is not None
        # Levels are estimates: those next to the floor may fall on either side of it.
        settled = not bool(((before.flatten() <= floor) & (level > 10 * floor)).any())
    rest = filtered(x, lost.reshape(power.shape).to(x.dtype))
    return _Levels(
        level=level,
        share=torch.full_like(level, 1 / len(level)),
        energy=variance.flatten() / variance.sum(),
        needed=needed,
        floor=floor,
        error=0.0,
        settled=settled,
        lost_variance=rest.double().square().mean(0),
    )


def _by_lanczos(problem: Problem, normals: Normals, white: Tensor) -> _Levels:
    drawn = problem.deviations(_PROBES).flatten(1).mT
    theta, tau = spectral_measure(
        lambda v: mean(normals, v), torch.cat([white, drawn], dim=1), steps=_STEPS
    )
    power = drawn.double().square().sum(0)
    share, energy = tau.clone(), tau.clone()
    share[_PROBES:], energy[:_PROBES] = 0.0, 0.0
    share /= _PROBES
    energy[_PROBES:] *= (power / power.sum()).unsqueeze(1)
    level, share, energy = theta.clamp_min(0).flatten(), share.flatten(), energy.flatten()
    floor = _FLOOR * float(level.max())
    error = math.sqrt(2 / (_PROBES * problem.size))
    hidden = float(share[level <= floor].sum())
    settled = True
    if normals.count > 1 and hidden > 3 * error:
        half = normals.take(slice(0, normals.count // 2))
        before, weight = spectral_measure(lambda v: mean(half, v), white, steps=_STEPS)
        settled = float(weight[before <= floor].sum()) / _PROBES - hidden <= 3 * error
    variance = torch.full_like(level, float(problem.prior.variances().mean()))
    return _Levels(
        level=level,
        share=share,
        energy=energy,
        needed=problem.needed(torch.where(level > floor, level, 0.0)[None], variance),
        floor=floor,
        error=error,
        settled=settled,
        lost_variance=None,
    )
