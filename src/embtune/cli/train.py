"""`embtune train`: everything that can be refused at once is looked at here; the training itself is beside it."""

import os
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from embtune.cli.display import make_console
from embtune.cli.provenance import fingerprint, git_state
from embtune.cli.reading import read_run_data
from embtune.cli.resuming import check_fits
from embtune.cli.run_folder import RunFolder
from embtune.cli.train_config import TrainConfig
from embtune.cli.warned import noted_warnings

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


def run_train(config: TrainConfig, console: Console | None = None) -> int:
    """Run the whole training and return the exit code: 0, or 130 after Ctrl-C and 143 after SIGTERM.

    Raises:
        EmbtuneError: the data, the model or an option cannot be used. Before the first checkpoint that leaves nothing
            behind; later, the checkpoints stay.
    """
    console = console or make_console(quiet=config.quiet or config.json)
    run = RunFolder(config.output)
    run.check(config.resume is not None)
    options = _plain(config.flat())
    if config.resume is not None and run.finished(options):
        run.say_finished(console, options)
        return 0
    if config.resume is not None:
        check_fits(run.settings["config"], options)
    with noted_warnings() as warned:
        return _run(config, run, options, console, warned)


def _run(
    config: TrainConfig, run: RunFolder, options: Mapping[str, Any], console: Console, warned: Collection[str]
) -> int:
    try:
        data = read_run_data(config, console)
        fingerprints = {name: fingerprint(rows) for name, rows in data.train.items()}
        if config.resume is not None:
            run.check_data(fingerprints)
        # PyTorch comes with it: seconds that a mistake in the data should not cost.
        training = import_module("embtune.cli.training")
    except KeyboardInterrupt:
        run.say_stopped(console)
        return INTERRUPTED
    settings = {"config": options, "folder": os.getcwd(), "git": git_state(), "data": fingerprints}
    exit_code: int = (
        training.dry_run(config, data, options, console, warned)
        if config.dry_run
        else training.train(config, run, data, settings, console)
    )
    return exit_code


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON and YAML hold them, so that those in run.json can be copied into a config file."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in options.items()}
