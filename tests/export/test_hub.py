"""Pushing a folder, against a local stand-in of the Hub (tests/hub_server.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from huggingface_hub import HfApi, constants, snapshot_download
from sentence_transformers import SentenceTransformer

from embtune.errors import ArgumentError, ExportError
from embtune.export.hub import push_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from hub_server import HubServer

# huggingface_hub hands its LFS uploads to httpx2 in a way that httpx2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

WRITE = "hf_write"
READ = "hf_read"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "README.md").write_text("---\ntags: [a]\n---\n\n# A model\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "1_Pooling" / "config.json").write_text("{}\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_file_arrives_and_downloads_again(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "left-over").write_text("of an earlier download")
    address = push_folder(folder, "ada/model", token=WRITE, commit_message="First")
    assert address == f"{hub.url}/ada/model"
    sent = {path: content for path, content in contents(folder).items() if not path.startswith(".cache")}
    held = hub.files("ada/model")
    held.pop(".gitattributes")
    assert held == sent
    assert hub.repositories["model", "ada/model"].messages[-1] == "First"
    assert ("PUT", True) in {(method, path.startswith("/storage/")) for method, path, _ in hub.requests}
    downloaded = snapshot_download("ada/model", local_dir=tmp_path / "download", token=READ)
    assert sent.items() <= contents(Path(downloaded)).items()


def test_second_push_changes_what_changed_and_keeps_the_rest(hub: HubServer, folder: Path) -> None:
    push_folder(folder, "ada/model", token=WRITE)
    (folder / "model.safetensors").write_bytes(b"new")
    (folder / "README.md").unlink()
    push_folder(folder, "ada/model", token=WRITE)
    assert hub.files("ada/model")["model.safetensors"] == b"new"
    assert "README.md" in hub.files("ada/model")


def test_bare_name_goes_to_the_user_of_the_token(hub: HubServer, folder: Path) -> None:
    assert push_folder(folder, "model", token=WRITE).endswith("/ada/model")
    assert "model.safetensors" in hub.files("ada/model")


def test_revision_is_a_branch_and_leaves_main_alone(hub: HubServer, folder: Path) -> None:
    address = push_folder(folder, "ada/model", token=WRITE, revision="v2")
    assert address.endswith("/ada/model/tree/v2")
    assert "model.safetensors" in hub.files("ada/model", revision="v2")
    assert "model.safetensors" not in hub.files("ada/model")
    push_folder(folder, "ada/model", token=WRITE, revision="v2")


def test_token_comes_from_the_environment(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE)
    push_folder(folder, "ada/model")
    assert "model.safetensors" in hub.files("ada/model")


def test_private_is_honoured_or_refused(hub: HubServer, folder: Path) -> None:
    push_folder(folder, "ada/secret", token=WRITE, private=True)
    assert hub.repositories["model", "ada/secret"].private
    push_folder(folder, "ada/secret", token=WRITE)
    assert hub.repositories["model", "ada/secret"].private

    push_folder(folder, "ada/open", token=WRITE, private=False)
    (folder / "model.safetensors").write_bytes(b"not for everybody")
    with pytest.raises(ArgumentError, match=r"ada/open exists already and is public, but private=True"):
        push_folder(folder, "ada/open", token=WRITE, private=True)
    assert hub.files("ada/open")["model.safetensors"] != b"not for everybody"


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_wrong", "ada/model", r"HTTP 401: the Hub did not accept the token.*Invalid credentials"),
        (READ, "ada/model", r"HTTP 403: the token may not write to ada\..*read access only"),
        (WRITE, "grace/model", r"HTTP 403: the token may not write to grace\..*under the namespace grace"),
    ],
)
def test_refusals_name_the_cause(hub: HubServer, folder: Path, token: str, repo_id: str, message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        push_folder(folder, repo_id, token=token)
    assert str(folder) in str(caught.value)
    assert caught.value.__cause__ is not None
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("status", "path", "message"),
    [
        (401, "/preupload/", r"HTTP 401.*told to fail"),
        (403, "/storage/", r"HTTP 403: the token may not write to ada.*while uploading 'model.safetensors'"),
        (404, "/commit/", r"HTTP 404: the repository, its owner or the revision does not exist"),
        (409, "/commit/", r"HTTP 409: it conflicts"),
        (413, "/commit/", r"HTTP 413: the Hub refused the upload\. The Hub said: told to fail"),
        (500, "/commit/", r"HTTP 500: the Hub itself failed"),
        (503, "/api/repos/create", r"HTTP 503: the Hub itself failed"),
        (500, "/tree/", r"HTTP 500: the Hub itself failed"),
    ],
)
def test_failures_at_every_stage_are_raised(
    hub: HubServer, folder: Path, status: int, path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # huggingface_hub retries some requests five times with growing pauses.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.fail(status, path)
    with pytest.raises(ExportError, match=message):
        push_folder(folder, "ada/model", token=WRITE)


def test_file_that_does_not_arrive_is_an_error(hub: HubServer, folder: Path) -> None:
    hub.lose = "config.json"
    with pytest.raises(ExportError, match=r"does not hold what was sent: 1_Pooling/config\.json missing"):
        push_folder(folder, "ada/model", token=WRITE)


def test_network_down(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.drop("/api/repos/create")
    with pytest.raises(ExportError, match=r"http://127.* could not be reached: .*Check the network"):
        push_folder(folder, "ada/model", token=WRITE)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ExportError, match=r"http://127.0.0.1:9 could not be reached: ConnectError"):
        push_folder(folder, "ada/model", token=WRITE)


def test_offline_mode_is_named(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match=r"offline mode is on\. Unset HF_HUB_OFFLINE"):
        push_folder(folder, "ada/model", token=WRITE)
    assert hub.requests == []


def test_broken_model_card_is_an_error(hub: HubServer, folder: Path) -> None:
    (folder / "README.md").write_text("---\ntags: [a\n---\n\n# A model\n")
    with pytest.raises(ExportError, match=r"Invalid metadata in README\.md"):
        push_folder(folder, "ada/model", token=WRITE)
    assert "model.safetensors" not in hub.files("ada/model")


def test_arguments_are_checked_before_any_request(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    for repo_id, message in [
        (str(folder), "is a path on this machine"),
        (folder, "is a path on this machine"),
        ("a/b/c", "is no name of a repository"),
        ("ada/mod el", "is no name of a repository"),
        ("", "is no name of a repository"),
        (None, "is no name of a repository"),
        (7, "is no name of a repository"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            push_folder(folder, repo_id, token=WRITE)
    for token in (None, "", "  "):
        with pytest.raises(ArgumentError, match="needs an access token"):
            push_folder(folder, "ada/model", token=token)
    for token in ("hf_é", "hf_a\nhf_b"):
        with pytest.raises(ArgumentError, match="token holds characters") as caught:
            push_folder(folder, "ada/model", token=token)
        assert token not in str(caught.value)
    with pytest.raises(ArgumentError, match="commit_message is empty"):
        push_folder(folder, "ada/model", token=WRITE, commit_message=" ")
    with pytest.raises(ArgumentError, match="There is no folder"):
        push_folder(tmp_path / "missing", "ada/model", token=WRITE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match="is empty"):
        push_folder(tmp_path / "empty", "ada/model", token=WRITE)
    assert hub.requests == []


def test_pushed_model_loads_by_its_id(
    hub: HubServer, tiny_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_dir("bert")
    push_folder(source, "ada/bert", token=WRITE, private=True, revision="v1")
    push_folder(tiny_dir("mpnet"), "ada/bert", token=WRITE)
    assert hub.files("ada/bert")["config.json"] != hub.files("ada/bert", revision="v1")["config.json"]
    expected = SentenceTransformer(str(source), device="cpu").encode(["a text"])
    loaded = SentenceTransformer("ada/bert", revision="v1", token=READ, device="cpu")
    np.testing.assert_array_equal(loaded.encode(["a text"]), expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = SentenceTransformer("ada/bert", revision="v1", local_files_only=True, device="cpu")
    np.testing.assert_array_equal(cached.encode(["a text"]), expected)


def test_subprocess_pushes_and_loads_a_data_set(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text(
        '{"anchor": "a", "positive": "b"}\n{"anchor": "c", "positive": "d"}\n'
    )
    hub.add("grace/rows", tmp_path / "rows", repo_type="dataset")
    program = (
        "import sys, datasets\n"
        "from embtune.export.hub import push_folder\n"
        "print(push_folder(sys.argv[1], 'ada/model', token='hf_write'))\n"
        "print(datasets.load_dataset('grace/rows', split='train')['positive'][:])\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, env=hub.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{hub.url}/ada/model", "['b', 'd']"]
    assert HfApi().file_exists("ada/model", "model.safetensors", token=READ)
