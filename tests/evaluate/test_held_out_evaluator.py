from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from embtune.errors import ArgumentError
from embtune.evaluate import HeldOutEvaluator, evaluate_classification, evaluate_clustering

CLASSES = [n % 3 for n in range(18)]
TEXTS = [f"{('read rows', 'sort words', 'hash trees')[label]} {n}" for n, label in enumerate(CLASSES)]

clusters = partial(evaluate_clustering, texts=TEXTS, labels=CLASSES, runs=2)
probe = {"train_texts": TEXTS, "train_labels": CLASSES}
classes = partial(evaluate_classification, **probe, test_texts=TEXTS[:9], test_labels=[*CLASSES[:6], 0, 0, 0])


@pytest.fixture
def model(tiny_dir: Callable[..., Path]) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_dir("bert")), device="cpu")


def test_several_metrics_begin_with_their_names(model: SentenceTransformer) -> None:
    evaluator = HeldOutEvaluator({"topics": classes, "groups": clusters}, "topics_accuracy")
    metrics = evaluator(model)
    assert metrics == {
        **{f"topics_{name}": value for name, value in classes(model).metrics.items()},
        **{f"groups_{name}": value for name, value in clusters(model).metrics.items()},
    }
    assert metrics["topics_accuracy"] == pytest.approx(7 / 9)
    assert HeldOutEvaluator({"groups": clusters}, "v_measure")(model).keys() == {"v_measure"}


def test_a_plain_trainer_keeps_the_best_model(model: SentenceTransformer, tmp_path: Path) -> None:
    pairs = Dataset.from_dict({"anchor": TEXTS[:8], "positive": TEXTS[8:16]})
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=0.5,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_v_measure",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=pairs,
        loss=MultipleNegativesRankingLoss(model),
        evaluator=HeldOutEvaluator({"groups": clusters}, "v_measure"),
    )
    trainer.train()
    measured = [entry["eval_v_measure"] for entry in trainer.state.log_history if "eval_v_measure" in entry]
    assert len(measured) == 4
    assert trainer.state.best_metric == max(measured)
    assert clusters(trainer.model).metrics["v_measure"] == pytest.approx(max(measured))


def test_mistakes(model: SentenceTransformer) -> None:
    with pytest.raises(ArgumentError, match="names none"):
        HeldOutEvaluator({}, "accuracy")
    with pytest.raises(ArgumentError, match="primary_metric='accuracy' is not among v_measure"):
        HeldOutEvaluator({"groups": clusters}, "accuracy")(model)
