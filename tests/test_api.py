"""Both doors: every argument is honoured or refused by name, and what they return is what plain libraries return."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModelForFeatureExtraction
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding
from tiny import ARCHITECTURES, POSITIONS, TEXTS

from embtune import (
    FastModel,
    FastSentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from embtune.errors import ArgumentError, EmbtuneWarning, ModelError
from embtune.losses import MultipleNegativesRankingLoss
from embtune.models.families import FAMILIES
from embtune.models.load import POOLING_MODES

IN_DEPTH = ["bert", "mpnet", "distilbert", "modernbert", "roberta", "xlm-roberta", "qwen3"]
OTHERS = sorted(set(ARCHITECTURES) - set(IN_DEPTH))

TinyDir = Callable[..., Path]


def load(folder: Path, **arguments: object) -> FastSentenceTransformer:
    return FastSentenceTransformer.from_pretrained(folder, **{"dtype": "float32", "device": "cpu", **arguments})


def randomise_b(model: torch.nn.Module) -> None:
    """At B = 0 the gradient of A is zero and the adapter changes nothing: such a test would prove nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.parametrize("model_type", IN_DEPTH + OTHERS)
def test_embeds_as_plain_sentence_transformers(model_type: str, tiny_dir: TinyDir) -> None:
    folder = tiny_dir(model_type)
    plain = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, convert_to_tensor=True)
    ours = load(folder).encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model_type", IN_DEPTH + OTHERS)
def test_adapter_gradients_equal_plain_peft(model_type: str, tiny_dir: TinyDir) -> None:
    folder = tiny_dir(model_type)
    ours = FastSentenceTransformer.get_peft_model(load(folder), r=4, lora_alpha=8)
    plain = SentenceTransformer(str(folder), device="cpu")
    settings = ours[0].model.peft_config["default"]
    config = LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=4,
        lora_alpha=8,
        target_modules=settings.target_modules,
        exclude_modules=settings.exclude_modules,
    )
    plain[0].model = PeftModelForFeatureExtraction(plain[0].model, config)
    plain.load_state_dict(ours.state_dict())
    gradients = []
    for model in (ours, plain):
        randomise_b(model)
        model.eval()  # dropout off: the two would draw different masks
        features = dict(model.preprocess(TEXTS))
        loss = model(features)["sentence_embedding"][:, ::3].square().sum()
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().sum() > 0, name
        expected = gradients[1][name]
        assert (gradient - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("model_type", [*IN_DEPTH, *OTHERS])
def test_lora_sits_on_the_familys_layers_and_never_on_the_pooler(model_type: str, tiny_dir: TinyDir) -> None:
    model = FastSentenceTransformer.get_peft_model(load(tiny_dir(model_type)))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}  # T5's `wi` is plain or gated
    assert {name.rpartition(".")[2] for name in adapted} == set(FAMILIES[model_type].lora_targets) & present
    assert not any("pooler" in name for name in adapted)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "lora_" in n)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "qwen3"])
@pytest.mark.parametrize("pooling", POOLING_MODES)
def test_bare_checkpoint_with_every_pooling(model_type: str, pooling: str, tiny_dir: TinyDir) -> None:
    model = load(tiny_dir(model_type, bare=True), pooling_mode=pooling)
    assert model[1].pooling_mode == pooling
    embeddings = model.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(len(TEXTS)))


def test_bare_checkpoint_without_a_pooling_mode_takes_the_familys(tiny_dir: TinyDir) -> None:
    assert load(tiny_dir("qwen3", bare=True))[1].pooling_mode == "lasttoken"
    assert load(tiny_dir("modernbert", bare=True))[1].pooling_mode == "cls"


def test_last_token_pooling_reads_the_end_of_text_token(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("qwen3"))
    features = model.preprocess(["short", "a clearly longer text than the other"])
    assert features["input_ids"][:, -1].tolist() == [0, 0]  # left padding: every row ends in end-of-text
    assert features["attention_mask"][0, 0] == 0


def test_pooling_mode_of_a_saved_model_can_be_changed(tiny_dir: TinyDir) -> None:
    assert load(tiny_dir("bert"), pooling_mode="max")[1].pooling_mode == "max"


def test_architecture_without_a_row_loads_trains_and_says_so(tmp_path: Path) -> None:
    from tiny import wordpiece

    config = transformers.MegatronBertConfig(
        vocab_size=len(wordpiece()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    wordpiece().save_pretrained(tmp_path)
    model = FastSentenceTransformer.get_peft_model(load(tmp_path))
    assert {"query", "key", "value", "dense"} == set(model[0].model.peft_config["default"].target_modules)
    assert "without a row" in model.explain()["architecture"]


def test_a_model_without_an_encoder_loads_and_trains(tmp_path: Path) -> None:
    from tiny import wordpiece

    static = SentenceTransformer(modules=[StaticEmbedding(wordpiece().backend_tokenizer, embedding_dim=8)])
    static.save_pretrained(str(tmp_path / "static"))
    model = load(tmp_path / "static")
    assert (model.encode(TEXTS) == static.encode(TEXTS)).all()
    before = model[0].embedding.weight.detach().clone()
    args = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    pairs = Dataset.from_dict({"anchor": TEXTS[:4], "positive": TEXTS[4:8]})
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs, loss=loss).train()
    assert not torch.equal(model[0].embedding.weight, before)
    with pytest.raises(
        ModelError, match=r"with a Transformer module, not FastSentenceTransformer\['StaticEmbedding'\]"
    ):
        FastSentenceTransformer.get_peft_model(model)
    for arguments in ({"max_seq_length": 16}, {"load_in_4bit": True, "dtype": None}):
        with pytest.raises(ArgumentError, match=f"{next(iter(arguments))}: this model has no Transformer module"):
            load(tmp_path / "static", **arguments)


def test_a_length_beyond_the_positions_is_clamped_with_one_warning(tiny_dir: TinyDir) -> None:
    for model_type, limit in (("bert", POSITIONS), ("roberta", POSITIONS - 2)):
        with pytest.warns(EmbtuneWarning, match=f"max_seq_length=2048 .* using {limit}") as caught:
            model = load(tiny_dir(model_type), max_seq_length=2048)
        assert len(caught) == 1
        assert model.max_seq_length == limit
        assert model.encode("word " * 3000).shape == (32,)


def test_dtype_none_is_explained(tiny_dir: TinyDir) -> None:
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), device="cpu")
    assert str(model.dtype).removeprefix("torch.") == model.explain()["base weights"]
    assert "processor" in str(model.explain())


def test_half_precision_base_keeps_adapters_heads_and_embeddings_in_float32(tmp_path: Path, tiny_dir: TinyDir) -> None:
    plain = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    plain.append(Dense(32, 16))
    plain.save_pretrained(str(tmp_path / "dense"))
    model = FastSentenceTransformer.get_peft_model(load(tmp_path / "dense", dtype="bfloat16"))
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert all(dtype == torch.float32 for name, dtype in dtypes.items() if "lora_" in name or "linear" in name)
    assert dtypes["0.model.base_model.model.embeddings.word_embeddings.weight"] == torch.bfloat16
    assert model(model.preprocess(TEXTS))["sentence_embedding"].dtype == torch.float32
    clone = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(clone.encode(TEXTS), model.encode(TEXTS))
    assert "the heads" in str(model.explain())


def test_full_finetuning_trains_every_weight_in_float32(tiny_dir: TinyDir) -> None:
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), full_finetuning=True, device="cpu")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    with pytest.raises(ModelError, match="full_finetuning"):
        FastSentenceTransformer.get_peft_model(model)
    with pytest.warns(EmbtuneWarning, match="updates smaller"):
        load(tiny_dir("bert"), full_finetuning=True, dtype="bfloat16")


def test_for_inference_trains_nothing(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"), for_inference=True)
    assert not model.training
    with pytest.raises(ModelError, match="for_inference"):
        FastSentenceTransformer.get_peft_model(model)


def test_other_arguments_are_honoured(tiny_dir: TinyDir) -> None:
    model = load(
        tiny_dir("bert"),
        truncate_dim=8,
        attn_implementation="eager",
        model_kwargs={"use_safetensors": True},
        processor_kwargs={"padding_side": "left"},
        use_gradient_checkpointing="unsloth",
        max_seq_length=16,
        load_in_16bit=True,
        dtype=None,
    )
    assert model.encode("text").shape == (8,)
    assert model[0].model.config._attn_implementation == "eager"
    assert model.tokenizer.padding_side == "left"
    assert model.preprocess(["word " * 50])["input_ids"].shape == (1, 16)
    assert model.dtype == torch.bfloat16
    assert model.explain()["gradient checkpointing"].startswith("on")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_sequence_length": 128}, "max_sequence_length.*max_seq_length"),
        ({"load_in_fp8": True}, "load_in_fp8"),
        ({"dtype": "int7"}, "dtype='int7'"),
        ({"dtype": torch.int8}, "int8"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit"),
        ({"load_in_4bit": True, "full_finetuning": True, "dtype": None}, "full_finetuning.*load_in_4bit"),
        ({"load_in_16bit": True}, "load_in_16bit and dtype=float32"),
        ({"pooling_mode": "median"}, "pooling_mode='median'"),
        ({"max_seq_length": 0}, "max_seq_length=0"),
        ({"truncate_dim": -1}, "truncate_dim=-1"),
        ({"engine": "warp"}, "engine='warp'"),
        ({"model_kwargs": {"dtype": "float16"}}, "model_kwargs.*dtype"),
        ({"model_kwargs": {"attention_heads": 3}}, "model_kwargs.*attention_heads"),
        ({"use_gradient_checkpointing": "sometimes"}, "use_gradient_checkpointing='sometimes'"),
        ({"full_finetuning": True, "for_inference": True}, "full_finetuning and for_inference"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_refused_by_name(
    arguments: dict[str, object], named: str, tiny_dir: TinyDir
) -> None:
    with pytest.raises(ArgumentError, match=named):
        load(tiny_dir("bert"), **arguments)


def test_8_bit_of_joined_matrices_is_refused(tiny_dir: TinyDir) -> None:
    with pytest.raises(ArgumentError, match="load_in_8bit.*nomic_bert.*load_in_4bit"):
        load(tiny_dir("nomic_bert"), load_in_8bit=True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rank": 8}, "rank"),
        ({"r": 0}, "r=0"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"bias": "some"}, "bias='some'"),
        ({"target_modules": ["q_proj", "query"]}, "no layer named q_proj.*query"),
        ({"target_modules": []}, "none given"),
        ({"layers_to_transform": [0, 7]}, "no layer \\[7\\]"),
        ({"modules_to_save": ["classifier"]}, "no module named classifier"),
        ({"task_type": "CAUSAL_LM"}, "task_type='CAUSAL_LM'"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"init_lora_weights": "magic"}, "PEFT refuses"),
    ],
)
def test_lora_arguments_that_cannot_be_honoured_are_refused_by_name(
    arguments: dict[str, object], named: str, tiny_dir: TinyDir
) -> None:
    with pytest.raises(ArgumentError, match=named):
        FastSentenceTransformer.get_peft_model(load(tiny_dir("bert")), **arguments)


def test_lora_arguments_are_honoured(tiny_dir: TinyDir) -> None:
    model = FastSentenceTransformer.get_peft_model(
        load(tiny_dir("bert")),
        r=3,
        lora_alpha=5,
        lora_dropout=0.25,
        target_modules=["query", "dense"],
        bias="lora_only",
        use_rslora=True,
        use_dora=True,
        init_lora_weights="gaussian",
        layers_to_transform=[1],
        modules_to_save=["word_embeddings"],
    )
    config = model[0].model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.25)
    assert config.use_rslora and config.use_dora and config.init_lora_weights == "gaussian"
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted and all(".layer.1." in name for name in adapted)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("modules_to_save" in name for name in trained)
    assert any(name.endswith("base_layer.bias") for name in trained)


def test_the_seed_decides_the_adapter_and_nothing_else(tiny_dir: TinyDir) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    weights = []
    for seed in (1, 1, 2):
        model = FastSentenceTransformer.get_peft_model(load(tiny_dir("bert")), random_state=seed)
        weights.append(next(p for n, p in model.named_parameters() if "lora_A" in n))
    torch.testing.assert_close(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.testing.assert_close(torch.rand(3), expected)


def test_a_second_adapter_is_refused(tiny_dir: TinyDir) -> None:
    model = FastSentenceTransformer.get_peft_model(load(tiny_dir("bert")))
    with pytest.raises(ModelError, match="adapter already"):
        FastSentenceTransformer.get_peft_model(model)


def test_missing_models_are_named(tmp_path: Path) -> None:
    graph = tmp_path / "graph"
    (graph / "onnx").mkdir(parents=True)
    (graph / "onnx" / "model.onnx").touch()
    (graph / "modules.json").write_text("[]")
    with pytest.raises(ModelError, match=r"graph holds onnx/model.onnx and no weights to load"):
        FastSentenceTransformer.from_pretrained(graph)
    with pytest.raises(ModelError, match="nowhere: there is no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        load(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty could not be loaded"):
        load(tmp_path / "empty")
    with pytest.raises(ModelError, match="owner/absent could not be loaded"):
        FastSentenceTransformer.from_pretrained("owner/absent", local_files_only=True, cache_dir=tmp_path)


def test_an_adapter_folder_is_continued(tmp_path: Path, tiny_dir: TinyDir) -> None:
    model = FastSentenceTransformer.get_peft_model(load(tiny_dir("mpnet")), r=4)
    randomise_b(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = load(tmp_path / "adapter")
    torch.testing.assert_close(again.encode(TEXTS), model.encode(TEXTS))
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = load(tmp_path / "adapter", for_inference=True)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_tokens_added_before_lora_survive(tmp_path: Path, tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"))
    model.tokenizer.add_tokens(["<table>", "<column>"])
    model[0].model.resize_token_embeddings(len(model.tokenizer))
    model = FastSentenceTransformer.get_peft_model(model)
    randomise_b(model)
    texts = [*TEXTS, "a <table> with a <column>"]
    model.save_pretrained(str(tmp_path / "adapter"))
    again = load(tmp_path / "adapter")
    assert len(again.tokenizer) == len(model.tokenizer)
    torch.testing.assert_close(again.encode(texts), model.encode(texts))
    merged = model.save_pretrained_merged(tmp_path / "merged")
    plain = SentenceTransformer(str(merged), device="cpu")
    torch.testing.assert_close(plain.encode(texts), model.encode(texts), rtol=0, atol=1e-5)


def test_nothing_global_changes_on_import() -> None:
    assert SentenceTransformer.forward.__module__.startswith("sentence_transformers")
    assert transformers.MPNetModel.supports_gradient_checkpointing is False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import embtune  # noqa: F401
    assert not caught


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "distilbert", "modernbert", "roberta", "qwen3"])
def test_the_lower_door(model_type: str, tiny_dir: TinyDir) -> None:
    folder = tiny_dir(model_type)
    backbone, tokenizer = FastModel.from_pretrained(folder, dtype="float32", device="cpu", add_pooling_layer=False)
    assert getattr(backbone, "pooler", None) is None
    adapted = FastModel.get_peft_model(backbone, r=4)
    randomise_b(adapted)
    model = FastModel.as_sentence_transformer(adapted, tokenizer, folder, pooling_mode="mean", max_seq_length=64)
    assert model[0].model is adapted
    assert model.max_seq_length == 64
    reference = FastSentenceTransformer.get_peft_model(load(folder, max_seq_length=64, pooling_mode="mean"), r=4)
    randomise_b(reference)
    torch.testing.assert_close(model.encode(TEXTS), reference.encode(TEXTS), rtol=0, atol=1e-6)


def test_the_lower_door_refuses_the_wrong_kind(tiny_dir: TinyDir) -> None:
    model = load(tiny_dir("bert"))
    with pytest.raises(ModelError, match="FastSentenceTransformer"):
        FastModel.get_peft_model(model)
    with pytest.raises(ModelError, match="FastModel"):
        FastSentenceTransformer.get_peft_model(model[0].model)
    with pytest.raises(ArgumentError, match="auto_model"):
        FastModel.from_pretrained(tiny_dir("bert"), auto_model="BertModel")


@pytest.mark.parametrize(
    "loading", [{}, {"dtype": "bfloat16"}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=str
)
def test_merging_in_place_keeps_what_was_trained(loading: dict[str, object], tiny_dir: TinyDir) -> None:
    model = FastSentenceTransformer.get_peft_model(load(tiny_dir("bert"), **loading), r=4)
    randomise_b(model)
    before = model.encode(TEXTS)
    encoder = model[0].model.merge_and_unload()
    assert encoder.dtype == torch.float32  # the checkpoint's own, and that of a de-quantised base
    assert not any("lora" in name for name, _ in model.named_parameters())
    cosine = (torch.tensor(before) * torch.tensor(model.encode(TEXTS))).sum(1)
    assert cosine.min() > (0.995 if "dtype" in loading else 0.99999)


def test_arguments_hold_for_adapter_folders_too(tmp_path: Path, tiny_dir: TinyDir) -> None:
    FastSentenceTransformer.get_peft_model(load(tiny_dir("bert"))).save_pretrained(str(tmp_path))
    model = load(tmp_path, pooling_mode="cls", processor_kwargs={"padding_side": "left"})
    assert model[1].pooling_mode == "cls"
    assert model.tokenizer.padding_side == "left"


@pytest.mark.parametrize("model_type", IN_DEPTH)
def test_single_layers_can_be_adapted(model_type: str, tiny_dir: TinyDir) -> None:
    model = FastSentenceTransformer.get_peft_model(load(tiny_dir(model_type)), layers_to_transform=1)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {name.rpartition(".")[2] for name in adapted} == set(FAMILIES[model_type].lora_targets)
    assert all(".1." in name for name in adapted)


def test_of_an_encoder_decoder_the_encoder_is_loaded(tiny_dir: TinyDir) -> None:
    folder = tiny_dir("t5", bare=True)
    encoder, tokenizer = FastModel.from_pretrained(folder, device="cpu", dtype="float32")
    assert type(encoder) is transformers.T5EncoderModel
    model = FastModel.as_sentence_transformer(encoder, tokenizer, pooling_mode=None)
    torch.testing.assert_close(model.encode(TEXTS), load(folder).encode(TEXTS), rtol=0, atol=1e-6)
    whole = transformers.T5Model(encoder.config)
    with pytest.raises(ModelError, match="T5Model has a decoder"):
        FastModel.as_sentence_transformer(whole, tokenizer, folder)
