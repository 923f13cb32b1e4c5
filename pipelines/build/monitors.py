"""Monitor configs to functions, and the stop config to a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import assert_never

import torch
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.monitors import observation_features
from diffem_core.scaling import Scaling
from diffem_core.stopping import BudgetRule, FloorRule, PlateauRule, StopRule
from pipelines.build.targets import build_target
from storage_schemas import config as models

__all__ = ["build_features", "build_stop_rule", "check_monitors"]

_BATCH = 256


def build_features(config: models.FrechetMonitor) -> Callable[[Tensor], Tensor] | None:
    """Build the features of one's own that a Fréchet distance is taken in; None without any.

    Returns:
        A function of what the network sees of n observations, which returns (n, F) features.

    Raises:
        ValueError: There is no such class, or it does not take its arguments.
    """
    if config.features is None:
        return None
    key = "evaluation.monitors.frechet.features"
    network = build_target(config.features, arguments=config.arguments, key=key)

    @torch.inference_mode()
    def features(seen: Tensor) -> Tensor:
        parts = [network(part).flatten(1) for part in torch.split(seen.float(), _BATCH)]
        rows = torch.cat(parts)
        if len(rows) != len(seen) or not bool(rows.isfinite().all()):
            raise ValueError(
                f"{key} {config.features!r} made {len(rows)} rows of {len(seen)} observations, or "
                "numbers that are not finite; return one finite row for each"
            )
        return rows

    return features


def check_monitors(
    config: models.EvaluationConfig,
    channel: Channel,
    scaling: Scaling,
    y: Tensor,
    params: Mapping[str, Tensor],
) -> None:
    """Build the features that monitors name, and pass observations through them.

    Raises:
        ValueError: There is no such class, or it does not take its arguments or observations.
    """
    for monitor in config.monitors:
        features = build_features(monitor) if isinstance(monitor, models.FrechetMonitor) else None
        if features is not None:
            features(observation_features(channel, scaling, y, params))


def build_stop_rule(config: models.StopConfig) -> StopRule:
    """Build the rule by which a run is stopped."""
    match config:
        case models.BudgetStop():
            return BudgetRule()
        case models.PlateauStop():
            return PlateauRule(
                monitor=config.monitor,
                patience=config.patience,
                errors=config.errors,
                after=config.after,
            )
        case models.FloorStop():
            return FloorRule(
                monitor=config.monitor,
                confirm=config.confirm,
                errors=config.errors,
                after=config.after,
            )
    assert_never(config)
