"""What the commands show: on a terminal with colours and moving parts, elsewhere as plain lines for a log."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from embtune.report.events import EventLog

LOG_WIDTH = 120


def make_console(*, quiet: bool = False) -> Console:
    """A console on standard output; text is shown as it is, brackets and all.

    Args:
        quiet: show nothing.
    """
    console = Console(markup=False, highlight=False, quiet=quiet)
    return console if console.is_terminal else Console(markup=False, highlight=False, width=LOG_WIDTH, quiet=quiet)


@contextmanager
def working(console: Console, what: str, log: EventLog | None = None) -> Iterator[None]:
    """Show that `what` is under way, and how long it took; `log` is told that it begins."""
    if log is not None:
        log.phase(what)
    start = time.perf_counter()
    if console.is_terminal and not console.quiet:
        with console.status(Text(f"{what} ...")):
            yield
    else:
        console.print(f"{what} ...")
        yield
    console.print(f"{what}: {duration(time.perf_counter() - start)}", style="dim")


def duration(seconds: float) -> str:
    """Seconds as people say them: `8.2 s`, `4 min 05 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min"


def size(number: float) -> str:
    """Bytes as people say them: `3.2 GB`, `40 MB`."""
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


def print_commands(console: Console, commands: Sequence[tuple[str, str]]) -> None:
    """Print (what for, command) pairs; commands stay on one line so that they can be copied."""
    for purpose, command in commands:
        console.print(f"\n{purpose}", style="bold")
        console.print(f"  {command}", soft_wrap=True)
