"""What can go wrong with a store: mistakes of the caller, and damage.

`StorageError` is the caller's mistake (a wrong URL, another config, observations that cannot be
used) and ends a command with exit status 2. `DamageError` says that something which was written
is missing or no longer what was written: exit status 1, found again by `diffem verify`, repaired
by `diffem run`. `NoSpace` and `StoreFailed` are OSErrors: no mistake and no damage, the work stops
(exit status 1) and the same command resumes it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = [
    "BadObservations",
    "ConfigMismatch",
    "DamageError",
    "IncompleteError",
    "LayoutMismatch",
    "NoSpace",
    "NotARun",
    "SchemaMismatch",
    "StorageError",
    "StoreFailed",
    "UnusableStore",
]


class StorageError(ValueError):
    """A mistake of the caller: the message says what was received, expected, and what to do."""


class UnusableStore(StorageError):
    """The URL cannot be written or read: permissions, missing bucket or library, bad scheme."""


class NotARun(StorageError):
    """The URL holds no run."""


class SchemaMismatch(StorageError):
    """The run was written by another version of this package, which this one cannot read."""


class BadObservations(StorageError):
    """Observations that cannot be stored: not finite, of a wrong shape, or twice the same id."""


class _Difference(StorageError):
    """Two descriptions of one thing differ.

    Arguments:
        message: The whole message.
        differences: Lines `key: stored -> given`.
    """

    def __init__(self, message: str, differences: Sequence[str]) -> None:
        super().__init__(message)
        self.differences = tuple(differences)

    def __reduce__(self) -> tuple[type[_Difference], tuple[str, tuple[str, ...]]]:
        return type(self), (str(self), self.differences)


class ConfigMismatch(_Difference):
    """A run exists at the URL and was made with another config."""

    @classmethod
    def at(cls, url: str, differences: Sequence[str]) -> ConfigMismatch:
        """Say where, and what differs."""
        lines = "\n".join(f"  {line}" for line in differences)
        return cls(
            f"the run at {url} was made with another config (stored -> given):\n{lines}\n"
            "give the stored values, or another --store or name for a new run, or delete the run",
            differences,
        )


class LayoutMismatch(_Difference):
    """An array exists and has another layout."""

    @classmethod
    def at(cls, path: str, differences: Mapping[str, tuple[object, object]]) -> LayoutMismatch:
        """Say where, and what differs."""
        lines = [f"{key}: {stored} -> {given}" for key, (stored, given) in differences.items()]
        return cls(
            f"{path} exists with another layout (stored -> given): {'; '.join(lines)}; use the "
            "stored layout, or delete the store",
            lines,
        )


class DamageError(RuntimeError):
    """Something that was written is missing or is no longer what was written.

    Arguments:
        path: The object, relative to the run.
        problem: What is wrong with it.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(
            f"{path}: {problem}; `diffem verify` names all damage and `diffem run` repairs it"
        )
        self.path = path
        self.problem = problem

    def __reduce__(self) -> tuple[type[DamageError], tuple[str, str]]:
        return type(self), (self.path, self.problem)


class NoSpace(OSError):
    """The disk is full, a quota is used up, or a file may not grow: the object was not written."""

    @classmethod
    def at(cls, number: int, target: Path) -> NoSpace:
        """Say what was to be written, and where.

        Arguments:
            number: The error's number.
            target: The object.
        """
        return cls(number, os.strerror(number), str(target))

    def __str__(self) -> str:
        folder = Path(self.filename).parent
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free / 1e6
        return (
            f"{super().__str__()}; {free:.1f} MB are free there: make room (or raise the quota or "
            "limit), then run the same command again"
        )


class StoreFailed(OSError):
    """A request to a store failed, also after it was repeated: the server or the way to it."""


class IncompleteError(RuntimeError):
    """Something is asked of a stage that has not finished: the message names what is missing."""
