"""What a training takes beyond what every run does."""

from dataclasses import dataclass
from typing import Literal

from ...base.errors import NatsError
from ..runs.config import RunConfig, check_at_least


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Train a detector on boxes, and on masks where the framework finds them.

    The defaults are the field's 1x recipe for COCO; recipes/small_data.yaml is for some hundred images. The output
    folder receives model/ (the last weights), best/ (of the highest box AP on val_split), log.jsonl, curves.png,
    metrics.json and checkpoints/.

    Args:
        init: folder or Hub repository (org/name, org/name@revision) of a trained detector to go on from: all of it,
            and its class head for the classes that have the same name in the data. Its config then stands for
            framework, backbone, genotype, masks, anchor_sizes and the sizes of the heads, which can not be changed. Its
            min_size, max_size, trainable_layers, norm, roi_samples, score_thresh, nms_thresh and detections can: they
            hold as far as these options are left at their defaults. weights and calibration_images are not needed.
        genotype: what the variant runs: a published name, a file, the folder of a search, or the Hub repository of a
            genotype or model (hf-hub:org/name); null: the variant's default.
        norm: batch norm of the backbone, 'frozen', 'live', or 'sync': live, with statistics over all processes, on
            GPUs; null: frozen, or live in a random backbone.
        epochs: times through the training split.
        lr_per_image: learning rate, multiplied by the images of a step (over all processes).
        momentum: of SGD.
        weight_decay: of SGD.
        warmup_steps: the learning rate grows linearly over this many steps.
        lr_schedule: after the warm-up: 'steps', or 'cosine' to zero at the last step.
        lr_steps: epochs after which 'steps' divides the learning rate by 10.
        flip: probability of mirroring an image left and right.
        vertical_flip: probability of mirroring an image top and bottom.
        jitter: strength of brightness, contrast and saturation jitter, 0 to 1.
        train_min_sizes: in training, min_size is drawn from these for each image; empty: as in evaluation.
        ema: decay of an exponential moving average of the weights, for instance 0.999, which grows to it over the first
            steps; evaluation, best/ and model/ are then of the averaged weights. null: none.
        eval_every: epochs between evaluations on val_split.
        early_stop: end the run after so many evaluations without a higher AP; null: never.

    Example:
        >>> config = TrainConfig(data="my_data", output="runs/nats", genotype="runs/search", epochs=12)
        >>> Trainer(config).run()
    """

    val_split: str | None = "val"
    init: str | None = None
    backbone: str = "nats_resnet50"
    genotype: str | None = None
    norm: Literal["frozen", "live", "sync"] | None = None
    epochs: int = 13
    lr_per_image: float = 0.00125
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int = 500
    lr_schedule: Literal["steps", "cosine"] = "steps"
    lr_steps: tuple[int, ...] = (8, 11)
    flip: float = 0.5
    vertical_flip: float = 0.0
    jitter: float = 0.0
    train_min_sizes: tuple[int, ...] = ()
    ema: float | None = None
    eval_every: int = 1
    early_stop: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, epochs=self.epochs, eval_every=self.eval_every, early_stop=self.early_stop)
        check_at_least(1, train_min_sizes=min(self.train_min_sizes, default=None))
        check_at_least(0, lr_per_image=self.lr_per_image, warmup_steps=self.warmup_steps)
        check_at_least(0, momentum=self.momentum, weight_decay=self.weight_decay)
        if self.ema is not None and not 0 < self.ema < 1:
            raise NatsError(f"ema: expected a decay between 0 and 1, found {self.ema}")
        if self.early_stop is not None and self.val_split is None:
            raise NatsError("early_stop: needs a val_split, on which AP is measured")
