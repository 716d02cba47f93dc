"""`embtune check`: what is wrong with a file of rows, and a cleaned file where that is asked for."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from embtune.cli.config_file import read_config
from embtune.cli.data_config import CheckConfig
from embtune.cli.display import make_console, working
from embtune.cli.places import is_config
from embtune.cli.tasks import check_inherited
from embtune.cli.train_config import TrainConfig
from embtune.data.cleaning import CHARACTERS, CheckedData, LengthLimit, check_data
from embtune.data.columns import LABEL_ROLES
from embtune.data.readers import read_dataset, read_raw
from embtune.data.retrieval import RetrievalData
from embtune.errors import ArgumentError
from embtune.files import write_json_lines


def run_check(config: CheckConfig, console: Console | None = None) -> int:
    """Check, show what was found, write the cleaned file, and return 0 if nothing is left to mend, else 1.

    Raises:
        EmbtuneError: the data, the model or an option cannot be used at all; nothing is written then.
    """
    console = console or make_console()
    if not is_config(config.data):
        return _check(config, _evaluation(config), console)
    train = read_config(config.data)
    if config.out is not None and len(train.data) > 1:
        raise ArgumentError(f"out={config.out} is one file, and {config.data} names {len(train.data)} data sets.")
    checks = _each_of(train, config)
    evaluation = _evaluation(config) if config.eval else _evaluation_of(train, config)
    return max(_check(each, evaluation, console) for each in checks)


def _check(config: CheckConfig, evaluation: Mapping[str, Collection[str]], console: Console) -> int:
    raw = read_raw(config.data)
    lengths = CHARACTERS if config.model is None else _token_limit(config.model, config.max_seq_length)
    with working(console, f"Checking {config.data}"):
        checked = check_data(
            raw,
            config.columns or None,
            evaluation=evaluation,
            near_duplicates=config.near_duplicates,
            lengths=lengths,
        )
    _show(checked, raw.separator, console)
    if config.fix:
        cleaned = checked.cleaned()
        config.fixed_file.parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(config.fixed_file, cleaned)
        console.print(
            f"\nSaved {len(cleaned):,} of {checked.total:,} rows as {config.fixed_file}, columns named by their role.",
            style="bold green",
            soft_wrap=True,
        )
    left = [finding for finding in checked.findings if not (config.fix and finding.removable)]
    return 1 if left else 0


def _each_of(train: TrainConfig, config: CheckConfig) -> list[CheckConfig]:
    """A check of each data set that a config of `train` names, with its columns."""
    return [
        replace(config, data=source, columns=config.columns or train.columns_of(name))
        for name, source in train.data.items()
    ]


def _evaluation(config: CheckConfig) -> dict[str, Collection[str]]:
    columns = config.eval_columns or config.columns
    for source in config.eval:
        if config.columns and not config.eval_columns and Path(source).expanduser().is_file():
            check_inherited(source, columns)
    return {source: _asked(source, columns, config.eval_split) for source in config.eval}


def _evaluation_of(train: TrainConfig, config: CheckConfig) -> dict[str, Collection[str]]:
    split = config.eval_split or train.more.eval_split
    return {
        source: _asked(source, config.eval_columns or train.eval_columns_of(name), split)
        for name, source in train.eval_data.items()
    }


def _asked(source: str, columns: Mapping[str, str], split: str | None) -> Collection[str]:
    """The texts that a measurement on `source` asks with: its queries, or every text where none is a query."""
    path = Path(source).expanduser()
    if path.is_dir():
        return RetrievalData.from_beir(path, split or "test").queries.values()
    rows = read_dataset(source, columns=columns or None, split="train" if path.is_file() else split or "train")
    texts = [name for name in rows.column_names if name not in LABEL_ROLES]
    return [text for name in (["anchor"] if "anchor" in texts else texts) for text in rows[name]]


def _token_limit(name: str, max_seq_length: int | None) -> LengthLimit:
    """Where a model cuts texts, its prompts not counted.

    Raises:
        ArgumentError: it has no such limit.
    """
    from embtune.api import FastSentenceTransformer
    from embtune.models.modules import single_transformer

    model = FastSentenceTransformer.from_pretrained(name, max_seq_length=max_seq_length, for_inference=True)
    tokenizer, limit = single_transformer(model, "Counting tokens").tokenizer, model.max_seq_length
    if limit is None:
        raise ArgumentError(f"{name} cuts texts at no length of its own; give max_seq_length.")

    def measure(texts: list[str]) -> Iterator[int]:
        return map(len, tokenizer(texts, truncation=False, return_attention_mask=False)["input_ids"])

    return LengthLimit(limit, f"tokens of {name}", measure)


def _show(checked: CheckedData, separator: str | None, console: Console) -> None:
    console.print(f"{checked.total:,} rows{f', cells separated by {separator}' if separator else ''}.")
    table = Table(box=None, pad_edge=False)
    for heading in ("column", "role", "script", "mean length"):
        table.add_column(heading, justify="right" if heading == "mean length" else "left")
    for facts in checked.columns:
        length = f"{facts.mean_length:,.0f} characters" if facts.mean_length else ""
        table.add_row(Text(facts.name), facts.role, facts.script or "", length)
    if checked.columns:
        console.print(table)
    if not checked.findings:
        console.print("\nNothing found.", style="bold green")
        return
    console.print(f"\nFound {len(checked.findings)}:", style="bold yellow")
    for finding in checked.findings:
        ending = " [--fix removes them]" if finding.removable else ""
        console.print(f"- {finding.text}{ending}", soft_wrap=True)
