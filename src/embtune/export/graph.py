"""The whole embedding as one ONNX graph: token ids in, the normalised sentence embedding out."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor, nn

from embtune.adapt.merge import bare_model
from embtune.errors import ExportError
from embtune.models.families import LENGTH_DEPENDENT, packing_obstacle
from embtune.models.modules import pooling_modules, single_transformer

if TYPE_CHECKING:
    from onnx_ir import Model

OUTPUTS = ("last_hidden_state", "sentence_embedding")
"""The graph's outputs: [texts, tokens, hidden] under the name that Optimum (and through it sentence-transformers) asks
for, and [texts, dimensions] under the one that text-embeddings-inference prefers."""

# A protobuf message ends at 2 GiB; beyond, weights lie in a file of their own under the name that Optimum looks for.
_LARGEST_FILE = 2_000_000_000

_TRACED_TEXTS = ["A text whose number of tokens is not the number of texts.", "Another."]
_AXES = {0: "batch_size", 1: "sequence_length"}


def check_graph(model: SentenceTransformer, purpose: str) -> None:
    """Refuse what cannot be a graph of its own, before anything is computed.

    Raises:
        ModelError: the model has not exactly one Transformer module.
        ExportError: it does more than one graph can; the message says what.
    """
    transformer = single_transformer(model, purpose)
    reason = _obstacle(model, transformer)
    if reason is not None:
        name = type(bare_model(transformer.model)).__name__
        raise ExportError(f"{purpose} cannot hold this {name}: {reason}. Save it with save_pretrained_merged instead.")


def _obstacle(model: SentenceTransformer, transformer: Transformer) -> str | None:
    kinds = {"image", "audio", "video"} & set(transformer.modality_config)
    if kinds:
        return f"it takes {', '.join(sorted(kinds))} beside text"
    if model[0] is not transformer or transformer.module_output_name != "token_embeddings":
        return "it does not begin with a module that embeds tokens"
    if packing_obstacle(transformer.config) == LENGTH_DEPENDENT:
        return f"{LENGTH_DEPENDENT}, and a graph is fixed at the lengths that it was traced with"
    if any(model.prompts.values()) and not all(pooling.include_prompt for pooling in pooling_modules(model)):
        return "its pooling leaves the prompt out, and a graph does not see where in a text that ends"
    return None


def write_graph(model: SentenceTransformer, path: Path) -> None:
    """Trace a model and write it, with both axes of its inputs free.

    Args:
        model: as plain sentence-transformers loads it, on the CPU in float32, with eager attention: the runtimes fuse
            its plain operations into faster kernels than PyTorch's fused attention taken apart.
        path: the file; the weights of models above 2 GB lie beside it, in `NAME_data`.

    Raises:
        ExportError: PyTorch cannot trace the model.
    """
    graph = EmbeddingGraph(model).eval()
    batch = model.tokenizer(_TRACED_TEXTS, padding=True, return_tensors="pt")
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]
    try:
        with torch.no_grad(), _quietly():
            program = torch.onnx.export(
                graph,
                kwargs={name: batch[name] for name in names},
                input_names=names,
                output_names=OUTPUTS,
                dynamic_shapes=dict.fromkeys(names, _AXES),
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"PyTorch cannot export {type(bare_model(model[0].model)).__name__} as an ONNX graph: {cause}. "
            "Save it with save_pretrained_merged instead."
        ) from error
    save_graph(program.model, path)


def save_graph(graph: "Model", path: Path) -> None:
    """Write a graph without notes on where it came from: the exporter's name paths of this machine."""
    from onnx_ir import save
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(graph)
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
    save(graph, path, external_data=f"{path.name}_data" if size > _LARGEST_FILE else None)


class EmbeddingGraph(nn.Module):
    """A SentenceTransformer as a function of tensors."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute `OUTPUTS` from int64 [texts, tokens]."""
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            features["token_type_ids"] = token_type_ids
        features = self.model[0](features)
        # Later modules may write over it.
        last_hidden_state = features["token_embeddings"]
        for module in list(self.model)[1:]:
            features = module(features)
        return last_hidden_state, features["sentence_embedding"]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what PyTorch says about itself: packages it could use, a class it has deprecated, axes that are equal."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(_nothing)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
            warnings.filterwarnings("ignore", message="# The axis name: ", category=UserWarning)
            yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(_: logging.LogRecord) -> bool:
    return False
