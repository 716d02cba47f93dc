"""Loading without the report on poolers, which embeddings never pass through and many checkpoints lack."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGER = "transformers.modeling_utils"
_TABLE = re.compile(r"LOAD REPORT.*?\n-+\+[-+]*\n(?P<rows>.*?)(?:\n\n|\Z)", re.DOTALL)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """False for a report on weights that names none but a pooler's."""
    table = _TABLE.search(record.getMessage())
    return table is None or not all("pooler" in row.split("|")[0].split(".") for row in table["rows"].splitlines())


@contextmanager
def without_pooler_reports() -> Iterator[None]:
    """Keep transformers from reporting, in this block, that a checkpoint lacks a pooler or has one that is not used."""
    logger = logging.getLogger(_LOGGER)
    logger.addFilter(_is_worth_reading)
    try:
        yield
    finally:
        logger.removeFilter(_is_worth_reading)
