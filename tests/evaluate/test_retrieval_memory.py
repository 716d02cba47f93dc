"""Memory of a search grows with the block, not with the corpus: measured on a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENTS, DIMENSIONS = 100_000, 1024
SEARCH = f"""
import json
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tiny import wordpiece
from embtune.data.retrieval import RetrievalData
from embtune.evaluate import evaluate_retrieval

def peak():
    # Of this program alone: getrusage also counts what its parent held when it forked.
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024

torch.manual_seed(0)
encoder = StaticEmbedding(wordpiece().backend_tokenizer, embedding_dim={DIMENSIONS})
model = SentenceTransformer(modules=[encoder], device="cpu")
data = RetrievalData({{"q": "number 7"}}, {{str(i): f"number {{i}}" for i in range({DOCUMENTS})}}, {{"q": {{"7"}}}})
peaks = [peak()]
for chunk in (2048, {DOCUMENTS}):
    evaluate_retrieval(model, data, batch_size=256, chunk=chunk)
    peaks.append(peak())
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux' own account of memory")
def test_a_search_never_holds_the_embeddings_of_its_corpus() -> None:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", SEARCH], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    before, in_blocks, at_once = json.loads(done.stdout)
    all_embeddings = DOCUMENTS * DIMENSIONS * 4
    assert in_blocks - before < all_embeddings / 4
    # The same measurement does see them where one block is the whole corpus.
    assert at_once - before > all_embeddings
