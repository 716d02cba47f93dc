"""The loading arguments that both doors share, checked against each other before anything is loaded."""

import difflib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from embtune import runtime
from embtune.errors import ArgumentError, EmbtuneWarning
from embtune.models.families import position_limit


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the base weights are: their dtype and, for a quantised base, their bits."""

    dtype: torch.dtype
    """Dtype of the weights; of the computation, where the base is quantised."""
    bits: int | None
    """4 or 8 for a quantised base, else None."""
    reason: str
    """Why, as `explain()` prints it."""


def choose_weights(
    *,
    dtype: torch.dtype | str | None,
    load_in_16bit: bool,
    load_in_8bit: bool,
    load_in_4bit: bool,
    full_finetuning: bool,
    device: torch.device,
) -> Weights:
    """Settle dtype and bits of the base from the arguments of `from_pretrained`.

    Raises:
        ArgumentError: two arguments contradict each other; the message names both.
    """
    asked = {"load_in_4bit": load_in_4bit, "load_in_8bit": load_in_8bit, "load_in_16bit": load_in_16bit}
    on = [name for name, value in asked.items() if value]
    if len(on) > 1:
        raise ArgumentError(f"{' and '.join(on)} are both set; weights are loaded one way only.")
    if full_finetuning and (load_in_4bit or load_in_8bit):
        raise ArgumentError(
            f"full_finetuning trains every weight, which {on[0]} makes impossible; drop one of the two."
        )
    choice = runtime.choose_dtype(dtype, device)
    if load_in_16bit:
        if dtype is not None and choice.dtype == torch.float32:
            raise ArgumentError("load_in_16bit and dtype=float32 contradict each other.")
        if choice.dtype == torch.float32:
            return Weights(dtype=torch.bfloat16, bits=None, reason="load_in_16bit")
    if full_finetuning and dtype is None and not load_in_16bit:
        reason = (
            "weights that are trained are kept in float32; bf16=True in the training arguments computes in bfloat16"
        )
        return Weights(dtype=torch.float32, bits=None, reason=reason)
    if full_finetuning and choice.dtype == torch.float16:
        raise ArgumentError(
            "full_finetuning cannot train weights in float16: their updates are too small for it, and scaled gradients "
            "of such weights cannot be unscaled. Load with dtype=float32 (the default here) and pass fp16=True in the "
            "training arguments, which computes in float16."
        )
    if full_finetuning and choice.dtype != torch.float32:
        warnings.warn(
            f"full_finetuning with weights in {choice.dtype}: updates smaller than about 1/256 of a weight are lost. "
            "Leave dtype out to train float32 weights with bf16=True in the training arguments.",
            EmbtuneWarning,
            stacklevel=4,
        )
    return Weights(dtype=choice.dtype, bits=4 if load_in_4bit else 8 if load_in_8bit else None, reason=choice.reason)


def clamp_length(requested: int | None, config: PretrainedConfig) -> int | None:
    """The maximum length to use: as requested, or the model's own limit with a warning where it has fewer positions."""
    limit = position_limit(config)
    if requested is None or limit is None or requested <= limit:
        return requested
    warnings.warn(
        f"max_seq_length={requested} is more than the {limit} positions of this {config.model_type} model; "
        f"using {limit}.",
        EmbtuneWarning,
        stacklevel=4,
    )
    return limit


def refuse_unknown(unknown: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `ArgumentError` for arguments that embtune does not have, with the nearest that it has."""
    for name in unknown:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {close[0]}?" if close else f"Known are: {', '.join(known)}."
        raise ArgumentError(f"{name}: embtune has no such argument and ignores none. {hint}")


@dataclass
class LoadNotes:
    """What `explain()` says of the loading of a model; kept on the model as `load_notes`."""

    name: str
    """The checkpoint as it was named."""
    weights: Weights
    """Dtype and bits of the base."""
    engine: str
    """The engine that was asked for."""
    attn_implementation: str | None = None
    """transformers' attention that was asked for by name, or None."""
    full_finetuning: bool = False
    """Whether every weight is trained."""
    for_inference: bool = False
    """Whether the model was loaded for inference only."""
    gradient_checkpointing: bool | str | None = False
    """What was asked for at loading; `get_peft_model` follows it unless told otherwise."""
