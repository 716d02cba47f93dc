"""Every loss that sentence-transformers exports, under one import; all of them run on embtune's trainer."""

from sentence_transformers.sentence_transformer import losses as _losses
from sentence_transformers.sentence_transformer.losses import *  # noqa: F403

__all__ = list(_losses.__all__)
