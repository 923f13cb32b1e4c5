"""Features of the noise level c = log sigma: sines and cosines at geometric frequencies.

(sin(w_k c), cos(w_k c))_k,      w_k = 10^(-4 k / (K - 1)),      k = 0 .. K - 1
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SinusoidalEmbedding"]


class SinusoidalEmbedding(nn.Module):
    """Sinusoidal features of a number.

    Arguments:
        features: Number of features, even and at least 4.
    """

    frequencies: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        if features < 4 or features % 2:
            raise ValueError(f"embedding received {features} features; give an even number >= 4")
        exponents = torch.linspace(0, 1, features // 2, dtype=torch.float64)
        self.register_buffer("frequencies", 1e4**-exponents, persistent=False)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Compute the features, of shape (n, features), of numbers of shape (n,)."""
        phase = c_noise.unsqueeze(-1) * self.frequencies.to(c_noise.dtype)
        return torch.cat([phase.sin(), phase.cos()], dim=-1)
