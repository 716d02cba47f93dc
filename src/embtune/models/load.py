"""Loading: sentence-transformers folders module by module, bare checkpoints, and adapter folders onto their base."""

import difflib
import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sentence_transformers.util import import_from_string, load_file_path
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

from embtune.errors import ArgumentError, EmbtuneError, ModelError
from embtune.files import read_json
from embtune.models.families import family_of, unwrapped
from embtune.models.heads import keep_heads_in_float32
from embtune.models.load_reports import without_pooler_reports
from embtune.models.modules import pooling_modules, transformer_modules

_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

POOLING_MODES = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")

# A text model's forward, said outright: left to itself, sentence-transformers may infer a chat template from the
# tokenizer and then feeds every text through it, which changes the embeddings.
_TEXT_ONLY: dict[str, Any] = {
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}


def _holds_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "modules.json", "adapter_config.json"))


def _only_exported(folder: Path) -> str | None:
    """What an export for other runtimes left in a folder that has no weights to load, or None."""
    found = sorted([*folder.glob("onnx/*.onnx"), *folder.glob("openvino/*.xml"), *folder.glob("*.gguf")])
    if not found or any(folder.rglob("*.safetensors")) or any(folder.rglob("pytorch_model*.bin")):
        return None
    return found[0].relative_to(folder).as_posix()


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a checkpoint comes from; the names are those of `from_pretrained`."""

    name: str
    """Folder, or `owner/name` on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    token: str | bool | None = None
    """Access token of the Hub."""
    cache_dir: str | None = None
    """Folder for downloads; None is the Hub client's own."""
    local_files_only: bool = False
    """Never reach for the network."""
    trust_remote_code: bool = False
    """Run model code that the repository brings."""
    adapter: str | None = None
    """The adapter that names this checkpoint as its base, for messages."""

    def __post_init__(self) -> None:
        if not self.name or not str(self.name).strip():
            raise ArgumentError("model_name is empty; give a folder or a Hub name such as owner/model.")
        path = Path(self.name)
        if path.is_file():
            raise ModelError(f"{self.name} is a file; give the folder that holds the model.")
        looks_local = os.sep in self.name and (
            path.is_absolute() or self.name.startswith(".") or self.name.count("/") > 1
        )
        if looks_local and not path.is_dir():
            raise ModelError(
                f"{self.described}: there is no such folder. {_near(path)}"
                f"{self.about_base or 'Check the path, or give a Hub name (owner/model).'}"
            )
        if path.is_dir() and not _holds_model(path):
            inside = sorted(str(folder) for folder in path.iterdir() if folder.is_dir() and _holds_model(folder))
            if inside:
                raise ModelError(f"{self.name} is no model itself, but holds {', '.join(inside)}; name that folder.")
        if path.is_dir() and (exported := _only_exported(path)):
            raise ModelError(
                f"{self.name} holds {exported} and no weights to load, as an export for other runtimes leaves it. "
                "Load the model that it was exported from."
            )

    @property
    def described(self) -> str:
        """How messages begin."""
        return self.name if self.adapter is None else f"{self.name}, which the adapter {self.adapter} names as its base"

    @property
    def about_base(self) -> str | None:
        """What to do about the base of an adapter that is not there."""
        if self.adapter is None:
            return None
        return (
            "Put the base there, or write where it is as base_model_name_or_path into "
            f"{Path(self.adapter, 'adapter_config.json')}."
        )

    def renamed(self, name: str) -> "Source":
        """The base that an adapter names: of its own repository, where the adapter's revision means nothing."""
        return replace(self, name=name, revision=None, adapter=self.name)

    @property
    def hub(self) -> dict[str, Any]:
        """The keywords that transformers' loaders share."""
        return {
            "revision": self.revision,
            "token": self.token,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
            "trust_remote_code": self.trust_remote_code,
        }

    def find(self, filename: str) -> str | None:
        """The local path of one file of the checkpoint, or None if it has none of that name."""
        return load_file_path(
            self.name,
            filename,
            token=self.token,
            cache_folder=self.cache_dir,
            revision=self.revision,
            local_files_only=self.local_files_only,
        )


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
    with _explained(source), without_pooler_reports():
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
    with _explained(source), without_pooler_reports():
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
    backbone.checkpoint_dtype = _stored_dtype(source)
    backbone.load_source = source
    backbone.checkpoint_vocabulary = backbone.get_input_embeddings().weight.shape[0]


def _stored_dtype(source: Source) -> torch.dtype:
    """The dtype of the checkpoint's own weights; the loaded config names the one they were loaded in."""
    path = source.find("config.json")
    written = read_json(path) if path else {}
    name = written.get("dtype") or written.get("torch_dtype")
    if isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    weights = source.find("model.safetensors")
    if weights is None:
        return torch.float32
    with safe_open(weights, framework="pt") as file:
        dtypes = {_SAFETENSORS_DTYPES.get(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
    halves = dtypes & {torch.float16, torch.bfloat16}
    return torch.float32 if torch.float32 in dtypes or not halves else halves.pop()


def adapter_base(source: Source) -> str | None:
    """The base that an adapter folder names, or None if the checkpoint is no adapter.

    Raises:
        ModelError: the adapter names no base model.
    """
    with _explained(source):
        path = source.find("adapter_config.json")
    if path is None:
        return None
    base = read_json(path).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{path} names no base model; add base_model_name_or_path to it.")
    return base


def check_there(source: Source) -> None:
    """Raise unless there is a model to load, and for an adapter its base; of the Hub, small files are read at most.

    Raises:
        ModelError: there is none; the message says what to do.
    """
    base = adapter_base(source)
    if base is not None:
        check_there(source.renamed(base))
        return
    with _explained(source):
        if source.find("modules.json") is None:
            AutoConfig.from_pretrained(source.name, **source.hub)


def local_folder(source: Source) -> Path:
    """The checkpoint as a local folder, downloaded from the Hub where it is not one."""
    if Path(source.name).is_dir():
        return Path(source.name)
    with _explained(source):
        folder = snapshot_download(
            source.name,
            revision=source.revision,
            token=source.token,
            cache_dir=source.cache_dir,
            local_files_only=source.local_files_only,
        )
    return Path(folder)


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


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Turn the loaders' many ways to say "not there" into one `ModelError` that names the checkpoint."""
    try:
        yield
    except EmbtuneError:
        raise
    except TypeError as error:
        _, found, argument = str(error).partition("unexpected keyword argument ")
        if not found:
            raise
        raise ArgumentError(f"model_kwargs[{argument}]: {source.name} takes no such argument.") from error
    except (OSError, ValueError, SafetensorError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(_about_failure(source, reason)) from error


def _about_failure(source: Source, reason: str) -> str:
    path = Path(source.name)
    if path.is_dir():
        return (
            f"The model {source.described} could not be loaded from this folder: {reason} "
            "Check the path; or make the folder anew, by the export or download that it came from."
        )
    remedy = source.about_base or (
        "Check the name, and for a private model the token; offline, give the path of a local folder."
    )
    if len(path.parts) == 1 or path.parent.is_dir():  # a folder is meant: Hub names have an owner, but for a few
        return (
            f"{source.described}: there is no such folder, and no model of that name could be loaded from the Hub "
            f"({reason.rstrip('.')}). {_near(path)}{remedy}"
        )
    return f"The model {source.described} could not be loaded from this Hub repository: {reason} {remedy}"


def _near(path: Path) -> str:
    """A question about folders beside a path that hold models and are called similarly; empty where none is."""
    if not path.parent.is_dir():
        return ""
    models = [folder.name for folder in path.parent.iterdir() if folder.is_dir() and _holds_model(folder)]
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, models)]
    return f"Did you mean {' or '.join(near)}? " if near else ""
