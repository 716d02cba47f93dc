"""`embtune inspect`: what a folder holds, and what is wrong with it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from embtune.cli.inspection import Inspection, inspect_path
from embtune.cli.lookup_config import InspectConfig

LOG_WIDTH = 120


def run_inspect(config: InspectConfig, console: Console | None = None) -> int:
    """Show what was found, and return the exit code: 1 if something is wrong.

    Raises:
        ArgumentError: there is nothing there, or nothing that embtune knows.
    """
    found = inspect_path(config.folder)
    if config.json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        _show(found, console or _console())
    return 1 if found.problems else 0


def _console() -> Console:
    console = Console(markup=False, highlight=False)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=LOG_WIDTH)


def _show(found: Inspection, console: Console) -> None:
    console.print(f"{found.path}: {found.kind}", style="bold", soft_wrap=True)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in found.facts.items():
        if value not in (None, {}, [], ""):
            table.add_row(name.replace("_", " "), Text(_worded(value)))
    console.print(table)
    for problem in found.problems:
        console.print(f"problem: {problem}", style="red", soft_wrap=True)


def _worded(value: Any) -> str:
    if isinstance(value, Mapping) and "bytes" in value:
        dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in value["dtypes"].items())
        stored = f"{value['numbers']:,} numbers ({dtypes}), {value['bytes'] / 1e6:,.1f} MB"
        if "rank" not in value:
            return stored
        targets = _worded(value["targets"])
        return f"{value['type']}, rank {value['rank']}, alpha {value['alpha']} on {targets}; {stored}"
    if isinstance(value, Mapping):
        return "\n".join(f"{name}: {_worded(item)}" for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return str(value)
