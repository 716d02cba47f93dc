"""`embtune completion`: the script that completes verbs, options and values in a shell."""

from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from typing import Annotated, Literal, Union

import tyro

from embtune.cli.lookup_config import CompletionConfig
from embtune.cli.main import CONFIGS
from embtune.cli.train_config import TrainConfig
from embtune.cli.train_details import SECTIONS

# tyro's scripts know verbs, options and their choices. Where they offer nothing, as for a model's folder or a list of
# files, the shell's own completion of files comes in.
_BASH = """{script}
complete -o default -F _tyro_embtune embtune
"""

# Both ways of zsh: as the file _embtune in a folder of $fpath, and sourced, where it registers itself.
_ZSH = """#compdef embtune

_embtune() {{
{script}
(( compstate[nmatches] )) || _files
}}

if [[ "$funcstack[1]" == _embtune ]]; then
  _embtune "$@"
else
  compdef _embtune embtune
fi
"""

# fish would look for the typed letters in descriptions, too, so what begins otherwise is left out here.
_FISH = """{script}
function _embtune
    set -l begins '^'(string escape --style=regex -- (commandline -ct))
    set -l found (string match --regex --entire -- "$begins" (_tyro_embtune))
    if test -n "$found"
        printf '%s\\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end

complete --erase --command embtune
complete --no-files --command embtune --arguments "(_embtune)"
"""

_SHELLS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


@dataclass(frozen=True)
class _CompletedTrainConfig(TrainConfig):
    """`train` with the option that is answered before its config is parsed."""

    help_more: Literal[tuple(SECTIONS)] = "data"  # type: ignore[valid-type]
    """Show the less common options of a section."""


def run_completion(config: CompletionConfig) -> int:
    """Print the script, and return the exit code."""
    configs = {**CONFIGS, "train": _CompletedTrainConfig}
    verbs = tuple(Annotated[each, tyro.conf.subcommand(verb)] for verb, each in configs.items())
    arguments = ["--tyro-write-completion", config.shell, "-"]  # "-" is standard output
    script = StringIO()
    with redirect_stdout(script), suppress(SystemExit):  # by which tyro ends once it has printed, as it does for --help
        tyro.cli(Union[verbs], prog="embtune", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))  # type: ignore[call-overload]  # noqa: UP007
    print(_SHELLS[config.shell].format(script=script.getvalue()), end="")
    return 0
