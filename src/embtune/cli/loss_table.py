"""Losses by their names, known without importing one: which there are, and which columns each reads."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LossInput:
    """The columns that a loss reads."""

    least: int
    """Fewest columns of text."""
    most: int | None
    """Most columns of text; None is any number."""
    label: bool
    """Whether it needs a label or score; those that need none would not look at it."""

    def __str__(self) -> str:
        if self.most is None:
            count = f"at least {self.least} columns of text"
        elif self.most == self.least:
            count = f"{self.least} column{'s' if self.least > 1 else ''} of text"
        else:
            count = f"{self.least} to {self.most} columns of text"
        return f"{count} and {'a label or score' if self.label else 'no label or score'}"


_PAIR_LABEL, _TEXT_LABEL = LossInput(2, 2, True), LossInput(1, 1, True)
_RANKING, _PAIR = LossInput(2, None, False), LossInput(2, 2, False)

# After the "Loss Overview" of sentence-transformers' documentation. Losses that wrap another are left out:
# MatryoshkaLoss has its own option.
LOSS_INPUTS: Mapping[str, LossInput] = {
    **dict.fromkeys(("CosineSimilarityLoss", "CoSENTLoss", "AnglELoss", "SoftmaxLoss"), _PAIR_LABEL),
    **dict.fromkeys(("ContrastiveLoss", "OnlineContrastiveLoss", "ContrastiveTensionLoss"), _PAIR_LABEL),
    **dict.fromkeys(("BatchAllTripletLoss", "BatchHardTripletLoss"), _TEXT_LABEL),
    **dict.fromkeys(("BatchHardSoftMarginTripletLoss", "BatchSemiHardTripletLoss"), _TEXT_LABEL),
    **dict.fromkeys(("MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"), _RANKING),
    **dict.fromkeys(("MultipleNegativesSymmetricRankingLoss", "GlobalOrthogonalRegularizationLoss"), _RANKING),
    "CachedMultipleNegativesSymmetricRankingLoss": _RANKING,
    **dict.fromkeys(("GISTEmbedLoss", "CachedGISTEmbedLoss"), LossInput(2, 3, False)),
    **dict.fromkeys(("MegaBatchMarginLoss", "ContrastiveTensionLossInBatchNegatives"), _PAIR),
    "DenoisingAutoEncoderLoss": _PAIR,
    "TripletLoss": LossInput(3, 3, False),
    **dict.fromkeys(("MSELoss", "EmbedDistillLoss"), LossInput(1, None, True)),
    **dict.fromkeys(("MarginMSELoss", "DistillKLDivLoss"), LossInput(3, None, True)),
}


def about_unknown(name: str) -> str | None:
    """What to say of a loss that does not exist; None where it does."""
    if name in LOSS_INPUTS:
        return None
    near = difflib.get_close_matches(name, LOSS_INPUTS, 1)
    hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(sorted(LOSS_INPUTS))}."
    special = " For Matryoshka set matryoshka_dims." if name.startswith("Matryoshka") else ""
    return f"there is no loss {name!r}.{special} {hint}"
