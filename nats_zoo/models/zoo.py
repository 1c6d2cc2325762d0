"""What the zoo holds: the variants, their default genotypes and where those come from."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm

from ..genotype.genotype import CONTROL_METHODS, SEARCH_METHODS, Genotype, resolve_genotype
from ..networks.transform import VARIANT_PREFIX
from .nats_resnet import DEFAULT_GENOTYPES

TABLE_WIDTH = 120
NO_DEFAULT = "any timm network: takes architecture= and a genotype= for it"


class Entry(NamedTuple):
    """A variant of the zoo.

    Attributes:
        variant: its name in timm.
        genotype_name: of its default genotype, None if it has none.
        genotype: the default genotype itself.
        tags: of the plain network's pretrained weights in timm, the default one first.
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
    """The registered variants, in timm's order; the ones without a default genotype come last."""
    entries = [_entry(variant) for variant in timm.list_models(f"{VARIANT_PREFIX}*")]
    return sorted(entries, key=lambda entry: entry.genotype is None)


def zoo_table(entries: Sequence[Entry]) -> str:
    """Variants, genotypes and tags as text of at most 120 columns."""
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
            *_columns(rows),
            "",
            "changed: share of the output channels in the genotype's convolutions whose dilation is not 1x1.",
            "",
            "Tags of pretrained weights: timm's, of the plain network; the default comes first.",
            *_columns(tags),
        ]
    )


def origin(provenance: Mapping[str, Any]) -> str:
    """In one line, how a genotype was found: searched (how, where, from which weights), or else what it is."""
    method = provenance.get("method")
    if method == "transfer":
        source = provenance.get("source_genotype") or provenance.get("source_architecture") or "another network"
        return f"not searched: transferred from {source}{_merged(provenance)}"
    if method in CONTROL_METHODS:
        return f"not searched: {_control(provenance)}{_merged(provenance)}"
    kind = f"searched: {method}" if method in SEARCH_METHODS else str(method or "origin not stated")
    facts = [f"space {provenance['space']}"] if "space" in provenance else []
    facts += [f"{provenance['groups']} groups"] if "groups" in provenance else []
    parts = [", ".join([kind, *facts])]
    parts += [f"{key}: {provenance[key]}" for key in ("dataset", "weights") if key in provenance]
    return " ".join("; ".join(parts).split()) + _merged(provenance)


def _control(provenance: Mapping[str, Any]) -> str:
    """What a control genotype is, with what it depends on."""
    if provenance["method"] == "shuffled":
        source = provenance.get("source_provenance")
        before = origin(source) if isinstance(source, Mapping) and source else "another genotype"
        return f"shuffled, seed {provenance.get('seed')}, from ({before})"
    kinds = {"uniform": f"uniform {provenance.get('dilation')}", "shares": "given shares"}
    facts = {"space": "space {}", "groups": "{} groups", "channels_per_group": "groups of {} channels"}
    facts["seed"] = "seed {}"
    known = [text.format(provenance[key]) for key, text in facts.items() if key in provenance]
    return ", ".join([kinds.get(provenance["method"], "random"), *known])


def _merged(provenance: Mapping[str, Any]) -> str:
    merged = provenance.get("merged")
    return f"; merged to at most {merged.get('max_dilations')} dilations" if isinstance(merged, Mapping) else ""


def provenance_lines(provenance: Mapping[str, Any], indent: str = "") -> list[str]:
    """A genotype's provenance as text, one fact per line; a transferred one's source follows, indented."""
    lines = []
    for key, value in provenance.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", *provenance_lines(value, indent + "  ")]
        else:
            lines += _wrapped(f"{indent}{key}: {value if isinstance(value, str) else json.dumps(value)}", indent)
    return lines


def _wrapped(line: str, indent: str) -> list[str]:
    return textwrap.wrap(
        line, TABLE_WIDTH, subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False
    )


def _entry(variant: str) -> Entry:
    name = DEFAULT_GENOTYPES.get(variant.removeprefix(VARIANT_PREFIX))
    genotype = None if name is None else resolve_genotype(name)
    return Entry(variant, name, genotype, _tags(variant))


def _tags(variant: str) -> tuple[str, ...]:
    tags = [name.partition(".")[2] for name in timm.list_models(variant, pretrained=True)]
    default = timm.get_pretrained_cfg(variant, allow_unregistered=True)
    return tuple(sorted(tags, key=lambda tag: default is None or tag != default.tag))


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned lines; the last column takes the rest of the width, in as many lines as it needs."""
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    indent = sum(widths) + 2 * len(widths)
    lines = []
    for *cells, last in rows:
        begin = "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
        wrapped = textwrap.wrap(last, TABLE_WIDTH - indent, break_on_hyphens=False) or [""]
        lines += [begin + wrapped[0], *(" " * indent + line for line in wrapped[1:])]
    return [line.rstrip() for line in lines]
