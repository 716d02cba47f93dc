"""Checkpointing that keeps products: the same gradients, no product computed twice, less memory."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import ARCHITECTURES, TEXTS, randomise_adapter, tiny_backbone
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext
from transformers import PreTrainedModel

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.errors import ArgumentError
from embtune.losses import MultipleNegativesRankingLoss
from embtune.models.checkpointing import (
    describe_gradient_checkpointing,
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
)
from embtune.models.families import FAMILIES
from embtune.models.selective import _policy

TinyDir = Callable[..., Path]
PRODUCTS = ("mm", "addmm", "bmm", "adapted_linear")


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def backbone_of(model_type: str) -> PreTrainedModel:
    decoder = FAMILIES[model_type].pooling == "lasttoken" or model_type == "gemma3_text"
    return tiny_backbone(model_type, **({"use_cache": False} if decoder else {}))


def step(model: nn.Module) -> tuple[list[torch.Tensor], Counter[str]]:
    """Gradients of a seeded step with dropout on, and what it computed."""
    ids = torch.randint(5, 100, (4, 37), generator=torch.Generator().manual_seed(1))
    trained = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    torch.manual_seed(3)
    with Operations() as operations:
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        found = torch.autograd.grad((hidden * weights).sum(), trained, allow_unused=True)
    return [gradient for gradient in found if gradient is not None], operations.calls


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_same_gradients_and_no_product_twice(model_type: str) -> None:
    model = backbone_of(model_type)
    plain, computed = step(model)
    enable_gradient_checkpointing(model, "selective")
    assert "recomputed but for their products" in describe_gradient_checkpointing(model)
    selective, again = step(model)
    for one, other in zip(selective, plain, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
    assert sum(again[name] for name in PRODUCTS) == sum(computed[name] for name in PRODUCTS) > 0
    assert sum(again.values()) > sum(computed.values())
    disable_gradient_checkpointing(model)
    assert step(model)[1] == computed


def load(folder: Path, how: str, **settings: Any) -> FastSentenceTransformer:
    full = {"full_finetuning": True} if how == "full" else {}
    model = FastSentenceTransformer.from_pretrained(
        folder, device="cpu", dtype="float32", use_gradient_checkpointing="selective", **full, **settings
    )
    if how == "full":
        return model
    model = FastSentenceTransformer.get_peft_model(model, r=4, lora_alpha=8, lora_dropout=0.1 * (how == "dropout"))
    randomise_adapter(model, std=0.1)
    return model


def train(model: FastSentenceTransformer, out: Path, **settings: Any) -> list[float]:
    args = SentenceTransformerTrainingArguments(
        str(out),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    data = Dataset.from_dict({"anchor": TEXTS[:6] * 2, "positive": TEXTS[6:12] * 2})
    loss = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning", "ignore::embtune.errors.EmbtuneWarning")
@pytest.mark.parametrize("how", ["lora", "dropout", "full"])
@pytest.mark.parametrize("model_type", ["bert", "mpnet", "distilbert", "modernbert", "qwen3"])
def test_training_is_the_same(model_type: str, how: str, tiny_dir: TinyDir, tmp_path: Path) -> None:
    model, same = (load(tiny_dir(model_type), how) for _ in range(2))
    disable_gradient_checkpointing(same[0].model)
    assert train(model, tmp_path / "one") == pytest.approx(train(same, tmp_path / "other"), rel=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_with_compiled_layers(tiny_dir: TinyDir, tmp_path: Path) -> None:
    model, same = (load(tiny_dir("distilbert"), "lora") for _ in range(2))
    for module in [*model.modules(), *same.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # compiled code draws other numbers
    plain = train(same, tmp_path / "one", compile="never")
    assert train(model, tmp_path / "other", compile="always") == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_gpu_drew_is_kept_and_what_the_cpu_drew_is_drawn_again(device: str) -> None:
    kept = []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            policy = _policy(SelectiveCheckpointContext(is_recompute=False), function, *args, **(kwargs or {}))
            if policy == CheckpointPolicy.MUST_SAVE:
                kept.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Asked():
        states = torch.rand(3, 4, device=device)
        torch.randint(2**31 - 1, (1,), device=device)
        torch.randint(0, 5, (1,), device=device)
        torch.native_dropout(states, 0.5, True)
        torch.nn.functional.gelu(states + 1)
    assert kept == ([] if device == "cpu" else ["rand", "randint", "randint", "native_dropout"])


def test_what_is_not_known_is_refused(tiny_dir: TinyDir) -> None:
    with pytest.raises(ArgumentError, match="use_gradient_checkpointing='some' is not known"):
        FastSentenceTransformer.from_pretrained(tiny_dir("bert"), use_gradient_checkpointing="some")
