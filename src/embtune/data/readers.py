"""`read_dataset`: pairs from a file, a `datasets.Dataset` or the Hub, checked, with canonical columns."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetsError

from embtune.data.columns import ColumnRoles, canonical
from embtune.data.formats import RAW_ROWS, READERS, SEPARATORS, separator_of
from embtune.data.lines import BINARY_ENDINGS, reading
from embtune.data.tables import check_cells
from embtune.data.values import parse_number
from embtune.errors import ArgumentError, DataError

_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<config>[\w.-]+))?")
_ENDINGS = ", ".join(READERS)


def read_dataset(
    source: str | Path | Dataset | DatasetDict,
    *,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    limit: int | None = None,
    token: str | bool | None = None,
) -> Dataset:
    """Read training or evaluation rows; every cell is checked to be a text, or a number in the label column.

    Args:
        source: a file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet), a data set, or a Hub name: `owner/name`, or
            `owner/name:config` where a data set has several configurations.
        columns: `{their_name: role}`; other columns are left out. Without it every column must say its role by its
            name (`embtune.data.columns.ALIASES`).
        split: which split of a Hub data set or `DatasetDict`; the Hub takes `train[:10%]` too.
        limit: read the first `limit` rows only; later rows are not checked.
        token: for private Hub data sets, as in `datasets.load_dataset`.

    Returns:
        Columns named by role, in canonical order (`embtune.data.columns`). Labels are int64 or float64.

    Raises:
        ArgumentError: an argument does not fit the source.
        DataError: a mistake in the data; the message names file, line and column.
    """
    if limit is not None and limit < 1:
        raise ArgumentError(f"limit={limit} leaves no rows; give a number from 1, or None for all.")
    if isinstance(source, DatasetDict):
        if split not in source:
            raise ArgumentError(f"split={split!r}: this DatasetDict has the splits {', '.join(map(repr, source))}.")
        return _checked(source[split], columns, limit, f"the dataset's split {split!r}")
    if isinstance(source, Dataset):
        _refuse_split(split, "a Dataset")
        return _checked(source, columns, limit, "the dataset")
    if not isinstance(source, str | Path):
        raise ArgumentError(
            f"Data of type {type(source).__name__} cannot be read; give a path, a datasets.Dataset or a Hub name. "
            "Lists become a Dataset by Dataset.from_list, data frames by Dataset.from_pandas; an IterableDataset goes "
            "to the trainer as it is."
        )
    place = _locate(source)
    if isinstance(place, Path):
        _refuse_split(split, "a file")
        return READERS[place.suffix.lower()](place, columns, limit)
    where, dataset = _load_hub(place, split, token)
    return _checked(dataset, columns, limit, where)


@dataclass(frozen=True)
class RawRows:
    """The rows of a file or a Hub data set as they are there: cells unchecked, columns under their own names."""

    source: Path
    """How messages name them."""
    unit: str
    """What numbers count, from 1: `line` or `row`."""
    rows: Iterable[tuple[int, dict[str, Any]]]
    """Number and row; iterated once."""
    parse_label: Callable[[Any], Any] | None = None
    """Makes a number of a label's cell, where all cells are texts."""
    separator: str | None = None
    """What stands between the cells of a delimited file: `commas`, `semicolons` or `tabs`."""


def read_raw(source: str | Path, *, split: str = "train") -> RawRows:
    """Open rows for looking at them, before it is known whether they are in order.

    Args:
        source, split: as for `read_dataset`.

    Raises:
        ArgumentError, DataError: as `read_dataset`, for what is wrong with the file itself; a broken line is found
            while iterating.
    """
    place = _locate(source)
    if not isinstance(place, Path):
        _, dataset = _load_hub(place, split, None)
        return RawRows(Path(place[0]), "row", enumerate(dataset.with_format(None), 1))
    _refuse_split(split, "a file")
    ending = place.suffix.lower()
    rows = RAW_ROWS[ending](place)
    if ending in (".csv", ".tsv"):
        return RawRows(place, "line", rows, parse_number, SEPARATORS[separator_of(place)])
    return RawRows(place, "row" if ending == ".parquet" else "line", rows)


def _locate(source: str | Path) -> Path | re.Match[str]:
    """The file that `source` names, of a known ending, or name and configuration of a Hub data set."""
    path = Path(source).expanduser()
    with reading(path):
        found, is_folder, is_file = path.exists(), path.is_dir(), path.is_file()
    if not found:
        hub = _HUB_NAME.fullmatch(source) if isinstance(source, str) else None
        if hub is None or path.suffix.lower() in READERS:
            raise DataError(_about_missing(path))
        return hub
    if is_folder:
        raise DataError(_about_folder(path))
    if not is_file:
        raise DataError(f"{path} is no regular file. Save the rows in one that ends in {_ENDINGS}.")
    if path.suffix.lower() not in READERS:
        if path.suffix.lower() in BINARY_ENDINGS:
            raise DataError(f"{path} {BINARY_ENDINGS[path.suffix.lower()]}")
        raise DataError(
            f"{path}: the ending {path.suffix!r} does not tell the format. Give a file that ends in {_ENDINGS}."
        )
    return path


def _refuse_split(split: str, what: str) -> None:
    if split != "train":
        raise ArgumentError(f"split={split!r}: {what} has no splits; leave the argument out.")


def _load_hub(hub: re.Match[str], split: str, token: str | bool | None) -> tuple[str, Dataset]:
    """How messages name a Hub data set's split, and its rows."""
    name, config = hub["name"], hub["config"]
    where = f"Hub data set {name}" + (f", configuration {config}" if config else "")
    try:
        dataset = datasets.load_dataset(name, config, split=split, token=token)
    except ConnectionError as error:
        raise DataError(
            f"{where} cannot be reached: {error}. If a file of this machine is meant, there is no {name}; "
            "else check the network and HF_HUB_OFFLINE."
        ) from error
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"{where}, split {split!r}: {error}. Check owner and name, the split (split=…), the configuration "
            "(owner/name:configuration), and the token if it is private."
        ) from error
    return f"{where}, split {split!r}", dataset


def _checked(dataset: Dataset, columns: Mapping[str, str] | None, limit: int | None, where: str) -> Dataset:
    if limit is not None and limit < len(dataset):
        dataset = dataset.select(range(limit))
    roles = ColumnRoles.from_names(dataset.column_names, columns, where)
    check_cells(dataset, roles, lambda index: f"{where}, row {index + 1} (dataset[{index}])")
    return canonical(dataset, columns, source=where)


def _about_folder(path: Path) -> str:
    if (path / "corpus.jsonl").exists():
        return f"{path} is a folder in BEIR's form, for evaluation: RetrievalData.from_beir reads it."
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return f"{path} was written by save_to_disk; load it with datasets.load_from_disk and pass the result."
    files = _data_files(path)
    names = f"one of its files: {', '.join(files)}" if files else f"a file that ends in {_ENDINGS}"
    return f"{path} is a folder. Name {names}."


def _about_missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: there is no folder {folder}. Check the path; a Hub data set is written owner/name."
    names = _data_files(folder)
    near = difflib.get_close_matches(path.name, names, n=3) or names[:3]
    hint = f"Did you mean {' or '.join(near)}?" if near else "The folder holds no data files."
    return f"{path}: there is no such file. {hint} A Hub data set is written owner/name."


def _data_files(folder: Path) -> list[str]:
    with reading(folder):
        return sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in READERS)
