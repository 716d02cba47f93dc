"""Pooling of a flat row equals sentence-transformers' pooling of the padded batch."""

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling

from embtune.packing.pool import POOLING_MODES, pool


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_pool_equals_padded_pooling(mode: str) -> None:
    lengths = torch.tensor([3, 1, 7, 64])
    mask = (torch.arange(64) < lengths[:, None]).long()
    padded = torch.randn(4, 64, 8, requires_grad=True)
    expected = Pooling(8, pooling_mode=mode)({"token_embeddings": padded, "attention_mask": mask})["sentence_embedding"]
    row = padded.detach()[mask.bool()].requires_grad_()
    borders = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    pooled = pool(row, borders, torch.repeat_interleave(lengths), mode)
    torch.testing.assert_close(pooled, expected)
    weights = torch.randn_like(expected)
    (pooled * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(row.grad, padded.grad[mask.bool()])
