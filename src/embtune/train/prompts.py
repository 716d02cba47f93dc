"""Prompts of the training columns become prompts of the model."""

from collections.abc import Mapping
from typing import Any

from sentence_transformers import SentenceTransformer


def remember_prompts(model: SentenceTransformer, prompts: Any) -> None:
    """Give the model the prompts it is trained with, where it has none: whoever loads it needs them to search.

    Args:
        prompts: column -> prompt. One prompt for all columns, or prompts per data set, do not say which texts are
            queries, and change nothing.
    """
    if not isinstance(prompts, Mapping) or any(isinstance(value, Mapping) for value in prompts.values()):
        return
    for role, name in (("anchor", "query"), ("positive", "document")):
        if prompts.get(role) and not model.prompts.get(name):
            model.prompts[name] = prompts[role]
