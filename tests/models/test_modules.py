"""A model whose structure is fixed for a while: the same modules and parameters, found once."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

from torch import nn

from embtune import FastSentenceTransformer


def test_while_the_structure_is_fixed_walks_give_the_same(tiny_dir: Callable[..., Path]) -> None:
    model = FastSentenceTransformer.from_pretrained(tiny_dir("albert"), device="cpu")  # its layers share weights
    model = FastSentenceTransformer.get_peft_model(model)
    expected = [id(parameter) for parameter in model.parameters()]
    with model.fixed_structure():
        assert [id(parameter) for parameter in model.parameters()] == expected
        model.train()
        assert all(module.training for module in model.modules())
        model[0].eval()
        model.train()
        assert all(module.training for module in model.modules())
        model.eval()
        assert not any(module.training for module in model.modules())
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not {id(parameter) for parameter in twin.parameters()} & set(expected)
            assert len(list(twin.parameters())) == len(expected)
    model[1].extra = nn.Linear(2, 2)
    assert len(list(model.parameters())) == len(expected) + 2
