"""Options that training and search share."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ...base.errors import NatsError
from ..models.config import FRAMEWORKS
from ..models.options import DetectorOptions

Precision = Literal["no", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What a run reads, and where it writes.

    Args:
        data: folder of a data set, or YOLO's data.yaml.
        output: folder for everything the run writes.
        format: of the data set: 'coco' (annotations/instances_SPLIT.json), 'voc' or 'yolo'; null: told by looking.
        images: folder of the images, if it is not found by itself; relative to `data` or absolute.
        train_split: split to train on.
        val_split: split to evaluate on; null: no evaluation.
        skip_bad: leave out and count entries of the data set that can not be used, instead of refusing them.
        transpose: swap rows and columns of all images and boxes, in evaluation too: the data set's transposed twin.
    """

    data: str
    output: str
    format: Literal["coco", "voc", "yolo"] | None = None
    images: str | None = None
    train_split: str = "train"
    val_split: str | None = None
    skip_bad: bool = False
    transpose: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig(DetectorOptions, DataOptions):
    """Data, detector and run.

    Args:
        weights: the backbone's weights: 'pretrained' for timm's, a folder, safetensors file or Hub repository of a
            timm model of the same architecture or of a detector on it, or null for random ones.
        calibration_images: training images on which batch norms are recalibrated before they are frozen; 0: as they
            come with the weights.
        batch_size: images that go through the network at once, per process.
        accumulate: batches per step and process, one after the other; the last step of an epoch takes what is left.
            The learning rate counts the images of all of them.
        eval_batch_size: images per evaluation batch and process; AP moves a little with it (padding).
        channels_last: keep the detector in torch's channels_last memory format; often faster.
        clip_grad: largest norm of the gradient; null: no clipping.
        precision: 'no' (float32), 'bf16' or 'fp16'; null: what `accelerate config` says.
        workers: data loading processes.
        seed: of everything random.
        checkpoint_every: steps between checkpoints; null: one per epoch.
        tensorboard: also write what is logged as TensorBoard scalars, to OUTPUT/tensorboard.
        resume: continue the run in the output folder, if there is one.
    """

    framework: Literal["fasterrcnn", "maskrcnn", "cascade_rcnn", "retinanet", "fcos"] = "fasterrcnn"
    weights: str | None = "pretrained"
    calibration_images: int = 64
    batch_size: int = 2
    accumulate: int = 1
    eval_batch_size: int = 1
    channels_last: bool = False
    clip_grad: float | None = 10.0
    precision: Precision | None = None
    workers: int = 2
    seed: int = 0
    checkpoint_every: int | None = None
    tensorboard: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, batch_size=self.batch_size, accumulate=self.accumulate)
        check_at_least(1, eval_batch_size=self.eval_batch_size)
        check_at_least(1, checkpoint_every=self.checkpoint_every)
        check_at_least(0, workers=self.workers, calibration_images=self.calibration_images, clip_grad=self.clip_grad)
        if self.tensorboard:
            check_tensorboard()

    @property
    def wants_masks(self) -> bool:
        """Whether the detector learns masks."""
        if self.masks is not None or self.framework not in FRAMEWORKS:  # which is refused where it is built
            return bool(self.masks)
        return bool(FRAMEWORKS[self.framework].has_masks)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def check_at_least(least: int, **options: float | None) -> None:
    """NatsError for an option below `least`; None passes."""
    for name, value in options.items():
        if value is not None and value < least:
            raise NatsError(f"{name}: expected {least} or more, found {value}")


def check_tensorboard() -> None:
    """NatsError without TensorBoard, which is an optional dependency."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise NatsError("tensorboard: needs the package tensorboard: pip install 'nats-zoo[tracking]'") from error
