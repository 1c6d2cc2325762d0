"""Pictures of genotypes, of training runs and of searches, as PNG files.

Everything is drawn through matplotlib's object interface: no pyplot, so no global state, no display and no window.
Curves are read from logs as `run_log` has it.
"""

import math
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, TwoSlopeNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..base.errors import NatsError
from ..base.files import atomic_file
from ..base.run_log import has_key, read_log, series
from ..genotype.genotype import PLAIN, Dilation, Genotype
from ..models.zoo import origin
from ..networks.erf import SHARE, ErfExtent, erf_radius
from ..networks.stages import searchable_convs

DPI = 120
# Inches. Bars get narrower before a chart gets so wide that a page or a screen would have to shrink it.
WIDEST_BAR, NARROWEST_BAR, BARS_WIDTH = 0.28, 0.15, 8.0
LEGEND_ROWS = 16
FEW_POINTS = 8
LABEL_SIZE = (24, 12)  # of a number beside a point, width and height in dots of the screen
SEARCH_CURVES = ("loss", "alpha_loss", "entropy", "share_changed")
KINDS = ("plain", "isotropic", "wide", "tall")

CIRCLE_COLOUR = "#5fd7ff"

# Light to dark. Grey, green, blue and orange stay apart for the common kinds of colour blindness.
PLAIN_COLOUR = "#d9d9d9"
ISOTROPIC_RAMP = LinearSegmentedColormap.from_list("isotropic", ["#8fd48a", "#2f9e55", "#00301c"])
WIDE_RAMP = LinearSegmentedColormap.from_list("wide", ["#b5d3ff", "#2a6fdb", "#0a1f5c"])
TALL_RAMP = LinearSegmentedColormap.from_list("tall", ["#ffbf66", "#e0690c", "#611a00"])


def genotype_chart(genotype: Genotype, path: str | os.PathLike) -> None:
    """Draw the share of each dilation in each convolution: one stacked bar per convolution, grouped by stage.

    Args:
        genotype: what to draw; convolutions it does not name are left out.
        path: the PNG file.
    """
    stages = genotype_stages(genotype)
    places = _bar_places(stages)
    overall = _overall_shares(genotype)
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
    _save_png(figure, path)


def training_curves(log_path: str | os.PathLike, path: str | os.PathLike) -> None:
    """Draw a training run: loss (raw and smoothed), AP where it was measured, and the learning rate.

    Args:
        log_path: JSONL; records with `step`, `epoch` and any of `loss`, `lr`, `AP`, `AP50` and `mask_AP`, in
            percent.
        path: the PNG file.

    Raises:
        NatsError: a log that can not be read or holds no loss.
    """
    records = read_log(log_path)
    if not has_key(records, "loss"):
        raise NatsError(f"{log_path}: no record has the key 'loss'")
    heights = {"loss": 3.0, "AP": 2.4, "lr": 1.0}
    panels = _panels({key: heights[key] for key in heights if has_key(records, key)})
    _plot_loss(panels["loss"], *series(records, "loss"), label="loss", colour="#0072b2")
    if "AP" in panels:
        for key, colour in (("AP", "#d55e00"), ("AP50", "#009e73"), ("mask_AP", "#0072b2")):
            if has_key(records, key):
                label = key.replace("_", " ")
                panels["AP"].plot(*series(records, key), marker="o", markersize=4, color=colour, label=label)
        _finish(panels["AP"], "AP (%)", bottom=0)
    if "lr" in panels:
        _plot(panels["lr"], *series(records, "lr"), color="#555555", linewidth=1)
        _finish(panels["lr"], "learning\nrate", bottom=0)
    _finish(panels["loss"], "loss")
    _save_curves(panels, path)


def search_curves(log_path: str | os.PathLike, path: str | os.PathLike) -> None:
    """Draw a search: losses of the weights and of alpha, alpha's entropy, and the share of channels changed.

    Args:
        log_path: JSONL; records with `step`, `epoch` and any of `loss`, `alpha_loss`, `entropy` (of softmax(alpha),
            relative to the uniform distribution's, in 0..1) and `share_changed` (of channels whose strongest
            candidate is not the plain dilation, in 0..1).
        path: the PNG file.

    Raises:
        NatsError: a log that can not be read or holds none of these.
    """
    records = read_log(log_path)
    losses = {
        key: (label, colour)
        for key, label, colour in (("loss", "weights", "#0072b2"), ("alpha_loss", "alpha", "#d55e00"))
        if has_key(records, key)
    }
    titles = {"entropy": "relative\nentropy", "share_changed": "channels\nchanged"}
    shares = [key for key in titles if has_key(records, key)]
    if not losses and not shares:
        raise NatsError(f"{log_path}: no record has one of the keys {', '.join(SEARCH_CURVES)}")
    panels = _panels({"loss": 3.0} | dict.fromkeys(shares, 2.0) if losses else dict.fromkeys(shares, 2.0))
    for key, (label, colour) in losses.items():
        _plot_loss(panels["loss"], *series(records, key), label=label, colour=colour)
    if losses:
        _finish(panels["loss"], "loss" if len(losses) > 1 else f"loss\n({losses.popitem()[1][0]})")
    for key in shares:
        _plot(panels[key], *series(records, key), color="#333333", linewidth=1.5)
        panels[key].set_ylim(-0.03, 1.03)
        _finish(panels[key], titles[key])
    _save_curves(panels, path)


def alpha_heatmaps(
    history: Sequence[Mapping[str, Any]],
    candidates: Mapping[str, Sequence[Dilation]],
    path: str | os.PathLike,
    temperatures: Sequence[float] | None = None,
) -> None:
    """Draw how the search made up its mind: the mean of the groups' probabilities, per candidate, over time.

    One panel per convolution; rows are candidates, columns are snapshots. All panels share one colour scale, of
    multiples of the uniform probability: white is undecided for any number of candidates, green is favoured.

    Args:
        history: snapshots in order of time, each with `epoch`, counted when it was taken, and `alpha`, the architecture
            parameters of each convolution with the shape (groups, candidates).
        candidates: dilations of each convolution's candidates.
        path: the PNG file.
        temperatures: one per snapshot, of the probabilities softmax(alpha / temperature); None: all 1.

    Raises:
        NatsError: no snapshots or no convolutions.
    """
    if not history or not candidates:
        raise NatsError("alpha_heatmaps: expected at least one snapshot and one convolution")
    edges = _edges([float(snapshot["epoch"]) for snapshot in history])
    divisors = np.ones(len(history)) if temperatures is None else np.asarray(temperatures, dtype=float)
    means = {
        conv: len(dilations) * _mean_probabilities([snapshot["alpha"][conv] for snapshot in history], divisors)
        for conv, dilations in candidates.items()
    }
    figure, grid = _heatmap_grid(len(means), max(map(len, candidates.values())))
    figure.supxlabel("epoch", fontsize=9)
    # at least twice the uniform probability, so that an undecided search does not look like a decided one
    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, *(mean.max() for mean in means.values())))
    for axes, (conv, mean) in zip(grid.flat, means.items(), strict=False):
        mesh = axes.pcolormesh(edges, np.arange(len(mean) + 1), mean, cmap="BrBG", norm=norm)
        _label_heatmap(axes, conv, candidates[conv])
    _add_colour_bar(mesh, grid, "mean probability / uniform")
    _save_png(figure, path)


def candidate_probabilities(alpha: Any, temperature: float | np.ndarray = 1.0) -> np.ndarray:
    """softmax(alpha / temperature) over the last axis, that of the candidates."""
    logits = np.asarray(alpha, dtype=float) / temperature
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def score_heatmaps(
    scores: Mapping[str, Any], candidates: Mapping[str, Sequence[Dilation]], path: str | os.PathLike, title: str = ""
) -> None:
    """Draw a round of scoring in a sensitivity search: what each group's change to each candidate should do.

    One panel per convolution; rows are candidates, columns are groups. All panels share one colour scale, which ends
    at the 99th percentile of the scores' magnitudes.

    Args:
        scores: predicted changes of the loss, below 0 where it should fall: per convolution (groups, candidates).
        candidates: dilations of each convolution's candidates.
        path: the PNG file.
        title: which round it is.
    """
    arrays = {conv: np.asarray(scores[conv], dtype=float).T for conv in candidates}
    top = np.quantile(np.concatenate([np.abs(array).ravel() for array in arrays.values()]), 0.99) or 1.0
    figure, grid = _heatmap_grid(len(arrays), max(map(len, candidates.values())), sharex=False)
    figure.suptitle(title, fontsize=9)
    figure.supxlabel("group of output channels", fontsize=9)
    for axes, (conv, array) in zip(grid.flat, arrays.items(), strict=False):
        mesh = axes.pcolormesh(array, cmap="RdBu_r", vmin=-top, vmax=top)
        _label_heatmap(axes, conv, candidates[conv])
    _add_colour_bar(mesh, grid, "predicted change of loss", extend="both")
    _save_png(figure, path)


def prediction_scatter(trials: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draw the trials of a sensitivity search: the change of the loss that was predicted, and the actual one.

    Accepted and rejected trials are told apart by colour and by shape; each is labelled with its number of changes. On
    the dashed line a prediction is exact.

    Args:
        trials: each with `predicted` and `actual`, and if known `accepted` and `changes` (groups that were changed).
        path: the PNG file.

    Raises:
        NatsError: no trial with two finite numbers.
    """
    drawn = [trial for trial in trials if np.isfinite([trial["predicted"], trial["actual"]]).all()]
    if not drawn:
        raise NatsError("prediction_scatter: expected at least one trial whose changes of the loss are finite")
    figure = Figure(figsize=(6.4, 5.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(_limits([trial["predicted"] for trial in drawn]))
    axes.set_ylim(_limits([trial["actual"] for trial in drawn]))
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.axline((0, 0), slope=1, color="#555555", linewidth=1, linestyle="--", label="as predicted")
    for accepted, label, colour, marker in ((True, "accepted", "#0072b2", "o"), (False, "rejected", "#d55e00", "X")):
        points = [trial for trial in drawn if bool(trial.get("accepted")) is accepted]
        if points:
            x, y = ([trial[key] for trial in points] for key in ("predicted", "actual"))
            axes.scatter(x, y, s=50, color=colour, marker=marker, label=f"{label} ({len(points)})", zorder=3)
    _label_points(axes, drawn)
    axes.set_xlabel("predicted change of the loss (numbers: groups changed)", fontsize=9)
    _finish(axes, "actual change of the loss on held-back images", legend=False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)  # anywhere else it may cover trials
    _save_png(figure, path)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Of an axis that shows the values and 0, with room for labels."""
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.12 * (high - low or 1.0)
    return low - room, high + room


def _label_points(axes: Axes, trials: Iterable[Mapping[str, Any]]) -> None:
    """Write beside each trial how many groups it changed, the largest first, where there is room."""
    written: list[np.ndarray] = []
    for trial in sorted(trials, key=lambda trial: -trial.get("changes", 0)):
        place = (trial["predicted"], trial["actual"])
        dots = axes.transData.transform(place)
        if "changes" in trial and all((np.abs(dots - other) > LABEL_SIZE).any() for other in written):
            axes.annotate(f"{trial['changes']}", place, xytext=(6, 5), textcoords="offset points", fontsize=7)
            written.append(dots)


def erf_picture(
    plain: Tensor, nats: Tensor, path: str | os.PathLike, title: str = "", nats_name: str = "NATS", share: float = SHARE
) -> None:
    """Draw two effective receptive fields side by side, on one colour scale, each with its radius.

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
    _add_colour_bar(image, grid, "|gradient| per pixel, in millionths of all (square-root scale)", extend="max")
    _save_png(figure, path)


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


def dilation_name(dilation: Dilation) -> str:
    """What pictures call a dilation: `1`, `2`, `3` when it is isotropic, else height×width, such as `1×3`."""
    height, width = dilation
    return str(height) if height == width else f"{height}×{width}"


def dilation_colour(dilation: Dilation) -> str:
    """The colour of a dilation, the same in every picture, as `#rrggbb`.

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


def dilation_kind(dilation: Dilation) -> Literal["plain", "isotropic", "wide", "tall"]:
    """What a dilation does to a kernel: nothing, or it widens it equally, or along one axis more than the other."""
    height, width = dilation
    if height == width:
        return "plain" if dilation == PLAIN else "isotropic"
    return "wide" if width > height else "tall"


def _stacking_order(dilation: Dilation) -> tuple[int, Dilation]:
    """Kind by kind, each by size."""
    return KINDS.index(dilation_kind(dilation)), dilation


def dilation_hatch(dilation: Dilation) -> str | None:
    """The pattern of a dilation in bars: only those are hatched that have neither direction to themselves.

    Their hues lie between two others and are too near to those for some eyes.
    """
    low, high = sorted(dilation)
    return None if low in (1, high) else "////" if low == 2 else "xxxx"


def _split_stage(conv: str) -> tuple[str, str]:
    """`layer2.0.conv2` -> (`layer2`, `0.conv2`): a stage's name ends with the first part that ends with a digit."""
    parts = conv.split(".")
    end = next((i for i, part in enumerate(parts[:-1], start=1) if part[-1:].isdigit()), 0)
    return ".".join(parts[:end]), ".".join(parts[end:])


def genotype_stages(genotype: Genotype) -> dict[str, list[str]]:
    """The genotype's convolutions by the title of their stage, both in order of appearance.

    Stages are read off the convolutions' names (`layer2`, `s2`, `blocks.2`); where those tell none (VGG's
    `features.5`), they are timm's.
    """
    titles = {conv: _split_stage(conv)[0] for conv in genotype.convs}
    if not any(titles.values()):
        titles |= _timm_stages(genotype)
    stages: dict[str, list[str]] = {}
    for conv, title in titles.items():
        stages.setdefault(title, []).append(conv)
    return stages


def _timm_stages(genotype: Genotype) -> dict[str, str]:
    """Stages of the genotype's convolutions in timm's network; none if timm has no such network."""
    if not timm.is_model(genotype.architecture):
        return {}
    with torch.device("meta"):
        stages = searchable_convs(timm.create_model(genotype.architecture))
    return {conv: f"stage {stage}" for stage, convs in stages.items() for conv in convs if conv in genotype.convs}


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


def _overall_shares(genotype: Genotype) -> dict[Dilation, float]:
    """Share of each dilation among the channels of all named convolutions, in the order of the stacks."""
    counts: dict[Dilation, int] = {}
    for run in (run for runs in genotype.convs.values() for run in runs):
        counts[run.dilation] = counts.get(run.dilation, 0) + run.channels
    return {dilation: counts[dilation] / sum(counts.values()) for dilation in sorted(counts, key=_stacking_order)}


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
    labels, title = _short_labels([_name_in_stage(conv, stages) for conv in places])
    axes.set_xlabel(title, fontsize=9)
    rotation = 90 if max(map(len, labels), default=0) > 3 else 0
    axes.set_xticks(list(places.values()), labels, fontsize=fontsize, rotation=rotation)
    axes.tick_params(axis="x", length=0)


def _name_in_stage(conv: str, stages: Mapping[str, Sequence[str]]) -> str:
    stage, name = _split_stage(conv)
    return name if stage in stages else conv


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
            label=f"{dilation_name(d)}  ({overall[d]:.0%})",
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


def _panels(heights: Mapping[str, float]) -> dict[str, Axes]:
    """One panel per key, above one another, with a common epoch axis."""
    figure = Figure(figsize=(7.0, 0.9 + 0.95 * sum(heights.values())), layout="constrained")
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights.values()))
    return dict(zip(heights, grid[:, 0], strict=True))


def _plot(axes: Axes, epochs: Sequence[float], values: Sequence[float], **style: Any) -> None:
    """A line, and dots where the points are too few to make one."""
    axes.plot(epochs, values, marker="o" if len(values) < FEW_POINTS else None, markersize=4, **style)


def _plot_loss(axes: Axes, epochs: list[float], values: list[float], label: str, colour: str) -> None:
    axes.plot(epochs, values, color=colour, alpha=0.3, linewidth=0.7)
    _plot(axes, epochs, _smooth(values).tolist(), color=colour, linewidth=1.8, label=label)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Centred moving average over about a twentieth of the series; at its ends over what there is."""
    array = np.asarray(values, dtype=float)
    window = np.ones(2 * (len(array) // 40) + 1)
    finite = np.isfinite(array)
    count = np.convolve(finite, window, mode="same")
    total = np.convolve(np.where(finite, array, 0.0), window, mode="same")
    return np.divide(total, count, out=np.full(len(array), np.nan), where=count > 0.5)


def _finish(axes: Axes, ylabel: str, bottom: float | None = None, legend: bool = True) -> None:
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    if legend and len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=2)


def _save_curves(panels: Mapping[str, Axes], path: str | os.PathLike) -> None:
    axes = list(panels.values())
    axes[-1].set_xlabel("epoch", fontsize=9)
    figure = axes[0].figure
    assert isinstance(figure, Figure)
    figure.align_ylabels(axes)
    _save_png(figure, path)


def _mean_probabilities(snapshots: Sequence[Any], temperatures: np.ndarray) -> np.ndarray:
    """Alpha over time, (snapshots, groups, candidates), to mean probabilities, (candidates, snapshots)."""
    return candidate_probabilities(snapshots, temperatures[:, None, None]).mean(axis=1).T


def _heatmap_grid(panels: int, rows_per_panel: int, sharex: bool = True) -> tuple[Figure, np.ndarray]:
    columns = min(panels, min((4, 5, 3), key=lambda number: -panels % number) if panels <= 16 else 6)
    rows = -(-panels // columns)
    size = (1.2 + 2.1 * columns, max(2.4, 0.6 + (0.5 + 0.15 * rows_per_panel) * rows))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=sharex, squeeze=False)
    for number, axes in enumerate(grid.flat):
        is_lowest = panels - columns <= number < panels
        axes.tick_params(axis="x", labelsize=7, labelbottom=is_lowest or not sharex)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_visible(number < panels)
    return figure, grid


def _add_colour_bar(colours: ScalarMappable, grid: np.ndarray, label: str, **options: Any) -> None:
    """One for all panels, to their right."""
    bar = grid.flat[0].figure.colorbar(colours, ax=grid, fraction=0.03, aspect=30, **options)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _label_heatmap(axes: Axes, conv: str, candidates: Sequence[Dilation]) -> None:
    axes.set_title(conv, fontsize=8)
    axes.set_yticks(np.arange(len(candidates)) + 0.5, [dilation_name(d) for d in candidates], fontsize=7)
    axes.invert_yaxis()


def _edges(epochs: Sequence[float]) -> np.ndarray:
    """Columns' borders: a snapshot, taken when so many epochs were done, stands for the time since the one before."""
    typical = (epochs[-1] - epochs[0]) / (len(epochs) - 1) if len(epochs) > 1 else 1.0
    return np.insert(epochs, 0, epochs[0] - typical)


def _save_png(figure: Figure, path: str | os.PathLike) -> None:
    with atomic_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=DPI, metadata={"Software": None})
