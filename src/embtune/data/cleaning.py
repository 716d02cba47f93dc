"""What `embtune check` looks for in a file, and the rows that are left when it is taken out."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from datasets import Dataset

from embtune.data.columns import LABEL_ROLES
from embtune.data.near_duplicates import CloseTexts, near_copies
from embtune.data.readers import RawRows
from embtune.data.same_text import digest, normal, shortened
from embtune.data.scripts import main_script
from embtune.data.usable import EXAMPLES, UsableRows
from embtune.errors import ArgumentError, DataError

_TIMES_AS_LONG = 3.0
_MOST, _FEW = 0.5, 0.1


@dataclass(frozen=True)
class LengthLimit:
    """Where a text is too long, and how that is measured."""

    limit: int
    """Longest text that is in order."""
    unit: str
    """What is counted, as messages name it."""
    measure: Callable[[list[str]], Iterable[int]]
    """The lengths of texts, in that unit."""


CHARACTERS = LengthLimit(2_000, "characters (about 512 tokens; a model gives the exact limit)", lambda t: map(len, t))
"""What is too long for most models, where none is given."""


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with some rows."""

    text: str
    """What is wrong, in how many rows and which, and what to do."""
    positions: tuple[int, ...] = ()
    """Which usable rows it concerns, from 0."""
    removable: bool = False
    """Whether `CheckedData.cleaned` leaves them out; else a person has to look."""


@dataclass(frozen=True)
class ColumnFacts:
    """A column as it was understood."""

    name: str
    """The data's own name."""
    role: str
    """What it is used as."""
    mean_length: float
    """Mean number of characters; 0 for labels."""
    script: str | None
    """The script that most texts are written in."""


@dataclass(frozen=True)
class CheckedData:
    """The rows that can be used at all, and everything that was found."""

    total: int
    """Rows in the file."""
    rows: Dataset | None
    """Those whose cells are in order, columns named by role; None if there are none."""
    columns: tuple[ColumnFacts, ...]
    """The columns that are used."""
    findings: tuple[Finding, ...]
    """Everything that was found."""

    def cleaned(self) -> Dataset:
        """The rows without those of removable findings.

        Raises:
            DataError: none is left.
        """
        removed = {position for each in self.findings if each.removable for position in each.positions}
        kept = [position for position in range(len(self.rows or ())) if position not in removed]
        if self.rows is None or not kept:
            raise DataError("No row is left when everything that was found is taken out, so nothing is written.")
        return self.rows.select(kept)


def check_data(
    raw: RawRows,
    columns: Mapping[str, str] | None = None,
    *,
    evaluation: Mapping[str, Collection[str]] | None = None,
    near_duplicates: float = 0.8,
    lengths: LengthLimit = CHARACTERS,
) -> CheckedData:
    """Look for everything in rows that training would suffer from.

    Texts count as the same if they differ in case, white space or Unicode form only, and as nearly the same if the
    Jaccard similarity of their words reaches `near_duplicates`. All usable rows are held in memory.

    Args:
        columns: as for `read_dataset`.
        evaluation: name -> the texts that a measurement asks with, which training must not see.
        lengths: where texts are too long.

    Raises:
        ArgumentError, DataError: the file, its columns or an option cannot be used at all.
    """
    if not 0 < near_duplicates <= 1:
        raise ArgumentError(f"near_duplicates={near_duplicates} must be over 0 and at most 1.")
    usable = UsableRows(raw, columns)
    if usable.dataset is None:
        return CheckedData(usable.total, None, (), tuple(_unusable(usable)))
    rows = _Rows(usable.dataset, usable.numbers, raw.unit)
    findings = [
        *_unusable(usable),
        *_repeats(rows, near_duplicates),
        *_contradictions(rows),
        *_leaks(rows, evaluation or {}, near_duplicates),
        *_too_long(rows, lengths),
        *_swapped(rows),
        *_other_scripts(rows),
    ]
    facts = [ColumnFacts(name, role, rows.mean_length(role), rows.script(role)) for name, role in usable.roles]
    return CheckedData(usable.total, rows.dataset, tuple(facts), tuple(findings))


class _Rows:
    """Usable rows, column by column, and findings about them."""

    def __init__(self, dataset: Dataset, numbers: Sequence[int], unit: str) -> None:
        self.dataset = dataset
        self._numbers = numbers
        self._unit = unit
        self.label = next((name for name in dataset.column_names if name in LABEL_ROLES), None)
        self.texts = [name for name in dataset.column_names if name != self.label]
        self._scripts = {role: Counter(map(main_script, self.column(role))) for role in self.texts}

    def column(self, role: str) -> Iterator[Any]:
        for batch in self.dataset.select_columns([role]).with_format(None).iter(batch_size=1_000):
            yield from batch[role]

    def labels(self) -> Iterator[Any]:
        return self.column(self.label) if self.label else iter([None] * len(self.dataset))

    def keys(self, roles: Iterable[str]) -> Iterator[bytes]:
        """What two rows share if these columns hold the same texts."""
        columns = zip(*(map(normal, self.column(role)) for role in roles), strict=True)
        return (digest("\0".join(texts)) for texts in columns)

    def mean_length(self, role: str) -> float:
        return sum(map(len, self.column(role))) / len(self.dataset) if role in self.texts else 0.0

    def script(self, role: str) -> str | None:
        scripts = self._scripts.get(role, Counter())
        return next((script for script, _ in scripts.most_common() if script is not None), None)

    def number(self, position: int) -> int:
        return self._numbers[position]

    def finding(
        self, positions: Sequence[int], what: str, remedy: str, *, removable: bool = False
    ) -> Iterator[Finding]:
        """A finding unless `positions` is empty; `what` goes on after "Rows that"."""
        if positions:
            numbers = ", ".join(str(self.number(position)) for position in positions[:EXAMPLES])
            where = f"{self._unit}{'s' if len(positions) > 1 else ''} {numbers}{', …' * (len(positions) > EXAMPLES)}"
            count = f"{len(positions):,} of {len(self.dataset):,}, {len(positions) / len(self.dataset):.1%}"
            text = f"Rows that {what}: {count} ({where}). {remedy}"
            yield Finding(text, tuple(positions), removable)


def _unusable(usable: UsableRows) -> Iterator[Finding]:
    count = usable.total - len(usable.numbers)
    if count:
        problems = "; ".join(usable.problems) + ("; …" if count > EXAMPLES else "")
        yield Finding(f"Rows that cannot be used: {count:,} of {usable.total:,} ({problems}).", (), True)


def _repeats(rows: _Rows, threshold: float) -> Iterator[Finding]:
    seen: set[tuple[bytes, str]] = set()
    copies: list[int] = []
    for position, key in enumerate(zip(rows.keys(rows.texts), map(repr, rows.labels()), strict=True)):
        if key in seen:
            copies.append(position)
        seen.add(key)
    yield from rows.finding(copies, "repeat an earlier row", "One of each is enough.", removable=True)
    found = near_copies((rows.column(role) for role in rows.texts), threshold, list(rows.labels()))
    exact = set(copies)
    near = [later for later in found if later not in exact]
    what = f"nearly repeat an earlier row ({threshold:.0%} of the words in every column)"
    if near:
        what += f", as {rows.number(near[0])} does {rows.number(found[near[0]])}"
    yield from rows.finding(near, what, "One of each is enough.", removable=True)


def _contradictions(rows: _Rows) -> Iterator[Finding]:
    if rows.label is not None:
        labels: dict[bytes, set[str]] = defaultdict(set)
        for key, label in zip(rows.keys(rows.texts), map(repr, rows.labels()), strict=True):
            labels[key].add(label)
        unclear = [position for position, key in enumerate(rows.keys(rows.texts)) if len(labels[key]) > 1]
        remedy = f"Only one {rows.label} can be right; correct them, or do without."
        yield from rows.finding(unclear, f"have the texts of another, but not its {rows.label}", remedy, removable=True)
    if "anchor" not in rows.texts or rows.label is not None:
        return
    pairs = set(rows.keys(["anchor", "positive"]))
    same = zip(map(normal, rows.column("anchor")), map(normal, rows.column("positive")), strict=True)
    yield from rows.finding(
        [position for position, (anchor, positive) in enumerate(same) if anchor == positive],
        "have one text as anchor and positive",
        "Such a row teaches nothing.",
        removable=True,
    )
    for role in rows.texts:
        if role.startswith("negative"):
            answers = [position for position, key in enumerate(rows.keys(["anchor", role])) if key in pairs]
            what = f"have as {role} what is a positive of the same anchor"
            yield from rows.finding(answers, what, "It teaches the opposite.", removable=True)


def _leaks(rows: _Rows, evaluation: Mapping[str, Collection[str]], threshold: float) -> Iterator[Finding]:
    remedy = "Measuring on it would flatter the model."
    for name, asked in evaluation.items():
        exact = {digest(normal(text)) for text in asked}
        for role in rows.texts:
            same = [position for position, key in enumerate(rows.keys([role])) if key in exact]
            yield from rows.finding(same, f"have as {role} a text that {name} measures with", remedy, removable=True)
            near = _close(asked, rows.column(role), threshold)
            for position in same:
                near.pop(position, None)
            what = f"have as {role} nearly a text that {name} measures with ({threshold:.0%} of the words)"
            if near:
                text = next(islice(rows.column(role), min(near), None))
                what += f", as {shortened(text)!r} and {shortened(near[min(near)])!r}"
            yield from rows.finding(list(near), what, remedy, removable=True)


def _close(asked: Collection[str], texts: Iterable[str], threshold: float) -> dict[int, str]:
    """Positions of `texts` that are close to one of `asked`, and that one."""
    known = list(asked)
    index = CloseTexts(chain(known, texts), threshold)
    for position in range(len(known)):
        index.add(position)
    close = {position: min(index.close(position), default=None) for position in range(len(known), len(index))}
    return {position - len(known): known[other] for position, other in close.items() if other is not None}


def _too_long(rows: _Rows, lengths: LengthLimit) -> Iterator[Finding]:
    for role in rows.texts:
        long: list[int] = []
        start = 0
        for batch in rows.dataset.select_columns([role]).with_format(None).iter(batch_size=1_000):
            measured = enumerate(lengths.measure(batch[role]), start)
            long += [position for position, length in measured if length > lengths.limit]
            start += len(batch[role])
        what = f"have as {role} a text of more than {lengths.limit:,} {lengths.unit}"
        yield from rows.finding(long, what, "What comes after is cut off; split such texts, or raise max_seq_length.")


def _swapped(rows: _Rows) -> Iterator[Finding]:
    if "anchor" not in rows.texts:
        return
    anchor, positive = rows.mean_length("anchor"), rows.mean_length("positive")
    reason = None
    if anchor >= _TIMES_AS_LONG * positive:
        reason = f"anchors have {anchor:,.0f} characters on average and positives {positive:,.0f}"
    elif _questions(rows, "positive") >= _MOST and _questions(rows, "anchor") <= _FEW:
        reason = "most positives end in a question mark, and few anchors do"
    if reason is not None:
        yield Finding(
            f"The columns look swapped: {reason}. An anchor is what searches, a positive what should be found. If they "
            "are, swap their roles with columns."
        )


def _questions(rows: _Rows, role: str) -> float:
    return sum(text.rstrip().endswith(("?", "？", "؟")) for text in rows.column(role)) / len(rows.dataset)


def _other_scripts(rows: _Rows) -> Iterator[Finding]:
    for role in rows.texts:
        main = rows.script(role)
        scripts = map(main_script, rows.column(role))
        others = [position for position, script in enumerate(scripts) if script not in (main, None)]
        what = f"have as {role} a text in another script than {main}, that of most"
        yield from rows.finding(others, what, "Another language may have slipped in; look at them.")
