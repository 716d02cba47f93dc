"""GGUF files read back with gguf's own reader; llama.cpp itself is asked in tests/runtimes/test_llamacpp.py."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType, PoolingType, TokenType
from gguf.quants import dequantize
from tokenizers import normalizers, pre_tokenizers, processors
from torch import nn

from embtune.errors import ArgumentError, ExportError
from embtune.export.gguf import write_gguf

# llama.cpp's tensor name -> the backbone's, some of each family.
BERT = {
    "token_embd.weight": "embeddings.word_embeddings.weight",
    "token_types.weight": "embeddings.token_type_embeddings.weight",
    "token_embd_norm.bias": "embeddings.LayerNorm.bias",
    "blk.0.attn_q.weight": "encoder.layer.0.attention.self.query.weight",
    "blk.1.attn_output.bias": "encoder.layer.1.attention.output.dense.bias",
    "blk.1.ffn_down.weight": "encoder.layer.1.output.dense.weight",
    "blk.1.layer_output_norm.weight": "encoder.layer.1.output.LayerNorm.weight",
}
TENSORS = {
    "bert": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "distilbert": {
        "token_embd.weight": "embeddings.word_embeddings.weight",
        "blk.1.attn_k.weight": "transformer.layer.1.attention.k_lin.weight",
        "blk.0.ffn_up.bias": "transformer.layer.0.ffn.lin1.bias",
        "blk.1.attn_output_norm.weight": "transformer.layer.1.sa_layer_norm.weight",
    },
    "modernbert": {
        "token_embd.weight": "embeddings.tok_embeddings.weight",
        "blk.1.attn_qkv.weight": "layers.1.attn.Wqkv.weight",
        "blk.0.ffn_up.weight": "layers.0.mlp.Wi.weight",
        "output_norm.weight": "final_norm.weight",
    },
    "qwen3": {
        "token_embd.weight": "embed_tokens.weight",
        "blk.0.attn_k.weight": "layers.0.self_attn.k_proj.weight",
        "blk.1.attn_q_norm.weight": "layers.1.self_attn.q_norm.weight",
        "blk.1.ffn_gate.weight": "layers.1.mlp.gate_proj.weight",
        "output_norm.weight": "norm.weight",
    },
}
FIRST_POSITION = {"roberta": 2, "xlm-roberta": 2}
POSITIONS = "embeddings.position_embeddings.weight"


def export(
    path: Path, model_type: str, *, backbone: nn.Module | None = None, tokenizer: Any = None, **settings: Any
) -> GGUFReader:
    tokenizer_of, _, pooling = tiny.ARCHITECTURES[model_type]
    backbone = tiny.tiny_backbone(model_type) if backbone is None else backbone
    settings = {"pooling_mode": pooling, "quantization": "f32", **settings}
    written = write_gguf(backbone, tokenizer_of() if tokenizer is None else tokenizer, path, **settings)
    assert written == path
    assert list(path.parent.iterdir()) == [path]
    return GGUFReader(path)


def value(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def numbers(reader: GGUFReader) -> dict[str, np.ndarray]:
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
        for tensor in reader.tensors
    }


@pytest.mark.parametrize("model_type", TENSORS)
def test_f32_holds_every_number_of_the_backbone(model_type: str, tmp_path: Path) -> None:
    backbone = tiny.tiny_backbone(model_type)
    weights = {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith("pooler.")}
    if POSITIONS in weights:
        weights[POSITIONS] = weights[POSITIONS][FIRST_POSITION.get(model_type, 0) :][:100]
    read = numbers(export(tmp_path / "m.gguf", model_type, backbone=backbone, max_seq_length=100))
    expected = {ours: weights[theirs] for ours, theirs in TENSORS[model_type].items()}
    if POSITIONS in weights:
        expected["position_embd.weight"] = weights[POSITIONS]
    for name, tensor in expected.items():
        assert np.array_equal(read[name], tensor.numpy()), name
    assert len(read) == len(weights)
    assert sum(array.size for array in read.values()) == sum(tensor.numel() for tensor in weights.values())


@pytest.mark.parametrize(
    ("quantization", "stored_as", "file_type", "tolerance"),
    [
        ("f16", GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16, 2**-11),
        ("bf16", GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16, 2**-8),
        ("q8_0", GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0, 1 / 200),
    ],
)
def test_only_large_matrices_are_quantised(
    quantization: str, stored_as: GGMLQuantizationType, file_type: LlamaFileType, tolerance: float, tmp_path: Path
) -> None:
    backbone = tiny.tiny_backbone("bert")
    exact = numbers(export(tmp_path / "exact" / "m.gguf", "bert", backbone=backbone))
    reader = export(tmp_path / "small" / "m.gguf", "bert", backbone=backbone, quantization=quantization)
    assert value(reader, "general.file_type") == file_type
    assert value(reader, "general.quantization_version") == 2
    read = numbers(reader)
    for tensor in reader.tensors:
        in_float32 = len(tensor.shape) == 1 or tensor.name in ("position_embd.weight", "token_types.weight")
        assert tensor.tensor_type == (GGMLQuantizationType.F32 if in_float32 else stored_as), tensor.name
        bound = 0 if in_float32 else tolerance * np.abs(exact[tensor.name]).max()
        difference = np.abs(read[tensor.name] - exact[tensor.name]).max()
        assert difference <= bound, tensor.name
        assert in_float32 or difference > 0


def test_q8_0_keeps_rows_that_do_not_fill_blocks_in_f16(tmp_path: Path) -> None:
    backbone = tiny.tiny_backbone("bert", hidden_size=48)
    reader = export(tmp_path / "m.gguf", "bert", backbone=backbone, quantization="q8_0")
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == GGMLQuantizationType.F16
    assert types["blk.0.ffn_down.weight"] == GGMLQuantizationType.Q8_0


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_merged_and_stay_as_they_are(tmp_path: Path) -> None:
    backbone = tiny.tiny_backbone("bert")
    original = backbone.state_dict()["encoder.layer.0.attention.self.query.weight"].clone()
    model = peft.get_peft_model(backbone, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query"]))
    layer = model.base_model.model.encoder.layer[0].attention.self.query
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(up)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    read = numbers(export(tmp_path / "m.gguf", "bert", backbone=model))
    expected = original + 2 * up.detach() @ down.detach()
    assert torch.allclose(torch.from_numpy(read["blk.0.attn_q.weight"].copy()), expected, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(read) == len(numbers(export(tmp_path / "plain" / "m.gguf", "bert")))


METADATA = {
    "bert": {
        "bert.context_length": 160,
        "bert.embedding_length": 32,
        "bert.feed_forward_length": 64,
        "bert.block_count": 2,
        "bert.attention.head_count": 4,
        "bert.attention.causal": False,
        "bert.pooling_type": PoolingType.MEAN,
        "bert.attention.layer_norm_epsilon": pytest.approx(1e-12),
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.normalizer.lowercase": True,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
    },
    "distilbert": {
        "general.architecture": "bert",
        "bert.feed_forward_length": 64,
        "bert.attention.layer_norm_epsilon": pytest.approx(1e-12),
        "tokenizer.ggml.token_type_count": 1,
    },
    "roberta": {
        "bert.context_length": 158,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "roberta-bpe",
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
    },
    "xlm-roberta": {
        "bert.context_length": 158,
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.remove_extra_whitespaces": True,
        "tokenizer.ggml.unknown_token_id": 3,
    },
    "modernbert": {
        "general.architecture": "modern-bert",
        "modern-bert.pooling_type": PoolingType.CLS,
        "modern-bert.attention.causal": False,
        "modern-bert.attention.sliding_window": 32,
        "modern-bert.attention.sliding_window_pattern": 2,
        "modern-bert.rope.freq_base": 160000.0,
        "modern-bert.rope.freq_base_swa": 10000.0,
        "modern-bert.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.pre": "modern-bert",
    },
    "qwen3": {
        "qwen3.pooling_type": PoolingType.LAST,
        "qwen3.attention.causal": True,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 8,
        "qwen3.rope.dimension_count": 8,
        "qwen3.rope.freq_base": 10000.0,
        "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.eos_token_id": 0,
    },
}


@pytest.mark.parametrize("model_type", METADATA)
def test_metadata(model_type: str, tmp_path: Path) -> None:
    reader = export(tmp_path / "m.gguf", model_type)
    assert {key: value(reader, key) for key in METADATA[model_type]} == METADATA[model_type]


def test_names_and_authorship(tmp_path: Path) -> None:
    reader = export(tmp_path / "m.gguf", "bert", author="A. Person", license="apache-2.0", base_model="org/base")
    expected = {
        "general.type": "model",
        "general.name": "m",
        "general.author": "A. Person",
        "general.license": "apache-2.0",
        "general.base_model.0.name": "base",
        "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/base",
    }
    assert {key: value(reader, key) for key in expected} == expected


def test_wordpieces_are_spelt_as_llamacpp_reads_them(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny.wordpiece())
    tokenizer.add_tokens(["NewWord"])
    backbone = tiny.tiny_backbone("bert", vocab_size=len(tokenizer) + 2)
    reader = export(tmp_path / "m.gguf", "bert", backbone=backbone, tokenizer=tokenizer)
    pieces, types = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    ids = tokenizer.get_vocab()
    assert [pieces[ids[piece]] for piece in ("[CLS]", "a", "##e", "NewWord")] == ["[CLS]", "▁a", "e", "NewWord"]
    assert types[ids["[CLS]"]] == TokenType.CONTROL
    assert types[ids["a"]] == TokenType.NORMAL
    assert types[ids["NewWord"]] == TokenType.USER_DEFINED
    assert len(pieces) == len(ids) + 2
    assert types[-2:] == [TokenType.UNUSED] * 2


def test_a_cased_tokenizer_stays_cased(tmp_path: Path) -> None:
    tokenizer = transformers.BertTokenizer(vocab=tiny.wordpiece().get_vocab(), do_lower_case=False)
    reader = export(tmp_path / "m.gguf", "bert", tokenizer=tokenizer)
    assert value(reader, "tokenizer.ggml.normalizer.lowercase") is False
    assert value(reader, "tokenizer.ggml.normalizer.strip_accents") is False


def test_merges_and_scores(tmp_path: Path) -> None:
    reader = export(tmp_path / "bpe" / "m.gguf", "roberta")
    merges = value(reader, "tokenizer.ggml.merges")
    pieces = set(value(reader, "tokenizer.ggml.tokens"))
    assert len(merges) > 100
    assert all(merge.replace(" ", "") in pieces for merge in merges)
    reader = export(tmp_path / "unigram" / "m.gguf", "xlm-roberta")
    scores = value(reader, "tokenizer.ggml.scores")
    ids = tiny.unigram().get_vocab()
    assert scores[ids["▁"]] < 0
    assert scores[ids["<s>"]] == 0
    assert value(reader, "tokenizer.ggml.token_type")[ids["<unk>"]] == TokenType.UNKNOWN


def test_without_a_character_map_all_white_space_becomes_a_space(tmp_path: Path) -> None:
    reader = export(tmp_path / "m.gguf", "xlm-roberta")
    charsmap = bytes(value(reader, "tokenizer.ggml.precompiled_charsmap"))
    white_space = "\t \n\v\f\r\x85\xa0\u1680\u2000\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
    normalizer = normalizers.Precompiled(charsmap)
    assert normalizer.normalize_str("a".join(white_space)) == "a".join(" " * len(white_space))
    assert normalizer.normalize_str("Köln 日本 ½\u200b\x01") == "Köln 日本 ½\u200b\x01"


def test_a_character_map_is_copied(tmp_path: Path) -> None:
    key = "tokenizer.ggml.precompiled_charsmap"
    made = bytearray(value(export(tmp_path / "first" / "m.gguf", "xlm-roberta"), key))
    made[-2:] = b"_\0"
    tokenizer = _with(tiny.unigram(), normalizer=normalizers.Precompiled(bytes(made)))
    reader = export(tmp_path / "second" / "m.gguf", "xlm-roberta", tokenizer=tokenizer)
    assert bytes(value(reader, key)) == made


def refused(path: Path, model_type: str, error: type[Exception], message: str, **settings: Any) -> None:
    path.mkdir()
    with pytest.raises(error, match=message):
        export(path / "m.gguf", model_type, **settings)
    assert list(path.iterdir()) == []


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mpnet", "mpnet model.*llama.cpp has no such architecture.*bert, roberta"),
        ("albert", "llama.cpp has no such architecture"),
        ("nomic_bert", "embtune does not write this architecture"),
    ],
)
def test_other_architectures_are_refused(model_type: str, reason: str, tmp_path: Path) -> None:
    refused(tmp_path / "out", model_type, ExportError, reason)


@pytest.mark.parametrize(
    ("model_type", "overrides", "message"),
    [
        ("bert", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("distilbert", {"activation": "relu"}, "activation='relu'"),
        ("modernbert", {"mlp_bias": True}, "mlp_bias=True"),
        (
            "modernbert",
            {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
            "layer_",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "'linear'"),
    ],
)
def test_models_that_llamacpp_would_compute_otherwise_are_refused(
    model_type: str, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(tmp_path / "out", model_type, ExportError, message, backbone=tiny.tiny_backbone(model_type, **overrides))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"quantization": "q4_k_m"}, ArgumentError, "q4_k_m.*f32, f16, bf16, q8_0.*llama-quantize"),
        ({"pooling_mode": "max"}, ExportError, "'max'.*mean, cls, lasttoken"),
        ({"max_seq_length": 161}, ArgumentError, "max_seq_length=161.*160 positions"),
        ({"max_seq_length": 0}, ArgumentError, "max_seq_length=0"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(
    settings: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    refused(tmp_path / "out", "bert", error, message, **settings)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="is a folder"):
        export(tmp_path, "bert")
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="is a file"):
        export(tmp_path / "file" / "m.gguf", "bert")


def _with(tokenizer: Any, **parts: Any) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def _template(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, pair="$A $B", special_tokens=[("<s>", 0)])


def _twice_the_same_piece() -> Any:
    pieces = tiny.wordpiece().get_vocab()
    unused = next(piece for piece in pieces if piece.startswith("##"))
    return transformers.BertTokenizer(vocab={"##▁a" if p == unused else p: i for p, i in pieces.items()})


@pytest.mark.parametrize(
    ("model_type", "make", "message"),
    [
        ("bert", lambda: _with(tiny.wordpiece(), pre_tokenizer=pre_tokenizers.Whitespace()), "with Whitespace"),
        ("bert", lambda: _with(tiny.wordpiece(), normalizer=normalizers.BertNormalizer(clean_text=False)), "cleans"),
        ("roberta", lambda: _with(tiny.roberta_bpe(), normalizer=normalizers.Lowercase()), "Lowercase"),
        ("roberta", lambda: _with(tiny.roberta_bpe(), pre_tokenizer=pre_tokenizers.ByteLevel()), "space put before"),
        ("roberta", lambda: _with(tiny.roberta_bpe(), pre_tokenizer=pre_tokenizers.Digits()), "Digits"),
        (
            "qwen3",
            lambda: _with(
                tiny.qwen_bpe(),
                pre_tokenizer=pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Split(" ", "isolated"),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                    ]
                ),
            ),
            "neither GPT-2's nor Qwen2's",
        ),
        ("xlm-roberta", lambda: _with(tiny.unigram(), normalizer=normalizers.NFKC()), "NFKC"),
        ("bert", lambda: _with(tiny.wordpiece(), post_processor=_template("$A")), "always adds a token on each side"),
        ("roberta", lambda: _with(tiny.roberta_bpe(), post_processor=_template("<s> <s> $A")), "at most one token"),
        ("bert", _twice_the_same_piece, "'▁a' would occur twice"),
        ("bert", transformers.ByT5Tokenizer, "ByT5Tokenizer is written in Python"),
    ],
)
def test_tokenizers_that_llamacpp_would_read_otherwise_are_refused(
    model_type: str, make: Any, message: str, tmp_path: Path
) -> None:
    refused(tmp_path / "out", model_type, ExportError, message, tokenizer=make())


def test_a_tokenizer_without_surrounding_tokens(tmp_path: Path) -> None:
    bare = _with(tiny.qwen_bpe(), post_processor=processors.ByteLevel())
    reader = export(tmp_path / "m.gguf", "qwen3", tokenizer=bare)
    assert value(reader, "tokenizer.ggml.add_eos_token") is False


def test_tokens_without_an_embedding_are_refused(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny.wordpiece())
    tokenizer.add_tokens(["forgotten"])
    refused(tmp_path / "out", "bert", ExportError, "'forgotten' has id.*resize_token_embeddings", tokenizer=tokenizer)


@pytest.mark.parametrize(("number", "quantization"), [(float("nan"), "q8_0"), (float("inf"), "f32"), (1e5, "f16")])
def test_numbers_that_do_not_fit_leave_the_old_file(number: float, quantization: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("the old file")
    backbone = tiny.tiny_backbone("bert")
    with torch.no_grad():
        backbone.encoder.layer[1].output.dense.weight[3, 4] = number
    with pytest.raises(ExportError, match=r"blk\.1\.ffn_down\.weight"):
        export(path, "bert", backbone=backbone, quantization=quantization)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]
    assert path.read_text() == "the old file"


def test_large_numbers_fit_into_bf16(tmp_path: Path) -> None:
    backbone = tiny.tiny_backbone("bert")
    with torch.no_grad():
        backbone.encoder.layer[1].output.dense.weight[3, 4] = 2.0**17
    read = numbers(export(tmp_path / "m.gguf", "bert", backbone=backbone, quantization="bf16"))
    assert read["blk.1.ffn_down.weight"][3, 4] == 2.0**17
