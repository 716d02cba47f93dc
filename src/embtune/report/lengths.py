"""How long the training texts are, and what padding them to rectangles would cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import SentenceTransformer

SAMPLE = 2_000  # rows of each data set: the shares below are then known to about one per cent
TEXTS_AT_ONCE = 256
BINS = 40


def measure_lengths(
    model: SentenceTransformer,
    datasets: Mapping[str, Dataset],
    batch_size: int,
    prompts: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Count tokens, as the model would read them, in a random sample of the rows.

    Args:
        datasets: name -> rows; every column of strings counts, and columns of the same name are taken together.
        batch_size: rows that a padded trainer would put into one batch, each column padded to its longest text.
        prompts: column -> text that is put before each of its texts.

    Returns:
        The fields of a `lengths` event, or None for a model that reads no tokens: `rows`; `tokens_per_row`; `columns`
        (name -> `counts` of a histogram over `edges`, `mean`, `longest`); `truncated`, the share of texts that fill
        `max_seq_length`; `padding`, the share of a padded trainer's tokens that is padding; `packed`, whether this
        model leaves it out; and `tokens_read`, how many tokens attention reads for each that this model computes.
    """
    generator = np.random.default_rng(seed)
    parts = [_sample(model, rows, prompts or {}, generator) for rows in datasets.values()]
    found = [part for part in parts if part]
    if not found:
        return None
    columns: dict[str, np.ndarray] = {}
    for part in found:
        for name, lengths_N in part.items():
            columns[name] = np.concatenate([columns.get(name, lengths_N[:0]), lengths_N])
    every = np.concatenate(list(columns.values()))
    rows = sum(len(next(iter(part.values()))) for part in found)
    edges = np.linspace(0, max(BINS, int(every.max())), BINS + 1)
    limit = model.max_seq_length
    packed = bool(getattr(model, "packs", False))
    padded = np.concatenate([_padded(part, batch_size) for part in found])
    computed = every if packed else padded
    return {
        "rows": rows,
        "tokens_per_row": float(every.sum() / rows),
        "edges": edges.round(2),
        "columns": {name: _describe(lengths_N, edges) for name, lengths_N in columns.items()},
        "max_seq_length": limit,
        "truncated": float((every >= limit).mean()) if limit else 0.0,
        "batch_size": batch_size,
        "padding": 1 - float(every.sum() / padded.sum()),
        "packed": packed,
        "tokens_read": float((computed**2).sum() / computed.sum()),
    }


def _sample(
    model: SentenceTransformer, rows: Dataset, prompts: Mapping[str, str], generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Column -> tokens of each text, of the same rows in all columns and in random order."""
    chosen = rows.select(generator.permutation(len(rows))[:SAMPLE])
    columns = {}
    for name in rows.column_names:
        texts = chosen[name][:]
        if texts and all(isinstance(text, str) for text in texts):
            lengths = _tokens(model, texts, prompts.get(name))
            if lengths is None:
                return {}
            columns[name] = lengths
    return columns


def _tokens(model: SentenceTransformer, texts: Sequence[str], prompt: str | None) -> np.ndarray | None:
    lengths = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        features = model.preprocess(list(texts[start : start + TEXTS_AT_ONCE]), prompt=prompt)
        if "attention_mask" not in features:
            return None
        lengths.append(features["attention_mask"].sum(dim=1).numpy())
    return np.concatenate(lengths)


def _describe(lengths_N: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    counts = np.histogram(lengths_N, edges)[0]
    return {"counts": counts, "mean": float(lengths_N.mean()), "longest": int(lengths_N.max())}


def _padded(columns: Mapping[str, np.ndarray], batch_size: int) -> np.ndarray:
    """Tokens of each text (N,) where each column of a batch is as wide as its longest text."""
    return np.concatenate(
        [
            np.full_like(batch, batch.max())
            for lengths_N in columns.values()
            for batch in np.split(lengths_N, range(batch_size, len(lengths_N), batch_size))
        ]
    )
