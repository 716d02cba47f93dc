"""Values of a config file, as YAML or JSON gives them, in the types of a dataclass's fields."""

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    NoneType: "null",
    Any: "a value",
}


class Mismatch(Exception):
    """A value is of another type."""


def convert(value: Any, hint: Any) -> Any:
    """`value` in the type of a field.

    Raises:
        Mismatch: it is of another type.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first_match(value, arguments)
    if origin is Literal:
        return _checked(value, value in arguments)
    if origin is tuple:
        return tuple(convert(item, arguments[0]) for item in _checked(value, isinstance(value, list)))
    if origin is not None:
        items = _checked(value, isinstance(value, dict)).items()
        return {convert(name, arguments[0]): convert(item, arguments[1]) for name, item in items}
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
            return convert(value, hint)
        except Mismatch:
            continue
    raise Mismatch


def _number(value: Any) -> float:
    if type(value) in (int, float):
        return float(value)
    try:
        # YAML 1.1 takes 2e-5, without a point, for a text.
        return float(_checked(value, isinstance(value, str)))
    except ValueError:
        raise Mismatch from None


def _checked(value: Any, fits: bool) -> Any:
    if not fits:
        raise Mismatch
    return value


def expected(hint: Any) -> str:
    """What a field of that type takes, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(expected, arguments))
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is tuple:
        return f"a list, each item {expected(arguments[0])}"
    if origin is not None:
        return f"a mapping of names, each to {expected(arguments[1])}"
    return _WORDS[hint]
