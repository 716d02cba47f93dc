from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from tiny import HIDDEN, TEXTS
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from embtune.errors import ExportError
from embtune.export.parity import PARITY_TEXTS, embedding_parity


def _only_half(module: nn.Module, query: torch.Tensor, *args: object, **kwargs: object) -> object:
    """What a FlashAttention kernel does with float32."""
    if query.dtype == torch.float32:
        raise RuntimeError("only fp16 and bf16")
    return sdpa_attention_forward(module, query, *args, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def attention_in_half_precision() -> None:
    AttentionInterface.register("knows_no_float32", _only_half)
    AttentionMaskInterface.register("knows_no_float32", sdpa_mask)


def test_a_folder_equals_the_model_it_came_from(tiny_dir: Callable[..., Path]) -> None:
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu", truncate_dim=16)
    parity = embedding_parity(model, tiny_dir("bert"))
    assert parity.minimum > 0.999999
    assert parity.mean >= parity.minimum
    assert parity.texts == len(PARITY_TEXTS)
    assert embedding_parity(model, tiny_dir("bert"), TEXTS[:3]).texts == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_live_model_computes_in_float32_and_comes_back_as_it_was(
    tiny_dir: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    kwargs = {"dtype": dtype, "attn_implementation": "knows_no_float32"}
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu", model_kwargs=kwargs)
    model.append(Dense(HIDDEN, 8, activation_function=nn.Identity()))
    model.save_pretrained(str(tmp_path))
    model.train()
    model[1].eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: (tensor.data_ptr(), tensor.dtype, tensor.clone()) for name, tensor in tensors.items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()

    # In the half precision of the live model, texts differ by more than this.
    assert embedding_parity(model, tmp_path, minimum=0.9999999).minimum > 0.9999999

    assert all(
        (tensors[name].data_ptr(), tensors[name].dtype) == (address, kept) and torch.equal(tensors[name], value)
        for name, (address, kept, value) in before.items()
    )
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model[0].model.config._attn_implementation == "knows_no_float32"


def test_another_model_is_refused_with_the_worst_text(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        next(model.parameters()).add_(torch.randn(next(model.parameters()).shape))
    with pytest.raises(
        ExportError, match=r"for the text '.+' the two embeddings have a cosine of [-0-9.]+, below 0.9999"
    ):
        embedding_parity(model, tmp_path)
    assert embedding_parity(model, tmp_path, minimum=-1).minimum < 0.9999


def test_embeddings_that_are_no_numbers_are_refused(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ExportError, match="cosine of -1"):
        embedding_parity(model, tmp_path)


def test_another_dimension_is_refused(tiny_dir: Callable[..., Path]) -> None:
    transformer = Transformer.load(str(tiny_dir("bert")))
    model = SentenceTransformer(modules=[transformer, Pooling(HIDDEN, ("cls", "mean"))], device="cpu")
    with pytest.raises(ExportError, match="32 dimensions, the trained model's have 64"):
        embedding_parity(model, tiny_dir("bert"))
