"""A loss made by its name, its arguments checked."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn

from embtune import losses
from embtune.api import FastSentenceTransformer
from embtune.errors import ArgumentError


def make_loss(
    name: str, arguments: Mapping[str, Any], model: SentenceTransformer, matryoshka_dims: Sequence[int] = ()
) -> nn.Module:
    """The loss called `name`, for every prefix of the embedding in `matryoshka_dims` where those are given.

    Raises:
        ArgumentError: an argument does not exist, is missing or has a value that the loss refuses.
    """
    loss_class = getattr(losses, name)
    # Of a class that is marked as deprecated, the class itself shows only (*args, **kwargs).
    parameters = dict(inspect.signature(loss_class.__init__).parameters)
    del parameters["self"], parameters["model"]
    settings = {key: _setting(name, parameters, key, value) for key, value in arguments.items()}
    dimension = model.get_embedding_dimension()
    if "embedding_dimension" in parameters:
        settings.setdefault("embedding_dimension", dimension)
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in settings:
            raise ArgumentError(f"loss_args: {name} needs {key}. Write loss_args as {key}=VALUE.")
    too_long = [size for size in matryoshka_dims if size > dimension]
    if too_long:
        raise ArgumentError(f"matryoshka_dims: {too_long[0]} is more than the {dimension} of this model's embeddings.")
    try:
        loss = loss_class(model, **settings)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"loss_args: {name} refuses {settings}: {error}") from error
    return MatryoshkaLoss(model, loss, list(matryoshka_dims)) if matryoshka_dims else loss


def _setting(name: str, parameters: Mapping[str, inspect.Parameter], key: str, value: Any) -> Any:
    if key not in parameters:
        near = difflib.get_close_matches(key, parameters, 1)
        hint = f"Did you mean {near[0]}?" if near else f"It has {', '.join(parameters) or 'none'}."
        raise ArgumentError(f"loss_args: {name} has no argument {key!r}. {hint}")
    if key == "guide":
        return FastSentenceTransformer.from_pretrained(str(value), for_inference=True, engine="reference")
    default = parameters[key].default
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if callable(default) and default is not inspect.Parameter.empty:
        raise ArgumentError(f"loss_args: {key} of {name} is a function, which only a Python program can give.")
    if isinstance(default, bool) and not isinstance(value, bool):
        raise ArgumentError(f"loss_args: {key}={value!r} of {name} must be true or false.")
    if isinstance(default, int | float) and not isinstance(default, bool) and not number:
        raise ArgumentError(f"loss_args: {key}={value!r} of {name} must be a number.")
    return value
