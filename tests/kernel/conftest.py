from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def nan_scratch() -> Iterator[None]:
    """Memory that a kernel allocates holds NaN until something is written there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _interpreted(interpreter: None) -> None:
    pass
