"""Losses whose kernels are the same for every batch of one size, so that a CUDA graph may repeat them."""

from collections.abc import Hashable
from typing import Any

from sentence_transformers.sentence_transformer import losses
from torch import nn

from embtune.losses.services import is_known

_REPEATABLE = frozenset(
    {
        "CosineSimilarityLoss",
        "MarginMSELoss",
        "MatryoshkaLoss",  # if the loss inside is
        "MultipleNegativesRankingLoss",
        "MultipleNegativesSymmetricRankingLoss",
        "TripletLoss",
    }
)
"""Each read through: it draws nothing, keeps nothing and trains nothing; neither does it ask the device for a number,
nor send it one, as CoSENTLoss and AnglELoss do."""

_DIRECTIONS = {"query_to_doc", "doc_to_query"}
"""Of a ranking loss; in front of the others it writes a number of the host's."""


_INNER = (nn.Identity, nn.L1Loss, nn.MSELoss, nn.Sigmoid, nn.SmoothL1Loss, nn.Tanh)
"""What a loss may hold: modules that are functions of their input."""


def settings_of(loss: nn.Module) -> Hashable | None:
    """All but embeddings and labels that the value of `loss` depends on; None unless a graph may repeat it.

    Somebody may change an attribute in the middle of a run: then this differs, and another graph is needed.
    """
    if not is_known(loss) or type(loss).__name__ not in _REPEATABLE:
        return None
    if type(loss) is losses.MatryoshkaLoss and loss.n_dims_per_step > 0:
        return None  # it draws the dimensions of each step
    if getattr(loss, "hardness_mode", None) is not None or not _DIRECTIONS.issuperset(getattr(loss, "directions", ())):
        return None
    inner: list[Hashable] = []
    for name, child in loss.named_children():
        if name == "model":
            continue
        settings = _own(child) if type(child) in _INNER else settings_of(child)
        if settings is None:
            return None
        inner.append(settings)
    own = _own(loss)
    return None if own is None else (own, *inner)


def _own(module: nn.Module) -> Hashable | None:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None  # which would be called while recording, and never again
    found = []
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, list):
            value = tuple(value)
        if not _is_plain(value):
            return None
        found.append((name, value))
    return type(module), tuple(found)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    # Somebody's own similarity may do what it likes, and may be wrapped as one that does not.
    known = str(getattr(value, "__module__", "")).startswith("sentence_transformers.")
    theirs = callable(value) and known and not hasattr(value, "__wrapped__")
    return value is None or theirs or isinstance(value, bool | int | float | str)
