"""A check before training: does anything that is trained change the embedding at all?"""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router

from embtune.errors import ModelError
from embtune.models.modules import transformer_modules


def refuse_unreachable(model: SentenceTransformer) -> None:
    """Raise unless some trainable parameter receives a gradient from the embedding of a short text.

    One forward and backward pass over a few tokens; the random state stays as it was.

    Raises:
        ModelError: nothing is trainable, or what is trainable is not on the way from text to embedding.
    """
    for transformer in transformer_modules(model):
        # `auto_model` is a read-only view of `model`; assigning to it adds a second submodule that no forward uses.
        shadow = transformer._modules.get("auto_model")
        if shadow is not None and shadow is not transformer.model:
            raise ModelError(
                "transformer.auto_model = … does not replace the encoder in this version of sentence-transformers: the "
                "forward still uses transformer.model, so training would change nothing. Assign transformer.model "
                "instead, or build the model with FastModel.as_sentence_transformer(model, tokenizer, …)."
            )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ModelError(
            "No weight of this model is trainable. Call FastSentenceTransformer.get_peft_model(model) to train "
            "adapters, or load the model with full_finetuning=True."
        )
    if isinstance(model[0], Router):
        return
    features = model.preprocess(["a short text"])
    features = {
        key: value.to(model.device) if isinstance(value, torch.Tensor) else value for key, value in features.items()
    }
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        embedding = model(features)["sentence_embedding"]
        gradients = (
            torch.autograd.grad(embedding.float().sum(), trainable, allow_unused=True)
            if embedding.requires_grad
            else ()
        )
    if all(gradient is None for gradient in gradients):
        raise ModelError(
            f"None of the {len(trainable)} trainable weights has any influence on the embedding, so training would "
            "change nothing. The adapter is probably on another copy of the encoder: put that very object into "
            "transformer.model, or build the model with FastModel.as_sentence_transformer(model, tokenizer, …)."
        )
