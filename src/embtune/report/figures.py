"""The plots of the report page, drawn by Matplotlib. Texts that come from data stay out of them: legends are HTML."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from embtune.report.svg import COLOURS, SETTINGS, to_svg

WIDTH, HEIGHT = 400 / 72, 250 / 72  # inches; 1/72 inch is one unit of the SVG
BAR = 30 / 72  # height of a row of bars or whiskers
LINE_STYLES = ("-", "--", ":", "-.")  # beside colour, for those who do not tell colours apart


@dataclass(frozen=True)
class Change:
    """A change with its interval, in the colour of a series."""

    series: int
    difference: float
    low: float
    high: float


def changes(name: str, rows: Mapping[str, Sequence[Change]]) -> str:
    """Metric -> changes, each a dot with its interval, around a line at no change."""
    points = sum(map(len, rows.values()))
    figure, [axes] = _figure(height=(0.5 + 0.8 * points) * BAR + 0.35)
    places, place = [], 0.0
    for row in rows.values():
        for change in row:
            colour = COLOURS[f"series-{change.series % 8}"]
            axes.plot([change.low, change.high], [place, place], color=colour, linewidth=2.4)
            axes.plot([change.difference], [place], "o", color=colour, markersize=6.5)
            place += 1.0
        places.append(place - (len(row) + 1) / 2)
    axes.axvline(0, color=COLOURS["faint"], linewidth=1.2)
    axes.set_yticks(places, list(rows))
    axes.set_ylim(place - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    axes.set_xlabel("change (right is better)")
    axes.spines["left"].set_visible(False)
    return to_svg(figure, name, f"Change of {', '.join(rows)} with intervals; the numbers are in the table.")


def curves(
    name: str, title: str, lines: Sequence[tuple[int, Sequence[tuple[float, float]]]], *, dots: bool = False
) -> str:
    """Lines over training steps; each is the number of its series and (step, value) points.

    Values that are no numbers leave a gap. `dots` marks each point, for curves of few.
    """
    figure, [axes] = _figure()
    for series, points in lines:
        x, y = np.array(points, dtype=float).T
        few = dots or len(x) < 3
        axes.plot(
            x,
            np.where(np.isfinite(y), y, np.nan),
            color=COLOURS[f"series-{series % 8}"],
            linestyle=LINE_STYLES[series % len(LINE_STYLES)],
            marker="o" if few else None,
            markersize=4.5,
        )
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return to_svg(figure, name, title)


def similarities(name: str, title: str, found: Mapping[str, Any], side: str) -> str:
    """Shares of right and of random pairs over their cosines; both sides have the same scales."""
    figure, [axes] = _figure(height=HEIGHT * 0.8)
    edges = np.array(found["edges"], dtype=float)
    shares = {
        (each, kind): counts / max(counts.sum(), 1.0)
        for each in ("before", "after")
        for kind in ("unrelated", "right")
        for counts in [np.array(found[each][kind]["counts"], dtype=float)]
    }
    _filled(axes, shares[side, "unrelated"], edges, "document")
    _filled(axes, shares[side, "right"], edges, "query")
    axes.set_ylim(0, 1.05 * max(float(share.max()) for share in shares.values()))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("cosine similarity")
    return to_svg(figure, name, title)


def plane(name: str, title: str, found: Mapping[str, Any], side: str) -> str:
    """Queries and documents of one side, each query joined with its right document."""
    figure, [axes] = _figure(height=WIDTH * 0.8)
    queries, documents = (np.array(found[side][kind], dtype=float) for kind in ("queries", "documents"))
    # One path with gaps: a path for each pair would be most of the page.
    joined = np.stack([queries, documents, np.full_like(queries, np.nan)], axis=1).reshape(-1, 2)
    axes.plot(joined[:, 0], joined[:, 1], color=COLOURS["faint"], linewidth=0.5, alpha=0.7)
    axes.scatter(documents[:, 0], documents[:, 1], s=16, marker="s", color=COLOURS["document"], linewidth=0)
    axes.scatter(queries[:, 0], queries[:, 1], s=18, color=COLOURS["query"], linewidth=0).set_gid("points")
    every = np.array([found[each][kind] for each in ("before", "after") for kind in ("queries", "documents")])
    for setter, values in ((axes.set_xlim, every[..., 0]), (axes.set_ylim, every[..., 1])):
        margin = 0.04 * max(float(np.ptp(values)), 1e-3)
        setter(float(values.min()) - margin, float(values.max()) + margin)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(COLOURS["grid"])
    return to_svg(figure, name, title, {"points": found["texts"]})


def lengths(name: str, title: str, found: Mapping[str, Any], roles: Sequence[str]) -> str:
    """Histograms of tokens per text, one row for each column of the data."""
    columns = list(found["columns"].values())
    figure, axes_of = _figure(rows=len(columns), height=max(HEIGHT, len(columns) * 1.4))
    edges = np.array(found["edges"], dtype=float)
    for axes, column, role in zip(axes_of, columns, roles, strict=True):
        _filled(axes, np.array(column["counts"], dtype=float), edges, role)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes_of[-1].set_xlabel("tokens in a text")
    return to_svg(figure, name, title)


def step_times(name: str, title: str, rows: Sequence[Mapping[str, float]], roles: Mapping[str, str]) -> str:
    """One bar of stacked parts for each run, in milliseconds."""
    figure, [axes] = _figure(height=(len(rows) + 0.3) * BAR + 0.4)
    for place, seconds in enumerate(rows):
        start = 0.0
        for part, role in roles.items():
            width = 1000 * seconds.get(part, 0.0)
            axes.barh(place, width, left=start, height=0.62, color=COLOURS[role], linewidth=0)
            start += width
    axes.set_yticks(range(len(rows)), [""] * len(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("milliseconds a step")
    return to_svg(figure, name, title)


def _figure(rows: int = 1, height: float = HEIGHT) -> tuple[Figure, list[Axes]]:
    with matplotlib.rc_context(SETTINGS):
        figure = Figure((WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, sharex=True, squeeze=False)[:, 0]
    return figure, list(axes)


def _filled(axes: Axes, counts: np.ndarray, edges: np.ndarray, role: str) -> None:
    axes.stairs(counts, edges, fill=True, color=COLOURS[role], alpha=0.35, linewidth=0)
    axes.stairs(counts, edges, color=COLOURS[role], linewidth=1.3)


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most `most` points: means of equal stretches, where there are more."""
    size = math.ceil(len(points) / most)
    stretches = (points[start : start + size] for start in range(0, len(points), size))
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in stretches]
