import logging

from embtune.models.load_reports import without_pooler_reports

REPORT = """\x1b[1mBertModel LOAD REPORT\x1b[0m from: folder
Key                 | Status  |
--------------------+---------+-
{rows}
Notes:
- MISSING:\tthose params were newly initialized.
"""
LOGGER = logging.getLogger("transformers.modeling_utils")


def test_only_reports_on_the_pooler_alone_are_kept_back() -> None:
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Keep()
    pooler = "pooler.dense.weight | MISSING | \npooler.dense.bias   | MISSING | \n"
    LOGGER.addHandler(handler)
    try:
        with without_pooler_reports():
            LOGGER.warning(REPORT.format(rows=pooler))
            LOGGER.warning(REPORT.format(rows=f"{pooler}encoder.layer.0.weight | MISSING |\n"))
            LOGGER.warning("something else")
        LOGGER.warning(REPORT.format(rows=pooler))
    finally:
        LOGGER.removeHandler(handler)
    assert len(said) == 3
    assert "encoder.layer.0" in said[0]
