"""The rows of a file that can be used, where others cannot: `read_dataset` refuses the whole file instead."""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from datasets import Dataset

from embtune.data.columns import ColumnRoles
from embtune.data.readers import RawRows
from embtune.data.rows import collect
from embtune.data.values import explain_form, explain_label, explain_text, form, is_label, is_text
from embtune.errors import DataError

EXAMPLES = 3


class UsableRows:
    """Reads rows, and keeps those of which every cell is a text, or a number in the label column.

    Args:
        columns: as for `read_dataset`.

    Raises:
        DataError: there are no rows, or the columns are not understood.
    """

    def __init__(self, raw: RawRows, columns: Mapping[str, str] | None) -> None:
        self._raw = raw
        self._exact = columns is None
        self.numbers = array("q")
        """The number, in the file, of each row that was kept."""
        self.total = 0
        """Rows in the file."""
        self.problems: list[str] = []
        """What is wrong with the first few rows that were not kept."""
        self.dataset: Dataset | None = None
        """The rows that were kept, columns named by role; None if there are none."""
        self._form: int | None = None
        rows = iter(raw.rows)
        first = next(rows, None)
        if first is None:
            raise DataError(f"{raw.source} holds no rows.")
        self._expected = set(first[1])
        self.roles = ColumnRoles.from_names(first[1], columns, str(raw.source))
        whole = self._whole(chain([first], rows))
        start = next(whole, None)
        if start is not None:
            self.dataset = collect(raw.source, chain([start], whole), dict(self.roles))

    def _whole(self, rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
        label = self.roles.label
        for number, row in rows:
            self.total += 1
            if label in row and self._raw.parse_label is not None:
                row[label] = self._raw.parse_label(row[label])
            problem = self._problem(row, label)
            if problem is None:
                self.numbers.append(number)
                yield number, row
            elif len(self.problems) < EXAMPLES:
                self.problems.append(f"{self._raw.unit} {number}, {problem.rstrip('.')}")

    def _problem(self, row: Mapping[str, Any], label: str | None) -> str | None:
        for name in self.roles.columns:
            if name not in row:
                return f"column {name!r} is missing"
        if self._exact and len(row) > len(self._expected):
            return f"column {next(name for name in row if name not in self._expected)!r} is extra"
        for name in self.roles.texts:
            if not is_text(row[name]):
                return f"column {name!r} {explain_text(row[name])}"
        if label is None:
            return None
        if not is_label(row[label]):
            return f"column {label!r} {explain_label(row[label], self.roles.texts)}"
        if not self.numbers:
            self._form = form(row[label])
        return None if form(row[label]) == self._form else f"column {label!r} {explain_form(row[label], self._form)}"
