"""The Trainer's checkpoint folders: their names, and which were written to their end."""

import json
import re
import shutil
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
    """Whether a checkpoint was written to its end: the Trainer writes its state last, after weights and optimizer."""
    try:
        read_json(checkpoint / TRAINER_STATE_NAME)
    except (OSError, json.JSONDecodeError):
        return False
    return True


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps after which a checkpoint was saved, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def last_whole_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run that was written to its end; one cut off in the middle is passed over.

    Raises:
        ArgumentError: the run has none.
    """
    numbered = [
        (step_of(folder), folder)
        for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if is_checkpoint_name(folder) and is_whole(folder)
    ]
    if not numbered:
        raise ArgumentError(
            f"There is nothing to resume: {run} holds no whole checkpoint. Start a new run in another folder."
        )
    return max(numbered)[1]


def remove_unfinished(run: Path) -> None:
    """Remove what a process that was killed while it saved a checkpoint has left; no other may be saving one."""
    for folder in run.glob(f".*{PREFIX_CHECKPOINT_DIR}-*"):
        if _UNFINISHED.fullmatch(folder.name):
            shutil.rmtree(folder)
