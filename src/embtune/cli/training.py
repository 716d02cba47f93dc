"""A training run once its data is read: load, look ahead, measure, train, measure again, save."""

import signal
import sys
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from sentence_transformers import SentenceTransformer
from torch import nn

from embtune.accelerate.breakeven import decide
from embtune.api import FastSentenceTransformer
from embtune.cli.display import duration, print_commands, working
from embtune.cli.export import check_export, save_export_for_report, usage
from embtune.cli.export_choice import ExportChoice
from embtune.cli.fitting import BeginCallback, TaskEvaluator, check_trainer_options, fit, make_trainer
from embtune.cli.loss_choice import make_loss
from embtune.cli.measuring import BeforeAndAfter, ready_prompts
from embtune.cli.measuring_again import measure_again
from embtune.cli.preflight import Preflight
from embtune.cli.reading import RunData
from embtune.cli.resuming import about_changes
from embtune.cli.run_folder import RunFolder
from embtune.cli.stopping import GracefulStop
from embtune.cli.train_config import TrainConfig
from embtune.cli.trial import timed_steps
from embtune.errors import ArgumentError
from embtune.evaluate.compare import Comparison
from embtune.export.card import DataFacts, describe_training, metric_changes
from embtune.models.modules import transformer_modules
from embtune.report.events import EventLog
from embtune.report.lengths import measure_lengths
from embtune.report.page import write_report
from embtune.runtime import describe_machine
from embtune.train.checkpoint_folders import last_whole_checkpoint, remove_unfinished, step_of
from embtune.train.compiling import compile_settings, tokens_per_step
from embtune.train.estimate import estimate_run
from embtune.train.run_checks import check_run
from embtune.train.trainer import SentenceTransformerTrainer

# What the model card does not list among the settings: files and folders of one machine, and what changes no weight.
_NOT_ON_CARD = (
    *("model", "data", "columns", "eval_data", "eval_columns", "eval_train_data"),
    *("output", "exports", "token_cache"),
)

_CHECKPOINTING: Mapping[str, bool | str] = {"none": False, "selective": "selective", "whole": True}

Loss: TypeAlias = nn.Module | Mapping[str, nn.Module]


def train(config: TrainConfig, run: RunFolder, data: RunData, settings: Mapping[str, Any], console: Console) -> int:
    """Run the training and return the exit code: 0, or 128 and the number of the signal that stopped it.

    Args:
        settings: what run.json keeps, but for the machine.
    """
    log = EventLog(run.path, resume=config.resume is not None, echo=sys.stdout if config.json else None)
    stop = GracefulStop(console)
    machine = describe_machine()
    try:
        with stop.listening(), run.without_remains(), log.run("train", settings["config"], machine):
            results = _train(config, run, data, settings, stop, log, console)
        with working(console, "Writing the report"):
            page = write_report([run.path])
    except KeyboardInterrupt:
        run.say_stopped(console)
        return 128 + (stop.signal or signal.SIGINT)
    _show_next(config, run, data, results, page, console)
    return 0


def dry_run(
    config: TrainConfig, data: RunData, options: Mapping[str, Any], console: Console, warned: Collection[str]
) -> int:
    """Load and check everything, time a few steps, show what a run would do, and return the exit code.

    Args:
        options: as run.json would keep them.
        warned: what there was to warn of, up to the moment at which it is looked at.
    """
    log = EventLog(None, echo=sys.stdout if config.json else None)
    model, loss = _prepare(config, console, log)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, folder, model, loss, data.train)
        run = RunFolder(config.output)
        checkpoint = last_whole_checkpoint(run.checkpoints) if config.resume is not None else None
        if checkpoint is not None:
            _show_changes(run, options, step_of(checkpoint), console)
        preflight = _preflight(config, trainer, data, checkpoint)
    with working(console, "Timing a few steps", log):
        seconds, memory = timed_steps(config, model, loss, data.train)
    estimate = replace(preflight.estimate, step_seconds=seconds, measured=True)
    estimate = replace(estimate, memory=memory or estimate.memory)
    compiling = decide(config.more.compile, steps_left=estimate.steps, **compile_settings(trainer)).reason
    preflight = replace(preflight, estimate=estimate, compiling=compiling)
    log.write("preflight", **preflight.to_dict())
    preflight.show(console)
    _say_ready(console, warned)
    return 0


def _say_ready(console: Console, warned: Collection[str]) -> None:
    nothing = "nothing was trained, nothing written"
    if not warned:
        console.print(f"Everything is in order; {nothing}.", style="bold green")
        return
    several = f"{len(warned)} warnings" if len(warned) > 1 else "1 warning"
    console.print(f"Ready to train, with {several}; {nothing}:", style="bold yellow")
    for warning in warned:
        console.print(f"- {warning}", style="yellow", markup=False, soft_wrap=True)


def _train(
    config: TrainConfig,
    run: RunFolder,
    data: RunData,
    settings: Mapping[str, Any],
    stop: GracefulStop,
    log: EventLog,
    console: Console,
) -> Mapping[str, Any]:
    """Returns what results.json holds."""
    model, loss = _prepare(config, console, log)
    checkpoint = last_whole_checkpoint(run.checkpoints) if config.resume is not None else None
    if checkpoint is not None:
        remove_unfinished(run.checkpoints)
        _show_changes(run, settings["config"], step_of(checkpoint), console)
    ready_prompts(config, model, data, console)
    evaluator = TaskEvaluator(data.tasks, console, log) if config.more.eval_steps else None
    trainer = make_trainer(config, str(run.checkpoints), model, loss, data.train, evaluator)
    preflight = _preflight(config, trainer, data, checkpoint)
    log.write("preflight", **preflight.to_dict())
    if preflight.lengths is not None:
        log.write("lengths", **preflight.lengths)
    preflight.show(console)
    measured = BeforeAndAfter(data, console, log)
    measured.before(model)
    log.phase("Preparing the data")
    kept = {**settings, "machine": describe_machine(model.device)}
    begin = BeginCallback(lambda: run.write_settings(kept))
    resumed = None if checkpoint is None else str(checkpoint)
    facts = fit(trainer, preflight.real_tokens, console, log, [begin, stop], resumed)
    stop.raise_if_asked()
    console.print(f"Trained {facts.steps:,} steps in {duration(facts.seconds)}.")
    measured.after(model)
    _describe(config, model, data, measured.by_data)
    how = {"max_seq_length": model.max_seq_length, "dtype": str(model.dtype).removeprefix("torch.")}
    results: dict[str, Any] = {"training": asdict(facts), "measured": how, **measured.results(), "exports": {}}
    run.write_results(results)
    for choice in map(ExportChoice.parse, config.exports):
        folder = run.path / choice.folder_name
        with working(console, f"Saving as {choice} in {folder}", log):
            results["exports"][str(choice)] = str(save_export_for_report(model, choice, folder, log))
        run.write_results(results)  # after each, so that it says what is there
    return results


def _prepare(config: TrainConfig, console: Console, log: EventLog) -> tuple[FastSentenceTransformer, Loss]:
    """The model and its loss, or one for each data set, with everything checked that would fail later."""
    check_trainer_options(config)
    with working(console, f"Loading {config.model}", log):
        model = _load_model(config)
    for export in config.exports:
        check_export(model, ExportChoice.parse(export))
    made = {
        name: make_loss(config.loss_of(name), config.loss_args_of(name), model, config.more.matryoshka_dims)
        for name in (config.data if config.more.losses else [next(iter(config.data))])
    }
    return model, made if len(made) > 1 else next(iter(made.values()))


def _show_changes(run: RunFolder, options: Mapping[str, Any], step: int, console: Console) -> None:
    changes = list(about_changes(run.settings["config"], options, run.changed_options(options), step))
    if changes:
        listed = "".join(f"\n- {change}" for change in changes)
        console.print(f"Not as when this run began:{listed}", style="yellow", soft_wrap=True)


def _preflight(
    config: TrainConfig, trainer: SentenceTransformerTrainer, data: RunData, checkpoint: Path | None
) -> Preflight:
    """What is known before training; of a run that goes on from a checkpoint, for the steps that are left."""
    check_run(trainer)
    model = trainer.model
    lengths = measure_lengths(model, data.train, config.batch_size, config.more.prompts)
    real = computed = float(tokens_per_step(trainer))
    read = 0.0
    if lengths is not None:
        real = computed = config.batch_size * trainer.args.gradient_accumulation_steps * lengths["tokens_per_row"]
        read = lengths["tokens_read"]
        if not lengths["packed"]:
            computed = real / (1 - lengths["padding"])
    estimate = estimate_run(trainer, computed, read)
    if checkpoint is not None:
        estimate = replace(estimate, steps=max(0, estimate.steps - step_of(checkpoint)))
    return Preflight(data, lengths, real, model.explain(), estimate)


def _load_model(config: TrainConfig) -> FastSentenceTransformer:
    """The model, ready to be trained as the config says."""
    more = config.more
    model = FastSentenceTransformer.from_pretrained(
        config.model,
        max_seq_length=config.max_seq_length,
        dtype=more.dtype,
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=more.load_in_8bit,
        full_finetuning=config.full_finetuning,
        pooling_mode=more.pooling_mode,
        use_gradient_checkpointing=_CHECKPOINTING[more.gradient_checkpointing],
        random_state=config.seed,
        engine=more.engine,
        **more.model_args,
    )
    if config.full_finetuning:
        return model
    if any(isinstance(transformer.model, PeftModel) for transformer in transformer_modules(model)):
        if settings := config.lora_settings():
            raise ArgumentError(
                f"{config.model} is an adapter, which is trained on as it is; leave {', '.join(settings)} out, or "
                "merge it first (embtune export) to put another adapter on it."
            )
        return model
    return FastSentenceTransformer.get_peft_model(
        model,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=more.lora_dropout,
        target_modules=list(more.lora_targets) or None,
        random_state=config.seed,
        **more.lora_args,
    )


def _describe(
    config: TrainConfig, model: SentenceTransformer, data: RunData, comparisons: Mapping[str, Comparison]
) -> None:
    """Fill the model card that every save writes."""
    settings = {name: value for name, value in config.flat().items() if name not in _NOT_ON_CARD}
    describe_training(
        model,
        settings={name: value for name, value in settings.items() if value not in (None, (), {})},
        metrics={name: metric_changes(comparison) for name, comparison in comparisons.items()},
        base_model=config.model,
        data=[_facts(source, data.train[name]) for name, source in config.data.items()],
    )


def _facts(source: str, dataset: Dataset) -> DataFacts:
    on_hub = not Path(source).expanduser().exists()
    name = source.partition(":")[0] if on_hub else Path(source).name
    return DataFacts(name, len(dataset), dataset.column_names, hub_id=name if on_hub else None)


def _show_next(
    config: TrainConfig, run: RunFolder, data: RunData, results: Mapping[str, Any], page: Path, console: Console
) -> None:
    exports: Mapping[str, str] = results["exports"]
    done = f"\nDone. What happened is on the page {page}; all numbers are in {run.path / 'results.json'}."
    console.print(done, style="bold green", soft_wrap=True)
    commands = [usage(ExportChoice.parse(name), Path(saved)) for name, saved in exports.items()]
    merged = next((saved for name, saved in exports.items() if name.startswith("merged")), None)
    if not config.eval_data:
        with_data = "embtune train … --eval-data held-out.jsonl"
        commands.append(("Nothing was measured; with held-out pairs in a file:", with_data))
    elif merged is not None:
        commands.append(measure_again(config, merged, data.tasks, results["measured"]))
    print_commands(console, commands)
