"""A few queries with what was found for them before and after, to look at."""

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from embtune.evaluate.retrieval import RetrievalResult


def sample_table(
    query_id: str,
    before: RetrievalResult,
    after: RetrievalResult,
    corpus: Mapping[str, str],
    right: set[str],
    n: int = 3,
) -> Table:
    """The best `n` documents for a query before and after, side by side; the right ones carry a star."""
    table = Table(title=Text(before.queries[query_id]), title_justify="left", box=None, pad_edge=False, expand=False)
    table.add_column("")
    for heading in ("before", "after"):
        table.add_column(heading, no_wrap=True, overflow="ellipsis", max_width=56)
    hits = zip(before.top(query_id, n), after.top(query_id, n), strict=True)
    for rank, (old, new) in enumerate(hits, start=1):
        table.add_row(str(rank), *(_hit(hit.document_id, corpus, right) for hit in (old, new)))
    return table


def _hit(document_id: str, corpus: Mapping[str, str], right: set[str]) -> Text:
    first_line = corpus[document_id].split("\n", maxsplit=1)[0]
    is_right = document_id in right
    return Text(f"{'*' if is_right else ' '} {document_id}  {first_line}", "bold green" if is_right else "")
