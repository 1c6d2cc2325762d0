"""Boxes on images: pictures for people, JSON for programs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from ..errors import NatsError
from ..files import atomic_file, write_json
from .drawing import draw_detections
from .hub import from_pretrained

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def predict_images(model: str, images: Sequence[str], output: str, threshold: float) -> Iterator[str]:
    """Draw and write a detector's boxes; yields one line of text per image.

    Args:
        model: a detector's folder or Hub repository.
        images: image files and folders of images.
        output: folder for NAME.png per image and predictions.json.
        threshold: boxes with a lower score are left out.

    Raises:
        NatsError: no such model or image, a file that is no image, or a picture that would replace an image. Nothing
            is written before all images were read once.
    """
    files = find_images(images)
    folder = Path(output)
    pictures = _name_pictures(files, folder)
    for file in tqdm(files, desc="check", unit="image", leave=False, disable=None):
        open_image(file)
    detector = from_pretrained(model)
    detector.to("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    predictions = {}
    for file, picture in zip(tqdm(files, desc="predict", unit="image"), pictures, strict=True):
        image = open_image(file)
        found = detect(detector, image, threshold)
        with atomic_file(picture) as scratch:
            draw_found(image, found, detector.config.classes).save(scratch, format="PNG")
        predictions[str(file)] = found
        yield f"{file}: {len(found)} boxes, drawn in {picture}"
    write_json(folder / "predictions.json", predictions)


def find_images(paths: Sequence[str]) -> list[Path]:
    """The image files among these files and in these folders; NatsError names what is none."""
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise NatsError(f"{path}: no images in this folder")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise NatsError(f"{path}: no such image or folder")
    return files


def open_image(path: Path) -> Image.Image:
    """An RGB image, upright as its EXIF orientation says; NatsError names a file that is none."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # all seen from broken files
        raise NatsError(f"{path}: can not be decoded as an image") from error


@torch.no_grad()
def detect(detector: nn.Module, image: Image.Image, threshold: float) -> list[dict[str, Any]]:
    """A detector's boxes on one image, best first.

    Returns:
        Dicts of box (x1, y1, x2, y2 in pixels), label (from 1), name (None if the detector knows none) and score.
    """
    device = next(detector.parameters()).device
    output = detector([F.to_dtype(F.to_image(image), torch.float32, scale=True).to(device)])[0]
    classes = detector.config.classes
    rows = zip(output["boxes"].tolist(), output["labels"].tolist(), output["scores"].tolist(), strict=True)
    return [
        {"box": box, "label": label, "name": classes[label - 1] if label <= len(classes) else None, "score": score}
        for box, label, score in rows
        if score >= threshold
    ]


def draw_found(image: Image.Image, found: Sequence[dict[str, Any]], classes: Sequence[str]) -> Image.Image:
    """Draw what `detect` found on a copy of the image."""
    boxes = torch.tensor([row["box"] for row in found]).reshape(-1, 4)
    labels = torch.tensor([row["label"] for row in found], dtype=torch.int64)
    scores = torch.tensor([row["score"] for row in found])
    return draw_detections(image, boxes, labels, scores, classes, threshold=0.0)


def _name_pictures(files: list[Path], folder: Path) -> list[Path]:
    """A PNG for each file; files of the same name in several folders get a number."""
    images = {file.resolve() for file in files}
    pictures: dict[Path, None] = {}
    for file in files:
        picture, number = folder / f"{file.stem}.png", 2
        while picture in pictures:
            picture, number = folder / f"{file.stem}_{number}.png", number + 1
        if picture.resolve() in images:
            raise NatsError(f"{picture}: is one of the images and would be replaced; choose another output folder")
        pictures[picture] = None
    return list(pictures)
