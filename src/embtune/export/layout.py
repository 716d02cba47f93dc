"""The layout that everybody reads: what sentence-transformers 6 and transformers 5 write, with the older names beside.

text-embeddings-inference, Ollama, llama.cpp's converter, sentence-transformers 5 and transformers 4 look for keys and
class names that the newer libraries no longer write. Both spellings live in one file; the newer readers ignore the old.
"""

import shutil
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Router, Transformer
from torch import nn
from transformers import PreTrainedTokenizerBase

from embtune.adapt.merge import bare_model
from embtune.files import read_json, write_json
from embtune.models.families import position_limit
from embtune.models.modules import saved_modules

# Names under `sentence_transformers.models`, importable in every release so far; 6.x maps them to the new places.
_LONG_STANDING = (
    *("Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout", "CNN", "LSTM", "BoW", "CLIPModel"),
    *("WordEmbeddings", "WordWeights", "WeightedLayerPooling", "StaticEmbedding"),
)
_NEW_PLACES = ("sentence_transformers.base.modules.", "sentence_transformers.sentence_transformer.modules.")

# key of older pooling configs -> name of the mode, in the order in which several are concatenated
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# transformers 5 writes tokenizer.json alone; converters and slow tokenizers of other libraries read these.
_TOKENIZER_MODELS = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "vocab.txt")


def make_compatible(folder: str | Path, model: SentenceTransformer) -> None:
    """Rewrite, in place, the folder into which sentence-transformers has just saved `model`.

    Class names in modules.json, the configs of Transformer, Pooling and Dense modules (those in a Router too), and
    config.json get the older spelling beside the new one; tokenizer model files are copied from the base checkpoint.
    Modules of other libraries keep their class names.
    """
    folder = Path(folder)
    for module, path in saved_modules(model, folder):
        _rewrite_module(path, module)
    modules = read_json(folder / "modules.json")
    for entry in modules:
        entry["type"] = _long_standing_name(entry["type"])
    write_json(folder / "modules.json", modules)


def _long_standing_name(type_name: str) -> str:
    class_name = type_name.rpartition(".")[2]
    if type_name.startswith(_NEW_PLACES) and class_name in _LONG_STANDING:
        return f"sentence_transformers.models.{class_name}"
    return type_name


def _rewrite_module(folder: Path, module: nn.Module) -> None:
    if isinstance(module, Router):
        _rewrite_router(folder / Router.config_file_name)
    elif isinstance(module, Transformer):
        _rewrite_transformer(folder, module)
    elif isinstance(module, Pooling):
        _rewrite_pooling(folder / Pooling.config_file_name, module)
    elif isinstance(module, Dense):
        _rewrite_dense(folder / Dense.config_file_name)


def _rewrite_router(path: Path) -> None:
    config = read_json(path)
    config["types"] = {name: _long_standing_name(type_name) for name, type_name in config["types"].items()}
    write_json(path, config)


def _rewrite_pooling(path: Path, pooling: Pooling) -> None:
    mode = pooling.pooling_mode
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    config = read_json(path)
    # Releases before 5.4 do not know this key, later ones warn where it stands beside its old name.
    config.pop("embedding_dimension", None)
    if len(modes) > 1 and modes == tuple(name for name in _POOLING_KEYS.values() if name in modes):
        # Releases before 5.4 take no list; its order matters only where it is not the one of the old keys.
        config.pop("pooling_mode", None)
    legacy = {key: name in modes for key, name in _POOLING_KEYS.items()}
    write_json(path, {"word_embedding_dimension": pooling.embedding_dimension, **legacy, **config})


def _rewrite_dense(path: Path) -> None:
    """Leave out what says the default: the constructor of older releases does not know these keys."""
    default = "sentence_embedding"
    config = read_json(path)
    if config.get("module_input_name") == default and config.get("module_output_name") == default:
        del config["module_input_name"], config["module_output_name"]
        write_json(path, config)


def _rewrite_transformer(folder: Path, transformer: Transformer) -> None:
    path = folder / "sentence_bert_config.json"
    length = transformer.max_seq_length or position_limit(transformer.config)
    legacy = {"max_seq_length": length} if length else {}
    write_json(path, {**legacy, "do_lower_case": bool(transformer.do_lower_case), **read_json(path)})
    config_path = folder / "config.json"
    if config_path.exists():
        write_json(config_path, with_legacy_keys(read_json(config_path)))
    if isinstance(transformer.tokenizer, PreTrainedTokenizerBase):
        _rewrite_tokenizer(folder / "tokenizer_config.json", transformer)
        _copy_tokenizer_models(transformer.tokenizer, folder)


def _rewrite_tokenizer(path: Path, transformer: Transformer) -> None:
    """Names that transformers 4 knows; transformers 5 reads both."""
    config = read_json(path)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # transformers 4 has other defaults for some classes, and its models refuse an input that they do not declare.
    taken = signature(bare_model(transformer.model).forward).parameters
    names = [name for name in transformer.tokenizer.model_input_names if name in taken]
    write_json(path, {**config, "model_input_names": names})


def _copy_tokenizer_models(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Copy the model files of the checkpoint that the tokenizer came from, out of its folder or the Hub's cache."""
    source = tokenizer.name_or_path
    if not source:
        return
    for name in _TOKENIZER_MODELS:
        found = Path(source) / name if Path(source).is_dir() else try_to_load_from_cache(source, name)
        if isinstance(found, str | Path) and Path(found).is_file() and not (folder / name).exists():
            shutil.copyfile(found, folder / name)


def with_legacy_keys(config: dict[str, Any]) -> dict[str, Any]:
    """`config` (a config.json that transformers 5 wrote) with the keys that other readers need and 5 has dropped."""
    legacy = dict(_rope_keys(config))
    of_family = _LEGACY_KEYS.get(config.get("model_type", ""))
    if of_family is not None:
        legacy |= of_family(config)
    # What the checkpoint itself brought along wins over what is derived here.
    merged = {**legacy, **config}
    if config.get("model_type") == "nomic_bert" and config.get("max_position_embeddings") == 2048:
        # text-embeddings-inference up to 1.9.3 takes this key and n_positions for one field given twice, and stops;
        # 2048 is transformers' default, so that leaving it out changes nothing there.
        del merged["max_position_embeddings"]
    return merged


def _rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of models with one set of rotary parameters; without them, readers that expect
    the old keys fall back to a default base, and embeddings are wrong in silence."""
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    keys = {"rope_theta": rope["rope_theta"]}
    return keys if scaling.get("rope_type", "default") == "default" else {**keys, "rope_scaling": scaling}


def _modernbert_keys(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    keys = {
        "layer_norm_eps": config["norm_eps"],
        "global_rope_theta": rope["full_attention"]["rope_theta"],
        "local_rope_theta": rope["sliding_attention"]["rope_theta"],
    }
    is_global = [kind == "full_attention" for kind in config["layer_types"]]
    for every in range(1, len(is_global) + 1):
        if is_global == [index % every == 0 for index in range(len(is_global))]:
            return {**keys, "global_attn_every_n_layers": every}
    return keys


def _gemma3_keys(config: dict[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    keys = _rope_keys({"rope_parameters": rope["full_attention"]})
    return {**keys, "rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}


def _nomic_bert_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The names of the original implementation; what transformers' port has no switch for is what it always does."""
    return {
        "n_embd": config["hidden_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_inner": config["intermediate_size"],
        "n_positions": config["max_position_embeddings"],
        "max_trained_positions": config["max_position_embeddings"],
        "activation_function": "swiglu" if config["hidden_act"] == "silu" else config["hidden_act"],
        "layer_norm_epsilon": config["layer_norm_eps"],
        "rotary_emb_base": config["rope_parameters"]["rope_theta"],
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None,
        "rotary_scaling_factor": None,
        "prenorm": False,
        "causal": False,
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
    }


_LEGACY_KEYS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "modernbert": _modernbert_keys,
    "nomic_bert": _nomic_bert_keys,
    "gemma3_text": _gemma3_keys,
}
