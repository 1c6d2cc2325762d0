"""torchvision detectors on timm backbones: building, data, training, COCO evaluation, distribution."""

from .coco_eval import Metrics, evaluate, predict
from .datasets import CocoDataset, DataError
from .detector_config import DetectorConfig
from .detector_folder import from_pretrained, save_detector
from .detectors import create_detector
from .trainer import TrainConfig, Trainer

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
