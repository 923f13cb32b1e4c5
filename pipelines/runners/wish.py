"""What an actor of a Ray cluster knows of a job: whether it should end, and why.

Nothing is imported here, so that the process of the actor is there as fast as a process can be.
"""

from __future__ import annotations

__all__ = ["Wish"]


class Wish:
    """Whether the work of a job should end, and why."""

    def __init__(self) -> None:
        self._reason: str | None = None

    def set(self, reason: str) -> None:
        """Say that it should."""
        self._reason = reason

    def get(self) -> str | None:
        """Return the reason; None where nobody asked for an end."""
        return self._reason
