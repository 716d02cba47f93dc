"""The report as one HTML file that needs nothing else: style, script, plots and data are in it."""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from embtune.errors import ArgumentError
from embtune.files import atomic_files
from embtune.report.events import EVENTS
from embtune.report.run import REPORT, Run, read_run
from embtune.report.svg import ROLES
from embtune.report.view import page_view
from embtune.runtime import package_version
from embtune.train.checkpoint_folders import PREFIX_CHECKPOINT_DIR

MAX_RUNS = 8  # colours that can be told apart
_TEMPLATE = Path(__file__).parent / "template"


def write_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page of one run, or of several side by side.

    Args:
        folders: of runs that `embtune train` or `demo` made.
        out: None is `report.html` in the folder of the first run.

    Returns:
        The page.

    Raises:
        ArgumentError: a folder holds no run, there are too many, or `out` is a folder.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        if not (path / EVENTS).is_file():
            raise ArgumentError(_about_no_events(path))
    if not 1 <= len(paths) <= MAX_RUNS:
        raise ArgumentError(f"{len(paths)} runs are named; a page compares 1 to {MAX_RUNS}.")
    target = paths[0] / REPORT if out is None else Path(out)
    if target.is_dir():
        raise ArgumentError(f"out={target} is a folder; name a file, such as {target / REPORT}.")
    page = render_page([read_run(path) for path in paths])
    with atomic_files(target.parent) as staging:
        (staging / target.name).write_text(page, encoding="utf-8")
    return target


def _about_no_events(path: Path) -> str:
    if any(path.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):  # what a Trainer of one's own program leaves
        return (
            f"{path} holds checkpoints, but no {EVENTS}, from which the page is made: only `embtune train` writes it "
            "by itself. In a Python program, before trainer.train(), add the line\n"
            f"  trainer.add_callback(EventCallback(EventLog({str(path)!r})))\n"
            "with EventCallback from embtune.report.callback and EventLog from embtune.report.events."
        )
    return (
        f"{path} holds no {EVENTS}. Name the folder of a run: what --output of `embtune train` or --out of "
        "`embtune demo` said."
    )


def render_page(runs: Sequence[Run], *, live: bool = False, version: str = "") -> str:
    """The page as text.

    Args:
        live: whether it asks the address it came from for news.
        version: what it then says it has.
    """
    style, script = _style(), _script()
    fetched = " connect-src 'self';" if live else ""
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:;{fetched} "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        _environment()
        .get_template("page.html")
        .render(
            **page_view(runs),
            live=live,
            version=version,
            policy=policy,
            style=style,
            script=script,
            embtune_version=package_version("embtune") or "",
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    return environment


@cache
def _style() -> str:
    of_roles = (
        f".fill-{role}{{fill:var(--{role})}}.stroke-{role}{{stroke:var(--{role})}}.key-{role}{{background:var(--{role})}}"
        for role in ROLES
    )
    return (_TEMPLATE / "page.css").read_text(encoding="utf-8") + "".join(of_roles)


@cache
def _script() -> str:
    return (_TEMPLATE / "page.js").read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
