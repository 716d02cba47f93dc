"""Help is read on a screen: every verb's fits one of 40 lines and 80 columns, and nothing is left out of it."""

import re
from collections.abc import Callable
from dataclasses import fields
from math import ceil

import pytest

from embtune.cli.main import CONFIGS, main
from embtune.cli.train_config import TrainConfig
from embtune.cli.train_details import SECTIONS, TrainDetails

LINES, COLUMNS = 40, 80

Help = Callable[..., str]


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Help:
    """What a command line prints; it must fit a screen."""
    monkeypatch.setenv("COLUMNS", str(COLUMNS))

    def show(*arguments: str) -> str:
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        # A line that is longer than the screen is broken by the terminal.
        assert 5 < sum(max(1, ceil(len(text) / COLUMNS)) for text in shown.splitlines()) <= LINES
        return shown

    return show


def flags(shown: str) -> set[str]:
    """The options that a text names, `--no-…` for what is on by default by the option's own name."""
    return {flag.removeprefix("no-").replace("-", "_") for flag in re.findall(r"--(\w[\w-]*)", shown)}


@pytest.mark.parametrize("verb", ["", *CONFIGS])
def test_help_fits_a_screen(verb: str, help_of: Help) -> None:
    help_of(*verb.split(), "--help")


def test_every_key_of_a_config_is_explained(help_of: Help) -> None:
    keys = {each.name for owner in (TrainConfig, TrainDetails) for each in fields(owner)} - {"more"}
    explained = help_of("train", "--help")
    assert "--help-more" in explained
    overview = help_of("train", "--help-more")
    for section, owner in SECTIONS.items():
        part = help_of("train", "--help-more", section)
        assert part == help_of("train", f"--help-more={section}")
        assert section in overview
        assert {each.name for each in fields(owner)} <= flags(part) & flags(overview)
        explained += part
    assert keys <= flags(explained)


def test_a_section_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help-more", "optimiser"]) == 1
    assert "no section 'optimiser'; there are data, evaluation, model, run" in capsys.readouterr().err
