"""What the search may choose from: candidate dilations per stage, and groups of output channels."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ..errors import NatsError
from ..genotype import PLAIN, Dilation

_STAGE = re.compile(r"(?:^|\.)layer(\d)\.")


class SearchError(NatsError):
    """A search space or a network that can not be searched."""


@dataclass(frozen=True)
class SearchSpace:
    """Candidate dilations (height, width) per stage of the backbone.

    Attributes:
        name: as provenance and the command call it.
        candidates: by stage (2: layer2, the paper's stage 3); the first of each is the plain dilation.
    """

    name: str
    candidates: Mapping[int, tuple[Dilation, ...]]

    def __post_init__(self) -> None:
        for stage, dilations in self.candidates.items():
            if not dilations or dilations[0] != PLAIN or len(set(dilations)) != len(dilations):
                raise SearchError(f"space {self.name}: stage {stage}: expected different dilations that begin with 1")


def _square(*dilations: int) -> tuple[Dilation, ...]:
    return tuple((d, d) for d in dilations)


_TALL_AND_WIDE_3: tuple[Dilation, ...] = ((1, 3), (3, 1))
_TALL_AND_WIDE_5: tuple[Dilation, ...] = ((1, 5), (5, 1))
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


def searched_convs(body: nn.Module, space: SearchSpace) -> dict[str, tuple[Dilation, ...]]:
    """The convolutions that the paper searches, with their candidates, in network order.

    That is conv2 of each residual block of the space's stages: a Bottleneck's middle 3x3, a BasicBlock's second
    (one 3x3 per block, of stride 1).

    Args:
        body: a timm ResNet or its `features_only` form.
        space: stages and candidates.

    Raises:
        SearchError: no such convolution.
    """
    found = {f"{name}.conv2": space.candidates[stage] for name, stage in _blocks(body) if stage in space.candidates}
    if not found:
        raise SearchError(f"backbone: {type(body).__name__} has no residual blocks in layer2 to layer4 to search")
    return found


def _blocks(body: nn.Module) -> Iterator[tuple[str, int]]:
    for name, module in body.named_modules():
        stage = _STAGE.search(name)
        if stage and isinstance(module, BasicBlock | Bottleneck):
            yield name, int(stage.group(1))


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
    if (groups is None) == (channels_per_group is None):
        raise SearchError("groups and channels_per_group: give exactly one of the two")
    divisor = groups if groups is not None else channels_per_group
    if divisor < 1 or conv.out_channels % divisor:
        asked = f"{groups} groups" if groups is not None else f"groups of {channels_per_group} channels"
        raise SearchError(f"{name}: its {conv.out_channels} output channels can not be split into {asked}")
    size = conv.out_channels // groups if groups is not None else channels_per_group
    cardinality_group = conv.out_channels // conv.groups
    if conv.groups > 1 and size % cardinality_group:
        raise SearchError(f"{name}: groups of {size} channels cut its cardinality groups of {cardinality_group}")
    return conv.out_channels // size
