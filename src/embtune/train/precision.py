"""Half-precision weights in training: float16 needs its loss scaled, and cannot itself be trained."""

import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

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
