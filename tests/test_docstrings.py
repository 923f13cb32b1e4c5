"""What the public functions and classes take is written down where `help()` shows it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import diffem_core
from pipelines.using import run as using

PUBLIC = {
    name: item
    for module in (diffem_core, using)
    for name in module.__all__
    if inspect.isfunction(item := getattr(module, name)) or inspect.isclass(item)
}


def arguments_of(item: Callable[..., Any]) -> list[str]:
    """Return the names of what a caller gives; a class that is not called takes nothing."""
    if getattr(item, "_is_protocol", False) or "__init__" not in dir(item):
        return []
    try:
        parameters = inspect.signature(item).parameters
    except (TypeError, ValueError):
        return []
    return [name for name in parameters if name not in ("args", "kwargs")]


def documented(item: object) -> str:
    """Return the docstring; fields of a dataclass have theirs in the source of the class."""
    text = inspect.getdoc(item) or ""
    return text + inspect.getsource(item) if hasattr(item, "__dataclass_fields__") else text  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_say_what_they_take_and_return(name: str) -> None:
    item = PUBLIC[name]
    assert inspect.getdoc(item), name
    missing = [given for given in arguments_of(item) if f"{given}:" not in documented(item)]
    assert not missing, f"{name} does not say what {missing} are"
    if inspect.isfunction(item) and arguments_of(item):
        assert "Arguments:" in documented(item)


def test_there_is_something_to_look_at() -> None:
    assert {"e_step", "m_step", "Denoiser", "open_run", "RunPosterior"} <= PUBLIC.keys()
    # What is asked of them can be answered with no: a function without a word is found.
    assert arguments_of(lambda width, height: width) == ["width", "height"]
