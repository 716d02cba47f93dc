"""Finding the parts of a SentenceTransformer."""

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import nn

from embtune.errors import ModelError


def transformer_modules(model: SentenceTransformer) -> list[Transformer]:
    """Every Transformer module of the model, those inside a Router included, each once."""
    return [module for module in model.modules() if isinstance(module, Transformer)]


def pooling_modules(model: SentenceTransformer) -> list[Pooling]:
    """Every Pooling module of the model, those inside a Router included, each once."""
    return [module for module in model.modules() if isinstance(module, Pooling)]


def single_transformer(model: SentenceTransformer, purpose: str) -> Transformer:
    """The model's one Transformer module.

    Raises:
        ModelError: the model has none or several; the message says what `purpose` needs.
    """
    found = transformer_modules(model)
    if len(found) != 1:
        names = [type(module).__name__ for module in model]
        raise ModelError(f"{purpose} needs a model with one Transformer module; this one has {len(found)}: {names}.")
    return found[0]


def trainable_parameters(module: nn.Module) -> int:
    """How many numbers of `module` receive gradients."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
