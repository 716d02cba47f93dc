import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from embtune import runtime
from embtune.accelerate.breakeven import (
    NEVER,
    CompileDecision,
    CompileEstimate,
    compile_threshold,
    decide,
)
from embtune.errors import ArgumentError

BERT_BASE = 85_054_464
MINILM = 10_646_784
CALIBRATED = {"parameters": MINILM, "tokens_per_step": 4096, "dropout": False}


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package of that name to be found; nothing imports it."""
    (tmp_path / "triton.py").touch()
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("trainable", ["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_more_work_pays_sooner(device: str, trainable: str, checkpointing: bool) -> None:
    def threshold(parameters: int, tokens: int) -> int:
        return compile_threshold(
            parameters, tokens, device=device, trainable=trainable, checkpointing=checkpointing, dropout=False
        )

    by_size = [threshold(parameters, 4096) for parameters in (MINILM, BERT_BASE, 300_000_000, 4_000_000_000)]
    by_tokens = [threshold(BERT_BASE, tokens) for tokens in (256, 4096, 65_536, 1_000_000)]
    for thresholds in (by_size, by_tokens):
        assert thresholds == sorted(thresholds, reverse=True)
        assert len(set(thresholds)) == len(thresholds)
        assert thresholds[-1] >= 1


def test_recomputing_and_slower_machines_pay_sooner() -> None:
    plain = compile_threshold(**CALIBRATED)
    assert compile_threshold(**CALIBRATED, checkpointing=True) < plain
    assert compile_threshold(**CALIBRATED, threads=8) > plain
    assert (
        compile_threshold(**CALIBRATED, step_seconds=60.0) < plain < compile_threshold(**CALIBRATED, step_seconds=0.01)
    )
    assert compile_threshold(BERT_BASE, 4096, device="cuda", layers=24) < compile_threshold(
        BERT_BASE, 4096, device="cuda", layers=6
    )


@pytest.mark.parametrize(
    "settings", [{"dropout": True}, {"dtype": torch.bfloat16, "trainable": "full"}, {"dtype": torch.float16}]
)
def test_never_on_a_cpu_where_nothing_was_gained(settings: dict[str, Any]) -> None:
    run = {**CALIBRATED, **settings}
    assert compile_threshold(**run) == NEVER
    decision = decide("auto", steps_left=10**9, **run)
    assert not decision.compile
    assert "were not faster" in decision.reason


@pytest.mark.parametrize("run", [CALIBRATED, {**CALIBRATED, "trainable": "full"}, {**CALIBRATED, "step_seconds": 3.0}])
def test_decision_turns_exactly_at_the_threshold(run: dict[str, Any]) -> None:
    estimate = CompileEstimate(**run)
    threshold = estimate.threshold
    assert threshold * estimate.saving_seconds > 1.2 * estimate.cost_seconds
    assert (threshold - 1) * estimate.saving_seconds <= 1.2 * estimate.cost_seconds
    below, at = (decide("auto", steps_left=steps, **run) for steps in (threshold - 1, threshold))
    assert not below.compile
    assert at.compile
    assert "\n" not in at.reason
    for decision in (below, at):
        assert f"{decision.steps_left:,} steps" in decision.reason
        assert f"{threshold:,} steps" in decision.reason
        assert math.isclose(decision.saving_seconds or 0, estimate.saving_seconds)


def test_decision_survives_a_checkpoint() -> None:
    for mode in ("auto", "never", "always"):
        decision = decide(mode, steps_left=100, **CALIBRATED)
        assert CompileDecision.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.compile = False  # type: ignore[misc]


def test_modes() -> None:
    always = decide("always", steps_left=1, **CALIBRATED)
    assert always.compile
    assert "as asked" in always.reason
    assert "do not repay" in always.reason
    never = decide("never", steps_left=10**9, **CALIBRATED)
    assert not never.compile
    with pytest.raises(ArgumentError, match=r"compile='sometimes' is not known; use one of auto, never, always"):
        decide("sometimes", steps_left=1, **CALIBRATED)


def test_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not runtime.has_cpp_compiler()
    decision = decide("auto", steps_left=10**9, **CALIBRATED)
    assert not decision.compile
    assert "no C++ compiler was found; install g++" in decision.reason
    with pytest.raises(ArgumentError, match=r'compile="always" cannot be honoured: no C\+\+ compiler'):
        decide("always", steps_left=10**9, **CALIBRATED)


def test_cuda_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embtune.accelerate.breakeven.is_installed", lambda _: False)
    assert "triton is not installed" in decide("auto", steps_left=10**9, device="cuda", **CALIBRATED).reason


@pytest.mark.usefixtures("with_triton")
def test_cuda_pays_within_an_ordinary_run() -> None:
    run = {"parameters": BERT_BASE, "tokens_per_step": 69_376, "device": "cuda", "dtype": torch.bfloat16}
    threshold = compile_threshold(**run)
    assert 200 < threshold < 2_000
    assert decide("auto", steps_left=threshold, **run).compile


def test_unmeasured_devices_are_not_compiled() -> None:
    assert "not been measured on mps" in decide("auto", steps_left=10**9, device="mps", **CALIBRATED).reason
    with pytest.raises(ArgumentError, match='compile="always" cannot be honoured'):
        decide("always", steps_left=10**9, device="mps", **CALIBRATED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameters": 0}, "parameters=0 must be at least 1"),
        ({"tokens_per_step": -5}, "tokens_per_step=-5 must be at least 1"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"trainable": "half"}, "trainable='half' is not known"),
        ({"step_seconds": 0.0}, "step_seconds=0.0 must be above 0"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        compile_threshold(**{**CALIBRATED, **settings})
