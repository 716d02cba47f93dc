import json
import random
from pathlib import Path

import pytest

VERBS = ["read", "sort", "count", "merge", "hash", "split"]
NOUNS = ["rows", "words", "files", "prices", "users", "colours", "trees", "queues"]


@pytest.fixture
def work_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: train.jsonl (32 pairs), dev.jsonl (16 other pairs), sts.csv and a BEIR folder."""
    pairs = [(f"how to {verb} {noun}", f"{verb} the {noun} of one customer") for verb in VERBS for noun in NOUNS]
    random.Random(0).shuffle(pairs)
    for name, part in (("train", pairs[:32]), ("dev", pairs[32:])):
        rows = (json.dumps({"anchor": anchor, "positive": positive}) for anchor, positive in part)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    scored = (f"{anchor},{positive},{index / 12}" for index, (anchor, positive) in enumerate(pairs[:12]))
    (tmp_path / "sts.csv").write_text("sentence1,sentence2,score\n" + "\n".join(scored) + "\n", encoding="utf-8")
    _write_beir(tmp_path / "beir", pairs[32:])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _write_beir(folder: Path, pairs: list[tuple[str, str]]) -> None:
    (folder / "qrels").mkdir(parents=True)
    columns = {"queries": [anchor for anchor, _ in pairs], "corpus": [positive for _, positive in pairs]}
    for name, texts in columns.items():
        rows = (json.dumps({"_id": f"{name[0]}{index}", "text": text}) for index, text in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    judged = "".join(f"q{index}\tc{index}\t1\n" for index in range(len(pairs)))
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged, encoding="utf-8")
