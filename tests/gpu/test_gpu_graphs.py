"""Steps replayed from CUDA graphs against steps that are not."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import randomise_adapter
from transformers import TrainerCallback, TrainerState, TrainingArguments

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.accelerate.graphs import EncoderGraphs
from embtune.accelerate.recordable import embed_row, why_not_recordable
from embtune.errors import ArgumentError
from embtune.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
from embtune.packing.row import PackedRow
from embtune.train.kernels import use_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")]

TinyDir = Callable[..., Path]


def load(folder: Path, **settings: object) -> FastSentenceTransformer:
    model = FastSentenceTransformer.from_pretrained(folder, device="cuda", dtype="bfloat16", engine="packed")
    model = FastSentenceTransformer.get_peft_model(model, r=4, lora_alpha=8, **settings)
    randomise_adapter(model, std=0.05)
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


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "modernbert", "qwen3"])
def test_rounded_weights_lead_no_further_from_float32_than_autocast(model_type: str, tiny_dir: TinyDir) -> None:
    def all_weights(engine: str) -> tuple[FastSentenceTransformer, list[torch.nn.Parameter]]:
        model = FastSentenceTransformer.from_pretrained(
            tiny_dir(model_type), device="cuda", dtype="float32", engine=engine, full_finetuning=True
        ).eval()
        return model, [weight for weight in model[0].parameters() if weight.requires_grad]

    exact, trained = all_weights("reference")
    model, rounded = all_weights("packed")
    use_kernels(model, fused=True, triton=True)
    embed = partial(embed_row, model, model.engine, rounds_at_once=True)
    graphs = EncoderGraphs(embed, rounded, autocast=torch.bfloat16, step=256)
    generator, padding = np.random.default_rng(0), exact.tokenizer.pad_token_id
    weights = torch.randn(12, 32, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    found: list[list[torch.Tensor]] = [[], [], []]
    for _ in range(4):  # of one batch alone, either may come out nearer
        texts = [generator.integers(5, 100, generator.integers(1, 90)) for _ in range(12)]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], True, padding).cuda()
        for gradients_of, autocast in zip(found[:2], (False, True), strict=True):
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                features = {"input_ids": ids, "attention_mask": (ids != padding).long()}
                embeddings = exact(features)["sentence_embedding"]
            gradients_of.append(torch.cat(_gradients((embeddings * weights).sum(), trained)))
        row = PackedRow.of([texts], model.engine.padding_id, token_types=model_type == "bert").to("cuda")
        (graphs(row) * weights).sum().backward()
        found[2].append(torch.cat([_or_zeros(weight) for weight in rounded]))
        model.zero_grad()
    reference, stock, ours = map(torch.stack, found)
    assert (ours - reference).norm() <= 1.05 * (stock - reference).norm()
    assert {weight.dtype for weight in rounded} == {torch.float32}


def _gradients(loss: torch.Tensor, weights: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [part.flatten() for part in torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)]


def _or_zeros(weight: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(weight).flatten() if weight.grad is None else weight.grad.flatten()


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
    model = load(folder, use_gradient_checkpointing=settings.pop("checkpointing", None))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # a replay draws other numbers
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


@pytest.mark.parametrize(
    "settings", [{}, {"gradient_accumulation_steps": 2}, {"fused_kernels": "always"}, {"fused_kernels": "never"}]
)
def test_training_with_graphs_is_training(settings: dict[str, object], tiny_dir: TinyDir, tmp_path: Path) -> None:
    folder = tiny_dir("distilbert")
    with_graphs = train(folder, tmp_path / "graphs", cuda_graphs="always", **settings)
    without = train(folder, tmp_path / "plain", cuda_graphs="never", **settings)
    assert with_graphs == pytest.approx(without, rel=0.05)
    assert with_graphs[-1] < with_graphs[0]


def test_runs_whose_batches_are_not_laid_out_go_without(tiny_dir: TinyDir, tmp_path: Path) -> None:
    for settings, why in (
        ({"cached": True}, "the loss calls the model itself"),
        ({"token_cache": False}, "token_cache"),
    ):
        with pytest.raises(ArgumentError, match=why):
            train(tiny_dir("bert"), tmp_path / "graphs", cuda_graphs="always", **settings)


def test_hooks_that_wait_for_gradients_are_not_passed_over(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"))
    graphs, trained = graphs_of(model)
    [row] = rows(1)
    trained[0].register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(RuntimeError, match="hooks on the parameters"):
        graphs(row)


def test_a_second_backward_is_an_error(tiny_dir: TinyDir) -> None:
    graphs, _ = graphs_of(load(tiny_dir("bert")))
    [row] = rows(1)
    loss = graphs(row).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("kernels", ["never", "always"])
def test_selective_checkpointing_is_recorded_too(kernels: str, tiny_dir: TinyDir, tmp_path: Path) -> None:
    settings = {"cuda_graphs": "always", "fused_kernels": kernels}
    recomputing = train(tiny_dir("bert"), tmp_path / "one", checkpointing="selective", **settings)
    assert recomputing == pytest.approx(train(tiny_dir("bert"), tmp_path / "other", **settings), rel=0.01)


def test_dropout_is_the_same_when_it_is_recomputed(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"), use_gradient_checkpointing="selective").train()
    graphs, trained = graphs_of(model)
    same = load(tiny_dir("bert")).train()
    others, trained_too = graphs_of(same)
    [row] = rows(1)
    found = []
    for graph, parameters in ((graphs, trained), (others, trained_too)):
        torch.manual_seed(5)
        embeddings = graph(row)
        (embeddings * torch.linspace(-1, 1, embeddings.shape[-1], device="cuda")).sum().backward()
        found.append(gradients(parameters))
    assert (found[0] - found[1]).norm() <= 0.01 * found[1].norm()


def arguments(out: Path, **settings: object) -> SentenceTransformerTrainingArguments:
    plain = {"per_device_train_batch_size": 16, "bf16": True, "save_strategy": "no", "report_to": "none"}
    return SentenceTransformerTrainingArguments(str(out), disable_tqdm=True, **{**plain, **settings})


class NoWaiting(TrainerCallback):
    """Makes every wait for the device an error, but in the first steps and in those that log."""

    def __init__(self) -> None:
        self.watched = 0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        watched = state.global_step >= 4 and (state.global_step + 1) % args.logging_steps != 0
        self.watched += watched
        torch.cuda.set_sync_debug_mode("error" if watched else "default")


def test_the_trainer_waits_for_the_device_only_where_it_logs(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = load(tiny_dir("bert"))
    texts = [f"text number {i:03}" for i in range(320)]
    data = Dataset.from_dict({"anchor": texts, "positive": texts[::-1]})
    watch = NoWaiting()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=1, logging_steps=5),
        train_dataset=data,
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[watch],
    )
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.watched == 12


def test_a_short_run_does_not_compile_and_a_later_one_remembers(
    tiny_dir: TinyDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    data = Dataset.from_dict({"anchor": [f"a {i}" for i in range(64)], "positive": [f"p {i}" for i in range(64)]})

    def train_with(mode: str) -> FastSentenceTransformer:
        model = load(tiny_dir("bert"))
        args = arguments(tmp_path, max_steps=3, fused_kernels=mode)
        loss = MultipleNegativesRankingLoss(model)
        SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss).train()
        return model

    assert not train_with("auto").engine.triton
    assert not list((tmp_path / "cache").glob("embtune-*"))
    assert train_with("always").engine.triton
    assert len(list((tmp_path / "cache").glob("embtune-*"))) == 1
    assert train_with("auto").engine.triton


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
