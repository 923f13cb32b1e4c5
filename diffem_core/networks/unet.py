"""The paper's U-Net: residual blocks that the noise level modulates, and self-attention.

    block(x) = (x + c B((1 + a) x + b)) / sqrt(1 + c^2),      (a, b, c) = M(features of log sigma)

with a, b and c per channel. B is [normalize over channels, conv 3x3, SiLU, dropout, conv 3x3] or
[normalize, multi-head self-attention]. Levels are joined by strided convolutions on the way down,
by nearest-neighbour upsampling and a convolution of the concatenated skip on the way up. With 6
input and 6 output channels, (128, 256, 384) x 5 blocks, 4 heads at level 1 and 256 features this
is the network of the paper, with its 57,564,294 parameters.

For speed on small images, the modulations of all blocks of a level are computed together (two
batched products), and images are kept in channels-last memory, in which normalization over
channels needs no transposition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffem_core.networks.casting import cast_copy, in_float32
from diffem_core.networks.dropout import Dropout
from diffem_core.networks.embedding import SinusoidalEmbedding

__all__ = ["UNet"]


class UNet(nn.Module):
    """A noise-conditional U-Net.

    Arguments:
        in_channels: Channels of x_t.
        condition_channels: Channels of the condition; 0 for an unconditional network.
        out_channels: Channels of the output.
        channels: Width of each level, finest first.
        blocks: Residual blocks at each level, on the way down and again on the way up.
        attention: Attention heads by level (0 is the finest); every residual block there is
            followed by attention.
        embedding: Features of the noise level, even.
        dropout: Dropout rate inside the residual blocks.

    Raises:
        ValueError: The levels disagree, or heads do not divide the channels.
    """

    replayable = True
    """See `Denoiser`."""

    def __init__(
        self,
        *,
        in_channels: int,
        condition_channels: int,
        out_channels: int,
        channels: Sequence[int] = (128, 256, 384),
        blocks: Sequence[int] = (5, 5, 5),
        attention: Mapping[int, int] | None = None,
        embedding: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        attention = dict(attention or {})
        if not channels or len(channels) != len(blocks):
            raise ValueError(
                f"UNet received {len(channels)} channels and {len(blocks)} blocks; give one of "
                "each per level"
            )
        for level, heads in attention.items():
            if level not in range(len(channels)) or heads < 1 or channels[level] % heads:
                raise ValueError(
                    f"UNet received {heads} attention heads at level {level}; its levels are 0 to "
                    f"{len(channels) - 1} with channels {tuple(channels)}, which the heads must "
                    "divide"
                )
        self.condition_channels = condition_channels
        self.embed = SinusoidalEmbedding(embedding)
        self.enter = nn.ModuleList()
        self.merge = nn.ModuleList()
        self.levels = nn.ModuleList()
        for level, (width, depth) in enumerate(zip(channels, blocks, strict=True)):
            if level == 0:
                self.enter.append(nn.Conv2d(in_channels + condition_channels, width, 3, padding=1))
            else:
                self.enter.append(nn.Conv2d(channels[level - 1], width, 3, stride=2, padding=1))
            if level + 1 < len(channels):
                self.merge.append(nn.Conv2d(width + channels[level + 1], width, 3, padding=1))
            self.levels.append(
                _Level(
                    width,
                    depth,
                    heads=attention.get(level, 0),
                    embedding=embedding,
                    dropout=dropout,
                )
            )
        self.leave = nn.Conv2d(channels[0], out_channels, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map images to images.

        Arguments:
            x: Images of shape (n, in_channels, H, W).
            c_noise: Log noise levels of shape (n,) or (1,).
            condition: Images of shape (n, condition_channels, H, W), or None.

        Returns:
            Images of shape (n, out_channels, H, W).

        Raises:
            ValueError: The condition does not fit the network, or H or W is not a multiple of
                2^(levels - 1).
        """
        h = in_float32(self.enter[0], self._input(x, condition))
        features = self.embed(c_noise)
        levels = [cast(_Level, level) for level in self.levels]
        modulations = [level.modulate(features) for level in levels]
        skips: list[Tensor] = []
        for index, level in enumerate(levels):
            if index > 0:
                h = _normalize(self.enter[index](h))
            h = level.descend(h, modulations[index])
            skips.append(h)
        for index in reversed(range(len(levels))):
            if index + 1 < len(levels):
                h = F.interpolate(_normalize(h), scale_factor=2.0, mode="nearest")
                h = self.merge[index](torch.cat([h, skips[index]], dim=1))
            h = levels[index].ascend(h, modulations[index])
        out: Tensor = self.leave(h)
        return out

    def cast(self, dtype: torch.dtype) -> UNet:
        """Return a copy whose weights have the type in which autocast would compute with them."""
        return cast_copy(self, dtype, (nn.Conv2d, nn.Linear, _Modulation), keep=self.enter[0])

    def _input(self, x: Tensor, condition: Tensor | None) -> Tensor:
        received = 0 if condition is None else condition.shape[1]
        if received != self.condition_channels:
            raise ValueError(
                f"UNet received {received} condition channels but was built for "
                f"{self.condition_channels}; build it with the channel's condition_channels"
            )
        unit = 2 ** (len(self.levels) - 1)
        if x.shape[-2] % unit or x.shape[-1] % unit:
            raise ValueError(
                f"UNet received images of {x.shape[-2]} x {x.shape[-1]} but its "
                f"{len(self.levels)} levels need multiples of {unit}; pad the images or use fewer "
                "levels"
            )
        if condition is not None:
            x = torch.cat([x, condition], dim=1)
        return x.contiguous(memory_format=torch.channels_last)


class _Level(nn.Module):
    """The blocks of one resolution, down and up, and the modulations of all of them."""

    def __init__(
        self, channels: int, depth: int, *, heads: int, embedding: int, dropout: float
    ) -> None:
        super().__init__()
        kinds = 2 if heads else 1
        self.each_way = depth * kinds
        self.blocks = nn.ModuleList()
        for _ in range(2 * depth):
            self.blocks.append(_ConvBranch(channels, dropout))
            if heads:
                self.blocks.append(_AttentionBranch(channels, heads))
        self.modulation = _Modulation(len(self.blocks), channels, embedding)

    def modulate(self, features: Tensor) -> Tensor:
        modulation: Tensor = self.modulation(features)
        return modulation

    def descend(self, x: Tensor, modulation: Tensor) -> Tensor:
        return self._run(x, modulation, 0, self.each_way)

    def ascend(self, x: Tensor, modulation: Tensor) -> Tensor:
        return self._run(x, modulation, self.each_way, 2 * self.each_way)

    def _run(self, x: Tensor, modulation: Tensor, start: int, stop: int) -> Tensor:
        for index in range(start, stop):
            gain, shift, carry, gate = modulation[index].unbind(1)
            h = _normalize(torch.addcmul(shift, x, gain))
            x = torch.addcmul(x * carry, self.blocks[index](h), gate)
        return x


class _Modulation(nn.Module):
    """(a, b, c) of several blocks, each from two layers of its own, computed together."""

    def __init__(self, blocks: int, channels: int, embedding: int) -> None:
        super().__init__()
        self.channels = channels
        bound = 1 / math.sqrt(embedding)
        self.weight_1 = nn.Parameter(
            torch.empty(blocks, embedding, embedding).uniform_(-bound, bound)
        )
        self.bias_1 = nn.Parameter(torch.zeros(blocks, 1, embedding))
        # A tenth of the usual size: blocks begin close to the identity, yet gradients reach their
        # weights.
        self.weight_2 = nn.Parameter(
            torch.empty(blocks, embedding, 3 * channels).uniform_(-bound / 10, bound / 10)
        )
        self.bias_2 = nn.Parameter(torch.zeros(blocks, 1, 3 * channels))

    def forward(self, features: Tensor) -> Tensor:
        """Return gain, shift, carry and gate, of shape (blocks, n, 4, channels, 1, 1)."""
        features = features.expand(len(self.weight_1), -1, -1)
        hidden = F.silu(torch.baddbmm(self.bias_1, features, self.weight_1))
        out = torch.baddbmm(self.bias_2, hidden, self.weight_2)
        a, b, c = out.reshape(*out.shape[:2], 3, self.channels, 1, 1).unbind(2)
        carry = (1 + c.square()).rsqrt()
        return torch.stack([1 + a, b, carry, c * carry], dim=2)


class _ConvBranch(nn.Module):
    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.dropout = Dropout(dropout)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_2(self.dropout(F.silu(self.conv_1(x))))
        return out


class _AttentionBranch(nn.Module):
    """Multi-head self-attention over pixels. Keys have no bias: softmax does not see one."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(n, height * width, c)
        q, k, v = (
            layer(pixels).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = _attend(q, k, v).transpose(1, 2).reshape(n, height * width, c)
        out: Tensor = self.output(mixed)
        return out.reshape(n, height, width, c).permute(0, 3, 1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad:
        # PyTorch's fused attention goes back slowly on processors. The weights stay float32.
        weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1, dtype=torch.float32)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def _normalize(x: Tensor) -> Tensor:
    # Over channels, at each pixel. In channels-last memory both permutations are free.
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)
