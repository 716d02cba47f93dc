"""A program of its own: embed texts with a saved folder in plain sentence-transformers.

`python -P plain_reload.py FOLDER TEXTS.json OUT.npy` writes the float32 embeddings (texts, dimensions) and fails if
anything in the folder made Python import embtune.
"""

import json
import sys
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer


def main(folder: str, texts: str, out: str) -> None:
    model = SentenceTransformer(folder, local_files_only=True)
    embeddings = model.encode(json.loads(Path(texts).read_text(encoding="utf-8")), show_progress_bar=False)
    if "embtune" in sys.modules:
        raise SystemExit(f"{folder} needs embtune to load")
    np.save(out, np.asarray(embeddings, dtype=np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
