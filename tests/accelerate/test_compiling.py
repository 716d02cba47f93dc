import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_backbone
from torch import nn
from torch._dynamo.utils import counters

from embtune.accelerate.compiling import (
    compile_layers,
    has_dropout,
    layer_parameters,
    layers_are_compiled,
    uncompile_layers,
)
from embtune.models.checkpointing import enable_gradient_checkpointing
from embtune.models.families import FAMILIES, encoder_layers

pytestmark = [
    # PEFT asks transformers under a name that 5.23 gave up.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning"),
    # dynamo looks at the gradient of each input of a layer.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
]

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def make_model(model_type: str, trainable: str, checkpointing: bool = False) -> Any:
    model: Any = tiny_backbone(model_type, **(NO_DROPOUT if model_type in ("bert", "mpnet", "albert") else {}))
    if trainable == "lora":
        targets = "|".join(FAMILIES[model_type].lora_targets)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=rf"(?!pooler).*\.({targets})"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    enable_gradient_checkpointing(model, checkpointing)
    return model.train()


def batch(texts: int, length: int, padded: bool = True) -> dict[str, torch.Tensor]:
    mask = torch.ones(texts, length, dtype=torch.long)
    if padded:
        mask[1:, length // 2 :] = 0
    ids = torch.randint(5, 100, mask.shape, generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": mask}


def gradients(model: nn.Module, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**features).last_hidden_state.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("model_type", "trainable", "checkpointing"),
    [
        ("bert", "full", False),
        ("bert", "lora", True),
        ("mpnet", "full", True),
        ("modernbert", "full", False),
        ("qwen3", "lora", False),
    ],
)
def test_same_gradients_and_no_recompiling_for_new_lengths(
    model_type: str, trainable: str, checkpointing: bool
) -> None:
    model = make_model(model_type, trainable, checkpointing)
    keys, printed = list(model.state_dict()), repr(model)
    batches = [batch(6, 40), batch(5, 61), batch(7, 23), batch(6, 64)]
    expected = [gradients(model, features) for features in batches]
    compile_layers(model, backend="eager")
    actual, graphs = [], []
    for features in batches:
        actual.append(gradients(model, features))
        graphs.append(counters["stats"]["unique_graphs"])
    for wanted, got in zip(expected, actual, strict=True):
        assert wanted
        assert wanted.keys() == got.keys()
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-4 * wanted[name].abs().max().item())
    assert 1 <= graphs[0] <= 4
    assert graphs == [graphs[0]] * len(graphs)
    assert not counters["graph_break"]
    assert list(model.state_dict()) == keys
    assert repr(model) == printed


def test_training_evaluation_and_encoding_stay_within_the_compiler_s_limit() -> None:
    model = make_model("bert", "lora")
    compile_layers(model, backend="eager")
    for padded in (True, False):
        for length in (17, 33):
            gradients(model, batch(6, length, padded))
    model.eval()
    for padded in (True, False):
        for length in (18, 35, 52):
            features = batch(8, length, padded)
            with torch.inference_mode():
                hidden = model(**features).last_hidden_state
                uncompile_layers(model)
                torch.testing.assert_close(hidden, model(**features).last_hidden_state, rtol=1e-5, atol=1e-5)
                compile_layers(model, backend="eager")
    assert counters["stats"]["unique_graphs"] <= torch._dynamo.config.recompile_limit


def test_undone_and_copied() -> None:
    model = make_model("bert", "full")
    assert not layers_are_compiled(model)
    compile_layers(model, backend="eager")
    assert layers_are_compiled(model)
    expected = gradients(model, batch(4, 20))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not layers_are_compiled(twin)
        for name, gradient in gradients(twin, batch(4, 20)).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
    uncompile_layers(model)
    uncompile_layers(model)
    assert not layers_are_compiled(model)
    torch.compiler.reset()
    counters.clear()
    gradients(model, batch(4, 20))
    assert not counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_compiled_to_machine_code() -> None:
    model = make_model("bert", "lora", checkpointing=True)
    features = batch(6, 40)
    expected = gradients(model, features)
    compile_layers(model)
    for name, gradient in gradients(model, features).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4 * expected[name].abs().max().item())
    assert counters["inductor"]


def test_layer_parameters_leave_out_adapters_and_embeddings() -> None:
    bert = tiny_backbone("bert")
    expected = sum(parameter.numel() for parameter in bert.encoder.parameters())
    assert layer_parameters(bert) == expected
    assert layer_parameters(make_model("bert", "lora")) == expected
    albert = tiny_backbone("albert")
    assert len(encoder_layers(albert)) == 1
    once = sum(parameter.numel() for parameter in encoder_layers(albert)[0].parameters())
    assert layer_parameters(albert) == albert.config.num_hidden_layers * once > once


def test_dropout_is_seen_wherever_it_is() -> None:
    assert has_dropout(tiny_backbone("bert"))
    bert = tiny_backbone("bert", **NO_DROPOUT)
    assert not has_dropout(bert)
    assert has_dropout(get_peft_model(bert, LoraConfig(r=2, lora_dropout=0.05, target_modules=["query"])))
