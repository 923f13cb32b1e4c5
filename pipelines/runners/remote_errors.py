"""Errors that cross from a worker process to its parent, as JSON: type by name, arguments, trace.

What Python would pickle (`error.__reduce__()`: the type and its arguments, and attributes beyond
them) is taken where all of it is JSON, and is tried in the worker first: an error whose copy does
not have the same type and message comes back as the nearest kind of error that a caller may
handle, or else as a RuntimeError, and names its type.
"""

from __future__ import annotations

import importlib
import traceback
from typing import Any

__all__ = ["decode_error", "encode_error"]

_KINDS = (FloatingPointError, ValueError, OSError)
_SCALARS = (str, int, float, bool, type(None))


def encode_error(error: BaseException) -> dict[str, Any]:
    """Describe an error by JSON: its type, what makes it anew, its message, where it arose."""
    kind = type(error)
    told: dict[str, Any] = {
        "type": f"{kind.__module__}:{kind.__qualname__}",
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    reduced = error.__reduce__()
    if isinstance(reduced, tuple) and len(reduced) >= 2 and reduced[0] is kind:
        state = reduced[2] if len(reduced) > 2 and isinstance(reduced[2], dict) else {}
        state = {name: value for name, value in state.items() if _is_json(value)}
        if _is_json(reduced[1]) and _survives(kind, told, reduced[1], state):
            return {**told, "args": reduced[1], "state": state}
    near = next((known.__name__ for known in _KINDS if isinstance(error, known)), "RuntimeError")
    name = kind.__qualname__ if kind.__module__ == "builtins" else told["type"].replace(":", ".")
    return {**told, "type": f"builtins:{near}", "args": [f"{name}: {error}"], "state": {}}


def decode_error(told: dict[str, Any], where: str) -> BaseException:
    """Make an error anew from its description.

    Arguments:
        told: What `encode_error` made, also after a way through JSON.
        where: What the error's note says of the process, for example 'worker 1 (GPU 1)'.

    Returns:
        The error, with the trace of the worker as a note.
    """
    error = _made(_named(told["type"]), told["args"], told["state"])
    error.add_note(f"in {where}:\n{told['traceback']}")
    return error


def _survives(kind: type, told: dict[str, Any], args: Any, state: dict[str, Any]) -> bool:
    """Try whether the parent will get the same type and message."""
    try:
        copy = _made(_named(told["type"]), list(args), state)
    except Exception:  # Whatever a constructor or an import may raise, the copy is not to be had.
        return False
    return type(copy) is kind and str(copy) == told["message"]


def _named(name: str) -> type[BaseException]:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, BaseException)):
        raise TypeError(f"{name} is no type of errors")
    return found


def _made(kind: type[BaseException], args: list[Any], state: dict[str, Any]) -> BaseException:
    error = kind(*args)
    for name, value in state.items():
        setattr(error, name, value)
    return error


def _is_json(value: object) -> bool:
    """Tell whether a value is made of what JSON holds, tuples as lists."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_is_json, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return isinstance(value, _SCALARS)
