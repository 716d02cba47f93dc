"""The plots of a page with what stands around them: heading, legend, note."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embtune.report import figures
from embtune.report.run import Run
from embtune.report.words import number, size

MAPS_ON_PAGE = 4  # each has up to 600 points and 300 lines
METRICS_ON_THE_WAY = 3  # the main ones come first
SIDES = ("before", "after")

PARTS = {
    "data": "series-4",
    "forward": "series-0",
    "forward and backward": "series-0",
    "backward": "series-1",
    "optimizer": "series-2",
}
"""Parts of a step and their colours."""


@dataclass(frozen=True)
class Plot:
    """A figure with what stands around it."""

    heading: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()
    """Role of a colour, and what it stands for."""
    note: str = ""


def training(runs: Sequence[Run]) -> list[Plot]:
    """Loss, learning rate, speed, and what was measured on the way."""
    legend = _legend(runs)
    plots = []
    for heading, name, value in (
        ("Loss", "loss", lambda point: point.loss),
        ("Learning rate", "rate", lambda point: point.learning_rate),
        ("Tokens per second", "speed", lambda point: point.tokens_per_second),
    ):
        lines = _lines(runs, value)
        if lines:
            title = f"{heading} over {max(run.step for run in runs):,} steps"
            note = _not_finite(runs) if name == "loss" else ""
            plots.append(Plot(heading, figures.curves(f"training-{name}", title, lines), legend, note))
    metrics = list(dict.fromkeys(key for run in runs for _, each in run.evaluations for key in each))
    for place, metric in enumerate(metrics[:METRICS_ON_THE_WAY]):
        lines = [
            (series, [(step, each[metric]) for step, each in run.evaluations if metric in each])
            for series, run in enumerate(runs)
        ]
        lines = [(series, points) for series, points in lines if points]
        svg = figures.curves(f"evaluation-{place}", f"{metric} while training", lines, dots=True)
        plots.append(Plot(f"{metric} while training", svg, legend))
    return plots


def _lines(runs: Sequence[Run], value: Callable[[Any], float | None]) -> list[tuple[int, list[tuple[float, float]]]]:
    found = []
    for series, run in enumerate(runs):
        points = [(float(point.step), number) for point in run.log if (number := value(point)) is not None]
        if points:
            found.append((series, figures.thinned(points)))
    return found


def _not_finite(runs: Sequence[Run]) -> str:
    first = [(run.name, next((point.step for point in run.log if not np.isfinite(point.loss)), None)) for run in runs]
    return " ".join(f"{name}: the loss is no number at step {step:,}." for name, step in first if step is not None)


def _legend(runs: Sequence[Run]) -> tuple[tuple[str, str], ...]:
    return tuple((f"series-{series % 8}", run.name) for series, run in enumerate(runs)) if len(runs) > 1 else ()


def _of_retrieval(runs: Sequence[Run], what: str) -> list[tuple[int, str, dict[str, Any]]]:
    """Number, label and comparison of every evaluation that has such data."""
    several = len(runs) > 1
    return [
        (place, f"{run.name}: {each['name']}" if several else each["name"], each)
        for place, (run, each) in enumerate((run, each) for run in runs for each in run.comparisons)
        if what in each
    ]


def similarities(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Histograms of cosine similarities before and after, for each retrieval evaluation."""
    found = []
    for place, label, each in _of_retrieval(runs, "similarity"):
        sides = []
        for side in SIDES:
            right, random = (each["similarity"][side][kind]["mean"] for kind in ("right", "unrelated"))
            note = f"Mean {number(right, 3)} for right pairs, {number(random, 3)} for random ones."
            title = f"Cosine similarities {side}: {label}. {note}"
            svg = figures.similarities(f"similarity-{place}-{side}", title, each["similarity"], side)
            sides.append(Plot(side.capitalize(), svg, note=note))
        found.append({"label": label, "sides": sides})
    return found


def maps(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The two maps of each retrieval evaluation."""
    found = []
    for place, label, each in _of_retrieval(runs, "map")[:MAPS_ON_PAGE]:
        of_pairs = each["map"]
        sides = [
            Plot(side.capitalize(), figures.plane(f"map-{place}-{side}", f"Map {side}: {label}", of_pairs, side))
            for side in SIDES
        ]
        found.append(
            {
                "place": place,
                "label": label,
                "sides": sides,
                "variance": f"{of_pairs['variance']:.0%}",
                "pairs": f"{len(of_pairs['queries']):,}",
                "queries": of_pairs["queries"],
            }
        )
    return found


def lengths(runs: Sequence[Run]) -> list[Plot]:
    """Histograms of tokens per text, one for each run."""
    found = []
    for place, run in enumerate(runs):
        if run.lengths is None:
            continue
        facts = run.lengths
        roles = [f"series-{number % 8}" for number in range(len(facts["columns"]))]
        legend = tuple(
            (role, f"{name}: mean {column['mean']:,.0f}, longest {column['longest']:,}")
            for role, (name, column) in zip(roles, facts["columns"].items(), strict=True)
        )
        padded = f"{facts['padding']:.0%} of the tokens of a padded batch of {facts['batch_size']:,} rows are padding"
        note = f"{padded}; this run left it out." if facts["packed"] else f"{padded}, and this run computed it."
        cut = f" {facts['truncated']:.1%} of the texts fill the limit of {facts['max_seq_length']:,} tokens."
        svg = figures.lengths(f"lengths-{place}", f"Tokens per text of {run.name}. {note}", facts, roles)
        seen = f" From {facts['rows']:,} rows."
        plot = Plot(run.name if len(runs) > 1 else "Tokens in a text", svg, legend, note.capitalize() + cut + seen)
        found.append(plot)
    return found


def step_time(runs: Sequence[Run]) -> Plot | None:
    """A bar for each run whose steps were measured."""
    measured = [run for run in runs if run.step_time]
    if not measured:
        return None
    rows = [run.step_time["seconds"] for run in measured if run.step_time]
    parts = {part: role for part, role in PARTS.items() if any(part in row for row in rows)}
    texts = [
        (f"{run.name}: " if len(runs) > 1 else "")
        + ", ".join(f"{part} {1000 * row[part]:,.1f} ms" for part in parts if part in row)
        for run, row in zip(measured, rows, strict=True)
    ]
    steps = ", ".join(dict.fromkeys(str(run.step_time["steps"]) for run in measured if run.step_time))
    svg = figures.step_times("step-time", "Time of a step. " + "; ".join(texts), rows, parts)
    note = f"Means over {steps} early steps: {'; '.join(texts)}."
    return Plot("Time of a step", svg, tuple((role, part) for part, role in parts.items()), note)


def memory(runs: Sequence[Run]) -> Plot | None:
    """The most memory held at once, as it grew over the steps."""
    lines = _lines(runs, lambda point: None if point.memory is None else point.memory / 2**30)
    if not lines:
        return None
    peaks = "; ".join(f"{run.name}: {size(run.memory)}" for run in runs if run.memory is not None)
    heading = "Peak memory so far, GiB"
    svg = figures.curves("memory", f"{heading}. {peaks}", lines)
    return Plot(heading, svg, _legend(runs))
