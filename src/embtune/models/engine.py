"""Which engine a model runs on: the packed one where its architecture is proven there, else the reference."""

import warnings
from dataclasses import dataclass

import sentence_transformers
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
    WeightedLayerPooling,
)
from torch import nn
from transformers import PretrainedConfig

from embtune.errors import ArgumentError, EmbtuneWarning
from embtune.models.families import (
    CONVOLUTION,
    LENGTH_DEPENDENT,
    Family,
    family_of,
    packing_obstacle,
    unwrapped,
)
from embtune.models.modules import transformer_modules
from embtune.models.swaps import has_swaps, swap_attention, undo_swaps
from embtune.packing import attention
from embtune.packing.layout import RowAttention

ENGINES = ("auto", "packed", "reference")

# Behind the encoder: what looks at one token or one embedding at a time, and pooling, which knows a flat row.
_PROVEN_MODULES = frozenset({Dense, Dropout, LayerNorm, Normalize, Pooling, WeightedLayerPooling})
_CLS_OF_PROMPT = tuple(map(int, sentence_transformers.__version__.split(".")[:2])) < (6, 2)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The engine of one model, and how its rows are laid out."""

    name: str
    """`packed` or `reference`."""
    reason: str
    """Why this one, as `explain()` prints it."""
    padding_id: int | None = None
    """Where positions count from the padding index (RoBERTa, MPNet): that index."""
    mask_value: float = 0
    """1 for models that multiply embeddings by their mask."""
    flash: bool = False
    """Whether the attention is one that variable-length FlashAttention computes, where device and dtype allow it."""
    tiles: bool = False
    """Whether it is one that `row_attention` computes."""
    windows: bool = False
    """Whether some layers read a window so narrow that `row_attention` is the faster one in any row."""
    triton: bool = True
    """Whether to use kernels that Triton has to compile when they are first called, where others serve as well."""

    def attention(self, device: torch.device, dtype: torch.dtype, longest: int) -> RowAttention:
        """What computes the attention of a row whose texts are at most `longest` tokens long."""
        return attention.row_attention_for(
            device,
            dtype,
            longest,
            tiles=self.tiles,
            flash=self.flash,
            windows=self.windows,
            triton=self.triton,
        )

    def packs(self, model: SentenceTransformer) -> bool:
        """Whether batches become flat rows: not once somebody has changed the model to one that cannot take them."""
        if self.name != "packed" or not isinstance(model[0], Transformer) or unproven_module(model):
            return False
        bare = unwrapped(model[0].model)
        return bare.config._attn_implementation == attention.ATTENTION or has_swaps(bare)

    def fallback(self, model: SentenceTransformer) -> str | None:
        """Why a model that was loaded to be packed computes padded batches all the same; None where it does not."""
        if self.name != "packed" or self.packs(model):
            return None
        if obstacle := unproven_module(model):
            return f"padded batches, because {obstacle}"
        implementation = unwrapped(model[0].model).config._attn_implementation
        return (
            f"padded batches, because its attention was set to {implementation!r} after loading; "
            "load the model again to train faster"
        )


def choose_engine(requested: str, model: SentenceTransformer, attn_implementation: str | None = None) -> Engine:
    """Settle the engine and ready the model's modules for it.

    Args:
        requested: one of `ENGINES`.
        attn_implementation: what the user asked of transformers; anything named there stays, on the reference engine.

    Raises:
        ArgumentError: `requested` is unknown, or is "packed" for a model that cannot be packed; the message says why.
    """
    if requested not in ENGINES:
        raise ArgumentError(f"engine={requested!r} is not known; use one of {', '.join(ENGINES)}.")
    if requested == "reference":
        return switch_to_reference(model)
    obstacle = _obstacle(model, attn_implementation)
    if obstacle is not None and requested == "packed":
        raise ArgumentError(f'engine="packed" cannot serve this model: {obstacle}. Use engine="auto" or "reference".')
    if obstacle is None and requested == "auto":
        obstacle = _slower(model)
    if obstacle is not None:
        if obstacle in (LENGTH_DEPENDENT, CONVOLUTION, unproven_module(model)):
            # Others of its architecture are packed, so nobody would expect it.
            warnings.warn(f"This model is computed in padded batches: {obstacle}.", EmbtuneWarning, stacklevel=3)
        return Engine(name="reference", reason=f"padded batches, because {obstacle}")
    return _switch_to_packed(transformer_modules(model)[0])


def switch_to_reference(model: SentenceTransformer, reason: str = "as asked") -> Engine:
    """Undo what the packed engine changed on the model's instances."""
    for transformer in transformer_modules(model):
        backbone = unwrapped(transformer.model)
        undo_swaps(backbone)
        if backbone.config._attn_implementation == attention.ATTENTION:
            backbone.set_attn_implementation("sdpa")
    return Engine(name="reference", reason=f"{reason}: padded batches and PEFT's own forward")


def _obstacle(model: SentenceTransformer, attn_implementation: str | None) -> str | None:
    """What keeps a model from being packed, or None."""
    if len(transformer_modules(model)) != 1 or not isinstance(model[0], Transformer):
        return "it does not begin with a single Transformer module"
    if attn_implementation is not None:
        return f"attn_implementation={attn_implementation!r} was asked for"
    obstacle = packing_obstacle(model[0].config)
    if obstacle is not None:
        return obstacle
    if set(model[0].modality_config) != {"text"} or model[0].modality_config["text"]["method"] != "forward":
        return "it takes more than plain text"
    return unproven_module(model)


def unproven_module(model: SentenceTransformer) -> str | None:
    """The module behind the encoder that keeps a model from being packed (CNN reads across texts), or None."""
    for module in list(model)[1:]:
        if type(module) not in _PROVEN_MODULES:
            return f"its {type(module).__name__} module may read across texts"
        if (
            _CLS_OF_PROMPT
            and isinstance(module, Pooling)
            and "cls" in module.pooling_mode
            and not module.include_prompt
        ):
            return "sentence-transformers before 6.2 pools a flat row by its first token, be that the prompt's or not"
    return None


def _slower(model: SentenceTransformer) -> str | None:
    """Where packing would be right but was measured to be slower, or None."""
    family = family_of(model[0].config)
    if model.device.type != "cuda" or family is None or family.packing != "swap":
        return None
    tiles = family.bias_by_distance
    if attention.row_attention_for(model.device, model.dtype, 0, tiles=tiles, flash=False) == "groups":
        # MPNet-base, 128 pairs: 1,410 ms a step in groups against 394 ms padded (benchmarks/results/train_gpu.jsonl).
        return f'on a GPU {family.model_type} is faster so; engine="packed" takes a third of the memory'
    return None


def _switch_to_packed(transformer: Transformer) -> Engine:
    backbone = unwrapped(transformer.model)
    family = family_of(backbone.config)
    assert family is not None
    if family.packing == "swap":
        swap_attention(backbone)
    else:
        attention.register()
        backbone.set_attn_implementation(attention.ATTENTION)
    small_heads = _largest_head(backbone.config) <= attention.FLASH_HEAD_DIM
    return Engine(
        name="packed",
        reason="one flat row of real tokens, no padding",
        padding_id=_padding_id(backbone, family),
        mask_value=family.mask_value,
        flash=family.packing == "interface" and small_heads,
        tiles=(family.packing == "interface" or family.bias_by_distance) and small_heads,
        windows=family.packing == "interface" and _has_narrow_windows(backbone.config),
    )


def _has_narrow_windows(config: PretrainedConfig) -> bool:
    window = getattr(config, "sliding_window", None)
    return (
        "sliding_attention" in (getattr(config, "layer_types", None) or ())
        and isinstance(window, int)
        and window + 1 <= attention.NARROW_WINDOW  # ModernBERT's layers count the token itself, its config does not
        and _largest_head(config) <= attention.NARROW_HEAD_DIM
    )


def _largest_head(config: PretrainedConfig) -> int:
    # EmbeddingGemma 2's layers differ, and its config refuses to name one size for all.
    layers = getattr(config, "per_layer_config", [config])
    return max(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads for layer in layers)


def _padding_id(backbone: nn.Module, family: Family) -> int | None:
    return backbone.embeddings.padding_idx if family.positions_after_padding else None
