"""Errors that come from a worker are what they would have been here, as far as JSON can tell."""

import errno
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from pipelines.runners.remote_errors import decode_error, encode_error
from storage_schemas import errors
from storage_schemas.config import LocalRunner


def sent(error: BaseException) -> BaseException:
    """Raise an error, and take it there and back as JSON."""
    try:
        raise error
    except BaseException as raised:
        told = json.loads(json.dumps(encode_error(raised)))
    return decode_error(told, "worker 1 (GPU 1)")


def with_attributes(error: Exception, **attributes: object) -> Exception:
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("give at least one"),
        FloatingPointError("M-step diverged at step 3"),
        OSError(errno.ENOSPC, "No space left on device", "/runs/digits/x"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/runs/digits/y"),
        KeyError("mask"),
        torch.OutOfMemoryError("CUDA out of memory"),
        errors.NotARun("there is no run at runs/digits"),
        errors.ConfigMismatch.at("runs/digits", ["seed: 0 -> 1", "iterations: 2 -> 3"]),
        errors.LayoutMismatch.at("x_hat", {"shards": (4, 5)}),
        errors.DamageError("iterations/000/model.safetensors", "has another checksum"),
        errors.NoSpace.at(errno.ENOSPC, Path("/runs/digits/observations.json")),
        errors.StoreFailed("the server does not answer"),
        with_attributes(RuntimeError("shard 3 failed"), shard=3, tried=["a", "b"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_keep_type_message_and_fields(error: BaseException) -> None:
    copy = sent(error)
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.args == error.args
    own = {name: value for name, value in vars(error).items() if name != "__notes__"}
    assert {name: vars(copy)[name] for name in own} == own
    for name in ("errno", "filename"):
        assert getattr(copy, name, None) == getattr(error, name, None)


def test_the_trace_of_the_worker_is_a_note() -> None:
    (note,) = sent(ValueError("no")).__notes__
    assert note.startswith("in worker 1 (GPU 1):\nTraceback (most recent call last)")
    assert "test_remote_errors.py" in note


class TakesTwo(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


class HoldsAnObject(Exception):
    pass


class SaysMore(ValueError):
    def __init__(self, text: str) -> None:
        super().__init__(f"{text}, sadly")


class TakesTwoNumbers(ValueError):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def refused_config() -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        LocalRunner.model_validate({"workers": 0})
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (TakesTwo("a", "b"), RuntimeError, "tests.pipelines.test_remote_errors.TakesTwo: a and b"),
        (HoldsAnObject(object()), RuntimeError, "test_remote_errors.HoldsAnObject: <object"),
        (TakesTwoNumbers(1, 2), ValueError, "test_remote_errors.TakesTwoNumbers: 1 and 2"),
        (SaysMore("no"), ValueError, "test_remote_errors.SaysMore: no, sadly"),
        (refused_config(), ValueError, "ValidationError: 1 validation error for LocalRunner"),
        (
            type("Local", (OSError,), {"__module__": __name__})("gone"),
            OSError,
            "test_remote_errors.Local: gone",
        ),
        (KeyError(object()), RuntimeError, "KeyError: <object"),
    ],
)
def test_what_json_cannot_describe_names_its_type(
    error: BaseException, kind: type, message: str
) -> None:
    copy = sent(error)
    assert type(copy) is kind
    assert message in str(copy)
