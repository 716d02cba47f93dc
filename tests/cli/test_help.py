"""Help is read on a screen: every verb's fits one of 40 lines and 100 columns."""

from math import ceil

import pytest

from embtune.cli.main import CONFIGS, main

LINES, COLUMNS = 40, 100


@pytest.mark.parametrize("verb", ["", *CONFIGS])
def test_help_fits_a_screen(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    assert main([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) > 5
    # A line that is longer than the screen is broken by the terminal.
    assert sum(max(1, ceil(len(text) / COLUMNS)) for text in shown) <= LINES
