"""The denoiser `f(x_t, sigma_t, y) ~ E[x | x_t, y]`: a network and what preconditions it.

One class serves conditional and unconditional use: a network that needs the observation takes it
as an argument.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffem_core.preconditioning import EDMPreconditioning, Preconditioning

__all__ = ["Denoiser"]


class Denoiser(nn.Module):
    """A preconditioned network.

    Arguments:
        network: Module called as `network(x, c_noise, condition)` with x of shape (n, ...) scaled
            to unit variance, c_noise = log sigma of shape (n,) or (1,), and the condition or None;
            returns the shape of x.
        sigma_data: Standard deviation of the data, in network units.
        precision: Type in which the network computes; preconditioning and weights keep theirs.
        preconditioning: What surrounds the network; EDM's with `sigma_data` by default.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        sigma_data: float = 1.0,
        precision: torch.dtype = torch.float32,
        preconditioning: Preconditioning | None = None,
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
        self.preconditioning = preconditioning or EDMPreconditioning(sigma_data=sigma_data)

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
        """
        sigma_t = sigma_t.reshape(-1)
        c_noise = sigma_t.log()

        def network(x: Tensor) -> Tensor:
            # Tensors without values (meta) know no autocast; their shapes are the same without.
            plain = not torch.amp.is_autocast_available(x.device.type)
            if plain or self.precision == torch.float32:
                output: Tensor = self.network(x, c_noise, condition)
            else:
                with torch.autocast(x.device.type, self.precision):
                    output = self.network(x, c_noise, condition)
            if output.shape != x.shape:
                raise ValueError(
                    f"the network returned shape {tuple(output.shape)} for samples of shape "
                    f"{tuple(x.shape)}; a denoiser's network keeps the shape (check out_channels)"
                )
            return output.to(x_t.dtype)

        return self.preconditioning(network, x_t, sigma_t, condition)

    @contextmanager
    def cast_once(self) -> Iterator[None]:
        """Cast the network's weights once for all estimates inside, not at each of them.

        The estimates are the same, to the bit. Inside, the weights are not to be trained.
        """
        own = self.network
        cast = getattr(own, "cast", None)
        if self.precision == torch.float32 or cast is None:
            yield
            return
        self.network = cast(self.precision)
        try:
            yield
        finally:
            self.network = own
