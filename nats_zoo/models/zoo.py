"""What the zoo holds: the variants, their default genotypes and where those come from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import timm

from ..base.names import VARIANT_PREFIX
from ..base.text import text_table
from ..folders.find_genotype import find_genotype
from ..genotype.catalogue import DEFAULT_GENOTYPES
from ..genotype.genotype import Genotype
from ..genotype.provenance import SEARCH_METHODS, origin

NO_DEFAULT = "any timm network: takes architecture= and a genotype= for it"


class Entry(NamedTuple):
    """A variant of the zoo.

    Attributes:
        variant: its name in timm.
        genotype_name: of its default genotype, None if it has none.
        genotype: the default genotype itself.
        tags: of the plain network's pretrained weights in timm, the default one first.

    Example:
        >>> entry = list_zoo()[0]
        >>> entry.variant, entry.genotype_name, entry.tags[0]
        ('nats_resnet18', 'resnet18_c_n4_bccd', 'tv_in1k')
    """

    variant: str
    genotype_name: str | None
    genotype: Genotype | None
    tags: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain JSON data."""
        entry: dict[str, Any] = {
            "variant": self.variant,
            "default_genotype": self.genotype_name,
            "default_tag": self.tags[0] if self.tags else None,
            "tags": list(self.tags),
        }
        if self.genotype is not None:
            entry |= {
                "origin": origin(self.genotype.provenance),
                "searched": self.genotype.provenance.get("method") in SEARCH_METHODS,
                "architecture": self.genotype.architecture,
                "convolutions": len(self.genotype.convs),
                "share_changed": round(self.genotype.share_changed(), 4),
                "provenance": self.genotype.to_dict().get("provenance", {}),
            }
        return entry


def list_zoo() -> list[Entry]:
    """List the registered variants, in timm's order; the ones without a default genotype come last.

    Example:
        >>> [entry.variant for entry in list_zoo()][:2]
        ['nats_resnet18', 'nats_resnet34']
    """
    entries = []
    for variant in timm.list_models(f"{VARIANT_PREFIX}*"):
        name = DEFAULT_GENOTYPES.get(variant.removeprefix(VARIANT_PREFIX))
        tags = [name.partition(".")[2] for name in timm.list_models(variant, pretrained=True)]
        cfg = timm.get_pretrained_cfg(variant, allow_unregistered=True)
        default = cfg and cfg.tag
        tags = [tag for tag in tags if tag == default] + [tag for tag in tags if tag != default]
        entries.append(Entry(variant, name, None if name is None else find_genotype(name), tuple(tags)))
    return sorted(entries, key=lambda entry: entry.genotype is None)


def zoo_table(entries: Sequence[Entry]) -> str:
    """Show variants, genotypes and tags as text of at most 120 columns.

    Example:
        >>> print(zoo_table(list_zoo()))
    """
    rows = [["variant", "default genotype", "changed", "how it was found"]]
    for entry in entries:
        if entry.genotype is None:
            rows.append([entry.variant, "-", "-", NO_DEFAULT])
        else:
            changed = f"{entry.genotype.share_changed():.0%}"
            rows.append([entry.variant, str(entry.genotype_name), changed, origin(entry.genotype.provenance)])
    tags = [[entry.variant, ", ".join(entry.tags)] for entry in entries if entry.tags]
    return "\n".join(
        [
            *text_table(rows, wrapped=True),
            "",
            "changed: share of the output channels in the genotype's convolutions whose dilation is not 1x1.",
            "",
            "Tags of pretrained weights: timm's, of the plain network; the default comes first.",
            *text_table(tags, wrapped=True),
        ]
    )
