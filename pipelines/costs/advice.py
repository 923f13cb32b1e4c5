"""What would make a run cheaper, where something stands out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines import build
from storage_schemas.config import RunConfig

if TYPE_CHECKING:
    from pipelines.costs.forecast import Forecast
    from pipelines.plan import Plan

__all__ = ["advice"]

_FEW_CALLS = 16
_SMALL_SHARE = 0.25


def advice(config: RunConfig, plan: Plan, found: Forecast) -> tuple[str, ...]:
    """Name what stands out among the costs, and the values of the config that decide it.

    Arguments:
        config: The config.
        plan: Its amounts.
        found: Its costs.

    Returns:
        Lines for people; none where nothing stands out.
    """
    return (*_evaluating(config, found), *_sampling(config, plan, found), *_sharding(plan, found))


def _evaluating(config: RunConfig, found: Forecast) -> Iterator[str]:
    seconds = found.stage("evaluations").seconds
    if seconds < 0.25 * found.seconds or seconds < 10:
        return
    drawing = found.draws / seconds
    values = (
        f"evaluation.draws ({config.evaluation.draws}), evaluation.reconstructions "
        f"({config.evaluation.reconstructions}) and the held-out observations"
        if drawing > 0.5
        else f"evaluation.monitors ({len(config.evaluation.monitors)} of them) and "
        "evaluation.distance"
    )
    yield (
        f"evaluations take {seconds / found.seconds:.0%} of the time, {drawing:.0%} of it for "
        f"drawing samples: {values} decide it"
    )


def _sampling(config: RunConfig, plan: Plan, found: Forecast) -> Iterator[str]:
    sampler = config.e_step.sampler
    calls = build.network_calls(sampler)
    drawing = found.stage("E-steps").seconds + found.draws
    if calls < 4 * _FEW_CALLS or drawing < 0.25 * found.seconds:
        return
    left = found.seconds - drawing * (1 - _FEW_CALLS / calls)
    yield (
        f"{calls} network calls per sample: with e_step.sampler {{kind: dpm_solver, steps: "
        f"{_FEW_CALLS}}} the run would take about {left / found.seconds:.0%} of the time (compare "
        "the results: few steps bias the recursion)"
    )


def _sharding(plan: Plan, found: Forecast) -> Iterator[str]:
    beside = plan.shards * found.rates.shard
    seconds = found.last_iteration["e_step"]
    if plan.shards > 1 and beside > _SMALL_SHARE * seconds and seconds > 1:
        yield (
            f"{plan.shards:,} shards cost {found.rates.shard * 1000:.0f} ms each beside their "
            f"samples, {beside / seconds:.0%} of an E-step: raise e_step.shard_size"
        )
