"""The event file of a run: one line of JSON for each thing that happens, appended while the run goes on.

Every event has its name (`event`) and the time (`time`, seconds since 1970). Lines are only ever appended, so a reader
may look at any moment; a line that was cut off by a kill is passed over. Numbers that JSON lacks (NaN, infinities) are
written as text.
"""

import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from embtune.errors import EmbtuneError, EmbtuneWarning
from embtune.report.alive import this_process

EVENTS = "events.jsonl"
"""Name of the file within a run's folder."""

FORMAT = 1
"""Raised when older readers would misread what newer runs write."""


class EventLog:
    """Appends to the event file of a run. A disk that fails ends the log with a warning, and not the run.

    Args:
        folder: the run's folder, made with the first event; None keeps no file.
        resume: go on behind the events that are there, instead of replacing them.
        echo: gets each line, too.
    """

    def __init__(self, folder: str | Path | None, *, resume: bool = False, echo: TextIO | None = None) -> None:
        self.path = None if folder is None else Path(folder) / EVENTS
        self._keep = resume
        self._echo = echo
        self._begun = False
        self._failed = False

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; `fields` are anything that JSON holds, paths and NumPy numbers."""
        line = json.dumps(_plain({"event": event, "time": time.time(), **fields}), ensure_ascii=False)
        if self._echo is not None:
            print(line, file=self._echo, flush=True)
        if self.path is None or self._failed:
            return
        try:
            if not self._begun:
                self._begin(self.path)
            with self.path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(line + "\n")
        except OSError as error:
            self._failed = True
            warnings.warn(
                f"{self.path} cannot be written ({error}); the run goes on, its report will end here.",
                EmbtuneWarning,
                stacklevel=2,
            )

    def phase(self, what: str) -> None:
        """Note what the run does from now on, such as `Measuring the model as it is`."""
        self.write("phase", what=what)

    @contextmanager
    def run(self, command: str, settings: Mapping[str, Any], machine: Mapping[str, str]) -> Iterator[None]:
        """Write how the run began and how it ended: `finished`, `interrupted` (Ctrl-C), or `failed` with the reason."""
        process = this_process()
        self.write("run", format=FORMAT, command=command, settings=settings, machine=machine, process=process)
        try:
            yield
        except KeyboardInterrupt:
            self.write("interrupted")
            raise
        except BaseException as error:
            self.write("failed", error=str(error) if isinstance(error, EmbtuneError) else repr(error))
            raise
        self.write("finished")

    def _begin(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._keep:
            path.write_text("", encoding="utf-8")
        elif path.exists() and not path.read_bytes().endswith(b"\n"):
            # A killed run may have left half a line; the next event must not be glued to it.
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
        self._begun = True


def read_events(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """All events of a file in order, and how many of its lines are damaged.

    The last line does not count as damaged: it may be on its way to the disk.

    Raises:
        OSError: the file cannot be read.
    """
    lines = Path(path).read_bytes().split(b"\n")
    events, damaged = [], 0
    for number, line in enumerate(lines, 1):
        event = _parse(line)
        if event is not None:
            events.append(event)
        elif line.strip() and number < len(lines):
            damaged += 1
    return events, damaged


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:  # of JSON and of UTF-8
        return None
    return event if isinstance(event, dict) and "event" in event and "time" in event else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # of NumPy or PyTorch
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)
