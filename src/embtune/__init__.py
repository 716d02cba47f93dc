"""Fine-tune sentence-embedding models, prove the gain, and ship the result in every format people deploy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embtune.accelerate.breakeven import compile_threshold
    from embtune.api import FastModel, FastSentenceTransformer
    from embtune.train.arguments import SentenceTransformerTrainingArguments
    from embtune.train.trainer import SentenceTransformerTrainer

__all__ = [
    "FastModel",
    "FastSentenceTransformer",
    "SentenceTransformerTrainer",
    "SentenceTransformerTrainingArguments",
    "compile_threshold",
]

__version__ = "0.1.0"

# Name -> where it is defined. PyTorch is imported at first use, so that `embtune --help` does not wait for it.
_HOMES = {
    "FastModel": "embtune.api",
    "FastSentenceTransformer": "embtune.api",
    "SentenceTransformerTrainer": "embtune.train.trainer",
    "SentenceTransformerTrainingArguments": "embtune.train.arguments",
    "compile_threshold": "embtune.accelerate.breakeven",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
