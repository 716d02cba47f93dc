"""Which weights a folder holds: an adapter and a whole model never share one, and a new save replaces its own kind."""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from embtune.errors import ArgumentError
from embtune.files import read_json

WRAPPER_TRACES = ("base_model.", ".base_layer.", ".lora_", "_orig_mod.", ".modules_to_save.", ".original_module.")
"""Parts of a whole model's tensor names that a wrapper has left: a reader would find no such tensor, and take random
weights instead."""

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_WHOLE = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
# What transformers and PEFT look for, in any of their formats and variants.
_ANY_WEIGHTS = (
    *("adapter_config.json", "adapter_model*", "model*.safetensors*", "pytorch_model*.bin*"),
    *("tf_model*.h5", "flax_model*.msgpack"),
)
# Where sentence-transformers, Optimum and text-embeddings-inference look for a graph with weights of its own.
_GRAPHS = ("*.onnx", "onnx/*.onnx", "openvino*.xml", "openvino/*.xml")


def refuse_contradictions(folder: str | Path, *, adapter: bool, whole: bool, graph: str | None = None) -> None:
    """Refuse a target whose weight files would stay beside those to be saved.

    Looked at are the folder itself and, in a sentence-transformers folder, those of its Transformer modules. Files that
    this library writes itself may be there if they are of the same kind: the new ones replace them.

    Args:
        folder: where to save; it need not exist.
        adapter: whether adapter files are to be saved.
        whole: whether whole weights are to be saved; with a Router it may be both.
        graph: name of the folder within `folder` that a graph is to be saved in, or None.

    Raises:
        ArgumentError: the folder holds weights of the other kind, or under names of other libraries.
    """
    folder = Path(folder)
    replaced = (*(_ADAPTER if adapter else ()), *(_WHOLE if whole else ()))
    stale = sorted(
        path.relative_to(folder).as_posix()
        for backbone in _backbone_folders(folder)
        for path in _entries(backbone)
        if _matches(path, _ANY_WEIGHTS) and not _matches(path, replaced)
    )
    stale += [path.relative_to(folder).as_posix() for path in graph_files(folder) if path.parent != folder / str(graph)]
    if stale:
        raise ArgumentError(
            f"{folder} already holds {', '.join(stale)}, which would contradict the model to be saved: whoever loads "
            "the folder would get one or the other. Save into another folder, or remove these files first."
        )


def graph_files(folder: Path) -> list[Path]:
    """The ONNX and OpenVINO graphs of a model's folder, where readers look for them."""
    return sorted(path for pattern in _GRAPHS for path in folder.glob(pattern))


def contradictions(folder: Path) -> list[tuple[list[str], list[str]]]:
    """Adapter files and whole weights that share a folder, for each folder of a Transformer module where they do.

    Raises:
        ArgumentError: modules.json cannot be read.
    """
    found = []
    for backbone in sorted(_backbone_folders(folder)):
        names = [path.name for path in sorted(_entries(backbone)) if _matches(path, _ANY_WEIGHTS)]
        adapter = [name for name in names if name.startswith("adapter_")]
        whole = [name for name in names if name not in adapter]
        if adapter and whole:
            found.append((adapter, whole))
    return found


def refuse_modules(folder: str | Path) -> None:
    """Refuse to save a plain encoder over a sentence-transformers model, whose other modules would stay.

    Raises:
        ArgumentError: the folder holds one.
    """
    if (Path(folder) / "modules.json").exists():
        raise ArgumentError(
            f"{folder} already holds a sentence-transformers model (modules.json), whose other modules would "
            "contradict a plain encoder. Save into another folder, or save the SentenceTransformer itself."
        )


def earlier_weights(folder: Path) -> set[str]:
    """Names of the weight files, shards included, that an earlier save of this library left in `folder`."""
    return {path.name for path in _entries(folder) if _matches(path, (*_ADAPTER, *_WHOLE))}


def earlier_model(folder: Path) -> set[str]:
    """Names in `folder` that belong to an earlier sentence-transformers model: its weights and its modules' folders."""
    modules = {path.relative_to(folder).parts[0] for path, _ in module_folders(folder) if path != folder}
    return earlier_weights(folder) | modules


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _backbone_folders(folder: Path) -> set[Path]:
    return {folder} | {path for path, class_name in module_folders(folder) if class_name == "Transformer"}


def module_folders(folder: Path) -> Iterator[tuple[Path, str]]:
    """Folder and class name of each module of a sentence-transformers folder, those in a Router included."""
    listed = folder / "modules.json"
    try:
        for entry in read_json(listed) if listed.exists() else []:
            module = folder / entry["path"]
            class_name = entry["type"].rpartition(".")[2]
            module.relative_to(folder)  # a ValueError for a path that leads elsewhere
            yield module, class_name
            if class_name == "Router":
                for name, type_name in read_json(module / "router_config.json")["types"].items():
                    yield module / name, type_name.rpartition(".")[2]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArgumentError(
            f"{folder} holds a modules.json that sentence-transformers did not write ({error!r}). "
            "Save into another folder."
        ) from error
