"""Publishing a model folder on the Hugging Face Hub, as one commit."""

import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from .backbone_folder import check_backbone
from .errors import NatsError
from .hub_client import LOGIN, check_repo_id, hub_errors, usable_token
from .model_card import CARD_REPO
from .model_folder import CARD_NAME, is_model_folder, model_files, read_config
from .version import __version__
from .weights_file import WEIGHTS_NAME


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
) -> str:
    """Push a model folder to the Hub, as one commit. The repository is created if need be.

    Args:
        folder: a backbone's or a detector's folder; its other files stay behind.
        repo_id: `org/name`.
        private: only who has access to the repository can see it. An existing public one is then refused.
        revision: branch to push to, created if need be; default: main.
        tag: name that the commit gets.
        commit_message: default: says the version of nats-zoo.
        token: default: the one of `hf auth login` or HF_TOKEN.
        dry_run: only say what would be pushed, without network.

    Returns:
        The address of the commit; the listing, if it was a dry run.

    Raises:
        NatsError: not a model folder, or what the Hub refused and what to do about it.
    """
    folder = Path(folder)
    _check_publishable(folder)
    check_repo_id(repo_id)
    if dry_run:
        return _listing(folder, repo_id, private, revision, tag)
    token = usable_token(token)
    if token is None:
        raise NatsError(f"{repo_id}: no Hugging Face token, {LOGIN}")
    with hub_errors(f"{repo_id}: not published", revision):
        api = HfApi(token=token, library_name="nats-zoo", library_version=__version__)
        _prepare_repo(api, repo_id, private, revision, tag)
        commit = api.create_commit(
            repo_id,
            _additions(folder, repo_id),
            commit_message=commit_message or f"Upload with nats-zoo {__version__}",
            revision=revision,
        )
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid)
    return str(commit.commit_url)


def _check_publishable(folder: Path) -> None:
    if "framework" not in read_config(folder):  # else it is a detector's
        check_backbone(folder)
    elif not is_model_folder(folder):
        raise NatsError(f"{folder}: expected a model folder, with a {WEIGHTS_NAME} that nats-zoo saved")


def _listing(folder: Path, repo_id: str, private: bool, revision: str | None, tag: str | None) -> str:
    kind = "private" if private else "public"
    target = f"{repo_id} ({kind}), branch {revision or 'main'}" + (f", tag {tag}" if tag else "")
    return "\n".join([f"{target}:", *(f"  {path.name}  {path.stat().st_size:,} bytes" for path in model_files(folder))])


def _prepare_repo(api: HfApi, repo_id: str, private: bool, revision: str | None, tag: str | None) -> None:
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise NatsError(f"{repo_id}: is a public repository already; make it private in its settings first")
    if tag is not None and tag in (ref.name for ref in api.list_repo_refs(repo_id).tags):
        raise NatsError(f"{repo_id}: has a tag {tag!r} already, expected a new one")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _additions(folder: Path, repo_id: str) -> list[CommitOperationAdd]:
    contents: dict[str, Path | bytes] = {path.name: path for path in model_files(folder)}
    if CARD_NAME in contents:
        contents[CARD_NAME] = (folder / CARD_NAME).read_bytes().replace(CARD_REPO.encode(), repo_id.encode())
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
