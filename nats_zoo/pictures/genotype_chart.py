"""The chart of a genotype: a bar per convolution, a colour per dilation."""

import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..genotype.genotype import Genotype
from ..genotype.provenance import origin
from ..genotype.runs import KINDS, PLAIN, Dilation
from ..networks.stages import genotype_stages, split_stage
from .style import BARS_WIDTH, NARROWEST_BAR, WIDEST_BAR, save_png

LEGEND_ROWS = 16
# Light to dark. Grey, green, blue and orange stay apart for the common kinds of colour blindness.
PLAIN_COLOUR = "#d9d9d9"
ISOTROPIC_RAMP = LinearSegmentedColormap.from_list("isotropic", ["#8fd48a", "#2f9e55", "#00301c"])
WIDE_RAMP = LinearSegmentedColormap.from_list("wide", ["#b5d3ff", "#2a6fdb", "#0a1f5c"])
TALL_RAMP = LinearSegmentedColormap.from_list("tall", ["#ffbf66", "#e0690c", "#611a00"])


def genotype_chart(genotype: Genotype, path: str | os.PathLike) -> None:
    """Draw the share of each dilation in each convolution: one stacked bar per convolution, grouped by stage.

        >>> genotype_chart(Genotype.load("mine.json"), "mine.png")

    Args:
        genotype: what to draw; convolutions it does not name are left out.
        path: the PNG file.
    """
    stages = genotype_stages(genotype)
    places = _bar_places(stages)
    counts = genotype.all_runs().counts()
    stacked = sorted(counts, key=lambda d: (KINDS.index(d.kind()), d))  # kind by kind, each by size
    overall = {dilation: counts[dilation] / counts.total() for dilation in stacked}
    bars = 1 + max(places.values(), default=0)
    bar_width = min(WIDEST_BAR, max(NARROWEST_BAR, BARS_WIDTH / bars))
    width = max(6.0, 2.4 + 1.2 * (_legend_columns(overall) - 1) + bar_width * bars)
    height = max(4.1, 1.4 + 0.2 * min(len(overall), LEGEND_ROWS))
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(_genotype_title(genotype, max_length=int(14 * width)), fontsize=9)
    axes = figure.add_subplot()
    _stack_bars(axes, genotype.dilation_shares(), places, list(overall))
    _label_bars(axes, stages, places, fontsize=8 if bar_width > 0.2 else 6.5)
    _label_stages(axes, stages, places)
    _add_dilation_legend(axes, overall)
    save_png(figure, path)


def dilation_colour(dilation: Dilation) -> str:
    """Give the colour of a dilation, the same in every picture, as `#rrggbb`.

        >>> dilation_colour(Dilation(1, 1))
        '#d9d9d9'

    The shade tells the larger of the two dilations, the hue the direction: grey is plain, green isotropic, blue
    wide, orange tall. Where neither dilation is 1 the hue lies between its direction's and the isotropic one.
    """
    height, width = dilation
    if dilation == PLAIN:
        return PLAIN_COLOUR
    low, high = sorted(dilation)
    # full depth at dilation 6: the candidates in use, 2 to 5, spread over the ramp
    shade = min(1.0, math.log(high / 2, 3))
    isotropic = np.array(ISOTROPIC_RAMP(shade))
    directed = np.array(WIDE_RAMP(shade) if width > height else TALL_RAMP(shade))
    return to_hex(directed + (isotropic - directed) * (low - 1) / (high - 1))


def dilation_hatch(dilation: Dilation) -> str | None:
    """Give the pattern of a dilation in bars: only those are hatched that have neither direction to themselves.

    Their hues lie between two others and are too near to those for some eyes.

        >>> dilation_hatch(Dilation(2, 3))
        '////'
    """
    low, high = sorted(dilation)
    return None if low in (1, high) else "////" if low == 2 else "xxxx"


def _bar_places(stages: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Position of each convolution's bar: 1 apart, and a gap where a stage begins."""
    places: dict[str, float] = {}
    position = 0.0
    for convs in stages.values():
        for conv in convs:
            places[conv] = position
            position += 1
        position += 0.8
    return places


def _genotype_title(genotype: Genotype, max_length: int) -> str:
    convs = len(genotype.convs)
    lines = [
        f"{genotype.architecture}: {convs} convolution{'s' * (convs != 1)}, {genotype.share_changed():.0%} of their"
        " channels changed",
        origin(genotype.provenance),
    ]
    return "\n".join(
        wrapped for line in lines for wrapped in textwrap.wrap(line, max_length, max_lines=2, placeholder="…")
    )


def _stack_bars(
    axes: Axes,
    shares: Mapping[str, Mapping[Dilation, float]],
    places: Mapping[str, float],
    dilations: Iterable[Dilation],
) -> None:
    positions = list(places.values())
    bottom = np.zeros(len(positions))
    for dilation in dilations:
        heights = np.array([shares[conv].get(dilation, 0.0) for conv in places])
        axes.bar(
            positions,
            heights,
            bottom=bottom,
            width=0.86,
            facecolor=dilation_colour(dilation),
            hatch=dilation_hatch(dilation),
            edgecolor="white",
            linewidth=0.5,
        )
        bottom += heights
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.7, max(positions, default=0) + 0.7)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"], fontsize=9)
    axes.set_ylabel("output channels", fontsize=9)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _label_bars(axes: Axes, stages: Mapping[str, Sequence[str]], places: Mapping[str, float], fontsize: float) -> None:
    """Name each bar by what its convolution's name adds to the stage; what all names share goes below, once."""
    split = {conv: split_stage(conv) for conv in places}
    labels, title = _short_labels([name if stage in stages else conv for conv, (stage, name) in split.items()])
    axes.set_xlabel(title, fontsize=9)
    rotation = 90 if max(map(len, labels), default=0) > 3 else 0
    axes.set_xticks(list(places.values()), labels, fontsize=fontsize, rotation=rotation)
    axes.tick_params(axis="x", length=0)


def _short_labels(names: Sequence[str]) -> tuple[list[str], str]:
    """Names cut down to the one number in which they differ, and what they share as a title.

    `0.conv2`, `1.conv2` give `0`, `1` and `block (conv2 of each)`. Names that differ in more stay whole.
    """
    parts = [re.split(r"(\d+)", name) for name in names]
    places = {i for split in parts for i in range(len(split)) if i < len(parts[0]) and split[i] != parts[0][i]}
    place = min(places, default=1)
    if len({len(split) for split in parts}) != 1 or len(places) > 1 or place % 2 == 0 or place >= len(parts[0]):
        return list(names), ""
    head, tail = "".join(parts[0][:place]), "".join(parts[0][place + 1 :])
    title = f"block ({tail[1:]} of each)" if not head and tail[:1] == "." else f"N of {head}N{tail}"
    return [split[place] for split in parts], title


def _label_stages(axes: Axes, stages: Mapping[str, Sequence[str]], places: Mapping[str, float]) -> None:
    centres = [sum(places[conv] for conv in convs) / len(convs) for convs in stages.values()]
    above = axes.secondary_xaxis("top")
    above.set_xticks(centres, list(stages), fontsize=10)
    above.tick_params(axis="x", length=0)
    above.spines["top"].set_visible(False)


def _add_dilation_legend(axes: Axes, overall: Mapping[Dilation, float]) -> None:
    """Names, colours and overall shares of the dilations, in the order of the stacks; a note if there are none."""
    if not overall:
        axes.text(0.5, 0.5, "no convolution is changed", transform=axes.transAxes, ha="center")
        return
    handles = [
        Patch(
            facecolor=dilation_colour(d),
            hatch=dilation_hatch(d),
            edgecolor="white",
            linewidth=0,
            label=f"{d.name()}  ({overall[d]:.0%})",
        )
        for d in overall
    ]
    axes.legend(
        handles=handles[::-1],
        title="dilation\n(height×width)",
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        fontsize=9,
        title_fontsize=9,
        ncols=_legend_columns(overall),
    )


def _legend_columns(overall: Mapping[Dilation, float]) -> int:
    return max(1, -(-len(overall) // LEGEND_ROWS))
