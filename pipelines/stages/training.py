"""Training a denoiser in a folder of the run: progress, checkpoints, held-out loss, losses."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffem_core.augmentation import Augmentation
from diffem_core.channel import Channel
from diffem_core.denoiser import Denoiser
from diffem_core.m_step import MStepResult, m_step
from diffem_core.seeds import derive_seed
from diffem_core.training import TrainingState
from diffem_core.validation import Validation
from pipelines import build
from pipelines.progress import stage
from pipelines.stages.bench import Bench, as_arrays, as_tensors
from storage_schemas.config import ValidationConfig
from storage_schemas.manifests import ObjectRecord
from storage_schemas.stage_folder import StageFolder

__all__ = ["Plan", "Trained", "split_rows", "train"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a denoiser is trained."""

    title: str
    """What the progress bar says."""
    parent_digest: str
    """Digest of what it learns from."""
    steps: int
    """Gradient steps."""
    batch_size: int
    """Reconstructions per step."""
    learning_rate: Callable[[int], float]
    """Learning rate by step."""
    ema_decay: float
    """Decay of the weights' average."""
    seed: int
    """Seed of the training."""
    channel: Channel | None
    """What re-corrupts; None for an unconditional denoiser."""
    drop_condition: float = 0.0
    """Probability that an example's condition is dropped."""
    augmentation: Augmentation | None = None
    """Random changes of the reconstructions."""
    validation: Validation | None = None
    """Reconstructions that take no part."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training left."""

    result: MStepResult
    """Weights and losses."""
    losses: ObjectRecord
    """The object `losses.json`."""
    seconds: float
    """Seconds of computing, those before an interruption included."""
    reused: int
    """Steps that a checkpoint held."""


def train(
    bench: Bench, folder: StageFolder, denoiser: Denoiser, x_hat: Tensor, plan: Plan
) -> Trained:
    """Train a denoiser, from the folder's checkpoint if that belongs to this training.

    Arguments:
        bench: The run.
        folder: Where the checkpoint is kept, and the losses.
        denoiser: Trained in place.
        x_hat: Reconstructions, shape (n, *x_shape), in data units.
        plan: How.

    Returns:
        What it left; the checkpoint is still there.
    """
    config = bench.config.m_step
    state, seconds_before = _checkpoint(folder, plan.parent_digest)
    done = 0 if state is None else state.step
    began = last = time.perf_counter()

    with stage(plan.title, total=plan.steps, unit="steps", done=done) as advance:

        def on_step(live: TrainingState) -> None:
            nonlocal last
            advance(1)
            if time.perf_counter() - last >= config.checkpoint_seconds and live.step < plan.steps:
                seconds = seconds_before + time.perf_counter() - began
                metadata = {"parent": plan.parent_digest, "seconds": seconds}
                folder.write_checkpoint(as_arrays(live.tensors()), metadata)
                last = time.perf_counter()

        result = m_step(
            denoiser,
            x_hat,
            plan.channel,
            bench.scaling,
            build.build_schedule(bench.config.schedule),
            build.build_times(bench.config.time),
            steps=plan.steps,
            batch_size=plan.batch_size,
            learning_rate=plan.learning_rate,
            ema_decay=plan.ema_decay,
            clip_norm=config.clip_norm,
            adam_betas=config.adam_betas,
            recorruption=config.recorruption,
            augmentation=plan.augmentation,
            drop_condition=plan.drop_condition,
            validation=plan.validation,
            seed=plan.seed,
            state=state,
            on_step=on_step,
        )
    told = {
        "mean": result.mean_loss,
        "last": result.last_loss,
        "steps": result.steps,
        "stopped_early": result.stopped_early,
        "validation": [list(look) for look in result.validation],
    }
    return Trained(
        result=result,
        losses=folder.write_bytes("losses.json", f"{json.dumps(told)}\n".encode()),
        seconds=seconds_before + time.perf_counter() - began,
        reused=done,
    )


def split_rows(
    sample_ids: Sequence[int], config: ValidationConfig | None, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split reconstructions into those that are learned from and those that are kept out.

    The same observations are kept out in every iteration, since their ids decide.

    Arguments:
        sample_ids: Ids of the observations.
        config: What to keep out; None keeps nothing out.
        seed: Seed of the split.

    Returns:
        Rows to learn from and rows that are kept out, rising.
    """
    n = len(sample_ids)
    kept = np.zeros(n, bool)
    if config is not None:
        order = sorted(range(n), key=lambda row: derive_seed(seed, "validation", sample_ids[row]))
        kept[order[: min(max(1, round(config.fraction * n)), n - 1)]] = True
    return np.flatnonzero(~kept), np.flatnonzero(kept)


def _checkpoint(folder: StageFolder, digest: str) -> tuple[TrainingState | None, float]:
    """Return the state and its seconds, if the training learned from this."""
    found = folder.read_checkpoint()
    if found is None or found[1].get("parent") != digest:
        return None, 0.0
    return TrainingState.from_tensors(as_tensors(found[0])), float(found[1]["seconds"])
