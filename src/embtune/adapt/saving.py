"""Saving an adapter, or the encoder it was merged into: the folder appears whole, and only once it was read back."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from embtune.adapt.folders import earlier_weights, refuse_contradictions, refuse_modules
from embtune.adapt.merge import iter_merged_tensors
from embtune.errors import ArgumentError, ExportError
from embtune.files import atomic_folder


def save_adapter(
    adapted: PeftModel, save_directory: str | Path, *, save_embedding_layers: bool | str = "auto", **options: Any
) -> None:
    """PEFT's own save, atomic; the files are read back and equal the adapter in memory bit for bit.

    An adapter that PEFT converts while saving (`path_initial_model_for_weight_conversion`) is not compared.

    Args:
        adapted: the model whose adapters are saved.
        save_directory: may hold an earlier adapter, which is replaced; other files stay.
        save_embedding_layers: whether the base's embeddings are saved too; "auto" is PEFT's choice.
        options: further arguments of PEFT's `save_pretrained`.

    Raises:
        ArgumentError: the folder holds whole weights, or an option is refused.
        ExportError: what was written is not what is in memory; nothing is left behind.
    """
    folder = Path(save_directory)
    if not _is_writer(options):
        return
    refuse_contradictions(folder, adapter=True, whole=False)
    with atomic_folder(folder, earlier_weights) as staging:
        if (folder / "README.md").exists():
            shutil.copyfile(folder / "README.md", staging / "README.md")  # PEFT adds to a card that is there
        options["save_embedding_layers"] = save_embedding_layers
        PeftModel.save_pretrained(adapted, str(staging), **options)
        if options.get("path_initial_model_for_weight_conversion") is not None:
            return
        for name in options.get("selected_adapters") or adapted.peft_config:
            tensors = get_peft_model_state_dict(
                adapted, options.get("state_dict"), name, save_embedding_layers=save_embedding_layers
            )
            check_read_back(tensors, staging if name == "default" else staging / name)


def save_encoder(encoder: PreTrainedModel, save_directory: str | Path, **options: Any) -> None:
    """transformers' own save of a merged encoder, atomic; the files are read back and equal it bit for bit.

    Weights that are given by `state_dict` are written but not compared.

    Args:
        encoder: a dense model without adapters.
        save_directory: may hold an earlier plain encoder, which is replaced, shards included; other files stay.
        options: further arguments of transformers' `save_pretrained`.

    Raises:
        ArgumentError: the folder holds an adapter or a sentence-transformers model, or an option is refused.
        ExportError: what was written is not what is in memory; nothing is left behind.
    """
    folder = Path(save_directory)
    if not _is_writer(options):
        return
    refuse_contradictions(folder, adapter=False, whole=True)
    refuse_modules(folder)
    with atomic_folder(folder, earlier_weights) as staging:
        type(encoder).save_pretrained(encoder, staging, **options)
        if options.get("state_dict") is None:
            check_read_back(revert_weight_conversion(encoder, dict(iter_merged_tensors(encoder))), staging)


def save_verified(encoder: PreTrainedModel) -> PreTrainedModel:
    """Make `save_encoder` the `save_pretrained` of this encoder, and return it."""
    # On the instance, so that its class, which is written into its config, stays transformers' own.
    vars(encoder)["save_pretrained"] = partial(save_encoder, encoder)
    return encoder


def check_read_back(expected: Mapping[str, Tensor], folder: Path) -> None:
    """Compare the safetensors files in `folder` with the tensors that they were written from.

    Raises:
        ExportError: a tensor is missing, or differs in a bit; the message names it.
    """
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    found.add(name)
                    if name not in expected or not _same_bits(file.get_tensor(name), expected[name]):
                        raise ExportError(
                            f"{path.name}, read back, does not hold {name} as it is in memory; save again."
                        )
        except SafetensorError as error:
            raise ExportError(f"{path.name} cannot be read back: {error}. Is the disk full? Save again.") from error
    if missing := sorted(expected.keys() - found):
        raise ExportError(f"The saved files, read back, lack {', '.join(missing[:3])}; save again.")


def _same_bits(first: Tensor, second: Tensor) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    # As bytes: NaN is unequal to itself, and a diverged run may be saved too.
    left, right = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(left, right)


def _is_writer(options: Mapping[str, Any]) -> bool:
    """Whether this process is the one that writes.

    Raises:
        ArgumentError: an option would write pickles, or upload files that are not checked yet.
    """
    if not options.get("safe_serialization", True):
        raise ArgumentError("safe_serialization=False writes pickles, which embtune does not; leave it out.")
    if options.get("push_to_hub"):
        raise ArgumentError("push_to_hub=True would upload before the files are checked; call push_to_hub afterwards.")
    return bool(options.get("is_main_process", True))
