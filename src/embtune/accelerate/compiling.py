"""Compile the encoder layer, not the model: the layers are alike, so all of them run the same compiled code."""

from torch import nn

from embtune.models.families import encoder_layers, unwrapped


def compile_layers(backbone: nn.Module, backend: str = "inductor") -> None:
    """Compile each encoder layer in place, for batches of any length; compilation itself runs in the first steps.

    No wrapper is added: parameter names, class names and what is saved stay. Copies made by `deepcopy` or `pickle` are
    not compiled. Compiled code is kept per variant of a call (training or not, with padding or without, input with a
    gradient or without, a batch of one text). Beyond eight variants in a process, which several models can reach,
    PyTorch says so and runs new ones uncompiled.

    Args:
        backbone: a transformers model, PEFT-wrapped or not. Switch gradient checkpointing on or off before.
        backend: of `torch.compile`; `eager` only traces, which needs no C++ compiler and gains nothing.

    Raises:
        ModelError: the model has no list of encoder layers.
    """
    for layer in encoder_layers(backbone):
        # With static shapes every new length would be compiled anew.
        layer.compile(dynamic=True, backend=backend)


def uncompile_layers(backbone: nn.Module) -> None:
    """Run the encoder layers as they were before `compile_layers`."""
    for layer in encoder_layers(backbone):
        # torch has compile() but nothing to take it back; its own pickling drops this same attribute.
        layer.__dict__.pop("_compiled_call_impl", None)


def layers_are_compiled(backbone: nn.Module) -> bool:
    """Whether `compile_layers` is in effect."""
    return all("_compiled_call_impl" in layer.__dict__ for layer in encoder_layers(backbone))


def has_dropout(backbone: nn.Module) -> bool:
    """Whether the encoder layers, adapters included, drop anything in training."""
    modules = (module for layer in encoder_layers(backbone) for module in layer.modules())
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)


def layer_parameters(backbone: nn.Module) -> int:
    """Numbers in the encoder layers, each counted as often as a forward uses it: what `compile_threshold` asks for.

    Adapters are left out, and so are the embeddings, which cost no arithmetic.
    """
    layers = encoder_layers(backbone)
    # ALBERT applies the same layer again and again.
    uses = max(1, getattr(unwrapped(backbone).config, "num_hidden_layers", 1) // len(layers))
    named = [entry for layer in layers for entry in layer.named_parameters()]
    return uses * sum(parameter.numel() for name, parameter in named if "lora_" not in name)
