"""Augmentation for detectors. Resizing and normalising are not here: torchvision's detectors do both themselves."""

import torch
from torchvision.transforms import v2

from ...base.errors import NatsError


def train_transforms(flip: float = 0.5, vertical_flip: float = 0.0, jitter: float = 0.0) -> v2.Compose:
    """Transforms of (image, target) for training.

    Flips and jitter leave every box valid, so no box is removed.

    Args:
        flip: probability of mirroring left and right.
        vertical_flip: probability of mirroring top and bottom, for images without an up (aerial, microscopy).
        jitter: brightness, contrast and saturation change by factors of up to 1 - jitter to 1 + jitter.

    Raises:
        NatsError: one of the three is not in 0..1.
    """
    for name, value in (("flip", flip), ("vertical_flip", vertical_flip), ("jitter", jitter)):
        if not 0 <= value <= 1:
            raise NatsError(f"{name}: expected a number in 0..1, found {value}")
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(flip),
            v2.RandomVerticalFlip(vertical_flip),
            v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )


def eval_transforms() -> v2.Compose:
    """Transforms of (image, target) for evaluation: pixels become float32 in 0..1."""
    return v2.Compose([v2.ToDtype(torch.float32, scale=True)])
