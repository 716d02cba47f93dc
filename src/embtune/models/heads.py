"""What stands behind the encoder works in float32, also where the encoder itself is in half precision."""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling
from torch import Tensor, nn


def _widen_tokens(_module: Pooling, args: tuple[dict[str, Tensor], ...]) -> None:
    features = args[0]
    features["token_embeddings"] = features["token_embeddings"].float()


def _widen_input(module: Dense, args: tuple[dict[str, Tensor], ...]) -> None:
    features = args[0]
    features[module.module_input_name] = features[module.module_input_name].to(module.linear.weight.dtype)


def foreign_pre_hooks(module: nn.Module) -> bool:
    """Whether a module has forward pre-hooks that `keep_heads_in_float32` did not put there."""
    return not {_widen_tokens, _widen_input}.issuperset(module._forward_pre_hooks.values())


def keep_heads_in_float32(model: SentenceTransformer) -> None:
    """Let pooling and Dense modules compute in float32.

    An embedding rounded to bfloat16 hands the loss scores with 8 bits: at the usual scale of 20, a cosine near 0.7
    would be off by 0.04 in the softmax. And a Dense module is trained: updates of a bfloat16 weight below 1/256 of it
    would be lost.

    The inputs are widened by forward pre-hooks. Modules and hooks stay of named, importable kinds, so deep copies,
    pickles (worker processes) and `modules.json` are those of the plain model. Calling it again changes nothing.
    """
    for module in model.modules():
        if isinstance(module, Pooling) and _widen_tokens not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_widen_tokens)
        elif isinstance(module, Dense) and module.linear.weight.dtype in (torch.bfloat16, torch.float16):
            module.to(torch.float32)
            module.register_forward_pre_hook(_widen_input)
