"""A detector's options, declared once: for the config that travels with weights, for runs and `create_detector`."""

from dataclasses import dataclass, field, fields

FIXED = {"fixed": True}  # metadata of what the weights belong to; all else can be changed on a trained detector


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """How a detector is built, beside its weights and classes.

    Args:
        framework: 'fasterrcnn', 'maskrcnn', 'cascade_rcnn', 'retinanet' or 'fcos'.
        masks: find masks too, for which cascade_rcnn can be asked; null: as the framework does by itself.
        backbone: timm model name, plain (resnet50) or a variant (nats_resnet50), with a tag if wanted.
        fpn_channels: channels of the feature pyramid, and of the heads of RetinaNet and FCOS.
        head_size: width of the two hidden layers of an R-CNN's box heads.
        roi_samples: regions per image on which an R-CNN's box heads are trained; fewer make small machines faster.
        mask_channels: channels of the mask head's four convolutions.
        trainable_layers: stages of the backbone that are trained, from its end; null: 3, or all of a random backbone.
        min_size: short side of the resized images, in pixels, unless the long side would then exceed max_size.
        max_size: limit on the long side.
        anchor_sizes: side of the anchors in pixels of the resized image, one per level of the pyramid (RetinaNet: of
            the smallest of three; FCOS: the unit of a level's distances, which finds objects of 4 to 8 times that
            size); null: the framework's.
        score_thresh: detections with a lower score are not given; null: torchvision's.
        nms_thresh: of two detections of a class with a higher IoU only the better one is given; null: torchvision's.
        detections: most detections per image; null: torchvision's.

    Example:
        >>> options = DetectorOptions(framework="retinanet", backbone="nats_resnet50", min_size=512)
        >>> detector = create_detector(num_classes=4, **dataclasses.asdict(options))
    """

    framework: str = field(metadata=FIXED)
    masks: bool | None = field(default=None, metadata=FIXED)
    backbone: str = field(metadata=FIXED)
    fpn_channels: int = field(default=256, metadata=FIXED)
    head_size: int = field(default=1024, metadata=FIXED)
    roi_samples: int = 512
    mask_channels: int = field(default=256, metadata=FIXED)
    trainable_layers: int | None = None
    min_size: int = 800
    max_size: int = 1333
    anchor_sizes: tuple[int, int, int, int, int] | None = field(default=None, metadata=FIXED)
    score_thresh: float | None = None
    nms_thresh: float | None = None
    detections: int | None = None


DETECTOR_OPTIONS = tuple(option.name for option in fields(DetectorOptions))
FIXED_OPTIONS = tuple(option.name for option in fields(DetectorOptions) if option.metadata.get("fixed"))
