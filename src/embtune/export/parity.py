"""Does a saved folder give the embeddings of the model that was trained? Measured, in float32, on fixed texts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from embtune.errors import ExportError
from embtune.models.load_reports import without_pooler_reports

PARITY_TEXTS = (
    "cat",
    "How do I reset a forgotten password?",
    "The committee will publish its findings on Thursday, after the council has met.",
    "Der Zug nach Köln fährt heute wegen Bauarbeiten von Gleis sieben ab; bitte beachten Sie die Durchsagen.",
    "Où puis-je trouver un café ouvert près de l'hôtel à cette heure-ci ?",
    "Погода завтра будет ясной, ветер слабый.",
    "明日の会議は午前十時から始まります。",
    "कृपया अपना नाम और पता लिखें।",
    "متى يفتح المتحف أبوابه للزوار؟",
    "def mean(values):\n    total = sum(values)\n    return total / len(values) if values else 0.0",
    "SELECT city, AVG(price) FROM listings WHERE year >= 2020 GROUP BY city ORDER BY 2 DESC;",
    "3.14159 × 10⁻³ ≈ 0.0031 😀",
    "A long passage repeats its subject so that truncation is exercised as well. " * 60,
)


@dataclass(frozen=True)
class Parity:
    """Cosine similarities between the embeddings of the live model and of a saved folder."""

    mean: float
    """Average over the texts."""
    minimum: float
    """The worst text's."""
    worst_text: str
    """The text with the lowest cosine, cut to 60 characters."""
    texts: int
    """How many texts were compared, each once per route of a Router."""


_COLLECTED: ContextVar[list[Parity] | None] = ContextVar("collected parities", default=None)


@contextmanager
def collected_parities() -> Iterator[list[Parity]]:
    """Yield a list that every `Parity` measured in the block is added to, those of saves included."""
    found: list[Parity] = []
    token = _COLLECTED.set(found)
    try:
        yield found
    finally:
        _COLLECTED.reset(token)


def embedding_parity(
    model: SentenceTransformer, folder: str | Path, texts: Sequence[str] | None = None, *, minimum: float = 0.9999
) -> Parity:
    """Compare `model` with `folder` as plain sentence-transformers loads it, both computing in float32.

    The live model is lent out and returned as it was: the same weights at the same addresses, the same modes and the
    same random state. Files in float32 and float16 meet the default. bfloat16 files of deep models may not (0.999), nor
    do models with bitsandbytes' LLM.int8 (0.99): those layers also round their *activations*, the merged ones do not.

    Args:
        model: the live model, in training or not.
        folder: what was saved from it.
        texts: None takes `PARITY_TEXTS`: many scripts, from one word to more than most models' maximum length.
        minimum: the cosine that every text must reach.

    Raises:
        ExportError: a text stays below `minimum`, and the message names it; or the folder cannot be loaded.
    """

    def embed(texts: Sequence[str]) -> Tensor:
        try:
            reloaded = load_saved(folder, model, truncate_dim=model.truncate_dim, dtype=torch.float32).float()
        except (OSError, ValueError, RuntimeError) as error:
            raise ExportError(f"sentence-transformers cannot load what was saved in {folder}: {error}") from error
        return _embed(reloaded, texts)

    return compare_embeddings(model, embed, folder, texts, minimum=minimum)


def compare_embeddings(
    model: SentenceTransformer,
    embed: Callable[[Sequence[str]], Tensor],
    saved: str | Path,
    texts: Sequence[str] | None = None,
    *,
    minimum: float,
) -> Parity:
    """As `embedding_parity`, for what sentence-transformers does not load: `embed` computes with what was saved.

    Args:
        model: the live model, in training or not.
        embed: texts -> their embeddings [texts, dimensions] on the CPU, in the order of the texts.
        saved: what was saved, for messages.
        texts: None takes `PARITY_TEXTS`.
        minimum: the cosine that every text must reach.

    Raises:
        ExportError: a text stays below `minimum`, and the message names it.
    """
    texts = PARITY_TEXTS if texts is None else tuple(texts)
    with _computing_in_float32(model):
        expected = _embed(model, texts)
    actual = embed(texts)
    if expected.shape != actual.shape:
        raise ExportError(
            f"{saved}: its embeddings have {actual.shape[1]} dimensions, the trained model's have {expected.shape[1]}."
        )
    # Without a number there is no agreement either.
    cosines = cosine_similarity(expected.double(), actual.double()).nan_to_num(nan=-1.0)
    worst = int(cosines.argmin())
    text = shorten(texts[worst % len(texts)], 60)
    parity = Parity(cosines.mean().item(), cosines[worst].item(), text, len(cosines))
    if parity.minimum < minimum:
        raise ExportError(
            f"The model in {saved} is not the one that was trained: for the text {text!r} the two embeddings have "
            f"a cosine of {parity.minimum:.6f}, below {minimum} (mean over {len(cosines)} texts: {parity.mean:.6f})."
        )
    collected = _COLLECTED.get()
    if collected is not None:
        collected.append(parity)
    return parity


def load_saved(
    folder: str | Path, model: SentenceTransformer, *, truncate_dim: int | None = None, **model_kwargs: Any
) -> SentenceTransformer:
    """What was saved from a live model, as plain sentence-transformers loads it.

    On the CPU, since the accelerator's memory belongs to the training that goes on, and without shifting its random
    numbers.

    Args:
        model_kwargs: for transformers' `from_pretrained`.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), without_pooler_reports():
        return SentenceTransformer(
            str(folder),
            device="cpu",
            local_files_only=True,
            trust_remote_code=model.trust_remote_code,
            model_kwargs=model_kwargs,
            truncate_dim=truncate_dim,
        )


def _embed(model: SentenceTransformer, texts: Sequence[str]) -> Tensor:
    """Embeddings [routes * texts, dimensions] on the CPU; a model without a Router has one route."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    routes: list[str | None] = list(routers[0].sub_modules) if routers else [None]
    with torch.autocast(model.device.type, enabled=False):
        embedded = [_encode(model, texts, {"task": route} if route else {}) for route in routes]
    return torch.cat(embedded).cpu()


def _encode(model: SentenceTransformer, texts: Sequence[str], task: dict[str, Any]) -> Tensor:
    # Two texts of similar length at a time: padded, as in use, but hardly any is as long as the longest.
    return model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False, batch_size=2, **task)


@contextmanager
def _computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Lend `model` out in float32 and evaluation mode, and take it back exactly as it was."""
    modes = {module: module.training for module in model.modules()}
    # The tensors themselves are kept, not cast back: captured graphs and fused optimizers hold on to their addresses.
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers()) if _is_narrow(tensor)}
    kept = [(tensor, tensor.data) for tensor in tensors.values()]
    computing = {module: _compute_settings(module) for module in model.modules() if _compute_settings(module)}
    attention = _special_attention(model)
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        for module in computing:
            module.compute_dtype = torch.float32
        for backbone in attention:
            backbone.set_attn_implementation("sdpa")
        # Layers that were compiled for half precision have its casts compiled in.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for backbone, implementation in attention.items():
            backbone.set_attn_implementation(implementation)
        for module, settings in computing.items():
            vars(module).update(settings)
        for tensor, data in kept:
            tensor.data = data
        for module, training in modes.items():
            module.training = training


def _compute_settings(module: nn.Module) -> dict[str, Any]:
    """What a bitsandbytes 4-bit layer has noted about the dtype it computes in; it changes these by itself."""
    names = ("compute_dtype", "compute_type_is_set")
    return {name: vars(module)[name] for name in names if name in vars(module)}


def _is_narrow(tensor: Tensor) -> bool:
    """Whether casting to float32 widens a plain tensor; quantised ones are left alone."""
    return tensor.dtype in (torch.bfloat16, torch.float16) and type(tensor.data) is Tensor


def _special_attention(model: nn.Module) -> dict[PreTrainedModel, str]:
    """Backbones with an attention kernel of their own, and its name: FlashAttention, for one, knows no float32."""
    backbones = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    names = {backbone: backbone.config._attn_implementation for backbone in backbones}
    return {backbone: name for backbone, name in names.items() if name not in (None, "eager", "sdpa")}
