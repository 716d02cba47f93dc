import http.client
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from test_events import logged, started, training, write_lines

from embtune.cli.main import main
from embtune.errors import ArgumentError
from embtune.report.events import EventLog
from embtune.report.watch import make_server

TOKEN = "secret"


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Of a server that watches `tmp_path / "run"`, which is not there yet."""
    server, address = make_server(tmp_path / "run", token=TOKEN)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield urlsplit(address).port or 0
    server.shutdown()
    thread.join()
    server.server_close()


def get(port: int, path: str, **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), dict(answer.getheaders())
    connection.close()
    return found


def test_only_who_has_the_token_may_read(port: int) -> None:
    for path in ("/", "/?token=", "/?token=secre", "/?token=secret2", "/?token=%C3%A4", "/events.jsonl", "/?since=x"):
        status, text, _ = get(port, path)
        assert status == 403
        assert "embtune watch printed" in text
    assert get(port, f"/?token={TOKEN}", Host="evil.example:80")[0] == 403
    assert get(port, f"/etc/passwd?token={TOKEN}")[0] == 404
    status, text, headers = get(port, f"/?token={TOKEN}")
    assert status == 200
    assert headers["Cache-Control"] == "no-store"
    assert TOKEN not in text
    assert "connect-src &#39;self&#39;" in text


def test_the_token_is_random_and_the_server_is_on_loopback(tmp_path: Path) -> None:
    addresses = []
    for _ in range(2):
        server, address = make_server(tmp_path)
        assert server.server_address[0] == "127.0.0.1"
        server.server_close()
        addresses.append(urlsplit(address).query)
    assert addresses[0] != addresses[1]
    assert min(map(len, addresses)) > 30


def version(page: str) -> str:
    return page.split('data-version="')[1].split('"')[0]


def test_the_page_follows_the_run(port: int, tmp_path: Path) -> None:
    path = f"/?token={TOKEN}"
    run = tmp_path / "run"
    _, page, _ = get(port, path)
    assert "Waiting for the first event" in page
    assert get(port, f"{path}&since={version(page)}")[0] == 204
    log = EventLog(run)
    with log.run("train", {"eval_data": "dev.jsonl"}, {}):
        log.write("training", step=0, steps=100)
        log.write("log", step=5, steps=100, loss=1.5)
        status, page, _ = get(port, f"{path}&since={version(page)}")
        assert status == 200
        assert "Running" in page
        assert '<progress max="100" value="5"' in page
        assert "The two models are compared when training has ended." in page
    assert "Finished" in get(port, path)[1] or "finished" in version(get(port, path)[1])


def test_a_killed_run_is_shown_as_stalled_and_one_whose_folder_goes_as_waiting(port: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_lines(run, started(100), training(101), logged(102, 3))  # seconds after 1970: long ago
    page = get(port, f"/?token={TOKEN}")[1]
    assert "Stalled" in page
    assert "the run was killed, or it hangs" in page
    (run / "events.jsonl").unlink()
    assert "Waiting" in get(port, f"/?token={TOKEN}")[1]


def test_mistakes(tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="is a file; name the folder"):
        make_server(tmp_path / "file")
    assert main(["watch", str(tmp_path), "--port", str(port)]) == 1
    assert f"port={port} cannot be used" in capsys.readouterr().err
    assert main(["watch", str(tmp_path), "--port", "70000"]) != 0
    assert "between 0 and 65535" in capsys.readouterr().err
