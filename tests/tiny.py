"""Small random models and tokenizers of real architectures, built from transformers configs."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.normalizers import BertNormalizer

VOCABULARY = 600
HIDDEN = 32
POSITIONS = 160

TEXTS = [
    "A short question?",
    "How do I read a file line by line without loading it into memory at once?",
    "for line in open(path):\n    yield line.rstrip('\\n')",
    "Grüße aus Köln; naïve café, déjà vu.",
    "Ein etwas längerer Satz mit vielen Wörtern, damit die Tokenisierung verschiedene Längen ergibt.",
    "日本語の短い文",
    "x",
    "The quick brown fox jumps over the lazy dog, again and again, until the sun goes down behind the hills.",
    "rm -rf build && mkdir build && cd build && cmake .. && make -j8",
    "SELECT name, count(*) FROM users GROUP BY name HAVING count(*) > 1 ORDER BY 2 DESC;",
    "émoji 🙂 and symbols § ± µ",
    "word " * 70,
]


def _pieces(normalise: Callable[[str], str]) -> tuple[list[str], list[str]]:
    """Characters and words of the texts, in a fixed order: the trainers of WordPiece and Unigram differ by the run."""
    words = sorted({word for text in TEXTS for word in re.findall(r"\w+|[^\w\s]", normalise(text))})
    return sorted({character for word in words for character in word}), [word for word in words if len(word) > 1]


@cache
def wordpiece() -> transformers.PreTrainedTokenizerFast:
    characters, words = _pieces(BertNormalizer(lowercase=True).normalize_str)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*specials, *characters, *(f"##{character}" for character in characters), *words[::2]]
    return transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)}, do_lower_case=True)


def _byte_bpe(specials: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@cache
def roberta_bpe() -> transformers.PreTrainedTokenizerFast:
    vocab, merges = _byte_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return transformers.RobertaTokenizer(vocab=vocab, merges=merges)


@cache
def qwen_bpe() -> transformers.PreTrainedTokenizerFast:
    """As Qwen3-Embedding ships it: left padding, and an end-of-text token behind every text."""
    from tokenizers.processors import TemplateProcessing

    vocab, merges = _byte_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, padding_side="left")
    end = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.convert_tokens_to_ids(end))]
    )
    return tokenizer


@cache
def unigram() -> transformers.PreTrainedTokenizerFast:
    characters, words = _pieces(str)
    pieces = [(piece, -3.0) for piece in ["▁", *(f"▁{word}" for word in words[::2])]]
    pieces += [(character, -6.0) for character in characters]
    specials = [(special, 0.0) for special in ("<s>", "<pad>", "</s>", "<unk>")]
    return transformers.XLMRobertaTokenizer(vocab=[*specials, *pieces, ("<mask>", 0.0)])


@cache
def t5_unigram() -> transformers.PreTrainedTokenizerFast:
    characters, words = _pieces(str)
    pieces = [(piece, -3.0) for piece in ["▁", *(f"▁{word}" for word in words[::2])]]
    pieces += [(character, -6.0) for character in characters]
    specials = [(special, 0.0) for special in ("<pad>", "</s>", "<unk>")]
    return transformers.T5Tokenizer(vocab=[*specials, *pieces, ("<extra_id_0>", 0.0)], extra_ids=1)


_ENCODER = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
_SEPARATORS = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "pad_token_id": 0}

# model_type -> (tokenizer, settings of its config, pooling)
_ALL: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "bert": (wordpiece, _ENCODER, "mean"),
    "ernie": (wordpiece, _ENCODER, "mean"),
    "electra": (wordpiece, {**_ENCODER, "embedding_size": HIDDEN}, "cls"),
    "mpnet": (wordpiece, {**_ENCODER, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}, "mean"),
    "distilbert": (
        wordpiece,
        {"dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": POSITIONS},
        "mean",
    ),
    "albert": (wordpiece, {**_ENCODER, "embedding_size": 16}, "mean"),
    "modernbert": (
        roberta_bpe,
        {**_ENCODER, **_SEPARATORS, "local_attention": 32, "global_attn_every_n_layers": 2},
        "cls",
    ),
    "deberta-v2": (
        wordpiece,
        {**_ENCODER, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]},
        "cls",
    ),
    "t5": (
        t5_unigram,
        {
            "d_model": HIDDEN,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "relative_attention_num_buckets": 16,
            "relative_attention_max_distance": 40,
        },
        "mean",
    ),
    "nomic_bert": (wordpiece, {**_ENCODER, "pad_token_id": 0}, "mean"),
    "gte": (wordpiece, {**_ENCODER, "pad_token_id": 0}, "cls"),
    "jina_embeddings_v3": (unigram, _ENCODER, "mean"),
    "eurobert": (
        roberta_bpe,
        {**_ENCODER, **_SEPARATORS, "pad_token_id": 1, "mask_token_id": 4, "num_key_value_heads": 2},
        "mean",
    ),
    "roberta": (roberta_bpe, {**_ENCODER, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}, "mean"),
    "xlm-roberta": (unigram, {**_ENCODER, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}, "mean"),
    "camembert": (unigram, {**_ENCODER, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}, "mean"),
    "qwen2": (qwen_bpe, {**_DECODER, "pad_token_id": 0, "eos_token_id": 0}, "lasttoken"),
    "qwen3": (qwen_bpe, {**_DECODER, "pad_token_id": 0, "eos_token_id": 0}, "lasttoken"),
    "llama": (qwen_bpe, {**_DECODER, "pad_token_id": 0, "eos_token_id": 0}, "lasttoken"),
    "mistral": (qwen_bpe, {**_DECODER, "sliding_window": 32, "pad_token_id": 0, "eos_token_id": 0}, "lasttoken"),
    "gemma3_text": (qwen_bpe, {**_DECODER, "sliding_window": 32, "pad_token_id": 0}, "mean"),
    "embedding_gemma2_text": (
        qwen_bpe,
        {
            **_DECODER,
            "sliding_window": 32,
            "sliding_window_pattern": 2,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "embedding_dim": HIDDEN,
            "pad_token_id": 0,
        },
        "mean",
    ),
}
# Some came with later releases of transformers than the oldest that embtune takes.
ARCHITECTURES = {name: row for name, row in _ALL.items() if name in transformers.CONFIG_MAPPING}


def tiny_config(model_type: str, **overrides: Any) -> transformers.PretrainedConfig:
    """The config of a small random model; dropout stays at the architecture's own default."""
    tokenizer, settings, _ = ARCHITECTURES[model_type]
    return transformers.AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer()), **settings, **overrides})


def tiny_backbone(model_type: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A small random backbone whose weights are large enough for texts to differ clearly."""
    torch.manual_seed(seed)
    config = tiny_config(model_type, **overrides)
    # Of an encoder-decoder (T5) only the encoder embeds.
    auto_model = transformers.AutoModelForTextEncoding if config.is_encoder_decoder else transformers.AutoModel
    model = auto_model.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def tiny_model_dir(model_type: str, folder: Path, *, bare: bool = False, **overrides: Any) -> Path:
    """Save a small random model into `folder`: a sentence-transformers folder, or a bare transformers checkpoint."""
    tokenizer_of, _, pooling = ARCHITECTURES[model_type]
    tokenizer = tokenizer_of()
    tokenizer.model_max_length = POSITIONS - 32
    tiny_backbone(model_type, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not bare:
        modules = [Transformer(str(folder)), Pooling(HIDDEN, pooling_mode=pooling), Normalize()]
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder))
    return folder


def randomise_adapter(model: torch.nn.Module, std: float = 0.1, seed: int = 0) -> None:
    """Give the B of LoRA adapters numbers; at B = 0 the adapter changes nothing, and A has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
