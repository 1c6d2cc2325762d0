"""What the cards of backbones, of detectors and of genotypes share: sections, and metadata as the Hub reads it."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..base.run_facts import BaseWeights, RunFacts
from ..base.text import card_table, cell, code_block
from ..genotype.genotype import Genotype
from ..genotype.provenance import genotype_origin

# A card is written before it is known where it will be published; `publish` puts the repository's id here.
CARD_REPO = "ORG/NAME"

TAG = "nats-zoo"
"""Of every repository of the zoo; by it they are found."""
KINDS = ("backbone", "detector", "genotype")
NOT_STATED = "not stated"
OF_MODEL, OF_DATA, OF_WEIGHTS = "this model", "training data", "base weights"  # rows of the table of licences
UNKNOWN_LICENSE = "unknown"  # the Hub's own word for it

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


def card_metadata(kind: str, name: str, base: BaseWeights | None = None, **values: Any) -> ModelCardData:
    """The metadata that a card begins with.

    Args:
        kind: one of `KINDS`.
        name: of the framework, or of the architecture, by which `nats collection` lists it.
        base: its licence is the model's too, until `publish` is told another one.
        **values: of `ModelCardData`; `tags` come behind the zoo's own.
    """
    tags = [TAG, f"{TAG}-{kind}", *values.pop("tags", ())]
    return ModelCardData(
        license=(base and base.license) or UNKNOWN_LICENSE,
        base_model=base.hub_id if base else None,
        tags=tags,
        model_name=CARD_REPO if values.get("eval_results") else None,
        nats_zoo={"kind": kind, "name": name},
        **values,
    )


def eval_results(
    task: str, figures: Mapping[str, tuple[str, float | None]], evaluated_on: str, run: RunFacts | None
) -> list[EvalResult]:
    """Figures as the metadata's `model-index` states them; those that are None are left out.

    Args:
        task: the Hub's name of it, such as object-detection.
        figures: by a name for people, the Hub's name of the metric and its value.
        evaluated_on: data set and split, for people.
        run: names them singly.
    """
    dataset, split = (run.dataset, run.split) if run else (None, None)
    return [
        EvalResult(
            task_type=task,
            dataset_type=_slug(dataset or evaluated_on),
            dataset_name=evaluated_on,
            dataset_split=split,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, (kind, value) in figures.items()
        if value is not None
    ]


def _slug(name: str) -> str:
    """A data set's name in the form of the Hub's own."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


def join_card(metadata: ModelCardData, sections: Sequence[str]) -> str:
    """The text of a card; empty sections are left out."""
    return "\n\n".join(filter(None, [f"---\n{metadata.to_yaml()}\n---", *sections])) + "\n"


def genotype_section(genotype: Genotype, chart: str) -> str:
    """The section with a genotype's origin, chart and table."""
    picture = f"![Dilations of each convolution]({chart})"
    about = f"Output channels of these convolutions run at other dilations. {genotype_origin(genotype)}"
    return f"## Genotype\n\n{about}\n\n{picture}\n\n{code_block(str(genotype))}"


def provenance_tables(genotype: Genotype) -> str:
    """The sections of a model card on a genotype's provenance; for a transferred one, on its source's too."""
    tables = []
    provenance: Any = genotype.provenance
    title = "Provenance of the genotype"
    while isinstance(provenance, Mapping):  # a transferred genotype may have been transferred again
        tables.append(card_table(title, {k: v for k, v in provenance.items() if k != "source_provenance"}))
        title, provenance = f"{title}'s source", provenance.get("source_provenance")
    return "\n\n".join(filter(None, tables))


def run_sections(run: RunFacts | None, task: str = "Training") -> str:
    """The sections on data, command, settings and hardware of a run; empty without one.

    Args:
        run: None: nothing is known of it.
        task: what the run did.
    """
    if run is None:
        return ""
    parts = [f"## {task}\n"]
    parts += [f"- {cell(split)}: {cell(line)}" for split, line in run.data.items()]
    if run.command:
        parts += ["\nThe command:\n", code_block(run.command, "bash")]
    if run.settings:
        parts += ["\nAll of its settings, a file for `--config`:\n", code_block(_yaml(run.settings), "yaml")]
    hardware = card_table("Hardware and versions", run.hardware)
    return "\n\n".join(filter(None, ["\n".join(parts) if len(parts) > 1 else "", hardware]))


def _yaml(values: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(values))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=10_000).strip()


def license_section(base: BaseWeights | None, otherwise: str = "none: it began with random ones") -> str:
    """The section on licences; `publish` fills in what its options state.

    Args:
        base: the base weights.
        otherwise: what is said of these if they are None.
    """
    own = f"{base.license}, as its base weights" if base and base.license else NOT_STATED
    weights = f"{base.license or NOT_STATED} ({base.hub_id or base.name})" if base else otherwise
    return card_table("Licences", {OF_MODEL: own, OF_DATA: NOT_STATED, OF_WEIGHTS: weights})
