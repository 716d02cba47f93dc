import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from embtune.api import FastSentenceTransformer
from embtune.cli.export import usage
from embtune.cli.export_choice import ExportChoice
from embtune.cli.main import main

TEXTS = ["How do I read a file?", "for line in open(path): yield line"]


@pytest.fixture(scope="module")
def adapted(tiny_dir: Callable[..., Path]) -> FastSentenceTransformer:
    """A model with an adapter that changes it."""
    torch.manual_seed(0)
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32")
    model = FastSentenceTransformer.get_peft_model(model, r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def adapter_dir(adapted: FastSentenceTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(str(folder))
    return folder


# PEFT asks transformers for a name it gave up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_an_adapter_becomes_a_whole_model(
    adapted: FastSentenceTransformer, adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "whole"
    assert main(["export", str(adapter_dir), "--format", "merged", "--out", str(out)]) == 0
    embeddings = SentenceTransformer(str(out), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(embeddings, adapted.encode(TEXTS), atol=1e-5)
    shown = capsys.readouterr().out
    assert f"Saved {out}: " in shown
    assert f"S('{out}')" in shown
    assert not list(out.glob("adapter*"))


def test_half_precision_and_gguf(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = str(tiny_dir("bert"))
    half = tmp_path / "half"
    assert main(["export", model, "--format", "merged", "--quantization", "16bit", "--out", str(half)]) == 0
    assert {tensor.dtype for tensor in load_file(half / "model.safetensors").values()} == {torch.float16}
    for quantization in ("q8_0", "f32"):
        arguments = ["--format", "gguf", "--quantization", quantization, "--out", str(tmp_path / "gguf")]
        assert main(["export", model, *arguments]) == 0
    files = sorted((tmp_path / "gguf").iterdir())
    assert [file.name.rpartition("-")[2] for file in files] == ["F32.gguf", "Q8_0.gguf"]
    assert files[0].stat().st_size > files[1].stat().st_size


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_torchao(tiny_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "int8"
    assert main(["export", str(tiny_dir("bert")), "--format", "torchao", "--out", str(out)]) == 0
    assert "with torchao installed" in capsys.readouterr().out
    assert "int8" in (out / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_graphs(name: str, tiny_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(name)
    out = tmp_path / "graph"
    assert main(["export", str(tiny_dir("bert")), "--format", name, "--out", str(out)]) == 0
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    finished = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True, check=True)
    expected = SentenceTransformer(str(tiny_dir("bert")), device="cpu").encode("a text")[:5]
    # OpenVINO computes in bfloat16 where that is fast.
    np.testing.assert_allclose(np.fromstring(finished.stdout.strip("[]\n"), sep=" "), expected, atol=0.01)


def test_graphs_are_refused_where_they_would_contradict(
    tiny_dir: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tiny_dir("bert")), "--format", "onnx", "--quantization", "f16", "--out", "o"]) == 1
    assert "onnx has no quantization 'f16'; it has f32, int8" in capsys.readouterr().err
    merged = ["--out", str(tmp_path / "merged"), "--overwrite"]
    assert main(["export", str(tiny_dir("bert")), "--format", "merged", *merged]) == 0
    assert main(["export", str(tiny_dir("bert")), "--format", "onnx", *merged]) == 1
    assert "already holds model.safetensors, which would contradict" in capsys.readouterr().err


def test_the_command_shown_survives_odd_names() -> None:
    assert usage(ExportChoice.parse("merged"), Path("a b"))[1].startswith('python -c "from')
    assert usage(ExportChoice.parse("merged"), Path("a$b"))[1].startswith("python -c 'from")
    assert "-m 'a b.gguf'" in usage(ExportChoice.parse("gguf"), Path("a b.gguf"))[1]
