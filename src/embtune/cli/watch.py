"""`embtune watch`: the page of a run, live on this machine while the run goes on."""

from rich.console import Console

from embtune.cli.config import WatchConfig
from embtune.cli.display import make_console
from embtune.report.watch import make_server


def run_watch(config: WatchConfig, console: Console | None = None) -> int:
    """Serve the page until Ctrl-C, and return the exit code.

    Raises:
        ArgumentError: the port is taken, or the run's folder is a file.
    """
    console = console or make_console()
    server, address = make_server(config.run, config.port)
    console.print(f"Watching {config.run}. Open this address, on this machine; Ctrl-C ends the watch, not the run.")
    console.print(address, soft_wrap=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.print("\nNo longer watching.")
    return 0
