"""Which array is what: observations, clean samples, operator parameters, classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.ingest.base import IngestError, RowArray, Source
from pipelines.ingest.request import IngestRequest

__all__ = ["Role", "Roles", "assign_roles"]


@dataclass(frozen=True)
class Role:
    """An array with what it is, and the way to the form in which it is stored."""

    title: str
    """What it is, in messages: `y`, `x`, `--param mask`, `--label`."""
    array: RowArray
    """The array."""
    channels_last: bool = False
    """Whether its last axis is that of the bands."""
    band: bool = False
    """Whether it gets an axis for its only band."""
    integer: bool = False
    """Whether it holds classes: stored as int64, others as float32."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample as it is stored."""
        shape = self.array.shape[1:]
        if self.integer:
            return ()
        if self.band:
            return (1, *shape)
        return (shape[-1], *shape[:-1]) if self.channels_last else shape

    def converted(self, values: NDArray[Any], start: int) -> NDArray[Any]:
        """Convert some rows to their stored form.

        Arguments:
            values: The rows, as they are in the source.
            start: Number of the first of them.

        Returns:
            Shape (n, *shape).

        Raises:
            IngestError: A value is not finite, or a class is no integer.
        """
        if self.channels_last:
            values = np.moveaxis(values, -1, 1)
        values = values.reshape(len(values), *self.shape)
        if self.integer:
            with np.errstate(invalid="ignore"):  # NaN is told apart by the comparison
                stored = values.astype(np.int64)
            self._require(stored == values, start, "is no whole number", "give classes as such")
            return stored
        # What float32 cannot hold becomes infinite here, and is refused as such.
        with np.errstate(over="ignore"):
            result = np.ascontiguousarray(values, np.float32)
        self._require(
            np.isfinite(result),
            start,
            "holds NaN or infinity (as float32)",
            "leave the sample out, or put 0 there and 0 into --param mask",
        )
        return result

    def require_range(
        self, values: NDArray[Any], start: int, limits: tuple[float, float] | None
    ) -> None:
        """Refuse values outside of a range."""
        if limits is not None:
            low, high = limits
            self._require(
                (values >= low) & (values <= high),
                start,
                f"has values outside of --range {low:g} {high:g}",
                "correct the range or the data",
                values,
            )

    def _require(
        self,
        good: NDArray[np.bool_],
        start: int,
        problem: str,
        remedy: str,
        values: NDArray[Any] | None = None,
    ) -> None:
        bad = np.flatnonzero(~good.reshape(len(good), -1).all(axis=1))
        if len(bad):
            row = int(bad[0])
            shown = "" if values is None else f" ({values[row].min():g} to {values[row].max():g})"
            raise IngestError(
                f"{self.array.describe(start + row)}: {self.title} {problem}{shown}; {remedy}"
            )


@dataclass(frozen=True, kw_only=True)
class Roles:
    """All that is to be stored."""

    samples: int
    """How many."""
    y: Role | None
    """Observations; None where clean samples are going to be corrupted."""
    x: Role | None
    """Clean samples: to be corrupted, or for evaluation only."""
    params: Mapping[str, Role]
    """Operator parameters, by name."""
    label: Role | None
    """Classes, for evaluation only."""

    @property
    def all(self) -> dict[str, Role]:
        """All of them by unique names."""
        found = {"y": self.y, "x": self.x, "label": self.label}
        return {name: role for name, role in found.items() if role is not None} | {
            f"param {name}": role for name, role in self.params.items()
        }


def assign_roles(source: Source, request: IngestRequest, *, least: int = 2) -> Roles:
    """Find the arrays that were asked for, and check their shapes.

    Arguments:
        source: The source.
        request: What was asked for.
        least: The fewest samples that will do.

    Raises:
        IngestError: An array is missing, or has a shape that it cannot have.
    """
    arrays = source.arrays
    label_name = request.label or source.label
    taken = {*request.params.values(), *([label_name] if label_name else [])}
    x_name, y_name = request.x, request.y
    if x_name is None and y_name is None:
        left = [name for name in arrays if name not in taken]
        if len(left) != 1:
            raise IngestError(
                f"{source.description} holds {_names(arrays)}; say which one holds the clean "
                "samples (--x NAME) or the observations (--y NAME)"
            )
        if request.corruption is None:
            y_name = left[0]
        else:
            x_name = left[0]
    if source.clean and y_name is not None:
        raise IngestError(
            f"{source.description} are clean samples; give --corrupt CONFIG, whose channel "
            "corrupts them"
        )
    if request.corruption is None and y_name is None:
        raise IngestError(
            "--x names clean samples, which are for evaluation only; give --corrupt CONFIG, whose "
            "channel corrupts them, or their observations as well (--y NAME)"
        )
    last = request.channels_last
    y = x = None
    if y_name is not None:
        y = _samples(source, "y", y_name, channels_last=last)
    if x_name is not None:
        x = _samples(source, "x", x_name, channels_last=last)
    images = [role.shape for role in (y, x) if role is not None and len(role.shape) == 3]
    params = {}
    for name, array_name in sorted(request.params.items()):
        array = _found(source, f"--param {name}", array_name)
        plane = array.shape[1:] in [shape[1:] for shape in images]
        params[name] = Role(
            f"--param {name}",
            array,
            channels_last=last and len(array.shape) == 4,
            band=plane and len(array.shape) == 3,
        )
        if len(array.shape) == 1:
            raise IngestError(
                f"--param {name}: {array_name!r} has one number for each sample, shape "
                f"{array.shape}; give it the shape that the channel takes, for example (n, 1)"
            )
    label = None
    if label_name is not None:
        array = _found(source, "--label", label_name)
        if int(np.prod(array.shape[1:])) != 1:
            raise IngestError(
                f"--label: {label_name!r} has shape {array.shape} but one class for each sample "
                "is expected, (n,); name another array"
            )
        label = Role("--label", array, integer=True)
    roles = Roles(samples=0, y=y, x=x, params=params, label=label)
    counts = {role.title: role.array.shape[0] for role in roles.all.values()}
    if len(set(counts.values())) != 1:
        told = ", ".join(f"{title} {count}" for title, count in counts.items())
        raise IngestError(
            f"the arrays hold different numbers of samples ({told}); make them equal"
        )
    samples = min(next(iter(counts.values())), request.limit or 2**63)
    if samples < least:
        purpose = "one to learn from and one to judge by are" if least == 2 else "one is"
        raise IngestError(
            f"there are {samples} samples in {source.description}, but at least {purpose} needed; "
            "give more"
        )
    return Roles(samples=samples, y=y, x=x, params=params, label=label)


def _samples(source: Source, title: str, name: str, *, channels_last: bool) -> Role:
    array = _found(source, f"--{title}", name)
    shape = array.shape
    if len(shape) not in (2, 3, 4) or 0 in shape[1:]:
        raise IngestError(
            f"--{title}: {name!r} has shape {shape} but images (n, C, H, W) or (n, H, W), or "
            "vectors (n, D) are expected; reshape it, or name another array"
        )
    band = len(shape) == 3
    last = channels_last and len(shape) == 4 and not array.bands_first
    if (
        not last
        and not array.bands_first
        and len(shape) == 4
        and shape[-1] <= 4 < min(shape[1], shape[2])
    ):
        raise IngestError(
            f"--{title}: {name!r} has shape {shape}, which would be images of {shape[2]} x "
            f"{shape[3]} pixels with {shape[1]} bands; if the bands come last, give "
            "--channels-last, if not, cut the images into other shapes"
        )
    return Role(title, array, channels_last=last, band=band)


def _found(source: Source, title: str, name: str) -> RowArray:
    array = source.arrays.get(name)
    if array is None:
        raise IngestError(
            f"{title} names {name!r} but {source.description} holds {_names(source.arrays)}; "
            "correct the name"
        )
    if array.dtype.kind == "c":
        raise IngestError(
            f"{title}: {name!r} is complex; give its real and imaginary parts as two bands, for "
            "example numpy.stack([z.real, z.imag], axis=1)"
        )
    if array.dtype.kind not in "fiub" or not array.shape:
        raise IngestError(
            f"{title}: {name!r} holds {array.dtype}, shape {array.shape}, but numbers are "
            "expected, with samples along the first axis; name another array"
        )
    return array


def _names(arrays: Mapping[str, RowArray]) -> str:
    return ", ".join(f"{name!r} {array.shape}" for name, array in arrays.items())
