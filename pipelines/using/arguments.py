"""What callers hand over, checked: observations, operator parameters, numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffem_core.channel import Channel

__all__ = ["Array", "checked_observations", "require_fit", "require_positive"]

Array = Tensor | NDArray[Any]
"""A tensor or an array of NumPy."""


def checked_observations(
    channel: Channel, y: Array, params: Mapping[str, Array] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Check observations and their operator parameters against a channel.

    Arguments:
        channel: The channel.
        y: Observations of shape (n, *y_shape), in the data's units.
        params: Their operator parameters, each of shape (n, ...); None where there are none.

    Returns:
        Both as float32 tensors, on the device of y.

    Raises:
        ValueError: Something is missing, of another shape or type, or not finite.
    """
    observed = _real(y, "`y`")
    if tuple(observed.shape[1:]) != channel.y_shape or observed.ndim == 0:
        hint = ""
        if tuple(observed.shape) == channel.y_shape:
            hint = "; one observation is a batch of one: give y[None] (and likewise params)"
        raise ValueError(
            f"`y` has shape {tuple(observed.shape)} but this channel's observations have "
            f"{_n(channel.y_shape)}{hint or '; give observations of the channel of the run'}"
        )
    if len(observed) == 0:
        raise ValueError("`y` holds no observations; give at least one")
    _finite(observed, "`y`", "leave those observations out, or mask the pixels")
    given = dict(params or {})
    require_fit(
        "the observations",
        y_shape=tuple(observed.shape[1:]),
        parameters={
            name: tuple(_real(value, f"params[{name!r}]").shape[1:])
            for name, value in given.items()
        },
        channel=channel,
        remedy="give it in params",
    )
    checked = {}
    for name in channel.params_spec:
        value = _real(given[name], f"params[{name!r}]").to(observed.device)
        if len(value) != len(observed):
            raise ValueError(
                f"params[{name!r}] has {len(value)} rows for {len(observed)} observations; give "
                "one for each"
            )
        _finite(value, f"params[{name!r}]", "correct them")
        checked[name] = value
    return observed, checked


def require_fit(
    what: str,
    *,
    y_shape: tuple[int, ...],
    parameters: Mapping[str, tuple[int, ...]],
    channel: Channel,
    remedy: str,
) -> None:
    """Check that observations can have come out of a channel.

    Arguments:
        what: What they are, for messages.
        y_shape: Shape of one observation.
        parameters: Shape of one sample's operator parameters, by name.
        channel: The channel.
        remedy: How a parameter that is missing is given.

    Raises:
        ValueError: They cannot.
    """
    spec = channel.params_spec
    if y_shape != channel.y_shape:
        raise ValueError(
            f"{what} have shape {_n(y_shape)} but the model was trained on {_n(channel.y_shape)}, "
            f"which its channel makes of samples of shape {channel.x_shape}; give observations of "
            "that shape, or take another run"
        )
    known = ", ".join(f"{name!r} {_n(shape)}" for name, shape in sorted(spec.items())) or "none"
    for name in sorted(spec.keys() - parameters.keys()):
        raise ValueError(
            f"the operator parameter {name!r} of {what} is missing, of shape {_n(spec[name])}; "
            f"{remedy}. The channel takes: {known}"
        )
    for name, shape in sorted(parameters.items()):
        if name not in spec:
            raise ValueError(
                f"{what} have the operator parameter {name!r}, which the channel does not take "
                f"(it takes: {known}); leave it out, or correct its name"
            )
        if shape != spec[name]:
            raise ValueError(
                f"the operator parameter {name!r} of {what} has shape {_n(shape)} but the channel "
                f"takes {_n(spec[name])}; reshape it"
            )


def require_positive(name: str, value: int | None) -> None:
    """Refuse a number below 1.

    Raises:
        ValueError: It is one.
    """
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}; give 1 or more")


def _real(values: Array, what: str) -> Tensor:
    if not isinstance(values, (Tensor, np.ndarray)):
        raise ValueError(
            f"{what} is a {type(values).__name__}; give a tensor or an array of NumPy"
        )
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "fiub":
            raise ValueError(
                f"{what} has type {values.dtype} but real numbers are expected; give complex "
                "numbers as two bands, real and imaginary"
            )
        return torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
    if values.is_complex():
        raise ValueError(
            f"{what} has type {values.dtype} but real numbers are expected; give complex numbers "
            "as two bands, real and imaginary"
        )
    return values.detach().to(torch.float32)


def _finite(values: Tensor, what: str, remedy: str) -> None:
    good = torch.isfinite(values).reshape(len(values), -1).all(dim=1)
    if not good.all():
        bad = (~good).nonzero().flatten()
        raise ValueError(
            f"{what} holds NaN or infinity in {len(bad)} of {len(values)} rows, first in row "
            f"{int(bad[0])}; {remedy}"
        )


def _n(shape: tuple[int, ...]) -> str:
    return f"(n, {', '.join(map(str, shape))})"
