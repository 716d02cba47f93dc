"""Every command and Python block of the documents runs, file by file and in their order, as readers type them."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from tiny import TEXTS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Blocks behind `<!-- not run: … -->`, and single lines that set an environment up: all that is not run, and why.
SKIPPED_BLOCKS = {
    ("docs/how-to/evaluate.md", "downloads data of the benchmark"),
    ("docs/how-to/export.md", "needs an account on the Hub"),
    ("docs/how-to/inspect.md", "writes into the shell's own folder"),
}
SET_UP = {"make demo", "make test", "pip install ."}

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)

# Imports everything once, and then runs each folder's steps.json, document by document, in a copy of itself.
RUNNER = """
import json, os, shlex, sys, traceback
from embtune.cli import evaluate, mine, train
from embtune.cli.main import main

def run(steps):
    variables = {"__name__": "__main__"}
    for language, text in steps:
        print(">>>", text, flush=True)
        if language == "python":
            exec(compile(text, "block", "exec"), variables)
        elif main(shlex.split(text)[1:]) != 0:
            return 1
    return 0

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.chdir(line.strip())
        log = os.open("log.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1), os.dup2(log, 2)
        try:
            code = run(json.load(open("steps.json", encoding="utf-8")))
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    language: str
    text: str
    reason: str | None
    """Why it is not run."""


def blocks(document: Path) -> list[Block]:
    found = _BLOCK.finditer(document.read_text(encoding="utf-8"))
    return [Block(match["language"], match["text"], match["reason"]) for match in found]


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def commands(block: Block) -> Iterator[str]:
    """The lines of a block of commands, their comments taken off."""
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield shlex.join(words)


def steps(document: Path) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for block in blocks(document):
        if block.reason is None and block.language == "python":
            found.append(("python", block.text))
        elif block.reason is None and block.language == "sh":
            found += [("sh", line) for line in commands(block) if line.startswith("embtune ")]
    return found


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path) -> Path:
    """A download cache that holds all-MiniLM-L6-v2 under its name on the Hub."""
    home = tmp_path_factory.mktemp("home")
    repository = home / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2"
    revision = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / revision).symlink_to(minilm_dir, target_is_directory=True)
    return home


VERBS = ("read", "sort", "count", "merge", "hash", "split", "open", "close", "copy", "move", "print", "rename")
NOUNS = ("rows", "words", "files", "prices", "users", "trees", "dates", "lists")


@pytest.fixture
def readers_folder(tmp_path: Path, minilm_dir: Path) -> Path:
    """The files that the documents speak of, small."""
    for name in ("pairs.jsonl", "more.jsonl", "held_out.jsonl"):
        rows = (
            {"anchor": f"{name} {text} (question {i})", "positive": f"{name} {text} (answer {i})"}
            for i, text in enumerate(TEXTS[:8])
        )
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    faq = [f"How can I {verb} the {noun}?,Choose {verb} in the menu of {noun}." for noun in NOUNS for verb in VERBS]
    faq = [f"{row},{ticket}" for ticket, row in enumerate(faq)]
    write_csv(tmp_path / "faq.csv", "Customer asks,Agent says,ticket", faq[:72])
    write_csv(tmp_path / "faq-held-out.csv", "Customer asks,Agent says,ticket", faq[72:])
    write_csv(
        tmp_path / "sts.csv", "sentence1,sentence2,score", [f"read {t},open {t},{i}" for i, t in enumerate(NOUNS)]
    )
    labelled = [f"how to {verb} {noun},{label}" for label, verb in enumerate(VERBS[:3]) for noun in NOUNS]
    write_csv(tmp_path / "texts.csv", "text,label", labelled)
    write_csv(tmp_path / "texts-train.csv", "text,label", [f"please {row}" for row in labelled])
    (tmp_path / "my-model").symlink_to(minilm_dir, target_is_directory=True)
    return tmp_path


def write_csv(path: Path, header: str, rows: list[str]) -> None:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def runner(hub_cache: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)  # which the tests of kernels set, and no reader does
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", RUNNER], env=environment, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if steps(d)], ids=name_of)
def test_every_block_runs(document: Path, readers_folder: Path, runner: subprocess.Popen[str]) -> None:
    (readers_folder / "steps.json").write_text(json.dumps(steps(document)), encoding="utf-8")
    runner.stdin.write(f"{readers_folder}\n")
    runner.stdin.flush()
    code = runner.stdout.readline().strip()
    assert code == "0", (readers_folder / "log.txt").read_text(encoding="utf-8")[-4000:]


def test_all_that_is_not_run_is_listed_with_its_reason() -> None:
    found = [(name_of(document), block) for document in DOCUMENTS for block in blocks(document)]
    assert {(name, block.reason) for name, block in found if block.reason} == SKIPPED_BLOCKS
    lines = {line for _, block in found if block.language == "sh" and not block.reason for line in commands(block)}
    assert {line for line in lines if not line.startswith("embtune ")} == SET_UP
    assert {block.language for _, block in found} <= {"python", "sh", "yaml", "text"}
    for _, block in found:
        if block.language == "yaml":
            assert yaml.safe_load(block.text)


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    def pages(entries: list) -> Iterator[str]:
        for entry in entries:
            if isinstance(entry, str):
                yield entry
            else:
                yield from pages(next(iter(entry.values())))

    navigation = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    written = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(navigation) == sorted(written)


def test_what_the_reference_shows_is_there() -> None:
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        shown = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert shown
        for name in shown:
            path = ROOT.joinpath("src", *name.split("."))
            module = path if path.with_suffix(".py").exists() else path.parent
            assert module.with_suffix(".py").exists(), name
            if module != path:
                source = module.with_suffix(".py").read_text(encoding="utf-8")
                assert re.search(rf"^(class|def) {path.name}\b", source, re.MULTILINE), name
