"""Counting the arithmetic of a network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffem_core.channel import Channel
from diffem_core.denoiser import Denoiser
from pipelines import build
from storage_schemas.config import CustomNetwork, RunConfig

__all__ = ["call_flops", "network_flops"]


def network_flops(config: RunConfig, channel: Channel, *, conditional: bool = True) -> int | None:
    """Count the floating-point operations of one call of the network for one sample.

    Multiplications and additions of convolutions, matrix products and attention count as two;
    a gradient step takes about three times as many.

    Arguments:
        config: The config.
        channel: The channel that says what a conditional network sees.
        conditional: Whether it sees observations.

    Returns:
        The number; None for a network of the user's own, which may not know PyTorch's meta
        device.
    """
    if isinstance(config.network, CustomNetwork):
        return None
    device = torch.device("meta")
    with device:
        denoiser = build.build_denoiser(config, channel, device=device, conditional=conditional)
    denoiser.eval()
    x = torch.zeros(1, *channel.x_shape, device=device)
    condition = None
    if conditional and channel.condition_channels:
        shape = (1, channel.condition_channels, *channel.x_shape[1:])
        condition = torch.zeros(shape, device=device)
    return call_flops(denoiser, x, condition)


def call_flops(denoiser: Denoiser, x: Tensor, condition: Tensor | None) -> int:
    """Count the multiplications and additions of one call for one sample.

    PyTorch's counter does not know the processor's fused attention, so that attention is computed
    as two products here.
    """
    one = None if condition is None else condition[:1]
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.inference_mode(),
    ):
        denoiser(x[:1], torch.ones(1, device=x.device), one)
    return int(counter.get_total_flops())
