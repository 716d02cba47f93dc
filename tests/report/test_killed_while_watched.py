"""A run is killed while `embtune watch` shows it, and gone on with: three real processes and one page."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from embtune.cli.main import main
from embtune.report.alive import is_gone, this_process
from embtune.report.run import read_run
from embtune.train.checkpoint_folders import step_of

PATIENCE = 120  # seconds for what takes a few on a machine that has nothing else to do

EMBTUNE = [sys.executable, "-u", "-m", "embtune.cli.main"]


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Gets the page from `embtune watch` of the run, which is not there yet."""
    with subprocess.Popen([*EMBTUNE, "watch", str(tmp_path / "run")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = urlsplit(next(line.strip() for line in process.stdout if line.startswith("http://")))

        def get() -> str:
            connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=PATIENCE)
            connection.request("GET", f"{address.path}?{address.query}")
            answer = connection.getresponse()
            assert answer.status == 200
            return answer.read().decode()

        yield get
        assert process.poll() is None
        process.terminate()


def wait_for(get: Callable[[], str], pattern: str) -> str:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        page = get()
        if re.search(pattern, page):
            return page
        time.sleep(0.1)
    raise AssertionError(f"{pattern} never came; the page says {state(page)}")


def state(page: str) -> str:
    line = re.search(r'<p class="state [^>]*>(.*?)</p>', page, re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", line[1] if line else "nothing").split())


def test_a_run_that_is_killed_while_it_is_watched(
    watch: Callable[[], str], tmp_path: Path, tiny_dir: Callable[..., Path]
) -> None:
    rows = ({"anchor": f"how to read {n} rows", "positive": f"read the rows of {n} tables"} for n in range(32))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert "Waiting for the first event" in watch()
    flags = ["--model", str(tiny_dir("bert")), "--data", str(tmp_path / "train.jsonl"), "--batch-size", "8"]
    flags += ["--max-steps", "100000", "--save-steps", "5", "--output", str(tmp_path / "run")]
    with subprocess.Popen([*EMBTUNE, "train", *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        assert state(wait_for(watch, r"\d+ checkpoints? saved")).startswith("Running Training")
        os.kill(run.pid, signal.SIGKILL)
        wait_for(watch, "Killed")  # before its parent has asked how it ended, and after
        assert run.wait() == -signal.SIGKILL
    page = watch()
    assert state(page).startswith("Killed The process is gone without a word")
    assert f"To go on from its last checkpoint: embtune train --resume {tmp_path / 'run'}" in state(page)
    assert "<progress" not in page

    # One that was being written is still there under a hidden name.
    saved = max(step_of(folder) for folder in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert main(["train", "--resume", str(tmp_path / "run"), "--max-steps", str(saved + 10)]) == 0
    page = watch()
    assert "Killed" not in page
    resumed = re.search(r"resumed at step (\d+)", page)
    assert resumed is not None and 0 < int(resumed[1]) <= saved
    assert f"<dt>Steps</dt><dd>{saved + 10:,}</dd>" in page


def test_who_is_gone(tmp_path: Path) -> None:
    here = this_process()
    now = time.time()
    assert not is_gone(here, now)
    assert is_gone(here, last_seen=0.0)  # this process began after that: the one that was meant had its number before
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    assert is_gone(here | {"pid": ended.pid}, now)
    started = {"event": "run", "format": 1, "time": now, "command": "train", "settings": {}, "machine": {}}
    started["process"] = here | {"pid": ended.pid}
    events = tmp_path / "events.jsonl"
    events.write_text(json.dumps(started) + "\n", encoding="utf-8")
    assert read_run(tmp_path).state == "killed"
    events.write_text(f"{json.dumps(started)}\n" + json.dumps({"event": "finished", "time": now}), encoding="utf-8")
    assert read_run(tmp_path).state == "finished"
    # Of a process on another machine, or in another container, nothing is known from here.
    assert not is_gone({"place": "elsewhere", "pid": ended.pid}, now)
    assert not is_gone({}, now)
