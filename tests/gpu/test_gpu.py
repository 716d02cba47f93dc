"""What only a CUDA device can show: FlashAttention on packed rows, half precision, quantised bases, autocast."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import TEXTS

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.losses import MultipleNegativesRankingLoss

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")]

TinyDir = Callable[..., Path]
MIXED = [*TEXTS, *("word " * length for length in (1, 2, 61, 62, 63, 126, 200))]


def load(folder: Path, **settings: object) -> FastSentenceTransformer:
    model = FastSentenceTransformer.from_pretrained(folder, **{"device": "cuda", **settings})
    model = FastSentenceTransformer.get_peft_model(model, r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def embed(model: FastSentenceTransformer) -> tuple[torch.Tensor, torch.Tensor]:
    features = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in model.preprocess(MIXED).items()}
    embeddings = model(features)["sentence_embedding"]
    (embeddings[:, ::3].square().sum() + embeddings[::2].sum()).backward()
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return embeddings.detach(), torch.cat(gradients)


FAMILIES = ["bert", "roberta", "distilbert", "modernbert", "mpnet", "deberta-v2", "nomic_bert", "qwen3", "gemma3_text"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_float32_rows_equal_padded_batches(model_type: str, tiny_dir: TinyDir) -> None:
    results = [embed(load(tiny_dir(model_type), dtype="float32", engine=e).eval()) for e in ("packed", "reference")]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    assert (results[0][1] - results[1][1]).norm() <= 1e-4 * results[1][1].norm()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_half_precision_rows_are_as_near_to_float32_as_padded_batches(
    model_type: str, dtype: str, tiny_dir: TinyDir
) -> None:
    truth, true_gradient = embed(load(tiny_dir(model_type), dtype="float32", engine="reference").eval())
    errors = []
    for engine in ("packed", "reference"):
        embeddings, gradient = embed(load(tiny_dir(model_type), dtype=dtype, engine=engine).eval())
        errors.append(((embeddings - truth).norm(), (gradient - true_gradient).norm()))
    (packed, packed_gradient), (padded, padded_gradient) = errors
    assert packed <= 1.25 * padded
    assert packed_gradient <= 1.25 * padded_gradient


def pairs() -> Dataset:
    words = " ".join(TEXTS).split()
    anchors = [f"question {i}: " + " ".join(words[i % 40 : i % 40 + 3 + i % 7]) for i in range(64)]
    positives = [f"answer {i}: " + " ".join(words[i % 50 : i % 50 + 4 + i * 5 % 60]) for i in range(64)]
    return Dataset.from_dict({"anchor": anchors, "positive": positives})


@pytest.mark.parametrize(
    ("loading", "arguments"),
    [
        ({}, {"bf16": True}),
        ({"dtype": "float16"}, {"fp16": True}),
        ({"dtype": "float16"}, {}),  # the trainer turns loss scaling on
        ({"engine": "reference"}, {"bf16": True}),
        ({"load_in_4bit": True}, {"bf16": True}),
        ({"load_in_4bit": True, "dtype": "float16"}, {"fp16": True}),
        ({"load_in_8bit": True}, {"bf16": True}),
        ({"use_gradient_checkpointing": "unsloth"}, {"bf16": True}),
        ({"engine": "reference"}, {"bf16": True, "compile": "always"}),
    ],
    ids=str,
)
def test_training_lowers_the_loss_and_the_merged_model_is_the_trained_one(
    loading: dict[str, object], arguments: dict[str, object], tiny_dir: TinyDir, tmp_path: Path
) -> None:
    model = load(tiny_dir("bert"), **loading)
    settings = {"max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "logging_steps": 1}
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), save_strategy="no", report_to="none", disable_tqdm=True, **{**settings, **arguments}
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=pairs(), loss=MultipleNegativesRankingLoss(model)
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-10:]) < sum(losses[:10])
    model.save_pretrained_merged(tmp_path / "merged")  # raises unless the embeddings are those of the live model


def test_a_resumed_run_on_the_gpu_ends_near_the_same_weights(tiny_dir: TinyDir, tmp_path: Path) -> None:
    ends = []
    for resume in (False, True):
        model = load(tiny_dir("bert"), load_in_4bit=True)
        args = SentenceTransformerTrainingArguments(
            str(tmp_path),
            max_steps=8,
            save_steps=4,
            save_strategy="steps",
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            report_to="none",
            disable_tqdm=True,
            bf16=True,
        )
        trainer = SentenceTransformerTrainer(
            model=model, args=args, train_dataset=pairs(), loss=MultipleNegativesRankingLoss(model)
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert (ends[0] - ends[1]).norm() <= 2e-3 * ends[0].norm()
