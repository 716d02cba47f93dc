"""What `embtune train` can be told: flags, keys of its config files and help all follow from these dataclasses."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from embtune.cli.export_choice import ExportChoice
from embtune.cli.flags import Float, Int, MaybeFloat, MaybeInt, Pairs, Sources, Switch, shown
from embtune.cli.loss_table import about_unknown
from embtune.cli.mistakes import ConfigError, Mistake
from embtune.cli.train_details import TASKS, TrainDetails
from embtune.errors import ArgumentError

COMMAND_OPTIONS = ("config", "resume", "dry_run", "quiet", "json")
"""Options that say nothing about the run itself; no config file has them."""

DTYPES = ("bfloat16", "bf16", "float16", "fp16", "float32", "fp32")
"""The keys of `embtune.runtime.DTYPES`, which imports torch."""

_ELSEWHERE: Mapping[str, Mapping[str, str]] = {
    "model_args": {"random_state": "seed", "use_gradient_checkpointing": "gradient_checkpointing"}
    | {name: name for name in ("max_seq_length", "dtype", "load_in_4bit", "load_in_8bit", "full_finetuning")}
    | {name: name for name in ("pooling_mode", "engine")},
    "lora_args": {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "random_state": "seed"}
    | {"target_modules": "lora_targets", "use_gradient_checkpointing": "gradient_checkpointing"},
    "training_args": {"output_dir": "output", "num_train_epochs": "epochs", "lr_scheduler_type": "scheduler"}
    | {"per_device_train_batch_size": "batch_size", "warmup_steps": "warmup", "eval_strategy": "eval_steps"}
    | {"save_strategy": "save_steps", "load_best_model_at_end": "early_stopping_patience", "bf16": "dtype"}
    | {"fp16": "dtype", "gradient_checkpointing": "gradient_checkpointing", "dataset_weights": "weights"}
    | {name: name for name in ("max_steps", "learning_rate", "seed", "batch_sampler", "prompts", "compile")}
    | {name: name for name in ("token_cache", "eval_steps", "save_steps", "report_to", "columns")},
}
"""Arguments of the library that have an option of their own here."""


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tune an embedding model, and show what it gained. --help-more says more."""

    model: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """Model to tune: folder, adapter folder or Hub name."""
    data: Sources
    """Rows to train on: files or Hub names; several as NAME=FILE."""
    columns: Pairs = field(default_factory=dict)
    """Their columns, as question=anchor; of one of several: NAME.question=anchor."""
    eval_data: Annotated[Sources, shown("DATA…")] = field(default_factory=dict)
    """Held-out pairs, scored sentences, BEIR folders: measured before and after."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("embtune-run")
    """Folder for all that the run leaves."""
    config: Annotated[Path | None, shown("FILE")] = None
    """YAML of these names, paths relative to it; flags win. May stand first."""
    resume: Annotated[Path | None, shown("RUN")] = None
    """Go on with the run in this folder, with the options that it began with."""
    dry_run: Switch = False
    """Check everything, time a few steps, train and write nothing."""
    quiet: Switch = False
    """Show warnings and errors only."""
    json: Switch = False
    """Print each event as a line of JSON, and nothing else."""
    epochs: MaybeFloat = None
    """Passes over the data; without it and --max-steps, one."""
    max_steps: MaybeInt = None
    """Training steps, instead of epochs."""
    batch_size: Int = 64
    """Rows in a batch, where negatives come from."""
    learning_rate: MaybeFloat = None
    """Peak; without it 2e-4 for adapters, 2e-5 for whole models."""
    max_seq_length: MaybeInt = None
    """Longest text in tokens; without, the model's own."""
    loss: Annotated[str, tyro.conf.arg(metavar="NAME")] = "MultipleNegativesRankingLoss"
    """Any of sentence-transformers'."""
    lora_r: Int = 16
    """Rank of the LoRA adapters."""
    lora_alpha: Float = 32
    """Scale of the adapters: alpha / rank."""
    load_in_4bit: Switch = False
    """Hold the base weights in 4 bits (QLoRA)."""
    full_finetuning: Switch = False
    """Train all weights instead of adapters."""
    exports: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FORMAT…")] = ("merged",)
    """What to save: merged, gguf:q8_0, torchao:int8_dynamic, onnx:int8, openvino …"""
    seed: Int = 0
    """Of the first weights and the order of rows."""
    more: tyro.conf.OmitArgPrefixes[TrainDetails] = field(default_factory=TrainDetails)
    """The less common options."""

    def __post_init__(self) -> None:
        found = [*self._out_of_range(), *self._contradictions(), *self._unknown_names(), *self._given_elsewhere()]
        if found:
            raise ConfigError(found)

    def _out_of_range(self) -> Iterator[Mistake]:
        options = self.flat()
        least = {"max_steps": 1, "batch_size": 1, "max_seq_length": 1, "lora_r": 1, "seed": 0, "warmup": 0}
        least |= dict.fromkeys(("eval_steps", "save_steps", "early_stopping_patience", "eval_k"), 1)
        for name, smallest in least.items():
            if options[name] is not None and not options[name] >= smallest:
                yield Mistake(f"{name}={options[name]} must be at least {smallest}.", (name,))
        if self.more.warmup > 1 and self.more.warmup % 1:
            text = f"warmup={self.more.warmup} is no whole number of steps; below 1 it is their share of all steps."
            yield Mistake(text, ("warmup",))
        for name in ("epochs", "learning_rate", "lora_alpha"):
            if options[name] is not None and not 0 < options[name] < float("inf"):
                yield Mistake(f"{name}={options[name]} must be more than 0.", (name,))
        if 1 < (self.learning_rate or 0) < float("inf"):
            yield Mistake(f"learning_rate={self.learning_rate} must be at most 1; 2e-4 is usual.", ("learning_rate",))
        for name, weight in self.more.weights.items():
            if not 0 < weight < float("inf"):
                yield Mistake(f"weights: {name}={weight} must be more than 0.", ("weights",))
        if not 0 <= self.more.lora_dropout < 1:
            text = f"lora_dropout={self.more.lora_dropout} must be at least 0 and less than 1."
            yield Mistake(text, ("lora_dropout",))
        if any(dimensions < 1 for dimensions in self.more.matryoshka_dims):
            text = f"matryoshka_dims={list(self.more.matryoshka_dims)}: dimensions are numbers from 1 up."
            yield Mistake(text, ("matryoshka_dims",))

    def _contradictions(self) -> Iterator[Mistake]:
        more = self.more
        if self.epochs is not None and self.max_steps is not None:
            yield Mistake(
                f"epochs={self.epochs} and max_steps={self.max_steps} exclude each other; give one "
                "(--epochs None takes back what a file says).",
                ("epochs", "max_steps"),
            )
        options = self.flat()
        on = tuple(name for name in ("load_in_4bit", "full_finetuning", "load_in_8bit") if options[name])
        if len(on) > 1:
            yield Mistake(f"{' and '.join(on)} exclude each other; give one.", on)
        if self.full_finetuning and (settings := self.lora_settings()):
            text = f"full_finetuning has no adapters; leave {', '.join(settings)} out."
            yield Mistake(text, ("full_finetuning", *settings))
        about_evaluation = ("eval_steps", "eval_columns", "eval_split", "eval_tasks", "eval_train_data", "eval_k")
        if not self.eval_data and (given := [name for name in about_evaluation if options[name]]):
            verb = "needs" if len(given) == 1 else "need"
            yield Mistake(f"{', '.join(given)} {verb} eval_data.", (*given, "eval_data"))
        patience = ("early_stopping_patience", "eval_steps")
        if more.early_stopping_patience and more.eval_steps is None:
            yield Mistake("early_stopping_patience counts evaluations while training; set eval_steps too.", patience)
        elif more.early_stopping_patience and (more.save_steps or 0) % (more.eval_steps or 1):
            yield Mistake(
                f"save_steps={more.save_steps} must be a multiple of eval_steps={more.eval_steps}, so that the best "
                "model is among the saved ones; or leave save_steps out.",
                (*patience, "save_steps"),
            )
        if self.quiet and self.json:
            yield Mistake("quiet and json exclude each other; json prints nothing else anyway.", ("quiet", "json"))

    def _unknown_names(self) -> Iterator[Mistake]:
        if not self.data:
            yield Mistake("data names no file to train on.", ("data",))
        for option, loss in (("loss", self.loss), *(("losses", loss) for loss in self.more.losses.values())):
            if about := about_unknown(loss):
                yield Mistake(f"{option}: {about}", (option,))
        if self.more.weights and len(self.data) == 1:
            yield Mistake("weights need several data sets.", ("weights", "data"))
        for option in ("losses", "weights"):
            yield from _strangers(option, getattr(self.more, option), "data", self.data)
        for option in ("eval_tasks", "eval_train_data"):
            yield from _strangers(option, getattr(self.more, option), "eval_data", self.eval_data)
        yield from self._about_tasks()
        if self.more.dtype is not None and self.more.dtype.removeprefix("torch.").lower() not in DTYPES:
            yield Mistake(f"dtype={self.more.dtype} is not known; use one of {', '.join(DTYPES)} or None.", ("dtype",))
        for name in self.more.losses:
            if not isinstance(self.more.loss_args.get(name, {}), Mapping):
                text = f"loss_args: {name} has a loss of its own; write its arguments as {name}: {{argument: value}}."
                yield Mistake(text, ("loss_args",))
        choices = []
        for export in self.exports:
            try:
                choices.append(ExportChoice.parse(export))
            except ArgumentError as error:
                yield Mistake(str(error), ("exports",))
        if len(set(choices)) < len(choices):
            yield Mistake(f"exports={list(self.exports)} names one of them twice.", ("exports",))

    def _about_tasks(self) -> Iterator[Mistake]:
        tasks, probes = self.more.eval_tasks, self.more.eval_train_data
        for name, task in tasks.items():
            if task not in TASKS:
                yield Mistake(f"eval_tasks: {name}={task}: there are {', '.join(TASKS)}.", ("eval_tasks",))
            elif task == "classification" and name not in probes:
                text = f"eval_tasks: {name}=classification needs eval_train_data: {name}=FILE for its probe."
                yield Mistake(text, ("eval_tasks",))
        for name in probes:
            if name in self.eval_data and tasks.get(name) != "classification":
                text = f"eval_train_data: {name} is for a classification; say so (eval_tasks: {name}=classification)."
                yield Mistake(text, ("eval_train_data",))

    def _given_elsewhere(self) -> Iterator[Mistake]:
        for option, own in _ELSEWHERE.items():
            for name in getattr(self.more, option):
                if name in own:
                    yield Mistake(f"{option}: {name} has an option of its own: {own[name]}.", (option,))

    def lora_settings(self) -> dict[str, Any]:
        """The LoRA settings that differ from the defaults."""
        settings = {name: value for name, value in self.flat().items() if name.startswith("lora_")}
        # What a dataclass makes anew for each config, an empty mapping here, is no attribute of the class.
        defaults = {name: getattr(TrainConfig, name, getattr(TrainDetails, name, {})) for name in settings}
        return {name: value for name, value in settings.items() if value != defaults[name]}

    def loss_of(self, name: str) -> str:
        """The name of the loss of a data set."""
        return self.more.losses.get(name, self.loss)

    def loss_args_of(self, name: str) -> Mapping[str, Any]:
        """The arguments of a data set's loss: those under its name, or for a loss without its own those beside them."""
        if name in self.more.losses:
            own: Mapping[str, Any] = self.more.loss_args.get(name, {})
            return own
        return {key: value for key, value in self.more.loss_args.items() if key not in self.more.losses}

    def columns_of(self, name: str) -> Mapping[str, str]:
        """The roles of a data set's columns: those written with its name and a dot, else those without one."""
        return _own_columns(name, self.data, self.columns)

    def eval_columns_of(self, name: str) -> Mapping[str, str]:
        """The roles of an evaluation data set's columns: as of training data, where eval_columns says nothing else."""
        if Path(self.eval_data[name]).expanduser().is_dir():
            return {}  # a BEIR folder has its own
        if not self.more.eval_columns:
            return self.columns_of(name)
        return _own_columns(name, self.eval_data, self.more.eval_columns)

    def flat(self) -> dict[str, Any]:
        """Every option of the run by its name, as a config file writes it."""
        options = {**vars(self), **vars(self.more)}
        return {name: value for name, value in options.items() if name not in ("more", *COMMAND_OPTIONS)}


def _own_columns(name: str, sources: Mapping[str, str], columns: Mapping[str, str]) -> Mapping[str, str]:
    """Of several data sets: what is written with the name of this one and a dot, else what is written without one."""
    if len(sources) == 1:
        return columns
    owners = {key: next((each for each in sources if key.startswith(f"{each}.")), None) for key in columns}
    own = {key.removeprefix(f"{name}."): role for key, role in columns.items() if owners[key] == name}
    return own or {key: role for key, role in columns.items() if owners[key] is None}


def _strangers(option: str, given: Mapping[str, Any], owner: str, known: Mapping[str, str]) -> Iterator[Mistake]:
    for name in given:
        if name not in known:
            text = f"{option}: {owner} has no data set {name!r}; it has {', '.join(known) or 'none'}."
            yield Mistake(text, (option, owner))


@dataclass(frozen=True)
class EverydayTrainConfig(TrainConfig):
    __doc__ = TrainConfig.__doc__

    more: tyro.conf.Suppress[TrainDetails] = field(default_factory=TrainDetails)
    """Left out, so that the help fits a screen."""
