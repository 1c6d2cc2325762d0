"""torchvision detectors on timm backbones: building, data, training, COCO evaluation, distribution."""
