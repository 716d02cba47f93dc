"""What each verb can be told: frozen dataclasses, from which flags, keys of a config file and help follow."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from embtune.cli.flags import (
    Float,
    Int,
    Ints,
    MaybeFloat,
    MaybeInt,
    MaybeText,
    Pairs,
    Sources,
    Switch,
    Texts,
    Values,
    bytes_of,
    seconds_of,
    shown,
)
from embtune.cli.places import check_place
from embtune.errors import ArgumentError

QUANTIZATIONS: Mapping[str, tuple[str, ...]] = {
    "merged": ("16bit", "32bit"),
    "gguf": ("q8_0", "f16", "bf16", "f32"),
    "torchao": ("int8_weight_only", "int8_dynamic"),
}
"""Formats of an export and their quantisations; the first is what a GGUF or TorchAO export gets by default."""


def _at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ArgumentError(f"{name}={value} must be at least {least}.")


def _above_zero(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ArgumentError(f"{name}={value} must be more than 0.")


@dataclass(frozen=True)
class TrainDetails:
    """Less common options of `embtune train`; they are flags and keys of --config like the others."""

    eval_columns: Pairs = field(default_factory=dict)
    """Roles of the evaluation data's columns, where they differ from --columns."""
    eval_split: MaybeText = None
    """Split of the evaluation data: BEIR folder (test) or Hub (train)."""
    eval_steps: MaybeInt = None
    """Evaluate after every N steps of training."""
    save_steps: MaybeInt = None
    """Save a checkpoint every N steps; without, after every epoch."""
    early_stopping_patience: MaybeInt = None
    """Stop after N evaluations without gain, and keep the best model."""
    pooling_mode: MaybeText = None
    """Pooling, such as mean or cls; without, the model's own."""
    dtype: MaybeText = None
    """Of the base weights: float32, bfloat16, float16; without, by hardware."""
    load_in_8bit: Switch = False
    """Hold the base weights in 8 bits."""
    engine: Literal["auto", "packed", "reference"] = "auto"
    """How training runs; auto is the fastest that is proven for the model."""
    gradient_checkpointing: Switch = False
    """Recompute layers in the backward pass: less memory, slower."""
    compile: Literal["auto", "never", "always"] = "auto"
    """Compile the layers; auto does where the run is long enough to pay."""
    token_cache: Switch = True
    """Texts are tokenised once, for all epochs and later runs, unless --no-token-cache."""
    lora_dropout: Float = 0.0
    """Dropout before the adapters."""
    lora_targets: Texts = ()
    """Linear layers to adapt; without, those of the architecture."""
    loss_args: Values = field(default_factory=dict)
    """Arguments of the loss, as scale=30."""
    matryoshka_dims: Ints = ()
    """Train embeddings that can be cut to these dimensions."""
    prompts: Pairs = field(default_factory=dict)
    """Text before each column's texts, as anchor="query: "."""
    batch_sampler: Literal["batch_sampler", "no_duplicates", "group_by_label"] = "batch_sampler"
    """How batches are drawn; no_duplicates keeps equal texts apart."""
    warmup: Float = 0.1
    """Steps until the learning rate's peak; below 1, their share of all steps."""
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = "linear"
    """Course of the learning rate after the warm-up."""
    report_to: Texts = ()
    """Trackers, as the Hugging Face Trainer names them (tensorboard, wandb …)."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "eval_steps", "save_steps", "early_stopping_patience")
        _at_least(self, 0, "warmup")
        if not 0 <= self.lora_dropout < 1:
            raise ArgumentError(f"lora_dropout={self.lora_dropout} must be at least 0 and less than 1.")
        if any(dimensions < 1 for dimensions in self.matryoshka_dims):
            raise ArgumentError(f"matryoshka_dims={list(self.matryoshka_dims)}: dimensions are numbers from 1 up.")
        if self.early_stopping_patience and self.eval_steps is None:
            raise ArgumentError("early_stopping_patience counts evaluations while training; set eval_steps too.")
        if self.early_stopping_patience and (self.save_steps or 0) % (self.eval_steps or 1):
            raise ArgumentError(
                f"save_steps={self.save_steps} must be a multiple of eval_steps={self.eval_steps}, so that the best "
                "model is among the saved ones; or leave save_steps out."
            )


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune an embedding model on your pairs, and show what it gained. --help-more shows further options."""

    model: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """Model to tune: folder, adapter folder or Hub name."""
    data: Sources
    """Rows to train on (.jsonl .csv .tsv .parquet, or a Hub name); several as NAME=FILE NAME=FILE."""
    columns: Pairs = field(default_factory=dict)
    """Roles of your columns, as question=anchor answer=positive; known names need none."""
    eval_data: Annotated[str | None, shown("DATA")] = None
    """Held-out pairs, scored sentences, or a BEIR folder: measured before and after."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("embtune-run")
    """Folder for the model, checkpoints and results."""
    config: Annotated[Path | None, shown("FILE")] = None
    """YAML file with these names as keys; flags win over it. May stand first: embtune train FILE.yaml."""
    resume: Switch = False
    """Go on from the newest checkpoint in --output."""
    epochs: MaybeFloat = None
    """Passes over the data; without it and --max-steps, one."""
    max_steps: MaybeInt = None
    """Training steps, instead of epochs."""
    batch_size: Int = 64
    """Rows in a batch; most losses take their negatives from it."""
    learning_rate: MaybeFloat = None
    """Peak; without it 2e-4 for adapters, 2e-5 for whole models."""
    max_seq_length: MaybeInt = None
    """Longest text in tokens; without, the model's own."""
    loss: Annotated[str, tyro.conf.arg(metavar="NAME")] = "MultipleNegativesRankingLoss"
    """Any of sentence-transformers but AdaptiveLayerLoss and Matryoshka2dLoss; MatryoshkaLoss is matryoshka_dims."""
    lora_r: Int = 16
    """Rank of the LoRA adapters."""
    lora_alpha: Float = 32
    """Scale of the adapters: alpha / rank."""
    load_in_4bit: Switch = False
    """Hold the base weights in 4 bits (QLoRA)."""
    full_finetuning: Switch = False
    """Train all weights instead of adapters."""
    exports: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FORMAT…")] = ("merged",)
    """What to save: merged, gguf:q8_0, torchao:int8_weight_only …"""
    seed: Int = 0
    """Of the adapters' first weights and the order of rows."""
    more: tyro.conf.OmitArgPrefixes[TrainDetails] = field(default_factory=TrainDetails)
    """The less common options."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_steps", "batch_size", "max_seq_length", "lora_r")
        _at_least(self, 0, "seed")
        _above_zero(self, "epochs", "learning_rate", "lora_alpha")
        if self.epochs is not None and self.max_steps is not None:
            raise ArgumentError(
                f"epochs={self.epochs} and max_steps={self.max_steps} exclude each other; give one "
                "(--epochs None takes back what a file says)."
            )
        on = [name for name in ("load_in_4bit", "full_finetuning") if getattr(self, name)]
        on += ["load_in_8bit"] if self.more.load_in_8bit else []
        if len(on) > 1:
            raise ArgumentError(f"{' and '.join(on)} exclude each other; give one.")
        if self.full_finetuning and self.lora_settings():
            raise ArgumentError(f"full_finetuning has no adapters; leave {', '.join(self.lora_settings())} out.")
        if self.eval_data is None and (self.more.eval_steps or self.more.eval_columns or self.more.eval_split):
            raise ArgumentError("eval_steps, eval_columns and eval_split need eval_data.")
        if not self.data:
            raise ArgumentError("data names no file to train on.")
        if len({ExportChoice.parse(export) for export in self.exports}) < len(self.exports):
            raise ArgumentError(f"exports={list(self.exports)} names one of them twice.")

    def lora_settings(self) -> dict[str, Any]:
        """The LoRA settings that differ from the defaults."""
        defaults = {each.name: each.default for each in (*fields(self), *fields(self.more))}
        settings = {name: value for name, value in self.flat().items() if name.startswith("lora_")}
        return {name: value for name, value in settings.items() if value != defaults[name]}

    def flat(self) -> dict[str, Any]:
        """Every option by its name, as a config file writes it."""
        options = {**vars(self), **vars(self.more)}
        del options["more"]
        return options


@dataclass(frozen=True)
class EverydayTrainConfig(TrainConfig):
    __doc__ = TrainConfig.__doc__

    more: tyro.conf.Suppress[TrainDetails] = field(default_factory=TrainDetails)
    """Left out, so that the help fits a screen."""


@dataclass(frozen=True)
class ExportChoice:
    """A format with its quantisation, as `gguf:q8_0` writes it."""

    format: str
    """A key of `QUANTIZATIONS`."""
    quantization: str | None
    """One of its values; None only for a merged model, which then keeps the checkpoint's dtype."""

    @classmethod
    def parse(cls, text: str) -> "ExportChoice":
        """Read `FORMAT` or `FORMAT:QUANTISATION`.

        Raises:
            ArgumentError: one of them does not exist.
        """
        name, _, quantization = text.partition(":")
        return cls.of(name, quantization or None, f"exports: {text!r}")

    @classmethod
    def of(cls, name: str, quantization: str | None, what: str) -> "ExportChoice":
        """Check a format and its quantisation; `what` begins the message."""
        if name not in QUANTIZATIONS:
            raise ArgumentError(f"{what} is no format; there are {', '.join(QUANTIZATIONS)}.")
        known = QUANTIZATIONS[name]
        if quantization is not None and quantization not in known:
            raise ArgumentError(f"{what}: {name} has no quantization {quantization!r}; it has {', '.join(known)}.")
        if quantization is None and name != "merged":
            quantization = known[0]
        return cls(name, quantization)

    @property
    def folder_name(self) -> str:
        """Where it is saved within a run's folder; GGUF files, which carry their quantisation, share one."""
        return self.format if self.format == "gguf" else str(self).replace(":", "-")

    def __str__(self) -> str:
        return f"{self.format}:{self.quantization}" if self.quantization else self.format


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure one or more models on the same data; with several, the first is what the others are compared with."""

    models: tyro.conf.Positional[Annotated[tuple[str, ...], shown("MODEL…")]]
    """Folders, adapter folders or Hub names."""
    data: Annotated[str, tyro.conf.arg(metavar="DATA")]
    """BEIR folder, pairs (anchor, positive), sentence1, sentence2 and score, or text and label."""
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
    """Of the weights; bfloat16 is faster on a GPU, and rounds."""
    json: Switch = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "k", "batch_size", "max_seq_length")
        if not self.models:
            raise ArgumentError("Name at least one model to evaluate.")
        for model in self.models:
            if self.models.count(model) > 1:
                raise ArgumentError(f"models: {model} is named twice.")


@dataclass(frozen=True)
class ExportConfig:
    """Save a model, or an adapter with its base, for use elsewhere; the result is checked against the original."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """Adapter folder, whole model's folder or Hub name."""
    format: Literal["merged", "gguf", "torchao"]
    """merged: sentence-transformers and servers; gguf: llama.cpp; torchao: 8-bit PyTorch."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder to write."""
    quantization: MaybeText = None
    """gguf: q8_0 (default), f16, bf16, f32; torchao: int8_weight_only (default), int8_dynamic; merged: 16bit, 32bit."""

    def __post_init__(self) -> None:
        ExportChoice.of(self.format, self.quantization, "quantization")
        check_place("out", self.out)
        if self.out.exists() and Path(self.model).exists() and self.out.samefile(self.model):
            raise ArgumentError(f"out={self.out} is the model's own folder; give another.")


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
