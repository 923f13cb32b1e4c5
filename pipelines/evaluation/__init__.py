"""What is measured of a posterior. Nothing here feeds back into the training.

    observation_space   held-out observations against re-corrupted reconstructions of others
    health              residuals, diversity, calibration in observation space
    against_truth       errors, calibration and distances, where clean samples are known
    chosen              what `evaluation.metrics` adds to these

Truth enters by the argument `truth` alone; without it the same numbers are left out.
"""

from __future__ import annotations

from pipelines.evaluation.against_truth import distance_to_clean
from pipelines.evaluation.chosen import set_metrics
from pipelines.evaluation.judging import evaluate, spare_observations, work_of
from pipelines.evaluation.observation_space import TWO_SAMPLE, divergences
from pipelines.evaluation.samples import Evaluation, Observed, Truth

__all__ = [
    "TWO_SAMPLE",
    "Evaluation",
    "Observed",
    "Truth",
    "distance_to_clean",
    "divergences",
    "evaluate",
    "set_metrics",
    "spare_observations",
    "work_of",
]
