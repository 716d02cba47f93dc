"""Where a model comes from: a folder, or a repository of the Hub; and what to say where there is none."""

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from sentence_transformers.util import load_file_path
from transformers import AutoConfig

from embtune.errors import ArgumentError, EmbtuneError, ModelError
from embtune.files import read_json

_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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


def adapter_base(source: Source) -> str | None:
    """The base that an adapter folder names, or None if the checkpoint is no adapter.

    Raises:
        ModelError: the adapter names no base model.
    """
    with explained(source):
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
    with explained(source):
        if source.find("modules.json") is None:
            AutoConfig.from_pretrained(source.name, **source.hub)


def local_folder(source: Source) -> Path:
    """The checkpoint as a local folder, downloaded from the Hub where it is not one."""
    if Path(source.name).is_dir():
        return Path(source.name)
    with explained(source):
        folder = snapshot_download(
            source.name,
            revision=source.revision,
            token=source.token,
            cache_dir=source.cache_dir,
            local_files_only=source.local_files_only,
        )
    return Path(folder)


def stored_dtype(source: Source) -> torch.dtype:
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


@contextmanager
def explained(source: Source) -> Iterator[None]:
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
            f"The model {source.described} could not be loaded from this folder: {reason.rstrip('.')}. "
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
    return f"The model {source.described} could not be loaded from this Hub repository: {reason.rstrip('.')}. {remedy}"


def _near(path: Path) -> str:
    """A question about folders beside a path that hold models and are called similarly; empty where none is."""
    if not path.parent.is_dir():
        return ""
    models = [folder.name for folder in path.parent.iterdir() if folder.is_dir() and _holds_model(folder)]
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, models)]
    return f"Did you mean {' or '.join(near)}? " if near else ""


def _holds_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "modules.json", "adapter_config.json"))


def _only_exported(folder: Path) -> str | None:
    """What an export for other runtimes left in a folder that has no weights to load, or None."""
    found = sorted([*folder.glob("onnx/*.onnx"), *folder.glob("openvino/*.xml"), *folder.glob("*.gguf")])
    if not found or any(folder.rglob("*.safetensors")) or any(folder.rglob("pytorch_model*.bin")):
        return None
    return found[0].relative_to(folder).as_posix()
