"""The page of a run served live on this machine; it reads the run's event file and touches nothing else."""

import secrets
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from embtune.errors import ArgumentError
from embtune.report.events import EVENTS
from embtune.report.page import render_page
from embtune.report.run import read_run

HOST = "127.0.0.1"


class LivePage:
    """The page as the event file has it, made again only when there is something new.

    Args:
        folder: of the run; neither it nor the event file need be there yet.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._lock = threading.Lock()
        self._version = ""
        self._page = b""

    def get(self, known: str | None = None) -> bytes | None:
        """The newest page, or None if that is the one of the version `known`."""
        with self._lock:
            run = read_run(self._folder)
            version = f"{run.state}-{run.last}-{run.damaged}"
            if version != self._version:
                # Matplotlib's settings belong to the whole process, so one thread draws at a time.
                self._page = render_page([run], live=True, version=version).encode()
                self._version = version
            return None if known == version else self._page


def make_server(folder: str | Path, port: int = 0, token: str | None = None) -> tuple[ThreadingHTTPServer, str]:
    """A server on loopback, ready for `serve_forever`, and the address of the page.

    Args:
        port: 0 takes a free one.
        token: what the address must carry; None makes a random one.

    Raises:
        ArgumentError: the port is taken, or the folder is a file.
    """
    if Path(folder).is_file():
        raise ArgumentError(f"{folder} is a file; name the folder of a run, which holds {EVENTS}.")
    secret = secrets.token_urlsafe(24) if token is None else token
    page = LivePage(folder)

    class Handler(_Handler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.page, self.token = page, secret
            super().__init__(*args, **kwargs)

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ArgumentError(f"port={port} cannot be used ({error.strerror}); name another, or 0 for any.") from error
    server.daemon_threads = True
    return server, f"http://{HOST}:{server.server_port}/?token={secret}"


class _Handler(BaseHTTPRequestHandler):
    page: LivePage
    token: str

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        if not self._may_read(query.get("token", [""])[0]):
            self._answer(403, b"403: open the whole address that embtune watch printed.\n")
        elif address.path != "/":
            self._answer(404, b"404: there is one page only.\n")
        else:
            self._answer_with_page(query.get("since", [None])[0])

    def _answer_with_page(self, known: str | None) -> None:
        try:
            page = self.page.get(known)
        except ArgumentError as error:
            self._answer(500, f"500: {error}\n".encode())
            return
        if page is None:
            self._answer(204, b"")
        else:
            self._answer(200, page, "text/html; charset=utf-8")

    def _may_read(self, token: str) -> bool:
        # A page elsewhere whose name is made to point here would send its own name as the host.
        host = self.headers.get("Host", "").partition(":")[0]
        return host in (HOST, "localhost") and secrets.compare_digest(token.encode(), self.token.encode())

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        for name, value in (
            ("Cache-Control", "no-store"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "DENY"),
        ):
            self.send_header(name, value)
        with suppress(ConnectionError):  # the tab was closed in the meantime
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the addresses hold the token, and a line every three seconds helps nobody."""
