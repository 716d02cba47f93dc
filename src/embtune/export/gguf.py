"""GGUF files for llama.cpp and what is built on it (Ollama, LM Studio), written tensor by tensor."""

from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGML_QUANT_VERSION,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    Keys,
    LlamaFileType,
    PoolingType,
    get_tensor_name_map,
)
from gguf.quants import quantize
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from embtune.adapt.merge import bare_model, merged_tensors
from embtune.errors import ArgumentError, ExportError
from embtune.export.gguf_architecture import (
    add_hyperparameters,
    gguf_architecture,
    kept_rows,
    tensor_name,
    usable_positions,
)
from embtune.export.gguf_check import PlannedTensor, check_gguf
from embtune.export.gguf_vocabulary import add_vocabulary
from embtune.files import atomic_files

# quantization -> (type of the large matrices, type of the file as its metadata states it)
_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
GGUF_QUANTIZATIONS = tuple(_TYPES)

_POOLING = {"mean": PoolingType.MEAN, "cls": PoolingType.CLS, "lasttoken": PoolingType.LAST}

# The largest number that a type can hold; a block of Q8_0 is a float16 scale times integers up to 127.
_LARGEST = {GGMLQuantizationType.F16: 65504.0, GGMLQuantizationType.Q8_0: 65504.0 * 127}

# Added to activations rather than multiplied with them, which llama.cpp does in float32.
_FLOAT32_TABLES = ("position_embd.weight", "token_types.weight")


def write_gguf(
    backbone: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    pooling_mode: str,
    max_seq_length: int | None = None,
    quantization: str = "q8_0",
    name: str | None = None,
    author: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> Path:
    """Write a sentence-embedding model as one GGUF file, adapters merged; the model itself is not touched.

    The file holds the backbone, the tokenizer and the pooling mode. GGUF has no place for normalisation, prompts,
    Dense modules or a truncated dimension: a client normalises, puts prompts before the text, and cuts texts longer
    than the maximum length (keeping the closing token) itself. One tensor is in memory at a time, and the file appears
    at `path` only when it is whole and was read back: its metadata are those written, and each tensor is the model's
    within the rounding of its type.

    Args:
        backbone: a transformers model, plain, quantised or with PEFT adapters.
        tokenizer: its tokenizer, one of the tokenizers library.
        path: the file to write; an existing file is replaced.
        pooling_mode: `mean`, `cls` or `lasttoken`.
        max_seq_length: tokens of the longest text, special ones included; it becomes the file's context length. None
            means all positions that the model has.
        quantization: `f32`, `f16`, `bf16` or `q8_0` for the large matrices. Norms, biases and position tables stay
            float32; under `q8_0`, matrices whose rows are no multiple of 32 are float16.
        name: the model's name; None means the file's name without its ending.
        author: who made the model.
        license: its licence, as an SPDX identifier.
        base_model: Hub id of the model that was fine-tuned.

    Returns:
        `path`.

    Raises:
        ArgumentError: `quantization`, `max_seq_length` or `path` cannot be honoured.
        ExportError: llama.cpp cannot compute this model's embeddings, its numbers do not fit the type, or the file,
            read back, does not hold the model; nothing is left behind.
        ModelError: `backbone` is no transformers model, or its adapters cannot be merged.
    """
    path = Path(path)
    if path.is_dir():
        raise ArgumentError(f"path={path} is a folder; give the name of a file, such as {path / 'model.gguf'}.")
    if quantization not in _TYPES:
        raise ArgumentError(_refused_quantization(quantization))
    if pooling_mode not in _POOLING:
        raise ExportError(
            f"Pooling {pooling_mode!r} cannot be saved as GGUF: llama.cpp pools by {', '.join(_POOLING)} only."
        )
    config = bare_model(backbone).config
    architecture = gguf_architecture(config)
    context_length = _context_length(config, max_seq_length)
    wanted, file_type = _TYPES[quantization]
    planned = _plan(backbone, config, architecture, context_length, wanted)
    with atomic_files(path.parent) as staging:
        writer = GGUFWriter(staging / path.name, architecture)
        writer.add_type(GGUFType.MODEL)
        _add_authorship(writer, name or path.stem, author, license, base_model)
        writer.add_file_type(file_type)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        add_hyperparameters(writer, config, context_length)
        writer.add_pooling_type(_POOLING[pooling_mode])
        add_vocabulary(writer, tokenizer, config.vocab_size)
        _write(writer, planned)
        metadata = {
            Keys.General.ARCHITECTURE: architecture,
            Keys.General.FILE_TYPE: file_type,
            Keys.LLM.BLOCK_COUNT.format(arch=architecture): config.num_hidden_layers,
            Keys.LLM.CONTEXT_LENGTH.format(arch=architecture): context_length,
            Keys.LLM.EMBEDDING_LENGTH.format(arch=architecture): config.hidden_size,
            Keys.LLM.POOLING_TYPE.format(arch=architecture): _POOLING[pooling_mode],
        }
        check_gguf(staging / path.name, metadata, planned)
    return path


def _refused_quantization(quantization: str) -> str:
    possible = ", ".join(GGUF_QUANTIZATIONS)
    return (
        f"quantization={quantization!r} cannot be written; embtune writes {possible}. For others (q4_k_m, q5_k_m, "
        "iq4_xs …) write f16 and run llama.cpp's own tool on it: llama-quantize model-f16.gguf model-q4_k_m.gguf q4_k_m"
    )


def _context_length(config: PretrainedConfig, max_seq_length: int | None) -> int:
    usable = usable_positions(config)
    if max_seq_length is None:
        return usable
    if not 1 <= max_seq_length <= usable:
        raise ArgumentError(f"max_seq_length={max_seq_length} is not possible: the model has {usable} positions.")
    return max_seq_length


def _add_authorship(
    writer: GGUFWriter, name: str, author: str | None, license: str | None, base_model: str | None
) -> None:
    writer.add_name(name)
    writer.add_author(author or "")
    writer.add_license(license or "")
    if base_model:
        organization, _, base_name = base_model.rpartition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_name)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base_model}")


def _plan(
    backbone: nn.Module, config: PretrainedConfig, architecture: str, context_length: int, wanted: GGMLQuantizationType
) -> list[PlannedTensor]:
    """The file's tensors in order: GGUF lists all names, shapes and types before the first number."""
    key = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(key, config.num_hidden_layers)
    planned = []
    for tensor in merged_tensors(backbone, torch.float32):
        name = tensor_name(names, tensor.name)
        if name is None:
            continue
        rows = kept_rows(config, tensor.name, context_length)
        shape = (len(range(*rows.indices(tensor.shape[0]))), *tensor.shape[1:])
        planned.append(PlannedTensor(name, shape, _stored_as(name, shape, wanted), rows, tensor.compute))
    return planned


def _stored_as(name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(shape) == 1 or name.endswith("_norm.weight") or name in _FLOAT32_TABLES:
        return GGMLQuantizationType.F32
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _write(writer: GGUFWriter, planned: list[PlannedTensor]) -> None:
    for tensor in planned:
        block, size = GGML_QUANT_SIZES[tensor.stored_as]
        nbytes = prod(tensor.shape) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=tensor.stored_as)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(_encoded(tensor))
    finally:
        writer.close()


def _encoded(tensor: PlannedTensor) -> np.ndarray:
    values = tensor.values()
    limit = _LARGEST.get(tensor.stored_as, float(np.finfo(np.float32).max))
    largest = np.abs(values).max()
    # Written so that NaN, which compares with nothing, is refused too.
    if not largest <= limit:
        raise ExportError(
            f"The tensor {tensor.name} holds {largest}, more than {tensor.stored_as.name} can store ({limit:.4g}). "
            "If it is nan or inf the training diverged; else write bf16 or f32."
        )
    return quantize(values, tensor.stored_as)
