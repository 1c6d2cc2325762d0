"""What describes a detector: the config that travels with its weights, and what is particular to each framework."""

import dataclasses
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, NamedTuple, get_args, get_origin

from ...base.errors import NatsError, short
from .options import DetectorOptions

PYRAMID_LEVELS = 5
TRAINABLE_LAYERS = 3  # torchvision's default for a pretrained backbone
NORMS = ("frozen", "live", "sync")

# The config may be someone else's: what it may ask for at most. All are far beyond what is of use.
MAX = {
    "num_classes": 2**16,
    "fpn_channels": 2**12,
    "head_size": 2**14,
    "roi_samples": 2**14,
    "mask_channels": 2**12,
    "min_size": 2**13,  # pixels, to which even the smallest image would be enlarged
    "max_size": 2**13,
    "detections": 2**16,
    "trainable_layers": 2**10,
}
MAX_ANCHOR = 2**14  # pixels
MAX_CHARACTERS = 200  # of a class's or the backbone's name
MAX_CHANNELS = 16  # of an image that is normalised
MAX_ID = 2**53  # a category's id: what JSON readers of all languages take


class Framework(NamedTuple):
    """What a framework's config may say.

    Attributes:
        title: its name in papers.
        anchor_sizes: torchvision's default.
        has_masks: True: always, False: never, None: on request.
        first_stride: stride of the pyramid's finest level; it has five levels, each of half the size.
        channel_multiple: of which fpn_channels has to be a multiple.
    """

    title: str
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    has_masks: bool | None = False
    first_stride: int = 4
    channel_multiple: int = 1


FRAMEWORKS = {
    "fasterrcnn": Framework("Faster R-CNN"),
    "maskrcnn": Framework("Mask R-CNN", has_masks=True),
    "cascade_rcnn": Framework("Cascade R-CNN", has_masks=None),
    "retinanet": Framework("RetinaNet", first_stride=8),
    # FCOS has no anchors: a level's size divides its distances, and a level finds objects of 4 to 8 times its size.
    # The head normalises in 32 groups.
    "fcos": Framework("FCOS", anchor_sizes=(8, 16, 32, 64, 128), first_stride=8, channel_multiple=32),
}


@dataclass(frozen=True)
class DetectorConfig(DetectorOptions):
    """All that is needed to build a detector's modules; its JSON form is a detector folder's config.json.

    Beside `DetectorOptions`, whose null, None, stands for the framework's or torchvision's default:

    Attributes:
        num_classes: classes including the background, which is label 0.
        genotype: the genotype's JSON form, or None for a plain network.
        norm: the backbone's batch norms: "frozen" (statistics and affine part), "live", or "sync" (live, with
            statistics over all processes).
        image_mean, image_std: normalisation of RGB images in 0..1.
        classes: names of the labels 1, 2, ...; may be empty.
        category_ids: the data set's ids of the labels 1, 2, ...; may be empty.

    Example:
        >>> config = DetectorConfig("fasterrcnn", "resnet50", num_classes=3, classes=("cat", "dog"))
        >>> DetectorConfig.from_dict(config.to_dict()) == config
    """

    framework: str
    backbone: str
    num_classes: int
    genotype: dict[str, Any] | None = None
    trainable_layers: int = field(default=TRAINABLE_LAYERS, kw_only=True)
    norm: str = "frozen"
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    classes: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.framework not in FRAMEWORKS:
            raise NatsError(f"framework: {short(self.framework)} is unknown, expected one of {', '.join(FRAMEWORKS)}")
        self._resolve_defaults()
        if self.norm not in NORMS:
            raise NatsError(f"norm: expected one of {', '.join(NORMS)}, found {short(self.norm)}")
        self._check_sizes()
        self._check_framework()
        self._check_normalisation()
        self._check_names()
        for key in ("score_thresh", "nms_thresh"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1:
                raise NatsError(f"{key}: expected a number in 0..1, found {short(value)}")

    def _resolve_defaults(self) -> None:
        framework = FRAMEWORKS[self.framework]
        if self.anchor_sizes is None:
            object.__setattr__(self, "anchor_sizes", framework.anchor_sizes)
        if self.masks is None:
            object.__setattr__(self, "masks", bool(framework.has_masks))

    def _check_sizes(self) -> None:
        anchors = self.anchor_sizes or ()
        if len(anchors) != PYRAMID_LEVELS:
            raise NatsError(f"anchor_sizes: expected {PYRAMID_LEVELS}, one per level, found {len(anchors)}")
        if not 1 <= min(anchors) <= max(anchors) <= MAX_ANCHOR:
            wrong = next(size for size in anchors if not 1 <= size <= MAX_ANCHOR)
            raise NatsError(f"anchor_sizes: expected positive numbers, up to {MAX_ANCHOR}, found {short(wrong)}")
        for key, most in MAX.items():
            value = getattr(self, key)
            if value is None and key == "detections":
                continue
            if key == "trainable_layers" and value < 0:
                raise NatsError(f"trainable_layers: expected 0 or more, found {short(value)}")
            if value < (key != "trainable_layers"):
                raise NatsError(f"{key}: expected a positive number, found {short(value)}")
            if value > most:
                raise NatsError(f"{key}: expected at most {most}, found {short(value)}")

    def _check_normalisation(self) -> None:
        mean, std = self.image_mean, self.image_std
        if not 1 <= len(mean) <= MAX_CHANNELS or len(std) != len(mean):
            found = f"{len(mean)} and {len(std)}"
            raise NatsError(f"image_mean, image_std: expected as many numbers as images have channels, found {found}")
        if not all(map(_is_finite, mean)):
            raise NatsError(f"image_mean: expected finite numbers, found {short(mean)}")
        if not all(_is_finite(value) and value > 0 for value in std):
            raise NatsError(f"image_std: expected finite numbers above 0, found {short(std)}")

    def _check_names(self) -> None:
        labels = self.num_classes - 1
        for key in ("classes", "category_ids"):
            if getattr(self, key) and len(getattr(self, key)) != labels:
                raise NatsError(f"{key}: expected {labels}, one per label, or none, found {len(getattr(self, key))}")
        for name in (*self.classes, self.backbone):
            if len(name) > MAX_CHARACTERS or any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
                key = "backbone" if name is self.backbone else "classes"
                expected = f"at most {MAX_CHARACTERS} characters, no line breaks or other control characters"
                raise NatsError(f"{key}: expected {expected}, found {short(name)}")
        if self.category_ids and not all(abs(number) <= MAX_ID for number in self.category_ids):
            raise NatsError(f"category_ids: expected integers of at most {MAX_ID}, found {short(self.category_ids)}")

    def _check_framework(self) -> None:
        framework = FRAMEWORKS[self.framework]
        if framework.has_masks is not None and self.masks != framework.has_masks:
            always = "always" if framework.has_masks else "never"
            raise NatsError(f"masks: {self.framework} {always} finds masks, found {self.masks}")
        if self.fpn_channels % framework.channel_multiple:
            expected = f"a multiple of {framework.channel_multiple}, in groups of which the head of {self.framework}"
            raise NatsError(f"fpn_channels: expected {expected} normalises, found {self.fpn_channels}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "config.json") -> "DetectorConfig":
        """Read strictly; NatsError names the source and the key."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - set(fields))
        if unknown:
            raise NatsError(f"{source}: unknown key {short(unknown[0])}")
        missing = [key for key in ("framework", "backbone", "num_classes") if key not in data]
        if missing:
            raise NatsError(f"{source}: key {missing[0]!r} is missing")
        values = {key: _checked(key, value, fields[key].type, source) for key, value in data.items()}
        try:
            return cls(**values)
        except NatsError as error:
            raise NatsError(f"{source}: {error}") from error


_EXPECTED = {
    bool: "true or false",
    str: "a string",
    int: "an integer",
    float: "a number",
    tuple[int, ...]: "a list of integers",
    tuple[int, int, int, int, int]: "a list of integers",
    tuple[float, ...]: "a list of numbers",
    tuple[str, ...]: "a list of strings",
    dict[str, Any]: "an object",
    NoneType: "null",
}


def _checked(key: str, value: Any, kind: Any, source: str) -> Any:
    """Check a value from JSON against a field's type; lists become tuples."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if not any(_fits(value, one) for one in kinds):
        expected = " or ".join(_EXPECTED[one] for one in kinds)
        raise NatsError(f"{source}: {key}: expected {expected}, found {short(value)}")
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, Mapping)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind  # True is an int to Python, and no number here


def _is_finite(value: float) -> bool:
    """An integer beyond the range of float is not."""
    return abs(value) <= 1e300 and not math.isnan(value)
