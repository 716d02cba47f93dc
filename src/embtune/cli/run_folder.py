"""The folder of a training run: run.json, results.json, checkpoints, and one entry for each export."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embtune.errors import ArgumentError
from embtune.files import atomic_folder, read_json, write_json
from embtune.train.checkpoints import last_whole_checkpoint

_SETTINGS = "run.json"
_RESULTS = "results.json"


@dataclass(frozen=True)
class RunFolder:
    """Where a run puts everything."""

    path: Path
    """The folder; it need not exist."""

    @property
    def checkpoints(self) -> Path:
        """Where the trainer puts its checkpoints."""
        return self.path / "checkpoints"

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
        elif self.checkpoints.exists() or (self.path / _RESULTS).exists():
            raise ArgumentError(
                f"output={self.path} holds an earlier run. Give another folder, or go on with that run by --resume."
            )

    def changed_options(self, options: Mapping[str, Any]) -> list[str]:
        """Names of the options that differ from those the run began with."""
        before = read_json(self.path / _SETTINGS)["config"]
        return [name for name, value in options.items() if name in before and before[name] != value]

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write run.json, whole or not at all."""
        self._write(_SETTINGS, settings)

    def write_results(self, results: Mapping[str, Any]) -> Path:
        """Write results.json, whole or not at all, and return its path."""
        self._write(_RESULTS, results)
        return self.path / _RESULTS

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        with atomic_folder(self.path) as staging:
            write_json(staging / name, value)

    @contextmanager
    def without_remains(self) -> Iterator[None]:
        """If the block ends before there is a checkpoint or a result, leave nothing of it."""
        existed, had_settings = self.path.exists(), (self.path / _SETTINGS).exists()
        try:
            yield
        finally:
            with suppress(OSError):  # it is not there, or holds checkpoints
                self.checkpoints.rmdir()
            if not (had_settings or self.checkpoints.exists() or (self.path / _RESULTS).exists()):
                (self.path / _SETTINGS).unlink(missing_ok=True)
            if not existed:
                with suppress(OSError):  # it holds something
                    self.path.rmdir()
