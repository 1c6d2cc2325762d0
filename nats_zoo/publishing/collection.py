"""The zoo's repositories on the Hub: what an organisation or a user has published, as cards state it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.hf_api import ModelInfo

from ..base.errors import NatsError
from ..base.text import text_table
from ..hub.client import usable_token
from ..hub.errors import LIBRARY, hub_errors
from .card import KINDS, TAG

AVERAGE_PRECISION = ("mAP", "AP")  # as cards call COCO's AP, in percent
NOTHING = "-"


@dataclass(frozen=True)
class Repository:
    """A repository of the zoo.

    Attributes:
        id: `org/name`.
        kind: backbone, detector or genotype; None: its card does not say.
        network: a detector's framework and backbone, or an architecture.
        ap: COCO's AP in percent, of boxes.
        measured_on: data set and split of it.
        license: as the Hub names it.
        private: only who has access to it can see it.
        gated: its files are for those who asked for access.
        last_modified: ISO 8601.

    Example:
        >>> Repository("org/name", kind="backbone", network="resnet50").to_dict()["kind"]
        'backbone'
    """

    id: str
    kind: str | None = None
    network: str | None = None
    ap: float | None = None
    measured_on: str | None = None
    license: str | None = None
    private: bool = False
    gated: bool = False
    last_modified: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Give plain data for JSON."""
        return asdict(self)


def list_collection(owner: str, token: str | None = None) -> list[Repository]:
    """List the zoo's repositories of an organisation or user, by name.

    Args:
        owner: the organisation or user.
        token: default: the one of `hf auth login` or HF_TOKEN. Without one, private repositories are left out.

    Raises:
        NatsError: no name of an organisation or user, or the Hub can not be asked.

    Example:
        >>> print(collection_table(list_collection("org")))
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", owner):
        raise NatsError(f"{owner}: expected the name of an organisation or user on the Hub, without a slash")
    with hub_errors(f"{owner}: not listed", None):
        api = HfApi(token=usable_token(token) or False, **LIBRARY)
        found = list(api.list_models(author=owner, filter=TAG, full=True, cardData=True))
    return sorted(map(_describe, found), key=lambda repository: repository.id)


def _describe(info: ModelInfo) -> Repository:
    """Read what a repository's card says, which somebody else wrote: nothing in it is relied on."""
    card: Any = info.card_data if info.card_data is not None else {}
    stated = card.get("nats_zoo")
    stated = stated if isinstance(stated, Mapping) else {}
    kinds = [kind for kind in KINDS if f"{TAG}-{kind}" in (info.tags or ())]
    ap, measured_on = _average_precision(info)
    return Repository(
        id=info.id,
        kind=_text(stated.get("kind")) or (kinds[0] if kinds else None),
        network=" on ".join(filter(None, (_text(stated.get("name")), _text(stated.get("backbone"))))) or None,
        ap=ap,
        measured_on=measured_on,
        license=_text(card.get("license")),
        private=bool(info.private),
        gated=bool(info.gated),
        last_modified=None if info.last_modified is None else info.last_modified.isoformat(),
    )


def _average_precision(info: ModelInfo) -> tuple[float | None, str | None]:
    for result in (info.card_data.eval_results if info.card_data is not None else None) or ():
        if result.metric_type in AVERAGE_PRECISION and type(result.metric_value) in (int, float):
            return float(result.metric_value), _text(result.dataset_name)
    return None, None


def _text(value: Any) -> str | None:
    """Put a text of a card on one line, without what a terminal would obey; None if it is none."""
    if not isinstance(value, str):
        return None
    return "".join(c for c in " ".join(value.split()) if c.isprintable()) or None


def collection_table(repositories: Sequence[Repository]) -> str:
    """Show repositories as aligned text.

    Example:
        >>> print(collection_table([Repository("org/name", kind="backbone", network="resnet50")]))
    """
    rows: list[tuple[str, ...]] = [("repository", "kind", "network", "AP", "on", "licence", "access", "modified")]
    rows += [_row(repository) for repository in repositories]
    return "\n".join(text_table(rows))


def _row(repository: Repository) -> tuple[str, ...]:
    access = [name for name in ("private", "gated") if getattr(repository, name)]
    return (
        repository.id,
        repository.kind or NOTHING,
        repository.network or NOTHING,
        NOTHING if repository.ap is None else f"{repository.ap:.1f}",
        repository.measured_on or NOTHING,
        repository.license or NOTHING,
        ", ".join(access) or "public",
        (repository.last_modified or NOTHING)[:10],
    )
