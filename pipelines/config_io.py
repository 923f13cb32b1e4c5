"""Reading a run's config from YAML, with overrides, and saying clearly what is wrong with it."""

from __future__ import annotations

import datetime
import reprlib
from collections.abc import Hashable, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from storage_schemas.config import RunConfig
from storage_schemas.redaction import redact_url, without_secrets

__all__ = ["ConfigError", "load_config", "parse_override", "with_runner"]

# A config of this package has some 100 values, 5 deep. Aliases count each time they are used.
_DEEPEST = 32
_MOST_VALUES = 10_000
_LARGEST_INTEGER = 2**63 - 1


class ConfigError(ValueError):
    """A config that cannot be read or does not describe a run."""


class _Loader(yaml.SafeLoader):
    """YAML in which no key comes twice: by its own rules the last one would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {_shorten(key.value)} comes twice", key.start_mark
                )
            seen |= {name} - {None}
        return super().construct_mapping(node, deep=deep)


class _Short(reprlib.Repr):
    """`repr` of a few entries and levels, whatever the size of a value, and without secrets."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxstring = 3, 6, 8, 80

    def repr_str(self, x: str, level: int) -> str:
        # Whole, since half a URL no longer shows what in it is secret.
        return super().repr_str(without_secrets(x), level)

    def repr_int(self, x: int, level: int) -> str:
        # Python itself refuses to write integers of more than 4,300 digits.
        return repr(x) if abs(x) < 10**40 else f"an integer of {x.bit_length()} bits"


_SHORT = _Short()


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
    data = _parsed(_read_text(source), f"{shown} is", "correct the file")
    if not isinstance(data, dict):
        raise ConfigError(
            f"{shown} holds {_type_name(data)} but a config is a mapping of keys to values; "
            "start from one of deploy/experiments/*.yaml"
        )
    for override in overrides:
        path, value = parse_override(override)
        _assign(data, path, value, override)
    return _checked(data, shown)


def with_runner(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Return the config of a run that exists, to be worked with elsewhere than it was made.

    Arguments:
        config: The run's config.
        overrides: Assignments `runner.key=value`, applied in order; values are YAML. Another
            `runner.kind` begins with its defaults.

    Raises:
        ConfigError: One is about something else than the runner, or there is no such runner.
    """
    data = config.model_dump(mode="json")
    for override in overrides:
        path, value = parse_override(override)
        if path[0] != "runner" or len(path) == 1:
            raise ConfigError(
                f"--set received {override!r}, but of a run that exists only where it is worked "
                "with can be chosen: give runner.KEY=VALUE, such as runner.workers=2"
            )
        if path == ["runner", "kind"] and value != data["runner"]["kind"]:
            data["runner"] = {}
        _assign(data, path, value, override)
    return _checked(data, "the run's config, with --set,")


def _checked(data: dict[str, Any], shown: str) -> RunConfig:
    _require_plain(data, shown)
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
    return path, _parsed(value, f"--set {_shorten(text)} is", "correct the value")


def _parsed(text: str, what: str, remedy: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        problem = f"it is nested more than {_DEEPEST} deep"
    # Dates and numbers that are none, such as 2026-13-01 or !!int x, raise what Python raises.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
        problem = _one_line(error)
    raise ConfigError(f"{what} not valid YAML: {problem}; {remedy}")


def _require_plain(data: Any, shown: str) -> None:
    """Refuse what no config holds and what could be neither stored nor shown.

    Raises:
        ConfigError: A value is nested in itself, too deep, too large, or of another kind than
            JSON's; a date, for example.
    """
    left: list[tuple[list[str], Any]] = [([], data)]
    count = 0
    while left:
        keys, value = left.pop()
        count += 1
        where = ".".join(keys)
        if count > _MOST_VALUES or len(keys) > _DEEPEST:
            raise ConfigError(
                f"{shown} does not describe a run:\n  {'.'.join(keys[:3])}: goes on for more "
                f"than {_MOST_VALUES:,} values or {_DEEPEST} levels (through an alias, perhaps); "
                "a config is far smaller"
            )
        problem = None
        match value:
            case dict():
                left += [([*keys, _key(key)], inner) for key, inner in value.items()]
            case list():
                left += [([*keys, str(i)], inner) for i, inner in enumerate(value)]
            case bool() | float() | None:
                pass
            case int() if abs(value) > _LARGEST_INTEGER:
                problem = "integers end at 2^63 - 1"
            case str() if "\0" in value:
                problem = "it holds the character NUL, which no text or URL does"
            case int() | str():
                pass
            case datetime.date():
                problem = "YAML reads this as a date; put it into quotes"
            case _:
                problem = "give text, a number, true, false, null, a list or a mapping"
        if problem is not None:
            raise ConfigError(
                f"{shown} does not describe a run:\n  {where}: received {_shorten(value)}; "
                f"{problem}"
            )


def _key(key: object) -> str:
    """Return a key as it is shown: as it is, if it can be."""
    plain = isinstance(key, str | int) and str(key).isprintable() and 0 < len(str(key)) <= 80
    return str(key) if plain else _shorten(key)


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
                f"{_shorten(child)}; only mappings have keys"
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
        if isinstance(part, str) and not isinstance(data, dict):
            continue  # one of several types that a value may have, or pydantic's word for a key
        keys.append(_key(part))
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            data = None
    return keys


def _shorten(value: Any) -> str:
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _type_name(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
