"""Attention over a flat row, compiled: against its twin in float64, and recorded in a CUDA graph."""

import pytest
import torch
from row_attention_cases import CASES, Case

from embtune.kernels.row_attention import row_attention, text_bounds
from embtune.kernels.row_attention_plain import kept_weights, plain_row_attention

pytestmark = pytest.mark.gpu

LENGTHS = [1, 2, 15, 63, 64, 65, 130, 195, 512, 15, 1]
GPU_CASES = {
    **CASES,
    "heads of 64": Case(4, 4, 64),
    "heads of 96, grouped, causal": Case(4, 2, 96, settings={"causal": True}),
    "heads of 128, grouped": Case(4, 1, 128, settings={"causal": True, "dropout": 0.2}),
    "heads of 128, window, bias": Case(2, 2, 128, 1023, {"window": (64, 64)}),
    "heads of 256": Case(4, 1, 256, settings={"window": (511, 511), "dropout": 0.1}),
    "bias of MPNet": Case(12, 12, 64, 257, {"dropout": 0.1}),
    "bias over every distance": Case(4, 4, 64, 1023, {"dropout": 0.1}),
}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("case", GPU_CASES.values(), ids=GPU_CASES.keys())
def test_output_and_gradients_are_those_of_the_twin(case: Case, dtype: torch.dtype, bound: float) -> None:
    errors = case.error(LENGTHS, "cuda", dtype)
    # The bias's gradient is a sum of many that nearly cancel, added up in no fixed order.
    loose = {name: 4 * bound if name == "bias_HR" else bound for name in errors}
    assert all(errors[name] < loose[name] for name in errors), errors


def test_in_bfloat16_it_is_no_less_exact_than_flash_attention() -> None:
    case = Case(12, 12, 64)
    inputs = case.inputs(LENGTHS, "cuda", torch.bfloat16)
    borders = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()

    def flash(q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor, **_: object) -> torch.Tensor:
        spans = (borders, borders, max(LENGTHS), max(LENGTHS))
        return torch.ops.aten._flash_attention_forward(q_THD, k_TGD, v_TGD, *spans, 0.0, False, False)[0]

    wide = {
        name: part.detach().double().requires_grad_() if part.requires_grad else part for name, part in inputs.items()
    }
    expected = case.gradients(plain_row_attention, wide)
    ours, theirs = (case.gradients(function, inputs) for function in (row_attention, flash))
    for name, exact in expected.items():
        assert (ours[name] - exact).norm() <= 1.1 * (theirs[name] - exact).norm(), name


def test_the_twin_drops_the_same_weights_and_as_many_as_asked() -> None:
    tokens, dropout = 256, 0.1
    q, k = (torch.randn(tokens, 2, tokens, device="cuda") for _ in range(2))
    identity = torch.eye(tokens, device="cuda")[:, None].expand(-1, 2, -1)
    bounds = text_bounds(torch.tensor([0, tokens], dtype=torch.int32, device="cuda"), tokens)
    seed = torch.tensor([2**50 + 3], device="cuda")
    found = row_attention(q, k, identity, *bounds, scale=0.01, dropout=dropout, seed=seed).transpose(0, 1) > 0
    assert torch.equal(found, kept_weights(seed, 2, tokens, dropout))
    assert abs(float(found.double().mean()) - 0.9) < 5 * (dropout * (1 - dropout) / found.numel()) ** 0.5


@pytest.mark.parametrize("name", ["causal window", "everything"])
def test_each_replay_of_a_graph_drops_other_weights_the_same_in_both_directions(name: str) -> None:
    case = Case(4, 2, 64, 301 if name == "everything" else None, {**CASES[name].settings, "dropout": 0.3})
    inputs = case.inputs(LENGTHS, "cuda", torch.float32)
    seed = inputs.pop("seed")

    def step() -> dict[str, torch.Tensor]:
        seed.random_(2**62)
        return case.gradients(row_attention, {**inputs, "seed": seed})

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    outputs = []
    for _ in range(3):
        graph.replay()
        outputs.append(recorded["out"].clone())
        wide = {name: part.detach().double().requires_grad_() for name, part in inputs.items() if part.requires_grad}
        expected = case.gradients(plain_row_attention, {**inputs, **wide, "seed": seed})
        for name, exact in expected.items():
            assert (recorded[name] - exact).norm() < 1e-5 * exact.norm(), name
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_a_graph_serves_other_texts_of_the_same_row() -> None:
    inputs = {name: part.detach() for name, part in Case(head_dim=64).inputs([600], "cuda", torch.bfloat16).items()}
    borders = torch.tensor([0, 600, 600, 600], dtype=torch.int32, device="cuda")
    del inputs["starts_T"], inputs["ends_T"]

    def step() -> torch.Tensor:
        starts, ends = text_bounds(borders, 600)
        return row_attention(**inputs, starts_T=starts, ends_T=ends)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for ends in ([600, 600, 600], [1, 64, 600], [195, 390, 600]):
        borders[1:] = torch.tensor(ends)
        graph.replay()
        assert torch.equal(recorded, step())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nothing_waits_for_the_device() -> None:
    inputs = CASES["everything"].inputs(LENGTHS, "cuda", torch.bfloat16)
    borders = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()
    CASES["everything"].gradients(row_attention, inputs)  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        text_bounds(borders, sum(LENGTHS))
        row_attention(**inputs, **CASES["everything"].settings).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_code_takes_the_operator_whole() -> None:
    case = CASES["everything"]
    inputs = case.inputs(LENGTHS, "cuda", torch.float32)
    del inputs["bias_HR"]  # its gradient is summed in no fixed order
    compiled = torch.compile(row_attention, fullgraph=True, dynamic=True)
    found, expected = case.gradients(compiled, inputs), case.gradients(row_attention, inputs)
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_that_is_not_the_current_one() -> None:
    assert max(Case().error(LENGTHS, "cuda:1", torch.float32).values()) < 1e-5
