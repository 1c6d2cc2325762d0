"""torchvision detectors on timm backbones: building, data, training, COCO evaluation, distribution."""

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
