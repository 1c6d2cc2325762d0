"""The effective receptive field: which pixels move a neuron, and how much.

After the paper and Luo et al. 2016 (arXiv 1701.04128): the input is all ones, the ReLUs are removed, and a gradient of
1 at the centre of a feature map is back-propagated to the input; |gradient| is the picture.
"""

import copy
import math
from typing import NamedTuple

import torch
from timm.layers import AvgPool2dSame
from torch import Tensor, nn
from torch.nn.modules import activation

from ..base.errors import NatsError
from .transform import to_plain

SHARE = 0.9  # of |gradient| inside the circle
MAX_AT_BORDER = 0.01  # measured: with less there, a larger image moves the radius by less than a hundredth

_KEPT = (  # what torch keeps beside its activations and is none
    nn.MultiheadAttention,
    nn.GLU,
    nn.Softmax,
    nn.Softmax2d,
    nn.Softmin,
    nn.LogSoftmax,
)
# By name, as some of timm's networks bring their own. Each multiplies its input with a gate.
_GATES = {
    "CbamModule",
    "CecaModule",
    "EcaModule",
    "EffectiveSEModule",
    "GatherExcite",
    "GlobalContext",
    "LightCbamModule",
    "SEModule",
    "SqueezeExcite",
}


class ErfExtent(NamedTuple):
    """How large a receptive field is, in pixels.

        >>> print(erf_radius(field))
        90% within a radius of 61 pixels, standard deviation 29 high, 31 wide

    Attributes:
        radius: of the circle around the centre that holds `share` of the total.
        share: in 0..1.
        height, width: root mean square distance from the centre, weighted with the field, along each axis; for a
            Gaussian its two standard deviations. Dilations with a direction tell them apart.
        centre: the field's centre of gravity, (row, column); (0.5, 0.5) is the middle of the first pixel.
        border: share of the total in the outermost sixteenth of the image on each side.
    """

    radius: float
    share: float
    height: float
    width: float
    centre: tuple[float, float]
    border: float

    @property
    def is_cut(self) -> bool:
        """Whether the image was too small for the field, so that the other figures are too small as well."""
        return self.border > MAX_AT_BORDER

    def __str__(self) -> str:
        at_least, cut = ("at least ", " (cut by the border: a larger image shows more)") if self.is_cut else ("", "")
        return (
            f"{self.share:.0%} within a radius of {at_least}{self.radius:.0f} pixels, standard deviation"
            f" {self.height:.0f} high, {self.width:.0f} wide{cut}"
        )


def effective_receptive_field(
    model: nn.Module, size: int | tuple[int, int] = 512, in_channels: int = 3, *, level: int = -1
) -> Tensor:
    """|d y / d x| of the neuron at the centre of a network's output map, on an input of ones.

    y is the sum over the channels of that position, and |gradient| is summed over the channels of x. The network is
    made linear first, on a copy: activation modules (of torch and timm; not functional ones) become the identity,
    and so do gates that pool the whole image (squeeze-and-excitation and its like), whose receptive field is the
    image by definition; batch norms are in evaluation mode. Max pooling becomes average pooling: an input of ones is
    all ties, among which the maximum would follow one arbitrary path. Layer norms, and attention that holds
    convolutions, stay.

        >>> network = timm.create_model("nats_resnet50", features_only=True)
        >>> effective_receptive_field(network, 512).shape
        torch.Size([512, 512])

    Args:
        model: called with images (1, in_channels, H, W); returns a map (1, C, h, w) or a list of maps, as a timm
            `features_only` network does. It is left as it is.
        size: height and width of the input, in pixels.
        in_channels: channels of the input.
        level: which of the maps, if it returns several.

    Returns:
        The field (H, W), float32, not normalised.

    Raises:
        NatsError: no such size, the network returns no map of shape (1, C, h, w), or nothing of the image reaches its
            centre.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise NatsError(f"size: expected 1 pixel or more on each side, found {height} x {width}")
    linear = _linearised(model)
    device = next((parameter.device for parameter in linear.parameters()), torch.device("cpu"))
    images = torch.ones(1, in_channels, height, width, device=device, requires_grad=True)
    with torch.enable_grad():
        output = linear(images)
        output = output if isinstance(output, Tensor) else output[level]
        if output.ndim != 4:
            raise NatsError(f"receptive field: expected a map (1, C, H, W), found {tuple(output.shape)}")
        centre = output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum()
        (gradient,) = torch.autograd.grad(centre, images)
    field = gradient[0].abs().sum(0)
    total = field.sum()
    if not total > 0 or not total.isfinite():
        raise NatsError(f"receptive field: the gradient adds up to {total.item()}, expected a positive number")
    return field


def plain_and_nats_fields(
    network: nn.Module, size: int | tuple[int, int] = 512, in_channels: int = 3, *, level: int = -1
) -> tuple[Tensor, Tensor]:
    """Compute the effective receptive fields of the plain network and of the regrouped one, with the same weights.

        >>> plain, nats = plain_and_nats_fields(timm.create_model("nats_resnet50", features_only=True), level=3)

    Args:
        network: a regrouped network, not in deployment form; it is left as it is.
        size, in_channels, level: as for `effective_receptive_field`.

    Returns:
        Both fields (H, W), the plain one first.
    """
    plain = to_plain(copy.deepcopy(network))
    first, second = (effective_receptive_field(model, size, in_channels, level=level) for model in (plain, network))
    return first, second


def erf_radius(field: Tensor, share: float = SHARE) -> ErfExtent:
    """Measure a receptive field.

    The radius is that of the smallest circle around the field's centre of gravity that holds `share` of its sum, each
    pixel counted at its middle. For a Gaussian of standard deviation s it is s * sqrt(-2 ln(1 - share)): 2.15 s at 90%.

        >>> round(erf_radius(torch.ones(1, 3), share=0.9).radius)
        1

    Args:
        field: non-negative, (H, W).
        share: in 0..1.
    """
    weight = field.double() / field.double().sum()
    height, width = weight.shape
    top, left = height // 16, width // 16
    rows, columns = (torch.arange(n, dtype=torch.float64, device=field.device) + 0.5 for n in field.shape)
    per_row, per_column = weight.sum(1), weight.sum(0)
    y, x = (per_row @ rows).item(), (per_column @ columns).item()
    squares = (rows - y)[:, None] ** 2 + (columns - x)[None, :] ** 2
    nearest, order = squares.flatten().sort()
    held = weight.flatten()[order].cumsum(0)
    index = min(int(torch.searchsorted(held, share)), len(nearest) - 1)
    return ErfExtent(
        radius=math.sqrt(nearest[index]),
        share=share,
        height=math.sqrt(per_row @ (rows - y) ** 2),
        width=math.sqrt(per_column @ (columns - x) ** 2),
        centre=(y, x),
        border=max(0.0, 1 - weight[top : height - top, left : width - left].sum().item()),
    )


def _linearised(model: nn.Module) -> nn.Module:
    linear = copy.deepcopy(model).eval()
    linear.requires_grad_(False)
    done: tuple[str, ...] = ()
    for name, module in list(linear.named_modules()):
        simple = None if name.startswith(done) else _linear_form(module)
        if simple is None:
            continue
        if not name:  # the network is nothing else
            return simple
        simple._forward_hooks = module._forward_hooks  # some of timm's feature extractors collect maps by them
        simple._forward_pre_hooks = module._forward_pre_hooks
        linear.set_submodule(name, simple)
        done += (f"{name}.",)  # what was inside is gone
    return linear


def _linear_form(module: nn.Module) -> nn.Module | None:
    """What takes a module's place; None: itself."""
    if _is_activation(module) or type(module).__name__ in _GATES:
        return nn.Identity()
    if type(module).__name__ == "MaxPool2dSame":  # timm's, which it does not export
        return AvgPool2dSame(module.kernel_size, module.stride, ceil_mode=module.ceil_mode)
    if type(module) is nn.MaxPool2d:
        return nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
    return None


def _is_activation(module: nn.Module) -> bool:
    origin = type(module).__module__
    return (origin == activation.__name__ and not isinstance(module, _KEPT)) or origin.startswith(
        "timm.layers.activations"
    )
