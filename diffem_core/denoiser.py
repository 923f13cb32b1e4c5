"""The denoiser `f(x_t, sigma_t, y) ~ E[x | x_t, y]`, with EDM preconditioning.

Around a network F:

    f = c_skip x_t + c_out F(c_in x_t, c_noise, y)
    c_skip = s^2 / (sigma^2 + s^2)      c_out = sigma s / sqrt(sigma^2 + s^2)
    c_in = 1 / sqrt(sigma^2 + s^2)      c_noise = log sigma

with s the standard deviation of the data. One class serves conditional and unconditional use: a
network that needs the observation takes it as an argument.

References:
    Karras et al. 2022 (EDM, arXiv 2206.00364), table 1 and equation 7.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Denoiser"]


class Denoiser(nn.Module):
    """A preconditioned network.

    Arguments:
        network: Module called as `network(x, c_noise, condition)` with x of shape (n, ...) scaled
            to unit variance, c_noise = log sigma of shape (n,) or (1,), and the condition or None;
            returns the shape of x.
        sigma_data: Standard deviation of the data, in network units.
        precision: Type in which the network computes; preconditioning and weights keep theirs.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        sigma_data: float = 1.0,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"Denoiser received sigma_data {sigma_data}; it must be positive")
        if precision not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"Denoiser received precision {precision}; known are torch.float32 and "
                "torch.bfloat16"
            )
        self.network = network
        self.sigma_data = sigma_data
        self.precision = precision

    def forward(self, x_t: Tensor, sigma_t: Tensor, condition: Tensor | None = None) -> Tensor:
        """Estimate E[x | x_t, y].

        Arguments:
            x_t: Noisy samples x + sigma_t z, of shape (n, ...), in network units.
            sigma_t: Noise levels, of shape (n,), or (1,) or () for one level shared by all.
            condition: What the network sees of the observation, or None.

        Returns:
            Estimates of the shape and type of x_t.

        Raises:
            ValueError: The network returned another shape than that of x_t.

        References:
            Karras et al. 2022 (EDM), equation 7.
        """
        sigma_t = sigma_t.reshape(-1)
        sigma = sigma_t.reshape(-1, *[1] * (x_t.ndim - 1))
        c_in = (sigma.square() + self.sigma_data**2).rsqrt()
        c_skip = (self.sigma_data * c_in).square()
        c_out = sigma * self.sigma_data * c_in
        if self.precision == torch.float32:
            output = self.network(c_in * x_t, sigma_t.log(), condition)
        else:
            with torch.autocast(x_t.device.type, self.precision):
                output = self.network(c_in * x_t, sigma_t.log(), condition)
        if output.shape != x_t.shape:
            raise ValueError(
                f"the network returned shape {tuple(output.shape)} for samples of shape "
                f"{tuple(x_t.shape)}; a denoiser's network keeps the shape (check out_channels)"
            )
        return torch.addcmul(c_skip * x_t, c_out, output.to(x_t.dtype))
