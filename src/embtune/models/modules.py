"""Finding the parts of a SentenceTransformer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer
from torch import nn

from embtune.errors import ModelError
from embtune.files import read_json


@dataclass(frozen=True)
class FixedParts:
    """The modules and parameters of a model that keeps them for a while, in PyTorch's order.

    A copy of the model has its own structure, and takes none of it along.
    """

    modules: list[nn.Module]
    parameters: list[nn.Parameter]

    def __deepcopy__(self, _memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


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


def saved_modules(model: SentenceTransformer, folder: Path) -> Iterator[tuple[nn.Module, Path]]:
    """Each module of `model` with the folder that its save into `folder` has put it in; a Router's parts behind it."""
    for entry in read_json(folder / "modules.json"):
        yield from _with_parts(model.get_submodule(entry["name"]), folder / entry["path"])


def _with_parts(module: nn.Module, folder: Path) -> Iterator[tuple[nn.Module, Path]]:
    yield module, folder
    if isinstance(module, Router):
        for route, names in read_json(folder / Router.config_file_name)["structure"].items():
            for name, part in zip(names, module.sub_modules[route], strict=True):
                yield from _with_parts(part, folder / name)


def trainable_parameters(module: nn.Module) -> int:
    """How many numbers of `module` receive gradients."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
