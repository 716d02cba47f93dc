"""Steps replayed from CUDA graphs against steps that are not."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.accelerate.graphs import EncoderGraphs
from embtune.accelerate.recordable import embed_row, why_not_recordable
from embtune.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
from embtune.packing.row import PackedRow

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")]

TinyDir = Callable[..., Path]


def load(folder: Path, **settings: object) -> FastSentenceTransformer:
    model = FastSentenceTransformer.from_pretrained(folder, device="cuda", dtype="bfloat16", engine="packed")
    model = FastSentenceTransformer.get_peft_model(model, r=4, lora_alpha=8, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def rows(count: int, seed: int = 0) -> list[PackedRow]:
    generator = np.random.default_rng(seed)
    batches = [[generator.integers(5, 100, generator.integers(1, 90)) for _ in range(12)] for _ in range(count)]
    return [PackedRow.of([texts], token_types=True).to("cuda") for texts in batches]


def graphs_of(model: FastSentenceTransformer, **settings: int) -> tuple[EncoderGraphs, list[torch.nn.Parameter]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embed = partial(embed_row, model, model.engine)
    return EncoderGraphs(embed, trained, autocast=torch.bfloat16, **{"step": 256, **settings}), trained


def gradients(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    found = torch.cat([parameter.grad.flatten() for parameter in parameters]).clone()
    for parameter in parameters:
        parameter.grad = None
    return found


def plain(model: FastSentenceTransformer, row: PackedRow) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return embed_row(model, model.engine, row, 128)


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "qwen3"])
def test_replays_give_the_gradients_of_ordinary_steps_also_summed(model_type: str, tiny_dir: TinyDir) -> None:
    model = load(tiny_dir(model_type)).eval()
    graphs, trained = graphs_of(model)
    batches = rows(4)
    weights = torch.randn(12, 32, device="cuda")
    for accumulated in (1, 3):
        for start in range(2):
            for row in batches[start : start + accumulated]:
                embeddings = graphs(row)
                assert embeddings is not None
                (embeddings * weights).sum().backward()
            replayed = gradients(trained)
            for row in batches[start : start + accumulated]:
                (plain(model, row) * weights).sum().backward()
            ordinary = gradients(trained)
            assert (replayed - ordinary).norm() <= 0.02 * ordinary.norm()


def test_dropout_differs_from_replay_to_replay(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert")).train()
    graphs, _ = graphs_of(model)
    [row] = rows(1)
    first, second = graphs(row).detach(), graphs(row).detach()
    assert not torch.allclose(first, second)


def test_a_forward_without_its_backward_blocks_the_next_only_while_it_lives(tiny_dir: TinyDir) -> None:
    graphs, _ = graphs_of(load(tiny_dir("bert")), limit=1)
    first, *_ = rows(1)
    waiting = graphs(first)
    assert waiting is not None
    assert graphs(first) is None
    del waiting
    assert graphs(first) is not None
    with torch.no_grad():
        assert graphs(first) is None


def test_shapes_are_bounded(tiny_dir: TinyDir) -> None:
    graphs, _ = graphs_of(load(tiny_dir("bert")), limit=1, step=64)
    served = [graphs(row) is not None for row in rows(6)]
    assert served[0]
    assert not all(served)
    assert len(graphs.shapes) == 1


def train(folder: Path, out: Path, **settings: object) -> list[float]:
    model = load(folder)
    texts = [f"text {i} " + "word " * (i % 40) for i in range(256)]
    data = Dataset.from_dict({"anchor": texts, "positive": [text[::-1] for text in texts]})
    cached = settings.pop("cached", False)
    loss = (
        CachedMultipleNegativesRankingLoss(model, mini_batch_size=8) if cached else MultipleNegativesRankingLoss(model)
    )
    model.eval()
    args = SentenceTransformerTrainingArguments(
        str(out),
        max_steps=20,
        per_device_train_batch_size=16,
        bf16=True,
        logging_steps=1,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"cached": True}])
def test_training_with_graphs_is_training(settings: dict[str, object], tiny_dir: TinyDir, tmp_path: Path) -> None:
    folder = tiny_dir("distilbert")
    with_graphs = train(folder, tmp_path / "graphs", cuda_graphs="always", **settings)
    without = train(folder, tmp_path / "plain", cuda_graphs="never", **settings)
    assert with_graphs == pytest.approx(without, rel=0.05)
    assert with_graphs[-1] < with_graphs[0]


def test_a_step_that_does_not_log_never_waits_for_the_device(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert")).train()
    assert why_not_recordable(model, model.engine, torch.bfloat16) is None
    graphs, trained = graphs_of(model)
    optimizer = torch.optim.AdamW(trained, fused=True)
    batches = rows(3)

    def step(row: PackedRow) -> None:
        graphs(row).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for row in batches:
        step(row)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for row in batches:
            step(row)
    finally:
        torch.cuda.set_sync_debug_mode("default")
