"""The genotypes that come with the package, and which of them a variant takes by default."""

from pathlib import Path

from ..base.errors import GenotypeError
from ..base.names import VARIANT_PREFIX

# Published genotype files never change: a better one is a new file and a new line here.
DEFAULT_GENOTYPES: dict[str, str] = {
    "resnet18": "resnet18_c_n4_bccd",
    "resnet34": "resnet34_transfer_c_n4_bccd",
    "resnet50": "resnet50_c_n16_bccd",
    "resnet101": "resnet101_transfer_c_n16_bccd",
    "resnet152": "resnet152_transfer_c_n16_bccd",
    "resnext50_32x4d": "resnext50_32x4d_transfer_c_n16_bccd",
    "resnext101_32x4d": "resnext101_32x4d_transfer_c_n16_bccd",
    "resnext101_32x8d": "resnext101_32x8d_transfer_c_n16_bccd",
    "wide_resnet50_2": "wide_resnet50_2_transfer_c_n16_bccd",
    "resnet50d": "resnet50d_transfer_c_n16_bccd",
    "seresnet50": "seresnet50_transfer_c_n16_bccd",
}
GENOTYPE_DIR = Path(__file__).parent / "published"


def default_genotype(architecture: str) -> str:
    """Name the published genotype that a variant runs unless told otherwise; `architecture` is the plain one.

    >>> default_genotype("resnet50")
    'resnet50_c_n16_bccd'
    """
    if architecture not in DEFAULT_GENOTYPES:
        raise GenotypeError(f"{VARIANT_PREFIX}{architecture}: no default genotype is published yet, pass genotype=")
    return DEFAULT_GENOTYPES[architecture]


def published_genotypes() -> list[str]:
    """List the names of the genotypes that come with the package.

    >>> "resnet50_c_n16_bccd" in published_genotypes()
    True
    """
    return sorted(path.stem for path in GENOTYPE_DIR.glob("*.json"))
