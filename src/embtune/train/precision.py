"""Half precision in training: who casts what, and what float16 asks for."""

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

from embtune.adapt.fused import trains_only_fused_layers
from embtune.errors import ArgumentError, ModelError
from embtune.models.modules import transformer_modules


def settle_float16(model: SentenceTransformer, args: SentenceTransformerTrainingArguments) -> None:
    """Turn loss scaling (`args.fp16`) on for a base in float16, whose smallest number is 6e-8.

    Without it most gradients that pass through the base round to zero, and the adapters learn from the rest.

    Raises:
        ModelError: weights in float16 are themselves to be trained.
        ArgumentError: on this device nothing scales the loss.
    """
    trained = [
        name for name, weight in model.named_parameters() if weight.requires_grad and weight.dtype == torch.float16
    ]
    if trained:
        raise ModelError(
            f"{len(trained)} weights in float16 are to be trained ({trained[0]} …): their updates are too small for "
            "float16, and scaled gradients of such weights cannot be unscaled. Load the model with dtype=float32 and "
            "pass fp16=True in the training arguments, which computes in float16."
        )
    if args.bf16 or all(transformer.model.dtype != torch.float16 for transformer in transformer_modules(model)):
        return
    if args.device.type == "cpu":
        raise ArgumentError(
            "The base is in float16, and on a CPU nothing scales the loss, so that small gradients would be lost. "
            "Load the model with dtype=float32 or dtype=bfloat16."
        )
    if not args.fp16:
        print("fp16: on, because the base is in float16 and gradients through it need a scaled loss", flush=True)
    args.fp16 = True
    args.mixed_precision = "fp16"  # what the Trainer hands to accelerate; TrainingArguments derives it from fp16


def settle_casting(model: SentenceTransformer, args: SentenceTransformerTrainingArguments) -> None:
    """With `args.bf16`, leave autocast out where a base in bfloat16 and float32 adapters need none.

    Autocast would make float32 of every norm's output and cast it back before each product: half of the element-wise
    work of a step. The fused adapters round their own weights for the products, so nothing is left to cast.
    """
    if not args.bf16:
        return
    [*transformers] = transformer_modules(model)
    owned = bool(transformers) and all(
        transformer.model.dtype == torch.bfloat16 and trains_only_fused_layers(transformer.model)
        for transformer in transformers
    )
    args.mixed_precision = "no" if owned else "bf16"
