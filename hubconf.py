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


def nats_resnet18(pretrained=False, genotype=None, **kwargs):
    """ResNet-18 with searched dilations.

    Args:
        pretrained: load timm's ImageNet weights of the plain ResNet-18.
        genotype: a genotype's name, file or JSON form; default: the published one.
        **kwargs: go to `timm.create_model`, such as `features_only`, `out_indices`, `in_chans` or `num_classes`.
    """
    return _import_timm().create_model("nats_resnet18", pretrained=pretrained, genotype=genotype, **kwargs)


def nats_resnet50(pretrained=False, genotype=None, **kwargs):
    """ResNet-50 with searched dilations.

    Args:
        pretrained: load timm's ImageNet weights of the plain ResNet-50.
        genotype: a genotype's name, file or JSON form; default: the published one.
        **kwargs: go to `timm.create_model`, such as `features_only`, `out_indices`, `in_chans` or `num_classes`.
    """
    return _import_timm().create_model("nats_resnet50", pretrained=pretrained, genotype=genotype, **kwargs)
