"""YAML config files: each key is checked against the dataclass whose field it sets, and mistakes name their line."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from embtune.cli.flags import sources_by_name
from embtune.data.lines import decoded_text
from embtune.errors import ArgumentError

Config = TypeVar("Config")

_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    NoneType: "null",
    Any: "a value",
}
_NO_KEYS = ("config", "resume")  # these speak about the file and the command


class _Mismatch(Exception):
    """A value is of another type."""


def read_defaults(config_type: type[Config], path: Path) -> Config:
    """A config from a YAML file; required fields that the file lacks are tyro's MISSING, to be filled by flags.

    Raises:
        DataError: the file cannot be read.
        ArgumentError: it is no YAML mapping, or a key or value is wrong; the message names file, line and key.
    """
    hints = {name: hint for owner in _groups(config_type) for name, hint in get_type_hints(owner).items()}
    names = [
        field.name for owner in _groups(config_type) for field in fields(owner) if not is_dataclass(hints[field.name])
    ]
    known = [name for name in names if name not in _NO_KEYS]
    values: dict[str, Any] = {}
    for key_node, value_node in _entries(path):
        where = f"{path}, line {key_node.start_mark.line + 1}"
        key = str(_plain(key_node, path)).replace("-", "_")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"Did you mean {near[0]}?" if near else f"The keys: {', '.join(known)}."
            raise ArgumentError(f"{where}: there is no key {key!r}. {hint}")
        if key in values:
            raise ArgumentError(f"{where}: the key {key!r} is there twice. Remove one.")
        value = _plain(value_node, path)
        try:
            values[key] = _convert(_named(value) if key == "data" else value, hints[key])
        except _Mismatch:
            raise ArgumentError(f"{where}: {key} is {value!r}, but must be {_expected(hints[key])}.") from None
        except ArgumentError as error:
            raise ArgumentError(f"{where}: {error}") from error
    try:
        return _build(config_type, values)
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}") from error


def _named(data: Any) -> Any:
    """The data sets by name, also where a file gives one file or a list of them."""
    if not isinstance(data, str | list):
        return data
    return sources_by_name([data] if isinstance(data, str) else [str(source) for source in data])


def _groups(config_type: type) -> Iterator[type]:
    """The dataclass and those it nests; a file's keys know no nesting."""
    yield config_type
    for hint in get_type_hints(config_type).values():
        if is_dataclass(hint):
            yield from _groups(hint)  # type: ignore[arg-type]


def _entries(path: Path) -> list[tuple[yaml.Node, yaml.Node]]:
    text = decoded_text(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _broken(path, error) from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ArgumentError(f"{path} holds no keys. Write one `key: value` a line, such as `model: path/to/model`.")
    return root.value


def _plain(node: yaml.Node, path: Path) -> Any:
    try:
        return yaml.constructor.SafeConstructor().construct_document(node)
    except yaml.YAMLError as error:
        raise _broken(path, error) from error
    except ValueError as error:
        raise ArgumentError(f"{path}, line {node.start_mark.line + 1}: {error}.") from error


def _broken(path: Path, error: yaml.YAMLError) -> ArgumentError:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return ArgumentError(f"{where}: this is no YAML that can be read: {what}.")


def _build(config_type: type[Config], values: Mapping[str, Any]) -> Config:
    hints = get_type_hints(config_type)
    settings: dict[str, Any] = {}
    for field in fields(config_type):  # type: ignore[arg-type]
        if is_dataclass(hints[field.name]):
            settings[field.name] = _build(hints[field.name], values)
        elif field.name in values:
            settings[field.name] = values[field.name]
        elif field.default is MISSING and field.default_factory is MISSING:
            settings[field.name] = tyro.MISSING
    return config_type(**settings)


def _convert(value: Any, hint: Any) -> Any:
    """`value`, as YAML gives it, in the type of a field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first_match(value, arguments)
    if origin is Literal:
        return _checked(value, value in arguments)
    if origin is tuple:
        return tuple(_convert(item, arguments[0]) for item in _checked(value, isinstance(value, list)))
    if origin is not None:
        items = _checked(value, isinstance(value, dict)).items()
        return {_convert(name, arguments[0]): _convert(item, arguments[1]) for name, item in items}
    if hint is Any:
        return value
    if hint is float:
        return _number(value)
    if hint is Path:
        return Path(_checked(value, isinstance(value, str)))
    return _checked(value, type(value) is hint)


def _first_match(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return _convert(value, hint)
        except _Mismatch:
            continue
    raise _Mismatch


def _number(value: Any) -> float:
    if type(value) in (int, float):
        return float(value)
    try:
        # YAML 1.1 takes 2e-5, without a point, for a text.
        return float(_checked(value, isinstance(value, str)))
    except ValueError:
        raise _Mismatch from None


def _checked(value: Any, fits: bool) -> Any:
    if not fits:
        raise _Mismatch
    return value


def _expected(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_expected, arguments))
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return f"a list, each item {_expected(arguments[0])}"
    if origin is not None:
        return f"a mapping of names, each to {_expected(arguments[1])}"
    return _WORDS[hint]
