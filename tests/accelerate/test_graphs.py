"""CUDA graphs: what can be checked without a GPU is how rows are filled up, and who is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.accelerate.graphs import Shape, SharedGradients
from embtune.accelerate.recordable import embed_row, why_not_recordable
from embtune.errors import ArgumentError
from embtune.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
from embtune.packing.row import PackedRow

TinyDir = Callable[..., Path]


@pytest.mark.parametrize("lengths", [[1], [512, 3, 40], [17] * 256, [128] * 8, [129, 1]])
@pytest.mark.parametrize("step", [64, 1024])
def test_shapes_hold_their_rows(lengths: list[int], step: int) -> None:
    shape = Shape.of(lengths, step)
    borders = shape.borders(lengths)
    assert shape.tokens % step == 0
    assert 0 < shape.tokens - sum(lengths) <= step + shape.fillers
    assert shape.max_length >= max(lengths)
    assert borders[-1] == shape.tokens
    assert borders[: len(lengths) + 1].diff().tolist() == lengths
    fillers = borders.diff()[len(lengths) :]
    assert len(fillers) == shape.fillers
    assert (fillers >= 1).all()
    assert (fillers <= shape.max_length).all()


def test_shared_gradients_are_those_that_autograd_would_leave() -> None:
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    shared = SharedGradients([used, unused])

    def replay() -> None:
        shared.add([torch.tensor([1.0, 2.0]), None])

    for _ in range(2):  # steps, each of two batches
        for batch in (1, 2):
            shared.collect(replay, [0])
            assert used.grad.tolist() == [batch, 2 * batch]
        used.grad = None
    own = used.grad = torch.tensor([10.0, 10.0])  # of an ordinary backward in between
    shared.collect(replay, [0])
    shared.collect(replay, [0])
    assert used.grad is own
    assert own.tolist() == [12, 14]
    # None, which an optimizer leaves alone: a gradient of zeros would decay it.
    assert unused.grad is None


def test_the_recorded_pass_is_the_models_own(tiny_dir: TinyDir) -> None:
    model = FastSentenceTransformer.from_pretrained(
        tiny_dir("bert"), dtype="float32", device="cpu", engine="packed"
    ).eval()
    texts = ["a text", "another, longer text than the first", "x"]
    ids = [np.array(model.tokenizer(text)["input_ids"]) for text in texts]
    row = PackedRow.of([ids], token_types=True)
    expected = torch.tensor(model.encode(texts))
    torch.testing.assert_close(embed_row(model, model.engine, row, 128), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "loss", "why"),
    [
        ({}, MultipleNegativesRankingLoss, "the model is on cpu"),
        ({}, CachedMultipleNegativesRankingLoss, "the loss calls the model itself"),
        ({"token_cache": False}, MultipleNegativesRankingLoss, "token_cache=False leaves the texts"),
    ],
)
def test_who_cannot_be_recorded_is_told_why(
    settings: dict[str, bool], loss: type[torch.nn.Module], why: str, tiny_dir: TinyDir, tmp_path: Path
) -> None:
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), device="cpu", engine="packed")
    assert "NVIDIA" in str(why_not_recordable(model, model.engine, torch.bfloat16))
    plain = {"report_to": "none", "use_cpu": True, "per_device_train_batch_size": 2, **settings}
    args = SentenceTransformerTrainingArguments(str(tmp_path), cuda_graphs="always", **plain)
    pairs = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})
    model = FastSentenceTransformer.get_peft_model(model)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss(model))
    with pytest.raises(ArgumentError, match=f'cuda_graphs="always" cannot be honoured: {why}'):
        trainer.train()
