"""The folder around a graph: tokenizer, configs and card as in a merged model, with a graph instead of the weights."""

import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from embtune.adapt.folders import earlier_model, earlier_weights, refuse_contradictions
from embtune.errors import ExportError
from embtune.export.card import add_section
from embtune.export.graph import check_graph, write_graph
from embtune.export.merged import required_cosine, save_merged
from embtune.export.parity import Parity, compare_embeddings, load_saved
from embtune.files import atomic_folder

Run = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Inputs by name, int64 [texts, tokens] -> sentence embeddings [texts, dimensions]."""


@dataclass(frozen=True)
class GraphFolder:
    """A folder in the making."""

    staging: Path
    """The folder: all that belongs into it but the graph."""
    name: str
    """What the folder will be called."""
    exported: Path
    """The graph in float32, an ONNX file in a folder of its own that vanishes with the block."""
    model: SentenceTransformer
    """The live model."""

    def measure(self, run: Run, minimum: float, saved: str) -> Parity:
        """Compare what `run` computes from the folder's tokenizer with the live model's embeddings.

        Raises:
            ExportError: a text's cosine is below `minimum`, or below what rounding of the live model leaves.
        """
        minimum = min(minimum, required_cosine(self.model, self.staging))
        return compare_embeddings(self.model, self._embedder(run), saved, minimum=minimum)

    def _embedder(self, run: Run) -> Callable[[Sequence[str]], Tensor]:
        """What somebody does who has the folder, but not sentence-transformers."""
        tokenizer = AutoTokenizer.from_pretrained(
            self.staging, local_files_only=True, trust_remote_code=self.model.trust_remote_code
        )
        default = self.model.default_prompt_name
        prompt = self.model.prompts[default] if default else ""

        def embed(texts: Sequence[str]) -> Tensor:
            order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
            rows: dict[int, np.ndarray] = {}
            while order:
                # Much padding: a short text beside a long one. In the end the middle one is a batch by itself.
                batch = [order.pop(0), *order[-1:]]
                del order[-1:]
                tokens = tokenizer(
                    [prompt + texts[index] for index in batch],
                    padding=True,
                    truncation=self.model.max_seq_length is not None,
                    max_length=self.model.max_seq_length,
                    return_tensors="np",
                )
                rows |= zip(batch, run({name: ids.astype(np.int64) for name, ids in tokens.items()}), strict=True)
            embeddings = torch.from_numpy(np.stack([rows[index] for index in range(len(texts))]))
            return embeddings[:, : self.model.truncate_dim]

        return embed

    def describe(self, backend: str, text: str, parity: Parity | None, code: str) -> None:
        """Tell on the model card, if there is one, how the graph is used and what it loses."""
        path = self.staging / "README.md"
        if not path.exists():
            return
        card = path.read_text(encoding="utf-8")
        card = re.sub(r'SentenceTransformer\("([^"\n]+)"\)', rf'SentenceTransformer("\1", backend="{backend}")', card)
        card = card.replace("install -U sentence-transformers\n", f'install -U "sentence-transformers[{backend}]"\n')
        path.write_text(card, encoding="utf-8")
        section = f"{text}\n\n```python\n{code.strip()}\n```"
        if parity is not None:
            section += (
                f"\n\nCosine to the embeddings of the trained model, over {parity.texts} texts in several languages: "
                f"{parity.mean:.5f} on average, {parity.minimum:.5f} at worst."
            )
        add_section(self.staging, "Graph", section)


@contextmanager
def graph_folder(model: SentenceTransformer, target: Path, kind: str, purpose: str) -> Iterator[GraphFolder]:
    """Yield a folder with everything but the graph, and a graph to make it from; it becomes `target` if all goes well.

    The export runs on the CPU, where it holds the merged model in float32 beside `model`; the latter is not changed.

    Args:
        model: with or without adapters, quantised or not.
        target: an earlier export of the same kind in it is replaced.
        kind: name of the folder within `target` that holds the graph.
        purpose: what is being done, for messages.

    Raises:
        ArgumentError: `target` holds other weights.
        ModelError, ExportError: the model cannot be such a graph; nothing is left behind.
    """
    check_graph(model, purpose)
    refuse_contradictions(target, adapter=False, whole=False, graph=kind)
    name = target.resolve().name
    with (
        atomic_folder(target, earlier_model) as staging,
        tempfile.TemporaryDirectory(dir=staging.parent, prefix=f".{name}.") as scratch,
    ):
        # The card tells the name that the folder has while it is written.
        merged = save_merged(model, Path(scratch) / "merged" / name, dtype=torch.float32, verify=False)
        exported = Path(scratch) / "graph" / "model.onnx"
        exported.parent.mkdir()
        write_graph(_load_plain(merged, model), exported)
        weights = earlier_weights(merged)
        for path in [path for path in merged.iterdir() if path.name not in weights]:
            shutil.move(path, staging)
        (staging / kind).mkdir()
        _settle_tokenizer(staging, model)
        yield GraphFolder(staging, name, exported, model)


def _load_plain(folder: Path, model: SentenceTransformer) -> SentenceTransformer:
    try:
        return load_saved(folder, model, dtype=torch.float32, attn_implementation="eager")
    except (OSError, ValueError, RuntimeError) as error:
        raise ExportError(f"The merged model that the graph is made from cannot be loaded: {error}") from error


def _settle_tokenizer(folder: Path, model: SentenceTransformer) -> None:
    """Let tokenizer.json alone, as the `tokenizers` library and its bindings read it, cut and pad as the model does.

    Checkpoints often bring a padding to a fixed length along, or another longest length.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    ours, stored = model.tokenizer, Tokenizer.from_file(str(path))
    stored.no_truncation()
    if model.max_seq_length is not None:
        stored.enable_truncation(model.max_seq_length, direction=ours.truncation_side)
    if ours.pad_token_id is not None:
        stored.enable_padding(direction=ours.padding_side, pad_id=ours.pad_token_id, pad_token=ours.pad_token)
    stored.save(str(path))
