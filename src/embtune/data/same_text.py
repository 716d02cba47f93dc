"""When two texts count as the same (they differ in case, white space or Unicode form only), and how one is named."""

import hashlib
import unicodedata


def normal(text: str) -> str:
    """The form that all texts that count as the same have in common."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def digest(text: str) -> bytes:
    """16 bytes that stand for `text`, so that millions of texts can be compared without being held."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def shortened(text: str, length: int = 60) -> str:
    """The beginning of a text, by which a message can show which one is meant."""
    return text if len(text) <= length else text[: length - 1] + "…"
