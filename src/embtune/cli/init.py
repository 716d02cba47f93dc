"""`embtune init`: a config for `embtune train` that explains every key, with the user's own columns in it."""

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from docstring_parser import parse_from_object
from rich.console import Console
from rich.table import Table
from rich.text import Text

from embtune.cli.data_config import InitConfig
from embtune.cli.display import make_console, print_commands, working
from embtune.cli.loss_data import check_columns, check_labels
from embtune.cli.train_config import COMMAND_OPTIONS, TrainConfig
from embtune.cli.train_details import SECTIONS
from embtune.data.columns import LABEL_ROLES, ColumnRoles
from embtune.data.readers import read_dataset, read_raw
from embtune.data.recognise import RecognisedColumns, recognise_columns
from embtune.data.same_text import shortened
from embtune.errors import DataError
from embtune.files import write_text

_SAMPLE = 1_000  # rows from which roles are recognised
_SHOWN = 2
_CONFIRM = "CONFIRM: the names do not tell the roles; these are a guess. Correct them where they are wrong."


def run_init(config: InitConfig, console: Console | None = None) -> int:
    """Read the data, write the config, show how the columns were understood, and return the exit code.

    Raises:
        EmbtuneError: the data cannot be trained on; nothing is written then.
    """
    console = console or make_console()
    with working(console, f"Reading {config.data}"):
        found = _recognise(config)
        try:
            rows = read_dataset(config.data, columns=found.roles)
        except DataError as error:
            remedy = f"embtune check {shlex.quote(str(config.data))} --fix"
            raise DataError(f"{error} {remedy} writes a copy without such rows.") from error
    settings = _settings(config, found, rows)
    check_columns(settings["loss"], config.data, rows)
    check_labels(settings["loss"], {}, config.data, rows)
    samples = _samples(rows)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.out, (f"{line}\n" for line in _lines(found, settings, samples, len(rows))))
    _show(found, samples, console)
    console.print(f"\nSaved {config.out}.", style="bold green", soft_wrap=True)
    if found.guessed:
        console.print(f"Look at columns in it before you train. {_CONFIRM}", style="bold yellow", soft_wrap=True)
    print_commands(console, [("Train with it:", f"embtune train {shlex.quote(str(config.out))}")])
    return 0


def _recognise(config: InitConfig) -> RecognisedColumns:
    sample = [row for _, row in islice(read_raw(config.data).rows, _SAMPLE)]
    if not config.columns:
        return recognise_columns(sample, config.data)
    names = list(sample[0]) if sample else []
    roles = dict(ColumnRoles.from_names(names, config.columns, config.data))
    return RecognisedColumns(roles, tuple(name for name in names if name not in roles), guessed=False)


def _settings(config: InitConfig, found: RecognisedColumns, rows: Dataset) -> dict[str, Any]:
    """The keys that are written in force; all others show their default as a comment."""
    # The paths of a config start from its own folder.
    settings: dict[str, Any] = {name: _from_folder_of(config.out, getattr(config, name)) for name in ("model", "data")}
    if found.unused or found.guessed or config.columns:
        settings["columns"] = dict(found.roles)
    settings["output"] = str(TrainConfig.output)
    settings["batch_size"] = min(TrainConfig.batch_size, len(rows))
    labelled = any(name in LABEL_ROLES for name in rows.column_names)
    if not labelled:
        settings["loss"] = TrainConfig.loss
    elif len(rows.column_names) == 2:
        settings |= {"loss": "BatchAllTripletLoss", "batch_sampler": "group_by_label"}
    else:
        settings["loss"] = "CoSENTLoss" if len(rows.column_names) == 3 else "MarginMSELoss"
    return settings


def _from_folder_of(file: Path, source: str) -> str:
    path = Path(source).expanduser()
    return source if path.is_absolute() or not path.exists() else os.path.relpath(path, file.parent)


def _samples(rows: Dataset) -> list[dict[str, str]]:
    """The first rows, in a form that fits a line of YAML comment whatever the texts hold."""
    return [
        {role: repr(shortened(cell) if isinstance(cell, str) else cell) for role, cell in row.items()}
        for row in rows.select(range(min(_SHOWN, len(rows))))
    ]


def _lines(
    found: RecognisedColumns,
    settings: Mapping[str, Any],
    samples: list[dict[str, str]],
    rows: int,
) -> Iterator[str]:
    yield "# What `embtune train` does with this file; each key is a flag too, and flags win."
    yield "# Paths start from the folder of this file."
    yield "# A key behind a # shows its default; take the # away to change it."
    yield "#"
    yield f"# {rows:,} rows. The columns, as they are understood:"
    yield from (f"#   {name!r} is the {role}" for name, role in found.roles.items())
    yield from (f"#   {name!r} is not used" for name in found.unused)
    for number, sample in enumerate(samples, 1):
        yield f"# Row {number}:"
        yield from (f"#   {role}: {text}" for role, text in sample.items())
    yield ""
    yield from _keys(TrainConfig, settings, _CONFIRM if found.guessed else None)
    for owner in SECTIONS.values():
        yield f"# Less common: {owner.__doc__}"
        yield ""
        yield from _keys(owner, settings, None)


def _keys(owner: type, settings: Mapping[str, Any], about_columns: str | None) -> Iterator[str]:
    documented = {each.arg_name: each.description for each in parse_from_object(owner).params}
    for field in fields(owner):
        if field.name in (*COMMAND_OPTIONS, "more"):
            continue
        yield from (f"# {line.strip()}" for line in str(documented[field.name]).splitlines())
        if field.name == "columns" and about_columns is not None:
            yield f"# {about_columns}"
        mark = "" if field.name in settings else "# "
        yield from (mark + line for line in _as_yaml(field.name, settings.get(field.name, _default(field))))
        yield ""


def _default(field: Field) -> Any:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _as_yaml(name: str, value: Any) -> list[str]:
    return yaml.safe_dump({name: value}, allow_unicode=True, sort_keys=False, width=10_000).splitlines()


def _show(found: RecognisedColumns, samples: list[dict[str, str]], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("column", "role", *(f"row {number}" for number in range(1, len(samples) + 1))):
        table.add_column(heading, overflow="fold")
    for name, role in found.roles.items():
        table.add_row(Text(name), role, *(Text(sample[role]) for sample in samples))
    for name in found.unused:
        table.add_row(Text(name), Text("not used", "dim"))
    console.print(table)
