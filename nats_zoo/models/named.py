"""What MODEL, --genotype and --weights name: networks of timm and of model folders, and their weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
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
from ..folders.find_genotype import find_genotype
from ..folders.model_folder import BACKBONE, DETECTOR, ModelFolder
from ..folders.weights import fetch_pretrained, weights_overlay
from ..genotype.catalogue import DEFAULT_GENOTYPES
from ..genotype.genotype import Genotype
from ..hub.client import resolve_folder, split_revision
from .saved import check_backbone

RANDOM, PRETRAINED = "random", "pretrained"
MAP_STRIDES = (4, 8, 16, 32)
ASLEEP = 1e-3  # a smaller scale hides a residual branch


@dataclass(frozen=True)
class NamedNetwork:
    """A network that is known by name and not built yet.

    Attributes:
        architecture: timm's name of the plain network, without a tag.
        tag: of its pretrained weights; may be empty.
        genotype: what it runs; None: it is plain.
        arguments: further ones of its constructor, from a folder's config.json.
        folder: the model folder it comes from, or None.

    Example:
        >>> network = find_network("nats_resnet18")
        >>> network.label, network.map_indices()
        ('nats_resnet18', [1, 2, 3, 4])
        >>> body = network.create("pretrained", features_only=True, out_indices=network.map_indices())
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

    def map_strides(self) -> dict[int, int]:
        """The stride of each map that it has, by timm's `out_indices`."""
        return dict(_probe(self.architecture, json.dumps(self.arguments, sort_keys=True))[0])

    def map_indices(self) -> list[int]:
        """timm's `out_indices` of its maps at strides 4, 8, 16 and 32, as far as it has them."""
        return [index for index, stride in self.map_strides().items() if stride in MAP_STRIDES]

    def stage_index(self, stage: int) -> int:
        """timm's `out_indices` entry of the map that stage 1, 2, 3 or 4 ends with, at stride 4, 8, 16 or 32.

        Raises:
            NatsError: no such map.
        """
        strides = self.map_strides()
        found = [index for index, stride in strides.items() if stride == 2 ** (stage + 1)]
        if not found:
            stages = sorted({stride.bit_length() - 2 for stride in strides.values()})
            raise NatsError(f"stage: {self.name} has maps of the stages {stages}, not of {stage}")
        return found[-1]

    def has_fixed_size(self) -> bool:
        """Whether it takes images of one size only."""
        return _probe(self.architecture, json.dumps(self.arguments, sort_keys=True))[1]

    def weights_name(self, weights: str) -> str:
        """What to call the weights that `build` is given."""
        if weights == RANDOM:
            return "random"
        if weights == PRETRAINED:
            cfg = timm.get_pretrained_cfg(self.registered)
            return f"{self.architecture}.{cfg.tag}" if cfg is not None and cfg.tag else self.architecture
        return folder_name(Path(weights)) if Path(weights).exists() else weights

    def build(self, weights: str = RANDOM, **options: Any) -> nn.Module:
        """Build the network with timm, as timm leaves it: in training mode, random residual branches switched off.

        Args:
            weights: "random"; "pretrained" for timm's, which are downloaded unless cached; or the folder, safetensors
                file or Hub repository of a model of the same plain architecture, or of a detector on it.
            **options: go to `timm.create_model`.

        Returns:
            The network; its `genotype` is the Genotype it runs, or None.

        Raises:
            NatsError: weights that can not be fetched or do not fit, or options that the network does not take.
        """
        overlay = None
        if weights == PRETRAINED:
            fetch_pretrained(self.registered)
        elif weights != RANDOM:
            overlay = weights_overlay(self.architecture, weights, self.arguments, headless="features_only" in options)
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
        model = _timm_network(name + tag, pretrained=weights != RANDOM, **{**arguments, **options})
        if overlay is not None:
            model.pretrained_cfg.pop("state_dict")  # loaded by now; it would be kept as a second copy
        vars(model)["genotype"] = self.genotype  # a feature wrapper drops the network's own attribute
        return model

    def create(self, weights: str = RANDOM, **options: Any) -> nn.Module:
        """Build the network for use as it is: as `build`, in evaluation mode, with no branch switched off."""
        model = self.build(weights, **options)
        if weights == RANDOM:
            wake_branches(model)
        return model.eval()

    def deploy(self, weights: str | None = None, with_classifier: bool = False) -> nn.Module:
        """Build it for deployment: its maps at strides 4, 8, 16 and 32, or the whole classifier.

        Args:
            weights: as for `build`; None: those of its folder.
            with_classifier: the network that returns logits.

        Raises:
            NatsError: no weights are named, or what `build` raises.
        """
        if weights is None and self.folder is None:
            raise NatsError(
                f"weights: {self.label} is a name, expected pretrained, random, or a model's folder or file"
            )
        options = {} if with_classifier else {"features_only": True, "out_indices": self.map_indices()}
        return self.create(weights or str(self.folder), **options)


def _timm_network(name: str, **options: Any) -> nn.Module:
    try:
        return timm.create_model(name, **options)
    except NatsError:
        raise
    except (HTTPError, OSError, RuntimeError, AssertionError, TypeError) as error:
        raise NatsError(f"{name}: {one_line(error)}") from error


@lru_cache
def _probe(architecture: str, arguments: str) -> tuple[tuple[tuple[int, int], ...], bool]:
    """Index and stride of each map, and whether images have one size; regrouping changes neither."""
    with torch.device("meta"):
        network = _timm_network(architecture, features_only=True, **json.loads(arguments))
    info = network.feature_info
    strides = tuple(zip(info.out_indices, info.reduction(), strict=True))
    return strides, bool(network.pretrained_cfg.get("fixed_input_size"))


def find_network(name: str, genotype: Genotype | Mapping | str | None = None) -> NamedNetwork:
    """Find what MODEL and --genotype name.

    Args:
        name: timm's, with or without a tag, plain or a nats variant; or the folder or Hub repository (`org/name`,
            `org/name@revision`) of a backbone or detector.
        genotype: what `find_genotype` takes. It takes the place of the one that the network has; of a plain name's or
            a variant's, the default one.

    Raises:
        NatsError: no such network or genotype, or a folder that is no model's.

    Example:
        >>> find_network("resnet50.tv_in1k", "runs/search").name
        'nats_resnet50'
    """
    architecture, tag = split_model_name_tag(name)
    if architecture == NATS_ANY:
        raise NatsError(f"{NATS_ANY}: name the plain architecture instead, and a genotype for it")
    if timm.is_model(architecture):
        network = NamedNetwork(architecture.removeprefix(VARIANT_PREFIX), tag)
        if genotype is None and architecture.startswith(VARIANT_PREFIX):
            genotype = DEFAULT_GENOTYPES.get(network.architecture)
    elif Path(name).exists() or "/" in name or name.startswith(HUB_PREFIX):
        network = _folder_network(ModelFolder.open(resolve_folder(name)))
    else:
        raise NatsError(f"{name}: timm has no such model, and there is no such folder")
    return network if genotype is None else replace(network, genotype=find_genotype(genotype))


def find_nats_network(name: str, genotype: Genotype | Mapping | str | None = None) -> NamedNetwork:
    """As `find_network`, and a plain architecture takes on the default genotype of its variant.

    Raises:
        NatsError: also where there is none.

    Example:
        >>> find_nats_network("resnet18").name
        'nats_resnet18'
    """
    network = find_network(name, genotype)
    if network.genotype is not None:
        return network
    if network.architecture not in DEFAULT_GENOTYPES:
        raise NatsError(f"{name}: {network.architecture} has no default genotype, give one with --genotype")
    return replace(network, genotype=find_genotype(DEFAULT_GENOTYPES[network.architecture]))


def _folder_network(folder: ModelFolder) -> NamedNetwork:
    arguments = {} if folder.kind == DETECTOR else dict(folder.config.get("model_args") or {})
    arguments.pop("genotype", None)
    name = folder.config.get("backbone" if folder.kind == DETECTOR else "architecture")
    if name == NATS_ANY:
        name = arguments.pop("architecture", None)
    if not isinstance(name, str) or not timm.is_model(name.partition(".")[0]):
        raise NatsError(f"{folder.config_path}: the architecture {short(name)} is unknown to timm and nats-zoo")
    if folder.kind == BACKBONE and folder.genotype is not None:
        check_backbone(folder)
    name, tag = split_model_name_tag(name)
    return NamedNetwork(name.removeprefix(VARIANT_PREFIX), tag, folder.genotype, arguments, folder.path)


def genotype_name(genotype: Genotype) -> str:
    """What to call a genotype: its file's name without the suffix, else its model folder's or its architecture's.

    Example:
        >>> genotype_name(find_genotype("nats_resnet18"))
        'resnet18_c_n4_bccd'
    """
    source = genotype.source.partition(": ")[0]
    if source.startswith(HUB_PREFIX):
        return split_revision(source)[0].rpartition("/")[2]
    path = Path(source)
    if path.name == CONFIG_NAME:
        return folder_name(path.parent)
    return path.stem if path.suffix == ".json" else genotype.architecture


def folder_name(folder: Path) -> str:
    """What to call a folder: its name, or that of the repository which the Hub's client has put into it.

    Example:
        >>> folder_name(Path("models--org--name/snapshots/0123"))
        'name'
    """
    storage = folder.parent.parent
    if folder.parent.name == "snapshots" and storage.name.startswith("models--"):
        return storage.name.rpartition("--")[2]
    return folder.resolve().name


@torch.no_grad()
def wake_branches(model: nn.Module) -> None:
    """Undo timm's zero-initialised last batch norms and tiny layer scales, in place.

    At random weights they switch every residual branch off.

    Example:
        >>> model = timm.create_model("resnet18")
        >>> wake_branches(model)
        >>> model.layer1[0].bn2.weight.min().item()
        1.0
    """
    for module in model.modules():
        scales = [module.weight] if isinstance(module, _BatchNorm) else [getattr(module, "gamma", None)]
        for scale in scales:
            if isinstance(scale, nn.Parameter) and scale.abs().max() < ASLEEP:
                scale.fill_(1)
