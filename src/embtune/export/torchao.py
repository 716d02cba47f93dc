"""Saving with int8 linear layers through TorchAO, in a folder that plain sentence-transformers loads."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import TorchAoConfig
from transformers.core_model_loading import revert_weight_conversion

from embtune.adapt.folders import earlier_model, refuse_contradictions
from embtune.adapt.merge import bare_model, merged_tensors
from embtune.errors import ArgumentError, ExportError
from embtune.export.card import add_section
from embtune.export.layout import make_compatible
from embtune.export.merged import save_merged
from embtune.export.parity import Parity, embedding_parity, load_saved
from embtune.files import atomic_folder
from embtune.models.modules import transformer_modules
from embtune.runtime import package_version, require

# Scheme -> lowest cosine to the trained model that any text may have. all-MiniLM-L6-v2's worst of 50 texts has 0.9991
# with rounded weights and 0.994 with rounded activations as well, so each bound leaves about twice the usual loss, and
# a wrong scale or a lost bias (cosines below 0.9) is far outside.
MINIMUM_COSINE = {"int8_weight_only": 0.995, "int8_dynamic": 0.99}

_LAYERS = {
    "int8_weight_only": "The weights of the linear layers are int8, with one scale per row.",
    "int8_dynamic": "The weights of the linear layers are int8, with one scale per row, and so are their inputs, which "
    "are rounded as they come.",
}

_REFUSED = {
    "int4": "int4 weights need kernels that TorchAO has for some GPUs only, and cost small encoders 4 % of the cosine",
    "float8": "float8 needs a GPU of compute capability 8.9 or higher to load and run",
    "intx": "the IntX types are stored as int8, so the file is no smaller, and run slowly",
}


def save_torchao(
    model: SentenceTransformer,
    save_directory: str | Path,
    *,
    scheme: str = "int8_weight_only",
    verify: bool = True,
) -> Path:
    """Merge the adapters and write the model with int8 linear layers; embeddings and layer norms keep their dtype.

    The folder loads in sentence-transformers where `torchao` is installed too, with the same embeddings bit for bit.
    Its README.md names the scheme and, with `verify`, the cosine to `model`'s embeddings. Servers and converters that
    do not know TorchAO (text-embeddings-inference, Ollama, llama.cpp) need a merged folder or a GGUF instead.

    The export runs on the CPU, where it holds the quantised model beside `model`; the latter is not changed.

    Args:
        model: with or without adapters, quantised or not.
        save_directory: an earlier whole model in it is replaced, shards and modules included; other files stay.
        scheme: `int8_weight_only` (float activations), or `int8_dynamic` (int8 activations too; faster in float32).
        verify: compare the saved folder's embeddings with `model`'s before it appears.

    Raises:
        ArgumentError: `scheme` is not offered, or the folder holds an adapter or weights of other libraries.
        MissingPackageError: torchao is not installed.
        ExportError: the architecture cannot be quantised, or a text's cosine is below `MINIMUM_COSINE`; nothing is
            left behind.
    """
    _check_scheme(scheme)
    require("torchao", "Saving with TorchAO")
    target = Path(save_directory)
    refuse_contradictions(target, adapter=False, whole=True)
    _refuse_joined_matrices(model)
    with atomic_folder(target, earlier_model) as staging:
        # Quantising the trained model itself gives tensors that transformers cannot save; those it loads it can.
        with tempfile.TemporaryDirectory(dir=staging.parent, prefix=f".{target.name}.") as scratch:
            quantised = _load_quantised(save_merged(model, Path(scratch) / "merged", verify=verify), model, scheme)
            SentenceTransformer.save_pretrained(quantised, str(staging))
            make_compatible(staging, quantised)
        parity = _measure(model, staging, scheme) if verify else None
        if (staging / "README.md").exists():
            add_section(staging, "Quantisation", _describe(scheme, parity))
    return target


def _check_scheme(scheme: object) -> None:
    if isinstance(scheme, str) and scheme in MINIMUM_COSINE:
        return
    reasons = [f": {reason}" for family, reason in _REFUSED.items() if family in str(scheme).lower()]
    offered = " or ".join(repr(name) for name in MINIMUM_COSINE)
    raise ArgumentError(f"scheme={scheme!r} is not offered{reasons[0] if reasons else ''}. Use {offered}.")


def _refuse_joined_matrices(model: SentenceTransformer) -> None:
    """Refuse architectures (NomicBERT, GTE) whose files hold query, key and value as one matrix.

    While it quantises, transformers does not take them apart: it puts the whole matrix into one of the three layers
    and random numbers into the others, with a log message and no error.
    """
    for transformer in transformer_modules(model):
        bare = bare_model(transformer.model)
        in_memory = {tensor.name: torch.empty(tensor.shape, device="meta") for tensor in merged_tensors(bare)}
        if len(revert_weight_conversion(bare, in_memory)) != len(in_memory):
            raise ExportError(
                f"{type(bare).__name__} is stored with several matrices in one, which transformers cannot quantise "
                "with TorchAO while loading. Save the merged model, or a GGUF for a smaller file."
            )


def _load_quantised(folder: Path, model: SentenceTransformer, scheme: str) -> SentenceTransformer:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from torchao.utils import TorchAOBaseTensor

    config: Any = Int8WeightOnlyConfig() if scheme == "int8_weight_only" else Int8DynamicActivationInt8WeightConfig()
    quantised = load_saved(folder, model, quantization_config=TorchAoConfig(config))
    for transformer in transformer_modules(quantised):
        backbone = transformer.model
        if not any(isinstance(parameter, TorchAOBaseTensor) for parameter in backbone.parameters()):
            name = type(backbone).__name__
            raise ExportError(f"TorchAO found nothing to quantise in {name}; save the merged model instead.")
    return quantised


def _measure(model: SentenceTransformer, folder: Path, scheme: str) -> Parity:
    try:
        return embedding_parity(model, folder, minimum=MINIMUM_COSINE[scheme])
    except ExportError as error:
        other = "scheme='int8_weight_only' or " if scheme == "int8_dynamic" else ""
        raise ExportError(
            f"{scheme} loses too much of this model. {error} Use {other}save_pretrained_merged with a 16-bit dtype."
        ) from error


def _describe(scheme: str, parity: Parity | None) -> str:
    text = (
        f"{_LAYERS[scheme]} (TorchAO `{scheme}`, written by torchao {package_version('torchao')}.) "
        "Loading needs torchao: `pip install torchao`."
    )
    if parity is None:
        return text
    return (
        f"{text}\n\nCosine to the embeddings of the model before quantisation, over {parity.texts} texts in several "
        f"languages: {parity.mean:.4f} on average, {parity.minimum:.4f} at worst."
    )
