"""What an evaluation is given, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffem_core.classifier import DigitClassifier
from storage_schemas.metrics import Metrics

__all__ = ["Evaluation", "Observed", "Truth", "spread"]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Observations with what belongs to them."""

    sample_ids: Sequence[int]
    """Their ids in the store."""
    y: Tensor
    """Observations, shape (n, *y_shape)."""
    params: Mapping[str, Tensor]
    """Their operator parameters."""

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Tensor) -> Observed:
        """Take some rows."""
        return Observed(
            sample_ids=[self.sample_ids[i] for i in rows.tolist()],
            y=self.y[rows],
            params={name: value[rows] for name, value in self.params.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Clean samples, known only in benchmarks."""

    holdout: Tensor
    """Clean held-out samples, shape (n, *x_shape), aligned with the held-out observations."""
    holdout_labels: Tensor | None
    """Their classes, shape (n,), where there are any."""
    training: Tensor
    """Clean training samples, shape (m, *x_shape)."""
    classifier: DigitClassifier | None
    """Classifier fitted to the clean training samples, for `FrechetDistance`."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What came out."""

    metrics: Metrics
    draws: Tensor
    """Posterior samples of the held-out observations, shape (S, n, *x_shape), in data units."""
    reconstructions: Tensor
    """One posterior sample of each of the other observations, shape (m, *x_shape)."""


def spread(available: int, wanted: int) -> Tensor:
    """Choose `wanted` rows spread evenly over `available`."""
    return torch.div(torch.arange(wanted) * available, wanted, rounding_mode="floor")
