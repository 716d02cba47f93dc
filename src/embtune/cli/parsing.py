"""From the words of a command line to a checked config; nothing heavy is imported for it."""

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from embtune.cli.config_file import ConfigFile, make_checked, unchecked
from embtune.cli.places import is_config
from embtune.cli.train_config import EverydayTrainConfig, TrainConfig
from embtune.cli.train_details import SECTIONS
from embtune.errors import ArgumentError

Config = TypeVar("Config")


def parse(config_type: type[Config], verb: str, arguments: Sequence[str]) -> Config:
    """The config of any verb but `train`; help, and mistakes in the words themselves, end the program.

    Raises:
        ArgumentError: the config refuses a value.
    """
    return make_checked(config_type, _options(unchecked(config_type), verb, arguments))


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """The config of `train`: flags over what a file, or a run to go on with, says.

    Raises:
        EmbtuneError: the file cannot be used, or options are wrong; all that is wrong is in the message.
    """
    if any(argument.partition("=")[0] == "--help-more" for argument in arguments):
        _help_more(_value(arguments, "--help-more"))
    if "--help" in arguments or "-h" in arguments:
        _options(EverydayTrainConfig, "train", ["--help"])
    if arguments and is_config(arguments[0]):
        arguments = ["--config", *arguments]
    flags = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    given = {flag[2:].removeprefix("no-").replace("-", "_") for flag in flags}
    file, run = _value(arguments, "--config"), _value(arguments, "--resume")
    options_type = unchecked(TrainConfig)
    if run is not None:
        _refuse_beside_resume(given)
        source = ConfigFile.of_run(Path(run))
    elif file is not None:
        source = ConfigFile.read(Path(file))
    else:
        return make_checked(TrainConfig, _options(options_type, "train", arguments))
    # A flag that says how long a run is takes the place of what the file says, by whichever of the two ways.
    for flag, other in (("--epochs", "--max-steps"), ("--max-steps", "--epochs")):
        if other not in flags and _value(arguments, flag) not in (None, "None"):
            arguments = [*arguments, other, "None"]
    source.check(given)
    return source.checked(_options(options_type, "train", arguments, source.defaults(options_type)))


def _help_more(section: str | None) -> NoReturn:
    """Show one section of the less common options, or which sections there are, and end the program."""
    if section is None:
        print("\n".join(_sections()))
    elif section in SECTIONS:
        _options(SECTIONS[section], "train", ["--help"])
    else:
        raise ArgumentError(f"--help-more: there is no section {section!r}; there are {', '.join(SECTIONS)}.")
    sys.exit(0)


def _sections() -> Iterator[str]:
    """Each section with the names of its options."""
    width = max(40, shutil.get_terminal_size().columns)
    yield "The less common options of `embtune train`, by section:"
    for name, owner in SECTIONS.items():
        names = (f"no_{each.name}" if each.default is True else each.name for each in fields(owner))
        flags = " ".join(f"--{each.replace('_', '-')}" for each in names)
        yield f"\n{name}: {owner.__doc__}"
        yield textwrap.fill(flags, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    yield f"\n`embtune train --help-more SECTION` explains those of one: {', '.join(SECTIONS)}."


def _refuse_beside_resume(given: set[str]) -> None:
    for name, why in (("config", "the options that it began with"), ("output", "its own folder")):
        if name in given:
            raise ArgumentError(f"resume goes on with a run in {why}; leave {name} out.")


def _value(arguments: Sequence[str], flag: str) -> str | None:
    """What stands behind a flag; None where the flag, or a value, is not there."""
    for argument, follower in zip(arguments, [*arguments[1:], "--"], strict=True):
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
        if argument == flag and not follower.startswith("--"):
            return follower
    return None


def _options(config_type: type[Config], verb: str, arguments: Sequence[str], default: Config | None = None) -> Config:
    wants_help = "--help" in arguments or "-h" in arguments
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        config_type,
        prog=f"embtune {verb}",
        args=["--help"] if wants_help else list(arguments),
        # `--no-…` is for switches that a file turned on; help does without.
        config=(tyro.conf.FlagCreatePairsOff,) if wants_help else (),
        **defaults,
    )
