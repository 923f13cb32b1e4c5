"""The classifier of clean images that an evaluation asks, fitted where that is soonest done."""

from __future__ import annotations

import torch
from torch import Tensor

from diffem_core.classifier import DigitClassifier
from diffem_core.scaling import Scaling
from pipelines import build
from pipelines.runners.processors import torch_threads
from storage_schemas.config import RunnerConfig

__all__ = ["fit_classifier"]

_THREADS = 4  # Its steps are too short for more, which would wait for one another.


def fit_classifier(
    x: Tensor,
    labels: Tensor,
    *,
    scaling: Scaling,
    seed: int,
    epochs: int,
    runner: RunnerConfig,
    device: torch.device,
) -> DigitClassifier:
    """Fit a classifier, on the GPU if there is one, else by few threads.

    Arguments:
        x: Clean images of shape (n, C, H, W), in the data's units.
        labels: Their labels, integers of shape (n,).
        scaling: The change to network units.
        seed: Seed of weights and order; the same gives the same bits on the same device.
        epochs: Passes through the images.
        runner: Whether a GPU is to be repeatable.
        device: Where it is fitted.

    Returns:
        The classifier, on the processor, as clean images are.
    """
    few = min(_THREADS, torch.get_num_threads())
    with build.repeatable(runner, device), torch_threads(few):
        model = DigitClassifier.fit(
            x.to(device), labels.to(device), scaling=scaling, seed=seed, epochs=epochs
        )
    return model.cpu()
