"""Dense heads behind a half-precision backbone: their weights are trained, so they stay in float32."""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor


def _to_weight_dtype(module: Dense, args: tuple[dict[str, Tensor], ...]) -> None:
    features = args[0]
    features[module.module_input_name] = features[module.module_input_name].to(module.linear.weight.dtype)


def keep_heads_in_float32(model: SentenceTransformer) -> None:
    """Cast Dense modules to float32 on the instance; updates of a bfloat16 weight below 1/256 of it would be lost.

    A forward pre-hook brings their input along. Module and hook stay of named, importable kinds, so deep copies,
    pickles (worker processes) and `modules.json` are those of the plain model.
    """
    for module in model.modules():
        if isinstance(module, Dense) and module.linear.weight.dtype in (torch.bfloat16, torch.float16):
            module.to(torch.float32)
            module.register_forward_pre_hook(_to_weight_dtype)
