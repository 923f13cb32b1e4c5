"""What `diffem ingest` was asked for, and reading it from the command line's texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.ingest.base import IngestError
from storage_schemas.config import RunConfig

__all__ = ["Holdout", "IngestRequest", "parse_holdout", "parse_params", "parse_shape"]

Holdout = int | float
"""A number of samples, or a fraction of them."""


@dataclass(frozen=True, kw_only=True)
class IngestRequest:
    """Which arrays of a source are what, and where they go."""

    source: str
    """Path, fsspec URL, `hf://NAME` or `bundled:NAME`."""
    url: str
    """Path or fsspec URL of the observations to write."""
    y: str | None = None
    """Name of the array of observations."""
    x: str | None = None
    """Name of the array of clean samples."""
    params: Mapping[str, str] = field(default_factory=dict)
    """Names of the arrays of operator parameters, by the channel's name for each."""
    label: str | None = None
    """Name of the array of classes."""
    corruption: RunConfig | None = None
    """The config whose channel and seed corrupt the clean samples."""
    x_shape: tuple[int, ...] | None = None
    """Shape of a clean sample where none is known; that of an observation by default."""
    channels_last: bool = False
    """Whether the bands of images are the last axis."""
    holdout: Holdout = 0.1
    """Samples kept out of the training."""
    append: bool = False
    """Whether they are added to those that are there."""
    seed: int = 0
    """Seed of their choice; where samples are corrupted, the config's."""
    limit: int | None = None
    """Use only the first samples."""
    units: str | None = None
    """Unit of the values."""
    value_range: tuple[float, float] | None = None
    """Values outside are refused: of the clean samples, where they are given, else of the
    observations."""

    def __post_init__(self) -> None:
        if self.corruption is not None and (self.y is not None or self.params):
            named = "--y" if self.y is not None else "--param"
            raise IngestError(
                f"{named} names what is observed but --corrupt makes observations from clean "
                "samples; give one or the other"
            )
        if self.x_shape is not None and (self.corruption is not None or self.x is not None):
            raise IngestError(
                "--x-shape says what is looked for where no clean sample is known, but clean "
                "samples are given; leave it out"
            )
        if self.limit is not None and self.limit < 1:
            raise IngestError(f"--limit is {self.limit}; give at least 2 samples")
        if self.value_range is not None and not (
            all(map(math.isfinite, self.value_range)) and self.value_range[0] < self.value_range[1]
        ):
            low, high = self.value_range
            raise IngestError(f"--range is {low:g} {high:g}; give LOW, then a greater HIGH")
        if not 0 <= self.seed < 2**63:
            raise IngestError(f"--seed is {self.seed}; give 0 or a positive integer")

    def held_out(self, samples: int) -> int:
        """Return how many of the samples are held out.

        Raises:
            IngestError: None are, or none are left.
        """
        count = self.holdout
        if isinstance(count, float):
            count = max(1, round(count * samples))
        if not 0 < count < samples:
            raise IngestError(
                f"--holdout {self.holdout} holds {count} of {samples} samples out; hold out at "
                "least one, and leave some to learn from"
            )
        return count


def parse_holdout(text: str) -> Holdout:
    """Read a number of samples, or a fraction between 0 and 1.

    Raises:
        IngestError: It is neither.
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        fraction = float(text)
    except ValueError:
        fraction = math.nan
    if not 0 < fraction < 1:
        raise IngestError(
            f"--holdout is {text!r}; give a number of samples (500) or a fraction of them (0.1)"
        )
    return fraction


def parse_params(texts: Sequence[str]) -> dict[str, str]:
    """Read `NAME` or `NAME=ARRAY`, the array having the parameter's name by default.

    Raises:
        IngestError: A name is empty, holds a slash or comes twice.
    """
    params: dict[str, str] = {}
    for text in texts:
        name, equals, array = text.partition("=")
        if not name.isidentifier() or (equals and not array):
            raise IngestError(
                f"--param is {text!r}; give NAME or NAME=ARRAY, with the channel's name for the "
                "parameter, for example mask"
            )
        if name in params:
            raise IngestError(f"--param {name} is given twice; give it once")
        params[name] = array or name
    return params


def parse_shape(text: str) -> tuple[int, ...]:
    """Read `C,H,W` or `D`.

    Raises:
        IngestError: It is neither.
    """
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) not in (1, 3) or min(shape, default=0) < 1:
        raise IngestError(f"--x-shape is {text!r}; give C,H,W (images) or D (vectors)")
    return shape
