"""A whole SentenceTransformer as a GGUF file: what the file can hold, and what it would lose."""

from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from embtune.errors import ExportError
from embtune.export.gguf import write_gguf
from embtune.models.modules import pooling_modules, single_transformer


def save_gguf(model: SentenceTransformer, save_directory: str | Path, quantization: str = "q8_0") -> Path:
    """Write `NAME-QUANTIZATION.gguf` into a folder, adapters merged; see `write_gguf` for what the file holds.

    Raises:
        ArgumentError: an unknown quantisation.
        ExportError: llama.cpp cannot compute this model's embeddings: its architecture, pooling or a further module.
    """
    transformer = single_transformer(model, "A GGUF file")
    others = [type(module).__name__ for module in model if not isinstance(module, Transformer | Pooling | Normalize)]
    poolings = pooling_modules(model)
    if others or len(poolings) != 1 or not isinstance(poolings[0].pooling_mode, str):
        raise ExportError(
            "A GGUF file holds an encoder with one pooling mode; this model has "
            f"{', '.join(type(module).__name__ for module in model)} with pooling "
            f"{[pooling.pooling_mode for pooling in poolings]}. Save it with save_pretrained_merged instead."
        )
    name = Path(str(transformer.config._name_or_path or "")).name or "model"
    base = model.model_card_data.base_model
    return write_gguf(
        transformer.model,
        model.tokenizer,
        Path(save_directory) / f"{name}-{quantization.upper()}.gguf",
        pooling_mode=poolings[0].pooling_mode,
        max_seq_length=model.max_seq_length,
        quantization=quantization,
        name=name,
        base_model=base,
    )
