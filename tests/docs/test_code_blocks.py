"""Every Python block of the documents runs, file by file, as a reader would type it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TEXTS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


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


@pytest.mark.parametrize(
    "document",
    [d for d in DOCUMENTS if blocks(d, "python")],
    ids=lambda document: document.relative_to(ROOT).as_posix(),
)
def test_python_blocks_run(document: Path, tmp_path: Path, hub_cache: Path) -> None:
    rows = [
        {"anchor": f"{text} (question {i})", "positive": f"{text} (answer {i})"} for i, text in enumerate(TEXTS[:8])
    ]
    for name in ("pairs.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text(
            "".join(json.dumps({k: f"{name} {v}" for k, v in row.items()}) + "\n" for row in rows)
        )
    (tmp_path / "program.py").write_text("\n".join(blocks(document, "python")))
    environment = {**os.environ, "HF_HOME": str(hub_cache), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in "".join(blocks(document, "sh")).splitlines():
        if line.startswith("embtune "):
            command = [sys.executable, "-m", "embtune.cli.main", *shlex.split(line)[1:]]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"


def test_links_between_documents_lead_somewhere() -> None:
    for document in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
