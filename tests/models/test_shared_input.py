"""Queries, keys and values that round their common input once."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from embtune import FastSentenceTransformer
from embtune.models.shared_input import SharedCastLinear, SharedInput, share_casts, unshare_casts

TinyDir = Callable[..., Path]


def load(folder: Path) -> FastSentenceTransformer:
    return FastSentenceTransformer.from_pretrained(folder, dtype="float32", device="cpu", full_finetuning=True).eval()


def trained(model: FastSentenceTransformer) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Embeddings, gradients, and how often something was cast to bfloat16."""
    features = model.preprocess(["a text", "another, longer text than the first"])
    with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16):
        embeddings = model(features)["sentence_embedding"]
    (embeddings.float() * torch.linspace(-1, 1, embeddings.shape[-1])).sum().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return embeddings, gradients, sum(event.name == "aten::_to_copy" for event in profile.events())


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "mpnet", "qwen3"])
def test_embeddings_and_gradients_are_the_same(model_type: str, tiny_dir: TinyDir) -> None:
    model = load(tiny_dir(model_type))
    embeddings, gradients, casts = trained(model)
    changed = share_casts(model[0].model)
    assert changed
    same_embeddings, same_gradients, fewer = trained(model)
    assert torch.equal(same_embeddings, embeddings)
    for same, gradient in zip(same_gradients, gradients, strict=True):
        torch.testing.assert_close(same, gradient, rtol=1e-5, atol=1e-6)  # the order of sums in float32
    assert fewer < casts
    # Where nothing is rounded, they are what they were.
    exact = model(model.preprocess(["a text"]))["sentence_embedding"]
    unshare_casts(model[0].model)
    assert not any(isinstance(module, SharedCastLinear) for module in model.modules())
    assert torch.equal(model(model.preprocess(["a text"]))["sentence_embedding"], exact)


def test_nothing_is_kept_when_all_have_read(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"))
    share_casts(model[0].model)
    trained(model)
    shared = [module.shared for module in model.modules() if isinstance(module, SharedCastLinear)]
    assert shared
    assert all(each._held is None for each in shared)


def test_outputs_for_the_input_of_another_thread_are_never_handed_out() -> None:
    first, second = nn.Identity(), nn.Identity()
    shared = SharedInput([first, second])

    def multiples(states: torch.Tensor) -> list[torch.Tensor]:
        return [2 * states, 3 * states]

    theirs, ours = torch.tensor(10.0), torch.tensor(1.0)

    class Old:
        def __del__(self) -> None:  # in the middle of `take`, as another thread may be
            shared.take(first, theirs, multiples)

    shared.take(first, Old(), lambda _: [ours, ours])  # type: ignore[arg-type]
    assert shared.take(first, ours, multiples) == 2
    assert shared.take(second, theirs, multiples) == 30
    assert shared.take(second, ours, multiples) == 3


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_shares_with_its_own_layers(duplicate: Callable[[nn.Module], nn.Module], tiny_dir: TinyDir) -> None:
    backbone = load(tiny_dir("bert"))[0].model
    share_casts(backbone)
    other = duplicate(backbone)
    for module in other.modules():
        if isinstance(module, SharedCastLinear):
            assert any(member is module for member in module.shared.members)


def test_adapters_are_left_alone(tiny_dir: TinyDir) -> None:
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", device="cpu")
    model = FastSentenceTransformer.get_peft_model(model, target_modules=["query", "key", "value"])
    assert share_casts(model[0].model) == []
