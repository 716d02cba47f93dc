"""float16 in training: the loss is scaled where it can be, and refused where it cannot."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.errors import ArgumentError, ModelError
from embtune.train.precision import settle_float16

TinyDir = Callable[..., Path]
PAIRS = Dataset.from_dict({"anchor": ["a", "b"], "positive": ["c", "d"]})


class OnDevice(SentenceTransformerTrainingArguments):
    """The arguments on a machine with a GPU, which this one need not be."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", super().device.index or 0)


def load(folder: Path, dtype: str = "float16") -> FastSentenceTransformer:
    model = FastSentenceTransformer.from_pretrained(folder, dtype=dtype, device="cpu")
    return FastSentenceTransformer.get_peft_model(model, r=4)


def test_loss_scaling_comes_on_for_a_float16_base(
    tiny_dir: TinyDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = OnDevice(str(tmp_path), report_to="none")
    settle_float16(load(tiny_dir("bert")), args)
    assert args.fp16 and args.mixed_precision == "fp16"
    assert "fp16: on" in capsys.readouterr().out
    settle_float16(load(tiny_dir("bert")), args)
    assert capsys.readouterr().out == ""
    for dtype, settings in (("float32", {}), ("bfloat16", {}), ("float16", {"bf16": True, "use_cpu": True})):
        args = OnDevice(str(tmp_path), report_to="none", **settings)
        settle_float16(load(tiny_dir("bert"), dtype), args)
        assert not args.fp16


@pytest.mark.parametrize("fp16", [False, True])
def test_a_cpu_that_scales_no_loss_is_refused(fp16: bool, tiny_dir: TinyDir, tmp_path: Path) -> None:
    args = SentenceTransformerTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, fp16=fp16)
    with pytest.raises(ArgumentError, match="dtype=float32 or dtype=bfloat16"):
        SentenceTransformerTrainer(model=load(tiny_dir("bert")), args=args, train_dataset=PAIRS)


def test_float16_weights_that_are_trained_themselves_are_refused(tiny_dir: TinyDir, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"full_finetuning.*dtype=float32.*fp16=True"):
        FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float16", full_finetuning=True, device="cpu")
    args = SentenceTransformerTrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    plain = SentenceTransformer(str(tiny_dir("bert")), device="cpu", model_kwargs={"dtype": torch.float16})
    half = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float16", device="cpu")
    biased = FastSentenceTransformer.get_peft_model(half, r=4, bias="all")
    for model in (plain, biased):
        with pytest.raises(ModelError, match="weights in float16 are to be trained"):
            SentenceTransformerTrainer(model=model, args=args, train_dataset=PAIRS)
