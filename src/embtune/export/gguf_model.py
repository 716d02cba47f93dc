"""A whole SentenceTransformer as a GGUF file: what the file can hold, and what it would lose."""

from collections.abc import Sequence
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from embtune.errors import ExportError
from embtune.export.gguf import write_gguf
from embtune.files import atomic_files
from embtune.models.modules import pooling_modules, single_transformer


def save_gguf(
    model: SentenceTransformer, save_directory: str | Path, quantizations: Sequence[str] = ("q8_0",)
) -> list[Path]:
    """Write `NAME-QUANTIZATION.gguf` for each quantisation into a folder, adapters merged.

    All files appear together, or none; see `write_gguf` for what they hold and how they are checked.

    Raises:
        ArgumentError: an unknown quantisation.
        ExportError: llama.cpp cannot compute this model's embeddings (its architecture, pooling or a further module),
            or a file, read back, does not hold it.
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
    with atomic_files(save_directory) as staging:
        written = [
            write_gguf(
                transformer.model,
                model.tokenizer,
                staging / f"{name}-{quantization.upper()}.gguf",
                pooling_mode=poolings[0].pooling_mode,
                max_seq_length=model.max_seq_length,
                quantization=quantization,
                name=name,
                base_model=model.model_card_data.base_model,
            )
            for quantization in quantizations
        ]
    return [Path(save_directory) / path.name for path in written]
