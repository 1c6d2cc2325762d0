"""The public door to regrouping: any network with any genotype."""

import os
from collections.abc import Mapping

from torch import nn

from ..folders.find_genotype import find_genotype
from ..genotype.genotype import Genotype
from ..networks import transform as networks


def transform(model: nn.Module, genotype: Genotype | Mapping | str | os.PathLike) -> nn.Module:
    """Regroup the convolutions that a genotype names, in place; all of them or, on an error, none.

    Weights stay where they are: the state dict's keys and shapes do not change. timm's ResNet and RepVGG blocks become
    subclasses of themselves with a deployment form, for `timm.utils.reparameterize_model`. `to_plain` undoes it all.

    Args:
        model: a timm network (before `features_only` wrapping, which renames convolutions in some), or any module
            whose convolutions bear the genotype's names.
        genotype: whatever `find_genotype` takes: a Genotype, its JSON form, a name, a file, a folder, a repository.

    Returns:
        The same model.

    Raises:
        NatsError: no such genotype; then or else a GenotypeError: another architecture, an unknown convolution, runs
            that do not fit it, a convolution with hooks or inside a block that rebuilds it for deployment, or a network
            that is regrouped already.

    Example:
        >>> model = nats_zoo.transform(timm.create_model("regnety_032"), "mine.json")
        >>> model.load_state_dict(timm.create_model("regnety_032", pretrained=True).state_dict())
    """
    return networks.transform(model, find_genotype(genotype))
