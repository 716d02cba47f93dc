"""Config files: each key is checked against the dataclass whose field it sets, and mistakes name their line."""

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
import yaml

from embtune.cli.config_values import Mismatch, convert, expected
from embtune.cli.flags import sources_by_name
from embtune.cli.mistakes import ConfigError, Mistake
from embtune.cli.places import looks_like_path
from embtune.cli.train_config import COMMAND_OPTIONS, TrainConfig
from embtune.data.lines import decoded_text
from embtune.errors import ArgumentError
from embtune.files import read_json

Config = TypeVar("Config")

SETTINGS = "run.json"
"""The file of a run's folder that keeps its options."""

_SOURCES = ("data", "eval_data")


@dataclass
class ConfigFile:
    """The options that a file gives, and what is wrong with them."""

    path: Path
    """The file."""
    values: dict[str, Any] = field(default_factory=dict)
    """Option -> value, in the type of its field; paths are relative to the working directory."""
    lines: dict[str, int] = field(default_factory=dict)
    """Option -> line of its key."""
    mistakes: list[Mistake] = field(default_factory=list)
    """Keys and values that cannot be."""

    @classmethod
    def read(cls, path: Path) -> "ConfigFile":
        """Read a file of YAML; its paths are relative to its own folder.

        Raises:
            DataError: the file cannot be read.
            ArgumentError: it is no YAML, or no mapping.
        """
        file = cls(path)
        for key_node, value_node in _entries(path):
            line = key_node.start_mark.line + 1
            try:
                key = str(_plain(key_node)).replace("-", "_")
                if key in file.lines:
                    raise ArgumentError(f"the key {key!r} is there twice. Remove one.")
                file.lines[key] = line
                file.take(key, _plain(value_node), path.parent)
            except ArgumentError as error:
                file.mistakes.append(Mistake(f"{path}, line {line}: {error}", (key,)))
        return file

    @classmethod
    def of_run(cls, run: Path) -> "ConfigFile":
        """The options that a run began with, from its run.json; its folder is `output`.

        Raises:
            ArgumentError: there is no run, or its file is not what embtune writes.
        """
        file = cls(run / SETTINGS)
        if not file.path.exists():
            raise ArgumentError(f"resume: {run} holds no run. Name the folder that --output of `embtune train` said.")
        try:
            written = read_json(file.path)
            options, folder = dict(written["config"]), Path(written.get("folder", "."))
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                f"resume: {file.path} is not what embtune wrote there ({error}). Start a new run in another folder."
            ) from error
        for key, value in options.items():
            try:
                file.take(key, value, Path() if folder == Path.cwd() else folder)
            except ArgumentError as error:
                file.mistakes.append(Mistake(f"{file.path}: {error}", (key,)))
        file.values["output"] = run
        return file

    def take(self, key: str, value: Any, base: Path) -> None:
        """Add one option, as YAML or JSON gives it; relative paths start from the folder `base`.

        Raises:
            ArgumentError: there is no such key, or its value is of another type.
        """
        hints = _hints()
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            hint = f"Did you mean {near[0]}?" if near else f"The keys: {', '.join(hints)}."
            raise ArgumentError(f"there is no key {key!r}. {hint}")
        try:
            found = convert(_named(value) if key in _SOURCES else value, hints[key])
        except Mismatch:
            raise ArgumentError(f"{key} is {value!r}, but must be {expected(hints[key])}.") from None
        self.values[key] = _from_folder(base, key, found)

    def defaults(self, options_type: type[TrainConfig]) -> TrainConfig:
        """The options as defaults of flags; those that are required and not here are tyro's MISSING.

        Args:
            options_type: `unchecked` of `TrainConfig`.
        """
        return _build(options_type, {"model": tyro.MISSING, "data": tyro.MISSING} | self.values)

    def check(self, flags: Collection[str]) -> None:
        """Raise if the file alone is wrong already.

        Args:
            flags: options that the command line gives, which win over the file.

        Raises:
            ConfigError: with all that is wrong.
        """
        missing = [name for name in ("model", "data") if name not in {*self.lines, *self.values, *flags}]
        self.mistakes += [
            Mistake(f"{self.path}: {name} is missing. Write it into the file, or give --{name}.", (name,))
            for name in missing
        ]
        if not self.mistakes:
            return
        # The rest of the file is looked at, too, without what is wrong already and what the command line decides.
        known_wrong = {name for mistake in self.mistakes for name in mistake.names}.union(flags)
        try:
            _build(TrainConfig, {"model": "", "data": {"": ""}} | self.values)
        except ConfigError as error:
            others = (each for each in error.mistakes if not known_wrong.intersection(each.names))
            self.mistakes += map(self._located, others)
        last = max(self.lines.values(), default=0) + 1
        in_order = sorted(self.mistakes, key=lambda each: min(self.lines.get(name, last) for name in each.names))
        raise ConfigError(in_order)

    def checked(self, options: TrainConfig) -> TrainConfig:
        """The options of file and command line together, checked.

        Raises:
            ConfigError: with all that is wrong, and where in the file.
        """
        try:
            return make_checked(TrainConfig, options)
        except ConfigError as error:
            flat = options.flat()
            here = {name for name, value in self.values.items() if flat.get(name) == value}
            found = [self._located(each) if here.issuperset(each.names) else each for each in error.mistakes]
            raise ConfigError(found) from None

    def _located(self, mistake: Mistake) -> Mistake:
        lines = [self.lines[name] for name in mistake.names if name in self.lines]
        where = f"{self.path}, line {lines[0]}" if lines else str(self.path)
        return Mistake(f"{where}: {mistake.text}", mistake.names)


def read_config(path: str | Path) -> TrainConfig:
    """The config in a file, complete and checked.

    Raises:
        EmbtuneError: it cannot be used; the message has all that is wrong with it.
    """
    file = ConfigFile.read(Path(path))
    file.check(())
    return file.checked(file.defaults(unchecked(TrainConfig)))


def unchecked(config_type: type[Config]) -> type[Config]:
    """The same dataclass without its checks, for options that are not complete yet."""

    def accept(_self: Any) -> None:
        """Look at nothing."""

    body = {"__post_init__": accept, "__doc__": config_type.__doc__, "__module__": config_type.__module__}
    return dataclass(frozen=True)(type(config_type.__name__, (config_type,), body))


def make_checked(config_type: type[Config], options: Any) -> Config:
    """A config from what `unchecked` of its type holds; its checks may raise."""
    return config_type(**{each.name: getattr(options, each.name) for each in fields(config_type)})  # type: ignore[arg-type]


def _build(config_type: Callable[..., Config], values: Mapping[str, Any]) -> Config:
    hints = get_type_hints(config_type)
    nested = {name: _build(hint, values) for name, hint in hints.items() if is_dataclass(hint)}  # type: ignore[arg-type]
    names = {each.name for each in fields(config_type)}  # type: ignore[arg-type]
    return config_type(**{name: value for name, value in values.items() if name in names}, **nested)


def _hints() -> dict[str, Any]:
    """The type of each key."""
    hints = {name: hint for owner in _groups(TrainConfig) for name, hint in get_type_hints(owner).items()}
    return {name: hint for name, hint in hints.items() if name not in COMMAND_OPTIONS and not is_dataclass(hint)}


def _groups(config_type: type) -> Iterator[type]:
    """The dataclass and those it nests; a file's keys know no nesting."""
    yield config_type
    for hint in get_type_hints(config_type).values():
        if is_dataclass(hint):
            yield from _groups(hint)  # type: ignore[arg-type]


def _named(data: Any) -> Any:
    """The data sets by name, also where a file gives one file or a list of them."""
    if not isinstance(data, str | list):
        return data
    return sources_by_name([data] if isinstance(data, str) else [str(source) for source in data])


def _from_folder(base: Path, key: str, value: Any) -> Any:
    """A value whose relative paths, which start from `base`, start from the working directory instead."""
    if key == "output":
        return base / Path(value).expanduser()
    if key in (*_SOURCES, "eval_train_data"):
        return {name: _source_from(base, source) for name, source in value.items()}
    if key == "model":
        return _source_from(base, value)
    if key == "loss_args" and isinstance(value.get("guide"), str):
        return {**value, "guide": _source_from(base, value["guide"])}
    return value


def _source_from(base: Path, source: str) -> str:
    """A path from `base`; what is neither there nor looks like one is a name on the Hub."""
    path = base / Path(source).expanduser()
    return str(path) if path.exists() or looks_like_path(source) else source


def _entries(path: Path) -> list[tuple[yaml.Node, yaml.Node]]:
    text = decoded_text(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ArgumentError(f"{_place(path, error)}: {_about(error)}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ArgumentError(f"{path} holds no keys. Write one `key: value` a line, such as `model: path/to/model`.")
    entries: list[tuple[yaml.Node, yaml.Node]] = root.value
    return entries


def _plain(node: yaml.Node) -> Any:
    try:
        return yaml.constructor.SafeConstructor().construct_document(node)
    except yaml.YAMLError as error:
        raise ArgumentError(_about(error)) from error
    except ValueError as error:
        raise ArgumentError(f"{error}.") from error


def _place(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)


def _about(error: yaml.YAMLError) -> str:
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return f"this is no YAML that can be read: {what}."
