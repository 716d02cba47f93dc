"""Writing folders and files so that a reader sees either the old state or the whole new one."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embtune.errors import ArgumentError


def _none(_: Path) -> Collection[str]:
    return ()


@contextmanager
def atomic_folder(target: str | Path, replaces: Callable[[Path], Collection[str]] = _none) -> Iterator[Path]:
    """Yield an empty folder beside `target`, which becomes `target` in one step once the block ends well.

    On any exception `target` stays as it was and the temporary folder is removed. Where `target` exists, it is renamed
    to `.NAME.previous` beside itself, the new folder takes its name, and entries that the new one lacks are moved over.
    Killed between the two renames, the old folder is whole under `.NAME.previous`; the next save brings it back first.

    A folder that cannot be renamed (a mount point, one whose parent cannot be written, one that holds the current
    folder) gets its entries replaced one by one instead.

    Args:
        target: the folder to write.
        replaces: given the old folder, the names in it that are not moved over although the new one may lack them.

    Raises:
        ArgumentError: `target`, or what should be a folder above it, is a file.
    """
    target = Path(target).resolve()
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise ArgumentError(f"{path} is a file; give a folder to save into.")
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target, replaces)
    fixed = target.exists() and _is_fixed(target)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target if fixed else target.parent))
    try:
        staging.chmod(target.stat().st_mode if target.exists() else 0o777 & ~_umask())
        yield staging
        _give_usual_modes(staging)
        if fixed:
            _replace_entries(staging, target, replaces)
        elif target.exists():
            _swap(staging, target, replaces)
        else:
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def atomic_files(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder whose files are moved into `folder` once the block ends well; files of the same name are
    replaced, each in one step, and others stay. On any exception `folder` is as it was, or not there.

    Raises:
        ArgumentError: `folder` exists and is a file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        with atomic_folder(folder) as staging:
            yield staging
        return
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as inside:
        yield Path(inside)
        for file in Path(inside).iterdir():
            file.replace(folder / file.name)


def _give_usual_modes(folder: Path) -> None:
    """Let files be read by whoever may read the user's files; some writers make theirs as private as temporary ones."""
    usual = 0o666 & ~_umask()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | usual)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _is_fixed(target: Path) -> bool:
    return target.is_mount() or Path.cwd().is_relative_to(target) or not os.access(target.parent, os.W_OK)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _recover(target: Path, replaces: Callable[[Path], Collection[str]]) -> None:
    """Finish what a process that was killed while swapping has left."""
    previous = _previous(target)
    if not previous.exists():
        return
    if target.exists():
        _move_over(previous, target, replaces)
    else:
        previous.rename(target)


def _swap(staging: Path, target: Path, replaces: Callable[[Path], Collection[str]]) -> None:
    previous = _previous(target)
    target.rename(previous)
    try:
        staging.rename(target)
    finally:
        if not target.exists():
            previous.rename(target)
    _move_over(previous, target, replaces)


def _move_over(previous: Path, target: Path, replaces: Callable[[Path], Collection[str]]) -> None:
    dropped = replaces(previous)
    for entry in previous.iterdir():
        if entry.name not in dropped and not (target / entry.name).exists():
            entry.rename(target / entry.name)
    shutil.rmtree(previous)


def _replace_entries(staging: Path, target: Path, replaces: Callable[[Path], Collection[str]]) -> None:
    written = {entry.name for entry in staging.iterdir()}
    for entry in [entry for entry in target.iterdir() if entry.name in written.union(replaces(target))]:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name not in written:
            entry.unlink()
    for name in written:
        os.replace(staging / name, target / name)


def read_json(path: str | Path) -> Any:
    """Parse a UTF-8 JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON with a final newline; a file that is there is replaced in one step."""
    write_text(path, [json.dumps(value, indent=2, ensure_ascii=False), "\n"])


def write_json_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one UTF-8 JSON object a line, as they come; a file that is there is replaced in one step."""
    write_text(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: str | Path, parts: Iterable[str]) -> None:
    """Write UTF-8 text, part by part; a file that is there is replaced in one step, and on any exception kept."""
    path = Path(path)
    staging = path.with_name(f".{path.name}.part")
    try:
        with staging.open("w", encoding="utf-8", newline="") as file:
            file.writelines(parts)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
