"""The data of the query explorer, as the page's script reads it."""

from collections.abc import Mapping, Sequence
from typing import Any

from embtune.report.run import Run

QUERIES_ON_PAGE = 200  # in the explorer, shared among all runs: the page stays below 3 MB


def explorer_data(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One entry for each evaluation whose items have scores."""
    several = len(runs) > 1
    chosen = [
        (place, run, each)
        for place, (run, each) in enumerate((run, each) for run in runs for each in run.comparisons)
        if each.get("queries")
    ]
    share = QUERIES_ON_PAGE // max(1, len(chosen))
    sets = []
    for place, run, each in chosen:
        queries = each["queries"]
        if len(queries) > share:  # the ends are what matters: the worst and the best
            queries = [*queries[: share - share // 3], *queries[len(queries) - share // 3 :]]
        documents, queries = _only_used(each.get("documents", []), queries)
        sets.append(
            {
                "map": place,
                "label": f"{run.name}: {each['name']}" if several else each["name"],
                "metric": each["item_metric"],
                "depth": each.get("depth"),
                "items": each["items"],
                "queries": queries,
                "documents": documents,
            }
        )
    return sets


def _only_used(
    documents: Sequence[Any], queries: Sequence[Mapping[str, Any]]
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Documents that the queries name, numbered anew."""
    numbers: dict[int, int] = {}

    def renumbered(old: int) -> int:
        return numbers.setdefault(old, len(numbers))

    found = []
    for query in queries:
        sides = {
            side: query[side] | {"hits": [[renumbered(hit[0]), *hit[1:]] for hit in query[side].get("hits", [])]}
            for side in ("before", "after")
        }
        found.append({**query, **sides, "right": [renumbered(old) for old in query.get("right", [])]})
    return [documents[old] for old in numbers], found
