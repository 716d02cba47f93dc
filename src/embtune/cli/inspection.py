"""What a folder is, what it holds and what is wrong with it, found out without loading PyTorch or a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embtune.cli.gguf_head import read_gguf_head
from embtune.cli.model_folder import ModelFolder
from embtune.errors import ArgumentError
from embtune.report.events import EVENTS
from embtune.report.run import Run, read_run

_MODEL_FILES = ("modules.json", "config.json", "adapter_config.json")
_GGUF_POOLING = {0: "none", 1: "mean", 2: "cls", 3: "lasttoken", 4: "rank"}


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    path: Path
    """The folder or file."""
    kind: str
    """What it is, in words."""
    facts: dict[str, Any]
    """What it holds, ready for JSON."""
    problems: tuple[str, ...]
    """What is wrong, each with what to do."""

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {"path": str(self.path), "kind": self.kind, **self.facts, "problems": list(self.problems)}


def inspect_path(path: Path) -> Inspection:
    """Find out what a folder or a GGUF file is.

    Raises:
        ArgumentError: there is nothing there, or nothing that embtune knows.
    """
    path = path.expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path)
    if not path.is_dir():
        what = "is no folder and no .gguf file" if path.exists() else "is not there"
        raise ArgumentError(f"{path} {what}. Give the folder of a model, an adapter or a run.")
    if (path / EVENTS).exists() or (path / "run.json").exists():
        return _run(path)
    if any((path / name).exists() for name in _MODEL_FILES):
        model = ModelFolder(path)
        kind = model.read()
        return Inspection(path, kind, model.facts, tuple(model.problems))
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _gguf(files[0])
    if files:
        return Inspection(path, "GGUF files", {"holds": {file.name: "GGUF file" for file in files}}, ())
    held = _held(path)
    if not held:
        raise ArgumentError(f"{path} holds no model, adapter, run or GGUF file.")
    return Inspection(path, "folder of models", {"holds": held}, ())


def _run(path: Path) -> Inspection:
    run = read_run(path)
    held = _held(path) | _held(path / "checkpoints", "checkpoints/")
    facts = {
        "state": run.state,
        "command": run.command,
        "base_model": run.settings.get("model"),
        "steps": f"{run.step} of {run.steps}" if run.steps else None,
        "measured": _measured(run),
        "holds": held,
    }
    return Inspection(path, "run", facts, tuple(_problems_of_run(run, path)))


def _measured(run: Run) -> dict[str, str]:
    task = next((each for each in run.comparisons if each["role"] == "task"), None)
    changes = task["metrics"] if task else {}
    return {
        metric: f"{change['before']:.4f} -> {change['after']:.4f} ({change['verdict']})"
        for metric, change in changes.items()
    }


def _problems_of_run(run: Run, path: Path) -> list[str]:
    problems = []
    if run.state == "failed":
        problems.append(f"The run failed: {run.error}")
    if run.state in ("interrupted", "stalled"):
        remedy = f"Go on with: embtune train --resume {path}" if run.command == "train" else "Start it again."
        problems.append(f"The run is {run.state}. {remedy}")
    if run.damaged:
        problems.append(f"{run.damaged} lines of {EVENTS} cannot be read and are passed over.")
    gone = [
        each for each in run.exports if not (Path(each["path"]).exists() or (path / Path(each["path"]).name).exists())
    ]
    return problems + [f"The export {each['format']} is not at {each['path']} any more." for each in gone]


def _held(folder: Path, prefix: str = "") -> dict[str, str]:
    """The models within a folder, each with what it is."""
    found = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
            found[prefix + path.name] = "GGUF"
        elif any((path / name).exists() for name in _MODEL_FILES):
            found[prefix + path.name] = ModelFolder(path).read()
    return found


def _gguf(path: Path) -> Inspection:
    from gguf import GGMLQuantizationType  # with NumPy, which no other folder needs

    try:
        head = read_gguf_head(path)
        dtypes = {GGMLQuantizationType(kind).name: count for kind, count in head.numbers.items()}
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} cannot be read as GGUF: {error}. Export or download it again.") from error
    value = head.values.get
    name = value("general.architecture")
    pooling = value(f"{name}.pooling_type")
    facts = {
        "architecture": name,
        "layers": value(f"{name}.block_count"),
        "dimensions": value(f"{name}.embedding_length"),
        "max_seq_length": value(f"{name}.context_length"),
        "pooling": None if pooling is None else _GGUF_POOLING.get(pooling, str(pooling)),
        "weights": {
            "numbers": sum(dtypes.values()),
            "dtypes": dtypes,
            "bytes": path.stat().st_size,
        },
    }
    problems = [] if pooling is not None else ["It names no pooling; give llama.cpp's --pooling yourself."]
    return Inspection(path, "GGUF file", facts, tuple(problems))
