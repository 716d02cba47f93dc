"""`encode` lays the token ids of plain texts end to end before they are moved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import TEXTS

from embtune import FastSentenceTransformer

TinyDir = Callable[..., Path]


def load(folder: Path, **settings: Any) -> FastSentenceTransformer:
    return FastSentenceTransformer.from_pretrained(
        folder, **{"dtype": "float32", "device": "cpu", "engine": "packed", **settings}
    )


def seen_by(model: FastSentenceTransformer) -> list[object]:
    """The kind of the token ids in each batch from now on."""
    kinds: list[object] = []
    model.register_forward_pre_hook(lambda _, args: kinds.append(type(args[0].get("input_ids"))))
    return kinds


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "xlm-roberta", "modernbert", "qwen3", "t5"])
@pytest.mark.parametrize("prompt", [None, "search: "])
def test_embeddings_are_those_of_padded_batches(model_type: str, prompt: str | None, tiny_dir: TinyDir) -> None:
    model, reference = (load(tiny_dir(model_type), engine=engine) for engine in ("packed", "reference"))
    for each in (model, reference):
        each[1].include_prompt = prompt is None
    kinds = seen_by(model)
    asked = {"prompt": prompt, "batch_size": 5}
    torch.testing.assert_close(model.encode(TEXTS, **asked), reference.encode(TEXTS, **asked), rtol=0, atol=1e-5)
    assert kinds
    assert not model.packs or set(kinds) == {list}
    assert model.packs or (model_type, prompt) == ("modernbert", "search: ")  # CLS, before sentence-transformers 6.2
    torch.testing.assert_close(model.encode(TEXTS[0]), reference.encode(TEXTS[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [tuple, np.array, lambda texts: Dataset.from_dict({"text": texts})["text"]])
def test_texts_come_in_every_form(form: Callable[[list[str]], Any], tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"))
    expected = model.encode(TEXTS)
    kinds = seen_by(model)
    assert np.array_equal(model.encode(form(TEXTS)), expected)
    assert set(kinds) == {list}


def test_the_tokenizer_pads_as_it_was_told(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"))
    model.preprocess(TEXTS)
    backend = model.tokenizer.backend_tokenizer
    padding = backend.padding
    assert padding is not None
    # Otherwise a thread that asks for padded texts at the same time might get them unpadded.
    model.encode(TEXTS)
    assert backend.padding == padding


def test_what_is_more_than_a_text_is_padded_as_ever(tiny_dir: TinyDir) -> None:
    model, reference = (load(tiny_dir("bert"), engine=engine) for engine in ("packed", "reference"))
    kinds = seen_by(model)
    pairs = [("a question", "its answer"), ("b", "c and d")]
    torch.testing.assert_close(model.encode(pairs), reference.encode(pairs), rtol=0, atol=1e-5)
    for ours, theirs in zip(
        model.encode(TEXTS, output_value="token_embeddings"),
        reference.encode(TEXTS, output_value="token_embeddings"),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert model.encode(TEXTS[:2], None, None, 32, False, None)[0].keys() >= {"sentence_embedding", "attention_mask"}
    cut = {"text": {"max_length": 4, "truncation": True}}
    torch.testing.assert_close(
        model.encode(TEXTS, processing_kwargs=cut), reference.encode(TEXTS, processing_kwargs=cut), rtol=0, atol=1e-5
    )
    assert list not in kinds


def test_a_text_without_a_token_is_padded(tiny_dir: TinyDir) -> None:
    model, reference = (load(tiny_dir("bert"), engine=engine) for engine in ("packed", "reference"))
    for each in (model, reference):
        each.tokenizer.backend_tokenizer.post_processor = None  # no [CLS], no [SEP]
    texts = ["a text", "", "another, longer text than the first"]
    torch.testing.assert_close(
        torch.tensor(model.encode(texts)), torch.tensor(reference.encode(texts)), rtol=0, atol=1e-5, equal_nan=True
    )


def test_several_processes_share_the_work(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"))
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        torch.testing.assert_close(model.encode(TEXTS, pool=pool), model.encode(TEXTS), rtol=0, atol=1e-5)
    finally:
        model.stop_multi_process_pool(pool)
