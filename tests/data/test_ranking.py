import pytest
import torch

from embtune.data.ranking import merge_best


@pytest.mark.parametrize("block", [1, 2, 7, 50, 200])
@pytest.mark.parametrize("distinct", [1, 3, 1000])
def test_blocks_give_the_order_of_one_stable_sort(block: int, distinct: int) -> None:
    torch.manual_seed(0)
    scores_QD = torch.randint(distinct, (9, 200)).float()
    best = torch.full((9, 12), -torch.inf), torch.full((9, 12), -1)
    for first in range(0, 200, block):
        best = merge_best(*best, scores_QD[:, first : first + block], first)
    expected = scores_QD.sort(dim=1, descending=True, stable=True)
    assert torch.equal(best[0], expected.values[:, :12])
    assert torch.equal(best[1], expected.indices[:, :12])
