"""What a model's folder says of itself: read from its configs and the heads of its weight files, without PyTorch."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from embtune.adapt.folders import WRAPPER_TRACES, contradictions, graph_files, module_folders
from embtune.cli.graph_head import read_graph
from embtune.errors import ArgumentError
from embtune.files import read_json
from embtune.models.families import FAMILIES, packing_obstacle, position_limit

_TOKENIZERS = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model"),
)
_OLD_POOLING_KEYS = "pooling_mode_"


@dataclass
class ModelFolder:
    """Facts and problems of one folder, as they are found."""

    folder: Path
    """The folder."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What it says, ready for JSON."""
    problems: list[str] = field(default_factory=list)
    """What is wrong with it, each with what to do."""

    def read(self) -> str:
        """Look at everything, and return what kind of folder it is."""
        try:
            return self._read()
        except (TypeError, ValueError, AttributeError, LookupError) as error:  # a config of values nobody writes there
            self.problems.append(f"A config is not as its library writes it ({error!r}). Save the model again.")
            return "damaged model"

    def _read(self) -> str:
        modules = self._modules()
        backbone = next((path for path, name in modules if name == "Transformer"), self.folder)
        adapter = self._json(backbone / "adapter_config.json")
        config = self._json(backbone / "config.json")
        if adapter:
            config = self._base(adapter) or config
        elif config:
            base = _card_base(self.folder) or config.get("_name_or_path") or ""
            self.facts["base_model"] = base if isinstance(base, str) else ", ".join(base)
        if config:
            self._architecture(config)
        self._heads(backbone, modules, config)
        if adapter:
            self._adapter(backbone, adapter)
        graphs = self._graphs()
        self._whole_weights(backbone, expected=bool(config) and not adapter and not graphs)
        if not graphs or "weights" in self.facts:
            self._engine(backbone, modules, config)
        if not any((backbone / name).exists() for name in _TOKENIZERS) and not (adapter and not modules):
            self.problems.append(
                f"{backbone} holds no tokenizer ({', '.join(_TOKENIZERS[:3])} …). Copy the base model's files there."
            )
        self._find_contradictions()
        self._checkpoint()
        whole = "sentence-transformers model" if modules else "transformers checkpoint"
        if graphs and "weights" not in self.facts:
            whole += " as " + " and ".join(sorted({"OpenVINO" if file.suffix == ".xml" else "ONNX" for file in graphs}))
        return "adapter" + (" of a sentence-transformers model" if modules else "") if adapter else whole

    def _json(self, path: Path) -> dict[str, Any]:
        """A JSON file; nothing where it is not there, and a problem where it cannot be read."""
        try:
            found = read_json(path) if path.exists() else {}
        except (OSError, ValueError) as error:
            found = None
            self.problems.append(f"{path} cannot be read: {error}. Save the model again.")
        return found if isinstance(found, dict) else {}

    def _modules(self) -> list[tuple[Path, str]]:
        try:
            found = list(module_folders(self.folder))
        except ArgumentError:
            self.problems.append(f"{self.folder / 'modules.json'} is not as sentence-transformers writes it.")
            return []
        for path, name in found:
            if not path.is_dir() and name in ("Transformer", "Pooling", "Dense", "Router"):
                self.problems.append(
                    f"modules.json names a {name} in {path}, which is not there. Save the model again."
                )
        if found:
            self.facts["modules"] = [name for _, name in found]
        return found

    def _base(self, adapter: Mapping[str, Any]) -> dict[str, Any]:
        """The config of the model that an adapter goes on, where it is on this machine."""
        base = str(adapter.get("base_model_name_or_path") or "")
        self.facts["base_model"] = base
        if not base:
            self.problems.append("adapter_config.json names no base model; add base_model_name_or_path to it.")
            return {}
        if Path(base).is_dir():
            return self._json(Path(base) / "config.json")
        if Path(base).is_absolute() or base.startswith("."):
            self.problems.append(
                f"The base model {base} is not there. Change base_model_name_or_path, or move it back."
            )
            return {}
        cached = try_to_load_from_cache(base, "config.json") if base.count("/") <= 1 else None
        return self._json(Path(cached)) if isinstance(cached, str) else {}

    def _architecture(self, config: Mapping[str, Any]) -> None:
        self.facts["architecture"] = config.get("model_type", "unknown")
        self.facts["layers"] = _first(config, "num_hidden_layers", "n_layers", "num_layers")
        self.facts["hidden_size"] = _first(config, "hidden_size", "dim", "d_model")
        if config.get("quantization_config"):
            self.facts["quantization"] = config["quantization_config"].get("quant_method", "unknown")

    def _heads(self, backbone: Path, modules: Iterable[tuple[Path, str]], config: Mapping[str, Any]) -> None:
        """Pooling, dimensions, longest text, similarity and prompts."""
        width = self.facts.get("hidden_size")
        for path, name in modules:
            settings = self._json(path / "config.json") if name in ("Pooling", "Dense") else {}
            if name == "Pooling":
                modes = _pooling_modes(settings)
                read = _first(settings, "embedding_dimension", "word_embedding_dimension")
                self.facts["pooling"] = modes
                if width is not None and read is not None and read != width:
                    self.problems.append(f"{path} pools {read} numbers a token, but the encoder gives {width}.")
                width = read * len(modes) if read else width
            elif name == "Dense":
                width = settings.get("out_features", width)
        self.facts["dimensions"] = width
        asked = self._json(backbone / "sentence_bert_config.json").get("max_seq_length")
        asked = asked or self._json(backbone / "tokenizer_config.json").get("model_max_length")
        limit = position_limit(_as_config(config)) if config else None
        lengths = [length for length in (asked, limit) if isinstance(length, int) and length < 10**9]
        self.facts["max_seq_length"] = min(lengths, default=None)
        if isinstance(asked, int) and limit is not None and limit < asked < 10**9:
            self.problems.append(
                f"max_seq_length is {asked}, but the encoder has {limit} positions. Lower it to {limit}."
            )
        saved = self._json(self.folder / "config_sentence_transformers.json")
        self.facts["similarity"] = saved.get("similarity_fn_name") or "cosine"
        self.facts["prompts"] = {name: text for name, text in (saved.get("prompts") or {}).items() if text}

    def _adapter(self, backbone: Path, adapter: Mapping[str, Any]) -> None:
        targets = adapter.get("target_modules") or []
        rank = adapter.get("r")
        stored = self._weights([backbone / "adapter_model.safetensors"])
        self.facts["adapter"] = {
            "type": "DoRA"
            if adapter.get("use_dora")
            else str(adapter.get("peft_type", "unknown")).replace("LORA", "LoRA"),
            "rank": rank,
            "alpha": adapter.get("lora_alpha"),
            "targets": targets if isinstance(targets, str) else sorted(targets),
            **stored.described(),
        }
        ranks = {shape[0] for name, shape in stored.shapes.items() if name.endswith("lora_A.weight")}
        if rank is not None and ranks and ranks != {rank} and not adapter.get("rank_pattern"):
            self.problems.append(f"adapter_config.json says rank {rank}, but the weights have rank {sorted(ranks)}.")

    def _whole_weights(self, backbone: Path, expected: bool) -> None:
        files = self._weight_files(backbone)
        if not files:
            pickled = [path.name for path in backbone.glob("pytorch_model*.bin")]
            if pickled:
                self.facts["weights"] = {"files": sorted(pickled), "format": "pickle, which is not looked into"}
            elif expected:
                self.problems.append(f"{backbone} holds no weights (model.safetensors). Save the model again.")
            return
        stored = self._weights(files)
        self.facts["weights"] = stored.described()
        traces = [name for name in stored.shapes if any(trace in f".{name}" for trace in WRAPPER_TRACES)]
        if traces:
            self.problems.append(
                f"{backbone} holds tensors of a wrapper, as {traces[0]}: readers do not find them, and take random "
                "weights instead. Save with save_pretrained_merged."
            )

    def _graphs(self) -> list[Path]:
        found = graph_files(self.folder)
        stored = {}
        for path in found:
            try:
                stored[path.relative_to(self.folder).as_posix()] = read_graph(path)
            except (OSError, ValueError) as error:
                self.problems.append(f"{path} cannot be used: {error}. Export or download it again.")
        if stored:
            self.facts["graphs"] = stored
        return found

    def _weight_files(self, backbone: Path) -> list[Path]:
        index = self._json(backbone / "model.safetensors.index.json")
        if not index:
            return [path for path in [backbone / "model.safetensors"] if path.exists()]
        return [backbone / name for name in sorted(set(index.get("weight_map", {}).values()))]

    def _weights(self, files: Iterable[Path]) -> "_Stored":
        stored = _Stored()
        for path in files:
            try:
                stored.add(path)
            except (OSError, SafetensorError) as error:
                self.problems.append(f"{path} cannot be read: {error}. Save or download the model again.")
        return stored

    def _engine(self, backbone: Path, modules: list[tuple[Path, str]], config: Mapping[str, Any]) -> None:
        """Which engine `auto` would choose; a condition of the loaded model that files do not tell may change it."""
        if not config:
            return
        kinds = self._json(backbone / "sentence_bert_config.json").get("modality_config") or {"text": {}}
        obstacle = packing_obstacle(_as_config(config))
        if [name for _, name in modules].count("Transformer") > 1 or (modules and modules[0][1] != "Transformer"):
            obstacle = "it does not begin with a single Transformer module"
        elif set(kinds) != {"text"}:
            obstacle = "it takes more than plain text"
        self.facts["engine"] = "packed" if obstacle is None else "reference"
        if obstacle is not None:
            self.facts["engine_reason"] = f"padded batches, because {obstacle}"
        elif FAMILIES[config["model_type"]].packing == "swap":
            self.facts["engine_reason"] = 'on a CPU; padded on a GPU, where that is faster, unless engine="packed"'

    def _find_contradictions(self) -> None:
        try:
            shared = contradictions(self.folder)
        except ArgumentError:
            return  # said already
        for adapter, whole in shared:
            self.problems.append(
                f"{', '.join(adapter)} and {', '.join(whole)} share a folder and contradict each other: whoever "
                "loads it gets one or the other, or both added up. Move one of them into a folder of its own."
            )

    def _checkpoint(self) -> None:
        step = self.folder.name.removeprefix("checkpoint-")
        if step.isdecimal() and step != self.folder.name:
            self.facts["step"] = int(step)
            if not self._json(self.folder / "trainer_state.json"):
                self.problems.append("This checkpoint was cut off while it was written; --resume passes it over.")


@dataclass
class _Stored:
    """What weight files hold."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Tensor name -> shape."""
    numbers: Counter[str] = field(default_factory=Counter)
    """Dtype -> how many numbers."""
    bytes: int = 0
    """Size of the files."""

    def add(self, path: Path) -> None:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                tensor = file.get_slice(name)
                self.shapes[name] = tuple(tensor.get_shape())
                self.numbers[tensor.get_dtype()] += _product(self.shapes[name])
        self.bytes += path.stat().st_size

    def described(self) -> dict[str, Any]:
        return {"numbers": self.numbers.total(), "dtypes": dict(self.numbers.most_common()), "bytes": self.bytes}


def _product(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _pooling_modes(settings: Mapping[str, Any]) -> list[str]:
    modes = settings.get("pooling_mode")
    if modes:
        return [modes] if isinstance(modes, str) else list(modes)
    old = (
        key.removeprefix(_OLD_POOLING_KEYS) for key, on in settings.items() if on is True and _OLD_POOLING_KEYS in key
    )
    return [mode.removesuffix("_tokens").removesuffix("_token") if "sqrt" not in mode else mode for mode in old]


def _as_config(config: Mapping[str, Any]) -> Any:
    """A config.json of any age with the attributes that transformers 5 gives the table's rules."""
    ropes = config.get("rope_parameters") or config.get("rope_scaling") or {}
    named = {**ropes, "rope_type": ropes.get("rope_type") or ropes["type"]} if "type" in ropes else ropes
    return SimpleNamespace(**{"model_type": "", "pad_token_id": 1, **config, "rope_parameters": named})


def _card_base(folder: Path) -> str | list[str] | None:
    """`base_model` of the model card's metadata."""
    try:
        begin, _, rest = (folder / "README.md").read_text(encoding="utf-8").partition("---\n")
        metadata = yaml.safe_load(rest.partition("\n---")[0]) if not begin.strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return metadata.get("base_model") if isinstance(metadata, dict) else None
