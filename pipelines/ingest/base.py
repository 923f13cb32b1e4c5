"""What every source gives: named arrays, read in order, in blocks of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["IngestError", "RowArray", "Source", "recut"]


class IngestError(ValueError):
    """Data that cannot be ingested: the message says what was received, expected, what to do."""


class RowArray(ABC):
    """An array whose first axis counts samples; nothing is read before it is asked for.

    Arguments:
        name: Its name in the source.
        shape: Its shape, samples first.
        dtype: Its type.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype

    bands_first: bool = False
    """Whether the source itself puts the bands of images first."""

    @abstractmethod
    def pieces(self, rows: int, stop: int, start: int = 0) -> Iterator[NDArray[Any]]:
        """Yield the rows from `start` to before `stop` in order, in pieces of about `rows`.

        Raises:
            IngestError: They cannot be read.
        """

    def describe(self, row: int) -> str:
        """Name a sample in a message."""
        return f"sample {row}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Named arrays that belong together."""

    description: str
    """Where they come from, in words; holds no secret."""
    arrays: Mapping[str, RowArray]
    """The arrays, by name."""
    units: str | None = None
    """Unit of the values, where the source knows it."""
    clean: bool = False
    """Whether the samples are known to be clean."""
    label: str | None = None
    """The array of classes, where the source knows it."""
    value_range: tuple[float, float] | None = None
    """The values of black and white, where the source knows them."""
    state: Callable[[], str | None] = lambda: None
    """Returns a digest that differs once the source has changed; None where that is not known."""


def recut(pieces: Iterable[NDArray[Any]], rows: int) -> Iterator[NDArray[Any]]:
    """Cut a stream of pieces of any length into pieces of `rows` rows; the last may be shorter."""
    held: list[NDArray[Any]] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        if count < rows:
            continue
        joined = np.concatenate(held) if len(held) > 1 else held[0]
        whole = count - count % rows
        for start in range(0, whole, rows):
            yield joined[start : start + rows]
        held, count = ([joined[whole:].copy()] if whole < count else []), count - whole
    if count:
        yield np.concatenate(held)
