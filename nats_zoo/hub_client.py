"""The Hugging Face Hub's client: what it fetches, and its errors as one line for people."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # base of what the HTTP library below raises, whichever that is in the installed version
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .errors import NatsError, one_line
from .model_folder import MODEL_FILES
from .version import __version__

LOGIN = "run `hf auth login` or set HF_TOKEN"
# What the Hub client's errors (classes, or the status of an answer) mean to a user; the first that applies.
_REASONS: dict[type | int, str] = {
    GatedRepoError: f"the repository is gated: ask for access on its page, then {LOGIN}",
    RepositoryNotFoundError: f"no such repository, or it is private: then {LOGIN}",
    RevisionNotFoundError: "the repository has no revision {revision!r}, expected a branch, a tag or a commit",
    401: f"the token is not valid: {LOGIN}",
    403: "the token has no right to do this: use one with write access to the repository",
}


def resolve_folder(
    source: str | os.PathLike,
    revision: str | None = None,
    files: Sequence[str] = MODEL_FILES,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """The local folder of a model: `source` itself if it is one, else a download from the Hub.

    Args:
        source: a folder, or the id of a Hub repository (`org/name`).
        revision: branch, tag or commit of the repository.
        files: names and patterns of what is downloaded.
        cache_dir: where downloads are kept; default: the Hub client's cache.

    Raises:
        NatsError: neither a folder nor a repository, no such revision, or no network and not in the cache.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise NatsError(f"{source}: is a folder, revision {revision!r} is for repositories on the Hub")
        return Path(source)
    if Path(source).exists():
        raise NatsError(f"{source}: is no folder, expected a model folder or the id of a Hub repository (org/name)")
    check_repo_id(str(source))
    token = usable_token(None)
    with hub_errors(f"{source}: no such folder, and from the Hub", revision):
        folder = snapshot_download(
            str(source),
            revision=revision,
            cache_dir=cache_dir,
            allow_patterns=list(files),
            token=token,
            library_name="nats-zoo",
            library_version=__version__,
        )
    return Path(folder)


def check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        valid = "/" in repo_id
    except HFValidationError:
        valid = False
    if not valid:
        raise NatsError(f"{repo_id}: neither a folder nor the id of a Hub repository (org/name)")


def usable_token(token: str | None) -> str | None:
    """The given token, else the one of the user's login, if any."""
    token = token or get_token()
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        # The HTTP library would refuse the header too, but quote it, token and all.
        raise NatsError(f"the Hugging Face token has characters that no token has: {LOGIN}")
    return token


@contextmanager
def hub_errors(what: str, revision: str | None) -> Iterator[None]:
    """Turn what the Hub's client raises into one line that begins with `what`."""
    try:
        yield
    except NatsError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise NatsError(f"{what}: {_explain(error, revision)}") from error


def _explain(error: Exception, revision: str | None) -> str:
    cause = error.__cause__
    if isinstance(error, LocalEntryNotFoundError) and isinstance(cause, Exception):
        return f"{_explain(cause, revision)}, and it is not in the cache"
    if isinstance(error, RuntimeError) and isinstance(cause, Exception):
        return _explain(cause, revision)
    status = getattr(getattr(error, "response", None), "status_code", None)
    for kind, reason in _REASONS.items():
        if status == kind if isinstance(kind, int) else isinstance(error, kind):
            return reason.format(revision=revision)
    if status is None and isinstance(error, HTTPError | OfflineModeIsEnabled):
        return f"the Hub can not be reached ({one_line(error)})"
    return one_line(error)
