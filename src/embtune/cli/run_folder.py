"""The folder of a training run: run.json, results.json, checkpoints, and one entry for each export."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from embtune.cli.places import check_place
from embtune.errors import ArgumentError
from embtune.files import read_json, write_json
from embtune.report.events import EVENTS
from embtune.train.checkpoints import is_whole, last_whole_checkpoint

_SETTINGS = "run.json"
_RESULTS = "results.json"
_OF_THE_COMMAND = ("resume", "config")  # options that say nothing about the run itself


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
            ArgumentError: it cannot be written, or holds another run; or there is nothing to resume.
        """
        check_place("output", self.path)
        if resume and not (self.path / _SETTINGS).exists():
            raise ArgumentError(
                f"resume: {self.path} holds no run. Name its folder by --output, or leave --resume out."
            )
        if resume:
            self._first_options()
            last_whole_checkpoint(self.checkpoints)
        elif self.resumable or (self.path / _RESULTS).exists():
            raise ArgumentError(
                f"output={self.path} holds an earlier run. Give another folder, or go on with that run by --resume."
            )

    def changed_options(self, options: Mapping[str, Any]) -> list[str]:
        """Names of the options that differ from those the run began with."""
        before = self._first_options()
        return [name for name, value in options.items() if name not in _OF_THE_COMMAND and before.get(name) != value]

    def _first_options(self) -> Mapping[str, Any]:
        try:
            options: Mapping[str, Any] = read_json(self.path / _SETTINGS)["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                f"resume: {self.path / _SETTINGS} is not what embtune wrote there ({error}). Start a new run in "
                "another folder."
            ) from error
        return options

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write run.json, whole or not at all."""
        self._write(_SETTINGS, settings)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write results.json, whole or not at all."""
        self._write(_RESULTS, results)

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / name, value)

    @contextmanager
    def without_remains(self) -> Iterator[None]:
        """If the block ends before there is a checkpoint or a result, leave nothing of it."""
        files = [file for name in (_SETTINGS, EVENTS) if not (file := self.path / name).exists()]
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
