"""What the verbs that change nothing can be told: `inspect` and `completion`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from embtune.cli.flags import Switch


@dataclass(frozen=True)
class InspectConfig:
    """Show what a folder holds without loading it, and what is wrong with it. Exit code: 0 if nothing is, else 1."""

    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """Model, adapter, checkpoint or run; or a GGUF file."""
    json: Switch = False
    """Print one JSON object instead."""


@dataclass(frozen=True)
class CompletionConfig:
    """Print the script that lets the Tab key complete embtune's verbs, options and their values.

    bash: embtune completion bash > ~/.local/share/bash-completion/completions/embtune

    zsh: embtune completion zsh > DIR/_embtune, where DIR is in your fpath; or source it in ~/.zshrc

    fish: embtune completion fish > ~/.config/fish/completions/embtune.fish
    """

    shell: tyro.conf.Positional[Annotated[Literal["bash", "zsh", "fish"], tyro.conf.arg(metavar="SHELL")]]
    """bash, zsh or fish."""
