"""Processes as Linux tells of them in /proc: children, sessions, who is alive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process that was alive a moment ago."""

    pid: int
    parent: int
    session: int
    command: bytes


def alive(pid: int) -> bool:
    """Whether a process exists and is not merely waiting for its parent to take note."""
    return _read(pid) is not None


def children_of(pid: int) -> list[Process]:
    """The living processes that a process has started."""
    return [process for process in _processes() if process.parent == pid]


def in_session(leader: int) -> list[Process]:
    """The living processes of a session."""
    return [process for process in _processes() if process.session == leader]


def _processes() -> Iterator[Process]:
    for folder in Path("/proc").glob("[0-9]*"):
        found = _read(int(folder.name))
        if found is not None:
            yield found


def _read(pid: int) -> Process | None:
    try:
        # Fields follow the command's closing parenthesis, which may itself hold any character.
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent, _, session = stat[:4]
    return None if state in "ZX" else Process(pid, int(parent), int(session), command)
