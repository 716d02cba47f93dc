"""The page in a real Chromium: drawn, usable by keyboard, silent, and without serious mistakes in accessibility."""

import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_events import logged, started, training, write_lines

from embtune.report.events import EventLog
from embtune.report.page import REPORT, write_report
from embtune.report.watch import make_server

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]

if CHROMIUM is None:
    pytest.skip("no Chromium here: `make test-runtimes` installs Debian's", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright comes with the extra dev")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe comes with the extra dev")


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


class Watched:
    """A page whose every request, error and word on the console is remembered."""

    def __init__(self, browser: "sync_api.Browser", address: str, width: int = 1440, colours: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=colours)
        self.page.set_default_timeout(10_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(address)

    def mistakes(self) -> list[str]:
        """What axe-core finds serious, or worse."""
        # The page's policy forbids scripts that are not its own; a test's may be evaluated all the same.
        found = axe.Axe().run(self.page).response["violations"]
        return [
            f"{each['id']}: {each['nodes'][0]['html']}" for each in found if each["impact"] in ("serious", "critical")
        ]


@pytest.fixture(scope="module")
def compared(whole_run: Path, plain_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three runs."""
    folder = tmp_path_factory.mktemp("compared")
    shutil.copytree(whole_run, folder / "again", ignore=shutil.ignore_patterns("merged", "gguf", "checkpoints"))
    return write_report([whole_run, folder / "again", plain_run], folder / "all.html")


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["one", "several"])
def test_every_plot_draws_and_nothing_complains(
    browser: "sync_api.Browser", whole_run: Path, compared: Path, name: str, width: int, colours: str
) -> None:
    address = (whole_run / REPORT if name == "one" else compared).as_uri()
    watched = Watched(browser, address, width, colours)
    page = watched.page
    plots = page.locator("svg.plot")
    assert plots.count() >= 14
    for number in range(plots.count()):
        box = plots.nth(number).bounding_box()
        assert box is not None
        assert box["width"] > 200
        assert box["height"] > 40
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    # A colour for which the style sheet has no rule would be black in both schemes.
    painted = page.evaluate(
        """() => [...document.querySelectorAll("svg.plot [class*=stroke-], svg.plot [class*=fill-]")].map((part) =>
            [part.getAttribute("class"), getComputedStyle(part).stroke, getComputedStyle(part).fill].join(" "))"""
    )
    assert len(painted) > 100
    for part in painted:
        assert "rgb(0, 0, 0)" not in part or "fill-" not in part, part
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    tables = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map((part) => [part.clientWidth, part.scrollWidth])"
    )
    assert len(tables) >= 3
    if width == 390:  # their rows stand on end
        assert all(within == whole for within, whole in tables)
        first = page.locator("#metrics td").first
        assert first.evaluate("(cell) => getComputedStyle(cell, '::before').content").strip('"') == first.get_attribute(
            "data-label"
        )
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", background)[:3])) > 3 * 128
    assert light == (colours == "light")
    assert watched.mistakes() == []
    assert watched.complaints == []
    assert watched.requests == [address]
    page.close()


def test_the_explorer_by_keyboard(browser: "sync_api.Browser", whole_run: Path) -> None:
    watched = Watched(browser, (whole_run / REPORT).as_uri())
    page = watched.page
    page.locator("#filter").focus()
    options = page.locator("#queries [role=option]")
    assert options.count() == 16
    assert options.nth(0).get_attribute("aria-selected") == "true"
    assert options.nth(0).locator("span").nth(1).inner_text().startswith("−")
    first = page.locator("#detail h3").inner_text()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert options.nth(2).get_attribute("aria-selected") == "true"
    assert page.locator("#queries [aria-selected=true]").count() == 1
    assert page.locator("#detail h3").inner_text() != first
    page.keyboard.press("Tab")  # the order
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "queries"
    assert page.locator("#queries").get_attribute("aria-activedescendant") == "query-2"
    page.keyboard.press("End")
    assert options.nth(15).get_attribute("aria-selected") == "true"
    assert options.nth(15).is_visible()
    inside = "(item) => item.getBoundingClientRect().bottom <= item.parentNode.getBoundingClientRect().bottom"
    assert options.nth(15).evaluate(inside)
    page.keyboard.press("Home")
    assert page.locator("#detail h3").inner_text() == first
    assert page.locator("circle.ring").count() == 2
    page.locator("#filter").fill("onerror QUOTED")
    assert 0 < options.count() < 16
    assert f"{options.count()} quer" in page.locator("#count").inner_text()
    page.locator("#filter").fill("no such words")
    assert options.count() == 0
    assert "Clear the filter" in page.locator("#detail").inner_text()
    page.locator("#filter").fill("")
    page.locator("#order").select_option("best")
    assert options.nth(0).locator("span").nth(1).inner_text().startswith("+")
    assert page.title() != "owned"
    page.locator("#filter").fill("onerror")
    assert "<img src=x" in page.locator("#explorer").inner_text()
    assert watched.complaints == []
    page.close()


def test_a_point_of_the_map_chooses_its_query(browser: "sync_api.Browser", whole_run: Path) -> None:
    watched = Watched(browser, (whole_run / REPORT).as_uri())
    point = watched.page.locator(".map svg").nth(1).locator("use[data-point='5']")
    text = point.locator("title").text_content()
    point.dispatch_event("click")
    assert watched.page.locator("#detail h3").inner_text() == text
    watched.page.close()


def test_the_colours_can_be_chosen_and_are_remembered(browser: "sync_api.Browser", whole_run: Path) -> None:
    watched = Watched(browser, (whole_run / REPORT).as_uri())
    page = watched.page
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    button = page.get_by_role("button", name="Dark colours")
    button.focus()
    page.keyboard.press("Enter")
    after = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert after != before
    assert watched.mistakes() == []
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == after
    assert watched.complaints == []
    page.close()


def test_several_evaluations_in_the_explorer(browser: "sync_api.Browser", compared: Path) -> None:
    watched = Watched(browser, compared.as_uri())
    page = watched.page
    assert page.locator("#set option").all_inner_texts() == ["whole: dev.jsonl", "again: dev.jsonl"]
    page.locator("#set").select_option("1")
    page.locator("#queries").focus()
    page.keyboard.press("ArrowDown")
    rings = page.evaluate("[...document.querySelectorAll('.ring')].map((ring) => ring.closest('.map').dataset.map)")
    assert rings == ["1", "1"]
    assert watched.complaints == []
    page.close()


def test_a_page_without_script_still_shows_all_but_the_explorer(browser: "sync_api.Browser", whole_run: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((whole_run / REPORT).as_uri())
    assert page.locator("svg.plot").count() >= 14
    assert page.get_by_text("This list needs JavaScript").is_visible()
    context.close()


def test_watch_follows_a_run_and_sees_it_die(browser: "sync_api.Browser", tmp_path: Path, whole_run: Path) -> None:
    run = tmp_path / "run"
    server, address = make_server(run)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        watched = Watched(browser, address, width=390)
        page = watched.page
        page.get_by_text("Waiting for the first event").wait_for()
        log = EventLog(run)
        log.write("run", format=1, command="train", settings={"eval_data": "dev.jsonl"}, machine={"device": "cpu"})
        log.write("training", step=0, steps=10)
        for step in range(1, 4):
            log.write("log", step=step, steps=10, loss=1 / step, learning_rate=0.1)
        page.locator("svg.plot").nth(1).wait_for()
        assert page.locator("progress").get_attribute("value") == "3"
        assert "s ago" in page.locator(".ago").inner_text()
        assert watched.mistakes() == []
        write_lines(run, started(100), training(101), logged(102, 3))
        page.get_by_text("Stalled").wait_for()
        shutil.copy(whole_run / "events.jsonl", run / "events.jsonl")
        page.locator("#queries [role=option]").nth(15).wait_for()
        page.locator("#queries").focus()
        page.keyboard.press("ArrowDown")
        assert page.locator("#queries [role=option]").nth(1).get_attribute("aria-selected") == "true"
        assert page.locator("circle.ring").count() == 2
        assert {request.split("?")[0] for request in watched.requests} == {address.split("?")[0]}
        assert watched.complaints == []
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    page.get_by_text("embtune watch has ended").wait_for()
    page.close()
