"""Detection backbones with searched dilations, as timm models.

Importing this package registers the `nats_*` variants with timm. `nats_zoo.detection` and `nats_zoo.search` are
imported on first use.
"""

import importlib
from types import ModuleType

from .base.errors import GenotypeError, NatsError
from .genotype.catalogue import published_genotypes
from .genotype.genotype import Genotype
from .genotype.runs import Run
from .models import nats_any, nats_resnet  # registers the variants
from .models.saved import from_pretrained
from .models.transform import transform
from .networks.batch_norm import recalibrate_bn
from .networks.regrouped_conv import RegroupedConv2d
from .networks.stages import searchable_convs
from .networks.transform import to_plain
from .publishing.backbone import save_backbone
from .publishing.genotype import save_genotype_folder
from .publishing.publish import publish
from .version import __version__

_LAZY_PACKAGES = ("detection", "search")

__all__ = [
    "Genotype",
    "GenotypeError",
    "NatsError",
    "RegroupedConv2d",
    "Run",
    "__version__",
    "from_pretrained",
    "nats_any",
    "nats_resnet",
    "publish",
    "published_genotypes",
    "recalibrate_bn",
    "save_backbone",
    "save_genotype_folder",
    "searchable_convs",
    "to_plain",
    "transform",
]


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY_PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
