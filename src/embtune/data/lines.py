"""Text files, line by line: every mistake is reported with the file and the line, counted from 1."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embtune.errors import DataError

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_AS_CSV = "Save its sheet as CSV (UTF-8), or as JSONL, and give that file."
_UNPACK = "Unpack it, and give the file that was in it."

BINARY_ENDINGS: Mapping[str, str] = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".ods", ".numbers"), f"is a spreadsheet. {_AS_CSV}"),
    **dict.fromkeys((".zip", ".gz", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz", ".rar"), f"is an archive. {_UNPACK}"),
}
"""Endings of files that hold rows in a form that is not read, and what to do."""

# What files of these kinds begin with, whatever they are called.
_BEGINNINGS: Mapping[bytes, str] = {
    b"PK\x03\x04": f"is packed, as spreadsheets (.xlsx) and archives (.zip) are. Of a spreadsheet: {_AS_CSV} "
    f"Of an archive: {_UNPACK}",
    b"\xd0\xcf\x11\xe0": f"is an old Office file. {_AS_CSV}",
    b"\x1f\x8b": f"is an archive (gzip). {_UNPACK}",
    b"PAR1": "is a Parquet file. Rename it to end in .parquet.",
    b"ARROW1": "is an Arrow file. Load it by datasets.Dataset.from_file and write it with to_parquet.",
    b"SQLite format 3": "is a database. Write the rows of a table to CSV, and give that file.",
    b"%PDF": "is a PDF. Give the rows as a text file in CSV or JSONL.",
    b"\x89PNG": "is an image. Give the rows as a text file in CSV or JSONL.",
    b"\xff\xd8\xff": "is an image. Give the rows as a text file in CSV or JSONL.",
}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system says about `path` into a `DataError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file.") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder; name the file in it.") from error
    except PermissionError as error:
        raise DataError(f"{path}: permission denied. Make it readable for this user, as chmod u+r does.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text with its line ending); a UTF-8 byte-order mark at the start is dropped.

    Only a line feed ends a line: JSON texts may hold U+2028 and the like, at which `str.splitlines` would cut.

    Raises:
        DataError: the file cannot be opened, holds no text, or a line is not UTF-8.
    """
    with reading(path), path.open("rb") as file:
        _refuse_binary(path, file.peek(64)[:64])
        for number, raw in enumerate(file, 1):
            yield number, _decode(raw, path, number)


def decoded_text(path: Path) -> str:
    """The whole file as text; raises as `decoded_lines`."""
    return "".join(text for _, text in decoded_lines(path))


def _refuse_binary(path: Path, begins: bytes) -> None:
    for mark, what in _BEGINNINGS.items():
        if begins.startswith(mark):
            raise DataError(f"{path} {what}")
    if b"\0" in begins.partition(b"\n")[0] and not begins.startswith(_UTF16_MARKS):
        raise DataError(f"{path} holds no text: there are zero bytes in it. Give the rows as CSV, JSONL or Parquet.")


def _decode(raw: bytes, path: Path, number: int) -> str:
    if number == 1:
        raw = raw.removeprefix(_UTF8_MARK)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        looks = " It looks like UTF-16." if number == 1 and raw.startswith(_UTF16_MARKS) else ""
        raise DataError(
            f"{path}, line {number}: byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8."
            f"{looks} Save the file as UTF-8."
        ) from error


class _DuplicateKey(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKey(next(key for key in keys if keys.count(key) > 1))
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSON Lines file; lines of white space only are skipped.

    Raises:
        DataError: as `decoded_lines`; a line is broken JSON, no object, or has a key twice.
    """
    for number, text in decoded_lines(path):
        text = text.rstrip()
        if not text:
            continue
        if number == 1 and text.lstrip().startswith("["):
            raise DataError(
                f"{path}, line 1: a JSON list begins here, but in JSON Lines each line is one object. If the whole "
                "file is one list, rename it to end in .json."
            )
        value, end = _parse(text, len(text) - len(text.lstrip()), path, number)
        if end < len(text):
            raise DataError(
                f"{path}, line {number}: more text follows the object at character {end + 1}. Put each object on a "
                "line of its own."
            )
        yield number, _as_object(value, path, number)


def json_list(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number where it begins, object) of a file that holds one JSON list of objects.

    Raises:
        DataError: as `json_objects`; the file is no list, or ends before the list does.
    """
    text = decoded_text(path)
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise DataError(
            f"{path}, line 1: a .json file must hold one list of objects, [{{…}}, {{…}}]. If each line is one object, "
            "rename it to end in .jsonl; if the list is inside an object, save the list alone."
        )
    position = _skip_space(text, position + 1)
    line, counted = 1, 0
    more = text[position : position + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, position), position
        value, position = _parse(text, position, path, line)
        yield line, _as_object(value, path, line)
        position = _skip_space(text, position)
        more = text[position : position + 1] == ","
        if more:
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise DataError(f"{path}, line {line}: broken JSON: a comma or the closing ] of the list is missing here.")
    if text[position + 1 :].strip():
        line += text.count("\n", counted, position)
        raise DataError(f"{path}, line {line}: text follows the end of the list. Put all rows into one list.")


def _parse(text: str, start: int, path: Path, line: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        where = line + text.count("\n", start, error.pos)
        column = error.pos - text.rfind("\n", 0, error.pos)
        raise DataError(
            f"{path}, line {where}: broken JSON at character {column}: {error.msg}. Write one complete object such as "
            '{"anchor": "…", "positive": "…"}, with double quotes, and \\n for a line break inside a text.'
        ) from error
    except _DuplicateKey as error:
        raise DataError(f"{path}, line {line}: key {str(error)!r} occurs twice in one object. Keep one.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {line}: JSON that no data row needs ({error}). Remove the row.") from error


def _as_object(value: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{path}, line {line}: a value of type {type(value).__name__} stands where an object belongs. "
            'Name the columns: {"anchor": "…", "positive": "…"}.'
        )
    return value


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position
