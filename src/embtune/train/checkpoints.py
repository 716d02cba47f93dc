"""Checkpoints: which are whole, and putting one back into a live model, quantised bases included."""

import json
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from embtune.errors import ArgumentError, ModelError
from embtune.files import read_json


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its state last, after weights and optimizer."""
    try:
        read_json(checkpoint / TRAINER_STATE_NAME)
    except (OSError, json.JSONDecodeError):
        return False
    return True


def last_whole_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run that was written to its end; one cut off in the middle is passed over.

    Raises:
        ArgumentError: the run has none.
    """
    numbered = [
        (int(step), folder)
        for folder in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := folder.name.rpartition("-")[2]).isdecimal() and is_whole(folder)
    ]
    if not numbered:
        raise ArgumentError(f"resume_from_checkpoint: {run} holds no whole checkpoint; start without resuming.")
    return max(numbered)[1]


def restore_weights(model: SentenceTransformer, checkpoint: Path) -> None:
    """Put a checkpoint's weights into the live model, in place.

    Adapters go onto the base that is there, so a quantised base is neither loaded nor quantised again: exact, where
    loading the checkpoint as a model of its own fails or keeps the wrong weights.

    Raises:
        ModelError: the checkpoint is of another model.
    """
    for entry in read_json(checkpoint / "modules.json"):
        module = model.get_submodule(entry["name"])
        folder = checkpoint / entry["path"]
        if isinstance(module, Transformer):
            _restore_backbone(module.model, folder)
        elif any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            saved = type(module).load(str(checkpoint), subfolder=entry["path"])
            _load_exactly(module, saved.state_dict(), folder)


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
