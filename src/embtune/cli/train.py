"""`embtune train`: read and check, load, measure, train, measure again, save, and say how to go on."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from sentence_transformers import SentenceTransformer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from embtune.api import FastSentenceTransformer
from embtune.cli.config import ExportChoice, TrainConfig
from embtune.cli.display import duration, make_console, print_commands, working
from embtune.cli.export import check_export, save_export_for_report, usage
from embtune.cli.fitting import fit
from embtune.cli.loss_choice import check_labels, check_loss, make_loss
from embtune.cli.run_folder import RunFolder
from embtune.cli.tasks import EvaluationTask
from embtune.data.checks import check_training_data
from embtune.data.readers import read_dataset
from embtune.errors import ArgumentError
from embtune.evaluate.compare import Comparison, compare
from embtune.export.card import DataFacts, describe_training, metric_changes
from embtune.models.modules import transformer_modules
from embtune.report.events import EventLog
from embtune.report.evidence import Evidence
from embtune.report.page import write_report
from embtune.runtime import describe_machine
from embtune.train.prompts import remember_prompts

INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended

# What the model card does not list among the settings: files and folders of one machine, and what changes no weight.
_NOT_ON_CARD = (
    *("model", "data", "columns", "eval_data", "eval_columns", "output", "config", "resume", "exports"),
    "token_cache",
)


def run_train(config: TrainConfig, console: Console | None = None) -> int:
    """Run the whole training and return the exit code: 0, or 130 after Ctrl-C.

    Raises:
        EmbtuneError: the data, the model or an option cannot be used. Before the first checkpoint that leaves nothing
            behind; later, the checkpoints stay.
    """
    console = console or make_console()
    run = RunFolder(config.output)
    run.check(config.resume)
    _check_trackers(config.more.report_to)
    try:
        data = _read_training_data(config, console)
        task = _read_evaluation(config, data, console)
        log = EventLog(run.path, resume=config.resume)
        with run.without_remains(), log.run("train", _plain(config.flat()), describe_machine()):
            exports = _train(config, run, data, task, log, console)
        with working(console, "Writing the report"):
            page = write_report([run.path])
        _show_next(config, run, exports, page, console)
    except KeyboardInterrupt:
        resume = "The same command with --resume goes on from the last checkpoint."
        left = resume if run.resumable else f"Nothing was left in {config.output}."
        console.print(f"\nStopped by Ctrl-C. {left}", style="yellow")
        return INTERRUPTED
    return 0


def _check_trackers(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise ArgumentError(f"report_to: there is no tracker {name!r}; there are {known}.")
        if name not in get_available_reporting_integrations():
            raise ArgumentError(f"report_to: {name} is not installed. Install it with pip, or leave it out.")


def _read_training_data(config: TrainConfig, console: Console) -> dict[str, Dataset]:
    """Name -> rows of each data set, which suit the loss and the prompts."""
    data: dict[str, Dataset] = {}
    for name, source in config.data.items():
        with working(console, f"Reading {source}"):
            data[name] = read_dataset(source, columns=config.columns or None)
        console.print(f"{len(data[name]):,} rows with {', '.join(data[name].column_names)}.")
    by_source = {source: data[name] for name, source in config.data.items()}
    check_loss(config.loss, by_source)
    check_labels(config.loss, config.more.loss_args, by_source)
    columns = {column for dataset in data.values() for column in dataset.column_names}
    for column in config.more.prompts:
        if column not in columns:
            raise ArgumentError(f"prompts: there is no column {column!r}; there are {', '.join(sorted(columns))}.")
    return data


def _read_evaluation(config: TrainConfig, data: Mapping[str, Dataset], console: Console) -> EvaluationTask | None:
    """The evaluation data, if there is any, looked through for texts that training sees."""
    task = None
    if config.eval_data is not None:
        inherited = {} if Path(config.eval_data).expanduser().is_dir() else config.columns
        with working(console, f"Reading {config.eval_data}"):
            task = EvaluationTask.read(config.eval_data, config.more.eval_columns or inherited, config.more.eval_split)
        console.print(f"Measured on {task}.")
        task.check_comparable()
    rows = data if len(data) > 1 else next(iter(data.values()))
    check_training_data(rows, task.data if task else None, config.batch_size)
    return task


def _train(
    config: TrainConfig,
    run: RunFolder,
    data: dict[str, Dataset],
    task: EvaluationTask | None,
    log: EventLog,
    console: Console,
) -> Mapping[str, str]:
    """Returns where each export is."""
    with working(console, f"Loading {config.model}", log):
        model = _load_model(config)
    exports = [ExportChoice.parse(text) for text in config.exports]
    for choice in exports:
        check_export(model, choice)
    loss = make_loss(config.loss, config.more.loss_args, model, config.more.matryoshka_dims)
    console.print(str(model.explain()), style="dim")
    settings = {"config": _plain(config.flat()), "machine": describe_machine(model.device)}
    if config.resume and (changed := run.changed_options(settings["config"])):
        console.print(f"Not as when this run began: {', '.join(changed)}.", style="yellow")
    before, evidence = None, None
    if task is not None:
        _ready_prompts(config, model, task, console)
        with working(console, "Measuring the model as it is", log):
            before = task.run(model)
            evidence = Evidence(task.name, task.data)
            evidence.see_before(model, before)
    log.phase("Preparing the data")
    facts = fit(config, run, model, loss, data, task, console, log, on_begin=lambda: run.write_settings(settings))
    console.print(f"Trained {facts['steps']:,} steps in {duration(facts['seconds'])}.")
    comparison = None
    results: dict[str, Any] = {"training": facts, "exports": {}}
    if task is not None and before is not None and evidence is not None:
        with working(console, "Measuring the trained model", log):
            after = task.run(model)
            comparison = compare(before, after)
            log.write("comparison", **evidence.compared(model, after, comparison))
        console.print()
        console.print(comparison.render())
        results["evaluation"] = {"data": task.name, **comparison.to_dict()}
    _describe(config, model, data, task, comparison)
    run.write_results(results)
    _save(exports, model, run, results, log, console)
    saved: Mapping[str, str] = results["exports"]
    return saved


def _ready_prompts(config: TrainConfig, model: SentenceTransformer, task: EvaluationTask, console: Console) -> None:
    """Give the model its prompts before it is first measured, so that before and after differ by the training alone."""
    if not config.more.prompts:
        return
    remember_prompts(model, config.more.prompts)
    used = {name: model.prompts[name] for name in ("query", "document") if model.prompts.get(name)}
    if task.kind != "retrieval" or not used:
        console.print(f"Measured without prompts, before and after: {task.kind} has no queries and documents.")
        return
    shown = ", ".join(f"{name} {prompt!r}" for name, prompt in used.items())
    console.print(f"Measured with these prompts, before and after: {shown}.")


def _save(
    exports: Sequence[ExportChoice],
    model: SentenceTransformer,
    run: RunFolder,
    results: dict[str, Any],
    log: EventLog,
    console: Console,
) -> None:
    """Save every export and note it in results.json as soon as it is there."""
    for choice in exports:
        folder = run.path / choice.folder_name
        with working(console, f"Saving as {choice} in {folder}", log):
            results["exports"][str(choice)] = str(save_export_for_report(model, choice, folder, log))
        run.write_results(results)


def _load_model(config: TrainConfig) -> SentenceTransformer:
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
        use_gradient_checkpointing=more.gradient_checkpointing,
        random_state=config.seed,
        engine=more.engine,
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
    )


def _describe(
    config: TrainConfig,
    model: SentenceTransformer,
    data: Mapping[str, Dataset],
    task: EvaluationTask | None,
    comparison: Comparison | None,
) -> None:
    """Fill the model card that every save writes."""
    settings = {name: value for name, value in config.flat().items() if name not in _NOT_ON_CARD}
    metrics = {task.name: metric_changes(comparison)} if task is not None and comparison is not None else None
    describe_training(
        model,
        settings={name: value for name, value in settings.items() if value not in (None, (), {})},
        metrics=metrics,
        base_model=config.model,
        data=[_facts(source, data[name]) for name, source in config.data.items()],
    )


def _facts(source: str, dataset: Dataset) -> DataFacts:
    on_hub = not Path(source).expanduser().exists()
    name = source.partition(":")[0] if on_hub else Path(source).name
    return DataFacts(name, len(dataset), dataset.column_names, hub_id=name if on_hub else None)


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON and YAML hold them, so that those in run.json can be copied into a config file."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        return list(value) if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in options.items()}


def _show_next(config: TrainConfig, run: RunFolder, exports: Mapping[str, str], page: Path, console: Console) -> None:
    done = f"\nDone. What happened is on the page {page}; all numbers are in {run.path / 'results.json'}."
    console.print(done, style="bold green", soft_wrap=True)
    commands = [usage(ExportChoice.parse(name), Path(saved)) for name, saved in exports.items()]
    merged = next((saved for name, saved in exports.items() if name.startswith("merged")), None)
    if config.eval_data is None:
        with_data = "embtune train … --eval-data held-out.jsonl"
        commands.append(("Nothing was measured; with held-out pairs in a file:", with_data))
    elif merged is not None:
        models = f"{shlex.quote(config.model)} {shlex.quote(merged)}"
        commands.append(("Measure it on other data:", f"embtune evaluate {models} --data DATA"))
    print_commands(console, commands)
