"""A pass whose weights are rounded all at once."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from embtune import FastSentenceTransformer
from embtune.accelerate.rounding import call_rounded, can_round

TinyDir = Callable[..., Path]


def load(folder: Path, **settings: Any) -> FastSentenceTransformer:
    return FastSentenceTransformer.from_pretrained(
        folder, dtype="float32", device="cpu", full_finetuning=True, **settings
    ).eval()


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "distilbert", "modernbert", "qwen3"])
def test_a_pass_is_the_one_under_autocast(model_type: str, tiny_dir: TinyDir) -> None:
    model = load(tiny_dir(model_type), engine="reference")
    features = model.preprocess(["a text", "another, longer text than the first"])
    passes: list[Callable[[], dict[str, Any]]] = [
        lambda: model[0](dict(features)),
        lambda: call_rounded(model[0], torch.bfloat16, dict(features)),
    ]
    found = []
    for embed in passes:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            states = embed()["token_embeddings"]
        (states.float() * torch.linspace(-1, 1, states.shape[-1])).sum().backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        found.append(gradients)
        model.zero_grad()
    assert len(found[0]) == len(found[1])
    assert all(map(torch.equal, *found))
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


def test_frozen_weights_get_no_gradient_computed(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"), engine="reference")
    layers = model[0].model.encoder.layer
    model.requires_grad_(False)
    layers[-1].requires_grad_(True)
    features = model.preprocess(["a text"])
    products = []
    for embed in (model[0], partial(call_rounded, model[0], torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            states = embed(dict(features))["token_embeddings"]
        with torch.profiler.profile() as profile:
            states.float().sum().backward()
        products.append(sum(event.name in ("aten::mm", "aten::bmm") for event in profile.events()))
        assert layers[-1].output.dense.weight.grad is not None
        assert layers[0].output.dense.weight.grad is None
        model.zero_grad()
    assert products[0] == products[1] > 0


def test_who_is_left_to_autocast(tiny_dir: TinyDir) -> None:
    assert can_round(load(tiny_dir("bert"))[0].model)
    assert not can_round(load(tiny_dir("bert")).half()[0].model)
    assert not can_round(load(tiny_dir("bert"), use_gradient_checkpointing="selective")[0].model)
    adapted = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", device="cpu")
    assert not can_round(FastSentenceTransformer.get_peft_model(adapted)[0].model)
