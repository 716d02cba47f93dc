"""Writing folders and files so that a reader sees either the old state or the whole new one."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embtune.errors import ArgumentError


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`, which becomes `target` in one step once the block ends well.

    On any exception nothing of `target` changes and the temporary folder is removed. Where `target` exists, its entries
    of the same name are replaced one by one at the end, and others stay, as with an ordinary save into a folder.

    Raises:
        ArgumentError: `target` exists and is a file.
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise ArgumentError(f"{target} is a file; give a folder to save into.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        # mkdtemp makes the folder private; a saved model has the permissions of any other new folder.
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)
        yield staging
        if target.exists():
            for entry in staging.iterdir():
                _replace(entry, target / entry.name)
        else:
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(source: Path, destination: Path) -> None:
    # os.replace swaps files in one step but refuses a folder that is not empty.
    if destination.is_dir() and not destination.is_symlink():
        shutil.rmtree(destination)
    os.replace(source, destination)


def read_json(path: str | Path) -> Any:
    """Parse a UTF-8 JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON with a final newline."""
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
