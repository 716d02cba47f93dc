"""`embtune completion`: the script that completes verbs, options and values in a shell."""

from contextlib import suppress
from typing import Annotated, Union

import tyro

from embtune.cli.lookup_config import CompletionConfig
from embtune.cli.main import CONFIGS


def run_completion(config: CompletionConfig) -> int:
    """Print the script, and return the exit code."""
    verbs = tuple(Annotated[each, tyro.conf.subcommand(verb)] for verb, each in CONFIGS.items())
    arguments = ["--tyro-write-completion", config.shell, "-"]  # "-" is standard output
    with suppress(SystemExit):  # by which tyro ends once it has printed, as it does for --help
        tyro.cli(Union[verbs], prog="embtune", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))  # type: ignore[call-overload]  # noqa: UP007
    if config.shell == "bash":
        # tyro's script knows options alone; where it offers nothing, as for a model's folder, bash offers files.
        print("complete -o default -F _tyro_embtune embtune")
    return 0
