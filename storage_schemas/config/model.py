"""The network inside the denoiser, the noise schedule and the training times."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, PositiveFloat, PositiveInt, model_validator

from storage_schemas._base import NoiseLevel, Record, Width
from storage_schemas.config.channel import Target

__all__ = [
    "BetaMixtureTime",
    "BetaTime",
    "CustomNetwork",
    "DiffusersNetwork",
    "LogNormalTime",
    "MlpNetwork",
    "NetworkConfig",
    "ScheduleConfig",
    "TimeConfig",
    "UnetNetwork",
    "UniformTime",
    "VEKarras",
    "VELogLinear",
]


class UnetNetwork(Record):
    """The paper's U-Net: residual blocks modulated by the noise level, with attention."""

    kind: Literal["unet"] = "unet"
    channels: tuple[Width, ...] = Field((128, 256, 384), min_length=1, max_length=12)
    """Width of each level, finest first; the image is halved between levels."""
    blocks: tuple[Annotated[int, Field(gt=0, le=100)], ...] = Field(
        (5, 5, 5), min_length=1, max_length=12
    )
    """Residual blocks at each level, on the way down and again on the way up."""
    attention: dict[int, PositiveInt] = Field(default_factory=lambda: {1: 4})
    """Attention heads by level (0 is the finest)."""
    embedding: Width = Field(256, ge=4, multiple_of=2)
    """Features of the noise-level embedding, an even number from 4 on."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout rate inside the residual blocks."""

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        if len(self.blocks) != len(self.channels):
            raise ValueError(
                f"`blocks` has {len(self.blocks)} levels but `channels` has "
                f"{len(self.channels)}; give one number per level"
            )
        for level, heads in self.attention.items():
            if not 0 <= level < len(self.channels):
                raise ValueError(
                    f"`attention` names level {level} but the network has levels 0 to "
                    f"{len(self.channels) - 1}"
                )
            if self.channels[level] % heads:
                raise ValueError(
                    f"`attention` asks for {heads} heads at level {level}, whose "
                    f"{self.channels[level]} channels they do not "
                    "divide; choose a divisor"
                )
        return self


class MlpNetwork(Record):
    """A residual-free MLP for vectors, modulated by the noise level."""

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[Width, ...] = Field((256, 256, 256), min_length=1, max_length=100)
    """Width of each hidden layer."""
    embedding: Width = Field(64, ge=4, multiple_of=2)
    """Features of the noise-level embedding, an even number from 4 on."""


class DiffusersNetwork(Record):
    """The `UNet2DModel` of Hugging Face's diffusers (extra `hub`)."""

    kind: Literal["diffusers"] = "diffusers"
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Its keyword arguments, without sample_size, in_channels and out_channels."""


class CustomNetwork(Record):
    """A module of your own, built as `Name(x_shape, condition_channels, **arguments)`.

    It is called as `network(x, c_noise, condition)` and returns the shape of x; see
    `diffem_core.Denoiser`. With an attribute `replayable = True` a GPU replays what it does.
    """

    kind: Literal["custom"] = "custom"
    target: Target
    """Where it is, as `package.module:Name`."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Its keyword arguments."""


NetworkConfig = Annotated[
    UnetNetwork | MlpNetwork | DiffusersNetwork | CustomNetwork, Field(discriminator="kind")
]


class _Schedule(Record):
    sigma_min: NoiseLevel = 1e-3
    """Noise level at t = 0, in network units (images span [-2, 2])."""
    sigma_max: NoiseLevel = 1e2
    """Noise level at t = 1, in network units."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(
                f"`sigma_min` is {self.sigma_min} and `sigma_max` {self.sigma_max}, but noise "
                "must grow; swap them"
            )
        return self


class VELogLinear(_Schedule):
    """Variance-exploding noise, log sigma linear in t (paper, appendix: 1e-3 to 1e2)."""

    kind: Literal["ve_log_linear"] = "ve_log_linear"


class VEKarras(_Schedule):
    """Variance-exploding noise, sigma^(1/rho) linear in t (EDM, equation 5)."""

    kind: Literal["ve_karras"] = "ve_karras"
    sigma_min: NoiseLevel = 2e-3
    """Noise level at t = 0, in network units (images span [-2, 2])."""
    sigma_max: NoiseLevel = 80.0
    """Noise level at t = 1, in network units."""
    rho: float = Field(7.0, ge=0.1, le=1000)
    """Warping exponent: larger spends more of t at small noise."""


ScheduleConfig = Annotated[VELogLinear | VEKarras, Field(discriminator="kind")]


Shape = Annotated[float, Field(ge=1e-2, le=1e6)]
"""A shape parameter of a Beta distribution."""


class BetaTime(Record):
    """t ~ Beta(a, b), the paper's choice with a = b = 3."""

    kind: Literal["beta"] = "beta"
    a: Shape = 3.0
    """First shape parameter."""
    b: Shape = 3.0
    """Second shape parameter."""


class BetaMixtureTime(Record):
    """t from one of two Beta distributions, as in the paper's manifold code."""

    kind: Literal["beta_mixture"] = "beta_mixture"
    first: tuple[Shape, Shape] = (2.0, 5.0)
    """Shape parameters of the first distribution."""
    second: tuple[Shape, Shape] = (5.0, 2.0)
    """Shape parameters of the second distribution."""
    weight: float = Field(0.5, gt=0, lt=1)
    """Probability of the first."""


class UniformTime(Record):
    """t ~ U(0, 1)."""

    kind: Literal["uniform"] = "uniform"


class LogNormalTime(Record):
    """log sigma ~ N(mean, std^2), truncated to the schedule's range (EDM)."""

    kind: Literal["log_normal"] = "log_normal"
    mean: float = -1.2
    """Mean of log sigma."""
    std: PositiveFloat = 1.2
    """Standard deviation of log sigma."""


TimeConfig = Annotated[
    BetaTime | BetaMixtureTime | UniformTime | LogNormalTime, Field(discriminator="kind")
]
