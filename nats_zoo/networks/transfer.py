"""Transfer: one architecture's genotype on another, by stage, relative depth and relative channel position."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ..base.errors import GenotypeError
from ..genotype.genotype import Genotype, method_of_networks
from ..genotype.runs import PLAIN, Runs
from ..version import __version__
from .stages import searchable_convs
from .timm_network import meta_network
from .transform import architecture_of, transform

METHOD = "transfer"  # provenance's `method` of what comes out

Item = TypeVar("Item")


class _Conv(NamedTuple):
    name: str
    channels: int  # output channels
    units: int  # what takes a dilation as a whole: a cardinality group, or a channel


@method_of_networks
def transfer(genotype: Genotype, architecture: str) -> Genotype:
    """See `Genotype.transfer`.

    >>> transfer(Genotype.load("resnet50.json"), "resnet101").save("resnet101.json")
    """
    source = meta_network(genotype.architecture, what=genotype.source, error=GenotypeError)
    target = meta_network(architecture, what=genotype.source, error=GenotypeError)
    source_stages, target_stages = _blocks(source), _blocks(target)
    transform(source, genotype)  # raises what does not fit
    name = architecture_of(target) or architecture
    if name == architecture_of(source):
        return genotype
    if not target_stages:
        raise GenotypeError(f"{genotype.source}: {name} has no convolution that can be regrouped")
    convs: dict[str, Runs] = {}
    for stage, blocks in target_stages.items():
        convs |= _transfer_stage(genotype, source_stages.get(stage, []), blocks)
    used = {conv.name for blocks in source_stages.values() for block in blocks for conv in block}
    provenance = _provenance(genotype, name, left_out=sorted(set(genotype.convs) - used))
    transferred = Genotype(name, convs, provenance=provenance, source=f"{genotype.source} transferred to {name}")
    transform(target, transferred)  # raises what this network refuses
    return transferred


def _blocks(model: nn.Module) -> dict[int, list[list[_Conv]]]:
    """The convolutions that can be regrouped: by stage, then by block (their parent module), in network order."""
    stages: dict[int, list[list[_Conv]]] = {}
    for stage, names in searchable_convs(model).items():
        blocks: dict[str, list[_Conv]] = {}
        for name in names:
            conv = model.get_submodule(name)
            units = conv.groups if conv.groups > 1 else conv.out_channels
            blocks.setdefault(name.rpartition(".")[0], []).append(_Conv(name, conv.out_channels, units))
        stages[stage] = list(blocks.values())
    return stages


def _transfer_stage(genotype: Genotype, sources: list[list[_Conv]], targets: list[list[_Conv]]) -> dict[str, Runs]:
    convs = {}
    for target_block, source_block in _paired(targets, sources):
        for target, source in _paired(target_block, source_block):
            if source.name in genotype.convs:
                units = _paired(range(target.units), genotype.convs[source.name].per_channel())
                runs = Runs.of((dilation for _, dilation in units), each=target.channels // target.units)
                if set(runs.counts()) != {PLAIN}:
                    convs[target.name] = runs
    return convs


def _paired(targets: Sequence[Item], sources: Sequence[Any]) -> Iterable[tuple[Item, Any]]:
    """Each target with the source at its relative position: target j of m has source floor((j + 0.5) / m * n) of n."""
    if not sources:
        return []
    m, n = len(targets), len(sources)
    return [(target, sources[(2 * j + 1) * n // (2 * m)]) for j, target in enumerate(targets)]


def _provenance(genotype: Genotype, architecture: str, left_out: list[str]) -> dict[str, Any]:
    provenance: dict[str, Any] = {"method": METHOD, "source_architecture": genotype.architecture}
    if genotype.source.endswith(".json"):  # it was read from a file; what the folder is called is nobody's business
        name = Path(genotype.source).name
        provenance |= {
            "source_genotype": name.removesuffix(".json"),
            "command": f"Genotype.load({name!r}).transfer({architecture!r})",
        }
    provenance |= {
        "source_fingerprint": genotype.fingerprint(),
        "version": __version__,
        "note": f"Not searched: the genotype of {genotype.architecture} on {architecture}, by stage, relative depth and"
        " relative channel position.",
    }
    if genotype.gains:
        provenance["gains"] = f"dropped: they were calibrated on the weights of {genotype.architecture}"
    if left_out:
        provenance["left_out"] = left_out
    return provenance | {"source_provenance": dict(genotype.provenance)}
