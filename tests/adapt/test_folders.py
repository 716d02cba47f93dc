"""Which folders a save refuses, and what of an earlier save it replaces."""

from pathlib import Path

import pytest

from embtune.adapt.folders import earlier_model, earlier_weights, refuse_contradictions, refuse_modules
from embtune.errors import ArgumentError
from embtune.files import write_json

ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
WHOLE = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
OF_OTHERS = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
OF_OTHERS += ["adapter_model.bin", "model.fp16.safetensors", "tf_model.h5", "flax_model.msgpack"]


def _model(folder: Path, router: bool = False) -> Path:
    """A sentence-transformers folder whose one Transformer is in a folder of its own; that folder is returned."""
    kind = "Router" if router else "Transformer"
    path = "" if router else "0_Transformer"
    entries = [
        {"idx": 0, "name": "0", "path": path, "type": f"sentence_transformers.models.{kind}"},
        {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    write_json(folder / "modules.json", entries)
    if router:
        types = {"query_0_Transformer": "sentence_transformers.models.Transformer", "query_1_Dense": "x.Dense"}
        write_json(folder / "router_config.json", {"types": types})
        path = "query_0_Transformer"
    for name in (path, "1_Dense", "checkpoint-5"):
        (folder / name).mkdir()
        (folder / name / "config.json").touch()
    # A head's weights, and those of another model beside, contradict nothing.
    (folder / "1_Dense" / "model.safetensors").touch()
    (folder / "checkpoint-5" / "adapter_model.safetensors").touch()
    (folder / "checkpoint-5" / "loss.safetensors").touch()
    return folder / path


@pytest.mark.parametrize("place", ["plain", "transformer", "router"])
@pytest.mark.parametrize("name", [*ADAPTER, *WHOLE, *OF_OTHERS])
def test_weights_of_the_other_kind_are_refused_by_name(tmp_path: Path, name: str, place: str) -> None:
    refuse_contradictions(tmp_path / "missing", adapter=True, whole=False)
    folder = tmp_path if place == "plain" else _model(tmp_path, router=place == "router")
    for adapter, whole in ((True, False), (False, True)):
        refuse_contradictions(tmp_path, adapter=adapter, whole=whole)
    (folder / name).touch()
    found = (folder / name).relative_to(tmp_path).as_posix()
    for adapter, whole, own in ((True, False, ADAPTER), (False, True, WHOLE), (True, True, [*ADAPTER, *WHOLE])):
        if name in own:
            refuse_contradictions(tmp_path, adapter=adapter, whole=whole)
        else:
            with pytest.raises(ArgumentError, match=f"already holds {found}, .*Save into another folder"):
                refuse_contradictions(tmp_path, adapter=adapter, whole=whole)


def test_an_earlier_save_is_known_by_its_names(tmp_path: Path) -> None:
    for name in (*ADAPTER, *WHOLE, "README.md", "model_of_mine.txt", "loss.safetensors"):
        (tmp_path / name).touch()
    assert earlier_weights(tmp_path) == {*ADAPTER, *WHOLE} == earlier_model(tmp_path)
    refuse_modules(tmp_path)
    _model(tmp_path, router=True)
    assert earlier_model(tmp_path) == {*ADAPTER, *WHOLE, "1_Dense", "query_0_Transformer", "query_1_Dense"}
    with pytest.raises(ArgumentError, match="already holds a sentence-transformers model"):
        refuse_modules(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"a": 1}', '[{"path": "", "type": "x.Router"}]', '[{"path": "/", "type": ""}]']
)
def test_a_folder_with_strange_modules_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ArgumentError, match="a modules.json that sentence-transformers did not write"):
        refuse_contradictions(tmp_path, adapter=False, whole=True)
