"""Both directions of the Hub, against a local stand-in of its HTTP interface: load by id, push merged and GGUF."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from tiny import TEXTS

from embtune import FastSentenceTransformer
from embtune.errors import ExportError, ModelError

READ, WRITE = "hf_read", "hf_write"

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def load(name: str | Path, **arguments: object) -> FastSentenceTransformer:
    return FastSentenceTransformer.from_pretrained(name, **{"dtype": "float32", "device": "cpu", **arguments})


def test_models_and_adapters_load_by_id(hub: HubServer, tmp_path: Path, tiny_dir: Callable[..., Path]) -> None:
    hub.add("ada/base", tiny_dir("bert"), private=True)
    cache = tmp_path / "cache"
    model = load("ada/base", token=READ, cache_dir=cache, revision="main")
    torch.testing.assert_close(model.encode(TEXTS), load(tiny_dir("bert")).encode(TEXTS))
    assert any(cache.iterdir())
    with pytest.raises(ModelError, match="ada/base could not be loaded"):
        load("ada/base", cache_dir=tmp_path / "other")
    offline = load("ada/base", cache_dir=cache, local_files_only=True, token=READ)
    torch.testing.assert_close(offline.encode(TEXTS), model.encode(TEXTS))


def test_an_adapter_by_id_is_continued(hub: HubServer, tmp_path: Path, tiny_dir: Callable[..., Path]) -> None:
    model = FastSentenceTransformer.get_peft_model(load(tiny_dir("bert")), r=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(str(tmp_path / "adapter"))
    hub.add("ada/adapter", tmp_path / "adapter")
    again = load("ada/adapter", cache_dir=tmp_path / "cache")
    torch.testing.assert_close(again.encode(TEXTS), model.encode(TEXTS))


def test_pushes_and_their_errors(hub: HubServer, tmp_path: Path, tiny_dir: Callable[..., Path]) -> None:
    model = FastSentenceTransformer.get_peft_model(load(tiny_dir("bert")), r=2)
    address = model.push_to_hub_merged("ada/merged", token=WRITE, private=True)
    assert address.endswith("ada/merged")
    assert {"model.safetensors", "modules.json", "README.md"} <= hub.files("ada/merged").keys()
    model.push_to_hub_gguf("ada/gguf", token=WRITE, quantization_method=["f16", "q8_0"])
    assert sum(name.endswith(".gguf") for name in hub.files("ada/gguf")) == 2
    hub.fail(403, "commit")
    with pytest.raises(ExportError, match="403"):
        model.push_to_hub_merged("ada/other", token=WRITE)
