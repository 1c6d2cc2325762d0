"""Backbones on the Hugging Face Hub and in folders: save, publish, pull.

A model folder holds `config.json`, `model.safetensors`, `README.md` (the model card) and PNG charts; a backbone's is
timm's own format, so that `timm.create_model("hf-hub:org/name", pretrained=True)` rebuilds it after
`import nats_zoo`. Shapes can not tell two genotypes apart, so the weights carry the fingerprint of the genotype that
they were trained with. Only safetensors and JSON are written or read.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData, get_token, snapshot_download
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from .errors import NatsError, one_line
from .files import atomic_file, atomic_folder, read_json
from .genotype import SEARCH_METHODS, Genotype
from .nats_any import NAME as NATS_ANY
from .version import __version__

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
CHART_NAME = "genotype.png"
MODEL_FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, "*.png")

FINGERPRINT_KEY = "genotype_sha256"
PLAIN_FINGERPRINT = "plain"

# A card is written before it is known where it will be published; `publish` puts the repository's id here.
CARD_REPO = "ORG/NAME"

_LOGIN = "run `hf auth login` or set HF_TOKEN"
# What the Hub client's errors (classes, or the status of an answer) mean to a user; the first that applies.
_REASONS: dict[type | int, str] = {
    GatedRepoError: f"the repository is gated: ask for access on its page, then {_LOGIN}",
    RepositoryNotFoundError: f"no such repository, or it is private: then {_LOGIN}",
    RevisionNotFoundError: "the repository has no revision {revision!r}, expected a branch, a tag or a commit",
    401: f"the token is not valid: {_LOGIN}",
    403: "the token has no right to do this: use one with write access to the repository",
}


# --- pull -------------------------------------------------------------------------------------------------------------


def from_pretrained(
    source: str | os.PathLike,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a backbone with its weights.

    Args:
        source: a folder that `save_backbone` wrote, or the id of a Hub repository (`org/name`).
        revision: branch, tag or commit of the repository.
        cache_dir: where downloads are kept; default: the Hub client's cache.
        **kwargs: go to `timm.create_model`, such as `num_classes` or `features_only`.

    Raises:
        NatsError: no such folder or repository, weights of another genotype, or weights that do not fit the config.
    """
    folder = resolve_folder(source, revision, cache_dir=cache_dir)
    check_backbone(folder)
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs)


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
    _check_repo_id(str(source))
    token = _usable_token(None)
    with _hub_errors(f"{source}: no such folder, and from the Hub", revision):
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


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        valid = "/" in repo_id
    except HFValidationError:
        valid = False
    if not valid:
        raise NatsError(f"{repo_id}: neither a folder nor the id of a Hub repository (org/name)")


# --- what is in a model folder ----------------------------------------------------------------------------------------


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The content of a model folder's config.json.

    Raises:
        NatsError: no such file, or no JSON object in it.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.exists():
        raise NatsError(f"{folder}: no {CONFIG_NAME} in it, expected a model folder")
    config = read_json(path)
    if not isinstance(config, dict):
        raise NatsError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def safetensors_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a safetensors file, without reading its tensors.

    Raises:
        NatsError: no such file, or not in the safetensors format.
    """
    with _open_safetensors(path) as file:
        return file.metadata() or {}


def check_fingerprint(path: str | os.PathLike, genotype: Genotype | None) -> None:
    """Raise NatsError unless the weights were saved with this genotype (None: with a plain network).

    Args:
        path: a safetensors file that `save_weights` wrote.
        genotype: the genotype that the config beside it states.
    """
    found = safetensors_metadata(path).get(FINGERPRINT_KEY)
    expected = _fingerprint(genotype)
    if found is None:
        raise NatsError(f"{path}: its metadata has no {FINGERPRINT_KEY}, expected weights that nats-zoo saved")
    if found != expected:
        raise NatsError(
            f"{path}: these weights belong to another genotype: {FINGERPRINT_KEY} is {found},"
            f" that of {CONFIG_NAME} is {expected}"
        )


def check_backbone(folder: str | os.PathLike) -> None:
    """Check that a folder rebuilds a backbone: its genotype is the weights', and its tensors fit the network.

    Reads the weights' header only.

    Raises:
        NatsError: naming the file, and the key, fingerprints or tensor.
    """
    folder = Path(folder)
    config = read_config(folder)
    check_fingerprint(folder / WEIGHTS_NAME, _config_genotype(config, folder / CONFIG_NAME))
    with torch.device("meta"):
        model = timm.create_model(f"local-dir:{folder}")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(folder / WEIGHTS_NAME, expected)


def _config_genotype(config: Mapping, path: Path) -> Genotype:
    architecture, args = config.get("architecture"), config.get("model_args")
    genotype = args.get("genotype") if isinstance(args, Mapping) else None
    if not isinstance(genotype, Mapping):
        raise NatsError(f"{path}: model_args: expected a backbone's genotype as an object, found {genotype!r}")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise NatsError(f"{path}: architecture {architecture!r} is unknown to nats-zoo {__version__} and timm")
    return Genotype.from_dict(genotype, source=f"{path}: model_args: genotype")


def check_shapes(path: str | os.PathLike, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise NatsError unless a safetensors file holds tensors of these names and shapes; reads its header only."""
    with _open_safetensors(path) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    for name in sorted(expected.keys() | found.keys()):
        if name.endswith(".num_batches_tracked") and name not in found:
            continue  # a frozen BN has none, and loading needs none
        if found.get(name) != expected.get(name):
            raise NatsError(
                f"{path}: tensor {name} has the shape {found.get(name, 'missing')},"
                f" {CONFIG_NAME} expects {expected.get(name, 'no such tensor')}"
            )


@contextmanager
def _open_safetensors(path: str | os.PathLike) -> Iterator[Any]:
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise NatsError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise NatsError(f"{path}: not a safetensors file: {one_line(error)}") from error
    with file:
        yield file


def _fingerprint(genotype: Genotype | None) -> str:
    return PLAIN_FINGERPRINT if genotype is None else genotype.fingerprint()


# --- save -------------------------------------------------------------------------------------------------------------


def save_backbone(
    model: nn.Module,
    folder: str | os.PathLike,
    metrics: Mapping[str, Any] | None = None,
    base_model: str | None = None,
) -> Path:
    """Write a backbone as a model folder, whole or not at all.

    Args:
        model: a `nats_*` model as `timm.create_model` returned it, without `features_only`.
        folder: is created; a model folder that is already there is replaced.
        metrics: figures for the model card.
        base_model: Hub id of the weights it was fine-tuned from, for the model card.

    Returns:
        The folder.

    Raises:
        NatsError: not such a model, one that its config would not rebuild, or another folder in the way.
    """
    genotype = getattr(model, "genotype", None)
    if not isinstance(genotype, Genotype) or not hasattr(model, "num_classes"):  # features_only has no classifier
        raise NatsError(
            f"{type(model).__name__} is not saved as a backbone: expected a nats_* model of timm, without features_only"
        )

    def write(new: Path) -> None:
        _save_config(model, new / CONFIG_NAME)
        save_weights(model.state_dict(), new / WEIGHTS_NAME, genotype)
        check_backbone(new)
        save_chart(genotype, new / CHART_NAME)
        (new / CARD_NAME).write_text(_backbone_card(model, genotype, metrics or {}, base_model), encoding="utf-8")

    return write_folder_atomically(folder, write)


def save_weights(state_dict: Mapping[str, Tensor], path: str | os.PathLike, genotype: Genotype | None) -> None:
    """Write a safetensors file that carries the genotype's fingerprint (None: of a plain network)."""
    metadata = {"format": "pt", "nats_zoo": __version__, FINGERPRINT_KEY: _fingerprint(genotype)}
    with atomic_file(path) as scratch:
        save_file({name: tensor.contiguous() for name, tensor in state_dict.items()}, scratch, metadata)


def save_chart(genotype: Genotype, path: str | os.PathLike) -> None:
    """Draw the genotype for a model card."""
    from .figures import genotype_chart  # matplotlib is too slow to import for all who only load

    genotype_chart(genotype, path)


def write_folder_atomically(folder: str | os.PathLike, write: Callable[[Path], None]) -> Path:
    """Write a model folder beside its target, then rename it.

    Args:
        folder: the target; an empty or a model folder there is replaced.
        write: fills the folder that it is given. What it raises leaves the target as it was.

    Returns:
        The target.

    Raises:
        NatsError: something else is in the way, or the target can not be written.
    """
    target = Path(folder).resolve()
    if target.exists() and not _is_replaceable(target):
        raise NatsError(f"{folder}: is there already and is no model folder, or holds other files too; not replaced")
    try:
        with atomic_folder(target) as new:
            write(new)
    except OSError as error:
        raise NatsError(f"{folder}: can not be written: {error.strerror or error}") from error
    return Path(folder)


def _is_replaceable(folder: Path) -> bool:
    return folder.is_dir() and (not any(folder.iterdir()) or (_is_model_folder(folder) and not _other_files(folder)))


def _is_model_folder(folder: Path) -> bool:
    try:
        read_config(folder)
        return FINGERPRINT_KEY in safetensors_metadata(folder / WEIGHTS_NAME)
    except NatsError:
        return False


def _model_files(folder: Path) -> list[Path]:
    files = (path for path in folder.iterdir() if path.is_file())
    return sorted(path for path in files if any(fnmatch(path.name, pattern) for pattern in MODEL_FILES))


def _other_files(folder: Path) -> set[Path]:
    return set(folder.iterdir()) - set(_model_files(folder))


def _save_config(model: nn.Module, path: Path) -> None:
    try:
        save_config_for_hf(model, str(path))
    except ValueError as error:
        raise NatsError(f"{type(model).__name__} can not be described in {CONFIG_NAME}: {one_line(error)}") from error


# --- the model card ---------------------------------------------------------------------------------------------------


def _backbone_card(model: nn.Module, genotype: Genotype, metrics: Mapping[str, Any], base_model: str | None) -> str:
    cfg = model.pretrained_cfg
    header = ModelCardData(
        library_name="timm",
        license=cfg.get("license") or "other",
        tags=["timm", "nats-zoo", "object-detection-backbone", "dilated-convolution"],
        pipeline_tag="image-feature-extraction",
        base_model=base_model,
    )
    sections = [
        f"---\n{header.to_yaml()}\n---",
        _CARD_BODY.format(
            title=cfg["architecture"] if cfg["architecture"] != NATS_ANY else f"{genotype.architecture}, regrouped",
            plain=genotype.architecture,
            origin=genotype_origin(genotype),
            repo=CARD_REPO,
        ),
        f"## Genotype\n\n![Dilations of each convolution]({CHART_NAME})\n\n```\n{genotype}\n```",
        card_table("Metrics", metrics),
        provenance_tables(genotype),
        CARD_CITATION,
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def genotype_origin(genotype: Genotype) -> str:
    """A sentence for a model card that says whether the genotype was searched for this network."""
    provenance = genotype.provenance
    method = provenance.get("method")
    if method == "transfer":
        source = _code(provenance.get("source_architecture", "another network"))
        name = f" ({_code(provenance['source_genotype'])})" if "source_genotype" in provenance else ""
        origin = f"They were not searched for this network: they are transferred from the genotype of {source}{name}."
    elif method in SEARCH_METHODS:
        origin = f"A search chose them ({_code(method)})."
    else:
        origin = f"Their provenance states the method {_code(method)}." if method else "Their origin is not stated."
    if "merged" in provenance:
        origin += " They were merged afterwards, to fewer different ones in each convolution."
    return origin


def provenance_tables(genotype: Genotype) -> str:
    """The sections of a model card on a genotype's provenance; for a transferred one, on its source's too."""
    tables, provenance = [], genotype.provenance
    title = "Provenance of the genotype"
    while isinstance(provenance, Mapping):  # a transferred genotype may have been transferred again
        tables.append(card_table(title, {k: v for k, v in provenance.items() if k != "source_provenance"}))
        title, provenance = f"{title}'s source", provenance.get("source_provenance")
    return "\n\n".join(filter(None, tables))


def _code(value: Any) -> str:
    return "`" + _cell(str(value)).replace("`", "'") + "`"


def card_table(title: str, values: Mapping[str, Any]) -> str:
    """A section of a model card with one row per value; nothing if there are none."""
    if not values:
        return ""
    cells = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in values.items())
    rows = (f"| {_cell(key)} | {_cell(value)} |" for key, value in cells)
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *rows])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


_CARD_BODY = """\
# {title}

A backbone for object detection: timm's `{plain}` with some output channels of its convolutions at other dilations.
Same parameters, same multiply-adds and same state dict as `{plain}`. {origin}

It is made to be fine-tuned in a detector. The logits of a regrouped classifier are not ImageNet-accurate before
fine-tuning, because the dilations differ from those that the weights were first trained with.

## Use

```python
import nats_zoo  # first: it registers the architecture with timm
import timm

model = timm.create_model("hf-hub:{repo}", pretrained=True)
backbone = timm.create_model("hf-hub:{repo}", pretrained=True, features_only=True, out_indices=(1, 2, 3, 4))
```

`nats_zoo.hub.from_pretrained("{repo}", revision=...)` also pins a revision and checks that the weights belong to
the genotype."""

CARD_CITATION = """\
## Citation

```bibtex
@inproceedings{peng2019nats,
  title     = {Efficient Neural Architecture Transformation Search in Channel-Level for Object Detection},
  author    = {Peng, Junran and Sun, Ming and Zhang, Zhaoxiang and Tan, Tieniu and Yan, Junjie},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2019},
  note      = {arXiv:1909.02293}
}
```"""


# --- publish ----------------------------------------------------------------------------------------------------------


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
    _check_repo_id(repo_id)
    if dry_run:
        return _listing(folder, repo_id, private, revision, tag)
    token = _usable_token(token)
    if token is None:
        raise NatsError(f"{repo_id}: no Hugging Face token, {_LOGIN}")
    with _hub_errors(f"{repo_id}: not published", revision):
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
    elif not _is_model_folder(folder):
        raise NatsError(f"{folder}: expected a model folder, with a {WEIGHTS_NAME} that nats-zoo saved")


def _listing(folder: Path, repo_id: str, private: bool, revision: str | None, tag: str | None) -> str:
    kind = "private" if private else "public"
    target = f"{repo_id} ({kind}), branch {revision or 'main'}" + (f", tag {tag}" if tag else "")
    return "\n".join(
        [f"{target}:", *(f"  {path.name}  {path.stat().st_size:,} bytes" for path in _model_files(folder))]
    )


def _prepare_repo(api: HfApi, repo_id: str, private: bool, revision: str | None, tag: str | None) -> None:
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise NatsError(f"{repo_id}: is a public repository already; make it private in its settings first")
    if tag is not None and tag in (ref.name for ref in api.list_repo_refs(repo_id).tags):
        raise NatsError(f"{repo_id}: has a tag {tag!r} already, expected a new one")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)


def _additions(folder: Path, repo_id: str) -> list[CommitOperationAdd]:
    contents: dict[str, Path | bytes] = {path.name: path for path in _model_files(folder)}
    if CARD_NAME in contents:
        contents[CARD_NAME] = (folder / CARD_NAME).read_bytes().replace(CARD_REPO.encode(), repo_id.encode())
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]


# --- the Hub's client -------------------------------------------------------------------------------------------------


def _usable_token(token: str | None) -> str | None:
    """The given token, else the one of the user's login, if any."""
    token = token or get_token()
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        # The HTTP library would refuse the header too, but quote it, token and all.
        raise NatsError(f"the Hugging Face token has characters that no token has: {_LOGIN}")
    return token


@contextmanager
def _hub_errors(what: str, revision: str | None) -> Iterator[None]:
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
