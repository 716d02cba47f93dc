"""Linear layers that are rounded, and computed, together under autocast."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from embtune import FastSentenceTransformer
from embtune.models.rounded_linear import RoundedLinear, RoundedLinears, round_linears, rounded_at_once, unround_linears

TinyDir = Callable[..., Path]
TEXTS = ["a text", "another, longer text than the first", "and 1 more; " * 9]


def load(folder: Path, **settings: Any) -> FastSentenceTransformer:
    return FastSentenceTransformer.from_pretrained(
        folder, dtype="float32", device="cpu", engine="reference", full_finetuning=True, **settings
    ).eval()


def trained(model: FastSentenceTransformer, at_once: bool = False, exact: bool = False) -> tuple[Tensor, Tensor]:
    """States and, below each other, the gradients of all weights."""
    features = dict(model.preprocess(TEXTS))
    with torch.autocast("cpu", torch.bfloat16, enabled=not exact, cache_enabled=False):
        if at_once:
            with rounded_at_once(model[0].model, torch.bfloat16):
                states = model[0](features)["token_embeddings"]
        else:
            states = model[0](features)["token_embeddings"]
    (states.float() * torch.linspace(-1, 1, states.shape[-1])).sum().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    model.zero_grad()
    return states, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "distilbert", "modernbert", "qwen3", "t5"])
def test_states_and_gradients_are_no_farther_from_float32_than_under_autocast(
    model_type: str, tiny_dir: TinyDir
) -> None:
    model = load(tiny_dir(model_type))
    exact, exact_gradients = trained(model, exact=True)
    stock, stock_gradients = trained(model)
    names = round_linears(model[0].model)
    assert len(names) == sum(isinstance(module, nn.Linear) for module in model[0].model.modules()) > 0
    ours, gradients = trained(model)
    assert (ours - exact).norm() <= 1.05 * (stock - exact).norm()
    assert (gradients - exact_gradients).norm() <= 1.05 * (stock_gradients - exact_gradients).norm()
    # Whether rounded one by one or all at once, they are the same numbers.
    assert all(map(torch.equal, trained(model, at_once=True), (ours, gradients)))
    # Where nothing is rounded, and when they have their own class again, they are what they were.
    assert all(map(torch.equal, trained(model, exact=True), (exact, exact_gradients)))
    unround_linears(model[0].model)
    assert not any(isinstance(module, RoundedLinear) for module in model.modules())
    assert all(map(torch.equal, trained(model), (stock, stock_gradients)))


def test_queries_keys_and_values_are_one_product(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"))
    products = []
    for change in (lambda _: [], round_linears):
        change(model[0].model)
        with torch.profiler.profile() as profile:
            trained(model)
        products.append(sum(event.name in ("aten::mm", "aten::addmm") for event in profile.events()))
    layers = len(model[0].model.encoder.layer)
    assert products[0] - products[1] == 6 * layers


def test_frozen_layers_get_no_gradient_computed(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"))
    layers = model[0].model.encoder.layer
    model.requires_grad_(False)
    layers[-1].requires_grad_(True)
    round_linears(model[0].model)
    with torch.autocast("cpu", torch.bfloat16):
        states = model[0](dict(model.preprocess(TEXTS)))["token_embeddings"]
    with torch.profiler.profile() as profile:
        states.float().square().sum().backward()
    # Of one layer: four products for weights, and as many for their inputs but for the first.
    assert sum(event.name == "aten::mm" for event in profile.events()) == 7
    assert layers[-1].output.dense.weight.grad is not None
    assert layers[0].output.dense.weight.grad is None


def test_one_frozen_sibling_keeps_its_weight(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"))
    attention = model[0].model.encoder.layer[0].attention.self
    attention.key.requires_grad_(False)
    round_linears(model[0].model)
    with torch.autocast("cpu", torch.bfloat16):
        model[0](dict(model.preprocess(TEXTS)))["token_embeddings"].float().square().sum().backward()
    assert attention.key.weight.grad is None
    assert attention.key.bias.grad is None
    assert attention.query.weight.grad.abs().max() > 0
    assert attention.value.bias.grad.abs().max() > 0


@pytest.mark.parametrize("checkpointing", [True, "selective"])
def test_layers_that_are_recomputed_give_the_same_gradients(checkpointing: bool | str, tiny_dir: TinyDir) -> None:
    found = []
    for setting in (None, checkpointing):
        model = load(tiny_dir("bert"), use_gradient_checkpointing=setting)
        round_linears(model[0].model)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        found.append(trained(model, at_once=True)[1])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_nothing_is_kept_after_a_pass(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"))
    round_linears(model[0].model)
    trained(model, at_once=True)
    assert groups(model)
    assert all(group._held is None and group.rounded is None for group in groups(model))


def test_nothing_is_kept_when_rounding_fails(tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    model = load(tiny_dir("bert"))
    round_linears(model[0].model)
    monkeypatch.setattr(torch, "_foreach_copy_", full)
    with pytest.raises(torch.OutOfMemoryError), rounded_at_once(model[0].model, torch.bfloat16):
        pytest.fail("no pass may see weights that were never written")
    assert all(group.rounded is None for group in groups(model))


def groups(model: FastSentenceTransformer) -> list[RoundedLinears]:
    return [module.shared for module in model.modules() if isinstance(module, RoundedLinear)]


def test_layers_with_hooks_are_called_one_by_one(tiny_dir: TinyDir) -> None:
    """Of a sibling's weights, which a hook sets before it is called, and of its output, which one may change."""
    found = []
    for change in (lambda _: None, round_linears):
        model = load(tiny_dir("bert"))
        attention = model[0].model.encoder.layer[0].attention.self
        change(model[0].model)
        torch.manual_seed(0)
        torch.nn.utils.prune.random_unstructured(attention.key, "weight", amount=0.5)
        with torch.no_grad():
            attention.key.weight_orig.mul_(3)  # the hook puts it into `weight` when the layer is called
        attention.value.register_forward_hook(lambda _module, _input, output: output.mul_(2))
        found.append(trained(model))
    assert (found[1][0] - found[0][0]).norm() <= 0.02 * found[0][0].norm()
    assert (found[1][1] - found[0][1]).norm() <= 0.05 * found[0][1].norm()


def test_the_output_of_a_single_layer_may_be_changed_in_place(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"))
    round_linears(model[0].model)
    dense = model[0].model.encoder.layer[0].output.dense
    with torch.autocast("cpu", torch.bfloat16):
        dense(torch.ones(2, dense.in_features)).mul_(2).sum().backward()
    assert dense.weight.grad is not None


def test_layers_that_are_shared_or_hold_quantised_weights_are_left_alone(tiny_dir: TinyDir) -> None:
    assert round_linears(load(tiny_dir("albert"))[0].model) == []
    model = load(tiny_dir("bert"))
    round_linears(model[0].model)
    exact, _ = trained(model)
    quantize_(model[0].model.encoder.layer[0].output.dense, Int8WeightOnlyConfig())
    with torch.autocast("cpu", torch.bfloat16):
        states = model[0](dict(model.preprocess(TEXTS)))["token_embeddings"]
    assert (states - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_shares_with_its_own_layers(duplicate: Callable[[nn.Module], nn.Module], tiny_dir: TinyDir) -> None:
    backbone = load(tiny_dir("bert"))[0].model
    round_linears(backbone)
    with rounded_at_once(backbone, torch.bfloat16):
        other = duplicate(backbone)
    changed = [module for module in other.modules() if isinstance(module, RoundedLinear)]
    assert changed
    for module in changed:
        assert any(member is module for member in module.shared.members)
        assert module.shared.rounded is None


def test_adapters_are_left_alone(tiny_dir: TinyDir) -> None:
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", device="cpu")
    model = FastSentenceTransformer.get_peft_model(model, target_modules=["query"])
    assert round_linears(model[0].model) == []
