"""A packed row as compiled code and recorded CUDA graphs take it: plain tensors, nothing that fits one batch only."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from tiny import ARCHITECTURES, TEXTS
from torch._dynamo.utils import counters

from embtune import FastSentenceTransformer
from embtune.accelerate.compiling import compile_layers
from embtune.models.families import FAMILIES
from embtune.packing.flatten import flatten
from embtune.packing.layout import RowAttention

TinyDir = Callable[..., Path]
HAS_TRITON = find_spec("triton") is not None


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def load(folder: Path, engine: str) -> FastSentenceTransformer:
    return FastSentenceTransformer.from_pretrained(
        folder, dtype="float32", device="cpu", engine=engine, full_finetuning=True
    ).eval()


def step(model: FastSentenceTransformer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    embeddings = model(dict(model.preprocess(texts)))["sentence_embedding"]
    (embeddings[:, ::3].square().sum() + embeddings[::2].sum()).backward()
    return embeddings.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_compiled_layers_give_the_same_and_serve_every_batch(model_type: str, tiny_dir: TinyDir) -> None:
    packed, reference = load(tiny_dir(model_type), "packed"), load(tiny_dir(model_type), "reference")
    # Tracing shows what is compiled anew; what autograd makes of a traced mask differs only where masks are multiplied.
    compile_layers(packed[0].model, backend="aot_eager" if model_type in ("bert", "deberta-v2") else "eager")
    compiled = []
    for texts in (TEXTS, TEXTS[2:6], TEXTS[::-1][:7]):
        ours, gradients = step(packed, texts)
        expected, expected_gradients = step(reference, texts)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        assert (gradients - expected_gradients).norm() <= 1e-4 * expected_gradients.norm()
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] == compiled[-1] > 0


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("model_type", "attention"),
    [
        *((name, "flash") for name in ARCHITECTURES if FAMILIES[name].packing == "interface"),
        pytest.param("modernbert", "windows", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs triton")),
    ],
)
def test_a_mask_for_kernels_reaches_the_attention(model_type: str, attention: RowAttention, tiny_dir: TinyDir) -> None:
    """Where FlashAttention cannot serve after all, others compute the same from the same mask."""
    packed, reference = load(tiny_dir(model_type), "packed"), load(tiny_dir(model_type), "reference")
    engine = packed.engine
    assert engine.flash
    assert engine.windows or attention == "flash"
    features = packed.preprocess(TEXTS)
    flattened = flatten(features, torch.float32, engine.padding_id, engine.mask_value, attention)
    assert flattened is not None
    embeddings = SentenceTransformer.forward(packed, flattened[0])["sentence_embedding"]
    torch.testing.assert_close(embeddings, reference(dict(features))["sentence_embedding"], rtol=0, atol=1e-5)
