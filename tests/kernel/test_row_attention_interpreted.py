"""Attention over a flat row against its twin, on the CPU through Triton's interpreter."""

import sys
from typing import Any

import pytest
import torch
from row_attention_cases import CASES, Case
from torch import Tensor

# With numpy 2.4, the interpreter before 3.7 cannot loop up to a number that a kernel has read.
pytest.importorskip("triton", minversion=None if torch.cuda.is_available() else "3.7")

from embtune.errors import ArgumentError, MissingPackageError
from embtune.kernels.row_attention import row_attention, text_bounds
from embtune.kernels.row_attention_plain import kept_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [1, 2, 15, 63, 64, 65]


@pytest.mark.usefixtures("nan_scratch")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients_are_those_of_the_twin(case: Case) -> None:
    assert all(error < 2e-6 for error in case.error(LENGTHS, DEVICE, torch.float32).values())


@pytest.mark.usefixtures("nan_scratch")
@pytest.mark.parametrize("lengths", [[1], [33], [130, 1, 1, 1, 31]], ids=str)
def test_rows_of_any_length(lengths: list[int]) -> None:
    # A row of one token has weights of 1, and gradients of the scores that are zero.
    errors = Case().error(lengths, DEVICE, torch.float32)
    checked = ["out", "v_TGD"] if lengths == [1] else list(errors)
    assert all(errors[name] < 2e-6 for name in checked)


def test_half_precision_stays_near_the_twin() -> None:
    case = Case(head_dim=64, distances=41, settings={"dropout": 0.1})
    assert all(error < 2e-3 for error in case.error(LENGTHS, DEVICE, torch.float16).values())


@pytest.mark.usefixtures("nan_scratch")
@pytest.mark.parametrize(
    ("distances", "longest", "settings"),
    [(3, 70, {}), (5, 70, {}), (41, 70, {"causal": True, "window": (30, 7)}), (257, 150, {})],
    ids=["3", "5", "41, causal window", "257"],
)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "bound"),
    [(torch.float32, 32, 2e-6), (torch.float32, 72, 2e-6), (torch.float16, 16, 2e-3)],
    ids=["32 x 32", "16 x 16", "64 x 32 and 32 x 64"],
)
def test_a_bias_in_tiles_of_each_shape(
    dtype: torch.dtype, head_dim: int, bound: float, distances: int, longest: int, settings: dict[str, object]
) -> None:
    # A text longer than the bias reaches to either side; texts begin and end inside tiles.
    errors = Case(2, 1, head_dim, distances, settings).error([7, longest, 21], DEVICE, dtype)
    assert all(error < bound for error in errors.values()), errors


def test_views_of_one_projection_and_a_broadcast_gradient() -> None:
    inputs = Case().inputs(LENGTHS, DEVICE, torch.float32)
    names = ("q_THD", "k_TGD", "v_TGD")
    joined = torch.stack([inputs[name].detach() for name in names], 1).requires_grad_()
    bounds = inputs["starts_T"], inputs["ends_T"]
    row_attention(*joined.unbind(1), *bounds).sum().backward()
    row_attention(*(inputs[name] for name in names), *bounds).sum().backward()
    for index, name in enumerate(names):
        torch.testing.assert_close(joined.grad[:, index], inputs[name].grad)
    strided = joined.detach().permute(1, 2, 3, 0).contiguous().permute(0, 3, 1, 2)
    assert strided.stride(-1) != 1
    dense = row_attention(*joined.detach().unbind(1), *bounds)
    torch.testing.assert_close(row_attention(*strided, *bounds), dense)


def test_a_text_changes_no_other() -> None:
    inputs = Case().inputs(LENGTHS, DEVICE, torch.float32)
    inputs = {name: part.detach() for name, part in inputs.items()}
    before = row_attention(**inputs)
    text = slice(18, 81)
    for name in ("q_THD", "k_TGD", "v_TGD"):
        inputs[name][text] *= -2
    after = row_attention(**inputs)
    assert not torch.isclose(before[text], after[text]).all(-1).any()
    assert torch.equal(torch.cat([before[:18], before[81:]]), torch.cat([after[:18], after[81:]]))


def test_a_frozen_bias_gets_no_gradient() -> None:
    inputs = CASES["bias"].inputs(LENGTHS, DEVICE, torch.float32)
    wanted = torch.autograd.grad(row_attention(**inputs).square().sum(), inputs["q_THD"])[0]
    inputs["bias_HR"].requires_grad_(False)
    found = torch.autograd.grad(row_attention(**inputs).square().sum(), inputs["q_THD"])[0]
    torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("nan_scratch")
def test_a_bias_may_be_a_view_of_another_order() -> None:
    # MPNet's is: an embedding of each distance, transposed.
    inputs = CASES["bias"].inputs(LENGTHS, DEVICE, torch.float32)
    table = inputs.pop("bias_HR").detach()
    found = []
    for bias in (table.clone(), table.T.contiguous().T):
        row_attention(**inputs, bias_HR=bias.requires_grad_()).square().sum().backward()
        found.append(bias.grad)
    assert not bias.is_contiguous()
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("seed", [0, 7, -3, 2**40 + 1])
def test_the_twin_drops_the_same_weights(seed: int) -> None:
    # With values that are the unit vectors, the output is the weights themselves.
    tokens = 64
    q, k = (torch.randn(tokens, heads, tokens, device=DEVICE) for heads in (2, 1))
    identity = torch.eye(tokens, device=DEVICE)[:, None]
    bounds = text_bounds(torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE), tokens)
    number = torch.tensor([seed], device=DEVICE)
    whole = row_attention(q, k, identity, *bounds).transpose(0, 1)
    dropped = row_attention(q, k, identity, *bounds, dropout=0.4, seed=number).transpose(0, 1)
    kept = kept_weights(number, 2, tokens, 0.4)
    torch.testing.assert_close(dropped, torch.where(kept, whole / 0.6, 0.0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropped_weights_are_as_good_as_independent(dropout: float) -> None:
    tokens, heads = 256, 4
    seeds = [torch.tensor([seed]) for seed in (5, 6, 5 + 2**32)]
    kept = torch.cat([kept_weights(seed, heads, tokens, dropout) for seed in seeds]).double()
    signs = (kept - (1 - dropout)) / (dropout * (1 - dropout)) ** 0.5
    # Each sum has a standard deviation of 1: over everything, over heads and seeds, and of neighbours.
    pairs = tokens * (tokens - 1) * len(signs)
    sums = [signs.sum() / signs.numel() ** 0.5]
    sums += [(signs[i] * signs[j]).sum() / tokens for i in range(len(signs)) for j in range(i)]
    sums += [(signs[:, 1:] * signs[:, :-1]).sum() / pairs**0.5, (signs[..., 1:] * signs[..., :-1]).sum() / pairs**0.5]
    sums += [(signs[:, 1:, 1:] * signs[:, :-1, :-1] * signs[:, 1:, :-1] * signs[:, :-1, 1:]).sum() / pairs**0.5]
    assert max(abs(float(total)) for total in sums) < 4.5
    # The largest singular value of a random matrix: a pattern along rows or columns would stand out of it.
    largest = torch.linalg.matrix_norm(signs, 2) / (2 * tokens**0.5)
    assert (largest < 1.15).all()


def test_compiled_code_takes_the_operator_whole() -> None:
    case = CASES["everything"]
    inputs = case.inputs([5, 9], DEVICE, torch.float32)
    compiled = torch.compile(row_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    found, expected = case.gradients(compiled, inputs), case.gradients(row_attention, inputs)
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted)


def test_the_operator_keeps_its_promises() -> None:
    case = CASES["everything"]
    inputs = case.inputs([5, 9], DEVICE, torch.float32)
    names = ("q_THD", "k_TGD", "v_TGD", "starts_T", "ends_T", "bias_HR", "seed")
    arguments = (*(inputs[name] for name in names), 0.2, 40, 0, 0.1)
    torch.library.opcheck(torch.ops.embtune.row_attention.default, arguments)


def test_text_bounds() -> None:
    borders = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)
    starts, ends = text_bounds(borders, 6)
    assert starts.tolist() == [0, 0, 2, 2, 2, 5]
    assert ends.tolist() == [2, 2, 5, 5, 5, 6]
    assert starts.dtype == ends.dtype == torch.int32


def states(tokens: int = 4, heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(tokens, heads, head_dim, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q_THD": states()[0]}, r"expected q \[T, H, D\]"),
        ({"k_TGD": states(5), "v_TGD": states(5)}, r"expected q \[T, H, D\]"),
        ({"v_TGD": states(heads=1)}, r"expected q \[T, H, D\]"),
        ({"q_THD": states(heads=3)}, "3 query heads cannot share 2"),
        ({name: states(head_dim=257) for name in ("q_THD", "k_TGD", "v_TGD")}, "at most 256"),
        ({"q_THD": states(dtype=torch.bfloat16)}, "q torch.bfloat16, k torch.float32"),
        (
            {"starts_T": torch.zeros(4, dtype=torch.int32, device="meta")},
            "starts, ends, bias and seed must be there too",
        ),
        (
            {"starts_T": torch.zeros(4, dtype=torch.int64, device=DEVICE)},
            r"starts is torch.int64 \(4,\): expected int32 \[4\]",
        ),
        ({"ends_T": torch.zeros(3, dtype=torch.int32, device=DEVICE)}, r"ends is torch.int32 \(3,\)"),
        ({"window": (-2, 0)}, r"window=\(-2, 0\)"),
        ({"bias_HR": torch.zeros(2, 4, device=DEVICE)}, r"bias \(2, 4\): expected \[2, R\] with an odd number"),
        ({"bias_HR": torch.zeros(3, 5, device=DEVICE)}, r"bias \(3, 5\)"),
        ({"bias_HR": torch.zeros(2, 5, dtype=torch.float16, device=DEVICE)}, "bias is torch.float16"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": 0.1}, "needs a seed"),
        ({"dropout": 0.1, "seed": torch.zeros(1, device=DEVICE)}, "an int64 tensor of one element"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_arguments_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    bounds = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    right = {"q_THD": states(), "k_TGD": states(), "v_TGD": states(), "starts_T": bounds, "ends_T": bounds + 4}
    with pytest.raises(ArgumentError, match=message):
        row_attention(**{**right, **changed})


def test_machines_without_triton_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = torch.zeros(4, dtype=torch.int32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ArgumentError, match="runs on an NVIDIA GPU .* its tensors are on cpu"):
        row_attention(*[states().cpu()] * 3, bounds, bounds + 4)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingPackageError, match="row_attention needs the package triton"):
        row_attention(*[states().cpu()] * 3, bounds, bounds + 4)
