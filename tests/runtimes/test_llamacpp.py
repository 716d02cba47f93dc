"""llama.cpp computes the embeddings that were trained: same token ids, same directions, from the written GGUF file."""

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tiny
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from embtune.export.gguf import write_gguf

llama_cpp = pytest.importorskip("llama_cpp")

pytestmark = pytest.mark.llamacpp

TEXTS = [
    *tiny.TEXTS,
    "  leading, double  and trailing spaces  ",
    "tabs\tand\nnew\r\n\r\nlines",
    "it's what we'll say: I'M 12345 or 3.14",
    "long " * 400,
]


@contextmanager
def opened(path: Path, context_length: int) -> Iterator[Any]:
    sizes = dict.fromkeys(("n_ctx", "n_batch", "n_ubatch"), context_length)
    model = llama_cpp.Llama(str(path), embedding=True, n_threads=1, n_threads_batch=1, verbose=False, **sizes)
    try:
        yield model
    finally:
        model.close()


def embed(model: Any, ids: list[int]) -> np.ndarray:
    """The unit-length embedding of a text given as token ids, cut to the maximum length by the caller."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), True)
    tokens = (llama_cpp.llama_token * len(ids))(*ids)
    assert llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(tokens, len(ids))) == 0
    vector = np.array(llama_cpp.llama_get_embeddings_seq(model.ctx, 0)[: model.n_embd()])
    return vector / np.linalg.norm(vector)


def cosines(trained: SentenceTransformer, path: Path, quantization: str) -> np.ndarray:
    """Write the model, read it with llama.cpp, compare token ids, and return the cosine to the trained embeddings."""
    length = trained.max_seq_length
    write_gguf(
        trained[0].model,
        trained.tokenizer,
        path,
        pooling_mode=trained[1].pooling_mode,
        max_seq_length=length,
        quantization=quantization,
    )
    expected = trained.encode(TEXTS, normalize_embeddings=True)
    with opened(path, length) as model:
        assert llama_cpp.llama_model_n_ctx_train(model.model) == length
        found = []
        for text in TEXTS:
            ids = trained.tokenizer(text, verbose=False)["input_ids"]
            assert model.tokenize(text.encode()) == ids, text
            found.append(embed(model, trained.tokenizer(text, truncation=True, max_length=length)["input_ids"]))
    return (np.array(found) * expected).sum(axis=1)


def loaded(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


# On the one-letter text q8_0 alone costs 0.0011: llama.cpp rounds the activations to 8 bits too.
@pytest.mark.parametrize(("quantization", "least"), [("f32", 0.9999), ("f16", 0.9999), ("q8_0", 0.9985)])
def test_minilm(quantization: str, least: float, minilm_dir: Path, tmp_path: Path) -> None:
    found = cosines(loaded(minilm_dir), tmp_path / "m.gguf", quantization)
    assert found.min() >= least
    assert found.mean() >= max(least, 0.999)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "modernbert", "qwen3", "xlm-roberta"])
def test_families(model_type: str, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    assert cosines(loaded(tiny_dir(model_type)), tmp_path / "m.gguf", "f32").min() >= 0.9999


def test_unigram_with_a_character_map_of_sentencepiece(tmp_path: Path) -> None:
    trained = io.BytesIO()
    sentences = [line for text in TEXTS for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=trained, vocab_size=150, hard_vocab_limit=False, minloglevel=2
    )
    proto = ModelProto.FromString(trained.getvalue())
    specials = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    tokenizer = transformers.XLMRobertaTokenizer(
        vocab=[*specials, *((piece.piece, piece.score) for piece in proto.pieces[3:]), ("<mask>", 0.0)],
        _spm_precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap,
    )
    backbone = tiny.tiny_backbone("xlm-roberta", vocab_size=len(tokenizer))
    path = write_gguf(backbone, tokenizer, tmp_path / "m.gguf", pooling_mode="mean")
    with opened(path, 158) as model:
        for text in [*TEXTS, "ﬁne ½ Ａｂｃ and\u200bzero width", "x\u00a0y\u3000z"]:
            assert model.tokenize(text.encode()) == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize("model_type", ["bert", "roberta", "qwen3", "xlm-roberta"])
def test_added_tokens_and_spare_embedding_rows(model_type: str, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny.ARCHITECTURES[model_type][0]())
    tokenizer.add_tokens(["FooBar"])
    backbone = tiny.tiny_backbone(model_type, vocab_size=len(tokenizer) + 5)
    path = write_gguf(backbone, tokenizer, tmp_path / "m.gguf", pooling_mode="mean")
    text = "a FooBar, and xFooBarx"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(len(tokenizer) - 1) == 2
    with opened(path, 64) as model:
        assert model.tokenize(text.encode()) == ids


def test_a_cased_tokenizer_stays_cased(tmp_path: Path) -> None:
    pieces = tiny.wordpiece().get_vocab()
    tokenizer = transformers.BertTokenizer(vocab={**pieces, "Köln": len(pieces)}, do_lower_case=False)
    backbone = tiny.tiny_backbone("bert", vocab_size=len(tokenizer))
    path = write_gguf(backbone, tokenizer, tmp_path / "m.gguf", pooling_mode="mean")
    with opened(path, 64) as model:
        assert model.tokenize("Köln köln koln".encode()) == tokenizer("Köln köln koln")["input_ids"]
