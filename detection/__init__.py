"""torchvision detectors on timm backbones: building, data, training, COCO evaluation, distribution."""

from .data.dataset import CocoDataset, DataError
from .evaluation.coco import Metrics, evaluate, predict
from .models.config import DetectorConfig
from .models.create import create_detector
from .models.folder import from_pretrained, save_detector
from .training.trainer import TrainConfig, Trainer

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
