"""`embtune cache`: what is kept of earlier runs' tokenising, and less of it."""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from embtune.cli.config import CacheConfig
from embtune.cli.display import make_console
from embtune.cli.flags import bytes_of, seconds_of
from embtune.data.token_cache import VARIABLE, Entry, TokenCache
from embtune.errors import ArgumentError


def run_cache(config: CacheConfig, console: Console | None = None) -> int:
    """Remove what the config says, show what is left, and return the exit code.

    Raises:
        ArgumentError: the cache cannot be read.
        OSError: an entry cannot be removed.
    """
    console = console or make_console()
    cache = TokenCache.default()
    _check_readable(cache.folder)
    removed: list[Entry] = []
    if config.action == "clear":
        removed = cache.clear()
    elif config.max_size or config.max_age:
        removed = cache.prune(
            max_bytes=bytes_of("max_size", config.max_size) if config.max_size else math.inf,
            max_age=seconds_of("max_age", config.max_age) if config.max_age else math.inf,
        )
    if removed:
        console.print(f"Removed {_described(removed)}.")
    entries = cache.entries()
    if not entries:
        console.print(f"The token cache in {cache.folder} is empty.", soft_wrap=True)
        return 0
    console.print(_table(entries))
    console.print(f"{_described(entries)} in {cache.folder}", soft_wrap=True)
    return 0


def _check_readable(folder: Path) -> None:
    try:
        with os.scandir(folder):
            return
    except FileNotFoundError:  # nothing was kept yet
        return
    except OSError as error:
        raise ArgumentError(
            f"The token cache in {folder} cannot be read: {error.strerror}. Put that right, or name another folder in "
            f"the environment variable {VARIABLE}."
        ) from error


def _described(entries: Sequence[Entry]) -> str:
    columns = "1 column" if len(entries) == 1 else f"{len(entries):,} columns"
    return f"{columns} of texts, {_size(sum(entry.bytes for entry in entries))}"


def _table(entries: Sequence[Entry]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("texts", "size", "last used"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("tokenizer", overflow="fold")
    table.add_column("up to", justify="right", no_wrap=True)
    table.add_column("prompt", overflow="ellipsis", no_wrap=True)
    now = time.time()
    for entry in reversed(entries):
        known = (entry.facts or {}).get
        table.add_row(
            known("texts", "?"),
            _size(entry.bytes),
            _age(now - entry.used),
            known("tokenizer", "damaged; the next run that needs it makes it anew"),
            f"{known('max_length')} tokens" if entry.facts else "",
            known("prompt", ""),
        )
    return table


def _size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def _age(seconds: float) -> str:
    for unit, length in (("days", 24 * 3600), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
