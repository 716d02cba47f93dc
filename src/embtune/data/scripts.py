"""The script a text is written in (Latin, Cyrillic, Arabic …): a cheap sign of a language that does not belong."""

import unicodedata
from collections import Counter
from functools import lru_cache

_LOOKED_AT = 400
# Japanese mixes three scripts, two of which are its own; full- and half-width forms are no scripts.
_SAME = {"CJK": "Han", "HIRAGANA": "Han", "KATAKANA": "Han", "HALFWIDTH": "Han", "FULLWIDTH": "Latin"}


def main_script(text: str) -> str | None:
    """The script of most letters among the first 400 characters, such as `Latin`; None for a text without letters.

    Chinese and Japanese count as one, `Han`. Languages of one script are not told apart.
    """
    start = text[:_LOOKED_AT]
    if start.isascii():
        return "Latin" if any(map(str.isalpha, start)) else None
    scripts = Counter(script for script in map(_script, start) if script is not None)
    return scripts.most_common(1)[0][0] if scripts else None


@lru_cache(maxsize=2**16)
def _script(character: str) -> str | None:
    """The first word of a letter's Unicode name, which is that of its script."""
    if not character.isalpha():
        return None
    word = unicodedata.name(character, "OTHER").partition(" ")[0]
    return _SAME.get(word, word.capitalize())
