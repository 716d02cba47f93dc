"""Saving as an OpenVINO model that ends at the sentence embedding, for Intel's processors and GPUs."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embtune.errors import ArgumentError, ExportError
from embtune.export.graph import OUTPUTS
from embtune.export.graph_folder import Run, graph_folder
from embtune.runtime import package_version, require

QUANTIZATIONS = ("f32", "f16")
"""How weights are stored; a device computes in what it is fast at either way."""

MINIMUM_COSINE = 0.9999
"""To the trained model's embeddings, of any text; both quantisations reach 0.99999."""

_PURPOSE = "An OpenVINO model"
_FILE = "openvino_model.xml"


def save_openvino(
    model: SentenceTransformer, save_directory: str | Path, *, quantization: str = "f32", verify: bool = True
) -> Path:
    """Merge the adapters and write `openvino/openvino_model.xml` and `.bin`, otherwise as `save_onnx` does.

    Args:
        model: with or without adapters, quantised or not.
        save_directory: an earlier export of this kind in it is replaced; other files stay.
        quantization: "f32", or "f16" for half the size.
        verify: compare OpenVINO's embeddings with `model`'s, computed in float32, before the folder appears.

    Raises:
        ArgumentError: `quantization` is not offered, or the folder holds other weights.
        MissingPackageError: openvino, onnx or onnxscript is not installed.
        ModelError: the model has not exactly one Transformer module.
        ExportError: the model cannot be a graph, or a text's cosine is below `MINIMUM_COSINE`; nothing is left behind.
    """
    if quantization not in QUANTIZATIONS:
        raise ArgumentError(f"The quantization {quantization!r} is not offered. Use {' or '.join(QUANTIZATIONS)}.")
    require_openvino()
    import openvino

    target = Path(save_directory)
    with graph_folder(model, target, "openvino", _PURPOSE) as folder:
        file = folder.staging / "openvino" / _FILE
        try:
            # Not convert_model, which reports its use to OpenVINO's makers.
            graph = openvino.Core().read_model(folder.exported)
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot read the graph: {error}") from error
        openvino.save_model(graph, file, compress_to_fp16=quantization == "f16")
        parity = folder.measure(_runner(file), MINIMUM_COSINE, str(target)) if verify else None
        folder.describe("openvino", _description(quantization), parity, _code(folder.name))
    return target


def require_openvino() -> None:
    """Raise unless all that `save_openvino` needs is installed.

    Raises:
        MissingPackageError: a package is missing; the message says which, and how it is installed.
    """
    for package in ("openvino", "onnx", "onnxscript"):
        require(package, "Saving as OpenVINO")


def _runner(file: Path) -> Run:
    import openvino

    # Else a processor with bfloat16 units computes in that.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        try:
            return compiled(dict(inputs))[OUTPUTS[1]]
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot compute the graph: {error}") from error

    try:
        compiled = openvino.Core().compile_model(file, "CPU", options)
    except RuntimeError as error:
        raise ExportError(f"OpenVINO cannot load the graph: {error}") from error
    return run


def _description(quantization: str) -> str:
    how = "in float32" if quantization == "f32" else "in float16"
    return (
        f"This folder holds the model for OpenVINO, its weights {how} (written by openvino "
        f"{package_version('openvino')}). Its output `sentence_embedding` is the embedding, pooled and normalised as "
        "the model does it. On processors with bfloat16 units OpenVINO computes in bfloat16 unless "
        '`INFERENCE_PRECISION_HINT` is "f32".'
    )


def _code(name: str) -> str:
    return f"""
import openvino
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = openvino.compile_model("{name}/openvino/{_FILE}")
inputs = tokenizer(["A text", "Another one"], padding=True, truncation=True, return_tensors="np")
embeddings = model(dict(inputs))["sentence_embedding"]
"""
