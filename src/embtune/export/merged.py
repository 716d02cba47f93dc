"""Whole sentence-transformers folders: the merged model, streamed tensor by tensor, and the model as it is."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from embtune.adapt.folders import WRAPPER_TRACES, earlier_model, refuse_contradictions
from embtune.adapt.merge import MergedTensor, bare_model, merged_tensors
from embtune.errors import ExportError
from embtune.export.card import settle_card
from embtune.export.layout import make_compatible
from embtune.export.parity import embedding_parity
from embtune.files import atomic_folder, read_json, write_json
from embtune.models.modules import transformer_modules
from embtune.runtime import choose_dtype

_WEIGHTS = "model.safetensors"
_SHARD_BYTES = 5_000_000_000

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_merged(
    model: SentenceTransformer,
    save_directory: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
) -> Path:
    """Write the model with its adapters merged into the weights, as plain sentence-transformers loads it.

    Weights go to disk one by one: there is no second model in memory while writing, and the one there goes on
    training. The folder appears only once it is complete and, with `verify`, once it has been loaded again (on the
    CPU, in float32) and gives the embeddings of `model`.

    Args:
        model: with or without adapters, quantised or not.
        save_directory: an earlier whole model in it is replaced, shards and modules included; other files stay.
        dtype: of the backbone's weights; None is the dtype of the checkpoint that the model was loaded from where
            that is known (`checkpoint_dtype` of the backbone), else float32 for a quantised base and the parameters'
            own dtype for others.
        verify: compare embeddings before the folder appears.

    Raises:
        ArgumentError: the folder holds an adapter or weights of other libraries, or `dtype` is not known.
        ModelError: the adapters are of a kind that cannot be merged.
        ExportError: the saved model's embeddings differ; nothing is left behind.
    """
    target = Path(save_directory)
    chosen = None if dtype is None else choose_dtype(dtype, model.device).dtype
    refuse_contradictions(target, adapter=False, whole=True)
    with atomic_folder(target, earlier_model) as staging:
        with _saving_merged(model, chosen):
            SentenceTransformer.save(model, str(staging))
        classes = {type(part.model): type(bare_model(part.model)) for part in transformer_modules(model)}
        settle_card(staging, target.name, {type(model): SentenceTransformer, **classes})
        make_compatible(staging, model)
        if verify:
            embedding_parity(model, staging, minimum=required_cosine(model, staging))
    return target


def save_compatible(
    model: SentenceTransformer, folder: str | Path, *, verify: bool = True, **card_options: Any
) -> Path:
    """Save the model as it is (with adapters: the adapter files, tokenizer and modules), in the layout of all readers.

    The folder appears only once it is complete. Adapter files are read back and compared with the adapter in memory;
    with `verify`, a whole model is loaded again and gives the embeddings of `model`. That costs a second model on the
    CPU and a few seconds, so checkpoints in training do without.

    Args:
        model: with or without adapters, quantised or not.
        folder: an earlier model of the same kind in it is replaced; other files stay.
        verify: compare embeddings before the folder appears.
        card_options: those of sentence-transformers' own `save`.

    Raises:
        ArgumentError: the folder holds weights of the other kind.
        ExportError: the saved model is not the one in memory, or (with `verify`) its adapters are inside a Router,
            from which sentence-transformers cannot load them; nothing is left behind.
    """
    target = Path(folder)
    transformers = transformer_modules(model)
    adapted = [transformer for transformer in transformers if _has_adapter(transformer)]
    if verify and any(transformer is not model[0] for transformer in adapted):
        raise ExportError(
            "An adapter inside a Router cannot be loaded again: sentence-transformers looks for its base in the wrong "
            "folder. Save the whole model with save_pretrained_merged; training can go on afterwards."
        )
    refuse_contradictions(target, adapter=bool(adapted), whole=len(adapted) < max(len(transformers), 1))
    with atomic_folder(target, earlier_model) as staging:
        SentenceTransformer.save(model, str(staging), **card_options)
        settle_card(staging, target.name, {type(model): SentenceTransformer})
        make_compatible(staging, model)
        if verify and not adapted:
            embedding_parity(model, staging, minimum=required_cosine(model, staging))
    return target


def _has_adapter(module: nn.Module) -> bool:
    return any(isinstance(part, BaseTunerLayer) for part in module.modules())


@contextmanager
def _saving_merged(model: SentenceTransformer, dtype: torch.dtype | None) -> Iterator[None]:
    """Let sentence-transformers' own save write merged backbones, wherever in the module tree they are."""
    transformers = transformer_modules(model)
    try:
        for transformer in transformers:
            vars(transformer)["save"] = partial(_save_transformer, transformer, dtype)
        yield
    finally:
        for transformer in transformers:
            vars(transformer).pop("save", None)


def _save_transformer(transformer: Transformer, dtype: torch.dtype | None, output_path: str, **_: Any) -> None:
    write_backbone(transformer.model, Path(output_path), dtype)
    transformer.processor.save_pretrained(output_path)
    transformer.save_config(output_path)


def required_cosine(model: SentenceTransformer, folder: Path) -> float:
    """What rounding alone leaves of the agreement; a wrong merge falls far below it."""
    if any(type(module).__name__ == "Linear8bitLt" for module in model.modules()):
        return 0.99
    # Eight bits of mantissa: MiniLM's six layers came to 0.99994 at worst, and error grows with depth.
    dtypes = {read_json(path).get("dtype") for path in folder.rglob("config.json")}
    return 0.999 if "bfloat16" in dtypes else 0.9999


def write_backbone(backbone: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors (above 5 GB: shards and their index) of the merged backbone.

    Args:
        backbone: a transformers model, plain, quantised or with PEFT adapters; it is not touched.
        folder: exists; files of the same name are overwritten.
        dtype: as in `save_merged`.

    Raises:
        ModelError: the model cannot be merged.
    """
    bare = bare_model(backbone)
    dtype = dtype or getattr(bare, "checkpoint_dtype", None)
    tensors = merged_tensors(backbone, dtype)
    _write_shards(folder, _pieces(bare, tensors))
    config = copy.deepcopy(bare.config)
    for trace in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, trace):
            delattr(config, trace)
    config.architectures = [type(bare).__name__]
    config.dtype = next((tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point), torch.float32)
    if bare.is_remote_code():
        custom_object_save(bare, folder, config=config)
    config.save_pretrained(folder)


@dataclass(frozen=True)
class _Piece:
    """The smallest part of a file: tensors that are computed, renamed and written together, nearly always one."""

    sources: Sequence[MergedTensor]
    """As the model in memory holds them."""
    written: Mapping[str, Tensor]
    """Name in the file -> a meta tensor with its shape and dtype."""
    converted: PreTrainedModel | None
    """The model whose checkpoint names and shapes differ from those in memory, or None."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.written.values())

    def compute(self) -> dict[str, Tensor]:
        tensors = {source.name: source.compute() for source in self.sources}
        return tensors if self.converted is None else revert_weight_conversion(self.converted, tensors)


def _pieces(bare: PreTrainedModel, tensors: Sequence[MergedTensor]) -> list[_Piece]:
    """Cut the model into pieces: single tensors, or whole layers where transformers stores a model in another layout.

    Some architectures (NomicBERT, GTE) are saved under the names of their original implementation, with query, key
    and value in one matrix. Such a conversion never reaches beyond one layer.
    """
    meta = {tensor.name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors}
    # It returns its very argument where the architecture has no conversion.
    if revert_weight_conversion(bare, meta) is meta:
        return [_Piece([tensor], {tensor.name: meta[tensor.name]}, None) for tensor in tensors]
    layers = [list(group) for _, group in groupby(tensors, key=lambda tensor: _layer_of(tensor.name))]
    return [
        _Piece(layer, revert_weight_conversion(bare, {tensor.name: meta[tensor.name] for tensor in layer}), bare)
        for layer in layers
    ]


def _layer_of(name: str) -> str:
    """The path up to the first number: `layers.3` of `layers.3.mlp.up_proj.weight`, empty outside the layers."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def _write_shards(folder: Path, pieces: Sequence[_Piece]) -> None:
    shards: list[list[_Piece]] = [[]]
    for piece in pieces:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + piece.nbytes > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(piece)
    if len(shards) == 1:
        _write_safetensors(folder / _WEIGHTS, shards[0])
        return
    names = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / name, shard)
    index = {
        "metadata": {"total_size": sum(piece.nbytes for piece in pieces)},
        "weight_map": {
            key: name for name, shard in zip(names, shards, strict=True) for piece in shard for key in piece.written
        },
    }
    write_json(folder / f"{_WEIGHTS}.index.json", index)


def _write_safetensors(path: Path, pieces: Sequence[_Piece]) -> None:
    """Write one file in the safetensors format: header length, JSON header, then the tensors' bytes end to end.

    Format: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        for name, tensor in piece.written.items():
            if any(trace in name for trace in WRAPPER_TRACES):
                raise AssertionError(f"{name} would be saved under the name of a wrapper")
            header[name] = {
                "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # Spaces up to a multiple of 8, so that tensors can be mapped into memory where they lie.
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for piece in pieces:
            _write_piece(file, piece)


def _write_piece(file: BinaryIO, piece: _Piece) -> None:
    tensors = piece.compute()
    for name, announced in piece.written.items():
        tensor = tensors.pop(name).cpu().contiguous()
        if (tensor.shape, tensor.dtype) != (announced.shape, announced.dtype):
            raise AssertionError(f"{name} is {tensor.shape} {tensor.dtype}, announced as {announced}")
        file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
