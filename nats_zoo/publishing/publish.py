"""Publishing a backbone, a detector or a genotype on the Hugging Face Hub: one commit, or none if nothing changed."""

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile

from ..base.errors import NatsError
from ..base.files import file_digest
from ..base.names import CARD_NAME, CHART_NAME, CONFIG_NAME, GENOTYPE_NAME, WEIGHTS_NAME
from ..folders.find_genotype import is_genotype_folder
from ..folders.model_folder import BACKBONE, ModelFolder, model_files
from ..hub.client import check_repo_id, usable_token
from ..hub.errors import CLIENT_ERRORS, LIBRARY, LOGIN, NOT_CARRIED_OUT, explain, hub_errors, retried, status
from ..models.saved import check_backbone
from ..version import __version__
from .card import CARD_REPO
from .card_options import CardOptions
from .genotype import genotype_files

DEFAULT_BRANCH = "main"
# Of these, the ones that a publication does not have are removed from the repository: they belong to an earlier one.
# Everything else that is there stays, so that pictures or data which somebody added to it are not lost.
OWN_FILES = (CONFIG_NAME, WEIGHTS_NAME, GENOTYPE_NAME, CHART_NAME)
SHOWN_NAMES = 8  # of what stays behind, in a dry run
_PUSHED_MEANWHILE = (409, 412)  # what the Hub answers if the branch is no longer at the parent of the commit
_NO_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.|\.lock(/|$)|^[-./]|[./]$|^@?$")  # as git has it

Contents = Mapping[str, Path | bytes]  # of the files to be published, by name
Operation: TypeAlias = CommitOperationAdd | CommitOperationDelete


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    *,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    data_license: str | None = None,
    weights_license: str | None = None,
    dataset: str | None = None,
    base_model: str | None = None,
) -> str:
    """Push a backbone, a detector or a genotype to the Hub, as one commit. The repository is created if need be.

    Config, safetensors, genotype, card and charts are pushed, nothing else of the folder. What is already there is not
    uploaded again; if all of it is, there is no commit. A config, weights, genotype or chart of an earlier publication
    that this one does not have is removed in the same commit; other files of the repository stay.

    Args:
        folder: a backbone's or a detector's: what `nats train` wrote (model/ or best/), `save_backbone` or
            `save_detector`; or a genotype: the folder of `nats search`, of `save_genotype_folder`, or a genotype file.
        repo_id: `org/name`.
        private: only who has access to the repository can see it. An existing public one is then refused. An existing
            private one stays private in any case.
        revision: branch to push to, created from main if need be; default: main.
        tag: name that the commit gets. One that exists has to be of this very commit.
        commit_message: default: says the version of nats-zoo.
        token: default: the one of `hf auth login` or HF_TOKEN.
        dry_run: only say what would be pushed, without network.
        license: of the model, as the Hub names it (apache-2.0), for the card; default: what the card says, which is
            the base weights' licence as far as timm knows it. "other" needs the next two.
        license_name: of another licence.
        license_link: address of its text.
        data_license: of the training data.
        weights_license: of the base weights.
        dataset: the training data's id on the Hub.
        base_model: the base weights' id on the Hub.

    Returns:
        The address of the commit; "nothing changed, " and that of the last commit; or the listing, of a dry run.

    Raises:
        NatsError: nothing that can be published, or what the Hub refused and what to do about it. Unless it says that
            the commit is there, nothing was published.

    Example:
        >>> publish("runs/nats/best", "org/fasterrcnn-nats-resnet50", tag="v1", license="mit", dataset="org/pets")
        'https://huggingface.co/org/fasterrcnn-nats-resnet50/commit/...'
    """
    options = CardOptions(
        license=license,
        license_name=license_name,
        license_link=license_link,
        data_license=data_license,
        weights_license=weights_license,
        dataset=dataset,
        base_model=base_model,
    )
    check_repo_id(repo_id)
    for option, name in (("revision", revision), ("tag", tag)):
        if name is not None and _NO_REF.search(name):  # the Hub would refuse a tag's only when the commit is there
            raise NatsError(f"{option}: {name!r} can be no name of a branch or tag")
    with tempfile.TemporaryDirectory() as scratch:
        files = _collect(Path(folder), repo_id, options, Path(scratch))
        if dry_run:
            kind = "private" if private else "public"
            target = f"{repo_id} ({kind}), branch {revision or DEFAULT_BRANCH}" + (f", tag {tag}" if tag else "")
            return f"{target}:\n{_listing(Path(folder), files)}"
        token = usable_token(token)
        if token is None:
            raise NatsError(f"{repo_id}: no Hugging Face token, {LOGIN}")
        with hub_errors(f"{repo_id}: not published", revision):
            api = HfApi(token=token, **LIBRARY)
            retried(repo_id, partial(api.create_repo, repo_id, private=private, exist_ok=True))
            if private and not retried(repo_id, partial(api.model_info, repo_id)).private:
                raise NatsError(f"{repo_id}: is a public repository already; make it private in its settings first")
            message = commit_message or f"Upload with nats-zoo {__version__}"
            return _push(api, repo_id, files, branch=revision or DEFAULT_BRANCH, tag=tag, message=message)


def _collect(folder: Path, repo_id: str, options: CardOptions, scratch: Path) -> Contents:
    """Collect what is published of a folder, once it is seen to be fit for it."""
    if folder.is_file() or is_genotype_folder(folder):
        files = genotype_files(folder, scratch)
    else:
        _check_model(folder)
        files = {path.name: path for path in model_files(folder)}
    contents: dict[str, Path | bytes] = dict(files)
    if CARD_NAME in files:
        text = files[CARD_NAME].read_text(encoding="utf-8")
        card = options.fill(text, str(folder / CARD_NAME)).replace(CARD_REPO, repo_id)
        contents[CARD_NAME] = card.encode()
    elif options:
        raise NatsError(f"{folder}: has no {CARD_NAME} to state licences and names in")
    return dict(sorted(contents.items()))


def _check_model(folder: Path) -> None:
    inside = [name for name in ("model", "best") if (folder / name / CONFIG_NAME).is_file()]
    if inside and not (folder / CONFIG_NAME).exists():
        raise NatsError(f"{folder}: is a run's folder, expected a model in it: {' or '.join(inside)}")
    model = ModelFolder.open(folder)
    if model.kind == BACKBONE:
        check_backbone(model)
        return
    if not (folder / WEIGHTS_NAME).is_file():
        raise NatsError(f"{folder}: expected a model folder, with a {WEIGHTS_NAME} that nats-zoo saved")
    model.check()


def _listing(folder: Path, files: Contents) -> str:
    """List what a dry run would push."""
    sizes = {name: _size(content) for name, content in files.items()}
    width = max(map(len, sizes))
    lines = [f"  {name:<{width}}  {size:>13,} bytes" for name, size in sizes.items()]
    lines.append(f"{len(sizes)} files, {sum(sizes.values()):,} bytes; those which are there already are not sent again")
    others = (path for path in folder.iterdir() if path.name not in files) if folder.is_dir() else ()
    behind = sorted(f"{path.name}/" if path.is_dir() else path.name for path in others)
    if behind:
        more = f" and {len(behind) - SHOWN_NAMES} more" if len(behind) > SHOWN_NAMES else ""
        lines.append(f"stays behind: {', '.join(behind[:SHOWN_NAMES])}{more}")
    return "\n".join(lines)


def _push(api: HfApi, repo_id: str, files: Contents, *, branch: str, tag: str | None, message: str) -> str:
    refs = retried(repo_id, partial(api.list_repo_refs, repo_id))
    branches = {ref.name: ref.target_commit for ref in refs.branches}
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    if branch in tags and branch not in branches:
        raise NatsError(f"{repo_id}: revision: {branch!r} is a tag, expected a branch")
    head = branches.get(branch) or branches.get(DEFAULT_BRANCH)  # None: a repository without a commit
    there: dict[str, RepoFile] = {}
    if head is not None:
        entries = api.list_repo_tree(repo_id, revision=head)
        there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    changes = _changes(files, there)
    expected = None if changes else head  # None: a commit that is still to be made
    if tag is not None and tags.get(tag, expected) != expected:
        raise NatsError(f"{repo_id}: has a tag {tag!r} already, of commit {tags[tag]}; expected a new one")
    if branch not in branches and head is not None:
        retried(repo_id, partial(api.create_branch, repo_id, branch=branch, revision=head, exist_ok=True))
    address = f"{api.endpoint}/{repo_id}/commit/{head}"
    said = f"nothing changed, {address}"
    if changes:
        options = {"commit_message": message, "revision": branch, "parent_commit": head}
        try:
            commit = retried(repo_id, partial(_create_commit, api, repo_id, changes, options), NOT_CARRIED_OUT)
        except CLIENT_ERRORS as error:
            why = explain(error, branch)
            if status(error) in _PUSHED_MEANWHILE:
                why = f"somebody pushed to {branch} in the meantime; look at it and run this again"
            elif not there.keys() & set(OWN_FILES):
                why += "; its repository is there, without files of a model"
            raise NatsError(f"{repo_id}: not published: {why}") from error
        head, said = commit.oid, str(commit.commit_url)
        address = said
    if tag is not None and tags.get(tag) != head:
        with hub_errors(f"{repo_id}: {address} is published, but not its tag {tag!r}; run this again for it", tag):
            retried(repo_id, partial(api.create_tag, repo_id, tag=tag, revision=head), NOT_CARRIED_OUT)
    return said


def _changes(files: Contents, there: Mapping[str, RepoFile]) -> list[Operation]:
    """Work out what makes a commit's files these ones."""
    added = (name for name, content in files.items() if name not in there or not _is_same(content, there[name]))
    return [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=files[name]) for name in added),
        *(CommitOperationDelete(path_in_repo=name) for name in OWN_FILES if name in there and name not in files),
    ]


def _is_same(content: Path | bytes, there: RepoFile) -> bool:
    """Tell whether the Hub has this very file: it tells the sha256 of large ones, git's own name of the others."""
    size = _size(content)
    if there.lfs is not None:
        return there.lfs.size == size and there.lfs.sha256 == _digest("sha256", b"", content)
    return there.size == size and there.blob_id == _digest("sha1", b"blob %d\0" % size, content)


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _digest(algorithm: str, prefix: bytes, content: Path | bytes) -> str:
    if isinstance(content, bytes):
        return hashlib.new(algorithm, prefix + content, usedforsecurity=False).hexdigest()
    return file_digest(content, algorithm, prefix)


def _create_commit(api: HfApi, repo_id: str, changes: Sequence[Operation], options: Mapping[str, Any]) -> CommitInfo:
    """Upload and commit; by plain HTTP if the Hub has nothing of the protocol xet, which the client would insist on."""
    try:
        return api.create_commit(repo_id, changes, **options)
    except Exception as error:
        if not ("xet-write-token" in str(error) and "404" in str(error)):
            raise
    with ExitStack() as stack:  # open files are what the client does not upload by xet
        opened: list[Operation] = []
        for change in changes:
            if isinstance(change, CommitOperationAdd) and isinstance(change.path_or_fileobj, str | Path):
                file = stack.enter_context(open(change.path_or_fileobj, "rb"))
                change = CommitOperationAdd(path_in_repo=change.path_in_repo, path_or_fileobj=file)  # noqa: PLW2901
            opened.append(change)
        return api.create_commit(repo_id, opened, **options)
