"""Detection backbones with searched dilations, as timm models.

Importing this package registers the `nats_*` variants with timm. What publishes, `nats_zoo.detection` and
`nats_zoo.search` are imported on first use.
"""

from typing import TYPE_CHECKING

from .base.errors import GenotypeError, NatsError
from .base.lazy import lazy_names
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
from .version import __version__

if TYPE_CHECKING:
    from .publishing.backbone import save_backbone
    from .publishing.genotype import save_genotype_folder
    from .publishing.publish import publish

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

_MODULES = {
    "publishing.backbone": "save_backbone",
    "publishing.genotype": "save_genotype_folder",
    "publishing.publish": "publish",
    "detection": "",
    "search": "",
}
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
