"""A stand-in for the Hub: the HTTP endpoints that huggingface_hub calls, served from a folder on loopback.

Models and data sets can be created, pushed to (git blobs and LFS), listed and downloaded at any revision, with tokens,
private repositories and organisations. `hub.fail(...)` makes requests fail. Nothing outside this machine is contacted.

Use it through the fixture `hub`: in this process huggingface_hub, transformers and sentence-transformers then talk to
it; a subprocess does with `env=hub.environment` (which `datasets` needs: it reads its settings at import).
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import close_session, constants, hf_api

USER = "ada"
WRITE_TOKEN = "hf_write"
READ_TOKEN = "hf_read"
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".onnx", ".parquet", ".model")

Files = dict[str, str]  # path in the repository -> sha256 of its content


@dataclass
class Repository:
    """One repository: branches name commits, a commit is the whole set of files."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        payload = json.dumps([sorted(files.items()), message, len(self.commits)])
        oid = hashlib.sha1(payload.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


@dataclass
class Failure:
    status: int
    path: str
    left: float
    body: dict[str, Any]
    drop: bool


class Refusal(Exception):
    """An answer other than 200; `code` is the Hub's X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class HubServer:
    """The state of the stand-in. `requests` lists (method, path, status) in order of arrival."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.failures: list[Failure] = []
        self.lose = ""  # files whose path contains this are accepted and forgotten
        self.lock = threading.Lock()
        (folder / "blobs").mkdir(parents=True)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a subprocess that should see this Hub, without a token."""
        inherited = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_CACHE")}
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(self.folder / "home"), "HF_HUB_OFFLINE": "0"}
        return {**inherited, **settings, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, status: int, path: str = "", *, times: float = float("inf"), **body: Any) -> None:
        """Answer the next `times` requests whose path contains `path` with `status` and `body` as JSON."""
        self.failures.append(Failure(status, path, times, {"error": f"told to fail with {status}", **body}, False))

    def drop(self, path: str = "", *, times: float = float("inf")) -> None:
        """Close the connection of the next `times` requests whose path contains `path`, without an answer."""
        self.failures.append(Failure(0, path, times, {}, True))

    def add(self, repo_id: str, folder: Path, *, repo_type: str = "model", private: bool = False) -> str:
        """Put a folder into the Hub directly, as somebody else's upload; returns the commit."""
        repository = self.repositories.setdefault((repo_type, repo_id), Repository(private))
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): self.store(path.read_bytes()) for path in paths}
        return repository.commit("main", files, "added")

    def files(self, repo_id: str, revision: str = "main", repo_type: str = "model") -> dict[str, bytes]:
        """What a repository holds at a revision: path -> content."""
        repository = self.repositories[repo_type, repo_id]
        return {path: self.blob(sha) for path, sha in repository.commits[repository.branches[revision]].items()}

    def store(self, content: bytes) -> str:
        sha = hashlib.sha256(content).hexdigest()
        (self.folder / "blobs" / sha).write_bytes(content)
        return sha

    def has_blob(self, sha: str) -> bool:
        return (self.folder / "blobs" / sha).exists()

    def blob(self, sha: str) -> bytes:
        return (self.folder / "blobs" / sha).read_bytes()


class Handler(BaseHTTPRequestHandler):
    """Routes a request to a method; every method returns what to send as JSON."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass  # requests are recorded in `hub.requests`

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        body = self._read_body()
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        for failure in self.hub.failures:
            if failure.left > 0 and failure.path in parts.path:
                failure.left -= 1
                self.hub.requests.append((self.command, parts.path, failure.status))
                if failure.drop:
                    self.close_connection = True
                    return
                self._send(failure.status, json.dumps(failure.body).encode(), {"Content-Type": "application/json"})
                return
        try:
            with self.hub.lock:
                status, content, headers = self._route(parts.path, body)
        except Refusal as refusal:
            status, content = refusal.status, json.dumps({"error": refusal.message, **refusal.body}).encode()
            headers = {"Content-Type": "application/json", "X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
        self.hub.requests.append((self.command, parts.path, status))
        self._send(status, content, headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _route(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if self.command == "PUT" and path.startswith("/storage/"):
            if self.hub.store(body) != path.removeprefix("/storage/"):
                raise Refusal(400, "the content is not what its sha256 says")
            return 200, b"", {}
        if match := re.fullmatch(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)", path):
            return self._resolve("dataset" if match[1] else "model", match[2], unquote(match[3]), unquote(match[4]))
        return 200, json.dumps(self._api(path, body)).encode(), {"Content-Type": "application/json"}

    def _api(self, path: str, body: bytes) -> Any:
        if path == "/api/whoami-v2":
            return {"name": self._user(), "type": "user", "orgs": []}
        if path == "/api/validate-yaml":
            return self._validate_yaml(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/(datasets/)?(.+)\.git/info/lfs/objects/batch", path):
            return self._lfs_batch("dataset" if match[1] else "model", match[2], json.loads(body))
        verbs = "revision|tree|preupload|commit|branch|refs"
        if match := re.fullmatch(rf"/api/(model|dataset)s/([^/]+(?:/[^/]+)?)(?:/({verbs})(?:/([^/]+))?(/.+)?)?", path):
            kind, repo_id, verb, revision, inner = match.groups()
            return self._repository_call(
                kind, repo_id, verb or "revision", unquote(revision or "main"), (inner or "").strip("/"), body
            )
        raise Refusal(404, f"the stand-in does not know {self.command} {path}")

    def _repository_call(self, kind: str, repo_id: str, verb: str, revision: str, inner: str, body: bytes) -> Any:
        writes = verb in ("preupload", "commit", "branch")
        repository = self._repository(kind, repo_id, write=writes)
        if verb == "branch":
            if revision in repository.branches:
                raise Refusal(409, f"the branch {revision} exists")
            start = json.loads(body or b"{}").get("startingPoint", "main")
            repository.branches[revision] = self._commit_of(repository, start)
            return {}
        if verb == "refs":
            heads = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
                for name, oid in repository.branches.items()
            ]
            return {"branches": heads, "converts": [], "tags": []}
        oid = self._commit_of(repository, revision)
        files = repository.commits[oid]
        if verb == "preupload":
            entries = json.loads(body)["files"]
            modes = {entry["path"]: "lfs" if entry["path"].endswith(LFS_SUFFIXES) else "regular" for entry in entries}
            return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
        if verb == "commit":
            return self._commit(repository, repo_id, revision, body)
        if verb == "tree":
            return self._tree(files, inner)
        details = {"tags": [], "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z"}
        siblings = [{"rfilename": path} for path in files]
        return {"id": repo_id, "sha": oid, "private": repository.private, "siblings": siblings, **details}

    def _token(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if token not in (None, WRITE_TOKEN, READ_TOKEN):
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    def _user(self) -> str:
        if self._token() is None:
            raise Refusal(401, "Invalid username or password.")
        return USER

    def _may_write(self, repo_id: str) -> None:
        self._user()
        if self._token() == READ_TOKEN:
            raise Refusal(403, "this token has read access only")
        if repo_id.split("/")[0] != USER:
            raise Refusal(403, f"you don't have the rights to write under the namespace {repo_id.split('/')[0]}")

    def _repository(self, kind: str, repo_id: str, *, write: bool = False) -> Repository:
        repository = self.hub.repositories.get((kind, repo_id))
        visible = repository is not None and (not repository.private or self._token() is not None)
        if repository is None or not visible:
            # As on the Hub, a stranger cannot tell a missing repository from a private one.
            raise Refusal(404 if self._token() else 401, "Repository not found", "RepoNotFound")
        if write:
            self._may_write(repo_id)
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        oid = repository.resolve(revision)
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def _validate_yaml(self, card: str) -> dict[str, Any]:
        match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        try:
            if match:
                yaml.safe_load(match[1])
        except yaml.YAMLError as error:
            raise Refusal(400, "Invalid metadata", errors=[{"message": str(error)}], warnings=[]) from error
        return {"errors": [], "warnings": []}

    def _create(self, wanted: dict[str, Any]) -> dict[str, str]:
        kind = wanted.get("type", "model")
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        self._may_write(repo_id)
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        if (kind, repo_id) in self.hub.repositories:
            raise Refusal(409, f"You already created this {kind} repo", url=url)
        private = wanted.get("visibility") == "private" or wanted.get("private") is True
        repository = self.hub.repositories[kind, repo_id] = Repository(private)
        repository.commit("main", {".gitattributes": self.hub.store(b"*.safetensors filter=lfs\n")}, "initial commit")
        return {"url": url, "name": repo_id}

    def _lfs_batch(self, kind: str, repo_id: str, request: dict[str, Any]) -> dict[str, Any]:
        self._repository(kind, repo_id, write=True)
        answers = []
        for entry in request["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if not self.hub.has_blob(entry["oid"]):
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{entry['oid']}", "header": {}}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def _commit(self, repository: Repository, repo_id: str, branch: str, body: bytes) -> dict[str, Any]:
        if branch not in repository.branches:
            raise Refusal(400, f"{branch} is not a branch")
        files = dict(repository.commits[repository.branches[branch]])
        message = ""
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not self.hub.has_blob(value["oid"]):
                    raise Refusal(400, f"{value['path']} was never uploaded")
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"the stand-in does not know the operation {key}")
        if self.hub.lose:
            files = {path: sha for path, sha in files.items() if self.hub.lose not in path}
        oid = repository.commit(branch, files, message)
        return {"success": True, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid}

    def _entry(self, path: str, sha: str) -> dict[str, Any]:
        content = self.hub.blob(sha)
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
        return entry

    def _tree(self, files: Files, inner: str) -> list[dict[str, Any]]:
        prefix = f"{unquote(inner)}/" if inner else ""
        inside = {path: sha for path, sha in files.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise Refusal(404, f"{inner} does not exist", "EntryNotFound")
        if self.query.get("recursive") in (["True"], ["true"], ["1"]):
            return [self._entry(path, sha) for path, sha in inside.items()]
        direct = {path: sha for path, sha in inside.items() if "/" not in path[len(prefix) :]}
        folders = {prefix + path[len(prefix) :].split("/")[0] for path in inside if path not in direct}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
        return entries + [self._entry(path, sha) for path, sha in direct.items()]

    def _resolve(self, kind: str, repo_id: str, revision: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        repository = self._repository(kind, repo_id)
        oid = self._commit_of(repository, revision)
        if path not in repository.commits[oid]:
            raise Refusal(404, f"{path} does not exist at {revision}", "EntryNotFound")
        sha = repository.commits[oid][path]
        content = self.hub.blob(sha)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{sha}"', "X-Linked-Size": str(len(content))}
        return 200, content, headers


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A fresh stand-in of the Hub, with this process pointed at it; no token is set."""
    server = HubServer(tmp_path / "hub")
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(server.folder / "cache"),
        "HF_TOKEN_PATH": str(server.folder / "no-token"),
        "HF_STORED_TOKENS_PATH": str(server.folder / "no-tokens"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    # huggingface_hub's module-level functions share this client, made at import.
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # the shared connection pool reads the proxy settings when it is made
    yield server
    close_session()
    server.close()
