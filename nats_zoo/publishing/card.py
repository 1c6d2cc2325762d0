"""Model cards: templates, filled with facts; metadata as the Hub reads it, in which the facts of licences are kept.

`templates/KIND.md.j2` begins a card of each kind, `templates/sections.md.j2` has what all of them share.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..base.names import CHART_NAME
from ..base.run_facts import BaseWeights, RunFacts
from ..base.text import card_table, cell, code_block, table_row
from ..genotype.genotype import Genotype
from ..genotype.provenance import genotype_origin

CARD_REPO = "ORG/NAME"  # a card is written before it is known where it is published; `publish` puts the id here
TEMPLATES = Path(__file__).parent / "templates"
TAG = "nats-zoo"  # of every repository of the zoo; by it they are found
KINDS = ("backbone", "detector", "genotype")
NOT_STATED = "not stated"
UNKNOWN_LICENSE = "unknown"  # the Hub's own word for it
LICENCES = "licences"  # where a card's metadata keep them, under `nats_zoo`


@dataclass(frozen=True, kw_only=True)
class Licences:
    """What a card's section on licences says, in any words.

    Attributes:
        model: licence of the model or genotype.
        data: that of the training data.
        dataset: the data's id on the Hub; may be empty.
        weights: licence of the base weights.
        base: the base weights' name or id on the Hub; may be empty.

    Example:
        >>> print(Licences(model="mit", data="CC BY 4.0", dataset="org/pets").section().splitlines()[-2])
        | training data | CC BY 4.0 (org/pets) |
    """

    HEADING: ClassVar[str] = "## Licences\n"
    ROWS: ClassVar[tuple[str, ...]] = ("this model", "training data", "base weights")

    model: str = NOT_STATED
    data: str = NOT_STATED
    dataset: str = ""
    weights: str = NOT_STATED
    base: str = ""

    @classmethod
    def of_base(cls, base: BaseWeights | None, otherwise: str) -> "Licences":
        """Of a model whose licence is its base weights', as far as one is known; `otherwise`: of weights, if None."""
        if base is None:
            return cls(weights=otherwise)
        model = f"{base.license}, as its base weights" if base.license else NOT_STATED
        return cls(model=model, weights=base.license or NOT_STATED, base=base.hub_id or base.name)

    @classmethod
    def of_card(cls, data: ModelCardData, section: str) -> "Licences | None":
        """What a card's metadata keep of them; of an earlier version's card, what its section says; None: nothing."""
        kept = data.get("nats_zoo")
        kept = kept.get(LICENCES) if isinstance(kept, Mapping) else None
        names = [field.name for field in fields(cls)]
        if isinstance(kept, Mapping) and all(isinstance(kept.get(name), str) for name in names):
            return cls(**{name: kept[name] for name in names})
        lines = (line.strip("| ").partition(" | ") for line in section.splitlines())
        rows = {label: value for label, _, value in lines}
        if not all(label in rows for label in cls.ROWS):
            return None
        model, *others = (rows[label] for label in cls.ROWS)
        (training, _, dataset), (weights, _, base) = (cell.removesuffix(")").partition(" (") for cell in others)
        return cls(model=model, data=training, dataset=dataset, weights=weights, base=base)

    def section(self) -> str:
        """The section as Markdown."""
        named = ((self.model, ""), (self.data, self.dataset), (self.weights, self.base))
        cells = (f"{licence} ({name})" if name else licence for licence, name in named)
        return card_table("Licences", dict(zip(self.ROWS, cells, strict=True)))


def card_metadata(
    kind: str, name: str, licences: Licences, base: BaseWeights | None = None, **values: Any
) -> ModelCardData:
    """Put together the metadata that a card begins with.

    Args:
        kind: one of `KINDS`.
        name: of the framework, or of the architecture, by which `nats collection` lists it.
        licences: what its section on them says.
        base: its licence is the model's too, until `publish` is told another one.
        **values: of `ModelCardData`; `tags` come behind the zoo's own.

    Example:
        >>> card_metadata("genotype", "resnet50", Licences(), library_name="nats-zoo").tags
        ['nats-zoo', 'nats-zoo-genotype']
    """
    tags = [TAG, f"{TAG}-{kind}", *values.pop("tags", ())]
    return ModelCardData(
        license=(base and base.license) or UNKNOWN_LICENSE,
        base_model=base.hub_id if base else None,
        tags=tags,
        model_name=CARD_REPO if values.get("eval_results") else None,
        nats_zoo={"kind": kind, "name": name, LICENCES: asdict(licences)},
        **values,
    )


def eval_results(
    task: str, figures: Mapping[str, tuple[str, float | None]], evaluated_on: str, run: RunFacts | None
) -> list[EvalResult]:
    """State figures as the metadata's `model-index` does; those that are None are left out.

    Args:
        task: the Hub's name of it, such as object-detection.
        figures: by a name for people, the Hub's name of the metric and its value.
        evaluated_on: data set and split, for people.
        run: names them singly.

    Example:
        >>> found = eval_results("object-detection", {"box AP": ("mAP", 37.41)}, "COCO val2017", None)
        >>> found[0].metric_value, found[0].dataset_type
        (37.41, 'coco-val2017')
    """
    dataset, split = (run.dataset, run.split) if run else (None, None)
    slug = re.sub("[^a-z0-9]+", "-", (dataset or evaluated_on).lower()).strip("-") or "unnamed"
    return [
        EvalResult(
            task_type=task,
            dataset_type=slug,
            dataset_name=evaluated_on,
            dataset_split=split,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, (kind, value) in figures.items()
        if value is not None
    ]


def render_card(kind: str, metadata: ModelCardData, genotype: Genotype | None, licences: Licences, **facts: Any) -> str:
    """Render the card of a kind.

    Args:
        kind: one of `KINDS`.
        metadata: see `card_metadata`.
        genotype: None: of a plain network.
        licences: see `Licences`.
        **facts: what the kind's template names, and of the shared sections `run` (RunFacts), `task` (what the run
            did), `metrics` (values by name), `evaluated_on` (data and split of them) and `class_rows` (a table).

    Example:
        >>> metadata = card_metadata("genotype", genotype.architecture, licences := Licences(model="mit"))
        >>> text = render_card("genotype", metadata, genotype, licences, architecture=genotype.architecture)
    """
    text = "".join((TEMPLATES / f"{name}.md.j2").read_text(encoding="utf-8") for name in (kind, "sections"))
    card = ModelCard.from_template(
        metadata,
        template_str=text,
        repo=CARD_REPO,
        chart=CHART_NAME,
        genotype=genotype,
        origin=genotype and genotype_origin(genotype),
        provenance=list(_provenances(genotype)) if genotype else [],
        licences=licences.section(),
        table=card_table,
        row=lambda cells: table_row(*cells),
        cell=cell,
        code=code_block,
        yaml=_yaml,
        **facts,
    )
    return f"{card}\n"


def _provenances(genotype: Genotype) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Title and values of a genotype's provenance; of a transferred one, which may be that again, its source's too."""
    provenance: Any = genotype.provenance
    title = "Provenance of the genotype"
    while isinstance(provenance, Mapping):
        yield title, {key: value for key, value in provenance.items() if key != "source_provenance"}
        title, provenance = f"{title}'s source", provenance.get("source_provenance")


def _yaml(values: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(values))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=10_000).strip()
