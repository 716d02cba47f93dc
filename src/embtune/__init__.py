"""Fine-tune sentence-embedding models, prove the gain, and ship the result in every format people deploy."""

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
