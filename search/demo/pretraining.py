"""A tiny classifier on small drawn images: what ImageNet's weights are to a detector."""

import math
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ...base.files import atomic_folder
from ...detection.data.relations import DIRECTIONS, relation_images

BATCH = 64
LEARNING_RATE = 0.1
WARMUP = 20  # steps


def pretrain(folder: Path, architecture: str = "test_resnet", images: int = 8000, seed: int = 0) -> Path:
    """Train a classifier of directions on close pairs in images of 64 pixels, once through them.

    Args:
        folder: receives the network as timm saves it; whole or not at all.
        architecture: timm's name of it.
        images: how many are drawn.
        seed: of the images and the weights.

    Returns:
        The folder, which `create_detector` takes as `weights`.

    Example:
        create_detector("fasterrcnn", "test_resnet", 9, weights=str(pretrain(Path("classifier"))))
    """
    torch.manual_seed(seed)
    network = timm.create_model(architecture, num_classes=len(DIRECTIONS))
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)
    drawn, steps = relation_images(images, seed=seed), images // BATCH
    for step in tqdm(range(steps), desc="classifier", unit="step", dynamic_ncols=True):
        warmup = min(1.0, (step + 1) / WARMUP)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
        pixels, directions = zip(*(next(drawn) for _ in range(BATCH)), strict=True)
        inputs = normalised(torch.stack([torch.from_numpy(image) for image in pixels]), network.pretrained_cfg)
        loss = F.cross_entropy(network(inputs), torch.tensor(directions))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with atomic_folder(folder) as scratch:
        save_for_hf(network, str(scratch), safe_serialization=True)
    return folder


def normalised(grey: Tensor, pretrained_cfg: dict) -> Tensor:
    """(N, H, W) uint8 grey images as a timm network takes them, (N, 3, H, W)."""
    mean, std = (torch.tensor(pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (grey[:, None] / 255 - mean) / std
