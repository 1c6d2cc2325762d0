"""What the commands' MODEL, --genotype and --weights name: networks of timm and of model folders, and their weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub.errors import HTTPError
from timm.models import split_model_name_tag
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..base.errors import NatsError, one_line, short
from ..base.names import CONFIG_NAME, HUB_PREFIX, NATS_ANY, VARIANT_PREFIX
from ..folders.find_genotype import (
    config_genotype,
    find_genotype,
)
from ..folders.model_folder import read_config
from ..folders.weights import fetch_pretrained, weights_overlay
from ..genotype.catalogue import DEFAULT_GENOTYPES
from ..genotype.genotype import Genotype
from ..hub.client import resolve_folder, split_revision
from .saved import check_backbone

RANDOM, PRETRAINED = "random", "pretrained"
MAP_STRIDES = (4, 8, 16, 32)
ASLEEP = 1e-3  # a smaller scale hides a residual branch


@dataclass(frozen=True)
class Source:
    """A network, named.

    Attributes:
        architecture: timm's name of the plain network, without a tag.
        tag: of its pretrained weights; may be empty.
        genotype: what it runs; None: it is plain.
        arguments: further ones of its constructor, from a folder's config.json.
        folder: the model folder it comes from, or None.
    """

    architecture: str
    tag: str = ""
    genotype: Genotype | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def name(self) -> str:
        """What timm calls the network that runs the genotype."""
        if self.genotype is None:
            return self.architecture
        variant = VARIANT_PREFIX + self.architecture
        return variant if timm.is_model(variant) else NATS_ANY

    @property
    def registered(self) -> str:
        """Under which name, tag included, timm knows its pretrained weights."""
        return (self.architecture if self.name == NATS_ANY else self.name) + (f".{self.tag}" if self.tag else "")

    @property
    def label(self) -> str:
        """What to call it: the folder's name, else timm's name of the variant, or of the architecture."""
        if self.folder is not None:
            return folder_name(self.folder)
        return self.architecture if self.name == NATS_ANY else self.name

    @property
    def in_channels(self) -> int:
        """Channels of its images."""
        return self.arguments.get("in_chans", 3)

    def create(self, weights: str = RANDOM, **options: Any) -> nn.Module:
        """Build the network with timm, in evaluation mode.

        Args:
            weights: "random"; "pretrained" for timm's, which are downloaded unless cached; or the folder, safetensors
                file or Hub repository of a model of the same plain architecture, or of a detector on it.
            **options: go to `timm.create_model`.

        Raises:
            NatsError: weights that can not be fetched or do not fit, or options that the network does not take.
        """
        if weights == PRETRAINED:
            fetch_pretrained(self.registered)
        if weights in (RANDOM, PRETRAINED):
            model = self._create(weights == PRETRAINED, options)
        else:
            overlay = weights_overlay(self.architecture, weights, self.arguments, headless="features_only" in options)
            model = self._create(True, options, overlay)
            model.pretrained_cfg.pop("state_dict")  # loaded by now; it would be kept as a second copy
        if self.genotype is not None:
            vars(model)["genotype"] = self.genotype  # a feature wrapper drops the network's own attribute
        if weights == RANDOM and not any(parameter.is_meta for parameter in model.parameters()):
            wake_branches(model)
        return model.eval()

    def _create(self, pretrained: bool, options: Mapping[str, Any], overlay: Mapping | None = None) -> nn.Module:
        name, tag = self.name, f".{self.tag}" if self.tag else ""
        arguments = dict(self.arguments)
        if self.genotype is not None:
            arguments["genotype"] = self.genotype
        if name == NATS_ANY:
            arguments["architecture"], tag = self.architecture + tag, ""
        if overlay is not None:
            arguments["pretrained_cfg_overlay"] = overlay
            if "num_classes" in overlay and "features_only" not in options:
                arguments["num_classes"] = overlay["num_classes"]
        try:
            return timm.create_model(name + tag, pretrained=pretrained, **{**arguments, **options})
        except NatsError:
            raise
        except (HTTPError, OSError, RuntimeError, AssertionError, TypeError) as error:
            raise NatsError(f"{name}{tag}: {one_line(error)}") from error


def find_source(model: str, genotype: str | None = None) -> Source:
    """Find what a command's MODEL and --genotype name.

    Args:
        model: a timm name with or without a tag, plain or a nats variant; or the folder or Hub repository
            (`org/name`, `org/name@revision`) of a backbone or detector.
        genotype: takes the place of the one that the model has; of a plain name's or a variant's, the default one.

    Raises:
        NatsError: no such model or genotype, or a folder that is no model's.
    """
    name, tag = split_model_name_tag(model)
    if name == NATS_ANY:
        raise NatsError(f"{NATS_ANY}: name the plain architecture instead, and a genotype for it")
    if timm.is_model(name):
        source = Source(name.removeprefix(VARIANT_PREFIX), tag)
        default = DEFAULT_GENOTYPES.get(source.architecture) if name.startswith(VARIANT_PREFIX) else None
        source = replace(source, genotype=None if default is None else find_genotype(default))
    elif Path(model).exists() or "/" in model or model.startswith(HUB_PREFIX):
        source = _folder_source(resolve_folder(model))
    else:
        raise NatsError(f"{model}: timm has no such model, and there is no such folder")
    return source if genotype is None else replace(source, genotype=find_genotype(genotype))


def find_nats_source(model: str, genotype: str | None = None) -> Source:
    """As `find_source`, and a plain architecture takes on the default genotype of its variant.

    Raises:
        NatsError: also where there is none.
    """
    source = find_source(model, genotype)
    if source.genotype is not None:
        return source
    if source.architecture not in DEFAULT_GENOTYPES:
        raise NatsError(f"{model}: {source.architecture} has no default genotype, give one with --genotype")
    return replace(source, genotype=find_genotype(DEFAULT_GENOTYPES[source.architecture]))


def genotype_name(genotype: Genotype) -> str:
    """What to call a genotype: its file's name without the suffix, else its model folder's or its architecture's."""
    source = genotype.source.partition(": ")[0]
    if source.startswith(HUB_PREFIX):
        return split_revision(source)[0].rpartition("/")[2]
    path = Path(source)
    if path.name == CONFIG_NAME:
        return folder_name(path.parent)
    return path.stem if path.suffix == ".json" else genotype.architecture


def folder_name(folder: Path) -> str:
    """What to call a folder: its name, or that of the repository which the Hub's client has put into it."""
    storage = folder.parent.parent
    if folder.parent.name == "snapshots" and storage.name.startswith("models--"):
        return storage.name.rpartition("--")[2]
    return folder.resolve().name


def weights_name(source: Source, weights: str) -> str:
    """What to call the weights that `Source.create` is given."""
    if weights == RANDOM:
        return "random"
    if weights == PRETRAINED:
        cfg = timm.get_pretrained_cfg(source.registered)
        return f"{source.architecture}.{cfg.tag}" if cfg is not None and cfg.tag else source.architecture
    return folder_name(Path(weights)) if Path(weights).exists() else weights


def create_backbone(source: Source, weights: str | None = None, with_classifier: bool = False) -> nn.Module:
    """A network for deployment: its maps at strides 4, 8, 16 and 32, or the whole classifier.

    Args:
        source: what to build.
        weights: as for `Source.create`; None: those of the source's folder.
        with_classifier: the network that returns logits.

    Raises:
        NatsError: no weights are named, or what `Source.create` raises.
    """
    if weights is None and source.folder is None:
        raise NatsError(f"weights: {source.label} is a name, expected pretrained, random, or a model's folder or file")
    weights = weights or str(source.folder)
    if with_classifier:
        return source.create(weights)
    return source.create(weights, features_only=True, out_indices=map_indices(source))


def map_indices(source: Source) -> list[int]:
    """timm's `out_indices` of the network's maps at strides 4, 8, 16 and 32, as far as it has them."""
    return [index for index, stride in _map_strides(source).items() if stride in MAP_STRIDES]


def stage_index(source: Source, stage: int) -> int:
    """timm's `out_indices` entry of the map that stage 1, 2, 3 or 4 ends with, at stride 4, 8, 16 or 32.

    Raises:
        NatsError: no such map.
    """
    strides = _map_strides(source)
    found = [index for index, stride in strides.items() if stride == 2 ** (stage + 1)]
    if not found:
        stages = sorted({stride.bit_length() - 2 for stride in strides.values()})
        raise NatsError(f"stage: {source.name} has maps of the stages {stages}, not of {stage}")
    return found[-1]


def _map_strides(source: Source) -> dict[int, int]:
    with torch.device("meta"):
        info = source.create(features_only=True).feature_info
    return dict(zip(info.out_indices, info.reduction(), strict=True))


def _folder_source(folder: Path) -> Source:
    config = read_config(folder)
    is_detector = "framework" in config
    arguments = {} if is_detector else dict(config.get("model_args") or {})
    data = config_genotype(config)
    arguments.pop("genotype", None)
    name = config.get("backbone") if is_detector else config.get("architecture")
    if name == NATS_ANY:
        name = arguments.pop("architecture", None)
    if not isinstance(name, str) or not timm.is_model(name.partition(".")[0]):
        raise NatsError(f"{folder / CONFIG_NAME}: the architecture {short(name)} is unknown to timm and nats-zoo")
    if data is not None and not is_detector:
        check_backbone(folder)  # that its weights belong to its genotype
    genotype = None if data is None else Genotype.from_dict(data, source=f"{folder / CONFIG_NAME}: genotype")
    name, tag = split_model_name_tag(name)
    return Source(name.removeprefix(VARIANT_PREFIX), tag, genotype, arguments, folder)


@torch.no_grad()
def wake_branches(model: nn.Module) -> None:
    """Undo timm's zero-initialised last batch norms and tiny layer scales.

    At random weights they switch every residual branch off.
    """
    for module in model.modules():
        scales = [module.weight] if isinstance(module, _BatchNorm) else [getattr(module, "gamma", None)]
        for scale in scales:
            if isinstance(scale, nn.Parameter) and scale.abs().max() < ASLEEP:
                scale.fill_(1)
