"""A multilayer perceptron for vectors, as in the paper's manifold experiment.

The input is the concatenation of x_t, the features of the noise level and the condition; every
hidden layer is followed by SiLU and a normalization without parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffem_core.networks.casting import cast_copy, in_float32
from diffem_core.networks.embedding import SinusoidalEmbedding

__all__ = ["MLP"]


class MLP(nn.Module):
    """A noise-conditional MLP.

    Arguments:
        features: Entries of x.
        condition_features: Entries of the condition; 0 for an unconditional network.
        hidden: Width of each hidden layer.
        embedding: Features of the noise level, even.
        normalize: Whether hidden layers are normalized.
        zero_output: Whether the network begins as 0, whatever it is shown.
    """

    replayable = True
    """See `Denoiser`."""

    def __init__(
        self,
        *,
        features: int,
        condition_features: int,
        hidden: Sequence[int] = (256, 256, 256),
        embedding: int = 64,
        normalize: bool = True,
        zero_output: bool = False,
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("MLP received no hidden layers; give at least one width")
        self.condition_features = condition_features
        self.normalize = normalize
        self.embed = SinusoidalEmbedding(embedding)
        widths = (features + embedding + condition_features, *hidden)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.output = nn.Linear(widths[-1], features)
        if zero_output:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map vectors to vectors.

        Arguments:
            x: Vectors of shape (n, features).
            c_noise: Log noise levels of shape (n,) or (1,).
            condition: Features of the observation, (n, condition_features), or None.

        Returns:
            Vectors of shape (n, features).

        Raises:
            ValueError: The condition has another number of features than the network.
        """
        received = 0 if condition is None else condition.shape[-1]
        if received != self.condition_features:
            raise ValueError(
                f"MLP received {received} condition features but was built for "
                f"{self.condition_features}; build it with the channel's condition_channels"
            )
        inputs = [x, self.embed(c_noise).expand(len(x), -1)]
        if condition is not None:
            inputs.append(condition)
        h = in_float32(self.hidden[0], torch.cat(inputs, dim=-1))
        for index, layer in enumerate(self.hidden):
            h = F.silu(layer(h) if index else h)
            if self.normalize:
                h = F.layer_norm(h, h.shape[-1:])
        out: Tensor = self.output(h)
        return out

    def cast(self, dtype: torch.dtype) -> MLP:
        """Return a copy whose weights have the type in which autocast would compute with them."""
        return cast_copy(self, dtype, (nn.Linear,), keep=self.hidden[0])
