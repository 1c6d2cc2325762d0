"""torchvision detectors on timm backbones: building, data, training, COCO evaluation, distribution."""

from typing import TYPE_CHECKING

from ..base.lazy import lazy_names

if TYPE_CHECKING:
    from .data.dataset import CocoDataset, DataError
    from .evaluation.coco import evaluate
    from .evaluation.predict import predict
    from .metrics import Metrics
    from .models.config import DetectorConfig
    from .models.create import create_detector
    from .models.folder import from_pretrained, save_detector
    from .training.config import TrainConfig
    from .training.trainer import Trainer

__all__ = [
    "CocoDataset",
    "DataError",
    "DetectorConfig",
    "Metrics",
    "TrainConfig",
    "Trainer",
    "create_detector",
    "evaluate",
    "from_pretrained",
    "predict",
    "save_detector",
]

_MODULES = {
    "data.dataset": "CocoDataset DataError",
    "evaluation.coco": "evaluate",
    "evaluation.predict": "predict",
    "metrics": "Metrics",
    "models.config": "DetectorConfig",
    "models.create": "create_detector",
    "models.folder": "from_pretrained save_detector",
    "training.config": "TrainConfig",
    "training.trainer": "Trainer",
}
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
