"""Downloads of large files from the Hub into its client's cache: resumed after any end, and checked.

The client verifies a file's size only, and throws away what a stopped process has got. So large files are fetched
here, to where the client would put them: `blobs/SHA256.incomplete`, which a later process goes on with, and when it is
whole and has that sha256, `blobs/SHA256`. Nothing else enters the cache, and each download is hashed once.
"""

import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers

from ..base.errors import NatsError
from ..base.files import file_digest
from .errors import LIBRARY, explain, hub_errors, is_network_error, is_unreachable, retried

SHA256 = re.compile("[0-9a-f]{64}")
SMALL_BYTES = 1 << 20


def fetch_large_file(repo: str, name: str, snapshot: Path, token: str | None) -> None:
    """Put a repository's file into a snapshot of the client's cache, unless it is there or the repository lacks it.

    Args:
        repo: id of the repository.
        name: of the file.
        snapshot: folder of the commit in the cache, `CACHE/models--ORG--NAME/snapshots/COMMIT`.
        token: of the user.

    Raises:
        NatsError: it can not be had, or what came is not what the Hub says that it is.
    """
    if (snapshot / name).exists():
        return
    what, url = f"{repo}: {name}", hf_hub_url(repo, name, revision=snapshot.name)
    storage = snapshot.parent.parent
    with hub_errors(what, snapshot.name):
        metadata = _find(what, url, token)
        if metadata is None:
            return
        is_checkable = SHA256.fullmatch(metadata.etag or "") is not None
        blob = storage / "blobs" / metadata.etag if is_checkable else None
        if blob is not None and not _is_xet(metadata):
            _fetch_blob(what, url, blob, metadata.size, token)
        retried(what, partial(hf_hub_download, repo, name, revision=snapshot.name, cache_dir=storage.parent,
                              token=token, **LIBRARY))  # fmt: skip
    if blob is not None and _is_xet(metadata):
        check_blob(what, blob)


def check_small_files(repo: str, snapshot: Path) -> None:
    """Check those files of a snapshot that the Hub keeps in LFS, all but the largest.

    Raises:
        NatsError: one has another content than the Hub says; it is deleted.
    """
    for path in snapshot.iterdir() if snapshot.is_dir() else ():
        blob = path.resolve()
        if path.is_symlink() and SHA256.fullmatch(blob.name) and blob.stat().st_size <= SMALL_BYTES:
            check_blob(f"{repo}: {path.name}", blob)


def check_blob(what: str, blob: Path) -> None:
    """Delete a file of the cache and raise NatsError unless its name is the sha256 of its content."""
    found = file_digest(blob, "sha256")
    if found != blob.name:
        blob.unlink()
        raise NatsError(_mismatch(what, found, blob.name))


def _mismatch(what: str, found: str, expected: str) -> str:
    return f"{what}: checksum mismatch: the download's sha256 is {found}, the Hub's {expected}; deleted, try again"


def _find(what: str, url: str, token: str | None) -> Any:
    """The client's metadata of a file, or None: the repository does not have it."""
    try:
        return retried(what, partial(get_hf_file_metadata, url, token=token, **LIBRARY))
    except EntryNotFoundError:
        return None
    except Exception as error:
        if getattr(getattr(error, "response", None), "status_code", None) == 404:  # of a Hub that does not say what of
            return None
        if is_unreachable(error):
            raise NatsError(f"{what}: {explain(error, None)}, and it is not in the cache") from error
        raise


def _is_xet(metadata: Any) -> bool:
    """Whether the client will fetch the file by the protocol xet, which has hashes of its own."""
    return getattr(metadata, "xet_file_data", None) is not None and not constants.HF_HUB_DISABLE_XET


def _fetch_blob(what: str, url: str, blob: Path, size: int | None, token: str | None) -> None:
    lock = blob.parent.parent.parent / ".locks" / blob.parent.parent.name / f"{blob.name}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():
            _download(what, url, blob, size, token)


def _download(what: str, url: str, blob: Path, size: int | None, token: str | None) -> None:
    part = blob.with_name(f"{blob.name}.incomplete")
    begun = part.stat().st_size if part.exists() else 0
    if begun:
        print(f"{what}: continuing the download at {begun:,} bytes", file=sys.stderr)
    _complete(what, url, part, size, token)
    found = file_digest(part, "sha256")
    if found == blob.name:
        os.replace(part, blob)
        return
    part.unlink()
    if not begun:
        raise NatsError(_mismatch(what, found, blob.name))
    print(f"{what}: what an earlier download left was damaged; downloading again", file=sys.stderr)
    _download(what, url, blob, size, token)


def _complete(what: str, url: str, part: Path, size: int | None, token: str | None) -> None:
    """Append to a file what is missing of it; what has come stays, whatever happens."""
    headers = {**build_hf_headers(token=token, **LIBRARY), "Accept-Encoding": "identity"}

    def append() -> None:
        with part.open("ab") as file:
            if size is not None and file.tell() > size:
                file.truncate(0)
            http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=size)

    try:
        retried(what, append)
    except Exception as error:
        raise _stopped(what, error, part, size) from error


def _stopped(what: str, error: Exception, part: Path, size: int | None) -> Exception:
    """What to raise when a download has ended too early: the error itself, if it says enough."""
    done, total = part.stat().st_size, "?" if size is None else f"{size:,}"
    if is_unreachable(error):
        return NatsError(
            f"{what}: the download stopped at {done:,} of {total} bytes: {explain(error, None)}; run again to continue"
        )
    if isinstance(error, OSError) and error.errno is None and not is_network_error(error):  # ended well, and too early
        part.unlink()
        return NatsError(f"{what}: {done:,} bytes came instead of {total}, a proxy's error page?; deleted, try again")
    return error
