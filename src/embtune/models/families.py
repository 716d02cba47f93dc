"""One row per architecture: where its layers are, what LoRA adapts, how it is checkpointed, pooled and exported.

The table decides, not transformers' own flags: some models set every flag and are wrong, some set none and are right.
An architecture without a row still loads and trains on the reference engine, with LoRA targets found from its modules.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from embtune.errors import ModelError

if TYPE_CHECKING:  # whoever asks the table alone, such as `embtune inspect`, does not wait for PyTorch
    from torch import nn
    from transformers import PretrainedConfig

LENGTH_DEPENDENT = "its rotary embeddings depend on the longest text of a batch"
CONVOLUTION = "its convolution reads across texts"

# Rotary embeddings that change, for every text of a batch, once the longest one passes a limit.
_LENGTH_DEPENDENT_ROPES = {"dynamic", "longrope"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What embtune knows about one transformers `model_type`."""

    model_type: str
    """The name in `config.json`."""
    layers: str
    """Path of the `nn.ModuleList` that holds the encoder layers, seen from the backbone."""
    lora_targets: tuple[str, ...]
    """Last name components of the linear layers that LoRA adapts by default: those inside the encoder layers.

    Names that a checkpoint lacks (T5's plain or gated `wi`) are passed over.
    """
    pooling: str = "mean"
    """Pooling when a bare checkpoint does not say: the mode that the family's embedding models use."""
    checkpointing: str = "native"
    """`native` where transformers checkpoints the layers itself, `swap` where embtune does it on the instance."""
    joined_matrices: bool = False
    """Whether its files hold query, key and value as one matrix, which transformers takes apart while loading."""
    gguf_architecture: str | None = None
    """llama.cpp's name of the architecture, or None where it has none."""
    positions_after_padding: bool = False
    """Whether positions count from padding index + 1 (RoBERTa, MPNet): the first ones are then never used."""
    packing: str | None = "interface"
    """How the packed engine reaches attention: transformers' `interface`, a `swap` on the instance; None: unproven."""
    bias_by_distance: bool = False
    """Whether a bias is added to the scores that depends on the distance of query and key alone."""
    mask_value: float = 0
    """1 where the model multiplies embeddings by their mask, which a packed row must leave as they are."""


def _family(*model_types: str, **settings: object) -> dict[str, Family]:
    return {name: Family(model_type=name, **settings) for name in model_types}  # type: ignore[arg-type]


_BERT_TARGETS = ("query", "key", "value", "dense")
_DECODER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

FAMILIES: dict[str, Family] = {
    **_family("bert", layers="encoder.layer", lora_targets=_BERT_TARGETS, gguf_architecture="bert"),
    **_family("ernie", layers="encoder.layer", lora_targets=_BERT_TARGETS),
    **_family("electra", layers="encoder.layer", lora_targets=_BERT_TARGETS, pooling="cls"),
    **_family(
        "roberta",
        "xlm-roberta",
        layers="encoder.layer",
        lora_targets=_BERT_TARGETS,
        gguf_architecture="bert",
        positions_after_padding=True,
    ),
    **_family("camembert", layers="encoder.layer", lora_targets=_BERT_TARGETS, positions_after_padding=True),
    **_family(
        "mpnet",
        layers="encoder.layer",
        lora_targets=("q", "k", "v", "o", "dense"),
        checkpointing="swap",
        positions_after_padding=True,
        packing="swap",
        bias_by_distance=True,
    ),
    **_family(
        "distilbert",
        layers="transformer.layer",
        lora_targets=("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
        gguf_architecture="bert",
    ),
    **_family(
        "albert",
        layers="encoder.albert_layer_groups",
        lora_targets=("query", "key", "value", "dense", "ffn", "ffn_output"),
        checkpointing="swap",
    ),
    **_family(
        "modernbert",
        layers="layers",
        lora_targets=("Wqkv", "Wo", "Wi"),
        pooling="cls",
        gguf_architecture="modern-bert",
    ),
    **_family(
        "deberta-v2",
        layers="encoder.layer",
        lora_targets=("query_proj", "key_proj", "value_proj", "dense"),
        pooling="cls",
        packing="swap",
        mask_value=1,
    ),
    **_family(
        "t5",
        layers="encoder.block",
        lora_targets=("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"),
        packing="swap",
        bias_by_distance=True,
    ),
    **_family("nomic_bert", layers="layers", lora_targets=_DECODER_TARGETS, joined_matrices=True),
    **_family("gte", layers="layers", lora_targets=_DECODER_TARGETS, pooling="cls", joined_matrices=True),
    **_family(
        "jina_embeddings_v3",
        layers="layers",
        lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
        joined_matrices=True,
    ),
    **_family("eurobert", layers="layers", lora_targets=_DECODER_TARGETS),
    **_family("qwen2", "llama", "mistral", layers="layers", lora_targets=_DECODER_TARGETS, pooling="lasttoken"),
    **_family("qwen3", layers="layers", lora_targets=_DECODER_TARGETS, pooling="lasttoken", gguf_architecture="qwen3"),
    **_family("gemma3_text", layers="layers", lora_targets=_DECODER_TARGETS),
    **_family(
        "embedding_gemma2_text",
        layers="layers",
        lora_targets=(*_DECODER_TARGETS, "per_layer_input_gate", "per_layer_projection"),
    ),
}


def family_of(config: "PretrainedConfig") -> Family | None:
    """The table's row for this config, or None for an architecture that has none."""
    return FAMILIES.get(config.model_type)


def packing_obstacle(config: "PretrainedConfig") -> str | None:
    """What in an encoder's config keeps it from packed rows, or None."""
    family = family_of(config)
    if family is None or family.packing is None:
        return f"{config.model_type} is not among the architectures proven on packed rows"
    if _rope_types(config) & _LENGTH_DEPENDENT_ROPES:
        return LENGTH_DEPENDENT
    if getattr(config, "conv_kernel_size", 0):
        return CONVOLUTION
    return None


def _rope_types(config: "PretrainedConfig") -> set[str]:
    """The types of the rotary embeddings: of all layers, or of each kind of layer (Gemma 3, ModernBERT)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
    return {kind.get("rope_type", "default") for kind in kinds}


def position_limit(config: "PretrainedConfig") -> int | None:
    """The longest text in tokens that the model's positions allow, or None where they set no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    family = family_of(config)
    if family is None or not family.positions_after_padding:
        return positions
    # MPNet's module fixes its padding index at 1, whatever the config says.
    return positions - 2 if config.model_type == "mpnet" else positions - config.pad_token_id - 1


def encoder_layers(backbone: "nn.Module") -> list["nn.Module"]:
    """The repeated layers of a backbone (a transformers model, PEFT-wrapped or not), first to last.

    Without a row, the longest `nn.ModuleList` of the module tree is taken.

    Raises:
        ModelError: the model has no list of layers.
    """
    from torch import nn

    bare = unwrapped(backbone)
    family = family_of(bare.config)
    if family is not None:
        return list(bare.get_submodule(family.layers))
    lists = [list(module) for module in bare.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(bare).__name__} has no list of layers; only full fine-tuning can serve it.")
    return max(lists, key=len)


def unwrapped(backbone: "nn.Module") -> "nn.Module":
    """The transformers model inside a PEFT wrapper, or the model itself."""
    get_base_model = getattr(backbone, "get_base_model", None)
    return get_base_model() if get_base_model is not None else backbone
