"""The networks that benchmarks take where no config is given, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from storage_schemas.config import RunConfig

__all__ = ["OFFICIAL_CONVOLUTION", "Reference", "against_official", "references"]

OFFICIAL_CONVOLUTION = 500.0
"""GFLOP/s of the float32 convolution where the official implementation was measured."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A network to measure."""

    name: str
    config: RunConfig
    sampling_batch: int
    """Images per call of the network in sampling."""
    training_batch: int
    """Images per gradient step."""
    official_training: float | None = None
    """Images per second of the official implementation's training."""
    official_sampling: float | None = None
    """Images times calls per second of its sampling."""


def against_official(
    rate: float, official: float | None, convolution: float, device: torch.device
) -> float | None:
    """Hold a rate against the official implementation's, scaled by the float32 convolution.

    Arguments:
        rate: The rate here.
        official: The official one; None where it is not known.
        convolution: The convolution's GFLOP/s here, in float32.
        device: Where; the official rates are of a processor.

    Returns:
        The ratio; None where nothing can be compared.
    """
    if official is None or device.type != "cpu":
        return None
    return rate / (official * convolution / OFFICIAL_CONVOLUTION)


def references(config: RunConfig | None) -> tuple[Reference, ...]:
    """Return what to measure: a config's network, or the paper's U-Net and a small one."""
    if config is not None:
        return (
            Reference(
                name=config.name,
                config=config,
                sampling_batch=config.e_step.batch_size,
                training_batch=config.m_step.batch_size,
            ),
        )
    return (
        Reference(
            name="paper's U-Net",
            config=_of_unet((128, 256, 384), 5, {1: 4}, 256),
            sampling_batch=64,
            training_batch=16,
            official_training=3.3,
            official_sampling=19.6,
        ),
        Reference(
            name="small U-Net",
            config=_of_unet((32, 64, 128), 2, {2: 4}, 64),
            sampling_batch=128,
            training_batch=64,
            official_training=74.0,
            official_sampling=465.0,
        ),
    )


def _of_unet(
    channels: tuple[int, ...], blocks: int, attention: dict[int, int], embedding: int
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "bench",
            "iterations": 1,
            "data": {"kind": "photos", "size": 32, "bands": 3},
            "channel": {"kind": "random_mask", "keep": 0.25, "noise_std": 0.01},
            "network": {
                "kind": "unet",
                "channels": channels,
                "blocks": (blocks,) * len(channels),
                "attention": attention,
                "embedding": embedding,
            },
            "e_step": {"sampler": {"kind": "ddpm", "steps": 4}},
            "m_step": {"steps": 1},
        }
    )
