"""Which modules LoRA adapts and which are trained whole, named so that PEFT takes those and no others."""

import difflib
import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from embtune.errors import ArgumentError
from embtune.models.families import encoder_layers, family_of

_ALL_LINEAR = "all-linear"  # PEFT's word, in any case of letters


def resolve_targets(backbone: PreTrainedModel, requested: str | Sequence[str] | None) -> str | list[str]:
    """The `target_modules` for PEFT: the family's own, or those asked for once each is known to exist.

    Raises:
        ArgumentError: a name matches no linear layer outside the pooler; the message lists the names there are.
    """
    available = linear_names(backbone)
    if requested is None:
        family = family_of(backbone.config)
        return [name for name in family.lora_targets if name in available] if family else sorted(available)
    if isinstance(requested, str):
        _check_pattern(requested)
        return requested
    targets = list(requested)
    modules = [name for name, _ in backbone.named_modules() if not name.startswith("pooler")]
    missing = [t for t in targets if not any(_is_named(name, t) for name in modules)]
    if missing or not targets:
        hints = [f"{name} → {close[0]}" for name in missing if (close := difflib.get_close_matches(name, available, 1))]
        hint = f" Did you mean {', '.join(hints)}?" if hints else ""
        raise ArgumentError(
            f"target_modules={targets}: outside its pooler {type(backbone).__name__} has no layer named "
            f"{', '.join(missing) or '(none given)'}. Its linear layers are: {', '.join(sorted(available))}.{hint}"
        )
    return targets


def pooler_layers(backbone: nn.Module, targets: str | list[str]) -> list[str] | None:
    """The layers of the pooler that `targets` would match.

    The pooler feeds nothing that a sentence embedding uses: an adapter there gets no gradient, and distributed
    training does not survive a parameter without one.
    """
    pooler = [
        name
        for name, module in backbone.named_modules()
        if name.partition(".")[0] == "pooler" and isinstance(module, nn.Linear)
    ]
    if isinstance(targets, str):
        everything = targets.lower() == _ALL_LINEAR
        return [name for name in pooler if everything or re.fullmatch(targets, name)] or None
    return [name for name in pooler if name.rpartition(".")[2] in targets] or None


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ArgumentError(
            f"target_modules={pattern!r} is no regular expression ({error}); give one that matches whole names of "
            f'layers, a list of name endings, or "{_ALL_LINEAR}".'
        ) from error


def linear_names(backbone: nn.Module) -> set[str]:
    """Last name components of the linear layers inside the encoder layers, quantised ones included."""
    return {
        name.rpartition(".")[2]
        for layer in encoder_layers(backbone)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }


def within_layers(backbone: nn.Module, targets: str | list[str], layers: int | Sequence[int]) -> list[str]:
    """The full names of the targets inside the chosen layers.

    PEFT's own `layers_to_transform` finds no layers that stand at the root of a model, as ModernBERT's and Qwen3's do.
    """
    chosen = [layers] if isinstance(layers, int) else list(layers)
    count = len(encoder_layers(backbone))
    if wrong := [index for index in chosen if not 0 <= index < count]:
        raise ArgumentError(f"layers_to_transform: there is no layer {wrong}; this model has layers 0 to {count - 1}.")
    inside = {id(module) for index in chosen for module in encoder_layers(backbone)[index].modules()}
    names = [
        name for name, module in backbone.named_modules() if id(module) in inside and isinstance(module, nn.Linear)
    ]
    if isinstance(targets, str):
        return names if targets.lower() == _ALL_LINEAR else [name for name in names if re.fullmatch(targets, name)]
    available = linear_names(backbone)
    if outside := [target for target in targets if target.rpartition(".")[2] not in available]:
        raise ArgumentError(
            f"layers_to_transform chooses encoder layers, in which there is no linear layer {', '.join(outside)} of "
            "target_modules. Leave one of the two out."
        )
    return [name for name in names if any(_is_named(name, target) for target in targets)]


def _is_named(name: str, ending: str) -> bool:
    """Whether a module's full name is, or ends in, the name that was asked for."""
    return name == ending or name.endswith(f".{ending}")


def resolve_modules_to_save(backbone: nn.Module, requested: Sequence[str]) -> list[str]:
    """The `modules_to_save` for PEFT, which goes by the last letters of names.

    BERT's `embeddings` is for it `word_embeddings` too, inside the former, and what it then saves it cannot load. Where
    it would take other modules than those whose name is, or ends in, the one that was asked for, it gets full names.

    Raises:
        ArgumentError: there is no such module.
    """
    names = [name for name, _ in backbone.named_modules()]
    resolved: list[str] = []
    for ending in requested:
        wanted = [name for name in names if _is_named(name, ending)]
        if not wanted:
            raise ArgumentError(f"modules_to_save: the model has no module named {ending}.")
        if wanted == [name for name in names if name.endswith(ending)]:
            resolved.append(ending)
        else:
            resolved += [leaf for name in wanted for leaf in _leaves(backbone, name)]
    return resolved


def _leaves(backbone: nn.Module, name: str) -> list[str]:
    """Full names of the modules at and below `name` that hold parameters of their own."""
    inside = backbone.get_submodule(name).named_modules(prefix=name)
    return [full for full, module in inside if any(True for _ in module.parameters(recurse=False))]
