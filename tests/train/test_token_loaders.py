"""Texts tokenised once: every batch, and so every step, is that of tokenising in the collator, bit for bit."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import RoundRobinBatchSampler
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.modules import Router
from tiny import ARCHITECTURES, TEXTS

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.data import tokenise
from embtune.losses import (
    CachedMultipleNegativesRankingLoss,
    ContrastiveTensionLoss,
    CoSENTLoss,
    MultipleNegativesRankingLoss,
)
from embtune.packing.row import PREPARED, PackedRow

TinyDir = Callable[..., Path]
PROMPTS = {"anchor": "query: ", "positive": "a passage: "}


def pairs(count: int = 40, name: str = "pair", **columns: list[Any]) -> Dataset:
    """Pairs of 3 to 160 tokens; some answers belong to several questions."""
    anchors = [f"{name} {index}: {TEXTS[index % 12]}" for index in range(count)]
    positives = [f"{name} answer {index // 3}: {TEXTS[index // 3 % 11]}" for index in range(count)]
    return Dataset.from_dict({"anchor": anchors, "positive": positives, **columns})


def load(folder: Path, **settings: Any) -> FastSentenceTransformer:
    return FastSentenceTransformer.from_pretrained(
        folder, **{"dtype": "float32", "device": "cpu", "full_finetuning": True, **settings}
    )


def make(
    model: SentenceTransformer, folder: Path, data: Any, loss: Any = None, eval_dataset: Any = None, **settings: Any
) -> SentenceTransformerTrainer:
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = SentenceTransformerTrainingArguments(str(folder), **{**defaults, **settings})
    loss = MultipleNegativesRankingLoss(model) if loss is None else loss
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=data, eval_dataset=eval_dataset, loss=loss)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def batches(trainer: SentenceTransformerTrainer, epochs: int = 1, evaluation: bool = False) -> list[dict[str, Any]]:
    loader = trainer.get_eval_dataloader() if evaluation else trainer.get_train_dataloader()
    found = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        found += list(loader)
    return found


@pytest.mark.parametrize("prompts", [None, "find: ", PROMPTS])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_padded_batches_are_those_of_the_ordinary_collator(
    model_type: str, prompts: Any, tiny_dir: TinyDir, tmp_path: Path
) -> None:
    model = load(tiny_dir(model_type), engine="reference", max_seq_length=40)
    data = pairs(20, score=[index / 20 for index in range(20)])
    ours, theirs = (
        batches(make(model, tmp_path, data, CoSENTLoss(model), prompts=prompts, token_cache=on)) for on in (True, False)
    )
    assert len(ours) == 3
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_flat_rows_are_those_that_the_model_lays_out_itself(model_type: str, tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = load(tiny_dir(model_type), engine="packed", max_seq_length=40)
    # A literal padding token within a text, which models that count positions from it skip.
    texts = [f"{text} {model.tokenizer.pad_token} {text}" if index % 3 else text for index, text in enumerate(TEXTS)]
    data = Dataset.from_dict({"anchor": TEXTS, "positive": texts})
    [ours], [theirs] = (
        batches(make(model, tmp_path, data, per_device_train_batch_size=12, token_cache=on)) for on in (True, False)
    )
    row = ours[PREPARED]
    assert isinstance(row, PackedRow) and list(ours) == [PREPARED]
    assert row.columns == (12, 12)
    features, packing = model.flatten({PREPARED: row})
    start = 0
    for column in ("anchor", "positive"):
        padded = {key.removeprefix(f"{column}_"): value for key, value in theirs.items() if key.startswith(column)}
        expected, part = model.flatten(padded)
        assert packing.lengths[:12] == part.lengths
        tokens = slice(start, start + part.tokens)
        for name in ("input_ids", "position_ids", "token_type_ids"):
            assert (name in features) == (name in expected)
            if name in features:
                assert torch.equal(features[name][:, tokens], expected[name]), name
        packing.lengths = packing.lengths[12:]
        start += part.tokens
    features, packing = model.flatten({PREPARED: row})
    ends = torch.tensor([0, *packing.lengths]).cumsum(0)
    assert torch.equal(features["cu_seq_lens_q"], ends.int())
    assert torch.equal(features["seq_idx"][0], torch.repeat_interleave(torch.arange(24), ends.diff()))
    assert features["attention_mask"].packing is packing
    assert features["modality"] == "text"


DRAWN: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "no duplicates": {"batch_sampler": "no_duplicates"},
    "no duplicates, hashed": {"batch_sampler": "no_duplicates_hashed"},
    "last one dropped": {"dataloader_drop_last": True},
}


@pytest.mark.parametrize("drawn", DRAWN)
def test_batches_are_drawn_as_before(drawn: str, tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = load(tiny_dir("bert"), engine="reference")
    settings = {"eval_dataset": pairs(11, "other"), "seed": 5, **DRAWN[drawn]}
    before = make(model, tmp_path, pairs(43), token_cache=False, **settings)
    ours = make(model, tmp_path, pairs(43), **settings)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    with_workers = make(model, tmp_path, pairs(43), **settings, **workers)
    expected = batches(before, epochs=2)
    assert not torch.equal(expected[0]["anchor_input_ids"], expected[len(expected) // 2]["anchor_input_ids"])
    for found in (batches(ours, epochs=2), batches(with_workers, epochs=2)):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    for one, other in zip(batches(ours, evaluation=True), batches(before, evaluation=True), strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(
    ("engine", "settings"), [("packed", {}), ("packed", {"prompts": PROMPTS}), ("reference", {"prompts": PROMPTS})]
)
def test_a_run_is_the_same_step_by_step(
    engine: str, settings: dict[str, Any], tiny_dir: TinyDir, tmp_path: Path
) -> None:
    """Dropout on: the random state is the same as well."""
    results = []
    for on in (True, False):
        model = load(tiny_dir("bert"), engine=engine, max_seq_length=40)
        trainer = make(
            model,
            tmp_path,
            pairs(20),
            eval_dataset=pairs(11, "other"),
            eval_strategy="epoch",
            num_train_epochs=2,
            max_steps=-1,
            token_cache=on,
            **settings,
        )
        trainer.train()
        history = [{name: row[name] for name in row if name.endswith("loss")} for row in trainer.state.log_history]
        results.append((history, {name: weight.clone() for name, weight in model.named_parameters()}))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize("prompts", [None, {"pairs": PROMPTS, "scored": {"sentence1": "like: "}}])
def test_several_data_sets_each_with_its_loss(prompts: Any, tiny_dir: TinyDir, tmp_path: Path) -> None:
    def data(rows: int, name: str) -> DatasetDict:
        scores = [index / rows for index in range(rows)]
        scored = pairs(rows, f"scored {name}", score=scores)
        return DatasetDict(
            pairs=pairs(rows, name), scored=scored.rename_columns({"anchor": "sentence1", "positive": "sentence2"})
        )

    results = []
    for on in (True, False):
        model = load(tiny_dir("bert"), max_seq_length=40)
        losses = {"pairs": CachedMultipleNegativesRankingLoss(model, mini_batch_size=4), "scored": CoSENTLoss(model)}
        trainer = make(
            model,
            tmp_path,
            data(24, "one"),
            losses,
            data(9, "other"),
            prompts=prompts,
            token_cache=on,
            eval_strategy="epoch",
            max_steps=4,
        )
        trainer.train()
        history = [{name: row[name] for name in row if name.endswith("loss")} for row in trainer.state.log_history]
        results.append((history, dict(model.named_parameters())))
        kinds = {(batch["dataset_name"], PREPARED in batch) for batch in batches(trainer)}
        assert kinds == {("pairs", False), ("scored", on)}
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])


def test_prompts_that_are_not_pooled_keep_columns_apart(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = load(tiny_dir("bert"))
    assert PREPARED in batches(make(model, tmp_path, pairs(), prompts=PROMPTS))[0]
    model.set_pooling_include_prompt(False)
    assert PREPARED not in batches(make(model, tmp_path, pairs(), prompts=PROMPTS))[0]
    row = batches(make(model, tmp_path, pairs(), prompts="find: "))[0][PREPARED]
    assert row.others["prompt_length"] == model.preprocess(["x"], prompt="find: ")["prompt_length"]


def test_a_loss_that_calls_the_model_itself_gets_padded_features(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = load(tiny_dir("bert"))

    class MyLoss(MultipleNegativesRankingLoss):
        pass

    for loss in (CachedMultipleNegativesRankingLoss(model), ContrastiveTensionLoss(model), MyLoss(model)):
        assert "anchor_input_ids" in batches(make(model, tmp_path, pairs(), loss))[0]


def test_a_text_without_tokens_keeps_its_batch_padded(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = load(tiny_dir("modernbert"))
    model.tokenizer.backend_tokenizer.post_processor = None  # adds nothing to a text
    data = Dataset.from_dict({"anchor": ["", *TEXTS], "positive": ["a text", *TEXTS]})
    ours, theirs = (batches(make(model, tmp_path, data, seed=1, token_cache=on)) for on in (True, False))
    rows = [PREPARED in batch for batch in ours]
    assert sorted(rows) == [False, True]
    [index] = [index for index, row in enumerate(rows) if not row]
    assert_same(ours[index], theirs[index])


def test_later_runs_read_what_an_earlier_one_kept(
    tiny_dir: TinyDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMBTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokenise, "MIN_ROWS", 10)
    model = load(tiny_dir("bert"))
    first = batches(make(model, tmp_path, pairs()))
    assert "token ids: 80 texts tokenised in" in (out := capsys.readouterr().out) and "kept for later runs" in out
    second = batches(make(load(tiny_dir("bert")), tmp_path, pairs()))
    assert "token ids: 80 texts read from the token cache\n" in capsys.readouterr().out
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one[PREPARED].tokens_3T, other[PREPARED].tokens_3T)
    # What a worker that is started anew is sent: no model, and for what is on disk its path.
    loader = make(model, tmp_path, pairs(2_000)).get_train_dataloader()
    rows, collate = pickle.loads(sent := pickle.dumps((loader.dataset, loader.collate_fn)))
    assert len(sent) < 20_000
    indices = [3, 1_999, 0]
    again = collate(rows.__getitems__(indices))[PREPARED]
    expected = loader.collate_fn(loader.dataset.__getitems__(indices))[PREPARED]
    assert torch.equal(again.tokens_3T, expected.tokens_3T) and again.lengths == expected.lengths


def _stream() -> IterableDataset:
    features = Features({"anchor": Value("string"), "positive": Value("string")})
    return IterableDataset.from_generator(lambda: iter(pairs()), features=features)


class MyCollator(SentenceTransformerDataCollator):
    pass


ORDINARY: dict[str, tuple[Any, dict[str, Any], str]] = {
    "switched off": (pairs, {"token_cache": False}, "token_cache=False"),
    "a stream": (_stream, {}, "the data is a stream"),
    "a transform": (lambda: pairs().with_transform(lambda rows: rows), {}, "format or transform"),
    "a format": (lambda: pairs().with_format("torch"), {}, "format or transform"),
    "a sampler that may mix": (
        lambda: DatasetDict(one=pairs(), two=pairs()),
        {"multi_dataset_batch_sampler": RoundRobinBatchSampler},
        "may mix",
    ),
    "a task": (pairs, {"router_mapping": {"anchor": "query"}}, "router_mapping"),
}


@pytest.mark.parametrize("case", ORDINARY)
def test_what_cannot_be_tokenised_once_is_tokenised_in_each_batch(
    case: str, tiny_dir: TinyDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, settings, reason = ORDINARY[case]
    trainer = make(load(tiny_dir("bert")), tmp_path, data(), **settings)
    batch = batches(trainer)[0]
    assert "anchor_input_ids" in batch
    said = capsys.readouterr().out
    assert "token ids: made in each batch, because" in said and reason in said


def test_models_and_collators_that_do_more_than_tokenise_are_left_alone(
    tiny_dir: TinyDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(trainer: SentenceTransformerTrainer) -> str:
        trainer.get_train_dataloader()
        return capsys.readouterr().out

    model = load(tiny_dir("bert"))
    trainer = make(model, tmp_path, pairs())
    trainer.data_collator = MyCollator(model.preprocess)
    assert "the data collator is not the usual one" in said(trainer)
    model[0].processing_kwargs = {"text": {"pad_to_multiple_of": 8}}
    assert "processing_kwargs of its own" in said(make(model, tmp_path, pairs()))
    parts = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    router = Router.for_query_document(query_modules=list(parts), document_modules=list(parts))
    routed = SentenceTransformer(modules=[router], device="cpu")
    mapping = {"anchor": "query", "positive": "document"}
    assert "does not begin with a plain Transformer" in said(make(routed, tmp_path, pairs(), router_mapping=mapping))
