"""torchvision's detectors on timm backbones, described by a config that travels with the weights."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead

from ..batch_norm import recalibrate_bn
from ..errors import NatsError
from ..genotype import Genotype
from .backbone import BackboneWithFPN, create_body, freeze_stages

ROI_RESOLUTION = 7
PYRAMID_LEVELS = 5
ALL_LAYERS = 99  # more stages than any network has
TRAINABLE_LAYERS = 3  # torchvision's default for a pretrained backbone


@dataclass(frozen=True)
class DetectorConfig:
    """All that is needed to build a detector's modules; its JSON form is a detector folder's config.json.

    Attributes:
        framework: one of `FRAMEWORKS`.
        backbone: timm model name.
        num_classes: classes including the background, which is label 0.
        genotype: the genotype's JSON form, or None for a plain network.
        fpn_channels: channels of the feature pyramid.
        head_size: width of the box head's two hidden layers.
        roi_samples: regions per image on which the box head is trained.
        trainable_layers: stages of the backbone, from the end, that are trained.
        norm: "frozen" or "live": whether the backbone's batch norms keep their statistics and affine part.
        min_size, max_size: the image is resized so that its short side is min_size pixels, unless its long side
            would then exceed max_size.
        anchor_sizes: side of the anchors in pixels of the resized image, one per pyramid level.
        image_mean, image_std: normalisation of RGB images in 0..1.
        classes: names of the labels 1, 2, ...; may be empty.
        category_ids: the data set's ids of the labels 1, 2, ...; may be empty.
    """

    framework: str
    backbone: str
    num_classes: int
    genotype: dict[str, Any] | None = None
    fpn_channels: int = 256
    head_size: int = 1024
    roi_samples: int = 512
    trainable_layers: int = TRAINABLE_LAYERS
    norm: str = "frozen"
    min_size: int = 800
    max_size: int = 1333
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    classes: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.framework not in FRAMEWORKS:
            raise NatsError(f"framework: {self.framework!r} is unknown, expected one of {', '.join(FRAMEWORKS)}")
        if self.norm not in ("frozen", "live"):
            raise NatsError(f"norm: expected 'frozen' or 'live', found {self.norm!r}")
        if len(self.anchor_sizes) != PYRAMID_LEVELS:
            raise NatsError(f"anchor_sizes: expected {PYRAMID_LEVELS}, one per level, found {len(self.anchor_sizes)}")
        sizes = ("num_classes", "fpn_channels", "head_size", "roi_samples", "min_size", "max_size")
        small = [name for name in sizes if getattr(self, name) < 1]
        if small:
            raise NatsError(f"{small[0]}: expected a positive number, found {getattr(self, small[0])}")
        if self.trainable_layers < 0:
            raise NatsError(f"trainable_layers: expected 0 or more, found {self.trainable_layers}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "config.json") -> "DetectorConfig":
        """Read strictly; NatsError names the source and the key."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - set(fields))
        if unknown:
            raise NatsError(f"{source}: unknown key {unknown[0]!r}")
        missing = [key for key in ("framework", "backbone", "num_classes") if key not in data]
        if missing:
            raise NatsError(f"{source}: key {missing[0]!r} is missing")
        values = {key: _checked(key, value, fields[key].type, source) for key, value in data.items()}
        try:
            return cls(**values)
        except NatsError as error:
            raise NatsError(f"{source}: {error}") from error


def create_detector(
    framework: str = "fasterrcnn",
    backbone: str = "nats_resnet50",
    num_classes: int = 91,
    genotype: Genotype | Mapping | str | None = None,
    weights: str | None = "pretrained",
    *,
    trainable_layers: int | None = None,
    norm: str | None = None,
    calibration: Iterable | None = None,
    **options: Any,
) -> nn.Module:
    """Build a torchvision detector on a timm backbone.

    Args:
        framework: one of `FRAMEWORKS`.
        backbone: any timm model with feature maps at strides 4, 8, 16 and 32, plain or a nats variant.
        num_classes: classes including the background, label 0.
        genotype: the backbone's genotype; None: the variant's default, or a plain network for a plain name.
        weights: the backbone's: "pretrained" for timm's ImageNet weights, a folder, safetensors file or Hub
            repository of a timm model of the same architecture or a detector on it, or None for random ones.
        trainable_layers: stages trained, from the end; None: 3 of a pretrained backbone, all of a random one.
        norm: "frozen" or "live" batch norm; None: frozen in a pretrained backbone, live in a random one.
        calibration: training batches, lists of (3, H, W) images in 0..1 or tuples that begin with one; the backbone's
            batch norms are recalibrated on them, at training size, before they are frozen. A regrouped pretrained
            backbone needs it: other dilations have other statistics.
        **options: further fields of `DetectorConfig`: fpn_channels, head_size, roi_samples, min_size, max_size,
            anchor_sizes, image_mean, image_std (default: those the weights were trained with), classes, category_ids.

    Returns:
        The detector. Training: `detector(images, targets)` gives a dict of losses; evaluation: `detector(images)` a
        list of dicts with boxes (XYXY, pixels), labels and scores. Its `config` is a DetectorConfig.

    Raises:
        NatsError: an unknown framework, backbone, option or weights, or freezing of random weights.
    """
    if trainable_layers is None:
        trainable_layers = ALL_LAYERS if weights is None else TRAINABLE_LAYERS
    body = create_body(backbone, genotype, weights)
    config = DetectorConfig.from_dict(
        {
            "framework": framework,
            "backbone": backbone,
            "num_classes": num_classes,
            "genotype": body.genotype.to_dict() if body.genotype else None,
            "trainable_layers": trainable_layers,
            "norm": norm or ("live" if weights is None else "frozen"),
            "image_mean": body.pretrained_cfg["mean"],
            "image_std": body.pretrained_cfg["std"],
            **options,
        },
        source="create_detector",
    )
    detector = assemble(config, body)
    if calibration is not None:
        recalibrate_backbone(detector, calibration)
    freeze(detector)
    if weights is None and (config.norm == "frozen" or not all(p.requires_grad for p in body.parameters())):
        raise NatsError(
            "weights: freezing batch norms or stages of a random backbone ruins it; freeze only loaded ones"
        )
    return detector


def build_detector(config: DetectorConfig) -> nn.Module:
    """A detector of this config with random weights, to load a state dict into."""
    return freeze(assemble(config, create_body(config.backbone, config.genotype)))


def assemble(config: DetectorConfig, body: nn.Module) -> nn.Module:
    """Put a framework's modules around a feature extractor; nothing frozen yet."""
    detector = FRAMEWORKS[config.framework](config, BackboneWithFPN(body, config.fpn_channels))
    detector.config = config
    return detector


def freeze(detector: nn.Module) -> nn.Module:
    """Freeze the batch norms and stages that the detector's config says; statistics must be right by now."""
    config: DetectorConfig = detector.config
    backbone = detector.backbone
    if config.norm == "frozen":
        backbone.body = freeze_batch_norm_2d(backbone.body)
    freeze_stages(backbone.body, config.trainable_layers)
    return detector


def resized_batches(detector: nn.Module, loader: Iterable) -> Iterator[Tensor]:
    """The tensors (N, 3, H, W) that the backbone sees: normalised and resized by the detector's own transform."""
    device = next(detector.parameters()).device
    for batch in loader:
        images = batch[0] if isinstance(batch, tuple) else batch
        yield detector.transform([image.to(device) for image in images])[0].tensors


def recalibrate_backbone(detector: nn.Module, loader: Iterable) -> None:
    """Remeasure the live batch norms of a detector's backbone; nothing to do in one without batch norm."""
    body = detector.backbone.body
    if any(isinstance(module, _BatchNorm) for module in body.modules()):
        recalibrate_bn(body, resized_batches(detector, loader))


def _faster_rcnn(config: DetectorConfig, backbone: BackboneWithFPN) -> FasterRCNN:
    roi_size = config.fpn_channels * ROI_RESOLUTION**2
    return FasterRCNN(
        backbone,
        min_size=config.min_size,
        max_size=config.max_size,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in config.anchor_sizes), ((0.5, 1.0, 2.0),) * len(config.anchor_sizes)
        ),
        box_batch_size_per_image=config.roi_samples,
        box_head=TwoMLPHead(roi_size, config.head_size),
        box_predictor=FastRCNNPredictor(config.head_size, config.num_classes),
    )


FRAMEWORKS = {"fasterrcnn": _faster_rcnn}


_EXPECTED = {
    str: "a string",
    int: "an integer",
    tuple[int, ...]: "a list of integers",
    tuple[float, ...]: "a list of numbers",
    tuple[str, ...]: "a list of strings",
    dict[str, Any] | None: "an object or null",
}


def _checked(key: str, value: Any, kind: Any, source: str) -> Any:
    """Check a value from JSON against a field's type; lists become tuples."""
    if not _fits(value, kind):
        raise NatsError(f"{source}: {key}: expected {_EXPECTED[kind]}, found {value!r}")
    return tuple(value) if get_origin(kind) is tuple else value


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_fits(item, get_args(kind)[0]) for item in value)
    if kind in (int, float):
        return type(value) is int or type(value) is kind  # True is an int to Python, and no number here
    return isinstance(value, str) if kind is str else value is None or isinstance(value, Mapping)
