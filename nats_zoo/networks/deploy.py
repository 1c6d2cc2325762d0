"""Deployment form: the same outputs with fewer and cheaper steps, for inference only.

`timm.utils.reparameterize_model(model)` asks each child module for its own deployment form. The blocks here answer
for timm's: batch norms are folded into the convolutions before them, and the channels inside a block are permuted so
that each dilation's are contiguous, which leaves nothing to put back in order. Where a permutation would reach the
block's output, which other blocks add to, the convolution puts its channels back in order by itself. Then every
regrouped convolution becomes a `DeployedConv2d`.

They are timm's blocks in everything else: `adopt_blocks` changes nothing but a block's class.
"""

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

import torch
from timm.layers import BlurPool2d
from timm.models.byobnet import RepVggBlock
from timm.models.resnet import BasicBlock, Bottleneck
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d  # what timm.layers.freeze_batch_norm_2d puts in

from ..genotype.runs import Runs
from .deployed_conv import DeployedConv2d, sort_key
from .regrouped_conv import RegroupedConv2d

Form = Literal["as it is", "deploy", "separate"]

_FOLDABLE = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


class NatsBasicBlock(BasicBlock):
    """timm's BasicBlock with a deployment form. conv2's channels keep their order: they are the block's output.

    >>> deployed = timm.utils.reparameterize_model(timm.create_model("nats_resnet18").eval())
    """

    is_deployed = False

    def reparameterize(self) -> None:
        """Fold the batch norms; sort conv1's channels by dilation."""
        if self.is_deployed:
            return
        self.is_deployed = True
        order = None
        if _is_foldable(self.bn1) and _keeps_channels_apart(self.drop_block, self.act1, self.aa):
            order = _dilation_order(self.conv1)
        _permute_outputs(self, "conv1", "bn1", order)
        _permute_inputs(self.conv2, order)
        self.fold_batch_norms()
        _deploy_conv(self, "conv1", "bn1", "act1")

    def fold_batch_norms(self) -> None:
        """Fold the batch norms into the convolutions before them, and nothing else."""
        _fold_norms(self, ("conv1", "bn1"), ("conv2", "bn2"))
        _fold_downsample(self.downsample)


class NatsBottleneck(Bottleneck):
    """timm's Bottleneck with a deployment form. In a grouped conv2 whole cardinality groups move, inputs and all.

    >>> deployed = timm.utils.reparameterize_model(timm.create_model("nats_resnet50").eval())
    """

    is_deployed = False

    def reparameterize(self) -> None:
        """Fold the batch norms; sort conv2's channels by dilation."""
        if self.is_deployed:
            return
        self.is_deployed = True
        order = None
        can_fold = _is_foldable(self.bn2) and (self.conv2.groups == 1 or _is_foldable(self.bn1))
        if can_fold and _keeps_channels_apart(self.act1, self.drop_block, self.act2, self.aa):
            order = _dilation_order(self.conv2)
        if self.conv2.groups > 1:
            _permute_outputs(self, "conv1", "bn1", _matching_inputs(self.conv2, order))
        _permute_outputs(self, "conv2", "bn2", order)
        _permute_inputs(self.conv3, order)
        self.fold_batch_norms()
        _deploy_conv(self, "conv2", "bn2", "act2")

    def fold_batch_norms(self) -> None:
        """Fold the batch norms into the convolutions before them, and nothing else."""
        _fold_norms(self, ("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))
        _fold_downsample(self.downsample)


class NatsRepVggBlock(RepVggBlock):
    """timm's RepVggBlock, whose branches become one convolution that keeps conv_kxk's dilations.

    The 1x1 and the identity branch add to the centre tap, which lies in the same place at every dilation.

        >>> model = timm.create_model("nats_any", architecture="repvgg_a0", genotype="mine.json")
        >>> deployed = timm.utils.reparameterize_model(model.eval())
    """

    def reparameterize(self) -> None:
        """Merge the branches into `reparam_conv`."""
        regrouped = None if self.reparam_conv is not None else self.conv_kxk.conv
        if isinstance(regrouped, RegroupedConv2d):  # timm reads its weight, which knows nothing of gains
            weight, bias = regrouped.plain_kernel()
            self.conv_kxk.conv = _rebuild(regrouped, weight, bias)
        super().reparameterize()
        if isinstance(regrouped, RegroupedConv2d):
            self.reparam_conv = RegroupedConv2d.from_conv(self.reparam_conv, regrouped.runs)
            self.reparam_conv.shares_columns = regrouped.shares_columns


# By exact class: a subclass may compute something else.
_ADOPTED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: NatsBasicBlock,
    Bottleneck: NatsBottleneck,
    RepVggBlock: NatsRepVggBlock,
}
_RELEASED = {ours: timms for timms, ours in _ADOPTED.items()}


def adopt_blocks(model: nn.Module) -> None:
    """Give timm's blocks of a network, those that are known here, their deployment form.

    >>> adopt_blocks(model)
    >>> deployed = timm.utils.reparameterize_model(model)
    """
    _change_classes(model, _ADOPTED)


def release_blocks(model: nn.Module) -> None:
    """Undo `adopt_blocks`.

    >>> release_blocks(model)
    """
    _change_classes(model, _RELEASED)


def in_form(model: nn.Module, form: Form) -> nn.Module:
    """A network in one of the forms that compute the same.

    Args:
        model: stays as it is.
        form: "as it is"; "deploy", what `timm.utils.reparameterize_model` gives; or "separate", the same with a
            convolution for each dilation where torch is faster with narrow ones computed together: other runtimes fuse
            a convolution with its activation, and write it where it is needed.

    Example:
        >>> fast = in_form(timm.create_model("nats_resnet50", features_only=True).eval(), "separate")
    """
    if form == "as it is":
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, RegroupedConv2d):
            module.shares_columns = form == "deploy"
    return reparameterize_model(model, inplace=True)


def is_deployed(model: nn.Module) -> bool:
    """Tell whether any part of a network is in deployment form: its weights are no plain network's any more.

    >>> is_deployed(timm.create_model("nats_resnet18"))
    False
    """
    return any(getattr(module, "is_deployed", False) for module in model.modules())


def has_deployment_form(block: nn.Module) -> bool:
    """Tell whether `adopt_blocks` knows this block, or did already.

    >>> has_deployment_form(timm.create_model("resnet18").layer1[0])
    True
    """
    return type(block) in _ADOPTED or type(block) in _RELEASED


def _change_classes(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]


def _deploy_conv(block: nn.Module, conv_name: str, norm_name: str, act_name: str) -> None:
    """Deploy a regrouped convolution with the activation behind it, if nothing but a folded batch norm lies between."""
    conv = block.get_submodule(conv_name)
    if isinstance(conv, RegroupedConv2d) and type(block.get_submodule(norm_name)) is nn.Identity:
        deployed = conv.fuse()
        block.set_submodule(conv_name, deployed)
        if isinstance(deployed, DeployedConv2d) and deployed.take_activation(block.get_submodule(act_name)):
            block.set_submodule(act_name, nn.Identity())


# --- permutations -----------------------------------------------------------------------------------------------------


def _dilation_order(conv: nn.Module) -> list[int] | None:
    """Output channels as `DeployedConv2d` computes them, dilation by dilation; None if they lie so already."""
    if not isinstance(conv, RegroupedConv2d):
        return None
    dilations = conv.runs.per_channel()
    order = sorted(range(len(dilations)), key=lambda c: sort_key(dilations[c]))  # stable: groups stay whole
    return None if order == list(range(len(order))) else order


def _matching_inputs(conv: nn.Conv2d, order: Sequence[int] | None) -> list[int] | None:
    """Where a grouped convolution's input channels go when its output channels are permuted, group by group."""
    if order is None:
        return None
    outputs, inputs = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    groups = [order[i] // outputs for i in range(0, len(order), outputs)]
    return [group * inputs + c for group in groups for c in range(inputs)]


@torch.no_grad()
def _permute_outputs(block: nn.Module, conv_name: str, norm_name: str, order: Sequence[int] | None) -> None:
    if order is None:
        return
    conv, norm = getattr(block, conv_name), getattr(block, norm_name)
    weight, bias = _kernel(conv)
    dilations = [conv.runs.per_channel()[c] for c in order] if isinstance(conv, RegroupedConv2d) else None
    setattr(block, conv_name, _rebuild(conv, weight[order], None if bias is None else bias[order], dilations))
    for tensor in chain(norm.parameters(), norm.buffers()):
        if tensor.ndim:  # num_batches_tracked has no channels
            tensor.copy_(tensor[order].clone())


@torch.no_grad()
def _permute_inputs(conv: nn.Conv2d, order: Sequence[int] | None) -> None:
    if order is not None:
        conv.weight.copy_(conv.weight[:, order].clone())


def _keeps_channels_apart(*modules: nn.Module | None) -> bool:
    """Whether modules treat all channels alike, so that a permutation passes through them; None is no module."""
    return all(
        module is None
        or isinstance(module, BlurPool2d)
        or not any(t.numel() > 1 for t in chain(module.parameters(), module.buffers()))
        for module in modules
    )


# --- folding ----------------------------------------------------------------------------------------------------------


def _is_foldable(norm: nn.Module) -> bool:
    # By exact class: timm's BatchNormAct2d is a BatchNorm2d too, with an activation in it.
    return type(norm) in _FOLDABLE and norm.running_mean is not None


def _fold_norms(owner: nn.Module, *pairs: tuple[str, str]) -> None:
    """Fold batch norms into the convolutions before them; each leaves an Identity behind."""
    for conv_name, norm_name in pairs:
        conv, norm = owner.get_submodule(conv_name), owner.get_submodule(norm_name)
        if isinstance(conv, nn.Conv2d) and _is_foldable(norm):
            owner.set_submodule(conv_name, _fold(conv, norm))
            owner.set_submodule(norm_name, nn.Identity())


def _fold_downsample(downsample: nn.Module | None) -> None:
    """timm's shortcut: a Sequential that ends with a convolution and its batch norm."""
    if isinstance(downsample, nn.Sequential) and len(downsample) >= 2:
        _fold_norms(downsample, (str(len(downsample) - 2), str(len(downsample) - 1)))


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    weight, bias = _kernel(conv)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() if bias is None else bias.double() - norm.running_mean.double()
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias.double()
    folded = weight.double() * scale.view(-1, 1, 1, 1)
    return _rebuild(conv, folded.to(weight.dtype), shift.to(weight.dtype))


def _kernel(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    return conv.plain_kernel() if isinstance(conv, RegroupedConv2d) else (conv.weight, conv.bias)


def _rebuild(
    conv: nn.Conv2d, weight: Tensor, bias: Tensor | None, dilations: Sequence[tuple[int, int]] | None = None
) -> nn.Conv2d:
    """The same convolution with another kernel, in which gains are applied already.

    Args:
        dilations: one per output channel, where they moved; None: as they are.
    """
    shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    options: dict[str, Any] = dict(groups=conv.groups, bias=bias is not None, device="meta")
    if isinstance(conv, RegroupedConv2d):
        options["runs"] = conv.runs if dilations is None else Runs.of(dilations)
    rebuilt = type(conv)(*shape, **options)
    if isinstance(conv, RegroupedConv2d):
        assert isinstance(rebuilt, RegroupedConv2d)
        rebuilt.shares_columns = conv.shares_columns
    rebuilt.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    if bias is not None:
        rebuilt.bias = nn.Parameter(bias, requires_grad=conv.weight.requires_grad)
    return rebuilt.train(conv.training)
