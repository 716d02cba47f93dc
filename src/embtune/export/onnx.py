"""Saving as an ONNX graph that ends at the sentence embedding, for runtimes without PyTorch."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embtune.errors import ArgumentError, ExportError
from embtune.export.graph import OUTPUTS, save_graph
from embtune.export.graph_folder import Run, graph_folder
from embtune.runtime import package_version, require

# Quantisation -> lowest cosine to the trained model that any text may have. Rounding inputs per batch and weights to
# seven bits, all-MiniLM-L6-v2's worst text has 0.98, and 0.59 where one scale serves a whole matrix.
MINIMUM_COSINE = {"f32": 0.9999, "int8": 0.96}

_PURPOSE = "An ONNX graph"
_FILE = "model.onnx"


def save_onnx(
    model: SentenceTransformer, save_directory: str | Path, *, quantization: str = "f32", verify: bool = True
) -> Path:
    """Merge the adapters and write `onnx/model.onnx` beside tokenizer, configs and a card that says how to run it.

    Inputs are the tokenizer's, int64 [texts, tokens]; outputs are `last_hidden_state` and `sentence_embedding`, pooling
    and normalisation included. Prompts are not: they stand in config_sentence_transformers.json. The folder holds no
    other weights.

    Args:
        model: with or without adapters, quantised or not.
        save_directory: an earlier export of this kind in it is replaced; other files stay.
        quantization: "f32", or "int8": weights in 8 bits, and inputs of products rounded as they come.
        verify: compare onnxruntime's embeddings with `model`'s before the folder appears.

    Raises:
        ArgumentError: `quantization` is not offered, or the folder holds other weights.
        MissingPackageError: onnx, onnxscript or onnxruntime is not installed.
        ModelError: the model has not exactly one Transformer module.
        ExportError: the model cannot be a graph, or a text's cosine is below `MINIMUM_COSINE`; nothing is left behind.
    """
    if quantization not in MINIMUM_COSINE:
        raise ArgumentError(f"The quantization {quantization!r} is not offered. Use {' or '.join(MINIMUM_COSINE)}.")
    require_onnx()
    target = Path(save_directory)
    with graph_folder(model, target, "onnx", _PURPOSE) as folder:
        file = folder.staging / "onnx" / _FILE
        if quantization == "int8":
            _quantise(folder.exported, file)
        else:
            for path in list(folder.exported.parent.iterdir()):
                shutil.move(path, file.parent)
        parity = None
        if verify:
            try:
                parity = folder.measure(_runner(file), MINIMUM_COSINE[quantization], str(target))
            except ExportError as error:
                if quantization == "f32":
                    raise
                raise ExportError(f"int8 loses too much of this model. {error} Use f32.") from error
        folder.describe("onnx", _description(quantization), parity, _code(folder.name))
    return target


def require_onnx() -> None:
    """Raise unless all that `save_onnx` needs is installed.

    Raises:
        MissingPackageError: a package is missing; the message says which, and how it is installed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require(package, "Saving as ONNX")


def _quantise(exported: Path, file: Path) -> None:
    from onnx_ir import load
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    prepared, quantised = exported.with_name("prepared.onnx"), exported.with_name("quantised.onnx")
    external = len(list(exported.parent.iterdir())) > 1
    # It notes only that the graph is prepared: the exporter has simplified it and knows all shapes.
    quant_pre_process(
        exported,
        prepared,
        skip_optimization=True,
        skip_onnx_shape=True,
        skip_symbolic_shape=True,
        save_as_external_data=external,
    )
    # Seven bits: sums of eight-bit products overflow on processors without VNNI.
    quantize_dynamic(
        prepared,
        quantised,
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=external,
    )
    save_graph(load(quantised), file)


def _runner(file: Path) -> Run:
    from onnxruntime import InferenceSession, SessionOptions
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    failures = (
        errors.Fail,
        errors.InvalidArgument,
        errors.InvalidGraph,
        errors.NotImplemented,
        errors.RuntimeException,
    )
    try:
        session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except failures as error:
        raise ExportError(f"onnxruntime cannot load the graph: {error}") from error

    def run(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        try:
            [embeddings] = session.run(OUTPUTS[1:], dict(inputs))
        except failures as error:
            raise ExportError(f"onnxruntime cannot compute the graph: {error}") from error
        return embeddings

    return run


def _description(quantization: str) -> str:
    how = "in float32" if quantization == "f32" else "with 8-bit weights, and inputs rounded as they come"
    return (
        f"This folder holds the model as an ONNX graph {how} (written by PyTorch {package_version('torch')}). "
        "Its output `sentence_embedding` is the embedding, pooled and normalised as the model does it."
    )


def _code(name: str) -> str:
    return f"""
from onnxruntime import InferenceSession
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
session = InferenceSession("{name}/onnx/{_FILE}")
inputs = tokenizer(["A text", "Another one"], padding=True, truncation=True, return_tensors="np")
embeddings = session.run(["sentence_embedding"], dict(inputs))[0]
"""
