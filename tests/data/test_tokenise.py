"""A column's token ids: those that `preprocess` makes, under a key that changes with whatever they depend on."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer
from tiny import TEXTS
from tokenizers import models

from embtune.data import tokenise
from embtune.data.token_cache import TokenCache
from embtune.data.tokenise import ColumnTokeniser, why_not_tokenised
from embtune.errors import EmbtuneWarning

TinyDir = Callable[..., Path]
COLUMN = [f"{text} {index}" for index in range(3) for text in TEXTS]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise, "MIN_ROWS", 10)


@pytest.fixture
def model(tiny_dir: TinyDir) -> Iterator[SentenceTransformer]:
    return SentenceTransformer(str(tiny_dir("bert")), device="cpu")


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return TokenCache(tmp_path)


def data(texts: list[str] = COLUMN) -> Dataset:
    return Dataset.from_dict({"anchor": texts})


def keys(cache: TokenCache) -> set[str]:
    return {entry.path.stem for entry in cache.entries()}


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "qwen3"])
@pytest.mark.parametrize("prompt", [None, "find: "])
def test_the_ids_are_those_of_preprocess(
    model_type: str, prompt: str | None, tiny_dir: TinyDir, cache: TokenCache
) -> None:
    model = SentenceTransformer(str(tiny_dir(model_type)), device="cpu")
    model.max_seq_length = 20
    for _ in ("made", "read"):
        column = ColumnTokeniser(model, cache)(data(), {"prompt": prompt, "task": None})
        assert len(column) == len(COLUMN)
        for row, text in enumerate(COLUMN):
            assert column[row].tolist() == model.preprocess([text], prompt=prompt)["input_ids"][0].tolist()


def test_equal_texts_are_read_wherever_they_come_from(model: SentenceTransformer, cache: TokenCache) -> None:
    first = ColumnTokeniser(model, cache)
    first(data(), {"prompt": None})
    assert first.summary(1.0) == f"{len(COLUMN)} texts tokenised in 1.0 s, kept for later runs"
    shuffled = data(COLUMN[::-1]).select(range(len(COLUMN) - 1, -1, -1))
    chunked = concatenate_datasets([data(COLUMN[:5]), data(COLUMN[5:])]).rename_column("anchor", "positive")
    model.preprocess(["x"] * 2)  # which leaves its padding and truncation in the tokenizer
    for same in (data(), shuffled, chunked):
        tokeniser = ColumnTokeniser(model, cache)
        tokeniser(same, {"prompt": None})
        assert tokeniser.summary(1.0) == f"{len(COLUMN)} texts read from the token cache"
        tokeniser(same, {"prompt": None})
        assert tokeniser.summary(1.0) == "as made before"
    assert len(keys(cache)) == 1


def test_the_key_changes_with_whatever_changes_the_ids(model: SentenceTransformer, cache: TokenCache) -> None:
    def tokenise_again(texts: list[str] = COLUMN, prompt: str | None = None) -> None:
        count = len(keys(cache))
        ColumnTokeniser(model, cache)(data(texts), {"prompt": prompt})
        assert len(keys(cache)) == count + 1

    tokenise_again()
    tokenise_again([*COLUMN[:-1], "another text"])
    tokenise_again([*COLUMN[:-2], COLUMN[-2] + COLUMN[-1][:1], COLUMN[-1][1:]])
    tokenise_again(prompt="find: ")
    model.max_seq_length = 12
    tokenise_again()
    model.tokenizer.truncation_side = "left"
    tokenise_again()
    model.tokenizer.add_tokens(["yield line"])
    tokenise_again()
    model.tokenizer.backend_tokenizer.normalizer.lowercase = False
    tokenise_again()


def test_few_texts_are_not_worth_a_file(model: SentenceTransformer, cache: TokenCache) -> None:
    tokeniser = ColumnTokeniser(model, cache)
    assert len(tokeniser(data(TEXTS[:3]), {})) == 3
    assert tokeniser.summary(1.0) == "3 texts tokenised in 1.0 s"
    assert not keys(cache)


def test_without_a_usable_folder_everything_stays_in_memory(model: SentenceTransformer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tokeniser = ColumnTokeniser(model, TokenCache(tmp_path / "file"))
    with pytest.warns(EmbtuneWarning, match="EMBTUNE_CACHE"):
        column = tokeniser(data(), {})
    assert column[5].tolist() == model.preprocess([COLUMN[5]])["input_ids"][0].tolist()
    assert tokeniser.summary(1.0) == f"{len(COLUMN)} texts tokenised in 1.0 s"


def test_a_tokenizer_that_cuts_at_random_is_left_alone(tiny_dir: TinyDir) -> None:
    model = SentenceTransformer(str(tiny_dir("roberta")), device="cpu")
    assert why_not_tokenised(model) is None
    assert isinstance(model.tokenizer.backend_tokenizer.model, models.BPE)
    model.tokenizer.backend_tokenizer.model.dropout = 0.1
    assert "BPE dropout" in why_not_tokenised(model)
