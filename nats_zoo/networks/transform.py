"""Apply a genotype to a network."""

from collections.abc import Mapping

from torch import nn

from ..base.errors import GenotypeError
from ..base.names import VARIANT_PREFIX
from ..genotype.genotype import Genotype
from .deploy import adopt_blocks, has_deployment_form, is_deployed, release_blocks
from .regrouped_conv import RegroupedConv2d

# What timm.utils.reparameterize_model calls on blocks. timm's own hooks rebuild a plain Conv2d out of the block's
# convolutions and would silently drop the dilations; nats_zoo/networks/deploy.py has those that do not.
_REPARAMETERIZE_HOOKS = ("reparameterize", "fuse", "switch_to_deploy")


def transform(model: nn.Module, genotype: Genotype) -> nn.Module:
    """Regroup the convolutions that a genotype names, in place; all of them or, on an error, none.

    Weights stay where they are: the state dict's keys and shapes do not change. timm's ResNet and RepVGG blocks become
    subclasses of themselves with a deployment form, for `timm.utils.reparameterize_model`. `to_plain` undoes it all.

        >>> model = transform(timm.create_model("regnety_032"), Genotype.load("mine.json"))

    Args:
        model: a timm network (before `features_only` wrapping, which renames convolutions in some), or any module
            whose convolutions bear the genotype's names.
        genotype: of this network.

    Returns:
        The same model.

    Raises:
        GenotypeError: another architecture, an unknown convolution, runs that do not fit it, a convolution with hooks
            or inside a block that rebuilds it for deployment, or a network that is regrouped already.
    """
    found = architecture_of(model)
    if found is not None:
        check_architecture(genotype, found)
    if is_deployed(model):
        raise GenotypeError(f"{genotype.source}: the model is in deployment form already, expected a plain network")
    modules = dict(model.named_modules())
    _refuse_regrouped(modules, genotype)
    regrouped = {name: _regroup(modules, name, genotype) for name in genotype.convs}
    _replace(model, {modules[name]: conv for name, conv in regrouped.items()})
    adopt_blocks(model)
    if isinstance(getattr(model, "genotype", None), Genotype):  # a variant's that was plain: what it would save
        model.genotype = genotype  # type: ignore[assignment]  # torch declares no attributes that are no tensors
    return model


def to_plain(model: nn.Module) -> nn.Module:
    """Undo `transform`, in place: the plain network with the same weights. Gains, which are no weights, are dropped.

        >>> type(to_plain(timm.create_model("nats_resnet18")).layer4[1].conv2).__name__
        'Conv2d'

    Returns:
        The same model.

    Raises:
        GenotypeError: a model in deployment form, whose channels have moved.
    """
    if is_deployed(model):
        raise GenotypeError(f"{type(model).__name__}: is in deployment form, expected the form that trains")
    _replace(model, {module: module.to_plain() for module in model.modules() if isinstance(module, RegroupedConv2d)})
    release_blocks(model)
    genotype = getattr(model, "genotype", None)
    if isinstance(genotype, Genotype):  # of a variant: what it would save
        model.genotype = Genotype(genotype.architecture, {})  # type: ignore[assignment]  # torch declares no attributes that are no tensors
    return model


def architecture_of(model: nn.Module) -> str | None:
    """Find timm's name of the plain network, or None for a network that timm did not build.

    >>> architecture_of(timm.create_model("nats_resnet18"))
    'resnet18'
    """
    genotype = getattr(model, "genotype", None)
    if isinstance(genotype, Genotype):  # timm calls a network of any architecture nats_any
        return genotype.architecture
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture") if isinstance(cfg, Mapping) else getattr(cfg, "architecture", None)
    return name.removeprefix(VARIANT_PREFIX) if name else None


def check_architecture(genotype: Genotype, architecture: str) -> None:
    """Raise GenotypeError unless the genotype is for this (plain) architecture.

    >>> check_architecture(Genotype("resnet18", {}), "resnet18")
    """
    if genotype.architecture != architecture:
        raise GenotypeError(
            f"{genotype.source}: the genotype is for the architecture {genotype.architecture!r}, the model is"
            f" {architecture!r}"
        )


def _replace(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the places of others, in all of them where several parents share one."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            model.set_submodule(name, replacements[module])


def _regroup(modules: dict[str, nn.Module], name: str, genotype: Genotype) -> RegroupedConv2d:
    conv = modules.get(name)
    if conv is None:
        raise GenotypeError(f"{genotype.source}: the model has no convolution named {name!r}")
    where = f"{genotype.source}: {name}"
    if not isinstance(conv, nn.Conv2d):
        raise GenotypeError(f"{where} is a {type(conv).__name__}, expected a Conv2d")
    if any((conv._forward_hooks, conv._forward_pre_hooks, conv._backward_hooks, conv._backward_pre_hooks)):
        # Weight normalisation and pruning, too, compute the weight in one.
        raise GenotypeError(f"{where} has hooks, which would be lost; regroup first, then register them")
    refuse_foreign_hooks(modules, name, where)
    return RegroupedConv2d.from_conv(conv, genotype.convs[name], genotype.gains.get(name), name=where)


def _refuse_regrouped(modules: dict[str, nn.Module], genotype: Genotype) -> None:
    # Two genotypes would mix: the convolutions that the new one does not name must be plain.
    for name, module in modules.items():
        if isinstance(module, RegroupedConv2d):
            raise GenotypeError(
                f"{genotype.source}: {name} of the model is regrouped already, expected a plain network"
            )


def refuse_foreign_hooks(modules: Mapping[str, nn.Module], name: str, where: str) -> None:
    """Raise GenotypeError if a convolution lies in a block that would rebuild it for deployment, without dilations.

    >>> refuse_foreign_hooks(dict(model.named_modules()), "layer4.1.conv2", "mine.json: layer4.1.conv2")
    """
    owner = name
    while "." in owner:
        owner = owner.rpartition(".")[0]
        hooks = [hook for hook in _REPARAMETERIZE_HOOKS if callable(getattr(modules[owner], hook, None))]
        if hooks and not has_deployment_form(modules[owner]):
            raise GenotypeError(
                f"{where} lies in the {type(modules[owner]).__name__} {owner!r}, whose {hooks[0]}() rebuilds a plain"
                " convolution; such blocks can not be regrouped"
            )
