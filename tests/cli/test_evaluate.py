import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from embtune.api import FastSentenceTransformer
from embtune.cli.main import main
from embtune.cli.tasks import EvaluationTask
from embtune.data.readers import read_dataset
from embtune.errors import DataError
from embtune.evaluate import evaluate_classification
from embtune.runtime import is_installed


def test_one_model_one_line(work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_dir("bert"))
    assert main(["evaluate", model, "--data", "dev.jsonl", "--k", "3"]) == 0
    shown = capsys.readouterr().out
    assert "16 queries and 16 documents from dev.jsonl" in shown
    assert "ndcg@3" in shown
    assert shown.count("95% interval") == 1


def test_the_first_of_several_is_the_baseline(
    work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(tiny_dir(family)) for family in ("bert", "mpnet", "distilbert")]
    assert main(["evaluate", *models, "--data", "beir", "--split", "dev"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    for other in models[1:]:
        assert f"{models[0]}(before)and{other}(after)" in shown
    assert shown.count("95%interval") == 3


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
    low, high = result["results"][0]["intervals"]["spearman"]
    assert low < result["results"][0]["metrics"]["spearman"] < high
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


def write_labelled(path: Path, rows: int) -> None:
    lines = (f"{('read the rows', 'sort the words', 'hash a tree')[i % 3]} {i},{i % 3}" for i in range(rows))
    path.write_text("text,label\n" + "\n".join(lines) + "\n", encoding="utf-8")


def test_clustering_and_classification(
    work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    write_labelled(work_dir / "texts.csv", 30)
    write_labelled(work_dir / "probe.csv", 24)
    models = [str(tiny_dir(family)) for family in ("bert", "distilbert")]
    assert main(["evaluate", *models, "--data", "texts.csv", "--task", "clustering"]) == 0
    shown = capsys.readouterr().out
    assert "clustering of 30 texts (text) in 3 classes (label) from texts.csv" in shown
    assert "v_measure" in shown and "95% interval" in shown
    line = ["evaluate", models[0], "--data", "texts.csv", "--task", "classification", "--train-data", "probe.csv"]
    assert main([*line, "--json"]) == 0
    captured = capsys.readouterr()
    assert "with a probe trained on 24 others" in captured.err
    [result] = json.loads(captured.out)["results"]
    model = FastSentenceTransformer.from_pretrained(models[0], dtype="float32", for_inference=True)
    probe, texts = (read_dataset(name) for name in ("probe.csv", "texts.csv"))
    expected = evaluate_classification(model, probe["text"], probe["label"], texts["text"], texts["label"])
    assert result["metrics"] == pytest.approx(expected.metrics)
    assert EvaluationTask.read("texts.csv", {}, task="clustering").main_metric == "v_measure"


def test_classes_may_have_names(
    work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names = "read", "sort", "hash"
    for numbered, rows in (("texts.csv", 30), ("probe.csv", 24)):
        write_labelled(work_dir / numbered, rows)
        lines = (work_dir / numbered).read_text(encoding="utf-8").splitlines()[1:]
        named = ["Text,Topic", *(f"{line[:-1]}{names[int(line[-1])]}" for line in lines)]
        (work_dir / f"named-{numbered}").write_text("\n".join(named) + "\n", encoding="utf-8")
    found = []
    for prefix in ("", "named-"):
        line = ["evaluate", str(tiny_dir("bert")), "--data", f"{prefix}texts.csv", "--task", "classification"]
        line += ["--train-data", f"{prefix}probe.csv", "--json"]
        assert main([*line, *(["--columns", "Text=text", "Topic=label"] if prefix else [])]) == 0
        found.append(json.loads(capsys.readouterr().out)["results"][0]["metrics"])
    assert found[0] == found[1]
    with (work_dir / "named-texts.csv").open("a", encoding="utf-8") as file:
        file.write("a text,cooking\n")
    columns = {"Text": "text", "Topic": "label"}
    with pytest.raises(DataError, match=r"named-texts.csv, row 31, .* is of class cooking"):
        EvaluationTask.read("named-texts.csv", columns, task="classification", train_data="named-probe.csv")


def test_wrong_models_are_named_before_any_is_measured(
    work_dir: Path, tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_dir("bert")
    (work_dir / "run").mkdir()
    (work_dir / "run" / "merged").symlink_to(model, target_is_directory=True)
    for name, base in (("adapter", str(work_dir / "gone" / "base")), ("other", "bsae")):
        (work_dir / name).mkdir()
        (work_dir / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    shutil.copytree(model, work_dir / "base")
    for wrong, message in (
        ("./mergd", "./mergd: there is no such folder. Check"),
        ("./bsae", "./bsae: there is no such folder. Did you mean base?"),
        ("nowhere", "nowhere: there is no such folder, and no model of that name could be loaded from the Hub"),
        ("run/mergd", "run/mergd: there is no such folder, and no model"),
        ("run/mergd", "Did you mean run/merged? Check"),
        ("adapter", "gone/base, which the adapter adapter names as its base: there is no such folder. Put the base"),
        ("adapter", "base_model_name_or_path into adapter/adapter_config.json"),
        ("other", "bsae, which the adapter other names as its base: there is no such folder, and no model"),
        ("run", "is no model itself, but holds run/merged"),
    ):
        assert main(["evaluate", str(model), wrong, "--data", "dev.jsonl"]) == 1
        captured = capsys.readouterr()
        assert message in " ".join(captured.err.split())
        assert "Measuring" not in captured.out


def test_without_mteb_the_message_says_how_to_get_it(
    tiny_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    if is_installed("mteb"):
        pytest.skip("mteb is installed")
    assert main(["evaluate", str(tiny_dir("bert")), "--mteb", "STS12"]) == 1
    assert 'pip install "embtune[mteb]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--data DATA, or --mteb TASK"),
        ("--data dev.jsonl --mteb STS12", "--data DATA, or --mteb TASK"),
        ("--mteb STS12 --k 3 --task sts", "k, task: tasks of MTEB settle that themselves"),
        ("--mteb STS12 STS12", "names a task twice"),
    ],
)
def test_what_to_measure_on_is_said_once(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "model", *options.split()]) in (1, 2)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
