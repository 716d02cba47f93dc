"""What each verb can be told: frozen dataclasses, from which flags, keys of a config file and help follow."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from embtune.cli.export_choice import ExportChoice
from embtune.cli.flags import (
    Int,
    MaybeInt,
    MaybeText,
    Pairs,
    Switch,
    bytes_of,
    seconds_of,
    shown,
)
from embtune.cli.places import check_new_file, check_overwrite, check_place
from embtune.errors import ArgumentError


def _at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ArgumentError(f"{name}={value} must be at least {least}.")


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure one or more models on the same data; with several, the first is what the others are compared with."""

    models: tyro.conf.Positional[Annotated[tuple[str, ...], shown("MODEL…")]]
    """Folders, adapter folders or Hub names."""
    data: Annotated[str | None, shown("DATA")] = None
    """BEIR folder; pairs; sentence1, sentence2, score; text, label; or a config of `train`."""
    mteb: Annotated[tuple[str, ...], shown("TASK…")] = ()
    """Tasks of MTEB by name, as SciFact, instead of your data; needs the package mteb."""
    task: Literal["auto", "retrieval", "sts", "clustering", "classification"] = "auto"
    """What to measure; auto knows retrieval and sts by their columns."""
    train_data: Annotated[str | None, shown("DATA")] = None
    """Labelled texts that the probe of a classification learns from."""
    columns: Pairs = field(default_factory=dict)
    """Roles of your columns, as question=anchor answer=positive; known names need none."""
    split: MaybeText = None
    """Split of a BEIR folder (default test) or a Hub data set (default train)."""
    k: MaybeInt = None
    """Depth of the retrieval metrics; without, 10."""
    batch_size: Int = 64
    """Texts encoded at a time."""
    max_seq_length: MaybeInt = None
    """Longest text in tokens; without, each model's own."""
    dtype: Annotated[str, shown("NAME", default=True)] = "float32"
    """bfloat16 is faster on a GPU, and rounds."""
    json: Switch = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "k", "batch_size", "max_seq_length")
        if not self.models:
            raise ArgumentError("Name at least one model to evaluate.")
        if (self.data is None) is not bool(self.mteb):
            raise ArgumentError("Give what to measure on: --data DATA, or --mteb TASK…")
        settled = [name for name in ("train_data", "columns", "split", "k") if getattr(self, name)]
        settled += ["task"] if self.task != "auto" else []
        if self.mteb and settled:
            raise ArgumentError(f"{', '.join(settled)}: tasks of MTEB settle that themselves; leave it out.")
        if len(set(self.mteb)) < len(self.mteb):
            raise ArgumentError(f"mteb={list(self.mteb)} names a task twice.")
        for model in self.models:
            if self.models.count(model) > 1:
                raise ArgumentError(f"models: {model} is named twice.")


@dataclass(frozen=True)
class ExportConfig:
    """Save a model, or an adapter with its base, for use elsewhere; the result is checked against the original."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """Adapter folder, whole model's folder or Hub name."""
    format: Literal["merged", "gguf", "torchao", "onnx", "openvino"]
    """merged: sentence-transformers and servers; gguf: llama.cpp; torchao: 8-bit PyTorch; onnx, openvino: a graph."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder to write."""
    quantization: MaybeText = None
    """gguf: q8_0 (default), f16, bf16, f32; torchao: int8_weight_only (default), int8_dynamic; onnx: f32 (default),
    int8; openvino: f32 (default), f16; merged: 16bit, 32bit."""
    overwrite: Switch = False
    """Write into the folder even if it holds something; what is exported replaces files of its names."""

    def __post_init__(self) -> None:
        choice = ExportChoice.of(self.format, self.quantization, "quantization")
        check_place("out", self.out)
        if self.out.exists() and Path(self.model).exists() and self.out.samefile(self.model):
            raise ArgumentError(f"out={self.out} is the model's own folder; give another.")
        if choice.format != "gguf":
            check_overwrite("out", self.out, self.overwrite)
        for file in self.out.glob(f"*-{str(choice.quantization).upper()}.gguf"):  # other quantisations may stand beside
            check_overwrite("out", file, self.overwrite)


@dataclass(frozen=True)
class ReportConfig:
    """Write one page of HTML that shows what happened in a run, or compares several; it needs no network."""

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], shown("RUN…")]]
    """Folders of runs: the --output of `embtune train`, the --out of `embtune demo`."""
    out: Annotated[Path | None, shown("FILE")] = None
    """The page; without, report.html in the folder of the only run, or embtune-report.html here for several."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ArgumentError("Name at least one run: the folder that --output of `embtune train` said.")
        if self.out is not None:
            check_new_file("--out", self.out, ".html")


@dataclass(frozen=True)
class WatchConfig:
    """Show the page of a run while it goes on, on this machine only; open the address that is printed."""

    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """Folder of the run; it need not be there yet."""
    port: Int = 0
    """Port on 127.0.0.1; 0 takes a free one."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ArgumentError(f"port={self.port} must be between 0 and 65535.")


@dataclass(frozen=True)
class CacheConfig:
    """Show the token ids that are kept between runs, so that texts are tokenised once; or remove some of them."""

    action: tyro.conf.Positional[Annotated[Literal["show", "clear"], tyro.conf.arg(metavar="[show|clear]")]] = "show"
    """clear removes everything; the next run tokenises again."""
    max_size: Annotated[str | None, shown("SIZE")] = None
    """Remove what was unused for longest until this is kept, as 2GB or 500MB."""
    max_age: Annotated[str | None, shown("TIME")] = None
    """Remove what no run used for so long, as 30d or 12h."""

    def __post_init__(self) -> None:
        if self.action == "clear" and (self.max_size or self.max_age):
            raise ArgumentError("clear removes everything; leave --max-size and --max-age out, or leave clear out.")
        for name, parse in (("max_size", bytes_of), ("max_age", seconds_of)):
            if getattr(self, name) is not None:
                parse(name, getattr(self, name))


@dataclass(frozen=True)
class DemoConfig:
    """Fine-tune an embedding model to find functions by what they do, and show whether it got better."""

    minutes: float = 6.0
    """Time for training and evaluation together; the number of steps follows from it."""
    steps: int | None = None
    """Exact number of training steps, instead of as many as fit into `minutes`."""
    path: Path | None = None
    """Folder with your own Python code; without it, the standard library of this Python."""
    model: str | None = None
    """Folder or Hub name of the model to tune; without it, all-MiniLM-L6-v2 from the package of the extra `demo`."""
    out: Path = Path("embtune-demo")
    """Folder for results.json, the merged model and the GGUF file."""
    engine: str = "auto"
    """How training runs: `auto` takes the fastest engine that is proven for this model, `reference` the plain one."""
    batch_size: int = 64
    """Pairs in a batch; every other pair of the batch is a negative."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    held_out: int = 500
    """Largest number of queries in the evaluation, and in the forgetting check."""
    seed: int = 0
    """Which modules are held out, and the order of training."""

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise ArgumentError(f"--minutes {self.minutes} must be more than 0.")
        if self.steps is not None and self.steps < 1:
            raise ArgumentError(f"--steps {self.steps} must be at least 1; leave it out to fill --minutes.")
        if self.batch_size < 2:
            raise ArgumentError(f"--batch-size {self.batch_size}: a pair needs others in its batch as negatives.")
        if not self.learning_rate > 0:
            raise ArgumentError(f"--learning-rate {self.learning_rate} must be more than 0.")
        check_place("--out", self.out)
