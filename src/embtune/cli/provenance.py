"""Where a run comes from: the state of the project's git, and fingerprints of its data."""

import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

from datasets import Dataset


def git_state() -> Mapping[str, Any] | None:
    """Commit, branch and whether files were changed since, of the working directory; None outside of git."""
    if shutil.which("git") is None or (commit := _git("rev-parse", "HEAD")) is None:
        return None
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "branch": _git("rev-parse", "--abbrev-ref", "HEAD"), "changed": bool(changed)}


def fingerprint(rows: Dataset) -> str:
    """A digest of column names and cells, the same wherever and however the rows are kept."""
    digest = hashlib.blake2b(repr(rows.column_names).encode(), digest_size=16)
    for batch in rows.with_format(None).iter(batch_size=1_000):
        digest.update(repr(list(batch.values())).encode())
    return digest.hexdigest()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, timeout=10)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
