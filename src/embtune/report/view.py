"""Runs as the page's template wants them: tables of ready-made texts, plots, and the data of the query explorer."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embtune.evaluate.bootstrap import paired_bootstrap
from embtune.report import figures, plots
from embtune.report.queries import explorer_data
from embtune.report.run import Run
from embtune.report.words import duration, number, signed, size

STATES = {
    "waiting": "Waiting for the first event",
    "running": "Running",
    "stalled": "Stalled",
    "killed": "Killed",
    "finished": "Finished",
    "interrupted": "Stopped by Ctrl-C",
    "failed": "Failed",
}
_MEASURED_AS_PROCESS = (None, "cpu", "mps", "xpu")  # devices on which PyTorch's own peak is not asked for
_HIDDEN_SETTINGS = ("config", "resume")


def page_view(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything the template shows of some runs; `empty` says why a part is not there."""
    several = len(runs) > 1
    return {
        "runs": [_overview(series, run) for series, run in enumerate(runs)],
        "several": several,
        "title": f"{len(runs)} runs compared" if several else runs[0].name,
        "evaluations": _evaluations(runs),
        "forgetting": any(each["role"] == "forgetting" for run in runs for each in run.comparisons),
        "training": plots.training(runs),
        "similarities": plots.similarities(runs),
        "maps": plots.maps(runs),
        "explorer": explorer_data(runs),
        "lengths": plots.lengths(runs),
        "step_time": plots.step_time(runs),
        "memory": plots.memory(runs),
        "exports": _exports(runs),
        "settings": _settings(runs),
        "machines": [{"name": run.name, "facts": run.machine} for run in runs if run.machine],
        "empty": _empty(runs),
    }


def _empty(runs: Sequence[Run]) -> dict[str, str]:
    evaluation = _why_not_measured(runs)
    measured = any(run.comparisons for run in runs)
    no_retrieval = (
        "This is drawn for retrieval, held-out queries with documents; the evaluation here is of another kind."
    )
    going, over = (
        {
            "training": "Nothing is logged yet; the first entry comes with the first step.",
            "lengths": "The texts have not been looked at yet.",
            "step_time": "The parts of a step are measured in the first steps of training.",
            "memory": "Memory is noted with each entry of the training log.",
            "exports": "Exports come after training.",
        },
        {
            "training": "Training took no step that was logged.",
            "lengths": "The lengths of the texts were not noted for this run.",
            "step_time": "There were too few steps to measure their parts.",
            "memory": "How much memory was taken was not noted for this run.",
            "exports": "Nothing was exported.",
        },
    )
    return {
        **(going if any(run.running for run in runs) else over),
        "evaluations": evaluation,
        "retrieval": no_retrieval if measured else evaluation,
    }


def _overview(series: int, run: Run) -> dict[str, Any]:
    main = run.comparisons[0] if run.comparisons and run.comparisons[0]["role"] == "task" else None
    speeds = [point.tokens_per_second for point in run.log if point.tokens_per_second is not None]
    padding = run.lengths and f"{run.lengths['padding']:.0%}"
    return {
        "series": f"series-{series % 8}",
        "name": run.name,
        "state": run.state,
        "state_text": STATES[run.state],
        "phase": run.phase,
        "error": run.error,
        "resume": _resume(run),
        "running": run.running,
        "damaged": run.damaged,
        "resumed": run.resumed,
        "model": str(run.settings.get("model") or ("all-MiniLM-L6-v2" if run.command == "demo" else "–")),
        "data": _data_names(run),
        "device": run.machine.get("device", "–"),
        "step": f"{run.step:,}",
        "steps": None if run.steps is None else f"{run.steps:,}",
        "progress": (run.step, run.steps) if run.steps else None,
        "left": duration(run.seconds_left) if run.running and run.seconds_left is not None else None,
        "last": run.last,
        "time": duration(run.seconds),
        "speed": f"{np.median(speeds):,.0f}" if speeds else None,
        "memory": size(run.memory) if run.memory else None,
        "memory_of": "of the process" if run.machine.get("device") in _MEASURED_AS_PROCESS else "of the GPU",
        "padding": padding,
        "packed": bool(run.lengths and run.lengths["packed"]),
        "headline": _headline(main) if main else None,
        "forgetting": _forgetting(run),
        "checkpoints": len(run.checkpoints),
    }


def _resume(run: Run) -> str | None:
    """The command that goes on from the last checkpoint; only runs of `train` have one."""
    if run.command != "train" or not run.checkpoints:
        return None
    return f"embtune train --resume {shlex.quote(str(run.settings.get('output', run.name)))}"


def _data_names(run: Run) -> str:
    data = run.settings.get("data")
    if isinstance(data, Mapping):
        return ", ".join(map(str, data.values()))
    return str(run.settings.get("path") or "the Python standard library") if run.command == "demo" else "–"


def _headline(comparison: Mapping[str, Any]) -> dict[str, Any]:
    metric, change = next(iter(comparison["metrics"].items()))
    return {
        "metric": metric,
        "data": comparison["name"],
        "before": number(change["before"], 3),
        "after": number(change["after"], 3),
        "difference": signed(change["difference"], 3),
        "interval": f"{signed(change['low'], 3)} to {signed(change['high'], 3)}",
        "confidence": f"{change['confidence']:.0%}",
        "verdict": change["verdict"],
    }


def _forgetting(run: Run) -> str | None:
    checks = [each for each in run.comparisons if each["role"] == "forgetting"]
    if not checks:
        return None
    worse = [metric for each in checks for metric, change in each["metrics"].items() if change["verdict"] == "worse"]
    return f"worse: {', '.join(worse)}" if worse else "passed"


def _evaluations(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One table for each data set; runs that were measured on the same data share it."""
    grouped: dict[tuple[str, str], list[tuple[int, Run, dict[str, Any]]]] = {}
    for series, run in enumerate(runs):
        for comparison in run.comparisons:
            key = comparison["role"], comparison["fingerprint"]
            grouped.setdefault(key, []).append((series, run, comparison))
    ordered = sorted(grouped.items(), key=lambda item: item[0][0] != "task")
    return [_evaluation(f"changes-{place}", members) for place, (_, members) in enumerate(ordered)]


def _evaluation(name: str, members: Sequence[tuple[int, Run, dict[str, Any]]]) -> dict[str, Any]:
    first = members[0][2]
    rows = []
    dots: dict[str, list[figures.Change]] = {}
    for metric in first["metrics"]:
        for series, run, comparison in members:
            change = comparison["metrics"].get(metric)
            if change is None:
                continue
            rows.append(
                {
                    "metric": metric,
                    "run": run.name,
                    "series": f"series-{series % 8}",
                    "before": number(change["before"]),
                    "after": number(change["after"]),
                    "difference": signed(change["difference"]),
                    "interval": f"{signed(change['low'])} to {signed(change['high'])}",
                    "p": number(change["p_value"]),
                    "verdict": change["verdict"],
                }
            )
            dot = figures.Change(series, change["difference"], change["low"], change["high"])
            dots.setdefault(metric, []).append(dot)
    confidence = next(iter(first["metrics"].values()))["confidence"]
    return {
        "name": first["name"],
        "role": first["role"],
        "kind": first["kind"],
        "count": f"{first['items']:,}",
        "confidence": f"{confidence:.0%}",
        "rows": rows,
        "figure": figures.changes(name, dots),
        "counts": [(run.name, comparison["item_metric"], comparison["counts"]) for _, run, comparison in members],
        "between": _between(members),
    }


def _between(members: Sequence[tuple[int, Run, dict[str, Any]]]) -> list[dict[str, str]]:
    """Runs after the first against the first, on the items that both were measured on."""
    scored = [(run, each) for _, run, each in members if "scores" in each]
    if len(scored) < 2:
        return []
    (base, reference), *others = scored
    found = []
    for run, each in others:
        change = paired_bootstrap(reference["scores"]["after"], each["scores"]["after"], samples=2_000)
        found.append(
            {
                "run": run.name,
                "base": base.name,
                "metric": each["item_metric"],
                "difference": signed(change.difference),
                "interval": f"{signed(change.low)} to {signed(change.high)}",
                "verdict": change.verdict,
            }
        )
    return found


def _why_not_measured(runs: Sequence[Run]) -> str:
    if not any(run.settings.get("eval_data") or run.command == "demo" for run in runs):
        return (
            "No held-out data was given, so nothing says whether the model got better. With --eval-data FILE, "
            "embtune train measures before and after."
        )
    if any(run.running for run in runs):
        return "The two models are compared when training has ended."
    return "The run ended before the trained model was measured."


def _exports(runs: Sequence[Run]) -> list[dict[str, str]]:
    rows = []
    for run in runs:
        for export in run.exports:
            parity = export.get("parity")
            checked = (
                f"cosine to the trained model at least {parity['minimum']:.6f} (mean {parity['mean']:.6f}, "
                f"{parity['texts']} texts)"
                if parity
                else str(export.get("check") or "not compared")
            )
            rows.append(
                {
                    "run": run.name,
                    "format": str(export["format"]),
                    "path": str(export["path"]),
                    "size": size(export.get("bytes")),
                    "parity": checked,
                }
            )
    return rows


def _settings(runs: Sequence[Run]) -> dict[str, Any]:
    """All settings, and which of them differ between runs."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings if name not in _HIDDEN_SETTINGS))
    rows = [(name, [_shown(run.settings.get(name)) for run in runs]) for name in names]
    return {"rows": rows, "different": [row for row in rows if len(set(row[1])) > 1 and row[0] != "output"]}


def _shown(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
