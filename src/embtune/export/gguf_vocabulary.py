"""A Hugging Face tokenizer as llama.cpp's tokenizer metadata, refused where llama.cpp would split text differently.

llama.cpp rebuilds the whole tokenizer from a few keys: the kind (`bert`, `gpt2`, `t5`), the name of a splitting rule
(`pre`), the pieces with their types, and merges, scores or a character map. What these keys cannot say is refused:
other token ids give other embeddings, and nothing at run time would tell.
"""

import base64
import json
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from embtune.errors import ExportError

# llama.cpp marks the start of a word in WordPiece vocabularies, and a space in Unigram ones, with this character.
_SPACE = "\u2581"

# The score llama.cpp's own converter gives to pieces that stand for no text, far below any trained log probability.
_UNUSED_SCORE = -10000.0

# What tokenizers' WhitespaceSplit splits at: Unicode's White_Space, to which Python adds four separators.
_WHITE_SPACE = [char for char in map(chr, range(0x3001)) if char.isspace() and char not in " \x1c\x1d\x1e\x1f"]


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Write the tokenizer's pieces, rules and special tokens.

    Rows of the embedding that the tokenizer does not use (`vocab_size` counts the rows) become unused pieces, because
    llama.cpp takes the number of rows from the number of pieces.

    Raises:
        ExportError: llama.cpp has no tokenizer that gives the same token ids.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"GGUF needs a tokenizer of the tokenizers library (a tokenizer.json); {type(tokenizer).__name__} is "
            "written in Python. Save the model with a fast tokenizer."
        )
    spec = json.loads(backend.to_str())
    pieces, types = _pieces(backend, vocab_size)
    kind = spec["model"]["type"]
    if kind == "WordPiece":
        pieces = _add_wordpiece(writer, spec, pieces, types)
    elif kind == "BPE":
        _add_byte_bpe(writer, spec)
    elif kind == "Unigram":
        _add_unigram(writer, spec, pieces, types)
    else:
        raise _unlike(f"its model is {kind}; WordPiece, byte-level BPE and Unigram can be written")
    if len(set(pieces)) < len(pieces):
        twice = next(piece for piece in pieces if pieces.count(piece) > 1)
        raise _unlike(f"llama.cpp needs distinct pieces, and {twice!r} would occur twice")
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    _add_special_tokens(writer, tokenizer, kind)


def _unlike(reason: str) -> ExportError:
    return ExportError(f"This tokenizer cannot be written to GGUF with the same token ids: {reason}.")


def _pieces(backend: Any, vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Text and type of every token id below `vocab_size`."""
    pieces = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for piece, index in backend.get_vocab(with_added_tokens=True).items():
        if index >= vocab_size:
            raise ExportError(
                f"The tokenizer's token {piece!r} has id {index}, but the embedding has {vocab_size} rows. "
                "Call resize_token_embeddings(len(tokenizer)) on the model and train the new rows."
            )
        pieces[index], types[index] = piece, TokenType.NORMAL
    for index, token in backend.get_added_tokens_decoder().items():
        types[index] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    return pieces, types


def _steps(component: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """The steps of a tokenizers component, whether it is absent, one step or a Sequence."""
    if component is None:
        return []
    return component[children] if component["type"] == "Sequence" else [component]


def _add_wordpiece(writer: GGUFWriter, spec: dict[str, Any], pieces: list[str], types: list[TokenType]) -> list[str]:
    """Write the rules of BERT's tokenizer; return the pieces in llama.cpp's spelling."""
    normalizer, splitter, model = spec["normalizer"] or {}, spec["pre_tokenizer"] or {}, spec["model"]
    if normalizer.get("type") != "BertNormalizer" or splitter.get("type") != "BertPreTokenizer":
        raise _unlike(
            "llama.cpp's WordPiece knows BertNormalizer with BertPreTokenizer, and this one has "
            f"{normalizer.get('type')} with {splitter.get('type')}"
        )
    if not (normalizer["clean_text"] and normalizer["handle_chinese_chars"]):
        raise _unlike("llama.cpp always cleans text and splits Chinese characters, and this one does not")
    if model["continuing_subword_prefix"] != "##":
        raise _unlike(f"word continuations start with {model['continuing_subword_prefix']!r} instead of '##'")
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    # Older llama.cpp ignores these two keys and lowercases always: a cased model needs a recent one.
    lowercase = normalizer["lowercase"]
    strip_accents = lowercase if normalizer["strip_accents"] is None else normalizer["strip_accents"]
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", lowercase)
    writer.add_bool("tokenizer.ggml.normalizer.strip_accents", strip_accents)
    return [
        piece if kind != TokenType.NORMAL else piece[2:] if piece.startswith("##") else _SPACE + piece
        for piece, kind in zip(pieces, types, strict=True)
    ]


def _add_byte_bpe(writer: GGUFWriter, spec: dict[str, Any]) -> None:
    model = spec["model"]
    normalizers = [step["type"] for step in _steps(spec["normalizer"], "normalizers")]
    # NFC is accepted although llama.cpp has none: nearly all text is in that form already.
    if set(normalizers) - {"NFC"}:
        raise _unlike(f"llama.cpp's BPE has no normalizer, and this one has {', '.join(normalizers)}")
    if model["byte_fallback"] or model["ignore_merges"] or model["continuing_subword_prefix"]:
        raise _unlike("llama.cpp's BPE has no byte fallback, ignored merges or continuation prefix")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting_rule(_steps(spec["pre_tokenizer"], "pretokenizers"), writer.arch))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])


def _splitting_rule(steps: list[dict[str, Any]], architecture: str) -> str:
    """llama.cpp's name of the rule that cuts text into words before the merges."""
    *splits, last = steps or [{"type": None}]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        found = ", ".join(str(step["type"]) for step in steps) or "none"
        raise _unlike(
            f"llama.cpp's BPE is byte-level without a space put before the text; its pre-tokenizer is: {found}"
        )
    if last["use_regex"] and not splits:
        return {"bert": "roberta-bpe", "modern-bert": "modern-bert"}.get(architecture, "gpt-2")
    if [step.get("pattern") for step in splits] == [{"Regex": PRETOKENIZE_REGEX}] and not last["use_regex"]:
        return "qwen2"
    raise _unlike("it splits words by neither GPT-2's nor Qwen2's pattern")


def _add_unigram(writer: GGUFWriter, spec: dict[str, Any], pieces: list[str], types: list[TokenType]) -> None:
    model = spec["model"]
    normalizers = _steps(spec["normalizer"], "normalizers")
    splitters = {step["type"]: step for step in _steps(spec["pre_tokenizer"], "pretokenizers")}
    unknown = {step["type"] for step in normalizers} - {"Precompiled", "Replace", "Strip"}
    unknown |= splitters.keys() - {"WhitespaceSplit", "Metaspace"}
    unknown |= {
        "Replace" for step in normalizers if step["type"] == "Replace" and step["pattern"] != {"Regex": " {2,}"}
    }
    if unknown or "Metaspace" not in splitters or model.get("byte_fallback"):
        raise _unlike(
            "llama.cpp's Unigram knows SentencePiece's character map, merging of spaces and Metaspace without byte "
            f"fallback; this one has {', '.join(sorted(unknown)) or 'byte fallback or no Metaspace'}"
        )
    scores = [_UNUSED_SCORE] * len(pieces)
    for index, (_, score) in enumerate(model["vocab"]):
        scores[index] = score
    types[model["unk_id"]] = TokenType.UNKNOWN
    merges_spaces = "WhitespaceSplit" in splitters or any(step["type"] == "Replace" for step in normalizers)
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    writer.add_add_space_prefix(splitters["Metaspace"]["prepend_scheme"] != "never")
    writer.add_remove_extra_whitespaces(merges_spaces)
    maps = [step["precompiled_charsmap"] for step in normalizers if step["type"] == "Precompiled"]
    if maps:
        writer.add_precompiled_charsmap(base64.b64decode(maps[0]))
    elif "WhitespaceSplit" in splitters:
        writer.add_precompiled_charsmap(_whitespace_charsmap())


def _whitespace_charsmap() -> bytes:
    """A character map that only turns white space into spaces: llama.cpp knows no other white space in a Unigram.

    The format is SentencePiece's: length of the trie, the trie over UTF-8 bytes as 32-bit units, then the replacements,
    each ended by a zero byte. A unit holds its byte in bits 0-7, in bit 8 whether a character ends there, and from bit
    10 its own index XOR that of its block of children (or of its value, a unit whose bit 31 is set). Here every inner
    node has a block of 256 units of its own, and all characters share the value in unit 1: the replacement at offset 0.
    """
    spellings = [char.encode() for char in _WHITE_SPACE]
    inner = sorted({spelling[:length] for spelling in spellings for length in range(len(spelling))})
    blocks = {prefix: 256 * (1 + index) for index, prefix in enumerate(inner)}
    units = np.zeros(256 * (1 + len(inner)), dtype="<u4")
    units[:2] = blocks[b""] << 10, 1 << 31
    for prefix in [*inner[1:], *spellings]:
        index = blocks[prefix[:-1]] + prefix[-1]
        units[index] = (index ^ blocks.get(prefix, 1)) << 10 | (prefix not in blocks) << 8 | prefix[-1]
    return units.nbytes.to_bytes(4, "little") + units.tobytes() + b" \0"


def _add_special_tokens(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """Write which tokens surround a text, as the tokenizer itself puts them, and the ids of the others."""
    encoded = tokenizer("a", return_special_tokens_mask=True, padding=False, truncation=False)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    before = ids[: mask.index(0)]
    after = ids[len(mask) - mask[::-1].index(0) :]
    if len(before) > 1 or len(after) > 1:
        raise _unlike(
            f"llama.cpp adds at most one token on each side of a text, and this one adds {before} and {after}"
        )
    if kind == "WordPiece" and not (before and after):
        raise _unlike("llama.cpp's WordPiece always adds a token on each side of a text, and this one does not")
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    last = after[0] if after else None
    _add_id(writer.add_bos_token_id, before[0] if before else tokenizer.bos_token_id)
    _add_id(writer.add_eos_token_id, last if last is not None else tokenizer.eos_token_id)
    _add_id(writer.add_sep_token_id, last if last is not None else tokenizer.sep_token_id)
    _add_id(writer.add_unk_token_id, tokenizer.unk_token_id)
    _add_id(writer.add_pad_token_id, tokenizer.pad_token_id)
    _add_id(writer.add_mask_token_id, tokenizer.mask_token_id)


def _add_id(add: Any, token_id: int | None) -> None:
    if token_id is not None:
        add(token_id)
