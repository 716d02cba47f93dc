import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from tiny import ARCHITECTURES, TEXTS, tiny_backbone
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.mpnet.modeling_mpnet import MPNetLayer

from embtune.errors import ArgumentError, ModelError
from embtune.models.checkpointing import (
    describe_gradient_checkpointing,
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
    make_checkpointable,
)
from embtune.models.families import FAMILIES, encoder_layers

SWAPPED = ["mpnet", "albert"]
# transformers 5.23 moved these names; PEFT 0.21 and sentence-transformers 6.2 still use the old ones.
OLD_NAMES = "ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"


class ToyConfig(PretrainedConfig):
    model_type = "toy_without_checkpointing"


class ToyLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.2)

    def forward(self, hidden: torch.Tensor, *, scale: float) -> torch.Tensor:
        return hidden + scale * self.dropout(torch.tanh(self.dense(hidden)))


class ToyModel(PreTrainedModel):
    """An architecture that neither transformers nor the table of families knows."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig, layers: int = 3) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(50, 8)
        if layers:
            self.blocks = nn.ModuleList(ToyLayer() for _ in range(layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embeddings(input_ids)
        for block in self.blocks:
            hidden = block(hidden, scale=0.5)
        return hidden


def backbone_of(model_type: str) -> PreTrainedModel:
    decoder = FAMILIES[model_type].pooling == "lasttoken" or model_type == "gemma3_text"
    return tiny_backbone(model_type, **({"use_cache": False} if decoder else {}))


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 100, (4, 37), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    mask[2, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def train_step(model: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of one seeded step with dropout on, and the bytes that autograd kept for the backward pass."""
    model.train()
    model.zero_grad()
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        hidden = model(**batch()).last_hidden_state
        loss = (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))).sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, kept


def assert_same_gradients(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        assert (gradient - right[name]).norm() <= 1e-6 * gradient.norm(), name


def with_lora(backbone: PreTrainedModel) -> Any:
    targets = "|".join(FAMILIES[backbone.config.model_type].lora_targets)
    config = LoraConfig(r=4, target_modules=rf"(?!pooler).*\.({targets})", lora_dropout=0.1)
    torch.manual_seed(5)
    model = get_peft_model(backbone, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def count_calls(backbone: nn.Module) -> list[int]:
    calls = [0]

    def hook(*_: Any) -> None:
        calls[0] += 1

    encoder_layers(backbone)[0].attention.register_forward_hook(hook)
    return calls


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_same_gradients_from_less_memory(model_type: str) -> None:
    model = backbone_of(model_type)
    keys = list(model.state_dict())
    printed = repr(model)
    plain, plain_bytes = train_step(model)
    enable_gradient_checkpointing(model, "unsloth")
    checkpointed, checkpointed_bytes = train_step(model)
    assert_same_gradients(plain, checkpointed)
    assert checkpointed_bytes < 0.3 * plain_bytes
    assert list(model.state_dict()) == keys
    assert repr(model) == printed
    assert f"{len(encoder_layers(model))} × " in describe_gradient_checkpointing(model)
    disable_gradient_checkpointing(model)
    assert train_step(model)[1] == plain_bytes
    assert describe_gradient_checkpointing(model) == "off"


@pytest.mark.filterwarnings(OLD_NAMES)
@pytest.mark.parametrize("model_type", ["bert", "qwen3", *SWAPPED])
@pytest.mark.parametrize("order", ["checkpointing first", "lora first"])
def test_lora_over_frozen_embeddings(model_type: str, order: str) -> None:
    plain, plain_bytes = train_step(with_lora(backbone_of(model_type)))
    backbone = backbone_of(model_type)
    if order == "checkpointing first":
        enable_gradient_checkpointing(backbone)
        model = with_lora(backbone)
    else:
        model = with_lora(backbone)
        enable_gradient_checkpointing(model)
    checkpointed, checkpointed_bytes = train_step(model)
    assert_same_gradients(plain, checkpointed)
    assert any("lora_A" in name for name in plain)
    assert checkpointed_bytes < 0.5 * plain_bytes


@pytest.mark.parametrize("model_type", ["bert", *SWAPPED])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_checkpointing_and_use_their_own_weights(model_type: str, duplicate: Any) -> None:
    model = backbone_of(model_type)
    enable_gradient_checkpointing(model)
    twin = duplicate(model)
    assert describe_gradient_checkpointing(twin) == describe_gradient_checkpointing(model) != "off"
    original, original_bytes = train_step(model)
    same, same_bytes = train_step(twin)
    assert_same_gradients(original, same)
    assert same_bytes == original_bytes
    for parameter in model.parameters():
        parameter.data.zero_()
    assert_same_gradients(original, train_step(twin)[0])


@pytest.mark.parametrize("model_type", SWAPPED)
def test_swap_is_undone_and_leaves_other_instances_alone(model_type: str) -> None:
    model, other = backbone_of(model_type), backbone_of(model_type)
    own_class = type(encoder_layers(other)[0])
    for _ in range(2):
        enable_gradient_checkpointing(model)
    assert {type(layer) for layer in encoder_layers(model)} != {own_class}
    assert {type(layer) for layer in encoder_layers(other)} == {own_class}
    assert not other.supports_gradient_checkpointing
    enable_gradient_checkpointing(model, False)
    assert {type(layer) for layer in encoder_layers(model)} == {own_class}
    assert not model.supports_gradient_checkpointing
    layer = encoder_layers(model)[0]
    assert set(vars(layer)) == set(vars(encoder_layers(other)[0]))
    enable_gradient_checkpointing(model, None)
    assert describe_gradient_checkpointing(model) == "off"


def test_saved_checkpoint_is_the_plain_one(tmp_path: Path) -> None:
    model = backbone_of("mpnet")
    model.save_pretrained(tmp_path / "plain")
    enable_gradient_checkpointing(model)
    model.save_pretrained(tmp_path / "checkpointed")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "checkpointed" / file).read_bytes()
    reloaded = AutoModel.from_pretrained(tmp_path / "checkpointed")
    assert type(encoder_layers(reloaded)[0]) is MPNetLayer


def test_recomputes_only_where_a_backward_pass_follows() -> None:
    model = backbone_of("mpnet")
    enable_gradient_checkpointing(model)
    calls = count_calls(model)
    model.eval()
    model(**batch()).last_hidden_state.sum().backward()
    assert calls == [1]
    model.train()
    with torch.no_grad():
        model(**batch())
    assert calls == [2]
    model(**batch()).last_hidden_state.sum().backward()
    assert calls == [4]


@pytest.mark.filterwarnings(OLD_NAMES)
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("model_type", ["bert", *SWAPPED])
def test_stock_trainer_switches_it_on_by_its_own_argument(model_type: str, tiny_dir: Any, tmp_path: Path) -> None:
    pairs = Dataset.from_dict({"anchor": TEXTS[:8], "positive": TEXTS[4:12]})
    weights, calls = {}, {}
    for checkpointing in (False, True):
        model = SentenceTransformer(str(tiny_dir(model_type)), device="cpu")
        make_checkpointable(model[0].model)
        calls[checkpointing] = count_calls(model[0].model) if model_type != "albert" else [-1]
        args = SentenceTransformerTrainingArguments(
            str(tmp_path / "run"),
            gradient_checkpointing=checkpointing,
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        loss = MultipleNegativesRankingLoss(model)
        SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss).train()
        weights[checkpointing] = model.state_dict()
        assert (describe_gradient_checkpointing(model[0].model) != "off") is checkpointing
    if model_type != "albert":
        assert calls[True][0] == 2 * calls[False][0]
    for name, weight in weights[False].items():
        torch.testing.assert_close(weights[True][name], weight, rtol=0, atol=1e-6)


def test_architecture_that_nobody_knows() -> None:
    torch.manual_seed(0)
    model = ToyModel(ToyConfig())
    ids = batch()["input_ids"] % 50

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        torch.manual_seed(4)
        model(ids).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    enable_gradient_checkpointing(model)
    assert "by embtune" in describe_gradient_checkpointing(model)
    for left, right in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(left, right)


def test_model_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="ToyModel has no list of layers"):
        enable_gradient_checkpointing(ToyModel(ToyConfig(), layers=0))


@pytest.mark.parametrize("kind", ["yes", "True", 1, 0, 2.0])
def test_unknown_kind_is_refused(kind: Any) -> None:
    model = backbone_of("bert")
    with pytest.raises(ArgumentError, match=r"use_gradient_checkpointing=.* is not known; use True"):
        enable_gradient_checkpointing(model, kind)
    assert describe_gradient_checkpointing(model) == "off"
