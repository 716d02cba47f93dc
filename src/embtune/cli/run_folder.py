"""The folder of a training run: run.json, results.json, checkpoints, and one entry for each export."""

import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from embtune.cli.config_file import SETTINGS
from embtune.cli.places import check_place
from embtune.cli.resuming import asks_for_more
from embtune.errors import ArgumentError
from embtune.files import read_json, write_json
from embtune.report.alive import this_process
from embtune.report.events import EVENTS
from embtune.report.run import REPORT, read_run
from embtune.train.checkpoint_folders import PREFIX_CHECKPOINT_DIR, is_whole, last_whole_checkpoint, step_of

_RESULTS = "results.json"
# Options that name files: where they are may differ from place to place, and the data's fingerprints say more.
_PATHS = ("model", "data", "eval_data", "output")


@dataclass(frozen=True)
class RunFolder:
    """Where a run puts everything."""

    path: Path
    """The folder; it need not exist."""

    @property
    def checkpoints(self) -> Path:
        """Where the trainer puts its checkpoints."""
        return self.path / "checkpoints"

    @property
    def resumable(self) -> bool:
        """Whether there is a checkpoint that was written to its end."""
        return any(map(is_whole, self.checkpoints.glob(f"{PREFIX_CHECKPOINT_DIR}-*")))

    def check(self, resume: bool) -> None:
        """Raise unless a run can begin, or go on, in the folder.

        Raises:
            ArgumentError: it cannot be written, holds another run, or one that is still going on; or there is no
                checkpoint to go on from.
        """
        check_place("output", self.path)
        self._refuse_running()
        if resume:
            last_whole_checkpoint(self.checkpoints)
        elif self.resumable or (self.path / _RESULTS).exists():
            raise ArgumentError(
                f"output={self.path} holds an earlier run. Give another folder, or go on with that run by --resume "
                f"{shlex.quote(str(self.path))}."
            )

    def _refuse_running(self) -> None:
        if not (self.path / EVENTS).exists():
            return
        run, here = read_run(self.path), this_process()
        # The run of a process that has ended counts as killed; of other machines nothing is known.
        alive = run.running and run.process.get("place") == here["place"] and run.process["pid"] != here["pid"]
        if alive:
            raise ArgumentError(
                f"output={self.path}: its run is still going on, in process {run.process['pid']}. Wait for its end, or "
                f"end it (kill {run.process['pid']} saves a checkpoint first)."
            )

    def finished(self, options: Mapping[str, Any]) -> bool:
        """Whether there is nothing left to go on with: the run reached its end, and no other number of steps is asked.

        Raises:
            ArgumentError: the run's files cannot be read.
        """
        if not (self.path / _RESULTS).exists() or read_run(self.path).state != "finished":
            return False
        return not asks_for_more(self.settings["config"], options)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What run.json holds."""
        settings: Mapping[str, Any] = read_json(self.path / SETTINGS)
        return settings

    def check_data(self, fingerprints: Mapping[str, str]) -> None:
        """Raise if the run began with other data.

        Raises:
            ArgumentError: a data set's rows differ from those of the first start.
        """
        before = self.settings.get("data", {})
        for name, fingerprint in fingerprints.items():
            if before.get(name, fingerprint) != fingerprint:
                raise ArgumentError(
                    f"resume: the rows of {name!r} are not those that {self.path} began with. Put them back, or start "
                    "a new run in another folder."
                )

    def changed_options(self, options: Mapping[str, Any]) -> list[str]:
        """Names of the options that differ from those the run began with."""
        before = self.settings["config"]
        return [name for name, value in options.items() if name not in _PATHS and before.get(name) != value]

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write run.json, whole or not at all."""
        self._write(SETTINGS, settings)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write results.json, whole or not at all."""
        self._write(_RESULTS, results)

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / name, value)

    def say_stopped(self, console: Console) -> None:
        """Say what a signal has left of the run, and how to go on; on standard error where the console is quiet."""
        left = f"Nothing was left in {self.path}."
        if self.resumable:
            step = step_of(last_whole_checkpoint(self.checkpoints))
            left = f"Saved at step {step}. To go on: embtune train --resume {shlex.quote(str(self.path))}"
        self._say(console, f"Stopped. {left}")

    def say_finished(self, console: Console, options: Mapping[str, Any]) -> None:
        """Say that the run is at its end, and where its results are; on standard error where the console is quiet."""
        run, results = read_run(self.path), read_json(self.path / _RESULTS)
        when = "" if run.last is None else f" on {datetime.fromtimestamp(run.last):%Y-%m-%d at %H:%M}"
        steps = results["training"]["steps"]
        said = f"The run in {self.path} is finished: {steps:,} steps, done{when}. Nothing was done again."
        if changed := self.changed_options(options):
            said += f" Now given, and without effect on it: {', '.join(changed)}; start a new run in another folder."
        exports = "".join(f"\n  {name:<8} {folder}" for name, folder in results.get("exports", {}).items())
        self._say(console, f"{said}\n  results  {self.path / _RESULTS}\n  page     {self.path / REPORT}{exports}")

    @staticmethod
    def _say(console: Console, text: str) -> None:
        if console.quiet:
            print(text, file=sys.stderr)
        else:
            console.print(f"\n{text}", style="yellow", soft_wrap=True)

    @contextmanager
    def without_remains(self) -> Iterator[None]:
        """If the block ends before there is a checkpoint or a result, leave nothing of it."""
        files = [file for name in (SETTINGS, EVENTS) if not (file := self.path / name).exists()]
        had_folder, had_checkpoints = self.path.exists(), self.checkpoints.exists()
        try:
            yield
        finally:
            if not self.resumable and not (self.path / _RESULTS).exists():
                if not had_checkpoints:
                    shutil.rmtree(self.checkpoints, ignore_errors=True)
                for file in files:
                    file.unlink(missing_ok=True)
            if not had_folder:
                with suppress(OSError):  # it is not there, or holds something
                    self.path.rmdir()
