"""The role of every column, told by its name or by a mapping, never by its position.

| role | what it holds |
|---|---|
| `anchor` | the text that searches: a query, a question |
| `positive` | the text that should be found |
| `negative`, `negative_1` … `negative_n` | texts that should not be found |
| `sentence1`, `sentence2` | two texts that are compared, as in sentence similarity |
| `sentence` or `text` | a single text, as in classification |
| `label`, `labels`, `score` or `scores` | one number, or one list of numbers, per row |
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from datasets import Dataset, IterableDataset

from embtune.errors import ArgumentError, DataError

LABEL_ROLES = ("label", "labels", "score", "scores")
"""The names under which sentence-transformers looks for labels; a row has at most one of them."""

ALIASES: Mapping[str, str] = {
    **dict.fromkeys(("anchor", "query", "question", "search_query"), "anchor"),
    **dict.fromkeys(("positive", "pos", "answer", "response", "document", "doc", "passage"), "positive"),
    **dict.fromkeys(("positive_document", "positive_passage"), "positive"),
    **dict.fromkeys(("negative", "neg", "hard_negative", "hard_neg"), "negative"),
    **dict.fromkeys(("negative_document", "negative_passage"), "negative"),
    **dict.fromkeys(("sentence1", "sentence_1", "sentence_a", "text1", "text_1", "text_a", "premise"), "sentence1"),
    **dict.fromkeys(("sentence2", "sentence_2", "sentence_b", "text2", "text_2", "text_b", "hypothesis"), "sentence2"),
    "sentence": "sentence",
    "text": "text",
    **{role: role for role in LABEL_ROLES},
    **dict.fromkeys(("similarity", "similarity_score"), "score"),
}
"""Column names that say their role, and that role.

Upper and lower case, hyphens, spaces and underscores make no difference. `negative`, `neg`, `hard_negative` and
`hard_neg` may carry a number: `neg3` and `Hard-Negative 3` are `negative_3`.
"""

_NUMBERED_NEGATIVE = re.compile(r"(?:hard_)?neg(?:ative)?_?(\d+)")
_ROLE = re.compile(r"negative_(0|[1-9]\d*)")
_FIXED_ORDER = ("anchor", "positive", "negative", "sentence1", "sentence2", "sentence", "text", *LABEL_ROLES)
_NEEDED = {"pair": {"anchor", "positive"}, "sentences": {"sentence1", "sentence2"}}
_ROLE_NAMES = "anchor, positive, negative, negative_1 … negative_n, sentence1, sentence2, sentence, text, label, score"


def role_of(column: str) -> str | None:
    """The role that a column's name says (`"Query"` -> `"anchor"`), or None."""
    name = re.sub(r"[\s-]+", "_", column.strip().lower())
    if numbered := _NUMBERED_NEGATIVE.fullmatch(name):
        return f"negative_{int(numbered[1])}"
    return ALIASES.get(name)


@dataclass(frozen=True)
class ColumnRoles:
    """Which column plays which role, in canonical order: anchor, positive, negatives, sentence1, sentence2, label.

    Raises:
        DataError: two columns claim one role, or the roles together are no layout that a loss could read.
    """

    columns: tuple[str, ...]
    """The data's own column names, in canonical order."""

    roles: tuple[str, ...]
    """The role of each of `columns`."""

    source: str = "the dataset"
    """How messages name the data."""

    def __post_init__(self) -> None:
        self._check_unique()
        self._check_layout()

    @classmethod
    def from_names(
        cls, column_names: Iterable[str], mapping: Mapping[str, str] | None = None, source: str = "the dataset"
    ) -> "ColumnRoles":
        """Find each column's role by `mapping` (`{their_name: role}`; the rest is left out), else by its name.

        Raises:
            ArgumentError: `mapping` names a role that does not exist.
            DataError: `mapping` names a column that does not exist; without a mapping, a column is not understood.
        """
        names = list(column_names)
        for name in names:
            if names.count(name) > 1:
                raise DataError(f"{source}: column {name!r} occurs twice. Rename or remove one.")
        found = _by_name(names, source) if mapping is None else _by_mapping(names, mapping, source)
        ordered = sorted(found.items(), key=lambda item: _rank(item[1]))
        return cls(tuple(name for name, _ in ordered), tuple(role for _, role in ordered), source)

    @property
    def label(self) -> str | None:
        """The data's own name of the label column, or None."""
        return next((name for name, role in self if role in LABEL_ROLES), None)

    @property
    def texts(self) -> dict[str, str]:
        """The data's own names of the text columns and their roles, in canonical order."""
        return {name: role for name, role in self if role not in LABEL_ROLES}

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(zip(self.columns, self.roles, strict=True))

    def _check_unique(self) -> None:
        claimed: dict[str, str] = {}
        for name, role in self:
            key = "label" if role in LABEL_ROLES else role
            if key in claimed:
                raise DataError(
                    f"{self.source}: columns {claimed[key]!r} and {name!r} both claim the role {key!r}. Remove one, "
                    f"or say which one counts: {_example(self.columns)}."
                )
            claimed[key] = name

    def _check_layout(self) -> None:
        texts = [role for role in self.roles if role not in LABEL_ROLES]
        layouts = {_layout(role) for role in texts}
        if not layouts:
            raise DataError(f"{self.source}: there is no text column; columns: {_quoted(self.columns)}.")
        if len(layouts) > 1:
            seen = ", ".join(f"{name!r} ({role})" for name, role in self)
            raise DataError(
                f"{self.source}: these columns do not belong together: {seen}. Use anchor, positive and negatives; or "
                f"sentence1 and sentence2; or one text column. Say what they are: {_example(self.columns)}."
            )
        for missing in sorted(_NEEDED.get(layouts.pop(), set()) - set(texts)):
            raise DataError(
                f"{self.source}: no column has the role {missing!r}, which {_quoted(texts)} needs; columns: "
                f"{_quoted(self.columns)}. Rename it, or say which it is: {as_option({'its_name': missing})}. "
                "A data set of single texts names its column 'text'."
            )


def canonical(
    dataset: Dataset | IterableDataset, mapping: Mapping[str, str] | None = None, *, source: str = "the dataset"
) -> Dataset | IterableDataset:
    """Select, rename and reorder columns so that their names are their roles, in canonical order.

    A dataset that is canonical already is returned as it is. Values are not looked at.

    Raises:
        ArgumentError, DataError: as `ColumnRoles.from_names`, or a stream does not know its columns.
    """
    names = dataset.column_names
    if names is None:
        raise DataError(f"{source}: this stream does not tell its columns. Give its features when you create it.")
    roles = ColumnRoles.from_names(names, mapping, source)
    if list(roles.roles) == names:
        return dataset
    return _rename(dataset.select_columns(list(roles.columns)), {name: role for name, role in roles if name != role})


def _rename(dataset: Dataset | IterableDataset, names: dict[str, str]) -> Dataset | IterableDataset:
    # A stream of datasets 5 cannot swap two names in one step, so names that collide take a detour.
    if names.keys() & set(names.values()):
        detour = {name: f"_role_{role}" for name, role in names.items()}
        dataset = dataset.rename_columns(detour)
        names = {detour[name]: role for name, role in names.items()}
    return dataset.rename_columns(names) if names else dataset


def _by_name(names: list[str], source: str) -> dict[str, str]:
    roles = {name: role_of(name) for name in names}
    unknown = [name for name, role in roles.items() if role is None]
    if unknown:
        raise DataError(
            f"{source}: the role of column {_quoted(unknown)} is not known; columns: {_quoted(names)}. Rename the "
            f"columns, or say what they are, as in {_example(names)}; columns left out of the mapping are not used."
        )
    return {name: role for name, role in roles.items() if role is not None}


def _by_mapping(names: list[str], mapping: Mapping[str, str], source: str) -> dict[str, str]:
    if not mapping:
        raise ArgumentError(f"columns is empty: it chooses no column of {_quoted(names)}. Leave it out, or name roles.")
    for name, role in mapping.items():
        if not (role in _FIXED_ORDER or _ROLE.fullmatch(role)):
            raise ArgumentError(f"columns: {name}={role}: there is no role {role!r}. The roles: {_ROLE_NAMES}.")
        if name not in names:
            raise DataError(
                f"{source}: columns: {name}={role} names a column that is not there; "
                f"there are {_quoted(names)}. Use one of these names, spelt exactly so."
            )
    return dict(mapping)


def as_option(mapping: Mapping[str, str]) -> str:
    """A mapping of columns to roles as messages show it: for the command line, and said to be a mapping elsewhere."""
    pairs = " ".join(shlex.quote(f"{name}={role}") for name, role in mapping.items())
    return f"--columns {pairs} (in Python and in config files, columns is a mapping)"


def _layout(role: str) -> str:
    if role in ("anchor", "positive") or role.startswith("negative"):
        return "pair"
    return "sentences" if role in ("sentence1", "sentence2") else role


def _rank(role: str) -> tuple[int, int]:
    if numbered := _ROLE.fullmatch(role):
        return _FIXED_ORDER.index("negative"), int(numbered[1]) + 1
    return _FIXED_ORDER.index(role), 0


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


def _example(names: Iterable[str]) -> str:
    """A mapping for the user's own columns: what is recognised keeps its role, others fill anchor and positive."""
    names = list(names)
    example: dict[str, str] = {}
    for name in names:
        role = role_of(name)
        if role in ("anchor", "positive") and role not in example.values():
            example[name] = role
    others = [name for name in names if name not in example and role_of(name) not in LABEL_ROLES]
    missing = [role for role in ("anchor", "positive") if role not in example.values()]
    example |= dict(zip(others, missing, strict=False))
    return as_option(dict(sorted(example.items(), key=lambda item: item[1])))
