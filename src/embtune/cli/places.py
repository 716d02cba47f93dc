"""Where a command writes: checked before the work that leads there."""

import tempfile
from pathlib import Path

from embtune.errors import ArgumentError

DATA_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""How files of rows end; `data.formats` reads each."""


def check_place(option: str, folder: Path) -> None:
    """Raise unless `folder` is a folder, or can be made.

    Args:
        option: the option that names it, for the message.

    Raises:
        ArgumentError: it is a file, or lies below one, or below a folder that must not be written.
    """
    path = folder.expanduser().absolute()
    existing = next(place for place in (path, *path.parents) if place.exists())
    if not existing.is_dir():
        where = "is a file" if existing == path else f"cannot be made, because {existing} is a file"
        raise ArgumentError(f"{option}={folder} {where}; give a folder.")
    try:  # permissions do not tell: of /proc, or of a file system that is read-only, they promise too much
        with tempfile.TemporaryDirectory(prefix=".embtune-", dir=existing):
            pass
    except OSError as error:
        raise ArgumentError(
            f"{option}={folder}: nothing can be made in {existing} ({error.strerror}). Give another folder."
        ) from error


def check_new_file(option: str, file: Path, ending: str, *sources: str | None) -> None:
    """Raise unless `file` can be written, and is none of the `sources` that are read.

    Raises:
        ArgumentError: it has another ending, is a folder or one of the sources, or its folder cannot be written.
    """
    if file.suffix.lower() != ending:
        raise ArgumentError(f"{option}={file} must end in {ending}, which is what is written.")
    if file.is_dir():
        raise ArgumentError(f"{option}={file} is a folder; give a file.")
    check_place(option, file.parent)
    for source in sources:
        if source is not None and file.exists() and Path(source).exists() and file.samefile(source):
            raise ArgumentError(f"{option}={file} is what is read; give another file, so that it stays as it is.")


def check_overwrite(option: str, place: Path, overwrite: bool) -> None:
    """Raise if something is there already that would be replaced.

    Raises:
        ArgumentError: `place` is a file, or a folder that holds something.
    """
    if overwrite or not place.exists():
        return
    if place.is_file():
        raise ArgumentError(f"{option}={place} is there already. Give another file, or --overwrite to replace it.")
    if place.is_dir() and any(place.iterdir()):
        raise ArgumentError(
            f"{option}={place} is there already and holds something. Give another folder, or --overwrite to write "
            "into it."
        )


def is_config(source: str) -> bool:
    """Whether a source of data is a config of `train`, which names the data."""
    return source.endswith((".yaml", ".yml"))


def looks_like_path(source: str) -> bool:
    """Whether a source that is not there can only mean a path, and not a name on the Hub."""
    path = Path(source)
    return source.startswith((".", "~", "/")) or len(path.parts) > 2 or path.suffix.lower() in DATA_ENDINGS
