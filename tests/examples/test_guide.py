"""The six-step guide, run from its file on the real MiniLM: it trains, and its last two lines write whole folders."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from embtune import FastModel
from embtune.data.code_pairs import collect_code_pairs
from embtune.errors import ArgumentError

GUIDE = Path(__file__).parents[2] / "examples" / "guide.py"


@pytest.fixture(scope="module")
def output(minilm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guide")
    rows = collect_code_pairs().train[:72]
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"anchor": sentence, "positive": source[:400]}) + "\n" for sentence, source in rows)
    )
    command = [sys.executable, str(GUIDE), "--cpu", "--test-size", "24", "--model", str(minilm_dir)]
    command += ["--data", str(folder / "pairs.jsonl"), "--output", str(folder)]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "max_seq_length=2048 is more than the 512 positions" in done.stderr
    (folder / "log").write_text(done.stdout + done.stderr)
    return folder


def test_the_run_evaluates_and_keeps_its_best_model(output: Path) -> None:
    state = json.loads((output / "embeddings_run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith(("checkpoint-2", "checkpoint-4"))
    assert any("eval_ir-eval_cosine_ndcg@10" in row for row in state["log_history"])


def test_the_literal_last_two_lines_write_whole_folders(output: Path, minilm_dir: Path) -> None:
    texts = ["how to open a file", "def f(x):\n    return x + 1"]
    trained = SentenceTransformer(str(output / "embeddings_merged"), device="cpu")
    assert not (output / "embeddings_merged" / "adapter_config.json").exists()
    assert trained[1].pooling_mode == "cls"
    embeddings = trained.encode(texts)
    # The adapter moved it away from the base: what was saved is what was trained.
    base = SentenceTransformer(str(minilm_dir), device="cpu")
    base[1].pooling_mode = "cls"
    assert not np.allclose(embeddings, base.encode(texts), atol=1e-4)
    encoder = AutoModel.from_pretrained(output / "embeddings_merged_hf")
    tokenizer = AutoTokenizer.from_pretrained(output / "embeddings_merged_hf")
    states = encoder(**tokenizer(texts, padding=True, return_tensors="pt")).last_hidden_state[:, 0].detach().float()
    plain = (states / states.norm(dim=1, keepdim=True)).numpy()
    np.testing.assert_allclose(plain, embeddings.astype(np.float32), atol=2e-3)


def test_folders_of_the_other_kind_are_refused(output: Path, minilm_dir: Path, tmp_path: Path) -> None:
    backbone, tokenizer = FastModel.from_pretrained(minilm_dir, device="cpu", dtype="float32")
    model = FastModel.get_peft_model(backbone, r=2)
    wrapped = FastModel.as_sentence_transformer(model, tokenizer, minilm_dir)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ArgumentError, match=r"adapter_(config|model)"):
        wrapped.save_pretrained_merged(tmp_path / "adapter")
    merged = wrapped.save_pretrained_merged(tmp_path / "merged")
    with pytest.raises(ArgumentError, match=r"model\.safetensors"):
        wrapped.save_pretrained(str(merged))
    with pytest.raises(ArgumentError, match=r"model\.safetensors"):
        model.save_pretrained(merged)
    model.merge_and_unload()
    with pytest.raises(ArgumentError, match="sentence-transformers model"):
        model.save_pretrained(merged)
    with pytest.raises(ArgumentError, match="adapter_config"):
        model.save_pretrained(tmp_path / "adapter")
    # The merged encoder still works, and saving the wrapper again over its own folder is fine.
    wrapped.save_pretrained(str(merged))
    again = SentenceTransformer(str(merged), device="cpu")
    np.testing.assert_allclose(again.encode("text"), wrapped.encode("text"), atol=1e-5)
