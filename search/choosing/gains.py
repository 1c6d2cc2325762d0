"""Scale: a gain per run, so that the pretrained batch norms fit a regrouped network from the first step."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...base.errors import GenotypeError
from ...genotype.genotype import Genotype
from ...genotype.runs import PLAIN, Run
from ...networks.batch_norm import evaluation_mode
from ...networks.regrouped_conv import RegroupedConv2d
from ...networks.transform import architecture_of, check_architecture
from ..space import SearchError, genotype_names
from ..supernet.searched_conv import Moments

# A variance below this share of the mean square is rounding noise of a constant output.
NOISE = 1e-12


def calibrate_gains(body: nn.Module, genotype: Genotype, batches: Iterable[Tensor]) -> Genotype:
    """Calibrate a genotype's gains on the pretrained plain network.

    A run's gain is the standard deviation of the plain convolution's output over that of the same channels at the
    run's dilation, both on the plain network's own input of that convolution. Over the channels of a run variances
    are averaged: gain = sqrt(mean_c var(plain_c) / mean_c var(dilated_c)), where var is a channel's over all images
    and positions. So a run's mean output variance is the one that the pretrained batch norm behind it divides by;
    the means that another dilation shifts stay shifted. Runs at the plain dilation have a gain of 1, as have those
    whose output does not vary.

    One pass through the plain network and, for each convolution that the genotype changes, one at its dilations.

    Args:
        body: the plain network with the weights that retraining starts from, `features_only` or not; not the
            supernet. It runs in evaluation mode and stays as it is.
        genotype: its earlier gains do not matter.
        batches: images (N, 3, H, W) as the network sees them, normalised.

    Returns:
        The genotype with gains, of six digits, for every convolution that has a run at another dilation, and in its
        provenance `gains`: how many `images`, and their `size`, [H, W], of the largest if they differ.

    Raises:
        GenotypeError: a genotype that does not fit the network, or a network that is regrouped already.
        SearchError: no batch, or outputs that are not finite.

    Example:
        >>> body = timm.create_model("resnet50", pretrained=True)
        >>> calibrate_gains(body, Genotype.load("runs/search/genotype.json"), batches).save("gains.json")
    """
    convs = _convs(body, genotype)
    changed = {name: runs for name, runs in genotype.convs.items() if set(runs.counts()) != {PLAIN}}
    if not changed:
        provenance = {key: value for key, value in genotype.provenance.items() if key != "gains"}
        return replace(genotype, gains={}, provenance=provenance)
    pairs = {name: _Pair(convs[name], runs, f"{genotype.source}: {name}") for name, runs in changed.items()}
    images, size = _run(body, pairs.values(), batches)
    gains = {name: pair.gains() for name, pair in pairs.items()}
    provenance = {**genotype.provenance, "gains": {"images": images, "size": size}}
    return replace(genotype, gains=gains, provenance=provenance)


class _Pair:
    """A plain convolution and its regrouped form, with the moments of both outputs."""

    def __init__(self, conv: nn.Conv2d, runs: tuple[Run, ...], name: str):
        self.name, self.runs = name, runs
        self.conv = conv
        self.regrouped = RegroupedConv2d.from_conv(conv, runs, name=name)
        self.plain_moments, self.moments = Moments(), Moments()

    def look(self, _conv: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """A forward hook of the plain convolution."""
        self.plain_moments.update(output)
        self.moments.update(self.regrouped(inputs[0]))

    def gains(self) -> tuple[float, ...]:
        """One per run."""
        if not self.plain_moments.count:
            raise SearchError(f"{self.name}: no image came through it, so its gains can not be calibrated")
        sizes = [run.channels for run in self.runs]
        variances = _variances(self.plain_moments, sizes), _variances(self.moments, sizes)
        return tuple(
            1.0 if run.dilation == PLAIN else self._gain(plain, dilated)
            for run, plain, dilated in zip(self.runs, *variances, strict=True)
        )

    def _gain(self, plain: float, dilated: float) -> float:
        if plain == 0 or dilated == 0:
            return 1.0
        gain = (plain / dilated) ** 0.5
        if not 0 < gain < float("inf"):  # NaN too
            raise SearchError(f"{self.name}: its outputs are not finite on these images, so it has no gains")
        return float(f"{gain:.6g}")


def _variances(moments: Moments, sizes: list[int]) -> list[float]:
    """Mean variance of the channels of each run."""
    variance = moments.var
    variance = variance.masked_fill(variance <= NOISE * (variance + moments.mean**2), 0)
    return [part.mean().item() for part in variance.split(sizes)]


def _convs(body: nn.Module, genotype: Genotype) -> dict[str, nn.Conv2d]:
    """The network's convolutions by the genotype's names."""
    architecture = architecture_of(body)
    if architecture is not None:
        check_architecture(genotype, architecture)
    convs = {name: module for name, module in body.named_modules() if isinstance(module, nn.Conv2d)}
    for name, module in convs.items():
        if isinstance(module, RegroupedConv2d):
            raise GenotypeError(f"{genotype.source}: {name} is regrouped; gains are calibrated on the plain network")
    found = {name: convs[own] for own, name in genotype_names(body, list(convs)).items()}
    for name in genotype.convs:
        if name not in found:
            raise GenotypeError(f"{genotype.source}: the network has no convolution named {name!r}")
    return found


@torch.no_grad()
def _run(body: nn.Module, pairs: Iterable[_Pair], batches: Iterable[Tensor]) -> tuple[int, list[int]]:
    """Send the batches through the network; returns how many images there were, and the largest height and width."""
    weight = next(body.parameters())
    images, height, width = 0, 0, 0
    handles = [pair.conv.register_forward_hook(pair.look) for pair in pairs]
    try:
        with evaluation_mode(body):
            for batch in batches:
                body(batch.to(weight))
                images += len(batch)
                height, width = max(height, batch.shape[2]), max(width, batch.shape[3])
    finally:
        for handle in handles:
            handle.remove()
    if not images:
        raise SearchError("gains: no batch of images came, so there is nothing to calibrate on")
    return images, [height, width]
