"""Reading a run's config from YAML, with overrides, and saying clearly what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from storage_schemas.config import RunConfig
from storage_schemas.redaction import redact_url, without_secrets

__all__ = ["ConfigError", "load_config", "parse_override"]


class ConfigError(ValueError):
    """A config that cannot be read or does not describe a run."""


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a config.

    Arguments:
        source: Path or fsspec URL of a YAML file.
        overrides: Assignments `key.sub=value`, applied in order; values are YAML.

    Returns:
        The checked config.

    Raises:
        ConfigError: If the file cannot be read, is not YAML, or describes no valid run; the
            message lists every offending field by its path.
    """
    shown = redact_url(source)
    text = _read_text(source)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{shown} is not valid YAML: {_one_line(error)}; correct the file"
        ) from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{shown} holds {_type_name(data)} but a config is a mapping of keys to values; "
            "start from one of deploy/experiments/*.yaml"
        )
    for override in overrides:
        path, value = parse_override(override)
        _assign(data, path, value, override)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{shown} does not describe a run:\n{_explain(error, data)}") from None


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split an assignment `key.sub=value` into its path and its value, read as YAML.

    Raises:
        ConfigError: If there is no `=`, a part of the path is empty, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise ConfigError(
            f"--set received {text!r} but expects key.sub=value, for example m_step.steps=200"
        )
    try:
        return path, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {text!r} has a value that is not valid YAML: {_one_line(error)}"
        ) from None


def _read_text(source: str) -> str:
    import fsspec

    shown = redact_url(source)
    try:
        with fsspec.open(source, "r", encoding="utf-8") as file:
            return str(file.read())
    except FileNotFoundError:
        raise ConfigError(f"no config at {shown}; give the path or URL of a YAML file") from None
    except UnicodeDecodeError:
        raise ConfigError(
            f"{shown} is not a text file in UTF-8; give the path or URL of a YAML file"
        ) from None
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"the config {shown} cannot be read: {without_secrets(_one_line(error))}"
        ) from None


def _assign(data: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    node = data
    for depth, part in enumerate(path[:-1]):
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"--set {override!r} goes below {'.'.join(path[: depth + 1])!r}, which holds "
                f"{child!r}; only mappings have keys"
            )
        node = child
    node[path[-1]] = value


def _explain(error: ValidationError, data: Any) -> str:
    lines = []
    for item in error.errors(include_url=False, include_context=False):
        where = ".".join(_keys(item["loc"], data))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            lines.append(f"  {where}: missing; add it")
        elif item["type"] == "extra_forbidden":
            lines.append(f"  {where}: unknown key; remove it or correct its name")
        elif where:
            lines.append(f"  {where}: received {_shorten(item['input'])}; {message}")
        else:
            lines.append(f"  {message}")
    return "\n".join(lines)


def _keys(location: Sequence[str | int], data: Any) -> list[str]:
    """Return the keys that lead to a place in a config, without pydantic's names of variants."""
    keys = []
    for part in location:
        if isinstance(data, dict) and part not in data and part == data.get("kind", "local"):
            continue
        keys.append(str(part))
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            data = None
    return keys


def _shorten(value: Any, limit: int = 80) -> str:
    text = without_secrets(repr(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _type_name(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
