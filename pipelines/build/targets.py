"""Classes of the user's own, named in a config as `package.module:Name`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["build_target"]


def build_target(target: str, *values: object, arguments: Mapping[str, Any], key: str) -> Any:
    """Import a class or function and call it.

    Modules are looked for where Python looks for them, and in the current directory.

    Arguments:
        target: Where it is, as `package.module:Name`.
        values: Positional arguments.
        arguments: Keyword arguments, from the config.
        key: Key of the config that names it, for messages.

    Returns:
        What the call returned.

    Raises:
        ValueError: There is no such module or name, it does not take these arguments, or it fails.
    """
    module_name, _, name = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{key} names the module {module_name!r}, which cannot be imported ({error}); install "
            f"it, or run from the folder that holds it (now {here})"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        known = sorted(n for n, v in vars(module).items() if inspect.isclass(v))
        raise ValueError(
            f"{key} names {name!r}, but {module_name} has no such class; its classes are "
            f"{', '.join(known) or 'none'}"
        )
    try:
        inspect.signature(found).bind(*values, **arguments)
    except TypeError as error:
        raise ValueError(
            f"{key}: {target} is called with {len(values)} positional arguments and "
            f"{sorted(arguments)}, which it does not take ({error}); its signature is "
            f"{inspect.signature(found)}"
        ) from error
    try:
        return found(*values, **arguments)
    # It is the user's own, and raises whatever its code runs into.
    except Exception as error:
        raise ValueError(
            f"{key}: {target} failed on {sorted(arguments) or 'no'} arguments: {error} "
            f"({type(error).__name__}); correct it, or its arguments"
        ) from error
