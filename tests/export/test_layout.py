import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Module, Normalize, Pooling, Router, Transformer
from sentence_transformers.util import import_from_string
from tiny import HIDDEN, TEXTS, roberta_bpe, tiny_config
from torch import Tensor, nn

from embtune.export.layout import make_compatible, with_legacy_keys


class Doubled(Module):
    """A module of another library."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        features["sentence_embedding"] = features["sentence_embedding"] * 2
        return features

    def save(self, output_path: str, *_: object, **__: object) -> None:
        pass

    @classmethod
    def load(cls, *_: object, **__: object) -> "Doubled":
        return cls()


def _saved(model: SentenceTransformer, folder: Path) -> Path:
    model.save_pretrained(str(folder))
    make_compatible(folder, model)
    return folder


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Everything logged as a warning or worse, transformers' own logger included."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


def test_the_folder_has_both_spellings(
    tiny_dir: Callable[..., Path], tmp_path: Path, messages: Callable[[], list[str]]
) -> None:
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    model.max_seq_length = 40
    model.append(Dense(HIDDEN, 8, activation_function=nn.Identity()))
    model.append(Doubled())
    folder = _saved(model, tmp_path / "model")

    types = [entry["type"] for entry in json.loads((folder / "modules.json").read_text())]
    legacy = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize", "Dense")]
    assert types == [*legacy, f"{Doubled.__module__}.Doubled"]
    assert all(import_from_string(name) is type(module) for name, module in zip(legacy, model, strict=False))

    pooling = _json(folder / "1_Pooling" / "config.json")
    assert pooling["pooling_mode_mean_tokens"] is True
    assert pooling["pooling_mode_cls_token"] is False
    assert (pooling["word_embedding_dimension"], pooling["pooling_mode"]) == (HIDDEN, "mean")
    settings = _json(folder / "sentence_bert_config.json")
    assert (settings["max_seq_length"], settings["do_lower_case"]) == (40, False)
    assert "modality_config" in settings
    assert "module_input_name" not in _json(folder / "3_Dense" / "config.json")

    reloaded = SentenceTransformer(str(folder), device="cpu", trust_remote_code=True)
    assert messages() == []
    assert reloaded.max_seq_length == 40
    torch.testing.assert_close(
        reloaded.encode(TEXTS, convert_to_tensor=True), model.eval().encode(TEXTS, convert_to_tensor=True)
    )


@pytest.mark.parametrize(
    ("mode", "active", "kept"),
    [
        ("lasttoken", {"pooling_mode_lasttoken"}, "lasttoken"),
        (("cls", "mean"), {"pooling_mode_cls_token", "pooling_mode_mean_tokens"}, None),
        (("mean", "cls"), {"pooling_mode_cls_token", "pooling_mode_mean_tokens"}, ["mean", "cls"]),
    ],
)
def test_pooling_modes_survive(
    tiny_dir: Callable[..., Path], tmp_path: Path, mode: str | tuple, active: set[str], kept: str | list | None
) -> None:
    transformer = Transformer.load(str(tiny_dir("bert")))
    model = SentenceTransformer(modules=[transformer, Pooling(HIDDEN, mode, include_prompt=False)], device="cpu")
    folder = _saved(model, tmp_path / "model")
    written = _json(folder / "1_Pooling" / "config.json")
    assert {key for key, value in written.items() if key.startswith("pooling_mode_") and value} == active
    assert written.get("pooling_mode") == kept
    reloaded = SentenceTransformer(str(folder), device="cpu")[1]
    assert (reloaded.pooling_mode, reloaded.include_prompt) == (mode, False)


def test_modules_inside_a_router_are_rewritten(
    tiny_dir: Callable[..., Path], tmp_path: Path, messages: Callable[[], list[str]]
) -> None:
    query = SentenceTransformer(str(tiny_dir("bert")), device="cpu")
    document = SentenceTransformer(str(tiny_dir("distilbert")), device="cpu")
    router = Router.for_query_document(query_modules=[query[0], query[1]], document_modules=[document[0], document[1]])
    model = SentenceTransformer(modules=[router, Normalize()], device="cpu")
    folder = _saved(model, tmp_path / "model")
    types = [entry["type"] for entry in json.loads((folder / "modules.json").read_text())]
    assert types == [f"{Router.__module__}.Router", "sentence_transformers.models.Normalize"]
    inner = set(_json(folder / "router_config.json")["types"].values())
    assert inner == {"sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"}
    assert _json(folder / "document_1_Pooling" / "config.json")["word_embedding_dimension"] == HIDDEN
    reloaded = SentenceTransformer(str(folder), device="cpu")
    assert messages() == []
    for task in ("query", "document"):
        expected = model.eval().encode(TEXTS, task=task, convert_to_tensor=True)
        torch.testing.assert_close(reloaded.encode(TEXTS, task=task, convert_to_tensor=True), expected)


def test_tokenizer_files_are_those_that_transformers_4_reads(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_dir("modernbert", bare=True)
    model = SentenceTransformer(modules=[Transformer(str(base)), Pooling(HIDDEN)], device="cpu")
    model.tokenizer.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"the checkpoint's own")
    model.tokenizer.name_or_path = str(tmp_path / "base")
    assert type(model.tokenizer).__name__ == "TokenizersBackend"
    folder = _saved(model, tmp_path / "model")
    written = _json(folder / "tokenizer_config.json")
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<extra>"]
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    assert (folder / "tokenizer.model").read_bytes() == b"the checkpoint's own"
    reloaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert reloaded.extra_special_tokens == ["<extra>"]
    assert reloaded(TEXTS).input_ids == roberta_bpe()(TEXTS).input_ids


def test_inputs_that_the_model_does_not_take_are_not_announced(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_dir("distilbert")), device="cpu")
    assert "token_type_ids" in model.tokenizer.model_input_names
    names = _json(_saved(model, tmp_path / "model") / "tokenizer_config.json")["model_input_names"]
    assert names == ["input_ids", "attention_mask"]


def _written_config(model_type: str, **settings: object) -> dict:
    return json.loads(tiny_config(model_type, **settings).to_json_string())


def test_legacy_keys_of_modernbert() -> None:
    config = _written_config("modernbert", num_hidden_layers=7, global_attn_every_n_layers=3, norm_eps=1e-6)
    del config["global_attn_every_n_layers"]  # a config of its own keeps what it was made from
    assert not {"layer_norm_eps", "global_rope_theta", "local_rope_theta"} & config.keys()
    legacy = with_legacy_keys(config)
    assert legacy["layer_norm_eps"] == 1e-6
    assert legacy["global_attn_every_n_layers"] == 3
    assert (legacy["global_rope_theta"], legacy["local_rope_theta"]) == (160_000.0, 10_000.0)
    assert config.items() <= legacy.items()


def test_legacy_keys_of_nomic_bert() -> None:
    config = _written_config("nomic_bert", max_position_embeddings=2048)
    legacy = with_legacy_keys(config)
    assert (legacy["n_positions"], legacy["n_embd"], legacy["n_inner"]) == (2048, HIDDEN, 64)
    assert (legacy["activation_function"], legacy["rotary_emb_base"]) == ("swiglu", 1000.0)
    # Beside n_positions, text-embeddings-inference takes it for a duplicate; transformers has the same default.
    assert "max_position_embeddings" not in legacy
    assert transformers.AutoConfig.for_model(**legacy).max_position_embeddings == 2048
    assert with_legacy_keys({**config, "n_positions": 8192})["n_positions"] == 8192
    assert with_legacy_keys(_written_config("nomic_bert"))["max_position_embeddings"] == 160


def test_legacy_keys_of_rotary_models() -> None:
    gemma = with_legacy_keys(_written_config("gemma3_text"))
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1_000_000.0, 10_000.0)
    scaled = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    qwen = with_legacy_keys(_written_config("qwen3", rope_parameters=scaled))
    assert qwen["rope_theta"] == 5e5
    assert qwen["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert transformers.AutoConfig.for_model(**qwen).rope_parameters == scaled
    assert with_legacy_keys(_written_config("bert")) == _written_config("bert")
