"""A GGUF file that does not hold the model is found before it appears."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tiny import tiny_backbone, wordpiece

from embtune import FastSentenceTransformer
from embtune.errors import ArgumentError, ExportError
from embtune.export import gguf as export
from embtune.export.gguf import write_gguf
from embtune.export.gguf_check import PlannedTensor, check_gguf

NAME = "blk.0.ffn_down.weight"
LAYER = "encoder.layer.0.output.dense.weight"

TinyDir = Callable[..., Path]


def _planned(reader: GGUFReader, values: torch.Tensor) -> PlannedTensor:
    [tensor] = [tensor for tensor in reader.tensors if tensor.name == NAME]
    return PlannedTensor(NAME, tuple(values.shape), tensor.tensor_type, slice(None), lambda: values)


# How far a number near 1 may be off, in each type; of Q8_0 in steps of its block.
@pytest.mark.parametrize(
    ("quantization", "rounding"), [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)]
)
def test_a_number_beyond_the_rounding_of_its_type_is_found(tmp_path: Path, quantization: str, rounding: float) -> None:
    backbone = tiny_backbone("bert")
    weight = backbone.get_parameter(LAYER)
    with torch.no_grad():
        weight.uniform_(-1, 1)
        weight[5, 7] = 1.0
    path = write_gguf(backbone, wordpiece(), tmp_path / "m.gguf", pooling_mode="mean", quantization=quantization)
    reader = GGUFReader(path)
    exact = weight.detach().clone()
    exact[5, 7] += 2.5 * rounding + 1e-6
    with pytest.raises(ExportError, match=r"lacks or adds the tensors"):
        check_gguf(path, {}, [_planned(reader, exact)])
    others = [tensor for tensor in reader.tensors if tensor.name != NAME]
    rest = [
        PlannedTensor(t.name, tuple(t.shape.tolist()[::-1]), t.tensor_type, slice(None), lambda t=t: _value(t))
        for t in others
    ]
    check_gguf(path, {}, [*rest, _planned(reader, weight.detach())])
    for wrong in (exact, weight.detach() * torch.nan):
        with pytest.raises(ExportError, match=f"does not hold {NAME} within the rounding of"):
            check_gguf(path, {}, [*rest, _planned(reader, wrong)])
    with pytest.raises(ExportError, match=f"does not hold {NAME}"):
        check_gguf(path, {}, [*rest, _planned(reader, weight.detach().T)])


def _value(tensor: object) -> torch.Tensor:
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def test_metadata_and_whole_files_are_checked(tmp_path: Path) -> None:
    path = write_gguf(tiny_backbone("bert"), wordpiece(), tmp_path / "m.gguf", pooling_mode="mean", max_seq_length=64)
    with pytest.raises(ExportError, match=r"says 64 for bert\.context_length, not 65"):
        check_gguf(path, {"general.architecture": "bert", "bert.context_length": 65}, [])
    with pytest.raises(ExportError, match=r"says nothing for qwen3\.context_length"):
        check_gguf(path, {"qwen3.context_length": 64}, [])
    whole = path.read_bytes()
    for size in (0, 10, 3000, len(whole) - 1000):
        path.write_bytes(whole[:size])
        with pytest.raises(ExportError, match=r"m\.gguf cannot be read back"):
            check_gguf(path, {}, [])


def test_a_wrong_file_never_appears(tmp_path: Path, tiny_dir: TinyDir, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", device="cpu")
    with pytest.raises(ArgumentError, match="q4_k_m"):
        model.save_pretrained_gguf(tmp_path / "gguf", quantization_method=["f16", "q4_k_m"])
    assert list(tmp_path.iterdir()) == []
    files = model.save_pretrained_gguf(tmp_path / "gguf", quantization_method=["f16", "q8_0"])
    assert sorted(files) == sorted((tmp_path / "gguf").iterdir())
    before = {file: file.read_bytes() for file in files}
    quantize = export.quantize

    def spoiled(values: np.ndarray, stored_as: object) -> np.ndarray:
        return quantize(values[::-1], stored_as)  # rows in the wrong order

    monkeypatch.setattr(export, "quantize", spoiled)
    with pytest.raises(ExportError, match=r"does not hold token_embd\.weight within the rounding of Q8_0"):
        model.save_pretrained_gguf(tmp_path / "gguf")
    assert {file: file.read_bytes() for file in (tmp_path / "gguf").iterdir()} == before
