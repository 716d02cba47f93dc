"""ONNX and OpenVINO: the embeddings of the trained model, computed without PyTorch, at every length and batch size."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from onnxruntime import InferenceSession
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer
from tiny import ARCHITECTURES, HIDDEN, TEXTS, randomise_adapter, tiny_model_dir
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer

from embtune.errors import ArgumentError, EmbtuneError, ExportError, MissingPackageError
from embtune.export import graph
from embtune.export.merged import save_merged
from embtune.export.onnx import MINIMUM_COSINE, save_onnx
from embtune.export.openvino import save_openvino
from embtune.files import read_json

# DistilBERT and T5 have their turn further down.
QUICK = ("bert", "modernbert", "mpnet", "qwen3")
# One text; many, of unequal lengths; longer than the longest that the model takes, beside the shortest.
BATCHES = ([TEXTS[6]], TEXTS, ["word " * 400, "x"])

Compute = Callable[[dict[str, np.ndarray]], np.ndarray]


def load(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


def with_adapter(model: SentenceTransformer) -> SentenceTransformer:
    """An adapter that changes the embeddings."""
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    model[0].model = get_peft_model(model[0].model, config)
    randomise_adapter(model, std=0.06)
    return model


def onnx_of(folder: Path) -> Compute:
    session = InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["sentence_embedding"], inputs)[0]


def openvino_of(folder: Path) -> Compute:
    file = folder / "openvino" / "openvino_model.xml"
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: compiled(inputs)["sentence_embedding"]


def worst_cosine(model: SentenceTransformer, folder: Path, compute: Compute) -> float:
    """Over all of `BATCHES`, as somebody without sentence-transformers and PyTorch embeds them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    worst = 1.0
    for texts in BATCHES:
        inputs = dict(tokenizer(list(texts), padding=True, truncation=True, return_tensors="np"))
        cosines = np.sum(compute(inputs) * embed(model, texts), axis=1)
        worst = min(worst, cosines.min())
    return worst


def embed(model: SentenceTransformer, texts: Sequence[str]) -> np.ndarray:
    return model.encode(list(texts), show_progress_bar=False, normalize_embeddings=True)


def check_family(model_type: str, folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    saved = save_onnx(model, tmp_path / "graph", verify=False)
    assert worst_cosine(model, saved, onnx_of(saved)) > 0.999999
    # A text of one token, which the tokenizers of few families make.
    ids = torch.tensor([[5]])
    features = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    features = {name: features[name] for name in AutoTokenizer.from_pretrained(saved).model_input_names}
    with torch.no_grad():
        alone = model({**features})["sentence_embedding"].numpy()
    session = InferenceSession(saved / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(["sentence_embedding"], {name: ids.numpy() for name, ids in features.items()})[0]
    np.testing.assert_allclose(found, alone, atol=1e-5)
    # What Optimum asks for by name, and infers shapes from.
    assert [(output.name, output.shape) for output in session.get_outputs()] == [
        ("last_hidden_state", ["batch_size", "sequence_length", HIDDEN]),
        ("sentence_embedding", ["batch_size", HIDDEN]),
    ]


@pytest.mark.parametrize("model_type", QUICK)
def test_families(model_type: str, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    check_family(model_type, tiny_dir(model_type), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(ARCHITECTURES) - set(QUICK)))
def test_further_families(model_type: str, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    check_family(model_type, tiny_dir(model_type), tmp_path)
    model = load(tiny_dir(model_type))
    saved = save_openvino(model, tmp_path / "openvino", quantization="f16")
    assert worst_cosine(model, saved, openvino_of(saved)) > 0.9999
    saved = save_onnx(model, tmp_path / "int8", quantization="int8")
    assert worst_cosine(model, saved, onnx_of(saved)) > MINIMUM_COSINE["int8"]


@pytest.mark.parametrize(("model_type", "quantization"), [("qwen3", "f32"), ("distilbert", "f16")])
def test_openvino(model_type: str, quantization: str, tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = load(tiny_dir(model_type))
    saved = save_openvino(model, tmp_path / "graph", quantization=quantization)
    assert worst_cosine(model, saved, openvino_of(saved)) > 0.99999
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]
    stored = (saved / "openvino" / "openvino_model.xml").read_text(encoding="utf-8")
    assert ('element_type="f16"' in stored) is (quantization == "f16")
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert 'SentenceTransformer("graph", backend="openvino")' in card
    assert 'compile_model("graph/openvino/openvino_model.xml")' in card


def test_a_real_model_with_an_adapter_in_eight_bits(minilm_dir: Path, tmp_path: Path) -> None:
    model = with_adapter(load(minilm_dir)).train()
    model.max_seq_length = 200
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    saved = save_onnx(model, tmp_path / "int8", quantization="int8")
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    assert MINIMUM_COSINE["int8"] < worst_cosine(model, saved, onnx_of(saved)) < 0.999
    assert worst_cosine(load(minilm_dir), saved, onnx_of(saved)) < 0.95
    file = saved / "onnx" / "model.onnx"
    assert file.stat().st_size < 24_000_000
    assert b"site-packages" not in file.read_bytes()
    assert sorted(path.name for path in saved.iterdir() if path.suffix != ".json") == [
        *("1_Pooling", "2_Normalize", "README.md", "onnx", "vocab.txt")
    ]
    assert read_json(saved / "modules.json")[0]["type"] == "sentence_transformers.models.Transformer"
    assert "13 texts in several languages: 0.98" in (saved / "README.md").read_text(encoding="utf-8")

    # The tokenizer's file alone cuts and pads as the model does; the checkpoint's own pads everything to 128 tokens.
    texts = ["word " * 400, "A shorter text"]
    rows = Tokenizer.from_file(str(saved / "tokenizer.json")).encode_batch(texts)
    found = {"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}
    tokens = model.tokenizer(texts, padding=True, truncation=True)
    assert len(found["input_ids"][1]) == 200
    assert found == {name: tokens[name] for name in found}


@pytest.mark.parametrize(("model_type", "quantization"), [("t5", "f32"), ("bert", "int8")])
def test_weights_beyond_the_limit_of_a_message_lie_beside_it(
    model_type: str, quantization: str, tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "_LARGEST_FILE", 0)
    model = load(tiny_dir(model_type))
    saved = save_onnx(model, tmp_path / "graph", quantization=quantization, verify=False)
    assert sorted(path.name for path in (saved / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    assert worst_cosine(model, saved, onnx_of(saved)) > MINIMUM_COSINE[quantization]


def test_prompts_and_cut_dimensions_are_compared_as_the_model_uses_them(
    tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model = SentenceTransformer(
        str(tiny_dir("bert")), device="cpu", truncate_dim=16, prompts={"q": "find: "}, default_prompt_name="q"
    )
    saved = save_onnx(model, tmp_path / "graph")
    assert 'SentenceTransformer("graph", backend="onnx")' in (saved / "README.md").read_text(encoding="utf-8")
    assert read_json(saved / "config_sentence_transformers.json")["prompts"]["q"] == "find: "
    inputs = dict(AutoTokenizer.from_pretrained(saved)(["find: a text"], return_tensors="np"))
    np.testing.assert_allclose(onnx_of(saved)(inputs)[:, :16], model.encode(["a text"]), atol=1e-5)


class Branching(nn.Module):
    """Does something else for some numbers, which no graph can tell."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if features["sentence_embedding"].sum() > 0:
            features["sentence_embedding"] = -features["sentence_embedding"]
        return features

    def save(self, output_path: str, *_: object, **__: object) -> None:
        pass

    @classmethod
    def load(cls, *_: object, **__: object) -> "Branching":
        return cls()


def test_a_model_that_cannot_be_traced(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_dir("bert")), device="cpu", trust_remote_code=True)
    model.append(Branching())
    with pytest.raises(ExportError, match=r"PyTorch cannot export BertModel as an ONNX graph: .*data-dependent"):
        save_onnx(model, tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []


def dynamic_rope(folder: Path, scratch: Path) -> SentenceTransformer:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    return load(tiny_model_dir("llama", scratch / "llama", rope_parameters=rope))


def prompt_left_out(folder: Path, scratch: Path) -> SentenceTransformer:
    model = load(folder)
    model[1].include_prompt = False
    model.prompts = {"query": "find: "}
    return model


def routed(folder: Path, scratch: Path) -> SentenceTransformer:
    router = Router.for_query_document([Transformer(str(folder)), Pooling(HIDDEN)], [nn.Identity()])
    return SentenceTransformer(modules=[router], device="cpu")


def two_encoders(folder: Path, scratch: Path) -> SentenceTransformer:
    routes = ([Transformer(str(folder)), Pooling(HIDDEN)] for _ in range(2))
    return SentenceTransformer(modules=[Router.for_query_document(*routes)], device="cpu")


def with_pictures(folder: Path, scratch: Path) -> SentenceTransformer:
    model = load(folder)
    model[0].modality_config = {**model[0].modality_config, "image": {}}
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (dynamic_rope, "rotary embeddings depend on the longest text"),
        (prompt_left_out, "pooling leaves the prompt out"),
        (routed, "does not begin with a module that embeds tokens"),
        (two_encoders, "needs a model with one Transformer module; this one has 2"),
        (with_pictures, "takes image beside text"),
    ],
)
def test_what_a_graph_cannot_be_is_refused_with_the_reason(
    make: Callable[[Path, Path], SentenceTransformer],
    reason: str,
    tiny_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = make(tiny_dir("bert"), tmp_path)
    for save in (save_onnx, save_openvino):
        with pytest.raises(EmbtuneError, match=reason):
            save(model, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()


def test_too_much_loss_is_an_error_and_leaves_nothing(
    tiny_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MINIMUM_COSINE, "int8", 0.9999)
    with pytest.raises(ExportError, match=r"int8 loses too much .* cosine of 0\.99\d+, below 0\.9999 .*Use f32\."):
        save_onnx(load(tiny_dir("bert")), tmp_path / "graph", quantization="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("save", [save_onnx, save_openvino])
def test_an_unknown_quantisation_is_refused(
    save: Callable[..., Path], tiny_dir: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match="The quantization 'q4' is not offered. Use f32 or "):
        save(load(tiny_dir("bert")), tmp_path / "graph", quantization="q4")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_holds_one_kind_of_weights(tiny_dir: Callable[..., Path], tmp_path: Path) -> None:
    model = load(tiny_dir("bert"))
    merged = save_merged(model, tmp_path / "merged", verify=False)
    for save in (save_onnx, save_openvino):
        with pytest.raises(ArgumentError, match=r"already holds model\.safetensors"):
            save(model, merged)
    # As readers of a repository find it.
    graph_of_another = tmp_path / "graph" / "onnx" / "model.onnx"
    graph_of_another.parent.mkdir(parents=True)
    graph_of_another.write_bytes(b"old")
    (tmp_path / "graph" / "notes.txt").write_text("kept")
    for refused in (save_merged, save_openvino):
        with pytest.raises(ArgumentError, match=r"already holds onnx/model\.onnx"):
            refused(model, tmp_path / "graph")
    saved = save_onnx(model, tmp_path / "graph", verify=False)
    assert graph_of_another.stat().st_size > 100_000
    assert (saved / "notes.txt").read_text() == "kept"
    assert "several languages" not in (saved / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("save", "missing", "extra"),
    [(save_onnx, "onnxscript", "onnx"), (save_onnx, "onnxruntime", "onnx"), (save_openvino, "openvino", "openvino")],
)
def test_a_missing_package_names_the_command(
    save: Callable[..., Path],
    missing: str,
    extra: str,
    tiny_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("embtune.runtime.is_installed", lambda module: module != missing)
    model = load(tiny_dir("bert"))
    with pytest.raises(MissingPackageError, match=rf'needs the package {missing}, .*pip install "embtune\[{extra}\]"'):
        save(model, tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []
