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
from diffem_core.data_parallel import DataParallel
from diffem_core.denoiser import Denoiser
from diffem_core.m_step import MStepResult, m_step
from diffem_core.seeds import derive_seed
from diffem_core.training import TrainingState
from diffem_core.validation import Validation
from pipelines import build, cancellation
from pipelines.progress import reporter, stage
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
    bench: Bench,
    folder: StageFolder,
    denoiser: Denoiser,
    x_hat: Tensor,
    plan: Plan,
    group: DataParallel | None = None,
) -> Trained:
    """Train a denoiser, from the folder's checkpoint if that belongs to this training.

    Arguments:
        bench: The run.
        folder: Where the checkpoint is kept, and the losses.
        denoiser: Trained in place.
        x_hat: Reconstructions, shape (n, *x_shape), in data units.
        plan: How.
        group: The processes that train together, of which the first alone reads the checkpoint
            and writes; None for one process.

    Returns:
        What it left; the checkpoint is still there.

    Raises:
        Cancelled: An end was asked for; the checkpoint holds all steps that were done.
    """
    config = bench.config.m_step
    leads = group is None or group.rank == 0
    state, seconds_before = _checkpoint(folder, plan.parent_digest) if leads else (None, 0.0)
    done = 0 if state is None else state.step
    began = last = time.perf_counter()

    with stage(plan.title, total=plan.steps, unit="steps", done=done) as advance:

        def write_checkpoint(live: TrainingState) -> None:
            nonlocal last
            seconds = seconds_before + time.perf_counter() - began
            metadata = {"parent": plan.parent_digest, "seconds": seconds}
            folder.write_checkpoint(as_arrays(live.tensors()), metadata)
            last = time.perf_counter()

        def on_step(live: TrainingState) -> None:
            advance(1)
            due = time.perf_counter() - last >= config.checkpoint_seconds
            if due and live.step < plan.steps:
                write_checkpoint(live)

        def on_split(pieces: int) -> None:
            reporter().note(
                f"{plan.title}: no memory for a whole batch, going on in {pieces} pieces"
            )

        with build.repeatable(bench.config.runner, bench.device):
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
                on_step=on_step if leads else None,
                on_split=on_split,
                # After the last step the model itself is written: as good a point to stop at.
                stop=lambda: cancellation.requested() is not None,
                group=group,
            )
        if result.interrupted:
            if leads:
                write_checkpoint(result.state)
            if group is not None:
                group.wait()  # Whoever sees one of these processes end may end the others.
            raise cancellation.Cancelled(
                cancellation.requested() or "another process of this training was asked to end"
            )
    told = {
        "mean": result.mean_loss,
        "last": result.last_loss,
        "steps": result.steps,
        "stopped_early": result.stopped_early,
        "validation": [list(look) for look in result.validation],
    }
    losses = f"{json.dumps(told)}\n".encode()
    return Trained(
        result=result,
        losses=folder.write_bytes("losses.json", losses) if leads else ObjectRecord.of(losses),
        seconds=seconds_before + time.perf_counter() - began,
        reused=done,
    )


def split_rows(
    sample_ids: Sequence[int] | NDArray[np.int64],
    config: ValidationConfig | None,
    *,
    seed: int,
    sizes: Sequence[int] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split reconstructions into those that are learned from and those that are kept out.

    The same observations are kept out in every iteration, since their ids decide; of those that
    came later, the same fraction.

    Arguments:
        sample_ids: Ids of the observations.
        config: What to keep out; None keeps nothing out.
        seed: Seed of the split.
        sizes: How many of them came together, in order; all at once by default.

    Returns:
        Rows to learn from and rows that are kept out, rising.
    """
    kept = np.zeros(len(sample_ids), bool)
    start = 0
    for n in sizes or [len(sample_ids)]:
        rows = range(start, start + n)
        start += n
        if config is not None:
            order = sorted(
                rows, key=lambda row: derive_seed(seed, "validation", int(sample_ids[row]))
            )
            kept[order[: min(max(1, round(config.fraction * n)), n - 1)]] = True
    return np.flatnonzero(~kept), np.flatnonzero(kept)


def _checkpoint(folder: StageFolder, digest: str) -> tuple[TrainingState | None, float]:
    """Return the state and its seconds, if the training learned from this."""
    found = folder.read_checkpoint()
    if found is None or found[1].get("parent") != digest:
        return None, 0.0
    return TrainingState.from_tensors(as_tensors(found[0])), float(found[1]["seconds"])
