"""Uploading a saved folder to the Hugging Face Hub; whatever fails is raised, and what was uploaded is checked."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, validate_repo_id

from embtune.errors import ArgumentError, ExportError

# HTTP status -> what it means for a push and what to do; 500 stands for every failure of the Hub itself.
_ADVICE = {
    401: "the Hub did not accept the token. Make one that may write at {endpoint}/settings/tokens.",
    403: "the token may not write to {owner}. Use a token with write access, or a repo_id of your own.",
    404: "the repository, its owner or the revision does not exist, or the token may not see it.",
    409: "it conflicts with what the Hub holds: a name taken, or a commit made meanwhile. Look, and push again.",
    429: "the Hub's rate limit was reached. Wait a few minutes and push again.",
    500: "the Hub itself failed. Push again later; files that it holds already are not sent twice.",
}


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload model",
    revision: str | None = None,
) -> str:
    """Upload every file of `folder` to the model repository `repo_id`, made if it does not exist.

    The Hub is the one that huggingface_hub is set to (`HF_ENDPOINT`). Files that the repository holds already and
    `folder` lacks stay. After the upload the commit's list of files is read back and compared with the folder.

    Args:
        folder: the folder to upload.
        repo_id: `user/name` or `organisation/name`; a bare `name` goes to the token's user.
        token: an access token that may write; None takes the one of `HF_TOKEN` or `hf auth login`.
        private: visibility of the repository; None keeps it, and takes the account's default for a new one.
        commit_message: first line of the commit.
        revision: branch to upload to, made from the main branch if it does not exist; None means the main branch.

    Returns:
        The address of the repository (of the branch, where `revision` is given).

    Raises:
        ArgumentError: an argument cannot be honoured; nothing was uploaded.
        ExportError: the Hub refused, could not be reached, or holds other files than those sent.
    """
    folder = Path(folder)
    sizes = _file_sizes(folder)
    _check_repo_id(repo_id)
    if not commit_message.strip():
        raise ArgumentError("commit_message is empty; describe the upload in a few words.")
    api = HfApi(token=_usable_token(token), library_name="embtune")
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if private is not None and api.model_info(url.repo_id).private != private:
            now, wanted = ("public", "private") if private else ("private", "public")
            raise ArgumentError(
                f"{url.repo_id} exists already and is {now}, but private={private} asks for a {wanted} repository. "
                f"Change its visibility at {url}/settings, choose another repo_id, or leave private out."
            )
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message=commit_message, revision=revision
        )
        tree = api.list_repo_tree(url.repo_id, recursive=True, revision=commit.oid)
        arrived = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    except ArgumentError:
        raise
    # HTTPError: no connection. OSError: the Hub's refusals and Xet's. ValueError, RuntimeError: a model card or an
    # answer that huggingface_hub rejects, and failed LFS uploads, which it wraps.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise ExportError(f"Pushing {folder} to {repo_id} failed: {_reason(error, api.endpoint, repo_id)}") from error
    missing = sorted(path for path, size in sizes.items() if arrived.get(path) != size)
    if missing:
        raise ExportError(
            f"{url} does not hold what was sent: {', '.join(missing)} missing or of another size. "
            f"A .gitignore file in the folder or the repository may exclude them; otherwise push again."
        )
    return f"{url}/tree/{revision}" if revision else str(url)


def _file_sizes(folder: Path) -> dict[str, int]:
    """Path in the repository -> bytes, of every file that will be uploaded."""
    if not folder.is_dir():
        raise ArgumentError(f"There is no folder {folder} to push; save the model first and give that folder.")
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    sizes = {path: sizes[path] for path in filter_repo_objects(sizes, ignore_patterns=DEFAULT_IGNORE_PATTERNS)}
    if not sizes:
        raise ArgumentError(f"The folder {folder} is empty; there is nothing to push.")
    return sizes


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id("" if repo_id is None else repo_id)  # it lets None pass
    except HFValidationError as error:
        path = isinstance(repo_id, Path) or (isinstance(repo_id, str) and (Path(repo_id).exists() or "\\" in repo_id))
        hint = f"{repo_id} is a path on this machine. " if path else ""
        raise ArgumentError(
            f"repo_id={str(repo_id)!r} is no name of a repository. {hint}Give user/name or organisation/name, with "
            "letters, digits, '-', '_' and '.', at most 96 of them."
        ) from error


def _usable_token(token: str | None) -> str:
    found = token if token is not None else get_token()
    if not found or not found.strip():
        raise ArgumentError(
            "Pushing needs an access token that may write. Pass token=, set HF_TOKEN, or run `hf auth login`."
        )
    if not found.strip().isascii() or len(found.split()) > 1:
        raise ArgumentError("token holds characters that no access token has; copy it again.")
    return found.strip()


def _reason(error: Exception, endpoint: str, repo_id: str) -> str:
    """What went wrong and what to do, for an error of huggingface_hub or of the HTTP client below it."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    where = "" if isinstance(error, HTTPError) else f" ({_one_line(error)})"
    for cause in chain:
        if isinstance(cause, OfflineModeIsEnabled):
            return "offline mode is on. Unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE) to push."
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            owner = repo_id.split("/")[0] if "/" in repo_id else "your account"
            advice = _ADVICE.get(min(status, 500), "the Hub refused the upload.").format(endpoint=endpoint, owner=owner)
            said = " ".join((cause.server_message or str(cause)).split())
            return f"HTTP {status}: {advice} The Hub said: {said}{where}"
        if isinstance(cause, HTTPError | ConnectionError | TimeoutError):
            advice = "Check the network, a proxy, and HF_ENDPOINT, then push again."
            return f"{endpoint} could not be reached: {_one_line(cause)}.{where} {advice}"
    return "; caused by ".join(_one_line(cause) for cause in chain)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
