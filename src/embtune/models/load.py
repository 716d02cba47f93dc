"""Loading: sentence-transformers folders module by module, bare checkpoints, and adapter folders onto their base."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sentence_transformers.util import import_from_string
from torch import nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)

from embtune.errors import ArgumentError, ModelError
from embtune.files import read_json
from embtune.models.families import family_of, unwrapped
from embtune.models.heads import keep_heads_in_float32
from embtune.models.load_reports import without_pooler_reports
from embtune.models.modules import pooling_modules, transformer_modules
from embtune.models.source import Source, explained, stored_dtype

POOLING_MODES = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

# A text model's forward, said outright: left to itself, sentence-transformers may infer a chat template from the
# tokenizer and then feeds every text through it, which changes the embeddings.
_TEXT_ONLY: dict[str, Any] = {
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a checkpoint is loaded, once every argument has been checked."""

    dtype: torch.dtype
    """Dtype of the base weights."""
    device: torch.device
    """Where the model is placed."""
    max_seq_length: int | None = None
    """Longest text in tokens; None is the checkpoint's own."""
    pooling_mode: str | None = None
    """One of `POOLING_MODES`; None is the checkpoint's own, for a bare one its family's."""
    quantization: Any = None
    """A transformers quantization config, or None."""
    attn_implementation: str | None = None
    """transformers' name of an attention implementation; None is its default."""
    truncate_dim: int | None = None
    """Embeddings are cut to this many dimensions."""
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further keywords for the backbone's `from_pretrained`."""
    processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further keywords for the tokenizer's `from_pretrained`."""

    def __post_init__(self) -> None:
        if self.pooling_mode is not None and self.pooling_mode not in POOLING_MODES:
            raise ArgumentError(f"pooling_mode={self.pooling_mode!r} is not known; use {', '.join(POOLING_MODES)}.")
        if self.max_seq_length is not None and (not isinstance(self.max_seq_length, int) or self.max_seq_length < 1):
            raise ArgumentError(f"max_seq_length={self.max_seq_length!r}: give a number of tokens from 1 up, or None.")
        if self.truncate_dim is not None and (not isinstance(self.truncate_dim, int) or self.truncate_dim < 1):
            raise ArgumentError(f"truncate_dim={self.truncate_dim!r}: give a number of dimensions from 1 up, or None.")
        named = {"dtype": "dtype", "torch_dtype": "dtype", "quantization_config": "load_in_4bit or load_in_8bit"}
        for key in self.model_kwargs:
            if key in named or (key == "attn_implementation" and self.attn_implementation):
                raise ArgumentError(f"model_kwargs[{key!r}]: use the argument {named.get(key, key)} instead.")

    @property
    def backbone_kwargs(self) -> dict[str, Any]:
        """Keywords for the backbone's `from_pretrained`."""
        kwargs = {"dtype": self.dtype, **self.model_kwargs}
        if self.quantization is not None:
            kwargs["quantization_config"] = self.quantization
            # A quantised model cannot be moved afterwards on every backend: it is loaded where it will stay.
            kwargs["device_map"] = {"": self.device}
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        return kwargs


def load_sentence_transformer(
    cls: type[SentenceTransformer], source: Source, settings: Settings
) -> SentenceTransformer:
    """Load a folder or Hub repository of any of the three kinds; an adapter is *not* attached yet.

    Raises:
        ModelError: nothing loadable is found there; the message carries the cause.
    """
    with explained(source), without_pooler_reports():
        if source.find("modules.json") is not None:
            model = _load_modules(cls, source, settings)
        else:
            model = _load_bare(cls, source, settings)
    model.truncate_dim = settings.truncate_dim
    for transformer in transformer_modules(model):
        _refuse_joined_matrices(transformer.config, settings)
        remember_checkpoint(transformer.model, source)
    keep_heads_in_float32(model)
    return model


def _load_modules(cls: type[SentenceTransformer], source: Source, settings: Settings) -> SentenceTransformer:
    model = cls(
        source.name,
        device=str(settings.device),
        cache_folder=source.cache_dir,
        revision=source.revision,
        token=source.token,
        local_files_only=source.local_files_only,
        trust_remote_code=source.trust_remote_code,
        model_kwargs=settings.backbone_kwargs,
        processor_kwargs=dict(settings.processor_kwargs),
    )
    if settings.pooling_mode is not None:
        set_pooling(model, settings.pooling_mode)
    return model


def set_pooling(model: SentenceTransformer, mode: str) -> None:
    """Give the model's one Pooling module another mode.

    Raises:
        ArgumentError: there are several, or one that concatenates modes.
    """
    poolings = pooling_modules(model)
    if len(poolings) != 1:
        raise ArgumentError(
            f"pooling_mode: this model has {len(poolings)} Pooling modules; it must have one to be set."
        )
    if isinstance(poolings[0].pooling_mode, tuple):
        raise ArgumentError("pooling_mode: this model concatenates several modes; one alone changes its dimension.")
    poolings[0].pooling_mode = mode


def _load_bare(cls: type[SentenceTransformer], source: Source, settings: Settings) -> SentenceTransformer:
    """Transformer, Pooling, Normalize: what an embedding model is made of when the checkpoint names no modules."""
    transformer = Transformer(
        source.name,
        model_kwargs={**source.hub, **settings.backbone_kwargs},
        processor_kwargs={**source.hub, **settings.processor_kwargs},
        config_kwargs=source.hub,
        **_TEXT_ONLY,
    )
    return cls(
        modules=sentence_modules(transformer, settings.pooling_mode),
        device=str(settings.device),
        trust_remote_code=source.trust_remote_code,
    )


def sentence_modules(transformer: Transformer, pooling_mode: str | None) -> list[nn.Module]:
    """A Transformer module with pooling (None: its family's own mode, else the mean) and normalisation behind it."""
    family = family_of(transformer.config)
    mode = pooling_mode or (family.pooling if family else "mean")
    return [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode=mode), Normalize()]


def wrap_backbone(backbone: nn.Module, tokenizer: PreTrainedTokenizerBase, base: str) -> Transformer:
    """A genuine Transformer module around a backbone that is in memory already; `base` gives its config only.

    Raises:
        ModelError: the backbone has a decoder beside its encoder.
    """
    bare = unwrapped(backbone)
    if "decoder_input_ids" in inspect.signature(bare.forward).parameters:
        raise ModelError(
            f"{type(bare).__name__} has a decoder, and only an encoder embeds; load it with auto_model=None or "
            "auto_model=transformers.AutoModelForTextEncoding."
        )
    source = getattr(bare, "load_source", None)
    hub = source.hub if source is not None and source.name == base else {}
    # The skeleton on the meta device costs no memory; its weights are never read.
    with torch.random.fork_rng(devices=[]):
        transformer = Transformer(
            base,
            model_kwargs={**hub, "device_map": "meta"},
            processor_kwargs=dict(hub),
            config_kwargs=dict(hub),
            **_TEXT_ONLY,
        )
    transformer.model = backbone
    transformer.processor = tokenizer
    return transformer


def load_backbone(
    source: Source, settings: Settings, auto_model: Any = None, add_pooling_layer: bool | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A bare encoder of the class `auto_model` and its tokenizer; `add_pooling_layer` is dropped where unknown.

    Raises:
        ArgumentError: `auto_model` is no class with `from_pretrained`.
        ModelError: nothing loadable is found.
    """
    if auto_model is not None and not hasattr(auto_model, "from_pretrained"):
        raise ArgumentError(
            f"auto_model={auto_model!r}: give a transformers model class such as BertModel or AutoModel."
        )
    with explained(source), without_pooler_reports():
        kwargs = {**source.hub, **settings.backbone_kwargs}
        config = AutoConfig.from_pretrained(source.name, **source.hub)
        if auto_model is None:
            # Of an encoder-decoder (T5) the encoder alone; for all others the two are the same.
            encodes_text = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
            auto_model = AutoModelForTextEncoding if encodes_text else AutoModel
        if add_pooling_layer is not None and _takes(auto_model, config, "add_pooling_layer"):
            kwargs["add_pooling_layer"] = add_pooling_layer
        backbone = auto_model.from_pretrained(source.name, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(source.name, **{**source.hub, **settings.processor_kwargs})
    _refuse_joined_matrices(config, settings)
    if settings.quantization is None:
        backbone.to(settings.device)
    if hasattr(backbone.config, "use_cache"):
        backbone.config.use_cache = False
    remember_checkpoint(backbone, source)
    return backbone, tokenizer


def _refuse_joined_matrices(config: PretrainedConfig, settings: Settings) -> None:
    # transformers then puts the whole matrix into one of the three layers and random numbers into the others.
    family = family_of(config)
    if isinstance(settings.quantization, TorchAoConfig) and family is not None and family.joined_matrices:
        raise ArgumentError(
            f"load_in_8bit: transformers cannot take apart the joined matrices of a {config.model_type} checkpoint "
            "while it quantises them. Use load_in_4bit, or neither."
        )


def _takes(auto_model: Any, config: PretrainedConfig, argument: str) -> bool:
    mapping = getattr(auto_model, "_model_mapping", None)
    cls = mapping[type(config)] if mapping is not None and type(config) in mapping else auto_model
    return inspect.isclass(cls) and argument in inspect.signature(cls.__init__).parameters


def remember_checkpoint(backbone: nn.Module, source: Source) -> None:
    """Note on the instance what the checkpoint was, before anything is changed: saves and merges return to it."""
    backbone.checkpoint_dtype = stored_dtype(source)
    backbone.load_source = source
    backbone.checkpoint_vocabulary = backbone.get_input_embeddings().weight.shape[0]


def saved_tokenizer(
    folder: Path, backbone: PreTrainedModel, processor_kwargs: Mapping[str, Any], trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved beside an adapter, with the backbone's embeddings grown to the tokens it added; or None."""
    if not (folder / "tokenizer_config.json").exists():
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, **{"trust_remote_code": trust_remote_code, **processor_kwargs})
    if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
        # The rows are read from the adapter file next; averaging the old ones to fill them would be wasted.
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return tokenizer


def replace_saved_modules(
    model: SentenceTransformer, folder: Path, processor_kwargs: Mapping[str, Any], trust_remote_code: bool
) -> None:
    """Give `model`, loaded from an adapter's base, the tokenizer and the heads that were saved beside the adapter."""
    for transformer in transformer_modules(model):
        saved = saved_tokenizer(folder, transformer.model, processor_kwargs, trust_remote_code)
        transformer.processor = saved or transformer.processor
    if not (folder / "modules.json").exists():
        return
    entries = read_json(folder / "modules.json")
    for entry in entries[1:]:
        module_class = import_from_string(entry["type"])
        model.add_module(entry["name"], module_class.load(str(folder), subfolder=entry["path"]).to(model.device))
    for name in [name for name, _ in model.named_children()][len(entries) :]:
        delattr(model, name)
    settings = read_json(folder / "config_sentence_transformers.json")
    model.prompts.update(settings.get("prompts") or {})
    model.default_prompt_name = settings.get("default_prompt_name")
    if settings.get("similarity_fn_name"):
        model.similarity_fn_name = settings["similarity_fn_name"]
    keep_heads_in_float32(model)
