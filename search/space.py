"""What the search may choose from: candidate dilations per stage, and groups of output channels."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import timm
from timm.models.resnet import BasicBlock
from torch import nn

from ..base.errors import NatsError, short
from ..base.files import read_yaml
from ..genotype.runs import PLAIN, Dilation
from ..networks.stages import searchable_convs
from ..networks.timm_network import meta_network
from ..networks.transform import architecture_of


class SearchError(NatsError):
    """A search space or a network that can not be searched."""


@dataclass(frozen=True)
class SearchSpace:
    """Candidate dilations (height, width) per stage of the backbone.

    Attributes:
        name: as provenance and the command call it.
        candidates: by stage (2: layer2, the paper's stage 3); the first of each is the plain dilation.

    Example:
        >>> space = SearchSpace("wide", {3: ((1, 1), (1, 3)), 4: ((1, 1), (1, 3), (1, 5))})
        >>> convs = searched_convs(timm.create_model("resnet50"), space)
    """

    name: str
    candidates: Mapping[int, tuple[Dilation, ...]]

    def __post_init__(self) -> None:
        for stage, dilations in self.candidates.items():
            if not dilations or dilations[0] != PLAIN or len(set(dilations)) != len(dilations):
                raise SearchError(f"space {self.name}: stage {stage}: expected different dilations that begin with 1")


def _square(*dilations: int) -> tuple[Dilation, ...]:
    return tuple(Dilation(d, d) for d in dilations)


_TALL_AND_WIDE_3 = (Dilation(1, 3), Dilation(3, 1))
_TALL_AND_WIDE_5 = (Dilation(1, 5), Dilation(5, 1))
_C_EARLY = _square(1, 2, 3) + _TALL_AND_WIDE_3

# The paper's spaces.
SPACES = {
    space.name: space
    for space in (
        SearchSpace("A", {2: _square(1, 3), 3: _square(1, 3), 4: _square(1, 3, 5)}),
        SearchSpace("B", {2: _square(1, 2, 3), 3: _square(1, 2, 3), 4: _square(1, 2, 3, 4, 5)}),
        SearchSpace("C", {2: _C_EARLY, 3: _C_EARLY, 4: _square(1, 2, 3, 4, 5) + _TALL_AND_WIDE_3 + _TALL_AND_WIDE_5}),
    )
}


def find_space(space: str | os.PathLike) -> SearchSpace:
    """One of the paper's spaces by its name, or one's own from a YAML file.

    The file maps stages to candidates; a number is the same dilation in both directions:

        2: [1, 2, [1, 3], [3, 1]]
        3: [1, 2, 3]
        4: [1, 2, 3, 5]

    Raises:
        SearchError: no such name or file, or a malformed one.

    Example:
        >>> find_space("C").candidates[2]  # ((1, 1), (2, 2), (3, 3), (1, 3), (3, 1))
    """
    if space in SPACES:
        return SPACES[space]
    path = Path(space)
    if not path.is_file():
        raise SearchError(f"space: {space}: expected {', '.join(SPACES)} or a YAML file")
    content = read_yaml(path, SearchError)
    if not isinstance(content, dict) or not content or not all(type(stage) is int for stage in content):
        raise SearchError(f"{path}: expected stages (2: layer2, ...) with lists of candidates")
    return SearchSpace(path.stem, {stage: _read_candidates(found, stage, path) for stage, found in content.items()})


def _read_candidates(candidates: Any, stage: int, path: Path) -> tuple[Dilation, ...]:
    if not isinstance(candidates, list):
        raise SearchError(f"{path}: {short(stage)}: expected a list of candidates, found {short(candidates)}")
    try:
        return tuple(Dilation.check(found if isinstance(found, list) else [found, found]) for found in candidates)
    except NatsError as error:
        expected = "expected numbers or [height, width]"
        raise SearchError(f"{path}: {short(stage)}: {expected}, found {short(candidates)}") from error


def searched_convs(
    body: nn.Module,
    space: SearchSpace,
    convs: Sequence[str] = (),
    basic_block: Literal["conv2", "both"] = "conv2",
) -> dict[str, tuple[Dilation, ...]]:
    """The convolutions that are searched, with their candidates, in network order.

    Of a ResNet that is one for each residual block of the space's stages: a Bottleneck's middle 3x3, as in the paper,
    and a BasicBlock's second (of stride 1), or both on request. Of any other network, all that `searchable_convs`
    finds in those stages.

    Args:
        body: a timm network, `features_only` or not.
        space: stages and candidates.
        convs: names, or patterns with * and ?, instead of that choice; a `features_only` network's own names.
        basic_block: which of a BasicBlock's two convolutions.

    Raises:
        SearchError: no such convolution, or one in a stage for which the space has no candidates.
    """
    stage_of = {name: stage for stage, names in searchable_convs(body).items() for name in names}
    if convs:
        wanted = _matching(stage_of, convs)
        outside = [name for name in wanted if stage_of[name] not in space.candidates]
        if outside:
            stage = stage_of[outside[0]]
            raise SearchError(f"convs: {outside[0]} is in stage {stage}, space {space.name} has no candidates for it")
    else:
        modules = dict(body.named_modules())
        wanted = [n for n in stage_of if stage_of[n] in space.candidates and _is_default(modules, n, basic_block)]
    if not wanted:
        stages = ", ".join(map(str, sorted(space.candidates)))
        raise SearchError(f"backbone: {type(body).__name__} has no convolution to search in the stages {stages}")
    return {name: space.candidates[stage_of[name]] for name in wanted}


def _matching(names: Mapping[str, int], patterns: Sequence[str]) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(list(names)[:3])
            raise SearchError(f"convs: {pattern!r} matches no convolution that can be searched, such as {known}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _is_default(modules: Mapping[str, nn.Module], name: str, basic_block: str) -> bool:
    owner, _, own_name = name.rpartition(".")
    is_first_of_two = isinstance(modules[owner], BasicBlock) and own_name == "conv1"
    return basic_block == "both" or not is_first_of_two


def genotype_names(body: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """What a genotype calls convolutions: the names of the network that timm's `features_only` wrapper took apart.

    Args:
        body: a timm network, `features_only` or not.
        names: convolutions of it.

    Returns:
        The genotype's name by the body's.

    Raises:
        SearchError: a convolution that can not be told among those of timm's network.
    """
    architecture = architecture_of(body)
    if architecture is None or not timm.is_model(architecture):
        return {name: name for name in names}
    plain = meta_network(architecture)
    flat = {_flat(name): name for name, module in plain.named_modules() if isinstance(module, nn.Conv2d)}
    found = {}
    for name in names:
        original = flat.get(_flat(name)) or flat.get(_flat(name.partition(".")[2]))
        if original is None:
            raise SearchError(f"{name}: {architecture} has no convolution of this name")
        found[name] = original
    return found


def _flat(name: str) -> str:
    """Wrappers join the parts of a name with an underscore."""
    return name.replace(".", "_")


def count_groups(conv: nn.Conv2d, name: str, groups: int | None, channels_per_group: int | None) -> int:
    """How many groups a convolution's output channels are split into.

    Args:
        conv: the convolution.
        name: what error messages call it.
        groups: N groups in every convolution; or
        channels_per_group: groups of C channels each. Exactly one of the two is given.

    Raises:
        SearchError: a split that does not divide the channels, or cuts a cardinality group.
    """
    divisor = channels_per_group if groups is None else groups
    if divisor is None or None not in (groups, channels_per_group):
        raise SearchError("groups and channels_per_group: give exactly one of the two")
    if divisor < 1 or conv.out_channels % divisor:
        asked = f"{groups} groups" if groups is not None else f"groups of {channels_per_group} channels"
        raise SearchError(f"{name}: its {conv.out_channels} output channels can not be split into {asked}")
    size = divisor if groups is None else conv.out_channels // divisor
    cardinality_group = conv.out_channels // conv.groups
    if conv.groups > 1 and size % cardinality_group:
        raise SearchError(f"{name}: groups of {size} channels cut its cardinality groups of {cardinality_group}")
    return conv.out_channels // size
