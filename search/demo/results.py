"""What the demo ends in: figures of each arm, one table, and pictures that show which directions are named wrongly."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou

from ...base.files import read_json, write_json, write_text
from ...base.text import text_table
from ...detection.data.dataset import CocoDataset
from ...detection.data.formats.coco import find_split
from ...detection.data.relations import DIRECTIONS, centred_image
from ...detection.evaluation.evaluate import evaluate_model
from ...detection.models.folder import from_pretrained
from ...detection.pictures.drawing import load_font
from ...detection.pictures.sheet import comparison_sheet
from ...genotype.genotype import Genotype
from ...networks.erf import plain_and_nats_fields
from ...pictures.genotype_chart import genotype_chart
from ...pictures.style import save_png

TITLES = {"plain": "plain", "random": "random dilations", "nats": "NATS"}
SHOWN_IMAGES = 4
ENLARGED = 2
RIGHT, WRONG = "#56B4E9", "#D55E00"  # told apart with any colour vision
TIMED_RUNS = 12
SMOOTHED = 7  # pixels


def evaluate_arms(folder: Path, arms: Sequence[str]) -> dict[str, dict[str, float]]:
    """Figures of each arm's detector on the test images, in results.json; and the pictures."""
    data = folder / "data"
    dataset = CocoDataset(*find_split(data, "test"))
    detectors = {arm: from_pretrained(folder / arm / "model").eval() for arm in arms}
    figures = {}
    for arm, detector in detectors.items():
        metrics = evaluate_model(str(folder / arm / "model"), str(data), batch_size=8, output=str(folder / arm))
        figures[arm] = {
            "ap": metrics.ap or 0.0,
            "right": 100 * share_right(dataset, read_json(folder / arm / "results.json")),
            "parameters": sum(parameter.numel() for parameter in detector.parameters()),
            "multiply_adds": multiply_adds(detector, dataset[0][0]),
        }
    for arm, milliseconds in _time(detectors, dataset[0][0]).items():
        figures[arm]["milliseconds"] = milliseconds
    draw_arms(dataset, {arm: read_json(folder / arm / "results.json") for arm in arms}, folder / "detections.png")
    genotype_chart(Genotype.load(folder / "search" / "genotype.json"), folder / "genotype.png")
    draw_fields(detectors["nats"], folder / "receptive_fields.png")
    write_json(folder / "results.json", figures)
    return figures


def share_right(dataset: CocoDataset, results: Sequence[Mapping[str, Any]], iou: float = 0.5) -> float:
    """Share of the objects that are called by their own class: by the best-scored box with at least this IoU.

    Args:
        dataset: the ground truth.
        results: detections in COCO's form.
        iou: least overlap of a detection with its object.
    """
    answers = [named for index in range(len(dataset)) for named in _answers(dataset, index, results, iou)]
    return sum(row is not None and row["category_id"] == label for label, _, row in answers) / max(1, len(answers))


def _answers(
    dataset: CocoDataset, index: int, results: Sequence[Mapping[str, Any]], iou: float = 0.5
) -> list[tuple[int, Tensor, Mapping[str, Any] | None]]:
    """Of each object in an image: its class's id, its box, and the detection that names it."""
    target = dataset[index][1]
    rows = [row for row in results if row["image_id"] == int(target["image_id"])]
    found = box_convert(torch.tensor([row["bbox"] for row in rows]).reshape(-1, 4), "xywh", "xyxy")
    answers = []
    for box, label in zip(target["boxes"].as_subclass(Tensor), target["labels"].tolist(), strict=True):
        overlaps = box_iou(box[None].float(), found.float())[0]
        near = [row for row, overlap in zip(rows, overlaps.tolist(), strict=True) if overlap >= iou]
        answers.append((dataset.category_ids[label - 1], box, max(near, key=lambda row: row["score"], default=None)))
    return answers


@torch.no_grad()
def multiply_adds(detector: nn.Module, image: Tensor) -> float:
    """Of the backbone's convolutions on one image."""
    total = 0

    def count(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal total
        total += output[0, 0].numel() * module.weight.numel()

    body = detector.backbone.body
    handles = [m.register_forward_hook(count) for m in body.modules() if getattr(m, "weight", torch.ones(0)).dim() == 4]
    body(detector.transform([image])[0].tensors)
    for handle in handles:
        handle.remove()
    return total


@torch.no_grad()
def _time(detectors: Mapping[str, nn.Module], image: Tensor) -> dict[str, float]:
    """Milliseconds of each detector's backbone on one image: the least of several runs, in turn."""
    best = dict.fromkeys(detectors, float("inf"))
    for _ in range(TIMED_RUNS):
        for arm, detector in detectors.items():
            pixels = detector.transform([image])[0].tensors
            start = time.perf_counter()
            detector.backbone.body(pixels)
            best[arm] = min(best[arm], 1000 * (time.perf_counter() - start))
    return best


def draw_arms(dataset: CocoDataset, results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Test images, one row each: where the arms' detectors say that the dark partner lies, right or wrong."""
    chosen = [arm for arm in results if arm != "random"]
    images = [Image.open(dataset.path(index)).convert("RGB") for index in range(SHOWN_IMAGES)]
    columns = {"the images": [_enlarge(image) for image in images]}
    for arm in chosen:
        columns[f"{TITLES[arm]}: blue right, red wrong"] = [
            _draw_answers(image, _answers(dataset, index, results[arm]), dataset.category_ids)
            for index, image in enumerate(images)
        ]
    comparison_sheet(columns, path)


def _enlarge(image: Image.Image) -> Image.Image:
    return image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST)


def _draw_answers(image: Image.Image, answers: Sequence[tuple], category_ids: Sequence[int]) -> Image.Image:
    """Boxes around what was found, each with an arrow in the direction that its class says."""
    canvas = _enlarge(image)
    draw = ImageDraw.Draw(canvas)
    for category, _, row in answers:
        if row is None:
            continue
        x, y, width, height = (value * ENLARGED for value in row["bbox"])
        colour = RIGHT if row["category_id"] == category else WRONG
        draw.rectangle((x, y, x + width, y + height), outline=colour, width=3)
        direction = category_ids.index(row["category_id"])
        centre = np.array([x + width / 2, y + height / 2])
        angle = 2 * np.pi * direction / len(DIRECTIONS)
        way = np.array([np.cos(angle), np.sin(angle)])
        tip, across = centre + 90 * way, np.array([-way[1], way[0]])
        draw.line([*(centre + 24 * way), *(tip - 10 * way)], fill=colour, width=5)
        corners = (tip, tip - 18 * way + 9 * across, tip - 18 * way - 9 * across)
        draw.polygon([tuple(corner) for corner in corners], colour)
        # On the side of the box that the arrow does not take, and inside the image.
        below = way[1] < 0
        place = min(max(0.0, x), canvas.width - 80.0), y + height + 2 if below else max(0.0, y - 24)
        text = f"{DIRECTIONS[direction]} {row['score']:.2f}"
        draw.text(place, text, colour, load_font(18), stroke_width=2, stroke_fill="black")
    return canvas


def draw_fields(detector: nn.Module, path: Path, level: int = 2) -> None:
    """The receptive fields of the plain and of the regrouped network, with the same weights, over an image.

    The image has a bright blob in its centre, where the network looks, and a dark one at the data's spacing.
    """
    size = detector.transform.min_size[0]
    image = centred_image((54, 54), size)
    figure = Figure(figsize=(9.0, 4.9), layout="compressed")
    fields = plain_and_nats_fields(detector.backbone.body, size, level=level)
    for axes, title, field in zip(figure.subplots(1, 2), ("plain", "NATS"), fields, strict=True):
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)
        smooth = F.avg_pool2d(field[None], SMOOTHED, 1, SMOOTHED // 2)[0]
        reach = ((smooth / smooth.max()) ** (1 / 3)).numpy()  # what is far is faint
        axes.imshow(reach, cmap="magma", alpha=np.clip(1.2 * reach, 0, 0.75))
        axes.set_title(f"{title}: where layer3 looks, the same weights", fontsize=10)
        axes.set_axis_off()
    save_png(figure, path)


def write_results(folder: Path, arms: Sequence[str]) -> str:
    """table.txt and results.csv from results.json; returns the table with the files' names."""
    figures = read_json(folder / "results.json")
    columns = {
        "AP": "{ap:.1f}",
        "classes right": "{right:.0f}%",
        "parameters": "{parameters:,}",
        "multiply-adds": "{multiply_adds:,}",
        "ms": "{milliseconds:.1f}",
    }
    rows = [("", *columns)]
    rows += [(TITLES[arm], *(cell.format(**figures[arm]) for cell in columns.values())) for arm in arms]
    table = "\n".join(text_table(rows, "<", ">"))
    write_text(folder / "table.txt", table + "\n")
    names = list(figures[arms[0]])
    records = [("arm", *names), *((arm, *(f"{figures[arm][key]:.6g}" for key in names)) for arm in arms)]
    write_text(folder / "results.csv", "".join(",".join(record) + "\n" for record in records))
    shown = {
        "detections.png": "in which direction the detectors see the dark partner, plain and NATS side by side",
        "genotype.png": "the dilations that the search found",
        "receptive_fields.png": "how far the plain and the NATS network look, over an image",
        "search/report/report.md": "the search on one page",
    }
    notes = "\n".join(f"{folder / name}: {content}" for name, content in shown.items())
    chance = 100 / len(DIRECTIONS)
    return f"{table}\n\nclasses right: chance is {chance:.1f}%. ms: the backbone on one image, this machine.\n\n{notes}"
