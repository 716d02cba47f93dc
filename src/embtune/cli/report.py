"""`embtune report`: the page that shows what happened in one run, or compares several."""

from pathlib import Path

from rich.console import Console

from embtune.cli.config import ReportConfig
from embtune.cli.display import make_console, working
from embtune.report.page import write_report

SEVERAL = Path("embtune-report.html")


def run_report(config: ReportConfig, console: Console | None = None) -> int:
    """Write the page, say where it is, and return the exit code.

    Raises:
        ArgumentError: a folder holds no run, or the page cannot be written there.
    """
    console = console or make_console()
    out = SEVERAL if config.out is None and len(config.runs) > 1 else config.out
    with working(console, "Writing the report"):
        page = write_report(config.runs, out)
    console.print(f"{page}: {page.stat().st_size / 1e6:.1f} MB, open it in a browser.", soft_wrap=True)
    return 0
