"""M-step and runner configs to what they describe: lengths, learning rates, device."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, assert_never

import torch
from torch import Tensor

from diffem_core.augmentation import Augmentation
from diffem_core.rates import constant_rate, cosine_rate, linear_rate
from diffem_core.validation import Validation
from pipelines.runners.devices import THREADS_VARIABLE
from pipelines.runners.processors import usable_threads
from storage_schemas import config as models

__all__ = [
    "build_augmentation",
    "build_device",
    "build_learning_rate",
    "build_rate",
    "build_validation",
    "m_step_length",
    "repeatable",
    "starts_anew",
]


def build_device(config: models.RunnerConfig) -> torch.device:
    """Choose the device and set the number of processor threads.

    Threads are those of the config, or `usable_threads`; in a worker process, those that its
    parent lets it have, in the environment variable `DIFFEM_THREADS`.

    Arguments:
        config: Device and threads.

    Returns:
        The device.

    Raises:
        ValueError: If the config asks for a GPU that is not there.
    """
    share = int(os.environ.get(THREADS_VARIABLE) or 0)
    torch.set_num_threads(share or config.threads or usable_threads())
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"runner.device is {config.device!r} but this machine has "
            f"{torch.cuda.device_count()} CUDA devices; "
            "set runner.device to 'cpu' or 'auto'"
        )
    if device.type == "cuda":
        # What cuBLAS needs to be repeatable; it is read when this process first uses the GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return device


@contextmanager
def repeatable(config: models.RunnerConfig, device: torch.device) -> Iterator[None]:
    """Let a GPU add up gradients in an order that is always the same, if the config asks for it.

    Arguments:
        config: Says whether.
        device: What is trained on; processors do so anyway.

    Raises:
        ValueError: Inside, for work that has no such order.
    """
    if device.type != "cuda" or not config.deterministic:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # It helps against mistakes that are not made here.
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        what = str(error).partition(" does not")[0]
        raise ValueError(
            f"the training does what no GPU repeats to the bit ({what}), but runner.deterministic "
            "is true; do without it in network and channel, or set runner.deterministic to false: "
            "a run that is repeated then ends with other bytes"
        ) from error
    finally:
        settings.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(before)


def build_augmentation(config: models.MStepConfig) -> Augmentation | None:
    """Build the random changes of reconstructions, if there are any."""
    given = config.augmentation
    if given is None:
        return None
    return Augmentation(flip=given.flip, hue=given.hue, saturation=given.saturation)


def build_validation(config: models.MStepConfig, x_hat: Tensor) -> Validation | None:
    """Build the looks at the loss on reconstructions that are kept out, if any are."""
    given = config.validation
    if given is None:
        return None
    return Validation(x_hat=x_hat, every=given.every, patience=given.patience)


def starts_anew(config: models.RunConfig, iteration: int) -> bool:
    """Tell whether an iteration's M-step begins with a network that has learned nothing yet.

    The first one does (unless the start is a model), and so does the first conditional one after
    a warm start by EM-MMPS, whose network is unconditional.
    """
    if iteration == 0:
        return not isinstance(config.start, models.ModelStart)
    return config.is_mmps(iteration) != config.is_mmps(iteration - 1)


def m_step_length(config: models.RunConfig, iteration: int) -> int:
    """Count the gradient steps of an iteration."""
    first = config.m_step.first_steps
    return first if first and starts_anew(config, iteration) else config.m_step.steps


def build_learning_rate(config: models.RunConfig, iteration: int) -> Callable[[int], float]:
    """Build the learning rate of an iteration, as a function of its own step.

    A rate that decays over the run goes on where the iteration before stopped, and reaches its
    floor with the run's last step.
    """
    rate = config.m_step.learning_rate
    if rate.over == "run":
        lengths = [m_step_length(config, k) for k in range(config.iterations)]
        offset = sum(itertools.islice(lengths, iteration))
        return build_rate(rate, steps=sum(lengths), offset=offset)
    return build_rate(rate, steps=m_step_length(config, iteration))


def build_rate(
    config: models.RateConfig, *, steps: int, offset: int = 0
) -> Callable[[int], float]:
    """Build a learning rate that spans `steps`, as a function of the step after `offset`."""
    match config:
        case models.ConstantRate():
            return constant_rate(config.value)
        case models.LinearRate():
            return linear_rate(config.value, floor=config.floor, steps=steps, offset=offset)
        case models.CosineRate():
            return cosine_rate(config.value, floor=config.floor, steps=steps, offset=offset)
    assert_never(config)
