"""Where a genotype comes from, in words: a search's mode, a control, a transfer, a merge."""

import json
from collections.abc import Mapping
from typing import Any

from ..base.text import inline_code, wrap
from .genotype import Genotype

# The search's modes, as provenance's `method` names them; any other genotype was not searched.
SEARCH_METHODS = ("mixture", "sampled", "sensitivity")
# What a searched genotype is compared with; see search/controls.py.
CONTROL_METHODS = ("uniform", "random", "shares", "shuffled")


def origin(provenance: Mapping[str, Any]) -> str:
    """Say in one line how a genotype was found: searched (how, where, from which weights), or else what it is.

    >>> origin({"method": "mixture", "space": "C", "groups": 16})
    'searched: mixture, space C, 16 groups'
    """
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
    """Write a genotype's provenance as text, one fact per line; a transferred one's source follows, indented.

    >>> provenance_lines({"method": "mixture", "seed": 0})
    ['method: mixture', 'seed: 0']
    """
    lines = []
    for key, value in provenance.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", *provenance_lines(value, indent + "  ")]
        else:
            lines += wrap(f"{indent}{key}: {value if isinstance(value, str) else json.dumps(value)}", indent)
    return lines


def genotype_origin(genotype: Genotype) -> str:
    """Say in a card's sentence whether the genotype was searched for this network.

    >>> genotype_origin(Genotype("resnet18", {}, provenance={"method": "mixture"}))
    'A search chose them (`mixture`).'
    """
    provenance = genotype.provenance
    method = provenance.get("method")
    if method == "transfer":
        source = inline_code(provenance.get("source_architecture", "another network"))
        name = f" ({inline_code(provenance['source_genotype'])})" if "source_genotype" in provenance else ""
        origin = f"They were not searched for this network: they are transferred from the genotype of {source}{name}."
    elif method == "ic_conv":
        origin = "They are Inception Convolution's (arXiv 2012.13587), read from one of its pattern files."
    elif method in SEARCH_METHODS:
        origin = f"A search chose them ({inline_code(method)})."
    elif method in CONTROL_METHODS:
        origin = f"They were not searched: they are a control for searched ones ({inline_code(method)})."
    else:
        origin = (
            f"Their provenance states the method {inline_code(method)}." if method else "Their origin is not stated."
        )
    if "merged" in provenance:
        origin += " They were merged afterwards, to fewer different ones in each convolution."
    return origin
