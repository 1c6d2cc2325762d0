"""Entry points for `torch.hub.load`.

    model = torch.hub.load("org/nats-zoo", "nats_resnet50", pretrained=True)

Everything but the standard library is imported inside the entry points, so that torch.hub can check `dependencies`
first. Names without an underscore are entry points.
"""

import importlib.abc
import importlib.util
import pathlib
import sys

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors"]

_ROOT = pathlib.Path(__file__).resolve().parent
_FOLDERS = {"nats_zoo.detection": _ROOT / "detection", "nats_zoo.search": _ROOT / "search"}


class _CheckoutFinder(importlib.abc.MetaPathFinder):
    """Finds the two packages that lie beside `nats_zoo` in a checkout, and nothing else.

    Not by the repository root on a path: top-level names such as `search` belong to the user.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _FOLDERS:
            return None
        folder = _FOLDERS[fullname]
        return importlib.util.spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def _import_timm():
    """timm, with the variants of nats_zoo registered."""
    import timm

    import nats_zoo

    # An installed nats_zoo that was imported before brings its own detection and search.
    from_checkout = pathlib.Path(nats_zoo.__file__).resolve().parent.parent == _ROOT
    # By name: torch.hub runs this file anew, and so makes a new class, for every model.
    is_installed = any(type(finder).__name__ == _CheckoutFinder.__name__ for finder in sys.meta_path)
    if from_checkout and not is_installed:
        sys.meta_path.insert(0, _CheckoutFinder())
    return timm


def _entry_point(name, title, source=None):
    """An entry point for one variant; `source` is whose genotype its default is transferred from."""
    origin = "the published one, which was searched"
    if source is not None:
        origin = f"the published one, which is\n            transferred from that of {source}, not searched"

    def entry_point(pretrained=False, genotype=None, **kwargs):
        return _import_timm().create_model(name, pretrained=pretrained, genotype=genotype, **kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = f"""{title} with some output channels at other dilations.

    Args:
        pretrained: load timm's ImageNet weights of the plain {title}.
        genotype: a genotype's name, file or JSON form; default: {origin}.
        **kwargs: go to `timm.create_model`, such as `features_only`, `out_indices`, `in_chans` or `num_classes`.
    """
    return entry_point


nats_resnet18 = _entry_point("nats_resnet18", "ResNet-18")
nats_resnet34 = _entry_point("nats_resnet34", "ResNet-34", "ResNet-18")
nats_resnet50 = _entry_point("nats_resnet50", "ResNet-50")
nats_resnet101 = _entry_point("nats_resnet101", "ResNet-101", "ResNet-50")
nats_resnet152 = _entry_point("nats_resnet152", "ResNet-152", "ResNet-50")
nats_resnext50_32x4d = _entry_point("nats_resnext50_32x4d", "ResNeXt-50 32x4d", "ResNet-50")
nats_resnext101_32x4d = _entry_point("nats_resnext101_32x4d", "ResNeXt-101 32x4d", "ResNet-50")
nats_resnext101_32x8d = _entry_point("nats_resnext101_32x8d", "ResNeXt-101 32x8d", "ResNet-50")
nats_wide_resnet50_2 = _entry_point("nats_wide_resnet50_2", "Wide ResNet-50-2", "ResNet-50")
nats_resnet50d = _entry_point("nats_resnet50d", "ResNet-50-D", "ResNet-50")
nats_seresnet50 = _entry_point("nats_seresnet50", "SE-ResNet-50", "ResNet-50")
