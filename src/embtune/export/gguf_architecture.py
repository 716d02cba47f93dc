"""What llama.cpp must know of an architecture to compute the same embeddings: its numbers, and names of its tensors.

Each family is checked first: llama.cpp hard-codes activation, attention pattern and biases per architecture, and a
model that differs in one of them would load and give other embeddings.
"""

from typing import Any

from gguf import GGUFWriter, RopeScalingType, TensorNameMap
from transformers import PretrainedConfig

from embtune.errors import ExportError
from embtune.models.families import FAMILIES

# Exact and approximate GELU: llama.cpp has one kernel for both, and the difference is far below float16's.
_GELU = ("gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate")

_UNKNOWN_TO_LLAMACPP = {
    "mpnet": "llama.cpp has no such architecture (MPNet adds a relative position bias to the attention)",
    "deberta-v2": "llama.cpp has no such architecture (DeBERTa's attention is disentangled)",
    "albert": "llama.cpp has no such architecture (ALBERT's layers share their weights)",
    "electra": "llama.cpp has no such architecture",
}


def gguf_architecture(config: PretrainedConfig) -> str:
    """llama.cpp's name of the architecture.

    Raises:
        ExportError: llama.cpp has none, embtune does not write it, or this model differs from what llama.cpp computes.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or family.gguf_architecture is None:
        written = ", ".join(name for name, row in FAMILIES.items() if row.gguf_architecture)
        reason = _UNKNOWN_TO_LLAMACPP.get(config.model_type, "embtune does not write this architecture")
        raise ExportError(
            f"A {config.model_type} model cannot be saved as GGUF: {reason}. Architectures that can: {written}. "
            "Every model can be saved merged, for sentence-transformers and the servers that read its folders."
        )
    for setting, expected in _expectations(config).items():
        value = getattr(config, setting, None)
        if value not in expected:
            raise ExportError(
                f"This {config.model_type} model cannot be saved as GGUF: its config has {setting}={value!r}, and "
                f"llama.cpp computes this architecture with {' or '.join(map(repr, expected))} only."
            )
    return family.gguf_architecture


def _expectations(config: PretrainedConfig) -> dict[str, tuple[Any, ...]]:
    """Setting of the config -> the values with which llama.cpp computes the same."""
    if config.model_type == "modernbert":
        no_bias = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias"), (False,))
        return {"hidden_activation": _GELU, **no_bias, "layer_types": (_periodic_layers(config),)}
    if config.model_type == "qwen3":
        full = ["full_attention"] * config.num_hidden_layers
        return {"hidden_act": ("silu",), "attention_bias": (False,), "layer_types": (full, None)}
    if config.model_type == "distilbert":
        return {"activation": _GELU}
    absolute = ("absolute", None)
    return {"hidden_act": _GELU, "position_embedding_type": absolute, "is_decoder": (False, None)}


def _global_period(config: PretrainedConfig) -> int:
    """Every how many layers ModernBERT attends globally, beginning with the first."""
    later = (i for i, kind in enumerate(config.layer_types) if i > 0 and kind == "full_attention")
    return next(later, config.num_hidden_layers)


def _periodic_layers(config: PretrainedConfig) -> list[str]:
    period = _global_period(config)
    return ["sliding_attention" if i % period else "full_attention" for i in range(config.num_hidden_layers)]


def usable_positions(config: PretrainedConfig) -> int:
    """How many tokens a text may have: RoBERTa's position table begins with rows that no token uses."""
    return config.max_position_embeddings - _first_position(config)


def _first_position(config: PretrainedConfig) -> int:
    return config.pad_token_id + 1 if FAMILIES[config.model_type].positions_after_padding else 0


def add_hyperparameters(writer: GGUFWriter, config: PretrainedConfig, context_length: int) -> None:
    """Write sizes, norms, positions and the attention pattern under llama.cpp's keys."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_causal_attention(config.model_type == "qwen3")
    if config.model_type == "modernbert":
        _add_modernbert(writer, config)
    elif config.model_type == "qwen3":
        _add_qwen3(writer, config)
    else:
        is_distilbert = config.model_type == "distilbert"
        writer.add_feed_forward_length(config.hidden_dim if is_distilbert else config.intermediate_size)
        # DistilBERT's modelling code fixes the epsilon and has no token types; llama.cpp wants the count all the same.
        writer.add_layer_norm_eps(1e-12 if is_distilbert else config.layer_norm_eps)
        writer.add_token_type_count(1 if is_distilbert else config.type_vocab_size)


def _add_modernbert(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_rope_scaling_type(RopeScalingType.NONE)
    writer.add_rope_freq_base(_rope_theta(config, config.rope_parameters["full_attention"]))
    writer.add_rope_freq_base_swa(_rope_theta(config, config.rope_parameters["sliding_attention"]))
    writer.add_sliding_window(config.local_attention)
    writer.add_sliding_window_pattern(_global_period(config))


def _add_qwen3(writer: GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope_theta(config, config.rope_parameters))


def _rope_theta(config: PretrainedConfig, parameters: dict[str, Any]) -> float:
    if parameters["rope_type"] != "default":
        raise ExportError(
            f"This {config.model_type} model cannot be saved as GGUF: embtune writes unscaled rotary positions, and "
            f"its config scales them (rope_type={parameters['rope_type']!r})."
        )
    return parameters["rope_theta"]


def tensor_name(names: TensorNameMap, name: str) -> str | None:
    """llama.cpp's name of a bare backbone's tensor; None for the pooler, which no pooling mode uses.

    Raises:
        ExportError: llama.cpp's architecture has no such tensor.
    """
    if name.startswith("pooler."):
        return None
    suffixes = (".weight", ".bias")
    # gguf lists decoders under the names of their CausalLM class.
    found = names.get_name(name, suffixes) or names.get_name(f"model.{name}", suffixes)
    if found is None:
        raise ExportError(f"The model's tensor {name!r} has no counterpart in llama.cpp's architecture.")
    return found


def kept_rows(config: PretrainedConfig, name: str, context_length: int) -> slice:
    """The rows of a tensor that belong into the file: of the position table those of the first `context_length` tokens.

    llama.cpp counts positions from 0 and refuses a table of another length than the context.
    """
    if name != "embeddings.position_embeddings.weight":
        return slice(None)
    first = _first_position(config)
    return slice(first, first + context_length)
