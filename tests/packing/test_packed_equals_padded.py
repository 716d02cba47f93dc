"""Every row of the table of families: a packed row gives the embeddings and gradients of the padded batch."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import CNN, Pooling
from tiny import ARCHITECTURES, HIDDEN, POSITIONS, TEXTS, tiny_model_dir

from embtune import FastSentenceTransformer
from embtune.errors import ArgumentError, EmbtuneWarning
from embtune.models.engine import choose_engine, switch_to_reference
from embtune.models.families import FAMILIES
from embtune.packing.attention import attend_groups
from embtune.packing.layout import PackedMask, Packing

TinyDir = Callable[..., Path]
# 1, 2, 63, 64, 65, 130 and the maximum, with the one or two special tokens of each text: one word is one token.
LENGTHS = [1, 2, 61, 62, 63, 64, 128, 129, 200]
MIXED = [*TEXTS, "", *(" word" * length for length in LENGTHS), "[PAD] <pad> pad inside"]


def load(folder: Path, lora_dropout: float = 0.0, **settings: object) -> FastSentenceTransformer:
    model = FastSentenceTransformer.from_pretrained(folder, **{"dtype": "float32", "device": "cpu", **settings})
    model.max_seq_length = POSITIONS - 2  # RoBERTa and its kin never use their first positions
    model = FastSentenceTransformer.get_peft_model(model, r=4, lora_alpha=8, lora_dropout=lora_dropout)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def embed(model: FastSentenceTransformer, texts: list[str]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    embeddings = model(dict(model.preprocess(texts)))["sentence_embedding"]
    (embeddings[:, ::3].square().sum() + embeddings[::2].sum()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return embeddings.detach(), gradients


def assert_same_gradients(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys() != set()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_embeddings_and_adapter_gradients(model_type: str, tiny_dir: TinyDir) -> None:
    texts = [text for text in MIXED if text or model_type not in ("qwen2", "gemma3_text")]
    packed, reference = (load(tiny_dir(model_type), engine=engine).eval() for engine in ("packed", "reference"))
    assert packed.packs
    assert not reference.packs
    lengths = set(packed.preprocess(texts)["attention_mask"].sum(dim=1).tolist())
    assert lengths >= {2, 63, 64, 65, 130, POSITIONS - 2}
    ours, gradients = embed(packed, texts)
    expected, expected_gradients = embed(reference, texts)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients, expected_gradients)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_changing_one_text_changes_no_other(model_type: str, tiny_dir: TinyDir) -> None:
    model = load(tiny_dir(model_type)).eval()
    before, _ = embed(model, TEXTS)
    after, _ = embed(model, [*TEXTS[:4], "something else of another length altogether", *TEXTS[5:]])
    torch.testing.assert_close(after[:4], before[:4], rtol=0, atol=1e-6)
    torch.testing.assert_close(after[5:], before[5:], rtol=0, atol=1e-6)
    assert not torch.allclose(after[4], before[4], atol=1e-3)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_gradients_of_all_weights(model_type: str, tiny_dir: TinyDir) -> None:
    """Full fine-tuning: embeddings, norms and biases too, of which some have no gradient but rounding errors."""
    models = [
        FastSentenceTransformer.from_pretrained(
            tiny_dir(model_type), dtype="float32", device="cpu", full_finetuning=True, engine=engine
        ).eval()
        for engine in ("packed", "reference")
    ]
    (ours, gradients), (expected, expected_gradients) = (embed(model, TEXTS) for model in models)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.norm() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("trained", ["all weights", "LoRA with dropout"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_checkpointed_layers_find_their_packing_and_their_dropout_again(
    model_type: str, trained: str, tiny_dir: TinyDir
) -> None:
    runs = []
    for checkpointing in (False, True):
        settings = {"engine": "packed", "use_gradient_checkpointing": checkpointing}
        if trained == "all weights":
            model = FastSentenceTransformer.from_pretrained(
                tiny_dir(model_type), device="cpu", full_finetuning=True, **settings
            )
        else:
            model = load(tiny_dir(model_type), lora_dropout=0.3, **settings)
        torch.manual_seed(3)
        runs.append(embed(model.train(), TEXTS))
    (plain, gradients), (checkpointed, checkpointed_gradients) = runs
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-6)
    assert checkpointed_gradients.keys() == gradients.keys() != set()
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient, rtol=1e-4, atol=1e-5)
    if trained != "all weights":
        assert not torch.allclose(plain, embed(model.eval(), TEXTS)[0], atol=1e-4)


@pytest.mark.parametrize("model_type", ["bert", "mpnet", "deberta-v2", "t5", "qwen3"])
def test_copies_pickles_and_undoing(model_type: str, tiny_dir: TinyDir) -> None:
    model = load(tiny_dir(model_type)).eval()
    expected = model.encode(TEXTS)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert clone.packs
        torch.testing.assert_close(clone.encode(TEXTS), expected)
    names = list(model.state_dict())
    model.engine = switch_to_reference(model)
    assert not model.packs
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model.encode(TEXTS), expected, rtol=0, atol=1e-5)


def test_another_attention_set_afterwards_ends_packing(tiny_dir: TinyDir) -> None:
    """Packed rows under a foreign attention would be wrong without an error."""
    model = load(tiny_dir("bert")).eval()
    expected = model.encode(TEXTS)
    model[0].model.get_base_model().set_attn_implementation("sdpa")
    assert not model.packs
    torch.testing.assert_close(model.encode(TEXTS), expected, rtol=0, atol=1e-5)


def test_token_embeddings_come_back_padded(tiny_dir: TinyDir) -> None:
    packed, reference = (load(tiny_dir("bert"), engine=engine).eval() for engine in ("packed", "reference"))
    for one, other in zip(
        packed.encode(TEXTS, output_value="token_embeddings"),
        reference.encode(TEXTS, output_value="token_embeddings"),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    few = TEXTS[:4]  # with more, sentence-transformers 6.0 stumbles over the features that are no tensors
    for one, other in zip(packed.encode(few, output_value=None), reference.encode(few, output_value=None), strict=True):
        assert one.keys() == other.keys()
        real = other["attention_mask"].bool()
        torch.testing.assert_close(one["token_embeddings"][real], other["token_embeddings"][real], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 5},
        {"prompt": "query: ", "batch_size": 3},
        {"prompt_name": "document"},
        {"precision": "ubinary"},
        {"convert_to_tensor": True, "normalize_embeddings": True},
        {"convert_to_numpy": False, "truncate_dim": 8},
        {"show_progress_bar": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("inputs", [TEXTS, "one text", []], ids=["many", "one", "none"])
def test_encode_gives_what_sentence_transformers_does(
    inputs: str | list[str], arguments: dict[str, object], tiny_dir: TinyDir
) -> None:
    ours = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", device="cpu")
    plain = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    results = []
    for model in (ours, plain):
        model.prompts["document"] = "passage: "
        results.append(model.encode(inputs, **arguments))
    assert ours.packs
    assert type(results[0]) is type(results[1])
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_another_process_knows_the_attention(tiny_dir: TinyDir) -> None:
    model = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", device="cpu")
    assert model.packs
    torch.testing.assert_close(model.encode(TEXTS, device=["cpu"]), model.encode(TEXTS), rtol=0, atol=1e-6)


def test_the_table_covers_the_tested_architectures() -> None:
    known = {model_type for model_type in FAMILIES if model_type in transformers.CONFIG_MAPPING}
    assert known == set(ARCHITECTURES)


def test_what_cannot_be_packed_says_why(tiny_dir: TinyDir) -> None:
    eager = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), attn_implementation="eager", device="cpu")
    assert "attn_implementation='eager'" in eager.engine.reason
    assert eager.explain()["engine"] == "reference"
    with pytest.raises(ArgumentError, match='engine="packed".*attn_implementation'):
        FastSentenceTransformer.from_pretrained(
            tiny_dir("bert"), attn_implementation="eager", device="cpu", engine="packed"
        )
    with pytest.raises(ArgumentError, match="engine='warp'"):
        choose_engine("warp", eager)


_DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 80,
}
_DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("model_type", "settings", "why"),
    [
        ("qwen3", {"rope_parameters": _DYNAMIC}, "longest text"),
        ("llama", {"rope_parameters": _LONG}, "longest text"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": _DEFAULT, "full_attention": _DYNAMIC}},
            "longest text",
        ),
        ("deberta-v2", {"conv_kernel_size": 3, "conv_act": "gelu"}, "convolution"),
    ],
)
def test_checkpoints_unlike_others_of_their_architecture(
    model_type: str, settings: dict[str, object], why: str, tmp_path: Path
) -> None:
    """Packed, their texts would change with the longest text or with their neighbours, without an error."""
    folder = tiny_model_dir(model_type, tmp_path, **settings)
    with pytest.warns(EmbtuneWarning, match=f"padded batches: .*{why}"):
        model = FastSentenceTransformer.from_pretrained(folder, dtype="float32", device="cpu")
    assert not model.packs
    assert why in model.engine.reason
    plain = SentenceTransformer(str(folder), device="cpu")
    torch.testing.assert_close(model.encode(TEXTS), plain.encode(TEXTS), rtol=0, atol=1e-6)
    with pytest.raises(ArgumentError, match=f'engine="packed" cannot serve this model: .*{why}'):
        FastSentenceTransformer.from_pretrained(folder, device="cpu", engine="packed")


def test_a_module_that_reads_across_texts_ends_packing(tiny_dir: TinyDir, tmp_path: Path) -> None:
    plain = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    plain = SentenceTransformer(modules=[plain[0], CNN(HIDDEN, 8, [3]), Pooling(8)], device="cpu")
    plain.save_pretrained(str(tmp_path))
    with pytest.warns(EmbtuneWarning, match="padded batches: its CNN module may read across texts"):
        model = FastSentenceTransformer.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert not model.packs
    torch.testing.assert_close(model.encode(TEXTS), plain.encode(TEXTS), rtol=0, atol=1e-6)
    added = FastSentenceTransformer.from_pretrained(tiny_dir("bert"), dtype="float32", device="cpu")
    assert added.packs
    added.insert(1, CNN(HIDDEN, HIDDEN, [3]))
    assert not added.packs
    assert "CNN" in str(added.explain())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("lengths", [[1], [63, 64, 65], [1, 2, 40, 41, 200, 3], [7] * 5])
def test_attention_over_groups_is_attention_of_each_text(lengths: list[int], window: int | None, causal: bool) -> None:
    """Against float64, one text at a time, with keys shared by two query heads; gradients too."""
    torch.manual_seed(0)
    tokens = sum(lengths)
    inputs = [torch.randn(tokens, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    packing = Packing(lengths, torch.device("cpu"))
    out = attend_groups(*inputs, PackedMask.of(packing, torch.float32), 0.0, None, causal, window)
    expected, start = [], 0
    for length in lengths:
        q, k, v = (states[start : start + length].transpose(0, 1) for states in inputs)
        k, v = (states.repeat_interleave(2, dim=0) for states in (k, v))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        allowed = distance.abs() < (window or length + 1)
        if causal:
            allowed &= distance >= 0
        scores = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(~allowed, float("-inf"))
        expected.append((scores.softmax(-1) @ v).transpose(0, 1))
        start += length
    reference = torch.cat(expected)
    torch.testing.assert_close(out, reference)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), inputs)
    theirs = torch.autograd.grad((reference * weight).sum(), inputs)
    torch.testing.assert_close(ours, theirs)


def test_groups_hold_every_token_once_and_little_padding() -> None:
    lengths = torch.randint(1, 300, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    packing = Packing(lengths, torch.device("cpu"))
    slots = packing.slot_of_token
    assert len(slots.unique()) == packing.tokens == sum(lengths)
    assert packing.slots < 1.2 * packing.tokens
