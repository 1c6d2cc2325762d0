"""Any timm network, regrouped: the entry point `nats_any`.

    model = timm.create_model("nats_any", architecture="regnety_032.ra_in1k", genotype="mine.json", pretrained=True)

It calls timm's own entry point of the architecture, with all other arguments as they are, and transforms what comes
out; so pretrained weights, tags, `num_classes`, `in_chans`, `output_stride` and the rest are timm's code. Weights are
loaded by then, into the plain network and as strictly as timm loads them there.

With `features_only` that is too late: timm wraps the network inside the entry point, the wrappers rename convolutions
(convnext, densenet, vgg, cspresnet, repvgg) and some copy the network's graph or hang hooks onto its modules. timm
lets callers name the wrapper, though (`feature_cls`), and calls it with the network, weights in it, and the
architecture's own options for it. So a network on the meta device first shows which wrapper the architecture uses, and
that same class is then handed in behind a transform. EfficientNet, MobileNetV3 and HRNet have no wrapper but classes of
their own for features, which keep the names of the plain network: they are transformed as they come.

What comes out keeps its timm class and gains, in a subclass, only what saving needs: config.json then says `nats_any`,
with the architecture and the genotype itself in `model_args`, and `timm.create_model("hf-hub:org/name")` rebuilds it.
"""

import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, SupportsIndex

import timm
import torch
from timm.models import (
    PretrainedCfg,
    get_deprecated_models,
    model_entrypoint,
    register_model,
    split_model_name_tag,
)
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from timm.models._features_fx import FeatureGraphNet
from torch import nn

from ..base.errors import GenotypeError, NatsError
from ..base.names import NATS_ANY, VARIANT_PREFIX
from ..folders.find_genotype import find_genotype
from ..genotype.catalogue import DEFAULT_GENOTYPES
from ..genotype.genotype import Genotype
from ..networks.transform import check_architecture, transform
from .model_args import RecordsGenotype, check_saved_args, check_saved_size, prepare_saved_weights

__all__ = ["NATS_ANY"]

DEFAULT_ARCHITECTURE = "resnet18"

_WRAPPERS = (FeatureDictNet, FeatureHookNet, FeatureGetterNet, FeatureGraphNet)
_FEATURE_OPTIONS = ("features_only", "out_indices", "feature_cls", "feature_cfg", "feature_location")


@register_model
def nats_any(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create the timm network `architecture`, regrouped by `genotype`.

    Args:
        pretrained: load timm's weights of the plain architecture, of the tag in `architecture` if it has one.
        architecture: timm's name of the plain network, with a tag if wanted (`regnety_032.ra_in1k`); default: the
            genotype's.
        genotype: a Genotype, its JSON form, a published name or a file's path; default: the architecture's published
            one. Without either argument this is `nats_resnet18`, for timm's scripts and tests, which create each
            model by its name alone.
        **kwargs: as for the architecture.

    Returns:
        The network, an instance of its timm class; its `genotype` is the Genotype it runs.

    Raises:
        NatsError: an architecture that timm does not know.
        GenotypeError: no genotype, where none is published; one that does not fit, or that a downloaded config gives as
            a path.

    Example:
        >>> model = timm.create_model("nats_any", architecture="regnety_032", genotype="mine.json", pretrained=True)
        >>> body = timm.create_model("nats_any", genotype="mine.json", features_only=True, out_indices=(1, 2, 3, 4))
    """
    is_saved = check_saved_args(kwargs)
    genotype, architecture, tag = _resolve(kwargs.pop("genotype", None), kwargs.pop("architecture", None))
    kwargs["pretrained_cfg"] = _own_cfg(kwargs.get("pretrained_cfg")) or tag or None
    # Else timm would call the network by this entry point's name, of which it knows no weights and we no genotype.
    kwargs["pretrained_cfg_overlay"] = dict(kwargs.get("pretrained_cfg_overlay") or {}, architecture=architecture)
    build = partial(model_entrypoint(architecture), pretrained=pretrained, **kwargs)
    if is_saved:
        check_saved_size(partial(build, pretrained=False))
        if pretrained:
            prepare_saved_weights(kwargs)
    model = _build_features(build, genotype) if kwargs.get("features_only") else transform(build(), genotype)
    return _record(model, genotype)


def _resolve(genotype: Genotype | Mapping | str | os.PathLike | None, architecture: Any) -> tuple[Genotype, str, str]:
    """Find the genotype, and its plain network's name and tag in timm; each of the two says what the other is."""
    if genotype is not None:
        genotype = find_genotype(genotype)
    if architecture is None:
        architecture = DEFAULT_ARCHITECTURE if genotype is None else genotype.architecture
    name, tag = _split_architecture(architecture)
    if genotype is None and name not in DEFAULT_GENOTYPES:
        raise GenotypeError(f"{NATS_ANY}: no genotype, expected genotype= with one of {name}")
    genotype = find_genotype(DEFAULT_GENOTYPES[name]) if genotype is None else genotype
    check_architecture(genotype, name)
    return genotype, name, tag


def _split_architecture(architecture: Any) -> tuple[str, str]:
    """Name and tag of a plain timm network; the tag may be empty."""
    if not isinstance(architecture, str):
        raise NatsError(f"{NATS_ANY}: architecture must be timm's name of a network, found {architecture!r}")
    name, tag = split_model_name_tag(architecture)
    if name.startswith(VARIANT_PREFIX):
        raise NatsError(f"{NATS_ANY}: architecture {name!r} is regrouped already, expected a plain network")
    if not timm.is_model(name):
        raise NatsError(f"{NATS_ANY}: timm has no architecture {architecture!r}")
    current = get_deprecated_models().get(name, name)
    if current != name:
        raise NatsError(f"{NATS_ANY}: architecture {name!r} is an old name, timm has {current!r} for it")
    return name, tag


def _own_cfg(cfg: Any) -> Any:
    """Return a pretrained cfg or tag as given; None for what timm's scripts find for this entry point: nothing."""
    is_empty = isinstance(cfg, Mapping) and PretrainedCfg(**cfg) == PretrainedCfg(architecture=NATS_ANY)
    return None if is_empty else cfg


# --- features_only ----------------------------------------------------------------------------------------------------


def _build_features(build: partial[nn.Module], genotype: Genotype) -> nn.Module:
    wrapper = build.keywords.get("feature_cls")
    if not callable(wrapper):
        with torch.device("meta"):
            wrapper = type(build(pretrained=False))
        if not issubclass(wrapper, _WRAPPERS):
            return _transform_features(build, genotype)
    return build(feature_cls=_behind_transform(wrapper, genotype))


def _behind_transform(wrapper: Callable[..., nn.Module], genotype: Genotype) -> Callable[..., nn.Module]:
    """Make what timm can call in a wrapper's place: it transforms the network, then wraps it."""

    def wrap(model: nn.Module, **options: Any) -> nn.Module:
        return wrapper(transform(model, genotype), **options)

    if not isinstance(wrapper, type):
        return wrap
    # A class, because timm picks the options by class. Its instances are the wrapper's own.
    return type(wrapper.__name__, (wrapper,), {"__new__": lambda cls, model, **options: wrap(model, **options)})


def _transform_features(build: partial[nn.Module], genotype: Genotype) -> nn.Module:
    """Transform a network of a class for features only, which lacks the classifier's convolutions."""
    options = {key: value for key, value in build.keywords.items() if key not in _FEATURE_OPTIONS}
    with torch.device("meta"):
        plain = transform(build.func(**options | {"pretrained": False}), genotype)
    model = build()
    parameters, modules = dict(plain.named_parameters()), dict(model.named_modules())
    renamed = [name for name, _ in model.named_parameters() if name not in parameters]
    if renamed:
        raise NatsError(
            f"{NATS_ANY}: features_only: {genotype.architecture} has no {renamed[0]}, {type(model).__name__} renames it"
        )
    kept = {name: runs for name, runs in genotype.convs.items() if name in modules}
    gains = {name: values for name, values in genotype.gains.items() if name in kept}
    return transform(model, Genotype(genotype.architecture, kept, gains, source=genotype.source))


# --- saving -----------------------------------------------------------------------------------------------------------


class _NatsAny(RecordsGenotype):
    """What a regrouped network has beyond its timm class."""

    _timm_class: type[nn.Module]

    def _recorded_args(self) -> dict[str, Any]:
        return {"architecture": self.genotype.architecture, **super()._recorded_args()}

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple:
        return _restore, (self._timm_class,), self.__dict__  # pickle finds no class that was made at run time


def _record(model: nn.Module, genotype: Genotype) -> nn.Module:
    model.__class__ = _nats_class(type(model))  # type: ignore[arg-type]  # mypy: classes of modules have no hash
    model.genotype = genotype  # type: ignore[assignment]  # torch declares no attributes that are no tensors
    for cfg in (model.pretrained_cfg, model.default_cfg):  # one and the same but in MobileNetV3's features
        cfg["architecture"] = NATS_ANY
    return model


@cache
def _nats_class(timm_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"Nats{timm_class.__name__}", (_NatsAny, timm_class), {"_timm_class": timm_class})


def _restore(timm_class: type[nn.Module]) -> nn.Module:
    nats_class = _nats_class(timm_class)  # type: ignore[arg-type]  # as above
    return nats_class.__new__(nats_class)
