"""Retrieval data: queries, documents, and which document answers which query."""

import re
import warnings
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from embtune.data.columns import ColumnRoles, canonical
from embtune.data.lines import decoded_lines, json_objects, reading
from embtune.data.values import explain_text, is_text
from embtune.errors import DataError, EmbtuneWarning

_QRELS_HEADER = ["query-id", "corpus-id", "score"]


@dataclass(frozen=True)
class RetrievalData:
    """A retrieval task.

    Raises:
        DataError: there are no queries or documents, a query has no relevant document, or an id is not known.
    """

    queries: Mapping[str, str]
    """Query id to text."""

    corpus: Mapping[str, str]
    """Document id to text."""

    relevant: Mapping[str, Set[str] | Mapping[str, int]]
    """Query id to the ids of its relevant documents, or to their grades (from 1; higher is more relevant)."""

    def __post_init__(self) -> None:
        if not self.queries or not self.corpus:
            raise DataError(f"Retrieval needs queries and documents: {len(self.queries)} and {len(self.corpus)} given.")
        for query in self.relevant:
            if query not in self.queries:
                raise DataError(f"relevant names query {query!r}, which is not among the queries. Add its text.")
        for query in self.queries:
            self._check_judged(query, self.relevant.get(query, frozenset()))

    def _check_judged(self, query: str, documents: Set[str] | Mapping[str, int]) -> None:
        if not documents:
            raise DataError(f"Query {query!r} has no relevant document. Remove it, or judge one.")
        for document in documents:
            if document not in self.corpus:
                raise DataError(f"Query {query!r}: document {document!r} is not in the corpus. Add its text.")
        for document, grade in documents.items() if isinstance(documents, Mapping) else ():
            if type(grade) is not int or grade < 1:
                raise DataError(
                    f"Query {query!r}, document {document!r}: grade {grade!r} is no whole number from 1. "
                    "Leave documents out that are not relevant."
                )

    @classmethod
    def from_beir(cls, folder: str | Path, split: str = "test") -> "RetrievalData":
        """Read `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` and `qrels/<split>.tsv`.

        A document is its title, a space and its text, as BEIR scores it. Queries that the split does not judge are
        left out, as BEIR does; grades of 0 and below mean "not relevant". Two oddities of published sets are accepted
        with an `EmbtuneWarning`: documents without any text, and queries whose judged documents are all irrelevant,
        which cannot be scored and are left out.

        Raises:
            DataError: a file is missing or a line is wrong; the message names file, line and key.
        """
        folder = Path(folder)
        qrels = folder / "qrels" / f"{split}.tsv"
        with reading(folder):
            if not folder.is_dir():
                raise DataError(f"{folder}: there is no such folder. Name one with corpus.jsonl and queries.jsonl.")
            for path in folder / "corpus.jsonl", folder / "queries.jsonl", qrels:
                if not path.exists():
                    raise DataError(f"{path} is missing. {_about_splits(folder, split)}")
        corpus = _read_texts(folder / "corpus.jsonl", titled=True)
        queries = _read_texts(folder / "queries.jsonl", titled=False)
        grades = _read_qrels(qrels, queries, corpus)
        relevant = {query: documents for query, documents in grades.items() if documents}
        without = [query for query, documents in grades.items() if not documents]
        if without:
            warnings.warn(
                f"{qrels}: {len(without)} queries have no document with a grade from 1, so they cannot be scored and "
                f"are left out (first: {without[0]!r}).",
                EmbtuneWarning,
                stacklevel=2,
            )
        return cls({query: queries[query] for query in relevant}, corpus, relevant)

    @classmethod
    def from_pairs(cls, dataset: Dataset) -> "RetrievalData":
        """Make queries `q0`, `q1`, … of the different anchors and documents `d0`, `d1`, … of the different positives.

        An anchor that occurs with several positives has them all as relevant documents. Negatives are not used: they
        are chosen for training, and would make the task's difficulty depend on how.

        Raises:
            DataError: the data set has no anchor and positive, or has labels (which may say "not relevant").
        """
        roles = ColumnRoles.from_names(dataset.column_names)
        if "anchor" not in roles.roles:
            raise DataError(f"Retrieval needs the columns anchor and positive, not {', '.join(roles.columns)}.")
        if roles.label is not None:
            raise DataError(
                f"Column {roles.label!r} may say that a pair is not relevant. Keep the relevant rows, and remove the "
                "column before making retrieval data of pairs."
            )
        pairs = canonical(dataset).select_columns(["anchor", "positive"]).with_format(None)
        queries: dict[str, str] = {}
        corpus: dict[str, str] = {}
        relevant: dict[str, set[str]] = {}
        for row in pairs:
            query = queries.setdefault(row["anchor"], f"q{len(queries)}")
            document = corpus.setdefault(row["positive"], f"d{len(corpus)}")
            relevant.setdefault(query, set()).add(document)
        return cls(
            {query: text for text, query in queries.items()},
            {document: text for text, document in corpus.items()},
            relevant,
        )


def _about_splits(folder: Path, split: str) -> str:
    splits = sorted(path.stem for path in folder.glob("qrels/*.tsv"))
    if splits and split not in splits:
        return f"The folder has qrels for split={' or split='.join(map(repr, splits))}."
    return "A BEIR folder holds corpus.jsonl, queries.jsonl and qrels/<split>.tsv."


def _read_texts(path: Path, *, titled: bool) -> dict[str, str]:
    texts: dict[str, str] = {}
    lines: dict[str, int] = {}
    empty: list[int] = []
    for line, row in json_objects(path):
        where = f"{path}, line {line}"
        identifier = _field(row, "_id", where)
        if identifier in lines:
            raise DataError(f"{where}: _id {identifier!r} is that of line {lines[identifier]} too. Ids must differ.")
        lines[identifier] = line
        if titled:
            title = _field(row, "title", where, blank=True) if row.get("title") is not None else ""
            texts[identifier] = f"{title} {_field(row, 'text', where, blank=True)}".strip()
        else:
            texts[identifier] = _field(row, "text", where)
        if not texts[identifier]:
            empty.append(line)
    if not texts:
        raise DataError(f'{path} holds no rows. Each line is one object: {{"_id": "1", "text": "…"}}.')
    if empty:
        warnings.warn(
            f"{path}: {len(empty)} documents have neither title nor text (first: line {empty[0]}); they are scored as "
            "empty texts.",
            EmbtuneWarning,
            stacklevel=3,
        )
    return texts


def _field(row: Mapping[str, object], key: str, where: str, blank: bool = False) -> str:
    if key not in row:
        raise DataError(f"{where}: key {key!r} is missing; the line has {', '.join(map(repr, row)) or 'no keys'}.")
    value = row[key]
    if not is_text(value) and not (blank and isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}, key {key!r} {explain_text(value)}")
    return str(value)


def _read_qrels(path: Path, queries: Mapping[str, str], corpus: Mapping[str, str]) -> dict[str, dict[str, int]]:
    """Query id to the grades of its relevant documents; a judged query without one maps to an empty dict."""
    grades: dict[str, dict[str, int]] = {}
    seen: dict[tuple[str, str], tuple[int, int]] = {}
    for line, query, document, grade in _qrels_rows(path):
        where = f"{path}, line {line}"
        if query not in queries:
            raise DataError(f"{where}: query-id {query!r} is not in queries.jsonl. Add the query or remove the line.")
        if document not in corpus:
            raise DataError(f"{where}: corpus-id {document!r} is not in corpus.jsonl. Add it or remove the line.")
        earlier_line, earlier = seen.setdefault((query, document), (line, grade))
        if earlier != grade:
            raise DataError(
                f"{where}: score {grade} contradicts line {earlier_line}, which gives {query!r} and {document!r} "
                f"the score {earlier}. Keep one."
            )
        judged = grades.setdefault(query, {})
        if grade > 0:
            judged[document] = grade
    if not grades:
        raise DataError(f"{path} holds no judgements. Below the header, each line is query-id, corpus-id, score.")
    return grades


def _qrels_rows(path: Path) -> Iterator[tuple[int, str, str, int]]:
    for line, text in decoded_lines(path):
        cells = text.rstrip("\r\n").split("\t")
        if line == 1:
            if cells != _QRELS_HEADER:
                raise DataError(
                    f"{path}, line 1: the header must be query-id, corpus-id and score, separated by tabs; it is "
                    f"{cells!r}. Put that line on top."
                )
            continue
        if cells == [""]:
            continue
        if len(cells) != 3:
            raise DataError(f"{path}, line {line}: {len(cells)} cells; write query-id, corpus-id, score between tabs.")
        if not re.fullmatch(r"-?\d+", cells[2]):
            raise DataError(
                f"{path}, line {line}, column 'score': {cells[2]!r} is no whole number. Grades are 0, 1, 2, …"
            )
        yield line, cells[0], cells[1], int(cells[2])
