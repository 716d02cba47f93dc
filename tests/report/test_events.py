import json
from pathlib import Path

import numpy as np
import pytest
import torch

from embtune.errors import ArgumentError, DataError, EmbtuneWarning
from embtune.report.events import EVENTS, EventLog, read_events
from embtune.report.run import LONG_SILENCE, SILENCE, Run, read_run


def write_lines(folder: Path, *events: dict) -> Path:
    (folder / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return folder


def started(time: float = 0.0) -> dict:
    return {"event": "run", "time": time, "format": 1, "command": "train", "settings": {}, "machine": {}}


def training(time: float, step: int = 0, steps: int = 10) -> dict:
    return {"event": "training", "time": time, "step": step, "steps": steps}


def logged(time: float, step: int, loss: float | str = 1.0) -> dict:
    return {"event": "log", "time": time, "step": step, "steps": 10, "loss": loss}


def test_events_are_lines_of_json(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "new" / "run")
    log.write("log", loss=float("nan"), counts=np.arange(3), one=np.float32(0.5), tensor=torch.ones(1), path=tmp_path)
    log.phase("Saving")
    events, damaged = read_events(log.path)
    assert damaged == 0
    assert [event["event"] for event in events] == ["log", "phase"]
    assert events[0] | {"time": 0} == {
        "event": "log",
        "time": 0,
        "loss": "nan",
        "counts": [0, 1, 2],
        "one": 0.5,
        "tensor": [1.0],
        "path": str(tmp_path),
    }
    assert "NaN" not in log.path.read_text(encoding="utf-8")


def test_nothing_is_written_before_the_first_event_and_a_new_run_starts_anew(tmp_path: Path) -> None:
    write_lines(tmp_path, started())
    log = EventLog(tmp_path)
    assert len(read_events(log.path)[0]) == 1
    log.phase("Loading")
    assert [event["event"] for event in read_events(log.path)[0]] == ["phase"]


def test_a_resumed_run_goes_on_behind_a_torn_line(tmp_path: Path) -> None:
    write_lines(tmp_path, started(), training(1.0))
    with (tmp_path / EVENTS).open("a", encoding="utf-8") as file:
        file.write('{"event": "log", "time"')
    assert read_events(tmp_path / EVENTS)[1] == 0
    EventLog(tmp_path, resume=True).phase("Loading")
    events, damaged = read_events(tmp_path / EVENTS)
    assert [event["event"] for event in events] == ["run", "training", "phase"]
    assert damaged == 1


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (None, "finished", None),
        (KeyboardInterrupt(), "interrupted", None),
        (DataError("train.csv, row 3 is empty."), "failed", "train.csv, row 3 is empty."),
        (RuntimeError("odd"), "failed", "RuntimeError('odd')"),
    ],
)
def test_how_a_run_ended(tmp_path: Path, error: BaseException | None, state: str, words: str | None) -> None:
    log = EventLog(tmp_path)
    if error is None:
        with log.run("train", {"seed": 1}, {"device": "cpu"}):
            assert read_run(tmp_path).state == "running"
    else:
        with pytest.raises(type(error)), log.run("train", {"seed": 1}, {"device": "cpu"}):
            raise error
    run = read_run(tmp_path)
    assert (run.state, run.error, run.settings) == (state, words, {"seed": 1})


def test_a_disk_that_fails_ends_the_log_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = EventLog(tmp_path / "file")
    with pytest.warns(EmbtuneWarning, match=r"cannot be written .* the run goes on"):
        log.phase("Loading")
    log.phase("Training")


def test_a_run_without_events_is_waiting(tmp_path: Path) -> None:
    assert read_run(tmp_path / "not yet").state == "waiting"
    (tmp_path / EVENTS).mkdir()
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_run(tmp_path)


def test_steps_that_a_resumed_run_takes_again_are_there_once(tmp_path: Path) -> None:
    first = [started(), training(1), *(logged(2 + step, step, loss=1.0) for step in (1, 2, 3, 4))]
    evaluations = [{"event": "evaluation", "time": 5, "step": step, "metrics": {"m": 0.5}} for step in (2, 4)]
    again = [started(20), training(21, step=2), *(logged(20 + step, step, loss=2.0) for step in (3, 4, 5))]
    run = read_run(write_lines(tmp_path, *first, *evaluations, *again, {"event": "finished", "time": 30}))
    assert [(point.step, point.loss) for point in run.log] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]
    assert [step for step, _ in run.evaluations] == [2]
    assert run.resumed == [2]
    assert run.seconds == 10


def test_silence_is_judged_by_what_the_run_does(tmp_path: Path) -> None:
    write_lines(tmp_path, started(100), training(101), logged(102, 1))
    assert read_run(tmp_path, now=102 + SILENCE - 1).state == "running"
    assert read_run(tmp_path, now=102 + SILENCE + 1).state == "stalled"
    write_lines(tmp_path, started(100), {"event": "phase", "time": 102, "what": "Measuring the model as it is"})
    assert read_run(tmp_path, now=102 + SILENCE + 1).state == "running"
    assert read_run(tmp_path, now=102 + LONG_SILENCE + 1).state == "stalled"
    write_lines(tmp_path, started(100), training(101), logged(102, 1), logged(202, 2), logged(302, 3))
    assert read_run(tmp_path, now=302 + 400).state == "running"
    assert read_run(tmp_path, now=302 + 600).state == "stalled"
    write_lines(tmp_path, started(100), training(101), logged(102, 1), {"event": "finished", "time": 103})
    assert read_run(tmp_path, now=10_000).state == "finished"


def test_the_time_that_is_left() -> None:
    run = Run("run")
    for event in (started(0), training(10, step=2), logged(14, 4)):
        run.take(event)
    assert run.seconds_left == pytest.approx(12)
    run.take({"event": "trained", "time": 30, "step": 10, "steps": 10})
    assert run.seconds_left is None


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "log", "time": 1, "step": 1, "steps": 2}',
        '{"event": "log", "time": 1, "step": "many", "steps": 2, "loss": 1}',
        '{"event": "log", "time": "noon", "step": 1, "steps": 2, "loss": 1}',
        '{"event": "evaluation", "time": 1, "step": 1, "metrics": [1]}',
        '{"event": "comparison", "time": 1}',
        '{"event": 1, "time": 1e999, "step": 1}',
        '{"event": "log"}',
        "[1, 2]",
        "\\x00\\xff",
    ],
)
def test_lines_that_make_no_sense_are_counted_and_passed_over(tmp_path: Path, line: str) -> None:
    (tmp_path / EVENTS).write_text(f"{json.dumps(started())}\n{line}\n{json.dumps(training(1))}\n", encoding="utf-8")
    run = read_run(tmp_path, now=2)
    assert run.damaged == 1 or line.startswith('{"event": 1')
    assert (run.state, run.steps, len(run.log)) == ("running", 10, 0)
