"""Inception Convolution's published pattern files (arXiv 2012.13587), read as genotypes."""

import os
import re
from pathlib import Path
from typing import Any

from torch import nn

from ..base.errors import GenotypeError
from ..base.files import read_json
from ..base.reading import Reader
from ..genotype.genotype import MAX_FILE_BYTES, Genotype, method_of_networks, read_run
from ..genotype.runs import Runs
from .timm_network import meta_network


@method_of_networks
def from_ic_conv(path: str | os.PathLike, architecture: str) -> Genotype:
    """See `Genotype.from_ic_conv`.

    >>> from_ic_conv("r50.json", "resnet50").save("mine.json")
    """
    patterns = read_json(path, GenotypeError, MAX_FILE_BYTES)
    sizes = _stage_convs_3x3(architecture, str(path))
    if not isinstance(patterns, list) or len(patterns) != len(sizes):
        found = f"{len(patterns)} patterns" if isinstance(patterns, list) else type(patterns).__name__
        expected = f"a list of {len(sizes)} patterns, one per 3x3 convolution of {architecture}"
        raise GenotypeError(f"{path}: expected {expected}, found {found}")
    convs = {name: _runs(pattern, name, *sizes[name], str(path)) for name, pattern in zip(sizes, patterns, strict=True)}
    provenance = {"method": "ic_conv", "note": f"converted from the pattern file {Path(path).name}"}
    return Genotype(architecture, convs, provenance=provenance, source=str(path))


def _stage_convs_3x3(architecture: str, source: str) -> dict[str, tuple[int, int]]:
    """Output channels and cardinality groups of a timm network's 3x3 convolutions, in network order, without stem."""
    model = meta_network(architecture, what=source, error=GenotypeError)
    stages = tuple(info["module"] for info in model.feature_info[1:])
    return {
        name: (module.out_channels, module.groups)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and name.startswith(stages)
    }


def _runs(pattern: Any, name: str, out_channels: int, groups: int, source: str) -> Runs:
    found, read = [], Reader(source, GenotypeError)
    for key, channels in read.object(pattern, f"the pattern of {name}").items():
        extra = re.fullmatch(r"\(([0-9]{1,3}), ?([0-9]{1,3})\)", key)
        if not extra:
            raise read.wrong(name, "keys like '(0, 1)'", key)
        if type(channels) is int and channels == 0:
            continue  # the published files list every pattern, used or not
        found.append(read_run(read, [channels, int(extra[1]) + 1, int(extra[2]) + 1], name))
    runs = Runs(found)
    if runs.channels == groups > 1:
        return Runs(run._replace(channels=run.channels * out_channels // groups) for run in runs)
    if runs.channels != out_channels:
        expected = f"{out_channels} channels" if groups == 1 else f"{out_channels} channels or {groups} groups"
        raise GenotypeError(f"{source}: {name}: its pattern adds up to {runs.channels}, expected {expected}")
    return runs
