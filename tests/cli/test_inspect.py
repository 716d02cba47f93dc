import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from gguf import GGUFReader
from onnx import TensorProto
from safetensors.numpy import load_file, save_file

from embtune import FastSentenceTransformer
from embtune.cli.main import main
from embtune.export import graph
from embtune.export.onnx import save_onnx
from embtune.export.openvino import save_openvino
from embtune.models.families import FAMILIES
from embtune.report.events import FORMAT, EventLog


@pytest.fixture(scope="module")
def saved(tiny_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `adapter`, `merged`, `gguf`, `onnx` and `openvino` of one small BERT."""
    folder = tmp_path_factory.mktemp("saved")
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", device="cpu", max_seq_length=64)
    model = FastSentenceTransformer.get_peft_model(model, r=4, lora_alpha=8)
    model.save_pretrained(str(folder / "adapter"))
    model.save_pretrained_merged(folder / "merged")
    model.save_pretrained_gguf(folder / "gguf")
    save_onnx(model, folder / "onnx", quantization="int8", verify=False)
    save_openvino(model, folder / "openvino", quantization="f16", verify=False)
    return folder


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], dict[str, Any]]:
    def inspect(path: Path) -> dict[str, Any]:
        capsys.readouterr()  # bars of whatever was saved or loaded before
        code = main(["inspect", str(path), "--json"])
        captured = capsys.readouterr()
        found = json.loads(captured.out)
        assert captured.err == ""
        assert code == (1 if found["problems"] else 0)
        return found

    return inspect


def test_an_adapter(saved: Path, tiny_dir: Callable[..., Path], look: Callable[[Path], dict[str, Any]]) -> None:
    found = look(saved / "adapter")
    model = FastSentenceTransformer.from_pretrained(saved / "adapter", device="cpu")
    assert found["kind"] == "adapter of a sentence-transformers model"
    assert found["base_model"] == str(tiny_dir("bert"))
    adapter = found["adapter"]
    assert (adapter["type"], adapter["rank"], adapter["alpha"]) == ("LoRA", 4, 8)
    assert adapter["targets"] == ["dense", "key", "query", "value"]
    assert adapter["numbers"] == sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name)
    assert (found["pooling"], found["dimensions"], found["max_seq_length"]) == (["mean"], 32, model.max_seq_length)
    assert found["problems"] == []


def test_a_merged_model_counts_what_pytorch_counts(saved: Path, look: Callable[[Path], dict[str, Any]]) -> None:
    found = look(saved / "merged")
    model = FastSentenceTransformer.from_pretrained(saved / "merged", dtype="float32", device="cpu")
    assert found["kind"] == "sentence-transformers model"
    assert found["modules"] == ["Transformer", "Pooling", "Normalize"]
    assert found["weights"]["dtypes"] == {"F32": sum(weight.numel() for weight in model.parameters())}
    assert (found["layers"], found["hidden_size"], found["similarity"]) == (2, 32, "cosine")
    assert "adapter" not in found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_engine_is_the_one_that_loading_chooses(
    family: str, tiny_dir: Callable[..., Path], look: Callable[[Path], dict[str, Any]]
) -> None:
    try:
        folder = tiny_dir(family)
    except KeyError:
        pytest.skip(f"this transformers has no {family}")
    found = look(folder)
    model = FastSentenceTransformer.from_pretrained(folder, device="cpu")
    assert found["engine"] == model.engine.name
    assert found["max_seq_length"] == model.max_seq_length
    assert found["dimensions"] == model.get_embedding_dimension()
    assert found["pooling"] == [model[1].pooling_mode]


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},  # as transformers 4 writes it
        {"model_type": "unheard_of"},
        {"model_type": "deberta-v2", "conv_kernel_size": 3},
    ],
)
def test_the_reason_for_padded_batches(
    changes: dict[str, Any], tiny_dir: Callable[..., Path], tmp_path: Path, look: Callable[[Path], dict[str, Any]]
) -> None:
    folder = shutil.copytree(tiny_dir("llama"), tmp_path / "model")
    change_json(folder / "config.json", rope_parameters=None, **changes) if "rope_scaling" in changes else change_json(
        folder / "config.json", **changes
    )
    found = look(folder)
    assert found["engine"] == "reference"
    assert found["engine_reason"].startswith("padded batches, because ")


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_gguf_file_and_its_folder(saved: Path, look: Callable[[Path], dict[str, Any]]) -> None:
    [file] = (saved / "gguf").iterdir()
    found = look(saved / "gguf")
    assert found == look(file)
    assert (found["kind"], found["architecture"], found["pooling"]) == ("GGUF file", "bert", "mean")
    assert (found["layers"], found["dimensions"], found["max_seq_length"]) == (2, 32, 64)
    stored: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        stored[tensor.tensor_type.name] += int(tensor.n_elements)
    assert found["weights"]["dtypes"] == stored
    assert "Q8_0" in stored


def test_graphs(saved: Path, look: Callable[[Path], dict[str, Any]]) -> None:
    found = look(saved / "onnx")
    assert found["kind"] == "sentence-transformers model as ONNX"
    assert (found["pooling"], found["dimensions"], found["max_seq_length"]) == (["mean"], 32, 64)
    assert "engine" not in found
    [(name, stored)] = found["graphs"].items()
    assert name == "onnx/model.onnx"
    counted: Counter[str] = Counter()
    for tensor in onnx.load(saved / "onnx" / name).graph.initializer:
        counted[TensorProto.DataType.Name(tensor.data_type)] += int(np.prod(tensor.dims))
    assert stored["dtypes"]["I8"] == counted["INT8"] > 10_000
    assert stored["dtypes"]["F32"] == counted["FLOAT"]
    assert stored["numbers"] == counted.total()
    assert stored["bytes"] == (saved / "onnx" / name).stat().st_size

    found = look(saved / "openvino")
    assert found["kind"] == "sentence-transformers model as OpenVINO"
    [stored] = found["graphs"].values()
    model = FastSentenceTransformer.from_pretrained(saved / "merged", dtype="float32", device="cpu")
    # All but the biases of a few products, which OpenVINO keeps in float32, and the pooler, which is no part of it.
    assert stored["dtypes"]["F16"] == pytest.approx(sum(weight.numel() for weight in model.parameters()), rel=0.05)


def test_a_graph_beside_whole_weights_is_listed(
    saved: Path, tmp_path: Path, look: Callable[[Path], dict[str, Any]]
) -> None:
    folder = shutil.copytree(saved / "merged", tmp_path / "merged")
    shutil.copytree(saved / "onnx" / "onnx", folder / "onnx")
    found = look(folder)
    assert found["kind"] == "sentence-transformers model"
    assert list(found["graphs"]) == ["onnx/model.onnx"]
    assert found["engine"] == "packed"


def test_a_graph_without_the_file_of_its_weights(
    tiny_dir: Callable[..., Path],
    tmp_path: Path,
    look: Callable[[Path], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graph, "_LARGEST_FILE", 0)
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", device="cpu")
    folder = save_onnx(model, tmp_path / "onnx", verify=False)
    weights = folder / "onnx" / "model.onnx_data"
    [stored] = look(folder)["graphs"].values()
    assert stored["bytes"] > weights.stat().st_size > 100_000
    weights.unlink()
    [problem] = look(folder)["problems"]
    assert "model.onnx_data, which holds weights, is not beside it" in problem


def test_a_run(saved: Path, tmp_path: Path, look: Callable[[Path], dict[str, Any]]) -> None:
    run = tmp_path / "run"
    log = EventLog(run)
    log.write("run", format=FORMAT, command="train", settings={"model": "some/model"}, machine={})
    log.write("export", format="gguf:q8_0", path=run / "gguf" / "gone.gguf", bytes=1, parity=None)
    log.write("failed", error="the disk is lost")
    shutil.copytree(saved / "merged", run / "merged")
    shutil.copytree(saved / "adapter", run / "checkpoints" / "checkpoint-3")
    found = look(run)
    assert (found["kind"], found["state"], found["base_model"]) == ("run", "failed", "some/model")
    assert found["holds"] == {
        "merged": "sentence-transformers model",
        "checkpoints/checkpoint-3": "adapter of a sentence-transformers model",
    }
    assert any("the disk is lost" in problem for problem in found["problems"])
    assert any("gone.gguf any more" in problem for problem in found["problems"])
    assert any("cut off" in problem for problem in look(run / "checkpoints" / "checkpoint-3")["problems"])


def test_a_folder_of_models(saved: Path, look: Callable[[Path], dict[str, Any]]) -> None:
    found = look(saved)
    assert (found["kind"], set(found["holds"])) == (
        "folder of models",
        {"adapter", "merged", "gguf", "onnx", "openvino"},
    )


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def with_json(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / name, **changes)


def cut(folder: Path, name: str = "model.safetensors") -> None:
    weights = folder / name
    weights.write_bytes(weights.read_bytes()[:-64])


def wrapped(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def with_adapter(folder: Path) -> None:
    save_file({"a.lora_A.weight": np.zeros((2, 4), np.float32)}, folder / "adapter_model.safetensors")


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no weights": ("merged", without("model.safetensors"), "holds no weights"),
    "cut weights": ("merged", cut, "model.safetensors cannot be read"),
    "names of a wrapper": ("merged", wrapped, "take random weights"),
    "an adapter beside": ("merged", with_adapter, "contradict each other"),
    "no tokenizer": ("merged", no_tokenizer, "holds no tokenizer"),
    "no pooling": ("merged", lambda folder: shutil.rmtree(folder / "1_Pooling"), "names a Pooling in"),
    "another width": (
        "merged",
        with_json("1_Pooling/config.json", word_embedding_dimension=64),
        "pools 64 numbers a token, but the encoder gives 32",
    ),
    "too long": ("merged", with_json("sentence_bert_config.json", max_seq_length=4096), "has 160 positions"),
    "broken config": ("merged", lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
    "a config of nonsense": ("merged", with_json("config.json", quantization_config="x"), "not as its library writes"),
    "broken modules": ("merged", lambda folder: (folder / "modules.json").write_text('[{"idx": 0}]'), "is not as"),
    "base that moved": (
        "adapter",
        with_json("adapter_config.json", base_model_name_or_path="/nowhere/model"),
        "The base model /nowhere/model is not there",
    ),
    "adapter of no base": ("adapter", with_json("adapter_config.json", base_model_name_or_path=None), "names no base"),
    "another rank": ("adapter", with_json("adapter_config.json", r=9), "says rank 9, but the weights have rank [4]"),
    "a cut graph": ("onnx", lambda folder: cut(folder, "onnx/model.onnx"), "cannot be used: it is cut off"),
    "no graph": ("onnx", lambda folder: (folder / "onnx/model.onnx").write_bytes(b"no graph"), "no ONNX file"),
    "an empty graph": ("onnx", lambda folder: (folder / "onnx/model.onnx").write_bytes(b""), "cannot be used"),
    "cut weights of a graph": (
        "openvino",
        lambda folder: cut(folder, "openvino/openvino_model.bin"),
        "openvino_model.bin, which holds its weights, is cut off",
    ),
    "no weights of a graph": ("openvino", without("openvino/openvino_model.bin"), "is not beside it"),
    "a broken graph": ("openvino", lambda folder: cut(folder, "openvino/openvino_model.xml"), "it is no XML"),
    "no adapter weights": ("adapter", without("adapter_model.safetensors"), "adapter_model.safetensors cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_said(
    damage: str, saved: Path, tmp_path: Path, look: Callable[[Path], dict[str, Any]]
) -> None:
    kind, spoil, message = DAMAGES[damage]
    folder = shutil.copytree(saved / kind, tmp_path / kind)
    assert look(folder)["problems"] == []
    spoil(folder)
    problems = look(folder)["problems"]
    assert sum(message in problem for problem in problems) == 1, problems


@pytest.mark.parametrize(("name", "message"), [("none", "is not there"), ("x.txt", "no folder"), ("empty", "no model")])
def test_nothing_to_inspect(name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / name)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(8), b"GGUF\3" + bytes(3) + b"\xff" * 40, b"GGML" * 9])
def test_a_damaged_gguf_file(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    assert main(["inspect", str(tmp_path / "x.gguf")]) == 1
    assert "cannot be read as GGUF" in capsys.readouterr().err


def test_people_get_lines_and_no_library_is_waited_for(saved: Path) -> None:
    code = (
        "import sys; from embtune.cli.main import main; "
        f"main(['inspect', {str(saved / 'adapter')!r}]); sys.exit('torch' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "LoRA, rank 4, alpha 8 on dense, key, query, value; " in finished.stdout
    assert "torch" not in finished.stderr
    assert torch.__version__  # which is there to be imported
