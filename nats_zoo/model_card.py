"""The sections that the model cards of backbones and of detectors share."""

import json
from collections.abc import Mapping
from typing import Any

from .genotype import SEARCH_METHODS, Genotype

# A card is written before it is known where it will be published; `publish` puts the repository's id here.
CARD_REPO = "ORG/NAME"

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
