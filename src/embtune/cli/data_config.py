"""What the verbs about data can be told: `mine`, `check` and `init`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from embtune.cli.flags import Float, Int, MaybeFloat, MaybeInt, MaybeText, Pairs, Switch, shown
from embtune.cli.places import check_new_file, check_overwrite, is_config
from embtune.errors import ArgumentError


@dataclass(frozen=True)
class MineConfig:
    """Find hard negatives: texts that a model ranks high although they do not answer."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Pairs: file or Hub name, or a config of `train`."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """File to write (.jsonl); it trains as it is."""
    model: MaybeText = None
    """It ranks: folder or Hub name; without, that of the config."""
    overwrite: Switch = False
    """Replace the file if it is there."""
    corpus: Annotated[str | None, shown("DATA")] = None
    """More texts to search: a file of texts, or a BEIR folder."""
    corpus_column: MaybeText = None
    """Its column of texts, where it has several."""
    columns: Pairs = field(default_factory=dict)
    """Roles of your columns, as question=anchor answer=positive."""
    num_negatives: Annotated[int, tyro.conf.arg(metavar="N", aliases=["--negatives"])] = 3
    """Negatives for each row."""
    range_min: Int = 0
    """Skip so many of the best besides positives."""
    range_max: MaybeInt = None
    """Skip texts from this rank on; without, ten a negative."""
    min_score: MaybeFloat = None
    """Skip texts of a lower similarity to the anchor."""
    max_score: MaybeFloat = None
    """Skip texts of a higher similarity to the anchor."""
    absolute_margin: MaybeFloat = None
    """A negative scores at most the row's positive minus X."""
    relative_margin: Annotated[float | None, shown("X", default=True)] = 0.05
    """The same, as a share of its score; or None."""
    near_duplicates: Float = 0.8
    """Skip texts that share so many words with a positive."""
    output_format: Literal["n-tuple", "triplet"] = "n-tuple"
    """A row for each pair or negative."""
    search: Literal["auto", "torch", "faiss"] = "auto"
    """The result is the same; auto is torch."""
    batch_size: Int = 64
    """Texts encoded at a time."""
    max_seq_length: MaybeInt = None
    """Longest text in tokens; without, the model's own."""
    dtype: Annotated[str, shown("NAME", default=True)] = "float32"
    """bfloat16 is faster on a GPU, and rounds."""

    def __post_init__(self) -> None:
        check_new_file("--out", self.out, ".jsonl", self.data, self.corpus)
        check_overwrite("--out", self.out, self.overwrite)
        if self.model is None and not is_config(self.data):
            raise ArgumentError("--model: name the model that ranks.")
        if self.corpus_column is not None and self.corpus is None:
            raise ArgumentError(f"--corpus-column={self.corpus_column} needs --corpus.")


@dataclass(frozen=True)
class CheckConfig:
    """Look for what training or measuring would suffer from. Exit code: 0 if nothing is left to mend, else 1."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Rows to check: .jsonl .csv .tsv .parquet, or a Hub name; or a config of `train`."""
    eval: Annotated[tuple[str, ...], shown("DATA…")] = ()
    """What you measure on, files or BEIR folders: training must not see what they ask."""
    eval_columns: Pairs = field(default_factory=dict)
    """Roles of the evaluation data's columns, where they differ from --columns."""
    eval_split: MaybeText = None
    """Split of the evaluation data: BEIR folder (test) or Hub (train)."""
    columns: Pairs = field(default_factory=dict)
    """Roles of your columns, as question=anchor answer=positive; known names need none."""
    model: MaybeText = None
    """Model whose tokens and longest text count; without, too long is over 2,000 characters."""
    max_seq_length: MaybeInt = None
    """Longest text in tokens; without, the model's own."""
    near_duplicates: Float = 0.8
    """Texts that share so much of their words are nearly the same (Jaccard)."""
    fix: Switch = False
    """Write the rows that are in order to --out; DATA itself is never changed."""
    out: Annotated[Path | None, shown("FILE")] = None
    """File for --fix (.jsonl); without, DATA's name with .clean.jsonl."""
    overwrite: Switch = False
    """Replace that file if it is there."""

    def __post_init__(self) -> None:
        if self.max_seq_length is not None and self.model is None:
            raise ArgumentError(
                f"--max-seq-length={self.max_seq_length} counts the tokens of a model; name one (--model)."
            )
        if self.out is not None and not self.fix:
            raise ArgumentError(f"--out={self.out} is where --fix writes; give --fix too.")
        if self.eval_split is not None and all(Path(source).is_file() for source in self.eval):
            raise ArgumentError(f"--eval-split={self.eval_split} needs a BEIR folder or a Hub data set in --eval.")
        if self.eval_columns and all(Path(source).is_dir() for source in self.eval):
            raise ArgumentError(
                f"--eval-columns: {', '.join(self.eval_columns)} need a file or a Hub data set in --eval."
            )
        if self.fix and not is_config(self.data):
            check_new_file("--out", self.fixed_file, ".jsonl", self.data, *self.eval)
            check_overwrite("--out", self.fixed_file, self.overwrite)

    @property
    def fixed_file(self) -> Path:
        """Where `fix` writes: beside a file, and in the current folder for a Hub data set."""
        path = Path(self.data).expanduser()
        beside = path if path.exists() else Path(path.name.replace(":", "-"))
        return self.out or beside.with_name(f"{beside.stem}.clean.jsonl")


@dataclass(frozen=True)
class InitConfig:
    """Write a commented config for `embtune train` from your data: columns recognised, every option explained."""

    data: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DATA")]]
    """Rows to train on (.jsonl .csv .tsv .parquet, or a Hub name)."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("config.yaml")
    """File to write."""
    model: Annotated[str, tyro.conf.arg(metavar="NAME")] = "sentence-transformers/all-MiniLM-L6-v2"
    """Model to tune: folder, adapter folder or Hub name."""
    columns: Pairs = field(default_factory=dict)
    """Roles of your columns, as question=anchor answer=positive; without, they are recognised."""
    overwrite: Annotated[Switch, tyro.conf.arg(aliases=["--force"])] = False
    """Replace the file if it is there."""

    def __post_init__(self) -> None:
        check_new_file("--out", self.out, ".yaml", self.data)
        check_overwrite("--out", self.out, self.overwrite)
