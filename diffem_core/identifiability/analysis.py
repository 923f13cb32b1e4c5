"""How much of x a channel ever observes: rank, spectrum and coverage of H = E[A' A].

Which way is taken depends on the channel. Operators that select entries have a diagonal H. Up to
1,024 entries H is written down and diagonalized. Beyond, products A' A v do (`large`). A channel
that is not linear is linearized around draws of the prior (`response`), up to 1,024 entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.identifiability.dense import (
    look_at_all_entries,
    look_at_secants,
    look_at_selection,
)
from diffem_core.identifiability.large import look_at_products
from diffem_core.identifiability.normals import ChannelNormals, Normals
from diffem_core.identifiability.priors import VariancePrior
from diffem_core.identifiability.problem import Look, Problem, spread
from diffem_core.identifiability.report import Identifiability
from diffem_core.identifiability.response import simulated_noise
from diffem_core.seeds import derive_seed

__all__ = ["identify"]

_DENSE = 1024


def identify(
    channel: Channel,
    params: Mapping[str, Tensor],
    *,
    prior: VariancePrior,
    observations: int,
    seed: int = 0,
    dense_size: int = _DENSE,
) -> Identifiability:
    """Find out how much of x is ever observed.

    Arguments:
        channel: The channel.
        params: Parameters of n operators, by name, of shape (n, *params_spec[name]), as
            `draw_params` or the observations give them; {} for a channel without.
        prior: What is assumed of x, in the data's units.
        observations: Observations that there are to learn from.
        seed: Seed of the random vectors, signs and simulated noise.
        dense_size: Entries of x up to which H is written down, at most 1,024 for reasonable times.

    Returns:
        The analysis. The same arguments give the same numbers.

    Raises:
        ValueError: The parameters are not the channel's or of one operator only, or there are no
            observations.
    """
    if observations < 1:
        raise ValueError(f"identify received {observations} observations; give at least 1")
    if sorted(params) != sorted(channel.params_spec):
        raise ValueError(
            f"identify received the parameters {sorted(params)} but {type(channel).__name__} has "
            f"{sorted(channel.params_spec)}; give exactly these"
        )
    lengths = {len(value) for value in params.values()}
    if len(lengths) > 1 or (lengths and min(lengths) < 2):
        raise ValueError(
            f"identify received parameters of {sorted(lengths)} operators; give the same number "
            "of each, at least 2, to tell whether they vary"
        )
    with torch.no_grad():
        problem = _problem(channel, params, prior, observations, seed)
        look, fixed = _look(problem, dense_size)
    order = look.level.argsort(descending=True, stable=True)
    return Identifiability(
        size=problem.size,
        operators=look.operators,
        observations=observations,
        method=look.method,
        fixed=fixed,
        roughness=look.roughness,
        level=look.level[order],
        share=look.share[order],
        energy=look.energy[order],
        needed=look.needed[order],
        floor=look.floor,
        error=look.error,
        settled=look.settled,
        seen_once=look.seen_once,
        entries=look.entries,
        entries_error=look.entries_error,
        frequencies=look.frequencies,
        lost_variance=None
        if look.lost_variance is None
        else look.lost_variance.reshape(channel.x_shape),
        prior_variance=prior.variances().reshape(channel.x_shape),
        never_seen=look.never_seen,
        pairs=look.pairs,
        together=look.together,
        noise_std=problem.noise_std,
        noise_simulated=channel.noise_std is None,
    )


def _problem(
    channel: Channel,
    params: Mapping[str, Tensor],
    prior: VariancePrior,
    observations: int,
    seed: int,
) -> Problem:
    fixed = all(bool((value == value[:1]).all()) for value in params.values())
    problem = Problem(
        channel=channel,
        params={name: value[:1] for name, value in params.items()} if fixed else dict(params),
        fixed=fixed,
        prior=prior,
        observations=observations,
        noise_std=channel.noise_std or 0.0,
        seed=seed,
    )
    if channel.noise_std is None:
        own = {name: value[:64] for name, value in params.items()}
        x = problem.samples(len(next(iter(own.values()))) if own else 64)
        measured = simulated_noise(channel, x, own, seed=derive_seed(seed, "noise"))
        problem = replace(problem, noise_std=measured)
    return problem


def _look(problem: Problem, dense_size: int) -> tuple[Look, bool]:
    """Look at the operators, and tell whether they are all the same."""
    channel = problem.channel
    small = problem.size <= dense_size
    if not channel.linear:
        return look_at_secants(problem) if small else _nothing(problem), problem.fixed
    seen = channel.selection(problem.params)
    if seen is not None:
        return look_at_selection(problem, seen), problem.fixed
    normals: Normals = ChannelNormals(channel, problem.params)
    if not problem.fixed and _is_one_operator(problem, normals):
        one = {name: value[:1] for name, value in problem.params.items()}
        problem = replace(problem, params=one, fixed=True)
        normals = ChannelNormals(channel, one)
    look = look_at_all_entries if small else look_at_products
    return look(problem, normals), problem.fixed


def _is_one_operator(problem: Problem, normals: Normals) -> bool:
    """Tell whether parameters that differ make the same operator, on a spread of them."""
    z = torch.randn(problem.size, 1, generator=problem.generator("variation"))
    products = spread(normals, 64).apply(slice(None), z).double()
    center = products.mean(0)
    difference = (products - center).square().mean()
    return float(difference) <= 1e-10 * float(center.square().mean())


def _nothing(problem: Problem) -> Look:
    """Return what is known where nothing can be looked at: nothing."""
    one = torch.ones(1, dtype=torch.float64)
    return Look(
        method="none",
        operators=0,
        level=one,
        share=one,
        energy=one,
        needed=one,
        floor=0.0,
        settled=True,
        seen_once=None,
        entries=None,
        frequencies=None,
        lost_variance=None,
        never_seen=torch.zeros(0, len(problem.x_shape), dtype=torch.int64),
        pairs=None,
    )
