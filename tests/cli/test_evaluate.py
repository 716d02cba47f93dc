import json
from collections.abc import Callable
from pathlib import Path

import pytest

from embtune.cli.evaluate import EvaluationTask
from embtune.cli.main import main
from embtune.errors import DataError


def test_one_model_one_line(work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_dir("bert"))
    assert main(["evaluate", model, "--data", "dev.jsonl", "--k", "3"]) == 0
    shown = capsys.readouterr().out
    assert "16 queries and 16 documents from dev.jsonl" in shown
    assert "ndcg@3" in shown
    assert "interval" not in shown


def test_the_first_of_several_is_the_baseline(
    work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(tiny_dir(family)) for family in ("bert", "mpnet", "distilbert")]
    assert main(["evaluate", *models, "--data", "beir", "--split", "dev"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    for other in models[1:]:
        assert f"{models[0]}(before)and{other}(after)" in shown
    assert shown.count("95%interval") == 2


def test_json_is_all_there_is_on_standard_output(
    work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bert, mpnet = (str(tiny_dir(family)) for family in ("bert", "mpnet"))
    assert main(["evaluate", bert, mpnet, "--data", "sts.csv", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert "Measuring" in captured.err
    assert [row["model"] for row in result["results"]] == [bert, mpnet]
    assert {row["kind"] for row in result["results"]} == {"sts"}
    [comparison] = result["comparisons"]
    assert comparison["before"] == bert
    spearman = comparison["metrics"]["spearman"]
    assert spearman["before"] == pytest.approx(result["results"][0]["metrics"]["spearman"])
    assert spearman["after"] == pytest.approx(result["results"][1]["metrics"]["spearman"])


def test_tasks_are_recognised_by_their_columns(work_dir: Path) -> None:
    retrieval = EvaluationTask.read("dev.jsonl", {"anchor": "anchor", "positive": "positive"}, k=5)
    assert (retrieval.main_metric, str(retrieval)) == ("ndcg@5", "16 queries and 16 documents from dev.jsonl")
    similarity = EvaluationTask.read("sts.csv", {})
    assert (similarity.main_metric, str(similarity)) == ("spearman", "12 scored pairs of sentences from sts.csv")
    with pytest.raises(DataError, match="sentence1, sentence2, with which nothing can be measured"):
        EvaluationTask.read("sts.csv", {"sentence1": "sentence1", "sentence2": "sentence2"})
