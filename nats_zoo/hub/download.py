"""Files of a snapshot in the client's cache, compared with the sha256 that the Hub states of them.

The client downloads, by Xet or plain HTTP, and verifies a file's size only.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..base.errors import NatsError
from ..base.files import file_digest
from .errors import LIBRARY, hub_errors, retried, status


def fetch_file(repo: str, name: str, snapshot: Path, *, token: str | None, stated: Mapping[str, str]) -> None:
    """Download a repository's file into a snapshot and check it, unless it is there or the repository lacks it.

    Args:
        repo: id of the repository.
        name: of the file.
        snapshot: folder of the commit in the cache, `CACHE/models--ORG--NAME/snapshots/COMMIT`.
        token: of the user.
        stated: see `check_files`.

    Raises:
        NatsError: it can not be had, or what came is not what the Hub states.

    Example:
        >>> snapshot = Path(snapshot_download("org/name", allow_patterns="config.json"))
        >>> fetch_file("org/name", "model.safetensors", snapshot, token=None, stated={"model.safetensors": sha256})
    """
    if (snapshot / name).exists():
        return
    what, options = f"{repo}: {name}", {"revision": snapshot.name, "cache_dir": snapshot.parents[2], **LIBRARY}
    with hub_errors(what, snapshot.name):
        try:
            retried(what, partial(hf_hub_download, repo, name, token=token, **options))
        except Exception as error:
            is_missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if is_missing or status(error) == 404:  # the latter of a Hub that does not say what of
                return
            raise
    check_files(repo, snapshot, {key: sha256 for key, sha256 in stated.items() if key == name})


def check_files(repo: str, snapshot: Path, stated: Mapping[str, str]) -> None:
    """Compare files of a snapshot with what the Hub states of them.

    Args:
        repo: id of the repository.
        snapshot: folder of the commit in the cache.
        stated: the sha256 of each file of which the Hub states one: those that it keeps in LFS.

    Raises:
        NatsError: one has another content; it is deleted, with all links to it that the client follows.

    Example:
        >>> check_files("org/name", snapshot, {"genotype.png": sha256})
    """
    for name, sha256 in stated.items():
        path = snapshot / name
        if path.is_file() and (found := file_digest(path, "sha256")) != sha256:
            while path.is_symlink():  # to the repository's blob, and that perhaps to a store that repositories share
                link, path = path, path.parent / path.readlink()
                link.unlink()
            path.unlink()
            raise NatsError(
                f"{repo}: {name}: checksum mismatch: the download's sha256 is {found}, the Hub's {sha256}; deleted,"
                " try again"
            )
