"""Checkpoints: putting one back into a live model, quantised bases included."""

from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedGISTEmbedLoss, GISTEmbedLoss
from sentence_transformers.sentence_transformer.modules import Router, Transformer
from torch import nn

from embtune.errors import ModelError
from embtune.models.modules import saved_modules

LOSS_WEIGHTS = "loss.safetensors"
"""The file of a checkpoint that holds what its loss learns; the model's own files say nothing of it."""


def restore_weights(model: SentenceTransformer, checkpoint: Path) -> None:
    """Put a checkpoint's weights into the live model, in place.

    Adapters go onto the base that is there, so a quantised base is neither loaded nor quantised again: exact, where
    loading the checkpoint as a model of its own fails or keeps the wrong weights.

    Raises:
        ModelError: the checkpoint is of another model.
    """
    for module, folder in saved_modules(model, checkpoint):
        if isinstance(module, Transformer):
            _restore_backbone(module.model, folder)
        elif not isinstance(module, Router) and module.state_dict():
            _load_exactly(module, type(module).load(str(folder)).state_dict(), folder)


def save_loss_weights(loss: nn.Module, model: SentenceTransformer, checkpoint: Path) -> None:
    """Write what the loss owns (the classifier of SoftmaxLoss, say) beside the model; nothing where it owns nothing."""
    owned = _owned_by_loss(loss, model)
    if owned:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in owned.items()}
        save_file(tensors, checkpoint / LOSS_WEIGHTS)


def restore_loss_weights(loss: nn.Module, model: SentenceTransformer, checkpoint: Path) -> None:
    """Put what the loss owned at that checkpoint into the live loss, in place.

    Raises:
        ModelError: the checkpoint was trained with another loss.
    """
    file = checkpoint / LOSS_WEIGHTS
    owned = {name: tensor.data for name, tensor in _owned_by_loss(loss, model).items()}
    saved = load_file(file) if file.exists() else {}
    shapes, wanted = ({name: tuple(tensor.shape) for name, tensor in part.items()} for part in (saved, owned))
    if shapes != wanted:
        raise ModelError(
            f"{checkpoint} holds these weights of its loss: {shapes or 'none'}; the loss here has {wanted or 'none'}. "
            "Use the loss of the first run, with its settings."
        )
    for name, tensor in owned.items():
        tensor.copy_(saved[name])


def _owned_by_loss(loss: nn.Module, model: SentenceTransformer) -> dict[str, torch.Tensor]:
    """Trainable weights and buffers of a loss that are neither the model's nor a guide's, which nothing changes."""
    guides = [part.guide for part in loss.modules() if isinstance(part, GISTEmbedLoss | CachedGISTEmbedLoss)]
    others = {id(tensor) for part in (model, *guides) for tensor in (*part.parameters(), *part.buffers())}
    trained = [(name, weight) for name, weight in loss.named_parameters() if weight.requires_grad]
    return {name: tensor for name, tensor in [*trained, *loss.named_buffers()] if id(tensor) not in others}


def _restore_backbone(backbone: nn.Module, folder: Path) -> None:
    adapter = folder / "adapter_model.safetensors"
    adapted = isinstance(backbone, PeftModel)
    if adapted != adapter.exists():
        kinds = ("an adapter", "whole weights")
        saved, live = kinds if adapter.exists() else kinds[::-1]
        raise ModelError(f"{folder} holds {saved}, but the model here trains {live}; set it up as in the first run.")
    if not adapted:
        saved = type(backbone).from_pretrained(folder, dtype=backbone.dtype).state_dict()
        # The class may build a pooler that this model was loaded without; the checkpoint then has none either.
        _load_exactly(backbone, {name: saved[name] for name in backbone.state_dict() if name in saved}, folder)
        return
    try:
        result = set_peft_model_state_dict(backbone, load_file(adapter))
    except RuntimeError as error:
        raise ModelError(f"The adapter in {folder} does not fit this model: {error}") from error
    lost = [name for name in result.missing_keys if _is_adapter_weight(name)]
    if lost or result.unexpected_keys:
        raise ModelError(
            f"The adapter in {folder} does not fit this model: missing {lost[:3]}, unknown "
            f"{result.unexpected_keys[:3]}. "
            "Call get_peft_model with the settings of the first run."
        )


def _is_adapter_weight(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def _load_exactly(module: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(f"The weights in {folder} do not fit this model: {error}") from error
