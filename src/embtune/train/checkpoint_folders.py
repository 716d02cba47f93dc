"""The Trainer's checkpoint folders: their names, and which were written to their end."""

import json
import re
import shutil
import zipfile
from pathlib import Path

from embtune.errors import ArgumentError
from embtune.files import read_json

# As transformers calls them; not imported from there, because a command can then refuse a folder at once.
PREFIX_CHECKPOINT_DIR = "checkpoint"
TRAINER_STATE_NAME = "trainer_state.json"
# As `files.atomic_folder` calls a checkpoint, and what is saved into it, before it is whole.
_UNFINISHED = re.compile(
    rf"\.{PREFIX_CHECKPOINT_DIR}-\d+\.(?!previous)\w{{8}}|\.\.{PREFIX_CHECKPOINT_DIR}-\d+\.\w{{8}}\.\w{{8}}"
)


def is_checkpoint_name(folder: str | Path) -> bool:
    """Whether a folder is named as the Trainer names its checkpoints: `checkpoint-` and a step."""
    prefix, _, step = Path(folder).name.rpartition("-")
    return prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal()


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, and none of its files was cut off since.

    The Trainer writes its state last, after weights and optimizer; a full disk or a broken copy cuts off others.
    """
    try:
        read_json(checkpoint / TRAINER_STATE_NAME)
        return all(map(_is_complete, checkpoint.rglob("*")))
    except (OSError, ValueError):  # JSON and UTF-8 that are none are such
        return False


def _is_complete(file: Path) -> bool:
    if file.suffix in (".pt", ".pth"):
        return zipfile.is_zipfile(file)  # as PyTorch writes them: what a zip file holds is listed at its end
    return file.suffix != ".safetensors" or _has_all_tensors(file)


def _has_all_tensors(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says: 8 bytes, the header's length, and then the tensors."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        length = file.stat().st_size - 8 - size
        if length < 0:
            return False
        header = json.loads(opened.read(size))
    ends = [each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"]
    return length == max(ends, default=0)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps after which a checkpoint was saved, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def last_whole_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run; one that was cut off is passed over.

    Raises:
        ArgumentError: the run has none.
    """
    numbered = filter(is_checkpoint_name, run.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    newest_first = sorted(numbered, key=step_of, reverse=True)
    newest = next(filter(is_whole, newest_first), None)
    if newest is None:
        raise ArgumentError(
            f"There is nothing to resume: {run} holds no whole checkpoint. Start a new run in another folder."
        )
    return newest


def remove_unfinished(run: Path) -> None:
    """Remove what a process that was killed while it saved a checkpoint has left; no other may be saving one."""
    for folder in run.glob(f".*{PREFIX_CHECKPOINT_DIR}-*"):
        if _UNFINISHED.fullmatch(folder.name):
            shutil.rmtree(folder)
