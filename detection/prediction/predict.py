"""Boxes and masks on images and videos: pictures for people, JSON for programs."""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from ...base.errors import NatsError
from ...base.files import atomic_file, write_json
from ...hub.client import with_revision
from ..data.images import measure_image, open_image
from ..models.folder import from_pretrained
from ..models.mixed_precision import check_precision, mixed_precision
from ..pictures.drawing import draw_detections
from ..runs.config import Precision, check_at_least
from .inputs import find_images, is_video, plan_batches
from .pipeline import Speed, next_chunks, run_ahead
from .video import Frame, VideoInfo, probe_video, read_frames, write_video

JSON_NAME = "predictions.json"
READERS = 2  # threads that decode images
BATCHES_AHEAD = 2  # decoded before the detector asks for them
PICTURES_BEHIND = 4  # still being drawn while the detector goes on


class Picture(NamedTuple):
    """An image, or a frame of a video, and its pixels as detectors take them: (3, H, W) in 0..1."""

    source: Any
    image: Image.Image
    pixels: Tensor


@dataclass(frozen=True)
class _Job:
    """A detector and what is wanted of it."""

    detector: nn.Module
    threshold: float
    labels: frozenset[int] | None
    batch_size: int
    precision: Precision
    draw: bool
    every: int
    speed: Speed

    @property
    def classes(self) -> tuple[str, ...]:
        return self.detector.config.classes

    def setting(self) -> str:
        """What the speed depends on."""
        device = _device(self.detector)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return f"batch {self.batch_size}, {'float32' if self.precision == 'no' else self.precision}, {name}"

    def run(self, pictures: Sequence[Picture]) -> list[dict[str, Tensor]]:
        with self.speed.time_batch(len(pictures)):
            return _run(self.detector, [p.pixels for p in pictures], self.threshold, self.labels, self.precision)

    def draw_output(self, image: Image.Image, output: dict[str, Tensor], **options: Any) -> Image.Image:
        boxes, labels, scores = (output[key] for key in ("boxes", "labels", "scores"))
        return draw_detections(image, boxes, labels, scores, self.classes, 0.0, output.get("masks"), **options)


def predict_images(
    model: str | nn.Module,
    images: Sequence[str],
    output: str = "predictions",
    threshold: float = 0.5,
    classes: Sequence[str] | None = None,
    recursive: bool = False,
    batch_size: int = 1,
    precision: Precision = "no",
    device: str | None = None,
    draw: bool = True,
    every: int = 1,
    revision: str | None = None,
) -> Iterator[str]:
    """Draw what a detector finds on images and videos and write it as JSON.

    Yields one line of text per image or video, and one on the speed. Images are decoded, and drawn, in threads beside
    the detector.

    Args:
        model: a detector, which stays on the device, or its folder or Hub repository, org/name or org/name@revision.
        images: image files, videos (with PyAV: pip install 'nats-zoo[video]'), folders of images, and patterns in
            quotes such as 'photos/**/*.jpg'; the model before them, without --model.
        output: folder for a PNG per image and predictions.json (boxes as x1, y1, x2, y2 in pixels, masks as COCO's run
            lengths), and for an MP4 (without sound) and a JSON file per video.
        threshold: detections with a lower score are left out.
        classes: names of the only classes to look for; default: all.
        recursive: take the images in folders of folders too.
        batch_size: images of the same size in the network that go through it at once; what is found does not depend on
            it, up to rounding.
        precision: 'no' (float32), 'bf16' or 'fp16'.
        device: cpu, cuda, cuda:1; default: a GPU if there is one.
        draw: draw pictures; false: JSON only.
        every: of a video, look at, draw and write only every n-th frame.
        revision: branch, tag or commit of the Hub repository, as after its @.

    Raises:
        NatsError: no such model, image, class or device; a file that is no image or video, or a picture that would
            replace one. Nothing is written before all images were read once.
    """
    model = with_revision(model, revision) if isinstance(model, str) else model
    check_at_least(1, batch_size=batch_size, every=every)
    place = choose_device(device)
    check_precision(precision, place.type)
    files = find_images(images, recursive)
    names = _name_outputs(files, Path(output))
    photos, videos = [f for f in files if not is_video(f)], [f for f in files if is_video(f)]
    infos = {file: probe_video(file) for file in videos}
    sizes = _measure(photos)
    detector = (from_pretrained(model) if isinstance(model, str) else model).to(place).eval()
    speed = Speed("frames" if not photos else "images and frames" if videos else "images")
    labels = _find_labels(classes, detector)
    job = _Job(detector, threshold, labels, batch_size, precision, draw, every, speed)
    Path(output).mkdir(parents=True, exist_ok=True)
    if photos:
        yield from _predict_photos(job, dict(zip(photos, sizes, strict=True)), names, Path(output) / JSON_NAME)
    for file, info in infos.items():
        yield _predict_video(job, file, info, names[file])
    yield speed.line(job.setting())


def detect(
    detector: nn.Module, image: Image.Image, threshold: float = 0.5, precision: Precision = "no"
) -> list[dict[str, Any]]:
    """What a detector finds on one image, best first.

    Returns:
        Dicts of box (x1, y1, x2, y2 in pixels), label (from 1), name (None if the detector knows none), score and,
        if it finds masks, mask (COCO's run lengths: size (height, width), counts).
    """
    (output,) = _run(detector, [to_pixels(image)], threshold, None, precision)
    return _to_rows(output, detector.config.classes)


def draw_found(image: Image.Image, found: Sequence[dict[str, Any]], classes: Sequence[str]) -> Image.Image:
    """Draw what `detect` found on a copy of the image."""
    boxes = torch.tensor([row["box"] for row in found]).reshape(-1, 4)
    labels = torch.tensor([row["label"] for row in found], dtype=torch.int64)
    scores = torch.tensor([row["score"] for row in found])
    has_masks = any("mask" in row for row in found)
    masks = [coco_mask.decode(row["mask"]) for row in found] if has_masks else None
    return draw_detections(image, boxes, labels, scores, classes, threshold=0.0, masks=masks)


def to_pixels(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in 0..1 of an RGB image."""
    return F.to_dtype(F.to_image(image), torch.float32, scale=True)


def choose_device(name: str | None) -> torch.device:
    """The device of this name, or the first GPU if there is one; NatsError if it can not be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ValueError) as error:  # what torch raises depends on how it was built
        raise NatsError(f"device: {name!r} can not be used on this machine, expected cpu, cuda, cuda:1 ...") from error
    return device


# --- the detector -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _run(
    detector: nn.Module, images: Sequence[Tensor], threshold: float, labels: frozenset[int] | None, precision: str
) -> list[dict[str, Tensor]]:
    """What is wanted of a detector's outputs, on the CPU: boxes, labels, scores and, if any, masks, (N, H, W) bool."""
    device = _device(detector)
    with mixed_precision(detector, precision):
        outputs = detector([image.to(device, non_blocking=True) for image in images])
    return [_select(output, threshold, labels) for output in outputs]


def _select(output: dict[str, Tensor], threshold: float, labels: frozenset[int] | None) -> dict[str, Tensor]:
    kept = (output["scores"] >= threshold) & (output["labels"] > 0)  # RetinaNet and FCOS score the background too
    if labels is not None:
        kept &= torch.isin(output["labels"], torch.tensor(sorted(labels), device=kept.device))
    selected = {key: output[key][kept].cpu() for key in ("boxes", "labels", "scores")}
    if "masks" in output:
        selected["masks"] = (output["masks"][kept][:, 0] > 0.5).cpu()
    return selected


def _to_rows(output: dict[str, Tensor], classes: Sequence[str]) -> list[dict[str, Any]]:
    rows = [
        {"box": box, "label": label, "name": classes[label - 1] if label <= len(classes) else None, "score": score}
        for box, label, score in zip(*(output[key].tolist() for key in ("boxes", "labels", "scores")), strict=True)
    ]
    for row, mask in zip(rows, output.get("masks", ()), strict=False):
        row["mask"] = _encode(mask.numpy())
    return rows


def _encode(mask: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


def _device(detector: nn.Module) -> torch.device:
    return next(detector.parameters()).device


def _find_labels(classes: Sequence[str] | None, detector: nn.Module) -> frozenset[int] | None:
    """The labels of these names or numbers; None for all."""
    if classes is None:
        return None
    config = detector.config
    known = {str(label): label for label in range(1, config.num_classes)}
    known |= {name: label for label, name in enumerate(config.classes, start=1)}
    for name in classes:
        if name not in known:
            expected = ", ".join(config.classes) or f"numbers from 1 to {config.num_classes - 1}"
            raise NatsError(f"classes: {name!r} is unknown to this detector, expected some of {expected}")
    return frozenset(known[name] for name in classes)


# --- images -----------------------------------------------------------------------------------------------------------


def _measure(files: Sequence[Path]) -> list[tuple[int, int]]:
    with ThreadPoolExecutor(READERS) as pool:
        sizes = run_ahead(measure_image, files, pool, 2 * READERS)
        return list(tqdm(sizes, desc="check", total=len(files), unit="image", leave=False, disable=None))


def _predict_photos(
    job: _Job, sizes: dict[Path, tuple[int, int]], pictures: dict[Path, Path], target: Path
) -> Iterator[str]:
    files = list(sizes)
    plan = plan_batches(list(sizes.values()), job.batch_size, lambda size: _padded_size(job.detector, size))
    rows: dict[Path, list[dict[str, Any]]] = {}

    def load(indices: list[int]) -> list[Picture]:
        return [_load(files[index], job.speed) for index in indices]

    def finish(found: tuple[Picture, dict[str, Tensor]]) -> str:
        picture, output = found
        rows[picture.source] = _to_rows(output, job.classes)
        said = f"{picture.source}: {_count_boxes(len(output['boxes']), job.threshold)}"
        if not job.draw:
            return said
        with job.speed.time(job.speed.drawing), atomic_file(pictures[picture.source]) as scratch:
            # Deflate's first level: three times as fast as the default one, for a tenth more bytes
            job.draw_output(picture.image, output).save(scratch, format="PNG", compress_level=1)
        return f"{said}, drawn in {pictures[picture.source]}"

    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as drawer:
        batches = run_ahead(load, plan, readers, BATCHES_AHEAD)
        found = (pair for batch in batches for pair in zip(batch, job.run(batch), strict=True))
        lines = run_ahead(finish, found, drawer, PICTURES_BEHIND)
        yield from tqdm(lines, desc="predict", total=len(files), unit="image", leave=False, disable=None)
    write_json(target, {str(file): rows[file] for file in files})


def _load(file: Path, speed: Speed) -> Picture:
    with speed.time(speed.decoding):
        image = open_image(file)
        return Picture(file, image, to_pixels(image))


def _padded_size(detector: nn.Module, size: tuple[int, int]) -> tuple[int, ...]:
    """Height and width that an image of this (width, height) gets by itself in the detector's network."""
    transform = detector.transform
    resized, _ = transform.resize(torch.empty(3, size[1], size[0], device="meta"), None)
    return tuple(-(-side // transform.size_divisible) for side in resized.shape[1:])


def _count_boxes(number: int, threshold: float) -> str:
    if not number:
        return f"no box with a score of {threshold:g} or more"
    return f"{number} {'box' if number == 1 else 'boxes'}"


# --- videos -----------------------------------------------------------------------------------------------------------


def _predict_video(job: _Job, file: Path, info: VideoInfo, target: Path) -> str:
    rate = info.rate / job.every
    frames: list[dict[str, Any]] = []
    with ExitStack() as stack:
        write = stack.enter_context(write_video(target, info, rate)) if job.draw else None

        def finish(found: tuple[Picture, dict[str, Tensor]]) -> None:
            picture, output = found
            frame: Frame = picture.source
            frames.append({"frame": frame.number, "time": frame.time, "found": _to_rows(output, job.classes)})
            if write is not None:
                with job.speed.time(job.speed.drawing):
                    write(frame._replace(image=job.draw_output(picture.image, output, enlarge=False)))

        reader, drawer = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2))
        batches = next_chunks(_load_frames(job, file), job.batch_size, reader, BATCHES_AHEAD)
        found = (pair for batch in batches for pair in zip(batch, job.run(batch), strict=True))
        total = -(-info.frames // job.every) or None
        for _ in tqdm(run_ahead(finish, found, drawer, PICTURES_BEHIND), file.name, total, unit="frame", disable=None):
            pass
    found_in = {"video": str(file), "width": info.width, "height": info.height, "frame_rate": float(rate)}
    write_json(target.with_suffix(".json"), {**found_in, "frames": frames})
    boxes = sum(len(frame["found"]) for frame in frames)
    drawn = f", drawn in {target}" if job.draw else ""
    return f"{file}: {_count_boxes(boxes, job.threshold)} on {len(frames)} frames{drawn}"


def _load_frames(job: _Job, file: Path) -> Iterator[Picture]:
    frames = read_frames(file, job.every)
    while True:
        with job.speed.time(job.speed.decoding):
            frame = next(frames, None)
            if frame is None:
                return
            picture = Picture(frame, frame.image, to_pixels(frame.image))
        yield picture


# --- names ------------------------------------------------------------------------------------------------------------


def _name_outputs(files: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """A PNG for each image, an MP4 for each video; files of the same name in several folders get a number."""
    inputs = {file.resolve() for file in files}
    taken: set[Path] = {folder / JSON_NAME}
    names: dict[Path, Path] = {}
    for file in files:
        stems = itertools.chain([file.stem], (f"{file.stem}_{number}" for number in itertools.count(2)))
        for stem in stems:
            made = [folder / f"{stem}{suffix}" for suffix in ((".mp4", ".json") if is_video(file) else (".png",))]
            if not taken.intersection(made):
                break
        replaced = [path for path in made if path.resolve() in inputs]
        if replaced:
            what = "is one of the images and would be replaced"
            raise NatsError(f"{replaced[0]}: {what}; choose another output folder")
        taken.update(made)
        names[file] = made[0]
    return names
