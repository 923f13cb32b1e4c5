"""The U-Net of the diffusers library as a denoiser's network.

    output = UNet2DModel([x, condition], timestep = log sigma)

diffusers embeds the timestep, which may be any real number, by sines and cosines at the
frequencies 10000^(-k / K) (k = 0 .. K - 1). Its schedulers count 1000 steps; here the timestep is
c_noise = log sigma itself, between about -7 and 5, as in the paper's network: the highest
frequency is 1, and with `freq_shift: 1` the features are those of `SinusoidalEmbedding`, cosines
first.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffem_core.networks.dropout import Dropout

__all__ = ["DiffusersUNet"]

_SHAPES = ("sample_size", "in_channels", "out_channels")
# What needs labels or integer steps, which a denoiser does not have.
_UNSUPPORTED = ("class_embed_type", "num_class_embeds", "num_train_timesteps")


class DiffusersUNet(nn.Module):
    """A `diffusers.UNet2DModel` with random weights.

    Its dropout draws from the M-step's generator, like that of the other networks.

    Arguments:
        x_shape: Shape (C, H, W) of an image.
        condition_channels: Channels of the condition; 0 for an unconditional network.
        arguments: Arguments of `UNet2DModel`, for example `block_out_channels`. The channels and
            the size of the images follow from the data and the channel and are not among them.

    Raises:
        ValueError: diffusers is not installed, an argument is unknown or does not belong here,
            `UNet2DModel` refuses the arguments, or H or W does not fit the levels.

    References:
        Karras et al. 2022 (EDM, arXiv 2206.00364), table 1: the network sees a function of
        log sigma.
    """

    replayable = True
    """See `Denoiser`."""

    def __init__(
        self, x_shape: Sequence[int], condition_channels: int, arguments: Mapping[str, Any]
    ) -> None:
        super().__init__()
        model = _model_class()
        if len(x_shape) != 3:
            raise ValueError(
                f"DiffusersUNet received samples of shape {tuple(x_shape)}; images are (C, H, W)"
            )
        _check(arguments, list(inspect.signature(model.__init__).parameters)[1:])
        channels, height, width = x_shape
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
        try:
            self.unet = model(
                sample_size=(height, width),
                in_channels=channels + condition_channels,
                out_channels=channels,
                **values,
            )
        # diffusers does not check all of its arguments, and fails wherever they are used.
        except Exception as error:
            raise ValueError(
                f"UNet2DModel refused {dict(arguments)}: {error} ({type(error).__name__}); see "
                "its documentation for values that fit together"
            ) from error
        unit = 2 ** (len(self.unet.config.down_block_types) - 1)
        if height % unit or width % unit:
            raise ValueError(
                f"DiffusersUNet received images of {height} x {width} but its "
                f"{len(self.unet.config.down_block_types)} levels need multiples of {unit}; pad "
                "the images or give fewer down_block_types, up_block_types and block_out_channels"
            )
        self.condition_channels = condition_channels
        _replace_dropout(self.unet)

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map images to images.

        Arguments:
            x: Images of shape (n, C, H, W).
            c_noise: Log noise levels of shape (n,) or (1,).
            condition: Images of shape (n, condition_channels, H, W), or None.

        Returns:
            Images of shape (n, C, H, W).

        Raises:
            ValueError: The condition has another number of channels than the network.
        """
        received = 0 if condition is None else condition.shape[1]
        if received != self.condition_channels:
            raise ValueError(
                f"DiffusersUNet received {received} condition channels but was built for "
                f"{self.condition_channels}; build it with the channel's condition_channels"
            )
        if condition is not None:
            x = torch.cat([x, condition], dim=1)
        out: Tensor = self.unet(x, c_noise.expand(len(x)), return_dict=False)[0]
        return out


def _model_class() -> Any:
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ValueError(
            "DiffusersUNet needs the diffusers library, which cannot be imported "
            f"({error}); pip install diffem[hub]"
        ) from error
    return UNet2DModel


def _check(arguments: Mapping[str, Any], taken: Sequence[str]) -> None:
    # `UNet2DModel` itself drops arguments that it does not know, with a line in the log.
    ours = [name for name in taken if name not in (*_SHAPES, *_UNSUPPORTED)]
    for name in arguments:
        if name in _SHAPES:
            raise ValueError(
                f"DiffusersUNet received the argument {name!r}, which follows from the samples' "
                "shape and the channel; leave it out"
            )
        if name not in ours:
            raise ValueError(
                f"DiffusersUNet received the argument {name!r}; known are {', '.join(ours)}"
            )
    embedding = arguments.get("time_embedding_type", "positional")
    if embedding != "positional":
        # "fourier" divides the output by the timestep, "learned" needs integers.
        raise ValueError(
            f"DiffusersUNet received time_embedding_type {embedding!r}; it takes 'positional', "
            "which is defined for every log sigma"
        )


def _replace_dropout(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            setattr(module, name, Dropout(child.p))
        else:
            _replace_dropout(child)
