"""Texts to token ids, a whole column at a time, exactly as the model's own `preprocess` would in each batch."""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import pyarrow as pa
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from transformers import PreTrainedTokenizerBase

from embtune.data.token_cache import ROWS, TokenCache, TokenColumn, record_batch
from embtune.errors import EmbtuneWarning

MIN_ROWS = 1_000
"""Columns with fewer texts are tokenised in less time than a file is worth."""

# Texts that take more than a few seconds.
_LONG = 100_000
# Part of every key: raise it when entries written by older code must not be read any more.
_VERSION = 1
# Their releases may cut texts differently.
_PACKAGES = ("tokenizers", "transformers", "sentence-transformers")
_UNPADDED: dict[str, dict[str, Any]] = {
    "text": {"padding": False, "return_attention_mask": False, "return_token_type_ids": False},
    "common": {"return_tensors": None},
}


def why_not_tokenised(model: SentenceTransformer) -> str | None:
    """What makes this model's input more than the token ids of each text for itself, or None."""
    transformer = model[0]
    if type(transformer) is not Transformer or type(model).preprocess is not SentenceTransformer.preprocess:
        return "the model does not begin with a plain Transformer module"
    if set(transformer.modality_config) != {"text"}:
        return "the model takes more than plain text"
    if transformer.processing_kwargs:
        return "the model has processing_kwargs of its own"
    backend = getattr(transformer.tokenizer, "backend_tokenizer", None)
    if getattr(getattr(backend, "model", None), "dropout", None):
        return "the tokenizer cuts a text differently each time (BPE dropout)"
    return None


class ColumnTokeniser:
    """Tokenises columns for one model; asks a cache first, and remembers what it has made.

    Args:
        model: one that `why_not_tokenised` has nothing against.
        cache: for columns of `MIN_ROWS` texts and more.
        say: told before a column is tokenised that takes long.
    """

    def __init__(self, model: SentenceTransformer, cache: TokenCache, say: Callable[[str], object] = print) -> None:
        self.model = model
        self._cache = cache
        self._say = say
        self._made: dict[str, TokenColumn] = {}
        self._tokenizer: tuple[PreTrainedTokenizerBase, int, str] | None = None
        self._texts: Counter[str] = Counter()

    def summary(self, seconds: float) -> str:
        """What became of the texts since the last summary, in words; `seconds` is what that took."""
        texts, self._texts = self._texts, Counter()
        if not texts:
            return "as made before"
        said = [f"{texts['read']:,} texts read from the token cache"] if texts["read"] else []
        if texts["made"]:
            kept = ", kept for later runs" if texts["kept"] else ""
            said.append(f"{texts['made']:,} texts tokenised in {seconds:.1f} s{kept}")
        return "; ".join(said)

    def __call__(self, texts: Dataset, asked: Mapping[str, Any]) -> TokenColumn:
        """The token ids of a data set's only column.

        Args:
            texts: one column of strings.
            asked: what `preprocess` is told beside the texts: prompt, task, maximum length.
        """
        settings = self._settings(asked)
        if settings is None:
            return self._in_memory(texts, asked)
        key = hashlib.sha256(f"{settings}\n{_fingerprint(texts)}".encode()).hexdigest()
        if key not in self._made:
            self._made[key] = self._from_cache(key, texts, asked) or self._in_memory(texts, asked)
        return self._made[key]

    def _from_cache(self, key: str, texts: Dataset, asked: Mapping[str, Any]) -> TokenColumn | None:
        if len(texts) < MIN_ROWS:
            return None
        try:
            column = self._cache.read(key, len(texts))
            if column is not None:
                self._texts["read"] += len(texts)
                return column
            self._cache.write(key, self._batches(texts, asked), self._facts(texts, asked))
            column = self._cache.read(key, len(texts))
            self._cache.prune()
        except OSError as error:
            warnings.warn(
                f"The token cache in {self._cache.folder} cannot be used ({error}), so texts are tokenised again in "
                "every run. Make room, set EMBTUNE_CACHE to another folder, or pass token_cache=False.",
                EmbtuneWarning,
                stacklevel=2,
            )
            return None
        if column is not None:
            self._texts["made"] += len(texts)
            self._texts["kept"] += len(texts)
        return column

    def _in_memory(self, texts: Dataset, asked: Mapping[str, Any]) -> TokenColumn:
        self._texts["made"] += len(texts)
        return TokenColumn(list(self._batches(texts, asked)))

    def _batches(self, texts: Dataset, asked: Mapping[str, Any]) -> Iterator[pa.RecordBatch]:
        if len(texts) >= _LONG:
            self._say(f"token ids: tokenising {len(texts):,} texts …")
        for batch in _parts(texts):
            yield record_batch(self.model.preprocess(batch, **asked, processing_kwargs=_UNPADDED)["input_ids"])

    def _settings(self, asked: Mapping[str, Any]) -> str | None:
        """All that the ids depend on beside the texts; None for a tokenizer whose state cannot be read as JSON."""
        tokenizer = self.model[0].tokenizer
        if not hasattr(tokenizer, "backend_tokenizer") or not type(tokenizer).__module__.startswith("transformers."):
            return None
        settings = {
            "version": _VERSION,
            "packages": {package: metadata.version(package) for package in _PACKAGES},
            "tokenizer": [type(tokenizer).__name__, self._tokenizer_digest(tokenizer)],
            "special": [tokenizer.truncation_side, tokenizer.split_special_tokens],
            "max_length": self.model[0].max_seq_length,
            "asked": dict(asked),
        }
        return json.dumps(settings, sort_keys=True)

    def _tokenizer_digest(self, tokenizer: PreTrainedTokenizerBase) -> str:
        known = self._tokenizer
        # A vocabulary of 262,144 pieces is 33 MB of JSON: too much to be read again for each evaluation.
        if known is None or known[0] is not tokenizer or known[1] != len(tokenizer):
            state = json.loads(tokenizer.backend_tokenizer.to_str())
            for name in ("truncation", "padding"):  # left there by the last call, and set anew by each
                state.pop(name, None)
            known = tokenizer, len(tokenizer), hashlib.sha256(json.dumps(state).encode()).hexdigest()
            self._tokenizer = known
        return known[2]

    def _facts(self, texts: Dataset, asked: Mapping[str, Any]) -> dict[str, str]:
        transformer = self.model[0]
        return {
            "texts": f"{len(texts):,}",
            "tokenizer": str(transformer.tokenizer.name_or_path),
            "prompt": asked.get("prompt") or "",
            "max_length": str(transformer.max_seq_length),
        }


def _fingerprint(texts: Dataset) -> str:
    """Of the texts alone: equal whenever they are, in any run, however the data set was made."""
    digest = hashlib.sha256()
    for batch in _parts(texts):
        digest.update(json.dumps(batch).encode())
    return digest.hexdigest()


def _parts(texts: Dataset) -> Iterator[list[str]]:
    [name] = texts.column_names
    for batch in texts.iter(batch_size=ROWS):
        yield batch[name]
