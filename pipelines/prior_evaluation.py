"""What is measured of a prior: its samples against clean samples, and corrupted, against data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffem_core.channel import Channel
from diffem_core.scaling import Scaling
from diffem_core.seeds import derive_seed
from pipelines.evaluation import (
    TWO_SAMPLE,
    Observed,
    Truth,
    distance_to_clean,
    divergences,
    set_metrics,
    spare_observations,
)
from storage_schemas.config import EvaluationConfig
from storage_schemas.metrics import Metric, Metrics

__all__ = ["evaluate_prior"]


def evaluate_prior(
    samples: Tensor,
    *,
    channel: Channel,
    scaling: Scaling,
    config: EvaluationConfig,
    holdout: Observed,
    others: Observed,
    truth: Truth | None,
    floors: Mapping[str, Metric],
    seed: int,
    device: torch.device | str = "cpu",
) -> Metrics:
    """Judge samples of a prior.

    Arguments:
        samples: Samples, shape (n, *x_shape), in data units.
        channel: The channel, which corrupts them.
        scaling: The change to network units.
        config: What to measure.
        holdout: Held-out observations.
        others: Observations of the training split, as in `evaluate`: features are fitted to some.
        truth: Clean samples, or None where nobody knows them.
        floors: Metrics of the start, whose floors in observation space are taken over.
        seed: Seed of the corruption.
        device: Where the networks of metrics are put.

    Returns:
        The divergence and the monitors between corrupted samples and held-out observations and,
        where clean samples are known, the distance between both.
    """
    names = {f"{name}_floor" for name in TWO_SAMPLE}
    values = divergences(
        channel,
        scaling,
        samples,
        holdout,
        None,
        {name: metric for name, metric in floors.items() if name in names},
        seed,
        monitors=config.monitors,
        spare=spare_observations(config, others),
    )
    if truth is not None:
        values |= distance_to_clean(samples, truth, truth.training, config, scaling)
        values |= set_metrics(
            config.metrics,
            samples,
            others=truth.training,
            everything=truth.training,
            scaling=scaling,
            classifier=truth.classifier,
            seed=derive_seed(seed, "metrics"),
            device=torch.device(device),
        )
    return Metrics(values=values)
