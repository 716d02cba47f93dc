from collections.abc import Callable
from pathlib import Path

import pytest

from embtune import FastSentenceTransformer
from embtune.errors import ArgumentError, DataError
from embtune.evaluate import evaluate_mteb, mteb_tasks

mteb = pytest.importorskip("mteb", reason="needs the extra mteb")
pytestmark = pytest.mark.filterwarnings("default")  # mteb brings many of its own


@pytest.fixture(scope="module")
def model(tiny_dir: Callable[..., Path]) -> FastSentenceTransformer:
    return FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", device="cpu", for_inference=True)


def test_tasks_of_several_kinds(model: FastSentenceTransformer) -> None:
    from mteb import mocks

    tasks = [
        *(mocks.MockSTSTask(), mocks.MockRetrievalTask(), mocks.MockRerankingTask()),
        *(mocks.MockMultilingualRetrievalTask(), mocks.MockMultilingualClassificationTask()),
        *(mocks.MockPairClassificationTask(), mocks.MockClusteringTask()),
    ]
    scores = evaluate_mteb(model, tasks, batch_size=2)
    assert [score.metric for score in scores] == [task.metadata.main_score for task in tasks]
    assert all(-1 <= score.score <= 1 for score in scores)
    # What mteb predicted adds up to its scores, item by item; of the last two it gives no such thing.
    assert [score.items is not None for score in scores] == [True] * 5 + [False] * 2
    for score in scores[:5]:
        assert score.compared_with(score).metrics[score.metric].verdict == "no clear change"


def test_tasks_are_known_by_name() -> None:
    [task] = mteb_tasks(["STS12"])
    assert task.metadata.name == "STS12"
    with pytest.raises(ArgumentError, match="STS17"):
        mteb_tasks(["STS1x"])


def test_data_that_are_not_here_are_named(model: FastSentenceTransformer) -> None:
    with pytest.raises(DataError, match="The data of the MTEB task STS12"):
        evaluate_mteb(model, mteb_tasks(["STS12"]))
