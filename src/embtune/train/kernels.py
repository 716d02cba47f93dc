"""Which kernels a run uses. Triton compiles its own for seconds, once on each machine; a short run does not gain them.

On the H200 the first step of BERT-base took 8 to 14 s with nothing compiled and 2.5 s from then on, and a later step
39 ms instead of 49 (docs/decisions.md).
"""

import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer
from transformers import TrainingArguments

from embtune.adapt.fused import fuse_lora, unfuse_lora
from embtune.models.engine import Engine
from embtune.models.families import unwrapped
from embtune.models.fused import fuse_elementwise, unfuse_elementwise
from embtune.models.fused_prenorm import can_widen
from embtune.models.modules import transformer_modules
from embtune.models.rounded_linear import round_linears, unround_linears
from embtune.runtime import package_version, runs_triton
from embtune.train.compiling import planned_steps

ENOUGH_STEPS = 500
"""Steps from which on compiling Triton's kernels pays where none is there yet."""


def settle_kernels(model: SentenceTransformer, args: TrainingArguments, data: object) -> Path | None:
    """Fuse what `args.fused_kernels` says on the model's instances, and undo the rest; says so if Triton is left out.

    Args:
        args: a plain one without the argument counts as `"auto"`.
        data: what the model is trained on.

    Returns:
        The mark to leave with `leave_mark` after the run; None where Triton compiles nothing.
    """
    mode = getattr(args, "fused_kernels", "auto")
    engine = getattr(model, "engine", None)
    fused = mode != "never" and isinstance(engine, Engine) and bool(getattr(model, "packs", False))
    # Elsewhere than on CUDA nothing is compiled: there Triton's kernels do not run.
    compiles = model.device.type == "cuda" and runs_triton(model.device)
    mark = _mark(model) if compiles else None
    triton = mode != "never" and (mark is None or mode == "always" or is_long(args, data) or mark.exists())
    if fused and not triton:
        print(
            f"kernels: without Triton's, which would take about 10 s to compile on this machine, once; "
            f'from {ENOUGH_STEPS} steps on, or with fused_kernels="always", they are used',
            flush=True,
        )
    use_kernels(model, fused, triton)
    return mark if fused and triton else None


def use_kernels(model: SentenceTransformer, fused: bool, triton: bool) -> None:
    """Put a model's modules on fused kernels or take them off.

    Args:
        fused: whether any are to be used.
        triton: whether those are that Triton compiles, attention included where another would serve.
    """
    engine = getattr(model, "engine", None)
    if isinstance(engine, Engine):
        model.engine = replace(engine, triton=triton)
    for transformer in transformer_modules(model):
        unround_linears(transformer.model)  # of layers, too, around which adapters were put since
        # In half precision a pre-norm model needs Triton's kernels for its residual stream, or autocast with all else.
        if fused and (triton or not can_widen(transformer.model)):
            fuse_lora(transformer.model)
        else:
            unfuse_lora(transformer.model)
        if fused:
            round_linears(transformer.model)
        if fused and triton:
            fuse_elementwise(transformer.model)
        else:
            unfuse_elementwise(transformer.model)


def leave_mark(mark: Path) -> None:
    """Remember that the kernels of such a run are compiled."""
    with suppress(OSError):  # a cache that cannot be written to is one that every run fills anew
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def is_long(args: TrainingArguments, data: object) -> bool:
    """Whether a run over this data gains what compiling Triton's kernels takes."""
    if args.max_steps <= 0 and not isinstance(data, Dataset | DatasetDict):
        return True  # a stream: nobody knows
    return planned_steps(args, data) >= ENOUGH_STEPS


def _mark(model: SentenceTransformer) -> Path:
    """A file that is there once such a model was trained here; in Triton's cache, and so cleared with it.

    To be asked for before training, which changes configs.
    """
    import triton

    parts = (
        *(package_version(name) for name in ("embtune", "torch", "triton")),
        torch.cuda.get_device_capability(model.device),
        model.dtype,
        all(parameter.requires_grad for parameter in model.parameters()),
        *(unwrapped(each.model).config.to_json_string() for each in transformer_modules(model)),
    )
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
    return Path(triton.knobs.cache.dir) / f"embtune-{name}"
