"""A row that a worker laid out: no step waits for the device to read it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TEXTS

from embtune import FastSentenceTransformer
from embtune.accelerate.recordable import embed_row
from embtune.packing.columns import embed_row_once
from embtune.packing.row import PackedRow

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning")]


def test_a_prepared_row_is_embedded_without_waiting(tiny_dir: Callable[..., Path]) -> None:
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), device="cuda", engine="packed", dtype="bfloat16")
    model[1].pooling_mode = "cls"  # sentence-transformers 6.0 asks the device for the number of texts before a mean
    padded = model.preprocess(TEXTS)
    ids = [row[real].numpy() for row, real in zip(padded["input_ids"], padded["attention_mask"].bool(), strict=True)]
    texts = [each.astype(np.int32) for each in ids]
    model.eval()
    with torch.no_grad():
        model({key: value.cuda() for key, value in padded.items() if isinstance(value, torch.Tensor)})  # warm up
        try:
            torch.cuda.set_sync_debug_mode("error")
            row = PackedRow.of([texts[:5], texts[5:]], token_types=True).pin_memory().to("cuda")
            first, second = embed_row_once(model, row)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = model({key: value.cuda() for key, value in padded.items() if isinstance(value, torch.Tensor)})
    found = torch.cat([first["sentence_embedding"], second["sentence_embedding"]])
    torch.testing.assert_close(found, expected["sentence_embedding"], rtol=0, atol=1e-3)


def test_a_model_with_windows_gives_the_same_by_either_kernel(tiny_dir: Callable[..., Path]) -> None:
    model = FastSentenceTransformer.from_pretrained(tiny_dir("modernbert"), device="cuda", dtype="bfloat16").eval()
    model.requires_grad_(True)
    generator = np.random.default_rng(0)
    row = PackedRow.of([[generator.integers(5, 100, length) for length in (1, 40, 150, 159, 3)]]).to("cuda")
    found = []
    for longest, attention in ((160, "tiles"), (1024, "windows")):
        assert model.engine.attention(model.device, model.dtype, longest) == attention
        model.zero_grad()
        embeddings = embed_row(model, model.engine, row, longest)
        (embeddings * torch.linspace(-1, 1, embeddings.shape[1], device="cuda")).sum().backward()
        gradients = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        found.append((embeddings.detach(), gradients.float()))
    (first, first_gradients), (second, second_gradients) = found
    assert (second - first).norm() <= 0.01 * first.norm()
    assert (second_gradients - first_gradients).norm() <= 0.05 * first_gradients.norm()
