import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from embtune.cli.main import main
from embtune.errors import ArgumentError
from embtune.report.events import EVENTS, EventLog, read_events
from embtune.report.page import MAX_RUNS, REPORT, render_page, write_report
from embtune.report.run import Run, read_run


class Page(HTMLParser):
    """Tags, attributes and texts of a page, as a browser would find them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def explorer_data(page: str) -> list:
    [found] = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def section(page: str, name: str) -> str:
    [found] = re.findall(rf'<section id="{name}".*?</section>', page, re.DOTALL)
    return found


def test_a_run_ends_with_its_page(whole_run: Path) -> None:
    page = (whole_run / REPORT).read_text(encoding="utf-8")
    assert len(page) < 1_000_000
    titles = re.findall(r'<title id="([\w-]+)-title">', page)
    assert titles == [
        "changes-0",
        *("training-loss", "training-rate", "training-speed", "evaluation-0", "evaluation-1", "evaluation-2"),
        *("similarity-0-before", "similarity-0-after", "map-0-before", "map-0-after"),
        *("lengths-0", "step-time", "memory"),
    ]
    for svg in re.findall(r"<svg .*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)
        assert "nan" not in svg.lower()
    results = json.loads((whole_run / "results.json").read_text(encoding="utf-8"))
    change = results["evaluations"]["dev"]["metrics"]["ndcg@10"]
    metrics = section(page, "metrics")
    assert f"{change['before']:.4f}" in metrics
    assert f"{change['after']:.4f}" in metrics
    assert change["verdict"] in metrics
    assert "no forgetting check" in metrics
    exports = section(page, "exports")
    assert re.search(r"cosine to the trained model at least (0.999|1.000)", exports)
    assert "every number read back" in exports
    assert "12" in section(page, "overview")
    assert "learning_rate" in section(page, "settings")


def test_the_page_needs_no_network_and_runs_only_its_own_script(whole_run: Path) -> None:
    page = Page((whole_run / REPORT).read_text(encoding="utf-8"))
    for tag, name, value in page.attributes:
        assert name != "style", tag
        assert not name.startswith("on"), tag
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:,")), (tag, value)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert "connect-src" not in policy
    assert page.tags.count("script") == 2
    assert not {"img", "iframe", "object", "embed", "form"} & set(page.tags)


def test_hostile_texts_are_shown_and_do_nothing(whole_run: Path) -> None:
    page = (whole_run / REPORT).read_text(encoding="utf-8")
    assert "onerror" in page
    assert "<img" not in page
    assert "{{ 7" in page
    [data] = explorer_data(page)
    assert any("</script><img" in query["text"] for query in data["queries"])
    assert any("</script><img" in document["text"] for document in data["documents"])


def test_every_text_that_a_run_can_hold_is_escaped(whole_run: Path, tmp_path: Path) -> None:
    """The texts of the event file, all of them, could come from anybody."""
    bad = "<img src=x onerror=alert(1)>"
    keys = {"event", "role", "verdict", "kind"}

    def spoilt(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {
                f"{name}{bad}" if key in ("metrics", "settings") else name: spoilt(item, name)
                for name, item in value.items()
            }
        if isinstance(value, list):
            return [spoilt(item) for item in value]
        return value + bad if isinstance(value, str) and key not in keys else value

    events = [spoilt(event) for event in read_events(whole_run / EVENTS)[0]]
    for event in events:
        if event["event"] == "comparison":
            event["item_metric"] = next(iter(event["metrics"]))
    run = tmp_path / f"run {bad}"
    run.mkdir()
    (run / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    page = render_page([read_run(run), read_run(whole_run)])
    assert "onerror" in page
    assert "img" not in Page(page).tags
    assert read_run(run).damaged == 0


def test_the_explorer_has_ranked_results_the_worst_first(whole_run: Path) -> None:
    [data] = explorer_data((whole_run / REPORT).read_text(encoding="utf-8"))
    changes = [query["after"]["score"] - query["before"]["score"] for query in data["queries"]]
    assert len(changes) == 16 == data["items"]
    assert changes == sorted(changes)
    assert changes[0] < 0 < changes[-1]
    for query in data["queries"]:
        for side in ("before", "after"):
            hits = query[side]["hits"]
            assert len(hits) == 5
            assert [score for _, score, _ in hits] == sorted((score for _, score, _ in hits), reverse=True)
            right = [rank for rank, (_, _, is_right) in enumerate(hits, 1) if is_right]
            if right:
                assert query[side]["rank"] == right[0]
                assert hits[right[0] - 1][0] in query["right"]


def test_several_runs_on_one_page(whole_run: Path, plain_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(whole_run, other, ignore=shutil.ignore_patterns("merged", "gguf", "checkpoints"))
    out = tmp_path / "all.html"
    assert main(["report", str(whole_run), str(other), str(plain_run), "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert "3 runs compared" in page
    overview = section(page, "overview")
    assert all(name in overview for name in ("whole", "other", "plain", "not measured"))
    assert "other against whole, both after training: ndcg@10 +0.0000" in section(page, "metrics")
    assert "engine" in section(page, "settings").split("All settings")[0]
    assert [data["label"] for data in explorer_data(page)] == ["whole: dev.jsonl", "other: dev.jsonl"]
    identifiers = re.findall(r' id="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_eight_long_runs_stay_below_three_megabytes(whole_run: Path, tmp_path: Path) -> None:
    events, _ = read_events(whole_run / EVENTS)
    [comparison] = [event for event in events if event["event"] == "comparison"]
    # As large as evidence gets: 150 queries, each with ten different documents of 240 characters; 150 points on maps.
    comparison["documents"] = [{"id": f"d{n}", "text": "語" * 240} for n in range(1500)]
    query = comparison["queries"][0]
    comparison["queries"] = [
        query
        | {"id": f"q{n}", "text": "語" * 240, "right": [10 * n]}
        | {
            side: query[side] | {"hits": [[10 * n + 5 * place + rank, 0.5, False] for rank in range(5)]}
            for place, side in enumerate(("before", "after"))
        }
        for n in range(150)
    ]
    points = comparison["map"]
    for side in ("before", "after"):
        for kind in ("queries", "documents"):
            points[side][kind] = [[n / 97 % 1, n / 89 % 1] for n in range(150)]
    points["queries"], points["texts"] = [f"q{n}" for n in range(150)], ["語" * 80] * 150
    log = next(event for event in events if event["event"] == "log")
    events[-1:-1] = [log | {"step": step, "loss": 1 / step} for step in range(20, 20_000)]
    run = tmp_path / "long"
    run.mkdir()
    (run / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    page = render_page([read_run(run)] * MAX_RUNS)
    assert len(page.encode()) < 3_000_000
    assert len(render_page([read_run(run)]).encode()) < 2_000_000


def test_a_run_without_evaluation_says_why(plain_run: Path) -> None:
    page = (plain_run / REPORT).read_text(encoding="utf-8")
    for name in ("metrics", "similarity", "map", "explorer"):
        assert "No held-out data was given" in section(page, name)
    assert "and this run computed it" in section(page, "speed")
    assert explorer_data(page) == []


def test_a_killed_run_whose_last_line_is_torn(whole_run: Path, tmp_path: Path) -> None:
    lines = (whole_run / EVENTS).read_bytes().split(b"\n")
    stop = next(number for number, line in enumerate(lines) if b'"comparison"' in line)
    (tmp_path / EVENTS).write_bytes(b"\n".join([*lines[:3], b"\x00garbage", *lines[3:stop], lines[stop][:200]]))
    page = render_page([read_run(tmp_path)])
    assert "Stalled" in section(page, "overview") or "Running" in section(page, "overview")
    assert "1 damaged line of the event file was passed over" in page
    assert "compared when training has ended" in section(page, "metrics")
    assert '<title id="training-loss-title">' in page


@pytest.mark.parametrize("state", ["waiting", "failed", "interrupted"])
def test_a_run_that_hardly_began_has_a_page(tmp_path: Path, state: str) -> None:
    log = EventLog(tmp_path)
    if state != "waiting":
        error = KeyboardInterrupt() if state == "interrupted" else ArgumentError("the disk is <b>full</b>")
        with pytest.raises(type(error)), log.run("train", {"eval_data": "dev.jsonl"}, {}):
            raise error
    run = read_run(tmp_path)
    assert run.state == state
    page = render_page([run])
    if state == "failed":
        assert "the disk is &lt;b&gt;full" in page
    if state != "waiting":
        assert "ended before the trained model was measured" in section(page, "metrics")


def test_a_loss_that_is_no_number_is_named(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    with log.run("train", {}, {}):
        log.write("training", step=0, steps=3)
        for step, loss in enumerate([1.0, float("nan"), float("nan")], 1):
            log.write("log", step=step, steps=3, loss=loss)
    page = render_page([read_run(tmp_path)])
    assert "the loss is no number at step 2" in page


@pytest.mark.parametrize("runs", [0, MAX_RUNS + 1])
def test_too_few_and_too_many_runs_are_refused(whole_run: Path, runs: int) -> None:
    with pytest.raises(ArgumentError, match="a page compares 1 to 8"):
        write_report([whole_run] * runs)


def test_mistakes_on_the_command_line(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path / "nothing")], "holds no events.jsonl. Name the folder of a run"),
        ([], "Name at least one run"),
        ([str(whole_run), "--out", str(tmp_path)], "must end in .html"),
        ([str(whole_run), "--out", str(whole_run / EVENTS)], "must end in .html, which is what is written"),
        ([str(whole_run), "--out", str(whole_run / EVENTS / "page.html")], "is a file; give a folder"),
    ):
        assert main(["report", *arguments]) != 0
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_page_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    line = {"event": "run", "time": 1.0, "format": 99, "command": "train", "settings": {}, "machine": {}}
    (tmp_path / EVENTS).write_text(json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(ArgumentError, match="newer embtune"):
        read_run(tmp_path)


def test_the_template_is_given_all_it_asks_for() -> None:
    assert "waiting" in render_page([Run("not there yet")])


def test_a_run_from_python_needs_its_callback(tmp_path: Path) -> None:
    (tmp_path / "own" / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(ArgumentError, match=r"trainer\.add_callback\(EventCallback\(EventLog\('.*own'\)\)\)"):
        write_report([tmp_path / "own"])
    # With that line alone, a program says nothing of when it began and ended.
    log = EventLog(tmp_path / "own")
    log.write("training", step=0, steps=4)
    assert read_run(tmp_path / "own").state == "running"
    log.write("log", step=4, steps=4, loss=1.5)
    log.write("trained", step=4, steps=4)
    assert read_run(tmp_path / "own").state == "finished"
    assert "Waiting for the first event" not in write_report([tmp_path / "own"]).read_text(encoding="utf-8")
