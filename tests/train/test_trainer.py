"""The trainer: same steps as plain sentence-transformers, exact resume, and refusals before anything is trained."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import sentence_transformers
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModelForFeatureExtraction
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.modules import Dense
from tiny import TEXTS

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.errors import ArgumentError, DataError, EmbtuneWarning, ModelError
from embtune.losses import CoSENTLoss, MatryoshkaLoss, MultipleNegativesRankingLoss

TinyDir = Callable[..., Path]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pairs(count: int = 64) -> Dataset:
    words = " ".join(TEXTS).split()
    anchors = [f"question {i}: " + " ".join(words[i % 40 : i % 40 + 3 + i % 7]) for i in range(count)]
    positives = [f"answer {i}: " + " ".join(words[i % 50 : i % 50 + 4 + i * 5 % 60]) for i in range(count)]
    return Dataset.from_dict({"anchor": anchors, "positive": positives})


def arguments(folder: Path, **settings: object) -> SentenceTransformerTrainingArguments:
    defaults: dict[str, object] = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return SentenceTransformerTrainingArguments(str(folder), **{**defaults, **settings})


def load(folder: Path, lora: bool = True, **settings: object) -> FastSentenceTransformer:
    model = FastSentenceTransformer.from_pretrained(
        folder, **{"dtype": "float32", "device": "cpu", "full_finetuning": not lora, **settings}
    )
    return FastSentenceTransformer.get_peft_model(model, r=4, lora_alpha=8) if lora else model


def without_dropout(model: SentenceTransformer) -> SentenceTransformer:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model[0].model.config.update(NO_DROPOUT)
    return model


def losses_of(trainer: sentence_transformers.SentenceTransformerTrainer) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])


def weights(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "distilbert", "modernbert", "qwen3"])
def test_fifty_steps_of_lora_are_those_of_plain_sentence_transformers(
    model_type: str, tiny_dir: TinyDir, tmp_path: Path
) -> None:
    """Packed, reference, and the libraries alone: the same loss at every step, in float32 without dropout."""
    curves = []
    for engine in ("packed", "reference", None):
        if engine is not None:
            model = without_dropout(load(tiny_dir(model_type), engine=engine))
            trainer_class = SentenceTransformerTrainer
        else:
            settings = model[0].model.peft_config["default"]
            fresh = load(tiny_dir(model_type))
            model = SentenceTransformer(str(tiny_dir(model_type)), device="cpu")
            config = LoraConfig(
                task_type="FEATURE_EXTRACTION",
                r=4,
                lora_alpha=8,
                target_modules=settings.target_modules,
                exclude_modules=settings.exclude_modules,
            )
            model[0].model = PeftModelForFeatureExtraction(model[0].model, config)
            model.load_state_dict(fresh.state_dict())
            without_dropout(model)
            trainer_class = sentence_transformers.SentenceTransformerTrainer
        trainer = trainer_class(
            model=model,
            args=arguments(tmp_path, max_steps=50),
            train_dataset=pairs(),
            loss=MultipleNegativesRankingLoss(model),
        )
        trainer.train()
        curves.append(losses_of(trainer))
    assert curves[0][-10:].mean() < curves[0][:10].mean() - 0.05
    torch.testing.assert_close(curves[1], curves[2], rtol=0, atol=1e-5)
    torch.testing.assert_close(curves[0], curves[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ["packed", "reference"])
def test_full_finetuning_with_accumulation_prompts_and_matryoshka(
    engine: str, tiny_dir: TinyDir, tmp_path: Path
) -> None:
    model = without_dropout(load(tiny_dir("bert"), lora=False, engine=engine))
    plain = without_dropout(SentenceTransformer(str(tiny_dir("bert")), device="cpu"))
    prompts = {"anchor": "query: ", "positive": "passage: "}
    curves = []
    for candidate, trainer_class in (
        (model, SentenceTransformerTrainer),
        (plain, sentence_transformers.SentenceTransformerTrainer),
    ):
        loss = MatryoshkaLoss(candidate, MultipleNegativesRankingLoss(candidate), [32, 16, 8])
        args = arguments(tmp_path, max_steps=50, gradient_accumulation_steps=2, prompts=prompts)
        trainer = trainer_class(model=candidate, args=args, train_dataset=pairs(160), loss=loss)
        if candidate is model:
            with pytest.warns(EmbtuneWarning, match="accumulation"):
                trainer.train()
        else:
            trainer.train()
        curves.append(losses_of(trainer))
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=1e-5)
    assert model.prompts["query"] == "query: "
    assert model.prompts["document"] == "passage: "


def test_several_datasets_each_with_its_loss(tiny_dir: TinyDir, tmp_path: Path) -> None:
    scored = Dataset.from_dict(
        {
            "score": [i / 32 for i in range(32)],
            "sentence2": (TEXTS * 3)[:32],
            "sentence1": [f"text {i}" for i in range(32)],
        }
    )
    curves = []
    for engine in ("packed", "reference"):
        model = without_dropout(load(tiny_dir("bert"), engine=engine))
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=50),
            train_dataset={"pairs": pairs(), "scores": scored},
            loss={"pairs": MultipleNegativesRankingLoss(model), "scores": CoSENTLoss(model)},
        )
        trainer.train()
        curves.append(losses_of(trainer))
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=1e-5)


def test_columns_count_by_role_never_by_order(tiny_dir: TinyDir, tmp_path: Path) -> None:
    ordered = pairs()
    shuffled = ordered.select_columns(["positive", "anchor"]).rename_columns({"anchor": "Query", "positive": "passage"})
    named = ordered.rename_columns({"anchor": "ask", "positive": "found"}).add_column("id", list(range(64)))
    curves = []
    for data, columns in ((ordered, None), (shuffled, None), (named, {"ask": "anchor", "found": "positive"})):
        model = load(tiny_dir("bert"))
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=3, columns=columns),
            train_dataset=data,
            loss=MultipleNegativesRankingLoss(model),
        )
        trainer.train()
        curves.append(losses_of(trainer))
    assert torch.equal(curves[0], curves[1])
    assert torch.equal(curves[0], curves[2])
    with pytest.raises(DataError, match="train_dataset.*'id'"):
        SentenceTransformerTrainer(model=model, args=arguments(tmp_path), train_dataset=named)


class Falling(BaseEvaluator):
    """Judges every later state worse: the first checkpoint is the best."""

    primary_metric = "score"

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, torch.Tensor]] = []

    def __call__(self, model: SentenceTransformer, *_: object, **__: object) -> dict[str, float]:
        self.seen.append({name: value.clone() for name, value in weights(model).items()})
        return {"score": -float(len(self.seen))}


@pytest.mark.parametrize("settings", [{}, {"lora": False}, {"load_in_4bit": True}, {"load_in_8bit": True}])
@pytest.mark.filterwarnings("ignore:.*kernels.*")
def test_a_resumed_run_ends_with_the_very_same_weights(
    settings: dict[str, bool], tiny_dir: TinyDir, tmp_path: Path
) -> None:
    """Bit for bit on the CPU, dropout on, with a quantised base too."""
    ends = []
    for resumed in (False, True):
        folder = tmp_path / str(resumed)
        if resumed:
            shutil.copytree(tmp_path / "False", folder)
            shutil.rmtree(folder / "checkpoint-8")
            # A later checkpoint that a crash cut off: its state was never written.
            shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-6")
            (folder / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 1.')
        model = load(tiny_dir("bert"), **settings)
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments(folder, save_strategy="steps", save_steps=4),
            train_dataset=pairs(),
            loss=MultipleNegativesRankingLoss(model),
        )
        trainer.train(resume_from_checkpoint=resumed)
        ends.append(weights(model))
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


@pytest.mark.parametrize("settings", [{}, {"lora": False}, {"load_in_4bit": True}, {"load_in_8bit": True}])
@pytest.mark.filterwarnings("ignore:.*kernels.*")
def test_the_best_model_is_really_loaded_at_the_end(
    settings: dict[str, bool], tiny_dir: TinyDir, tmp_path: Path
) -> None:
    plain = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    plain.append(Dense(32, 16))
    plain.save_pretrained(str(tmp_path / "model"))
    model = load(tmp_path / "model", **settings)
    judge = Falling()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(
            tmp_path / "run",
            max_steps=4,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_score",
            greater_is_better=True,
        ),
        train_dataset=pairs(),
        loss=MultipleNegativesRankingLoss(model),
        evaluator=judge,
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    ends = weights(model)
    assert all(torch.equal(value, judge.seen[0][name]) for name, value in ends.items())
    assert any(not torch.equal(value, judge.seen[-1][name]) for name, value in ends.items())


def test_a_best_checkpoint_that_is_gone_is_an_error(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = load(tiny_dir("bert"))
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments(tmp_path), train_dataset=pairs(), loss=MultipleNegativesRankingLoss(model)
    )
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-3")
    with pytest.raises(FileNotFoundError):
        trainer._load_best_model()


def test_a_checkpoint_of_another_model_is_refused(tiny_dir: TinyDir, tmp_path: Path) -> None:
    def train(model: FastSentenceTransformer, resume: bool) -> None:
        args = arguments(tmp_path, max_steps=2 + 2 * resume, save_strategy="steps", save_steps=2)
        SentenceTransformerTrainer(
            model=model, args=args, train_dataset=pairs(), loss=MultipleNegativesRankingLoss(model)
        ).train(resume_from_checkpoint=resume)

    train(load(tiny_dir("bert")), resume=False)
    with pytest.raises(ModelError, match="whole weights"):
        train(load(tiny_dir("bert"), lora=False), resume=True)
    other = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", device="cpu")
    with pytest.raises(ModelError, match="does not fit"):
        train(FastSentenceTransformer.get_peft_model(other, r=8), resume=True)
    with pytest.raises(ArgumentError, match="no whole checkpoint"):
        SentenceTransformerTrainer(model=other, args=arguments(tmp_path / "elsewhere"), train_dataset=pairs()).train(
            resume_from_checkpoint=True
        )


def test_training_that_would_change_nothing_is_refused(tiny_dir: TinyDir, tmp_path: Path) -> None:
    frozen = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), device="cpu")
    with pytest.raises(ModelError, match="get_peft_model"):
        SentenceTransformerTrainer(model=frozen, args=arguments(tmp_path), train_dataset=pairs()).train()
    # The guide's wrapper: an adapted encoder assigned to auto_model, which no forward uses.
    shadowed = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    shadowed[0].auto_model = load(tiny_dir("bert"))[0].model
    with pytest.raises(ModelError, match=r"transformer\.model"):
        SentenceTransformerTrainer(model=shadowed, args=arguments(tmp_path), train_dataset=pairs()).train()
    # An adapter that hangs in the module tree without being on the way from text to embedding.
    beside = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), device="cpu", dtype="float32")
    beside[1].adapter = load(tiny_dir("bert"))[0].model
    with pytest.raises(ModelError, match="influence on the embedding"):
        SentenceTransformerTrainer(model=beside, args=arguments(tmp_path), train_dataset=pairs()).train()


def test_the_compile_decision_is_stored_and_kept(
    tiny_dir: TinyDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(tiny_dir("bert"), engine="reference")
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=pairs(), loss=MultipleNegativesRankingLoss(model)
    )
    trainer.train()
    assert "compile: " in capsys.readouterr().out
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    stored = json.loads(state.read_text())
    decision = stored["stateful_callbacks"]["CompileCallback"]["attributes"]["decision"]
    assert decision["compile"] is False
    decision["reason"] = "kept from the first run"
    state.write_text(json.dumps(stored))
    again = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=pairs(), loss=MultipleNegativesRankingLoss(model)
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "kept from the first run" in capsys.readouterr().out


@pytest.mark.parametrize("stored", ["none", "of another mode"])
def test_a_resumed_run_without_a_decision_counts_the_steps_that_are_left(
    stored: str, tiny_dir: TinyDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = without_dropout(load(tiny_dir("bert"), engine="reference"))
    decisions = []
    for steps, mode, resume in ((3, "never", False), (5, "auto", True)):
        args = arguments(tmp_path, max_steps=steps, compile=mode, save_strategy="steps", save_steps=3)
        trainer = SentenceTransformerTrainer(
            model=model, args=args, train_dataset=pairs(), loss=MultipleNegativesRankingLoss(model)
        )
        trainer.train(resume_from_checkpoint=resume)
        decisions.append(trainer._compile_callback.decision)
        state = tmp_path / "checkpoint-3" / "trainer_state.json"
        if stored == "none":
            content = json.loads(state.read_text())
            content["stateful_callbacks"].pop("CompileCallback", None)
            state.write_text(json.dumps(content))
    assert [decision.steps_left for decision in decisions] == [3, 2]
    assert "off: 2 steps" in decisions[1].reason


def test_an_attention_set_after_loading_is_told_when_training_falls_back(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = load(tiny_dir("bert"))
    assert model.explain()["engine"] == "packed"
    model[0].model.get_base_model().set_attn_implementation("eager")
    assert model.explain()["engine"] == "reference"
    assert "its attention was set to 'eager' after loading" in str(model.explain())
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=3),
        train_dataset=pairs(),
        loss=MultipleNegativesRankingLoss(model),
    )
    with pytest.warns(EmbtuneWarning, match="packed engine is off: padded batches.*'eager'") as caught:
        trainer.train()
    assert len([warning for warning in caught if issubclass(warning.category, EmbtuneWarning)]) == 1


def test_every_one_of_several_datasets_is_checked(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = load(tiny_dir("bert"))
    data = {"clean": pairs(), "twice": Dataset.from_dict({"anchor": ["a", "a"], "positive": ["b", "b"]})}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=data,
        loss=MultipleNegativesRankingLoss(model),
    )
    with pytest.warns(EmbtuneWarning, match="1 of 2 training rows 'twice' repeat an earlier row"):
        trainer.train()


def test_arguments_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="group_by_length"):
        arguments(tmp_path, train_sampling_strategy="group_by_length")
    with pytest.raises(ArgumentError, match="compile='sometimes'"):
        arguments(tmp_path, compile="sometimes")


def test_prompts_left_out_of_the_pooling_stay_out_after_training(tiny_dir: TinyDir, tmp_path: Path) -> None:
    curves = []
    for engine in ("packed", "reference"):
        model = without_dropout(load(tiny_dir("bert"), engine=engine))
        model.set_pooling_include_prompt(False)
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=4, prompts={"anchor": "query: ", "positive": "a passage: "}),
            train_dataset=pairs(),
            loss=MultipleNegativesRankingLoss(model),
        )
        trainer.train()
        curves.append(losses_of(trainer))
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=1e-5)
    saved = model.save_pretrained_merged(tmp_path / "merged")
    plain = SentenceTransformer(str(saved), device="cpu")
    assert plain[1].include_prompt is False
    torch.testing.assert_close(plain.encode_query(TEXTS), model.encode_query(TEXTS), rtol=0, atol=1e-5)


# transformers 5.2x renamed the argument.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in SentenceTransformerTrainingArguments.__dataclass_fields__
)


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "albert"])
def test_checkpointing_through_the_arguments(model_type: str, tiny_dir: TinyDir, tmp_path: Path) -> None:
    curves = []
    for checkpointing in (False, True):
        model = load(tiny_dir(model_type))
        trainer = SentenceTransformerTrainer(
            model=model,
            args=arguments(tmp_path, max_steps=3, **{CHECKPOINTING: checkpointing}),
            train_dataset=pairs(),
            loss=MultipleNegativesRankingLoss(model),
        )
        trainer.train()
        assert model.explain()["gradient checkpointing"].startswith("on" if checkpointing else "off")
        curves.append(losses_of(trainer))
    torch.testing.assert_close(curves[0], curves[1], rtol=0, atol=1e-5)


def test_a_program_is_not_told_what_it_cannot_change(tmp_path: Path, tiny_dir: TinyDir) -> None:
    """PEFT's use of a name that transformers gave up, and pinned memory where there is nothing to pin it for."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model = load(tiny_dir("bert"))
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                str(tmp_path / "run"), max_steps=1, report_to="none", disable_tqdm=True, save_strategy="no"
            ),
            train_dataset=pairs(8),
            loss=MultipleNegativesRankingLoss(model),
        )
        trainer.train()
        model.save_pretrained(str(tmp_path / "adapter"))
        FastSentenceTransformer.from_pretrained(tmp_path / "adapter", dtype="float32")
    texts = [str(warning.message) for warning in warned]
    assert not [text for text in texts if "pin_memory" in text or "is_gradient_checkpointing" in text]
    assert trainer.args.dataloader_pin_memory == torch.accelerator.is_available()


def test_arguments_serve_a_second_trainer(tmp_path: Path, tiny_dir: TinyDir) -> None:
    """Prompts by the data's own names are read as such by each: here one name is the other's role."""
    data = pairs(8).rename_columns({"anchor": "question", "positive": "anchor"})
    columns, prompts = {"question": "anchor", "anchor": "positive"}, {"question": "query: "}
    args = arguments(tmp_path, columns=columns, prompts=dict(prompts))
    for _ in range(2):
        model = load(tiny_dir("bert"))
        loss = MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
        assert trainer.args.prompts == {"anchor": "query: "}
    assert args.prompts == prompts


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(score: float, tmp_path: Path, tiny_dir: TinyDir) -> None:
    data = Dataset.from_dict({"sentence1": TEXTS[:4], "sentence2": TEXTS[4:8], "score": [0.1, 0.5, score, 0.9]})
    model = load(tiny_dir("bert"))
    args = arguments(tmp_path, per_device_train_batch_size=2, bf16=True)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=CoSENTLoss(model))
    with pytest.raises(DataError, match=r"row 3 \(dataset\[2\]\), column 'score' is (nan|inf) where a finite"):
        trainer.train()
