"""Folders appear whole or not at all; what a killed process leaves is put right by the next save."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from embtune.errors import ArgumentError
from embtune.files import atomic_files, atomic_folder, read_json, write_json, write_json_lines


def _shards(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("shard*")}


def _save(target: Path, **texts: str) -> None:
    with atomic_folder(target, _shards) as staging:
        for name, text in texts.items():
            (staging / name).write_text(text)


def _broken_off(writing: AbstractContextManager[Path], **texts: str) -> None:
    def write() -> None:
        with writing as staging:
            for name, text in texts.items():
                (staging / name).write_text(text)
            raise KeyError

    with pytest.raises(KeyError):
        write()


def _texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_appears_whole_and_with_the_usual_permissions(tmp_path: Path) -> None:
    _save(tmp_path / "deep" / "model", config="1")
    (tmp_path / "usual").mkdir()
    assert _texts(tmp_path) == {"config": "1"}
    assert (tmp_path / "deep" / "model").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_entries_are_replaced_dropped_or_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    _save(target, config="1", shard1="1", shard2="1")
    (target / "notes").mkdir(mode=0o700)
    (target / "notes" / "mine").write_text("kept")
    target.chmod(0o750)
    _save(target, config="2", shard1="2")
    assert _texts(target) == {"config": "2", "shard1": "2", "mine": "kept"}
    assert target.stat().st_mode & 0o777 == 0o750
    assert list(tmp_path.iterdir()) == [target]


def test_an_exception_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    _broken_off(atomic_folder(target), config="1")
    assert list(tmp_path.iterdir()) == []
    _save(target, config="1")
    _broken_off(atomic_folder(target), config="2")
    assert _texts(tmp_path) == {"config": "1"}
    assert list(tmp_path.iterdir()) == [target]
    for inside in ("config", "config/model", "config/deep/model"):
        with pytest.raises(ArgumentError, match="model/config is a file"), atomic_folder(target / inside):
            pass


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_killed_at_any_rename_old_and_new_never_mix(tmp_path: Path, renames: int) -> None:
    target = tmp_path / "model"
    _save(target, config="1", shard1="1", shard2="1", mine="kept")
    code = (
        "import os, pathlib\n"
        "from embtune.files import atomic_folder\n"
        f"left, rename = [{renames}], pathlib.Path.rename\n"
        "def killed(self, target):\n"
        "    left[0] -= 1\n"
        "    return rename(self, target) if left[0] >= 0 else os._exit(9)\n"
        "pathlib.Path.rename = killed\n"
        f"with atomic_folder({str(target)!r}, lambda _: ['shard1', 'shard2']) as staging:\n"
        "    for name in ('config', 'shard1'): (staging / name).write_text('2')\n"
    )
    returned = subprocess.run([sys.executable, "-c", code], check=False).returncode
    assert returned == (0 if renames == 3 else 9)
    previous = tmp_path / ".model.previous"
    whole = [_texts(folder) for folder in (target, previous) if folder.exists()]
    old, new = {"config": "1", "shard1": "1", "shard2": "1", "mine": "kept"}, {"config": "2", "shard1": "2"}
    expected = {0: [old], 1: [old], 2: [new, old], 3: [{**new, "mine": "kept"}]}
    assert whole == expected[renames]
    # The next save first puts right what was left, even one that fails itself.
    _broken_off(atomic_folder(target, _shards), config="3")
    assert _texts(target) == (old if renames < 2 else {**new, "mine": "kept"})
    assert not previous.exists()


def test_a_link_is_followed(tmp_path: Path) -> None:
    _save(tmp_path / "real", config="1")
    (tmp_path / "link").symlink_to("real")
    _save(tmp_path / "link", config="2")
    assert (tmp_path / "link").is_symlink()
    assert _texts(tmp_path / "real") == {"config": "2"}


def test_the_current_folder_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    _save(target, config="1", shard1="1", shard2="1", mine="kept")
    (target / "shard3").mkdir()
    (target / "sub").mkdir()
    inode = target.stat().st_ino
    monkeypatch.chdir(target / "sub")
    _save(target, config="2", shard1="2")
    assert _texts(target) == {"config": "2", "shard1": "2", "mine": "kept"}
    assert target.stat().st_ino == inode
    assert os.getcwd() == str(target / "sub")
    assert not (target / "shard3").exists()


def test_files_are_added_together_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "gguf"
    _broken_off(atomic_files(target), a="0")
    assert not target.exists()
    for text in "12":
        with atomic_files(target) as staging:
            (staging / text).write_text(text)
            (staging / "a").write_text(text)
    _broken_off(atomic_files(target), a="0")
    assert _texts(tmp_path) == {"a": "2", "1": "1", "2": "2"}


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"ß": [1, 2]})
    assert read_json(path) == {"ß": [1, 2]}
    with pytest.raises(TypeError):
        write_json(path, {"set": {1}})
    with pytest.raises(UnicodeEncodeError):
        write_json(path, "\ud800")
    assert read_json(path) == {"ß": [1, 2]}
    assert list(tmp_path.iterdir()) == [path]


def test_lines_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"anchor": "ü\u2028"}
        raise KeyError

    path = tmp_path / "rows.jsonl"
    write_json_lines(path, [{"anchor": "ü\u2028"}, {"anchor": "b"}])
    assert path.read_bytes() == '{"anchor": "ü\u2028"}\n{"anchor": "b"}\n'.encode()
    with pytest.raises(KeyError):
        write_json_lines(path, rows())
    assert path.read_bytes().count(b"\n") == 2
    assert list(tmp_path.iterdir()) == [path]
