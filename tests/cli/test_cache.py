"""`embtune cache`: shows what is kept, and removes what it is told to."""

import os
import time
from pathlib import Path

import pytest

from embtune.cli.main import main
from embtune.data.token_cache import TokenCache, record_batch


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenCache:
    """Two entries, one of them unused for three days, and one that is damaged."""
    monkeypatch.setenv("EMBTUNE_CACHE", str(tmp_path))
    cache = TokenCache.default()
    batch = record_batch([range(1_000)] * 1_000)
    for key, tokenizer in (("old", "a/tokenizer"), ("new", "b/tokenizer")):
        cache.write(key, [batch], {"texts": "1,000", "tokenizer": tokenizer, "max_length": "256", "prompt": "find: "})
    three_days_ago = time.time() - 3 * 24 * 3600
    os.utime(cache.folder / "old.arrow", (three_days_ago, three_days_ago))
    (cache.folder / "damaged.arrow").write_bytes(b"ARROW1")
    return cache


def test_show(cache: TokenCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    [old] = [line for line in lines if "a/tokenizer" in line]
    assert old.split() == ["1,000", "4.0", "MB", "3", "days", "ago", "a/tokenizer", "256", "tokens", "find:"]
    assert any("b/tokenizer" in line and "just now" in line for line in lines)
    assert any("damaged" in line for line in lines)
    assert lines[-1] == f"3 columns of texts, 8.0 MB in {cache.folder}"


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["--max-age", "2d"], ["damaged", "new"]),
        (["--max-age", "1w", "--max-size", "5MB"], ["damaged", "new"]),
        (["--max-size", "1 mb"], ["damaged"]),
        (["clear"], []),
    ],
)
def test_less(arguments: list[str], left: list[str], cache: TokenCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *arguments]) == 0
    assert sorted(entry.path.stem for entry in cache.entries()) == left
    out = capsys.readouterr().out
    assert out.startswith("Removed ")
    assert left or f"The token cache in {cache.folder} is empty." in out


def test_a_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("EMBTUNE_CACHE", str(tmp_path / "file"))
    assert main(["cache"]) == 0
    assert f"The token cache in {tmp_path / 'file' / 'tokens'} is empty." in capsys.readouterr().out
    (tmp_path / "file").touch()
    for action in ("show", "clear"):
        assert main(["cache", action]) == 1
        message = capsys.readouterr().err
        assert "cannot be read: Not a directory." in message and "EMBTUNE_CACHE" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-size", "lots"], "max_size='lots'"),
        (["--max-size", "5"], "max_size='5'"),
        (["--max-age", "3y"], "max_age='3y'"),
        (["clear", "--max-age", "3d"], "clear removes everything"),
        (["empty"], "'empty'"),
    ],
)
def test_mistakes(arguments: list[str], message: str, cache: TokenCache, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err
    assert len(cache.entries()) == 3
