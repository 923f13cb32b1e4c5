"""The stages of a run: plain functions of the run's URL, importable and testable without Prefect.

Each stage looks into the store first. What is complete there and was computed from the same
parent is returned as it is (`reused`); everything else is computed, written object first,
recorded last. A stage gets and returns URLs, numbers and digests, never tensors, so that it can
run in any process that reaches the store.
"""

from __future__ import annotations

from pipelines.runners.distributed import as_rank
from pipelines.stages.following import follow_observations
from pipelines.stages.iterations import (
    commit_iteration,
    e_step_shard,
    evaluate_iteration,
    is_complete,
    is_done,
    lay_out_iteration,
    model_digest,
    reconstructions_digest,
    refine_model,
)
from pipelines.stages.observations import prepare_observations
from pipelines.stages.prior import fit_prior, train_prior
from pipelines.stages.recovery import first_unfinished_iteration, recover
from pipelines.stages.reporting import write_report
from pipelines.stages.start import fit_start
from pipelines.stages.stopping import decide_stop

__all__ = [
    "as_rank",
    "commit_iteration",
    "decide_stop",
    "e_step_shard",
    "evaluate_iteration",
    "first_unfinished_iteration",
    "fit_prior",
    "fit_start",
    "follow_observations",
    "is_complete",
    "is_done",
    "lay_out_iteration",
    "model_digest",
    "prepare_observations",
    "reconstructions_digest",
    "recover",
    "refine_model",
    "train_prior",
    "write_report",
]
