"""The folder of a training run: run.json, results.json, checkpoints, and one entry for each export."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from embtune.errors import ArgumentError
from embtune.files import atomic_folder, read_json, write_json
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
            ArgumentError: it is a file, or holds another run; or there is nothing to resume.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ArgumentError(f"output={self.path} is a file; give a folder.")
        if resume and not (self.path / _SETTINGS).exists():
            raise ArgumentError(
                f"resume: {self.path} holds no run. Name its folder by --output, or leave --resume out."
            )
        if resume:
            last_whole_checkpoint(self.checkpoints)
        elif self.resumable or (self.path / _RESULTS).exists():
            raise ArgumentError(
                f"output={self.path} holds an earlier run. Give another folder, or go on with that run by --resume."
            )

    def changed_options(self, options: Mapping[str, Any]) -> list[str]:
        """Names of the options that differ from those the run began with."""
        before = read_json(self.path / _SETTINGS)["config"]
        return [name for name, value in options.items() if name not in _OF_THE_COMMAND and before.get(name) != value]

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write run.json, whole or not at all."""
        self._write(_SETTINGS, settings)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write results.json, whole or not at all."""
        self._write(_RESULTS, results)

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        with atomic_folder(self.path) as staging:
            write_json(staging / name, value)

    @contextmanager
    def without_remains(self) -> Iterator[None]:
        """If the block ends before there is a checkpoint or a result, leave nothing of it."""
        settings = self.path / _SETTINGS
        had_folder, had_checkpoints, had_settings = self.path.exists(), self.checkpoints.exists(), settings.exists()
        try:
            yield
        finally:
            if not self.resumable and not (self.path / _RESULTS).exists():
                if not had_checkpoints:
                    shutil.rmtree(self.checkpoints, ignore_errors=True)
                if not had_settings:
                    settings.unlink(missing_ok=True)
            if not had_folder:
                with suppress(OSError):  # it is not there, or holds something
                    self.path.rmdir()
