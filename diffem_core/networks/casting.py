"""Networks in bfloat16: what keeps float32, and weights that are cast once.

Under autocast, products and convolutions are computed in bfloat16, with sums in float32. bfloat16
has 8 bits, so that a sample rounded to it could not show noise below 1/256 of its values: the
first layer, which sees x_t, computes in float32 and only what it makes of it is rounded.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["cast_copy", "in_float32"]

Network = TypeVar("Network", bound=nn.Module)


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer in float32; under autocast, the result has autocast's type.

    Arguments:
        layer: A layer with float32 weights.
        x: Its input.

    Returns:
        Its output, of the layer's output shape.
    """
    device = x.device.type
    # Asking a device without autocast (meta) whether it is on would raise.
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        plain: Tensor = layer(x)
        return plain
    with torch.autocast(device, enabled=False):
        out: Tensor = layer(x)
    return out.to(torch.get_autocast_dtype(device))


def cast_copy(
    network: Network, dtype: torch.dtype, kinds: tuple[type[nn.Module], ...], *, keep: nn.Module
) -> Network:
    """Copy a network and cast weights that autocast would cast at every call.

    Arguments:
        network: The network.
        dtype: Autocast's type.
        kinds: Modules whose weights are cast.
        keep: A module whose weights stay as they are.

    Returns:
        The copy; under autocast it computes the same bits.
    """
    kept = [name for name, module in network.named_modules() if module is keep]
    # Also in inference mode, where parameters could not be replaced.
    with torch.inference_mode(False), torch.no_grad():
        copied = copy.deepcopy(network)
        for name, module in copied.named_modules():
            if isinstance(module, kinds) and name not in kept:
                module.to(dtype)
    return copied
