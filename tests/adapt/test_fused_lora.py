"""PEFT's LoRA layers in few products: the same numbers, and PEFT's own forward wherever that is not what they are."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.lora.layer import Linear
from tiny import TEXTS

from embtune import FastSentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from embtune.adapt.fused import FusedLoraLinear, fuse_lora, trains_only_fused_layers, unfuse_lora
from embtune.losses import MultipleNegativesRankingLoss
from embtune.models.families import FAMILIES

TinyDir = Callable[..., Path]

# ModernBERT has its projections in one matrix; DeBERTa's share their input with its positions.
WITHOUT_SIBLINGS = {"modernbert", "deberta-v2"}


def adapted(folder: Path, **settings: object) -> FastSentenceTransformer:
    model = FastSentenceTransformer.from_pretrained(folder, dtype="float32", device="cpu")
    model = FastSentenceTransformer.get_peft_model(model, r=4, lora_alpha=8, **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def embeddings_and_gradients(model: FastSentenceTransformer) -> list[torch.Tensor]:
    embeddings = model(model.preprocess(TEXTS))["sentence_embedding"]
    weights = torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((embeddings * weights).sum(), trained)
    return [embeddings.detach(), *gradients]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_computes_what_peft_computes(model_type: str, tiny_dir: TinyDir) -> None:
    model = adapted(tiny_dir(model_type))
    expected = embeddings_and_gradients(model)
    names = list(model.state_dict())
    assert fuse_lora(model[0].model)
    assert trains_only_fused_layers(model[0].model)
    assert_same(embeddings_and_gradients(model), expected)
    assert list(model.state_dict()) == names
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(embeddings_and_gradients(twin), expected)
    unfuse_lora(model[0].model)
    assert not any(isinstance(module, FusedLoraLinear) for module in model.modules())
    torch.testing.assert_close(embeddings_and_gradients(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "qwen3"])
def test_layers_computed_again_in_the_backward_pass(model_type: str, tiny_dir: TinyDir) -> None:
    model = adapted(tiny_dir(model_type)).train()
    torch.manual_seed(0)
    expected = embeddings_and_gradients(model)
    fuse_lora(model[0].model)
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    assert_same(embeddings_and_gradients(model), expected)


def test_a_copy_trains_its_own_adapter(tiny_dir: TinyDir) -> None:
    model = adapted(tiny_dir("bert"))
    fuse_lora(model[0].model)
    twin = copy.deepcopy(model)
    before = model.encode(TEXTS[:3])
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert abs(before - twin.encode(TEXTS[:3])).max() > 1e-3
    assert abs(before - model.encode(TEXTS[:3])).max() == 0


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "lora_only"}, {"lora_dropout": 0.1}])
def test_what_is_no_plain_product_goes_to_peft(settings: dict[str, object], tiny_dir: TinyDir) -> None:
    model = adapted(tiny_dir("bert"), **settings)
    expected = embeddings_and_gradients(model)
    fuse_lora(model[0].model)
    assert_same(embeddings_and_gradients(model), expected)
    assert not trains_only_fused_layers(model[0].model)
    layer = next(module for module in model.modules() if isinstance(module, FusedLoraLinear))
    assert not layer.is_plain(training=True)


def test_adapters_that_are_off_merged_or_several_go_to_peft(tiny_dir: TinyDir) -> None:
    model = adapted(tiny_dir("bert"))
    backbone = model[0].model
    fuse_lora(backbone)
    on = model.encode(TEXTS)
    with backbone.disable_adapter():
        off = model.encode(TEXTS)
    assert abs(on - off).max() > 1e-3
    backbone.merge_adapter()
    assert abs(model.encode(TEXTS) - on).max() < 1e-5
    backbone.unmerge_adapter()
    assert abs(model.encode(TEXTS) - on).max() < 1e-5
    backbone.add_adapter("second", backbone.peft_config["default"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.second" in name:
                parameter.normal_(std=0.1)
    backbone.base_model.set_adapter(["default", "second"])
    both = model.encode(TEXTS)
    unfuse_lora(backbone)
    assert abs(both - model.encode(TEXTS)).max() == 0
    assert abs(both - on).max() > 1e-3


@pytest.mark.parametrize("model_type", FAMILIES)
def test_siblings_keep_nothing_once_all_have_been_asked(model_type: str, tiny_dir: TinyDir) -> None:
    model = adapted(tiny_dir(model_type))
    fuse_lora(model[0].model)
    model(model.preprocess(TEXTS))
    groups = {id(m.siblings): m.siblings for m in model.modules() if isinstance(m, FusedLoraLinear) and m.siblings}
    assert bool(groups) == (model_type not in WITHOUT_SIBLINGS)
    for group in groups.values():
        assert group._held is None


def test_siblings_called_alone_or_in_another_order_give_the_same(tiny_dir: TinyDir) -> None:
    model = adapted(tiny_dir("bert"))
    attention = model[0].model.get_base_model().encoder.layer[0].attention.self
    states, others = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    names = ("query", "key", "value")
    expected = {(name, i): getattr(attention, name)(x) for name in names for i, x in enumerate((states, others))}
    fuse_lora(model[0].model)
    for name, i in [("value", 0), ("value", 0), ("query", 1), ("key", 0), ("key", 1), ("value", 1), ("query", 0)]:
        found = getattr(attention, name)((states, others)[i])
        torch.testing.assert_close(found, expected[name, i], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize("fused", [True, False])
def test_the_trainer_switches_it(fused: bool, tiny_dir: TinyDir, tmp_path: Path) -> None:
    from datasets import Dataset

    model = adapted(tiny_dir("bert"))
    args = SentenceTransformerTrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=1,
        fused_kernels="auto" if fused else "never",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"anchor": TEXTS[:4], "positive": TEXTS[4:8]})
    SentenceTransformerTrainer(
        model=model, args=args, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
    ).train()
    assert ("kernels  " in str(model.explain())) == fused
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    assert {type(layer) for layer in layers} == {FusedLoraLinear if fused else Linear}
