"""Types of options: how each is written as a flag, and how help shows it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from embtune.errors import ArgumentError

# A path may hold a "=" too; what stands before it then has a slash, or the file exists.
_NAMED = re.compile(r"(?P<name>\w[\w. -]*)=(?P<value>.*)", re.DOTALL)


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ArgumentError(f"{text!r} must be written NAME=VALUE.")
        if name in found:
            raise ArgumentError(f"{name!r} is given twice.")
        found[name] = value
    return found


def _values(texts: Sequence[str]) -> dict[str, Any]:
    try:
        return {name: yaml.safe_load(value) for name, value in _pairs(texts).items()}
    except yaml.YAMLError as error:
        raise ArgumentError(f"{' '.join(texts)}: a value is neither number, text, list nor true or false.") from error


def _numbers(texts: Sequence[str]) -> dict[str, float]:
    pairs = _pairs(texts)
    try:
        return {name: float(value) for name, value in pairs.items()}
    except ValueError as error:
        raise ArgumentError(f"{' '.join(texts)}: each must be written NAME=NUMBER.") from error


def sources_by_name(sources: Sequence[str]) -> dict[str, str]:
    """Name data sets: `NAME=SOURCE` says its name, a bare file or Hub name is called by its last part.

    Raises:
        ArgumentError: two have the same name.
    """
    found: dict[str, str] = {}
    for source in sources:
        named = None if Path(source).exists() else _NAMED.fullmatch(source)
        name, value = (named["name"], named["value"]) if named else (Path(source).stem, source)
        if name in found:
            raise ArgumentError(f"Two data sets are called {name!r}; name them yourself: NAME=FILE NAME=FILE.")
        found[name] = value
    return found


def as_flags(message: str, options: Iterable[str]) -> str:
    """A message of the library with its arguments written as the flags that a user types."""
    names = "|".join(map(re.escape, options))
    return re.sub(rf"\b({names})\b", lambda found: "--" + found[1].replace("_", "-"), message)


def bytes_of(name: str, size: str) -> float:
    """`2GB` in bytes; `name` begins the message.

    Raises:
        ArgumentError: it is no number with one of the units.
    """
    return _with_unit(name, size, {"MB": 10**6, "GB": 10**9, "TB": 10**12}, "2GB")


def seconds_of(name: str, time: str) -> float:
    """`30d` in seconds, as `bytes_of`."""
    return _with_unit(name, time, {"h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}, "30d")


def _with_unit(name: str, text: str, units: Mapping[str, int], example: str) -> float:
    found = re.fullmatch(r"(?P<number>\d+(\.\d+)?) ?(?P<unit>[A-Za-z]+)", text)
    factors = {unit.lower(): factor for unit, factor in units.items()}
    if found is None or found["unit"].lower() not in factors:
        raise ArgumentError(f"{name}={text!r} must be a number with a unit ({', '.join(units)}), as {example}.")
    return float(found["number"]) * factors[found["unit"].lower()]


def _flag(parse: Callable[[Sequence[str]], Mapping[str, Any]], metavar: str) -> Any:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=parse,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda value: [f"{name}={item}" for name, item in value.items()],
    )


def shown(metavar: str, default: bool = False) -> Any:
    """How help shows a flag; a default that says nothing (None, False, no items) is not worth a line."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=None if default else "")


_HIDDEN_DEFAULT = tyro.conf.arg(help_behavior_hint="")

Pairs = Annotated[Mapping[str, str], _flag(_pairs, "A=B…"), _HIDDEN_DEFAULT]
Values = Annotated[Mapping[str, Any], _flag(_values, "A=B…"), _HIDDEN_DEFAULT]
Numbers = Annotated[Mapping[str, float], _flag(_numbers, "A=N…"), _HIDDEN_DEFAULT]
Sources = Annotated[Mapping[str, str], _flag(sources_by_name, "FILE…")]
Switch = Annotated[bool, _HIDDEN_DEFAULT]
Texts = Annotated[tuple[str, ...], shown("NAME…")]
Ints = Annotated[tuple[int, ...], shown("N…")]
MaybeText = Annotated[str | None, shown("NAME")]
MaybeInt = Annotated[int | None, shown("N")]
MaybeFloat = Annotated[float | None, shown("X")]
Int = Annotated[int, shown("N", default=True)]
Float = Annotated[float, shown("X", default=True)]
