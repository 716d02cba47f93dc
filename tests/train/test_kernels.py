"""Which kernels a run gets; what needs a GPU to be seen is in tests/gpu/test_gpu_graphs.py."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset

from embtune import FastSentenceTransformer, SentenceTransformerTrainingArguments
from embtune.adapt.fused import FusedLoraLinear
from embtune.errors import ArgumentError
from embtune.models.engine import Engine
from embtune.models.fused import FusedBertOutput
from embtune.train.kernels import ENOUGH_STEPS, is_long, leave_mark, settle_kernels, use_kernels

TinyDir = Callable[..., Path]
PAIRS = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})


def adapted(folder: Path) -> FastSentenceTransformer:
    model = FastSentenceTransformer.from_pretrained(folder, device="cpu", dtype="bfloat16", engine="packed")
    return FastSentenceTransformer.get_peft_model(model, r=4)


def arguments(out: Path, **settings: object) -> SentenceTransformerTrainingArguments:
    return SentenceTransformerTrainingArguments(str(out), report_to="none", use_cpu=True, **settings)


def fused(model: FastSentenceTransformer) -> bool:
    return any(isinstance(module, FusedLoraLinear) for module in model.modules())


def test_the_mode_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="fused_kernels=True is not known; use one of auto, never, always"):
        arguments(tmp_path, fused_kernels=True)


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
def test_nothing_is_compiled_on_a_cpu(mode: str, tiny_dir: TinyDir, tmp_path: Path) -> None:
    model = adapted(tiny_dir("bert"))
    assert settle_kernels(model, arguments(tmp_path, max_steps=1, fused_kernels=mode), PAIRS) is None
    assert model.engine.triton == (mode != "never")
    assert fused(model) == (mode != "never")


def test_adapters_put_on_a_model_that_was_trained_without_any_are_fused(tiny_dir: TinyDir) -> None:
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), device="cpu", dtype="float32", engine="packed")
    use_kernels(model, fused=True, triton=True)
    model = FastSentenceTransformer.get_peft_model(model, r=4)
    use_kernels(model, fused=True, triton=True)
    layers = [module for module in model.modules() if isinstance(module, FusedLoraLinear)]
    assert layers
    assert all(layer.is_plain(training=True) for layer in layers)


def test_without_triton_adapters_stay_fused_but_of_pre_norm_models_nothing_does(tiny_dir: TinyDir) -> None:
    post_norm, pre_norm = adapted(tiny_dir("bert")), adapted(tiny_dir("modernbert"))
    for model in (post_norm, pre_norm):
        use_kernels(model, fused=True, triton=True)
        assert fused(model)
        use_kernels(model, fused=True, triton=False)
        assert not model.engine.triton
    assert fused(post_norm)
    assert not fused(pre_norm)
    assert not any(isinstance(module, FusedBertOutput) for module in post_norm.modules())
    use_kernels(post_norm, fused=True, triton=True)
    assert any(isinstance(module, FusedBertOutput) for module in post_norm.modules())
    use_kernels(post_norm, fused=False, triton=True)
    assert not fused(post_norm)


def test_attention_that_flash_serves_as_well_is_left_to_it() -> None:
    device = torch.device("cuda:0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embtune.packing.attention.runs_triton", lambda _: True)
        patch.setattr("embtune.packing.attention.flash_serves", lambda *_: True)
        found = {
            (triton, both): Engine(name="packed", reason="", flash=both, tiles=True, triton=triton).attention(
                device, torch.bfloat16, 128
            )
            for triton in (True, False)
            for both in (True, False)
        }
    assert found == {(True, True): "tiles", (True, False): "tiles", (False, True): "flash", (False, False): "tiles"}


@pytest.mark.parametrize(
    ("model_type", "longest", "wanted"),
    [("modernbert", 512, "tiles"), ("modernbert", 513, "windows"), ("bert", 513, "flash"), ("qwen3", 513, "flash")],
)
def test_layers_with_narrow_windows_are_computed_in_tiles(
    model_type: str, longest: int, wanted: str, tiny_dir: TinyDir
) -> None:
    engine = FastSentenceTransformer.from_pretrained(tiny_dir(model_type), device="cpu", engine="packed").engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("embtune.packing.attention.runs_triton", lambda _: True)
        patch.setattr("embtune.packing.attention.flash_serves", lambda *_: True)
        assert engine.attention(torch.device("cuda:0"), torch.bfloat16, longest) == wanted


@pytest.mark.parametrize(("steps", "long"), [(ENOUGH_STEPS - 1, False), (ENOUGH_STEPS, True)])
def test_a_run_is_long_by_its_steps(steps: int, long: bool, tmp_path: Path) -> None:
    assert is_long(arguments(tmp_path, max_steps=steps), PAIRS) == long
    epochs = arguments(tmp_path, num_train_epochs=steps, per_device_train_batch_size=2)
    assert is_long(epochs, PAIRS) == long
    stream = IterableDataset.from_generator(lambda: iter([{"anchor": "a", "positive": "b"}]))
    assert is_long(arguments(tmp_path), stream)


def test_a_mark_is_left_where_it_can_be(tmp_path: Path) -> None:
    leave_mark(tmp_path / "cache" / "mark")
    assert (tmp_path / "cache" / "mark").exists()
    (tmp_path / "file").touch()
    leave_mark(tmp_path / "file" / "mark")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_checkpointing": "selective"}, "gradient_checkpointing='selective' must be True or False here"),
        ({"dataset_weights": {"faq": "2"}}, "dataset_weights: faq='2' must be a number above 0"),
    ],
)
def test_arguments_of_another_kind_are_refused(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        arguments(tmp_path, **settings)
