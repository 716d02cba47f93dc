"""A model's pass over a flat row as CUDA graphs can record it, or the reason why they cannot."""

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

from embtune.models.checkpointing import recomputes_layers
from embtune.models.engine import Engine
from embtune.models.rounded_linear import rounded_at_once
from embtune.packing.layout import kernel_mask
from embtune.packing.pool import POOLING_MODES, pool
from embtune.packing.row import PackedRow
from embtune.runtime import compute_dtype


def why_not_recordable(
    model: SentenceTransformer, engine: Engine | None, dtype: torch.dtype, checkpointing: bool = False
) -> str | None:
    """What keeps this model's training pass from being recorded, or None.

    Args:
        dtype: in which the encoder computes.
        checkpointing: whether gradient checkpointing is about to be switched on, if it is not on yet.
    """
    device = model.device
    if device.type != "cuda":
        return f"the model is on {device.type}, and CUDA graphs exist on NVIDIA GPUs only"
    if engine is None or not engine.packs(model):
        return "batches are padded"
    if engine.attention(device, dtype, model.max_seq_length or 0) == "groups":
        return "its attention is computed for groups of texts, which differ from batch to batch"
    if torch.distributed.is_initialized():
        return "several processes share their gradients"
    if checkpointing or recomputes_layers(model[0].model):
        return (
            "recomputing whole layers asks for the state of the random numbers in the middle of a pass "
            '(use_gradient_checkpointing="selective" does not)'
        )
    for module in model:
        if isinstance(module, Pooling) and (module.pooling_mode not in POOLING_MODES or not module.include_prompt):
            return (
                f"its pooling ({module.pooling_mode!r}, include_prompt={module.include_prompt}) has to ask the device"
            )
    return None


def embed_row(
    model: SentenceTransformer, engine: Engine, row: PackedRow, longest: int, rounds_at_once: bool = False
) -> Tensor:
    """The embeddings [N, D] of a row in which no text is longer than `longest`; never waits for the device.

    The model's modules run as they are, but for pooling: sentence-transformers 6.0's asks how many texts there are.

    Args:
        rounds_at_once: whether to round the weights of all `RoundedLinear` layers before the pass, as `rounded_at_once`
            does. For a pass under autocast.
    """
    features: dict[str, Any] = row.features()
    device = row.tokens_3T.device
    dtype = compute_dtype(device, model.dtype)
    attention = engine.attention(device, dtype, longest)
    features["attention_mask"] = kernel_mask(row.cu_seqlens, row.tokens_3T.shape[1], longest, attention)
    for place, module in enumerate(model):
        if place == 0 and rounds_at_once:
            with rounded_at_once(module.model, dtype):
                features = module(features)
        elif isinstance(module, Pooling):
            states_TC = features["token_embeddings"].squeeze(0)
            features["sentence_embedding"] = pool(states_TC, row.cu_seqlens, row.tokens_3T[2], module.pooling_mode)
        else:
            features = module(features)
    return features["sentence_embedding"]
