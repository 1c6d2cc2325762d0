"""What a model card says of the run that made a model, as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class BaseWeights:
    """The weights that a training began with.

        >>> BaseWeights(name="resnet50.tv_in1k", hub_id="timm/resnet50.tv_in1k", license="bsd-3-clause").license
        'bsd-3-clause'

    Attributes:
        name: what the run calls them.
        hub_id: their repository on the Hub.
        license: as the Hub names it.
    """

    name: str
    hub_id: str | None = None
    license: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a card says about the run that made a model or a genotype.

        >>> RunFacts(command="nats train --data pets", dataset="pets", split="val").split
        'val'

    Attributes:
        command: as it was typed.
        settings: all options of the run, plain data; as YAML they are a `--config` file for the same command.
        dataset: name of the data set.
        split: of it, on which the metrics were measured.
        data: a line about each split.
        hardware: device, precision, processes and versions.
        base: None: it began with random weights.
    """

    command: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    split: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, Any] = field(default_factory=dict)
    base: BaseWeights | None = None
