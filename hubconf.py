"""Entry points for `torch.hub`.

    torch.hub.list("org/nats-zoo")
    print(torch.hub.help("org/nats-zoo", "fasterrcnn"))
    backbone = torch.hub.load("org/nats-zoo", "nats_resnet50", pretrained=True)
    detector = torch.hub.load("org/nats-zoo", "fasterrcnn", backbone="nats_resnet50", num_classes=21, pretrained=True)
    detector = torch.hub.load("org/nats-zoo", "pretrained_detector", "org/fasterrcnn-nats-resnet50")

All names without an underscore are entry points. Everything but the standard library is imported inside them, so that
torch.hub can list and explain them before anything is installed.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import pathlib
import re
import sys
import types
import typing
import warnings

# What torch.hub itself checks and then names without a version. The rest `_check_packages` does better.
dependencies = ["torch"]

_ROOT = pathlib.Path(__file__).resolve().parent
_FOLDERS = {"nats_zoo.detection": _ROOT / "detection", "nats_zoo.search": _ROOT / "search"}

_IMPORT_NAMES = {"huggingface-hub": "huggingface_hub", "pillow": "PIL", "pyyaml": "yaml"}
_FOR_DETECTORS = {"pycocotools", "accelerate", "matplotlib"}
_FOR_THE_COMMAND = {"jsonargparse"}


# --- Packages ---------------------------------------------------------------------------------------------------------


def _check_packages(unneeded: set[str]) -> None:
    """Raise an ImportError that names each missing or too old package and the command that installs them."""
    lacking = {}
    for name, floor in _requirements().items():
        found = None if name in unneeded else _installed_version(name)
        if found == "":
            lacking[f"{name}>={floor}"] = "is not installed"
        elif found is not None and _numbers(found) < _numbers(floor):
            lacking[f"{name}>={floor}"] = f"is {found}"
    if lacking:
        problems = ", ".join(f"{requirement.partition('>=')[0]} {state}" for requirement, state in lacking.items())
        command = " ".join(f'"{requirement}"' for requirement in lacking)
        raise ImportError(f"nats-zoo lacks packages: {problems}; pip install {command}")


def _requirements() -> dict[str, str]:
    """The dependencies that pyproject.toml names, and their lower bounds."""
    text = (_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = text.partition("\ndependencies = [\n")[2].partition("\n]\n")[0]
    return dict(re.findall(r'^ *"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)",$', lines, re.MULTILINE))


def _installed_version(name: str) -> str | None:
    """A package's version; empty if it can not be imported, None if it can but has no metadata that would say."""
    if importlib.util.find_spec(_IMPORT_NAMES.get(name, name)) is None:
        return ""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The release's numbers, zeros at the end left out: 2.6 and 2.6.0 are equal; what stands behind a + is a build."""
    numbers = [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version, maxsplit=1)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


class _CheckoutFinder(importlib.abc.MetaPathFinder):
    """Finds the two packages that lie beside `nats_zoo` in a checkout, and nothing else.

    Not by the repository root on a path: top-level names such as `search` belong to the user.
    """

    def find_spec(
        self, fullname: str, path: typing.Any = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _FOLDERS:
            return None
        folder = _FOLDERS[fullname]
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def _import_zoo(detection: bool = False) -> types.ModuleType:
    """nats_zoo, with its variants registered; of this checkout, unless another one was imported before."""
    _check_packages(_FOR_THE_COMMAND if detection else _FOR_THE_COMMAND | _FOR_DETECTORS)
    import nats_zoo

    # One that was imported before, an installed one or another checkout's, brings its own detection and search.
    if pathlib.Path(nats_zoo.__file__).resolve().parent.parent != _ROOT:
        _warn_of_another_version(nats_zoo)
    # By name: torch.hub runs this file anew, and so makes a new class, for every model.
    elif not any(type(finder).__name__ == _CheckoutFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _CheckoutFinder())
    return nats_zoo


def _warn_of_another_version(imported: types.ModuleType) -> None:
    text = (_ROOT / "nats_zoo" / "version.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if imported.__version__ != version:
        folder = pathlib.Path(imported.__file__).parent
        warnings.warn(
            f"nats-zoo {imported.__version__} was imported before, from {folder}, and is used instead of {version}, "
            f"which torch.hub has in {_ROOT}. For that one, load from torch.hub first, in a new process.",
            stacklevel=6,  # who called torch.hub.load
        )


# --- Backbones --------------------------------------------------------------------------------------------------------

_GENOTYPE = """a published genotype's name, a genotype file, its JSON form as a dict, or `hf-hub:org/name` for one on
        the Hugging Face Hub; default: {default}."""

_BACKBONE = """{title} with some output channels at other dilations, a backbone for object detection.

Args:
    pretrained: load timm's ImageNet weights of the plain {title}. At other dilations they are no accurate
        classifier before fine-tuning.
    genotype: {genotype}
    **kwargs: go to `timm.create_model`, such as `features_only`, `out_indices`, `in_chans`, `num_classes`, or
        `pretrained_cfg` for another of timm's tags.

Returns:
    The timm model; its `genotype` says which dilations it runs.

Example:
    >>> backbone = torch.hub.load("org/nats-zoo", "{name}", pretrained=True, features_only=True)
    >>> maps = backbone(images)  # images: (N, 3, H, W), normalised; maps: strides 2, 4, 8, 16 and 32
"""


def _backbone(name: str, title: str, source: str | None = None) -> typing.Callable[..., typing.Any]:
    """An entry point for one variant; `source` is whose genotype its default is transferred from."""
    origin = f"transferred from that of {source}, not searched" if source else "searched"
    genotype = _GENOTYPE.format(default=f"the published one, which was {origin}")

    def entry_point(pretrained: bool = False, genotype: typing.Any = None, **kwargs: typing.Any) -> typing.Any:
        _import_zoo()
        import timm

        return timm.create_model(name, pretrained=pretrained, genotype=genotype, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = _BACKBONE.format(name=name, title=title, genotype=genotype)
    return entry_point


nats_resnet18 = _backbone("nats_resnet18", "ResNet-18")
nats_resnet34 = _backbone("nats_resnet34", "ResNet-34", "ResNet-18")
nats_resnet50 = _backbone("nats_resnet50", "ResNet-50")
nats_resnet101 = _backbone("nats_resnet101", "ResNet-101", "ResNet-50")
nats_resnet152 = _backbone("nats_resnet152", "ResNet-152", "ResNet-50")
nats_resnext50_32x4d = _backbone("nats_resnext50_32x4d", "ResNeXt-50 32x4d", "ResNet-50")
nats_resnext101_32x4d = _backbone("nats_resnext101_32x4d", "ResNeXt-101 32x4d", "ResNet-50")
nats_resnext101_32x8d = _backbone("nats_resnext101_32x8d", "ResNeXt-101 32x8d", "ResNet-50")
nats_wide_resnet50_2 = _backbone("nats_wide_resnet50_2", "Wide ResNet-50-2", "ResNet-50")
nats_resnet50d = _backbone("nats_resnet50d", "ResNet-50-D", "ResNet-50")
nats_seresnet50 = _backbone("nats_seresnet50", "SE-ResNet-50", "ResNet-50")


def nats_any(
    architecture: str | None = None, genotype: typing.Any = None, pretrained: bool = False, **kwargs: typing.Any
) -> typing.Any:
    _import_zoo()
    import timm

    return timm.create_model(
        "nats_any", pretrained=pretrained, architecture=architecture, genotype=genotype, **kwargs
    )  # fmt: skip


nats_any.__doc__ = """Any timm network with some output channels at other dilations.

Args:
    architecture: timm's name of the plain network, with a tag if wanted; default: the genotype's.
    genotype: {genotype}
    pretrained: load timm's weights of the plain network.
    **kwargs: as for the architecture in `timm.create_model`.

Returns:
    The timm model; its `genotype` says which dilations it runs.

Example:
    >>> torch.hub.load("org/nats-zoo", "nats_any", "regnety_032.ra_in1k", genotype="mine.json", pretrained=True)
""".format(genotype=_GENOTYPE.format(default="the architecture's published one, if it has one"))


def pretrained_backbone(
    source: str, revision: str | None = None, cache_dir: str | None = None, **kwargs: typing.Any
) -> typing.Any:
    """A backbone with its weights, from the Hugging Face Hub or a folder.

    Args:
        source: a Hub repository, org/name, or a folder that `nats_zoo.save_backbone` wrote.
        revision: branch, tag or commit of the repository.
        cache_dir: where downloads are kept; default: the Hub client's cache.
        **kwargs: go to `timm.create_model`, such as `features_only` or `num_classes`.

    Returns:
        The timm model.

    Example:
        >>> torch.hub.load("org/nats-zoo", "pretrained_backbone", "org/nats-resnet50", revision="v1")
    """
    return _import_zoo().from_pretrained(source, revision=revision, cache_dir=cache_dir, **kwargs)


# --- Detectors --------------------------------------------------------------------------------------------------------

_DETECTOR = """{title} on a timm backbone.

Args:
    backbone: a NATS variant, or any timm model with feature maps at strides 4, 8, 16 and 32.
    num_classes: number of classes, counting the background, label 0.
    pretrained: load timm's ImageNet weights into the backbone. The rest of the detector is random and wants training;
        `pretrained_detector` loads trained ones.
    genotype: {genotype}
    **options: go to `nats_zoo.detection.create_detector`: `weights` for a backbone of your own (a folder, safetensors
        file or Hub repository) instead of `pretrained`, `trainable_layers`, `norm`, `calibration`, `min_size`,
        `max_size`, `fpn_channels`, `classes` and others.

Returns:
    The detector, as torchvision's. In training, `detector(images, targets)` gives a dict of losses; in evaluation,
    `detector(images)` gives for each (3, H, W) image in 0..1 a dict of boxes (XYXY, pixels), labels and scores{masks}.

Example:
    >>> detector = torch.hub.load("org/nats-zoo", "{name}", "nats_resnet50", num_classes=21, pretrained=True)
    >>> detector.eval()([image])
"""


def _detector(name: str, title: str, masks: str = "") -> typing.Callable[..., typing.Any]:
    """An entry point for one framework; `masks` is what its help says of masks."""

    def entry_point(
        backbone: str = "nats_resnet50",
        num_classes: int = 91,
        pretrained: bool = False,
        genotype: typing.Any = None,
        **options: typing.Any,
    ) -> typing.Any:
        zoo = _import_zoo(detection=True)
        if pretrained and "weights" in options:
            raise zoo.NatsError(f"{name}: expected pretrained=True or weights=, found both")
        weights = "pretrained" if pretrained else options.pop("weights", None)
        return zoo.detection.create_detector(name, backbone, num_classes, genotype, weights, **options)

    entry_point.__name__ = entry_point.__qualname__ = name
    genotype = _GENOTYPE.format(default="the variant's published one; a plain backbone stays plain")
    entry_point.__doc__ = _DETECTOR.format(name=name, title=title, masks=masks, genotype=genotype)
    return entry_point


fasterrcnn = _detector("fasterrcnn", "Faster R-CNN with FPN")
maskrcnn = _detector("maskrcnn", "Mask R-CNN with FPN", ",\n    and masks (N, 1, H, W) in 0..1")
cascade_rcnn = _detector(
    "cascade_rcnn", "Cascade R-CNN with FPN", ",\n    and masks (N, 1, H, W) in 0..1 if it was built with `masks=True`"
)
retinanet = _detector("retinanet", "RetinaNet")
fcos = _detector("fcos", "FCOS")


def pretrained_detector(source: str, revision: str | None = None, cache_dir: str | None = None) -> typing.Any:
    """A trained detector, from the Hugging Face Hub or a folder.

    Args:
        source: a Hub repository, org/name, or a folder that `nats train` or `save_detector` wrote.
        revision: branch, tag or commit of the repository.
        cache_dir: where downloads are kept; default: the Hub client's cache.

    Returns:
        The detector in evaluation mode; its `config` names the classes.

    Example:
        >>> detector = torch.hub.load("org/nats-zoo", "pretrained_detector", "org/fasterrcnn-nats-resnet50")
        >>> detector([image])  # image: (3, H, W), RGB in 0..1
    """
    return _import_zoo(detection=True).detection.from_pretrained(source, revision, cache_dir)


# torch.hub.help returns the docstring as it stands.
for _entry in (pretrained_backbone, pretrained_detector):
    _entry.__doc__ = inspect.cleandoc(_entry.__doc__ or "")
