"""Everything that is wrong with a config, told at once."""

from collections.abc import Iterable
from dataclasses import dataclass

from embtune.errors import ArgumentError


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong."""

    text: str
    """What, and what to do."""
    names: tuple[str, ...] = ()
    """The options it concerns."""


class ConfigError(ArgumentError):
    """One or more mistakes; several stand in a list, one a line."""

    def __init__(self, mistakes: Iterable[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        texts = [mistake.text for mistake in self.mistakes]
        listed = "".join(f"\n- {text}" for text in texts)
        super().__init__(texts[0] if len(texts) == 1 else f"{len(texts)} mistakes:{listed}")
