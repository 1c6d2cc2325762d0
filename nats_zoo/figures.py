"""Pictures of genotypes, of training runs and of searches, as PNG files.

Everything is drawn through matplotlib's object interface: no pyplot, so no global state, no display and no window.
Curves are read from JSONL logs, one record per line; `null` counts as absent, and a record that repeats a step (a
resumed run) replaces the earlier one.
"""

import json
import math
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from .errors import NatsError
from .files import atomic_file
from .genotype import PLAIN, Dilation, Genotype

DPI = 120
WIDTH_PER_BAR = 0.28  # inches
LOG_KEYS = ("step", "epoch", "loss", "lr", "AP", "AP50", "alpha_loss", "entropy", "share_changed")

# Light to dark. Grey, green, blue and orange stay apart for the common kinds of colour blindness.
PLAIN_COLOUR = "#d9d9d9"
ISOTROPIC_RAMP = LinearSegmentedColormap.from_list("isotropic", ["#9fdc9a", "#2f9e55", "#00301c"])
WIDE_RAMP = LinearSegmentedColormap.from_list("wide", ["#b5d3ff", "#2a6fdb", "#0a1f5c"])
TALL_RAMP = LinearSegmentedColormap.from_list("tall", ["#ffd08a", "#e0690c", "#611a00"])


def genotype_chart(genotype: Genotype, path: str | os.PathLike) -> None:
    """Draw the share of each dilation in each convolution: one stacked bar per convolution, grouped by stage.

    Args:
        genotype: what to draw; convolutions it does not name are left out.
        path: the PNG file.
    """
    shares = genotype.dilation_shares()
    places = _bar_places(list(shares))
    width = max(6.0, 2.4 + WIDTH_PER_BAR * (1 + max(places.values(), default=0)))
    figure = Figure(figsize=(width, 3.9), layout="constrained")
    figure.suptitle(_genotype_title(genotype, max_length=int(14 * width)), fontsize=9)
    axes = figure.add_subplot()
    overall = _overall_shares(genotype)
    _stack_bars(axes, shares, places, list(overall))
    _label_bars(axes, places)
    _label_stages(axes, places)
    _add_dilation_legend(axes, overall)
    _save_png(figure, path)


def training_curves(log_path: str | os.PathLike, path: str | os.PathLike) -> None:
    """Draw a training run: loss (raw and smoothed), AP where it was measured, and the learning rate.

    Args:
        log_path: JSONL; records with `step`, `epoch` and any of `loss`, `lr`, `AP`, `AP50`. AP is in percent.
        path: the PNG file.

    Raises:
        NatsError: a log that can not be read or holds no loss.
    """
    records = _read_log(log_path)
    _require(records, "loss", log_path)
    heights = {"loss": 3.0, "AP": 2.4, "lr": 1.0}
    panels = _panels({key: heights[key] for key in heights if _has(records, key)})
    _plot_loss(panels["loss"], *_series(records, "loss"), label="loss", colour="#0072b2")
    if "AP" in panels:
        for key, colour in (("AP", "#d55e00"), ("AP50", "#009e73")):
            if _has(records, key):
                panels["AP"].plot(*_series(records, key), marker="o", markersize=4, color=colour, label=key)
        _finish(panels["AP"], "AP (%)", bottom=0)
    if "lr" in panels:
        panels["lr"].plot(*_series(records, "lr"), color="#555555", linewidth=1)
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
        NatsError: a log that can not be read or holds no loss.
    """
    records = _read_log(log_path)
    _require(records, "loss", log_path)
    heights = {"loss": 3.0, "entropy": 2.0, "share_changed": 2.0}
    panels = _panels({key: heights[key] for key in heights if _has(records, key)})
    _plot_loss(panels["loss"], *_series(records, "loss"), label="weights", colour="#0072b2")
    if _has(records, "alpha_loss"):
        _plot_loss(panels["loss"], *_series(records, "alpha_loss"), label="alpha", colour="#d55e00")
    _finish(panels["loss"], "loss")
    for key, title in (("entropy", "relative\nentropy"), ("share_changed", "channels\nchanged")):
        if key in panels:
            panels[key].plot(*_series(records, key), color="#333333", linewidth=1.5)
            panels[key].set_ylim(-0.03, 1.03)
            _finish(panels[key], title)
    _save_curves(panels, path)


def alpha_heatmaps(
    history: Sequence[Mapping[str, Any]], candidates: Mapping[str, Sequence[Dilation]], path: str | os.PathLike
) -> None:
    """Draw how the search made up its mind: the mean of softmax(alpha) over the groups, per candidate, over time.

    One panel per convolution; rows are candidates, columns are snapshots, all panels share one colour scale.

    Args:
        history: snapshots in order of time, each with `epoch` and `alpha`, the architecture parameters of each
            convolution with the shape (groups, candidates).
        candidates: dilations of each convolution's candidates.
        path: the PNG file.

    Raises:
        NatsError: no snapshots or no convolutions.
    """
    if not history or not candidates:
        raise NatsError("alpha_heatmaps: expected at least one snapshot and one convolution")
    edges = _edges([float(snapshot["epoch"]) for snapshot in history])
    means = {conv: _mean_probabilities([snapshot["alpha"][conv] for snapshot in history]) for conv in candidates}
    figure, grid = _heatmap_grid(len(means), max(map(len, candidates.values())))
    # at least twice the uniform probability, so that an undecided search does not look like a decided one
    top = max(*(mean.max() for mean in means.values()), 2 / min(map(len, candidates.values())))
    for axes, (conv, mean) in zip(grid.flat, means.items(), strict=False):
        mesh = axes.pcolormesh(edges, np.arange(len(mean) + 1), mean, cmap="viridis", vmin=0, vmax=top)
        axes.set_title(conv, fontsize=8)
        axes.set_yticks(np.arange(len(mean)) + 0.5, [dilation_name(d) for d in candidates[conv]], fontsize=7)
        axes.invert_yaxis()
    figure.colorbar(mesh, ax=grid, fraction=0.03, aspect=30).set_label("mean probability", fontsize=9)
    _save_png(figure, path)


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


def _stacking_order(dilation: Dilation) -> tuple[int, Dilation]:
    """Plain, isotropic, wide, tall, each by size."""
    height, width = dilation
    return (0 if height == width else 1 if width > height else 2, dilation)


def _split_stage(conv: str) -> tuple[str, str]:
    """`layer2.0.conv2` -> (`layer2`, `0.conv2`): a stage's name ends with the first part that ends with a digit."""
    parts = conv.split(".")
    end = next((i for i, part in enumerate(parts[:-1], start=1) if part[-1:].isdigit()), 0)
    return ".".join(parts[:end]), ".".join(parts[end:])


def _bar_places(convs: Sequence[str]) -> dict[str, float]:
    """Position of each convolution's bar: 1 apart, and a gap where a stage begins."""
    places: dict[str, float] = {}
    position, previous = 0.0, None
    for conv in convs:
        stage, _ = _split_stage(conv)
        position += 0.8 if previous not in (None, stage) else 0.0
        places[conv] = position
        position, previous = position + 1, stage
    return places


def _overall_shares(genotype: Genotype) -> dict[Dilation, float]:
    """Share of each dilation among the channels of all named convolutions, in the order of the stacks."""
    counts: dict[Dilation, int] = {}
    for run in (run for runs in genotype.convs.values() for run in runs):
        counts[run.dilation] = counts.get(run.dilation, 0) + run.channels
    return {dilation: counts[dilation] / sum(counts.values()) for dilation in sorted(counts, key=_stacking_order)}


def _genotype_title(genotype: Genotype, max_length: int) -> str:
    provenance = genotype.provenance
    facts = [str(provenance[key]) for key in ("method", "dataset", "detector") if provenance.get(key)]
    facts += [f"{key} {provenance[key]}" for key in ("space", "groups", "epochs", "seed") if key in provenance]
    title = " ".join(f"{genotype.architecture}: {', '.join(facts) or 'provenance unknown'}".split())
    return title if len(title) <= max_length else f"{title[: max_length - 1]}…"


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
            color=dilation_colour(dilation),
            edgecolor="white",
            linewidth=0.5,
        )
        bottom += heights
    axes.set_ylim(0, 1)
    axes.set_xlim(-0.7, max(positions, default=0) + 0.7)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"], fontsize=9)
    axes.set_ylabel("output channels", fontsize=9)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _label_bars(axes: Axes, places: Mapping[str, float]) -> None:
    """Name each bar by what its convolution's name adds to the stage; a tail that all share goes below, once."""
    labels = [_split_stage(conv)[1] for conv in places]
    tails = {label.partition(".")[2] for label in labels}
    if len(tails) == 1 and "" not in tails:
        axes.set_xlabel(f"block ({tails.pop()} of each)", fontsize=9)
        labels = [label.partition(".")[0] for label in labels]
    rotation = 90 if max(map(len, labels), default=0) > 3 else 0
    axes.set_xticks(list(places.values()), labels, fontsize=8, rotation=rotation)
    axes.tick_params(axis="x", length=0)


def _label_stages(axes: Axes, places: Mapping[str, float]) -> None:
    stages: dict[str, list[float]] = {}
    for conv, place in places.items():
        stages.setdefault(_split_stage(conv)[0], []).append(place)
    above = axes.secondary_xaxis("top")
    above.set_xticks([sum(group) / len(group) for group in stages.values()], list(stages), fontsize=10)
    above.tick_params(axis="x", length=0)
    above.spines["top"].set_visible(False)


def _add_dilation_legend(axes: Axes, overall: Mapping[Dilation, float]) -> None:
    """Names, colours and overall shares of the dilations, in the order of the stacks; a note if there are none."""
    if not overall:
        axes.text(0.5, 0.5, "no convolution is changed", transform=axes.transAxes, ha="center")
        return
    handles = [Patch(color=dilation_colour(d), label=f"{dilation_name(d)}  ({overall[d]:.0%})") for d in overall]
    axes.legend(
        handles=handles[::-1],
        title="dilation\n(height×width)",
        loc="upper left",
        bbox_to_anchor=(1.01, 1.02),
        frameon=False,
        fontsize=9,
        title_fontsize=9,
    )


def _read_log(log_path: str | os.PathLike) -> list[dict[str, Any]]:
    try:
        lines = Path(log_path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NatsError(f"{log_path}: can not be read as a log: {error}") from error
    return [_read_record(line, f"{log_path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _read_record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise NatsError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict) or not {"step", "epoch"} <= record.keys():
        raise NatsError(f"{where}: expected an object with the keys 'step' and 'epoch'")
    record = {key: record[key] for key in LOG_KEYS if record.get(key) is not None}
    for key, value in record.items():
        if not isinstance(value, int | float):
            raise NatsError(f"{where}: {key}: expected a number, found {reprlib.repr(value)}")
    return record


def _has(records: Iterable[Mapping[str, Any]], key: str) -> bool:
    return any(key in record for record in records)


def _require(records: Iterable[Mapping[str, Any]], key: str, log_path: str | os.PathLike) -> None:
    if not _has(records, key):
        raise NatsError(f"{log_path}: no record has the key {key!r}")


def _series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values of the records that have the key, in order of their steps."""
    latest = {record["step"]: record for record in records if key in record}
    ordered = [latest[step] for step in sorted(latest)]
    return [record["epoch"] for record in ordered], [record[key] for record in ordered]


def _panels(heights: Mapping[str, float]) -> dict[str, Axes]:
    """One panel per key, above one another, with a common epoch axis."""
    figure = Figure(figsize=(7.0, 0.9 + 0.95 * sum(heights.values())), layout="constrained")
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights.values()))
    return dict(zip(heights, grid[:, 0], strict=True))


def _plot_loss(axes: Axes, epochs: list[float], values: list[float], label: str, colour: str) -> None:
    axes.plot(epochs, values, color=colour, alpha=0.3, linewidth=0.7)
    axes.plot(epochs, _smooth(values), color=colour, linewidth=1.8, label=label)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Centred moving average over about a twentieth of the series; at its ends over what there is."""
    array = np.asarray(values, dtype=float)
    window = np.ones(2 * (len(array) // 40) + 1)
    finite = np.isfinite(array)
    count = np.convolve(finite, window, mode="same")
    total = np.convolve(np.where(finite, array, 0.0), window, mode="same")
    return np.divide(total, count, out=np.full(len(array), np.nan), where=count > 0.5)


def _finish(axes: Axes, ylabel: str, bottom: float | None = None) -> None:
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=2)


def _save_curves(panels: Mapping[str, Axes], path: str | os.PathLike) -> None:
    axes = list(panels.values())
    axes[-1].set_xlabel("epoch", fontsize=9)
    axes[0].figure.align_ylabels(axes)
    _save_png(axes[0].figure, path)


def _mean_probabilities(snapshots: Sequence[Any]) -> np.ndarray:
    """Alpha over time, (snapshots, groups, candidates), to mean probabilities, (candidates, snapshots)."""
    alpha = np.asarray(snapshots, dtype=float)
    weights = np.exp(alpha - alpha.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=1).T


def _heatmap_grid(panels: int, rows_per_panel: int) -> tuple[Figure, np.ndarray]:
    columns = min(panels, 4 if panels <= 16 else 6)
    rows = -(-panels // columns)
    size = (1.2 + 2.1 * columns, 0.6 + (0.5 + 0.15 * rows_per_panel) * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    figure.supxlabel("epoch", fontsize=9)
    for number, axes in enumerate(grid.flat):
        is_lowest = panels - columns <= number < panels
        axes.tick_params(axis="x", labelsize=7, labelbottom=is_lowest)
        axes.tick_params(axis="y", length=0)
        axes.set_visible(number < panels)
    return figure, grid


def _edges(epochs: Sequence[float]) -> np.ndarray:
    """Columns' borders: a snapshot holds from its epoch to the next one's, the last as long as the others do."""
    typical = (epochs[-1] - epochs[0]) / (len(epochs) - 1) if len(epochs) > 1 else 1.0
    return np.append(epochs, epochs[-1] + typical)


def _save_png(figure: Figure, path: str | os.PathLike) -> None:
    with atomic_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=DPI, metadata={"Software": None})
