"""Networks that a `Denoiser` wraps. Each is called as `network(x, c_noise, condition)`."""

from diffem_core.networks.embedding import SinusoidalEmbedding
from diffem_core.networks.mlp import MLP
from diffem_core.networks.unet import UNet

__all__ = ["MLP", "SinusoidalEmbedding", "UNet"]
