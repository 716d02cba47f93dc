"""A retrieval set of prose, made from what every Python brings along: the guard against forgetting."""

import importlib.util
import re
from collections.abc import Collection, Iterator

from embtune.data.code_pairs import first_sentence
from embtune.data.near_duplicates import distinct_rows
from embtune.data.retrieval import RetrievalData
from embtune.errors import DataError

_PROSE = re.compile(r"[\"“*]?[A-Z]")
_MIN_WORDS_QUERY = 6
_MIN_WORDS_ANSWER = 12


def general_retrieval(exclude: Collection[str] = (), *, limit: int = 400) -> RetrievalData:
    """Paragraphs of the Python reference manual: each one's first sentence has to find the rest of it.

    The text is the standard library's own copy for `help()`: English prose, none of it source code, so a model that
    was fine-tuned on something else should find it as well as before.

    Args:
        exclude: training texts; paragraphs with a near-duplicate among them are left out.
        limit: largest number of queries.

    Raises:
        DataError: this Python was installed without that text, or `exclude` contains most of it.
    """
    if importlib.util.find_spec("pydoc_data") is None:
        raise DataError(
            "This Python lacks the module pydoc_data, whose text serves as the general retrieval set. "
            "Use a Python with the complete standard library."
        )
    from pydoc_data.topics import topics

    paragraphs = [pair for _, topic in sorted(topics.items()) for pair in _sentence_and_rest(topic)]
    # Excluded texts stand first, as rows equal in both columns: whatever comes close to one later is dropped.
    known = [(text, text) for text in exclude]
    kept = [i - len(known) for i in distinct_rows([*known, *paragraphs])]
    chosen = [paragraphs[i] for i in kept if i >= 0][:limit]
    if not chosen:
        raise DataError("No paragraph is left for the general retrieval set: the training texts contain all of them.")
    names = [f"paragraph {number}" for number in range(1, len(chosen) + 1)]
    return RetrievalData(
        queries={name: sentence for name, (sentence, _) in zip(names, chosen, strict=True)},
        corpus={name: rest for name, (_, rest) in zip(names, chosen, strict=True)},
        relevant={name: {name} for name in names},
    )


def _sentence_and_rest(topic: str) -> Iterator[tuple[str, str]]:
    for paragraph in re.split(r"\n\s*\n", topic):
        # Indented lines are grammar and examples.
        if not _PROSE.match(paragraph) or "\n " in paragraph:
            continue
        text = " ".join(paragraph.split())
        sentence = first_sentence(text)
        rest = text.removeprefix(sentence).strip()
        if len(sentence.split()) >= _MIN_WORDS_QUERY and len(rest.split()) >= _MIN_WORDS_ANSWER:
            yield sentence, rest
