"""The M-step: refine the denoiser on the reconstructions, re-corrupted by the channel.

    theta <- argmin E lambda_t || f_theta(x_t, sigma_t, y_tilde) - x_hat_i ||^2
    y_tilde ~ Q(. | x_hat_i),      x_t = x_hat_i + sigma_t z,      lambda_t = 1 / sigma_t^2 + 1

(The squared norm is the mean over entries.)

With a `Validation`, the loss of the averaged weights on held-out reconstructions is looked at from
time to time, and can end the M-step.

Step k draws everything (samples, operators, noises, times, dropout) from a generator seeded with
(seed, k), so that an M-step that is interrupted and goes on from a `TrainingState` ends with the
same bits as one that is not.

Several processes can do an M-step together (`DataParallel`). All of them draw everything, dropout
included, for the whole batch, so that their M-step is that of one process up to the order in
which gradients are added up. Where a network draws random numbers that do not come from the
M-step's generator (a custom one with dropout of its own), these are equal in distribution only;
buffers that it changes while it computes are those of process 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from diffem_core.augmentation import Augmentation
from diffem_core.batch_gradient import BatchGradient
from diffem_core.data_parallel import DataParallel
from diffem_core.denoiser import Denoiser
from diffem_core.examples import Ahead, Batches, Examples, denoising_loss
from diffem_core.scaling import Scaling
from diffem_core.schedule import Schedule
from diffem_core.seeds import derive_seed
from diffem_core.times import TimeDistribution
from diffem_core.training import FlatAdam, TrainingState
from diffem_core.validation import HeldOutLoss, Validation

if TYPE_CHECKING:
    from diffem_core.channel import Channel

__all__ = ["MStepResult", "denoising_loss", "m_step"]

_CUDA_CHECK = 32  # Steps between looks at the losses on a GPU, each of which waits for it.


@dataclass(frozen=True, kw_only=True)
class MStepResult:
    """What an M-step leaves.

    Arguments:
        weights: The averaged weights (and buffers, if any) by their names in the denoiser, on the
            CPU.
        mean_loss: Mean loss over all steps.
        last_loss: Loss of the last step.
        steps: Steps done in all.
        state: The state after the last step.
        validation: Step (from 1) and held-out loss of every look; () without validation.
        stopped_early: Whether the held-out loss ended the M-step before its last step. The weights
            are those of the last step done, not of the lowest loss.
        interrupted: Whether `stop` ended the M-step before its last step; it goes on from `state`.
        waited: Seconds that this call waited for reconstructions to be read.
    """

    weights: dict[str, Tensor]
    mean_loss: float
    last_loss: float
    steps: int
    state: TrainingState
    validation: tuple[tuple[int, float], ...]
    stopped_early: bool
    interrupted: bool
    waited: float


def m_step(
    denoiser: Denoiser,
    x_hat: Tensor,
    channel: Channel | None,
    scaling: Scaling,
    schedule: Schedule,
    times: TimeDistribution,
    *,
    steps: int,
    batch_size: int,
    learning_rate: Callable[[int], float],
    ema_decay: float,
    clip_norm: float,
    adam_betas: tuple[float, float] = (0.9, 0.999),
    recorruption: Literal["fresh", "fixed"] = "fresh",
    augmentation: Augmentation | None = None,
    drop_condition: float = 0.0,
    validation: Validation | None = None,
    seed: int,
    state: TrainingState | None = None,
    on_step: Callable[[TrainingState], None] | None = None,
    on_split: Callable[[int], None] | None = None,
    stop: Callable[[], bool] | None = None,
    group: DataParallel | None = None,
) -> MStepResult:
    """Train a denoiser on reconstructions.

    Afterwards it holds the averaged weights and is in evaluation mode.

    Arguments:
        denoiser: Trained in place, from the weights that it holds; the optimizer and the average
            start anew.
        x_hat: Reconstructions of shape (n, *x_shape), in the data's units; batches go through all
            of them in a new order at each pass.
        channel: The channel that re-corrupts them; None to train an unconditional denoiser.
        scaling: The change to network units.
        schedule: Noise level as a function of time.
        times: Distribution of the training times.
        steps: Gradient steps.
        batch_size: Reconstructions per step.
        learning_rate: Learning rate by step, from 0.
        ema_decay: Decay of the weights' moving average.
        clip_norm: Largest norm of a gradient.
        adam_betas: Decays of Adam's first and second moments, in [0, 1).
        recorruption: Corrupt afresh in every batch, or once per reconstruction and M-step as in
            the paper.
        augmentation: Random changes of the reconstructions before they are corrupted.
        drop_condition: Probability that a sample's condition is replaced by zeros, so that the
            denoiser learns the prior as well, in [0, 1).
        validation: Held-out reconstructions to look at, whose conditions are never dropped; looks
            change neither weights nor random numbers, but can end the M-step.
        seed: Seed of the whole M-step.
        state: State of this same M-step after some of its steps, to go on from. Its looks count;
            without `validation` they are left aside.
        on_step: Called after every step with a live view of the state, for progress and
            checkpoints (`state.tensors()` copies it).
        on_split: Called with the number of pieces when the memory of the device does not suffice
            for a batch (of this process), which is computed in so many pieces from then on: the
            same step up to the order of sums.
        stop: Asked at every step, after `on_step`, whether to end the M-step here: it can go on
            from the state that it returns. Among several processes, which are asked before they
            add up their gradients, one that says so is enough, and all end after the same step; on
            GPUs that may be up to 31 steps later.
        group: The processes that do this M-step together, all of which call this function with the
            same arguments, apart from `state`, `on_step`, `on_split` and `stop`; weights and state
            are those of process 0. None for one process. If one of them raises, the others may
            wait for it: whoever started them ends them.

    Returns:
        The averaged weights and the losses.

    Raises:
        ValueError: An argument is out of range, `x_hat` does not fit the channel, or the state
            belongs to another network.
        FloatingPointError: A loss, held out or not, or a gradient is not finite.

    References:
        DiffEM (arXiv 2510.12691), M-step.
    """
    _check(x_hat, channel, steps=steps, batch_size=batch_size, recorruption=recorruption)
    if not 0 <= drop_condition < 1:
        raise ValueError(
            f"m_step received drop_condition {drop_condition}; give a number in [0, 1)"
        )
    if augmentation is not None and recorruption == "fixed":
        raise ValueError(
            "m_step received an augmentation with recorruption 'fixed', under which observations "
            "would no longer belong to the images; take 'fresh'"
        )
    device = next(denoiser.parameters()).device
    optimizer = FlatAdam(denoiser, clip_norm=clip_norm, ema_decay=ema_decay, betas=adam_betas)
    done, losses = 0, torch.zeros(2, dtype=torch.float64, device=device)
    looks: tuple[tuple[int, float], ...] = ()
    if state is not None:
        if state.step > steps:
            raise ValueError(f"the state has done {state.step} steps but this M-step has {steps}")
        optimizer.load(state)
        done = state.step
        losses.copy_(state.losses)
        looks = state.looks if validation is not None else ()
    if group is not None:
        done, looks = group.share_state(optimizer, losses, done, looks)
    examples = Examples(x_hat, channel, scaling, augmentation, drop_condition)
    if recorruption == "fixed":
        examples.fix(seed)
    held_out = None
    if validation is not None:
        _check_validation(validation, x_hat)
        held_out = HeldOutLoss(
            Examples(validation.x_hat, channel, scaling, None, 0.0),
            schedule,
            times,
            batch_size=batch_size,
            seed=seed,
            group=group,
        )
    fetch = Ahead(x_hat, Batches(len(x_hat), batch_size, seed), steps)
    generator = torch.Generator(device)
    gradient = BatchGradient(
        denoiser, generator, gradient=optimizer.gradient, group=group, on_split=on_split
    )
    groups = optimizer.groups()
    interrupted = False
    watch = _Watch(every=_CUDA_CHECK if device.type == "cuda" else 1)

    def due(step: int) -> bool:
        return validation is not None and validation.due(step, steps)

    def look(step: int) -> None:
        nonlocal looks
        assert held_out is not None
        denoiser.eval()
        with optimizer.averaged():
            looks = (*looks, (step, held_out(denoiser)))
        denoiser.train()

    denoiser.train()
    try:
        if due(done) and (not looks or looks[-1][0] != done):
            look(done)  # The state is of an M-step without validation.
        while (
            done < steps
            and not interrupted
            and not (validation is not None and validation.enough(looks))
        ):
            step = done
            generator.manual_seed(derive_seed(seed, "m_step", step))
            with torch.no_grad():
                rows, fetched = fetch(step)
                x, condition = examples.draw(rows, generator, fetched)
                z = torch.empty_like(x).normal_(generator=generator)
                t = times.sample(len(x), schedule=schedule, generator=generator, device=device)
                sigma_t = schedule.sigma(t)
            loss = gradient(x, z, sigma_t, condition)
            if group is not None:
                optimizer.summed[-2] = loss
                optimizer.summed[-1] = float(stop is not None and stop())
                group.sum_(optimizer.summed)
                loss = optimizer.summed[-2].clone()
                for buffer in groups.get("buffers", {}).values():
                    group.copy_first_(buffer)
            norm = optimizer.update(step + 1, learning_rate(step))
            losses[0] += loss
            losses[1] = loss
            done = step + 1
            asking = () if group is None else (optimizer.summed[-1].clone(),)
            last = done == steps or due(done)
            interrupted = watch.record(step, loss, norm, sigma_t, *asking, last=last)
            if due(done):
                look(done)
            if on_step is not None:
                on_step(TrainingState(step=done, losses=losses, groups=groups, looks=looks))
            if group is None:
                interrupted = stop is not None and stop()
    finally:
        gradient.release()
        fetch.close()
    final = TrainingState(step=done, losses=losses, groups=groups, looks=looks)
    optimizer.release()
    denoiser.eval()
    weights = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in denoiser.state_dict().items()
    }
    return MStepResult(
        weights=weights,
        mean_loss=final.mean_loss,
        last_loss=final.last_loss,
        steps=done,
        state=final,
        validation=looks,
        stopped_early=done < steps and not interrupted,
        interrupted=interrupted and done < steps,
        waited=fetch.waited,
    )


class _Watch:
    """Stops on the first bad loss or gradient; on a GPU it looks at them in batches."""

    def __init__(self, *, every: int) -> None:
        self.every = every
        self._steps: list[int] = []
        self._values: list[Tensor] = []

    def record(
        self, step: int, loss: Tensor, norm: Tensor, sigma_t: Tensor, *asking: Tensor, last: bool
    ) -> bool:
        """Take one step's numbers, and look at all that were taken when it is time.

        Returns:
            Whether a process was seen to ask for an end (the last number, if there is one).
        """
        self._steps.append(step)
        numbers = [loss, norm, sigma_t.amin(), sigma_t.amax(), *asking]
        self._values.append(torch.stack(numbers))
        if len(self._steps) < self.every and not last:
            return False
        rows = torch.stack(self._values).tolist()
        for number, (value, gradient, low, high, *_) in zip(self._steps, rows, strict=True):
            if not (math.isfinite(value) and math.isfinite(gradient)):
                raise FloatingPointError(
                    f"M-step diverged at step {number}: loss {value}, gradient norm {gradient}, "
                    f"noise levels from {low:.3g} to {high:.3g}; lower the learning rate, clip "
                    "harder, or raise schedule.sigma_min"
                )
        self._steps, self._values = [], []
        return any(row[4] > 0 for row in rows if asking)


def _check_validation(validation: Validation, x_hat: Tensor) -> None:
    if validation.x_hat.shape[1:] != x_hat.shape[1:]:
        raise ValueError(
            f"m_step received held-out reconstructions of shape {tuple(validation.x_hat.shape)} "
            f"but trains on {tuple(x_hat.shape)}; give both the same sample shape"
        )


def _check(
    x_hat: Tensor, channel: Channel | None, *, steps: int, batch_size: int, recorruption: str
) -> None:
    if len(x_hat) == 0:
        raise ValueError("m_step received no reconstructions; give at least one")
    if channel is not None and tuple(x_hat.shape[1:]) != channel.x_shape:
        raise ValueError(
            f"m_step received reconstructions of shape {tuple(x_hat.shape)} but the channel's "
            f"samples have shape {channel.x_shape}; reshape them or build the channel for theirs"
        )
    if steps < 1 or batch_size < 1:
        raise ValueError(
            f"m_step received {steps} steps of {batch_size} samples; give at least 1 of each"
        )
    if recorruption not in ("fresh", "fixed"):
        raise ValueError(
            f"m_step received recorruption {recorruption!r}; known are 'fresh', 'fixed'"
        )
