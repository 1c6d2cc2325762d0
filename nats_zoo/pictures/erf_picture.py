"""The picture of receptive fields, networks side by side."""

import os
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from ..networks.erf import SHARE, ErfExtent, erf_radius
from .style import add_colour_bar, save_png

CIRCLE_COLOUR = "#5fd7ff"


def erf_picture(
    plain: Tensor, nats: Tensor, path: str | os.PathLike, title: str = "", nats_name: str = "NATS", share: float = SHARE
) -> None:
    """Draw two effective receptive fields side by side, on one colour scale, each with its radius.

        >>> plain, nats = plain_and_nats_fields(timm.create_model("nats_resnet50", features_only=True))
        >>> erf_picture(plain, nats, "erf.png", title="ResNet-50 at random weights")

    Colours show the share of |gradient| per pixel; each field adds up to 1. They follow the square root, so that the
    tails show, and end at the 99.9th percentile of both. The circle is that of `erf.erf_radius`; the plain one is
    repeated, dashed, in the second picture. A field that the image is too small for is said to be cut.

    Args:
        plain, nats: fields (H, W) of `erf.effective_receptive_field`, of equal size.
        path: the PNG file.
        title: what was measured: network, weights, input.
        nats_name: what the second network is called, such as its genotype's name.
        share: of the total inside the circle, in 0..1.
    """
    fields = [(1e6 * field / field.sum()).cpu().numpy() for field in (plain, nats)]
    extents = [erf_radius(field, share) for field in (plain, nats)]
    norm = PowerNorm(0.5, 0, max(np.quantile(field, 0.999) for field in fields))
    figure = Figure(figsize=(10.0, 5.8), layout="compressed")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, name, field, extent in zip(grid, ("plain", nats_name), fields, extents, strict=True):
        height, width = field.shape
        image = axes.imshow(field, norm=norm, cmap="magma", extent=(0, width, height, 0))
        _draw_circle(axes, extent, linewidth=1.6)
        _describe_extent(axes, name, extent)
    _draw_circle(grid[1], extents[0], linewidth=1.2, linestyle="--")
    grid[0].set_ylabel("row (pixels)", fontsize=9)
    add_colour_bar(image, grid, "|gradient| per pixel, in millionths of all (square-root scale)", extend="max")
    save_png(figure, path)


def _draw_circle(axes: Axes, extent: ErfExtent, **style: Any) -> None:
    y, x = extent.centre
    axes.add_patch(Circle((x, y), extent.radius, fill=False, edgecolor=CIRCLE_COLOUR, **style))


def _describe_extent(axes: Axes, name: str, extent: ErfExtent) -> None:
    at_least = "at least " if extent.is_cut else ""
    axes.set_title(f"{name}\n{extent.share:.0%} within a radius of {at_least}{extent.radius:.0f} pixels", fontsize=10)
    spread = f"standard deviation: {extent.height:.0f} high, {extent.width:.0f} wide"
    cut = "; cut by the border" if extent.is_cut else ""
    axes.set_xlabel(f"column (pixels)\n{spread}{cut}", fontsize=9)
    axes.tick_params(labelsize=8)
