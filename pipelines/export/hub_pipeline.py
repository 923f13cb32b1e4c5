"""Sampling an exported DiffEM model with diffusers alone.

    x <- x + (sigma_next - sigma) (x - f(x, sigma, condition)) / sigma

with f = c_skip x + c_out F(c_in x, log sigma, condition). The scheduler holds the noise levels
and c_skip, c_out and c_in; its own timestep, log(sigma) / 4, is replaced by log(sigma).
"""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline


class DiffEMPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Draws samples, in the data's units.

    Arguments:
        unet: The network F, a `UNet2DModel`.
        scheduler: An `EDMEulerScheduler`.
        center: Value, in the data's units, that is 0 in network units.
        scale: Network units per data unit.
        steps: Steps of the sampler by default.
    """

    def __init__(self, unet, scheduler, center=0.0, scale=1.0, steps=32):  # type: ignore[no-untyped-def]
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(center=center, scale=scale, steps=steps)

    @torch.no_grad()
    def __call__(
        self,
        condition: torch.Tensor | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draw one sample per condition, or `batch_size` of an unconditional model.

        Arguments:
            condition: What the network sees of each observation, (n, condition channels, H, W).
            batch_size: Samples of an unconditional model.
            num_inference_steps: Steps; those of the config by default.
            generator: Source of the noise.
            latents: Standard normal noise to begin with, (n, C, H, W); drawn by default.

        Returns:
            Samples of shape (n, C, H, W), in the data's units.
        """
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        n = batch_size if condition is None else len(condition)
        shape = (n, self.unet.config.out_channels, height, width)
        if latents is None:
            latents = torch.randn(shape, generator=generator, device="cpu")
        self.scheduler.set_timesteps(num_inference_steps or self.config.steps)
        sigmas = self.scheduler.sigmas
        x = latents.to(self.device) * sigmas[0].to(self.device)
        for t, sigma in zip(self.scheduler.timesteps, sigmas, strict=False):
            entry = self.scheduler.scale_model_input(x, t)
            if condition is not None:
                entry = torch.cat([entry, condition.to(x)], dim=1)
            output = self.unet(entry, sigma.log().expand(n).to(x.device)).sample
            x = self.scheduler.step(output, t, x).prev_sample
        samples: torch.Tensor = x / self.config.scale + self.config.center
        return samples
