"""`embtune mine`: hard negatives for a file of pairs, in a file that trains directly."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

from rich.console import Console

from embtune.cli.config_file import read_config
from embtune.cli.data_config import MineConfig
from embtune.cli.display import make_console, print_commands, working
from embtune.cli.flags import as_flags
from embtune.cli.places import is_config
from embtune.data.corpus import read_corpus
from embtune.data.mining_rules import MiningRules
from embtune.data.readers import read_dataset
from embtune.errors import ArgumentError, EmbtuneError
from embtune.files import write_json_lines


def run_mine(config: MineConfig, console: Console | None = None) -> int:
    """Read, rank, choose, write, and return the exit code.

    Raises:
        EmbtuneError: the data, the model or an option cannot be used; nothing is written then.
    """
    console = console or make_console()
    if config.search == "faiss":
        from embtune.runtime import require  # with PyTorch, which nothing else here needs yet

        require("faiss", "--search faiss")
    if is_config(config.data):
        config = _in_config(config)
    with _as_flags():
        rules = MiningRules(
            num_negatives=config.num_negatives,
            range_min=config.range_min,
            range_max=config.range_max,
            min_score=config.min_score,
            max_score=config.max_score,
            absolute_margin=config.absolute_margin,
            relative_margin=config.relative_margin,
            near_duplicates=config.near_duplicates,
        )
    with working(console, f"Reading {config.data}"):
        pairs = read_dataset(config.data, columns=config.columns or None)
    corpus: list[str] = []
    if config.corpus is not None:
        with working(console, f"Reading {config.corpus}"):
            corpus = read_corpus(config.corpus, column=config.corpus_column)
    # PyTorch comes with these: seconds that a mistake in the data should not cost.
    from embtune.api import FastSentenceTransformer
    from embtune.data.mining import mine_hard_negatives

    assert config.model is not None
    with working(console, f"Loading {config.model}"):
        model = FastSentenceTransformer.from_pretrained(
            config.model, max_seq_length=config.max_seq_length, dtype=config.dtype, for_inference=True
        )
    console.print(f"Searching {len(pairs) + len(corpus):,} texts for {len(pairs):,} anchors.")
    with _as_flags():
        mined = mine_hard_negatives(
            pairs,
            model,
            rules,
            corpus=corpus,
            output_format=config.output_format,
            batch_size=config.batch_size,
            search=config.search,
            show_progress=console.is_terminal,
        )
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(config.out, mined.dataset)
    console.print(_typed(str(mined)), soft_wrap=True)
    console.print(f"Saved {config.out}.", style="bold green", soft_wrap=True)
    train = f"embtune train --model {shlex.quote(config.model)} --data {shlex.quote(str(config.out))}"
    print_commands(console, [("Train with them:", train)])
    return 0


def _typed(message: str) -> str:
    # Only names that can be no word of a sentence.
    return as_flags(message, (option.name for option in fields(MineConfig) if "_" in option.name))


@contextmanager
def _as_flags() -> Iterator[None]:
    """Errors of the library name its arguments; here they are flags."""
    try:
        yield
    except EmbtuneError as error:
        raise type(error)(_typed(str(error))) from error


def _in_config(config: MineConfig) -> MineConfig:
    """With the data, its columns and the model that a config of `train` names."""
    train = read_config(config.data)
    if len(train.data) > 1:
        raise ArgumentError(
            f"{config.data} names the data sets {', '.join(train.data)}; mine for one of them by naming its file."
        )
    [(name, source)] = train.data.items()
    columns = config.columns or train.columns_of(name)
    return replace(config, data=source, columns=columns, model=config.model or train.model)
