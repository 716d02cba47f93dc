"""Gradient checkpointing of the encoder layers, also of architectures for which transformers has none.

A layer that transformers cannot checkpoint (MPNet, ALBERT) gets, on the instance, a subclass of its own class that
speaks transformers' protocol. From then on everything that switches checkpointing on (embtune, PEFT, the Hugging Face
Trainer's `activation_checkpointing` argument) treats such a backbone like any other.
"""

from functools import cache
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from embtune.errors import ArgumentError, ModelError
from embtune.models.families import encoder_layers, family_of, unwrapped
from embtune.models.selective import selective_contexts


class CheckpointedLayer(GradientCheckpointingLayer):
    """Mixed into the class of a layer that has no checkpointing of its own; see `make_checkpointable`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The subclass is made at run time and bears the original's name, so pickle could not find it by that name.
        return _empty_layer, (_original_class(self),), self.__getstate__()


@cache
def _checkpointed_class(layer_class: Any) -> Any:
    # The original's names are kept, so that nothing printed or saved speaks of a class that only exists here.
    names = {"__module__": layer_class.__module__, "__qualname__": layer_class.__qualname__}
    return type(layer_class.__name__, (layer_class, CheckpointedLayer), names)


def _original_class(layer: Any) -> Any:
    return type(layer).__bases__[0]


def _empty_layer(layer_class: Any) -> nn.Module:
    subclass = _checkpointed_class(layer_class)
    return subclass.__new__(subclass)


def make_checkpointable(backbone: nn.Module) -> None:
    """Let gradient checkpointing be switched on for this backbone (PEFT-wrapped or not); nothing is switched on yet.

    Does nothing where transformers checkpoints the layers itself. Elsewhere the encoder layers of this one instance
    change class; parameters, names and results stay. Calling it again does no harm.

    Raises:
        ModelError: the model has no list of encoder layers.
    """
    bare = unwrapped(backbone)
    family = family_of(bare.config)
    if bare.supports_gradient_checkpointing and (family is None or family.checkpointing == "native"):
        return
    layers: list[Any] = encoder_layers(bare)
    for layer in layers:
        if not isinstance(layer, GradientCheckpointingLayer):
            layer.__class__ = _checkpointed_class(layer.__class__)
    bare.supports_gradient_checkpointing = True


def enable_gradient_checkpointing(backbone: nn.Module, kind: bool | str | None = True) -> None:
    """Recompute each encoder layer in the backward pass instead of keeping what it computed.

    Checkpointing is non-reentrant: it replays dropout exactly, and needs no input that requires a gradient.

    Args:
        backbone: a transformers model, PEFT-wrapped or not.
        kind: True or `"unsloth"` (the same here) recompute whole layers; `"selective"` recomputes what is cheap and
            keeps the results of products and attention; False or None switch it off.

    Raises:
        ArgumentError: `kind` is something else.
        ModelError: the model has no layers that can be checkpointed.
    """
    if kind is None or kind is False:
        disable_gradient_checkpointing(backbone)
        return
    if kind is not True and kind not in ("unsloth", "selective"):
        raise ArgumentError(
            f'use_gradient_checkpointing={kind!r} is not known; use True, "unsloth", "selective", False or None.'
        )
    make_checkpointable(backbone)
    bare = unwrapped(backbone)
    settings: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        settings |= {"context_fn": selective_contexts, "preserve_rng_state": False}
    if hasattr(bare, "activation_checkpointing_enable"):
        bare.activation_checkpointing_enable(settings)
    else:
        # The name before transformers 5.2x.
        bare.gradient_checkpointing_enable(settings)
    # transformers makes the embeddings' output require a gradient, which only reentrant checkpointing needs: it costs
    # the first layer's input gradient, and the hook is a local function, which cannot be pickled.
    bare.disable_input_require_grads()
    if not _checkpointing_layers(bare):
        raise ModelError(
            f"{type(bare).__name__} says that it supports gradient checkpointing, but no encoder layer took it up; "
            "load with use_gradient_checkpointing=False."
        )


def disable_gradient_checkpointing(backbone: nn.Module) -> None:
    """Switch checkpointing off and give every layer its own class back; does no harm where it is off."""
    bare = unwrapped(backbone)
    for module in bare.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
        if isinstance(module, CheckpointedLayer):
            module.__class__ = _original_class(module)
            for name in ("gradient_checkpointing", "_gradient_checkpointing_func"):
                module.__dict__.pop(name, None)
            # An instance attribute, set by make_checkpointable; the class' own answer shows through again.
            bare.__dict__.pop("supports_gradient_checkpointing", None)


def describe_gradient_checkpointing(backbone: nn.Module) -> str:
    """One line for `explain()`: whether checkpointing is on, for how many layers, and who does it."""
    layers = _checkpointing_layers(unwrapped(backbone))
    if not layers:
        return "off"
    by = "by embtune (transformers has none)" if isinstance(layers[0], CheckpointedLayer) else "by transformers"
    what = "recomputed in the backward pass" if not is_selective(backbone) else "recomputed but for their products"
    return f"on, {by}: {len(layers)} × {type(layers[0]).__name__} {what}"


def recomputes_layers(backbone: nn.Module) -> bool:
    """Whether whole layers are computed again in the backward pass."""
    return bool(_checkpointing_layers(unwrapped(backbone))) and not is_selective(backbone)


def is_selective(backbone: nn.Module) -> bool:
    """Whether every layer that is recomputed keeps what was dear to compute, as `"selective"` has it."""
    layers: list[Any] = _checkpointing_layers(unwrapped(backbone))
    settings = [getattr(layer._gradient_checkpointing_func, "keywords", {}) for layer in layers]
    return bool(layers) and all(each.get("context_fn") is selective_contexts for each in settings)


def _checkpointing_layers(bare: nn.Module) -> list[nn.Module]:
    return [layer for layer in encoder_layers(bare) if getattr(layer, "gradient_checkpointing", False)]
