"""The Hugging Face Hub's client: repositories and their revisions as users name them, and what is fetched of them."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, constants, get_token, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from ..base.errors import NatsError
from ..base.files import write_text
from ..base.names import CONFIG_NAME, HUB_PREFIX, MODEL_FILES, WEIGHTS_NAME
from .download import check_files, fetch_file
from .errors import CLIENT_ERRORS, LIBRARY, LOGIN, explain, hub_errors, retried


def resolve_folder(
    source: str | os.PathLike,
    revision: str | None = None,
    files: Sequence[str] = MODEL_FILES,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Find the local folder of a model: `source` itself if it is one, else a download from the Hub.

    What is in the cache is not downloaded again, and is used as it is when the Hub can not be reached. A file whose
    download was stopped is downloaded again from its beginning.

    Args:
        source: a folder, or the id of a Hub repository: `org/name`, `org/name@revision`, either after `hf-hub:`.
        revision: branch, tag or commit of the repository.
        files: names and patterns of what is downloaded.
        cache_dir: where downloads are kept; default: the Hub client's cache.

    Raises:
        NatsError: neither a folder nor a repository, no such revision, no access, no network and not in the cache, or
            another content than the Hub states.

    Example:
        >>> sorted(path.name for path in resolve_folder("org/name@v1").iterdir())
        ['README.md', 'config.json', 'genotype.png', 'model.safetensors']
    """
    is_hub = str(source).startswith(HUB_PREFIX)
    if Path(source).is_dir() and not is_hub:
        if revision is not None:
            raise NatsError(f"{source}: is a folder, revision {revision!r} is for repositories on the Hub")
        return Path(source)
    if Path(source).exists() and not is_hub:
        raise NatsError(f"{source}: is no folder, expected a model folder or the id of a Hub repository (org/name)")
    repo, revision = split_revision(str(source), revision)
    what = f"{source}: from the Hub" if is_hub else f"{source}: no such folder, and from the Hub"
    with hub_errors(what, revision):
        return _download(repo, revision, files, cache_dir)


def split_revision(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """Split `org/name`, `org/name@revision`, or either after `hf-hub:`, into repository and revision.

    Raises:
        NatsError: no id of a repository, or two revisions.

    Example:
        >>> split_revision("hf-hub:org/name@v1")
        ('org/name', 'v1')
    """
    repo, at, named = source.removeprefix(HUB_PREFIX).partition("@")
    check_repo_id(repo, source)
    if at and not named:
        raise NatsError(f"{source}: expected a branch, a tag or a commit after the @")
    if named and revision is not None and revision != named:
        raise NatsError(f"{source}: names the revision {named!r}, and {revision!r} was asked for too")
    return repo, named or revision


def with_revision(model: str, revision: str | None) -> str:
    """`org/name@revision`, from a model and the option `revision`; NatsError for one of a file or folder.

    Example:
        >>> with_revision("org/name", "v1")
        'org/name@v1'
    """
    if revision is None:
        return model
    if Path(model).exists():
        raise NatsError(f"revision: is for repositories on the Hub, {model} is a file or a folder")
    return "@".join(map(str, split_revision(model, revision)))


def check_repo_id(repo_id: str, source: str | None = None) -> None:
    """Raise NatsError, about `source` if that is given, unless it is the id of a Hub repository.

    Example:
        >>> check_repo_id("name")
        Traceback (most recent call last):
        NatsError: name: neither a folder nor the id of a Hub repository (org/name)
    """
    try:
        validate_repo_id(repo_id)
        valid = "/" in repo_id
    except HFValidationError:
        valid = False
    if not valid:
        raise NatsError(f"{source or repo_id}: neither a folder nor the id of a Hub repository (org/name)")


def usable_token(token: str | None) -> str | None:
    """Choose the given token, else the one of the user's login, if any; NatsError for what can be none.

    Example:
        >>> api = HfApi(token=usable_token(None))
    """
    token = token or get_token()
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        # The HTTP library would refuse the header too, but quote it, token and all.
        raise NatsError(f"the Hugging Face token has characters that no token has: {LOGIN}")
    return token


def _download(repo: str, revision: str | None, files: Sequence[str], cache_dir: str | os.PathLike | None) -> Path:
    token = usable_token(None)
    small = [name for name in files if name != WEIGHTS_NAME] or [CONFIG_NAME]
    options = {"allow_patterns": small, "cache_dir": cache_dir, "token": token, **LIBRARY}
    try:
        info = _describe(repo, revision, token)
    except CLIENT_ERRORS as error:
        snapshot = _cached(repo, revision, files, options)
        if snapshot is None:
            raise LocalEntryNotFoundError(f"{repo}: not in the cache") from error
        if not isinstance(error, OfflineModeIsEnabled):
            print(f"{repo}: {explain(error, revision)}; used as it is in the cache", file=sys.stderr)
        return snapshot
    snapshot = Path(retried(repo, partial(snapshot_download, repo, revision=info.sha, **options)))
    _note_commit(snapshot.parent.parent, revision or constants.DEFAULT_REVISION, snapshot.name)
    stated = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None}
    check_files(repo, snapshot, {name: sha256 for name, sha256 in stated.items() if name != WEIGHTS_NAME})
    if WEIGHTS_NAME in files:
        if CONFIG_NAME in files and not (snapshot / CONFIG_NAME).is_file():
            raise NatsError(f"{repo}: the repository has no {CONFIG_NAME}, expected a model's")
        fetch_file(repo, WEIGHTS_NAME, snapshot, token=token, stated=stated)
        if not (snapshot / WEIGHTS_NAME).is_file():
            raise NatsError(f"{repo}: the repository has no {WEIGHTS_NAME}; other weights are not read")
    return snapshot


def _describe(repo: str, revision: str | None, token: str | None) -> ModelInfo:
    """The commit that a revision stands for at the moment, and its files; asked here, as the client waits for ever."""
    ask = partial(HfApi(token=token, **LIBRARY).model_info, repo, revision=revision, files_metadata=True)
    info = retried(repo, partial(ask, timeout=constants.HF_HUB_ETAG_TIMEOUT))
    if info.sha is None:
        raise NatsError(f"{repo}: the Hub does not say which commit its revision is")
    return info


def _cached(repo: str, revision: str | None, files: Sequence[str], options: dict[str, Any]) -> Path | None:
    """Find what earlier downloads have left of a repository; None: not all of these files."""
    try:
        snapshot = Path(snapshot_download(repo, revision=revision, local_files_only=True, **options))
    except LocalEntryNotFoundError:
        return None
    return snapshot if WEIGHTS_NAME not in files or (snapshot / WEIGHTS_NAME).is_file() else None


def _note_commit(storage: Path, revision: str, commit: str) -> None:
    """Let the client find the snapshot by its branch or tag when it is offline, as if it had asked for it."""
    path = storage / "refs" / revision
    if revision == commit or ".." in path.parts or (path.is_file() and path.read_text() == commit):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, commit)
