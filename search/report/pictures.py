"""What a search looks like: its curves, alpha over time, scores of candidates, predicted against measured changes."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...base.errors import NatsError
from ...base.run_log import has_key, read_log, series
from ...genotype.runs import Dilation
from ...pictures.style import add_colour_bar, draw_panels, finish, plot, plot_loss, save_curves, save_png
from ..supernet.searched_conv import log_probabilities

LABEL_SIZE = (24, 12)  # of a number beside a point, width and height in dots of the screen
SEARCH_CURVES = ("loss", "alpha_loss", "entropy", "share_changed")


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
    panels = draw_panels({"loss": 3.0} | dict.fromkeys(shares, 2.0) if losses else dict.fromkeys(shares, 2.0))
    for key, (label, colour) in losses.items():
        plot_loss(panels["loss"], *series(records, key), label=label, colour=colour)
    if losses:
        finish(panels["loss"], "loss" if len(losses) > 1 else f"loss\n({losses.popitem()[1][0]})")
    for key in shares:
        plot(panels[key], *series(records, key), color="#333333", linewidth=1.5)
        panels[key].set_ylim(-0.03, 1.03)
        finish(panels[key], titles[key])
    save_curves(panels, path)


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
    divisors = torch.tensor(temperatures or [1.0] * len(history), dtype=torch.float64)[:, None, None]
    means = {}
    for conv, dilations in candidates.items():
        alpha = torch.tensor(np.array([snapshot["alpha"][conv] for snapshot in history], dtype=float))
        means[conv] = len(dilations) * log_probabilities(alpha, divisors).exp().mean(1).T.numpy()
    figure, grid = _heatmap_grid(len(means), max(map(len, candidates.values())))
    figure.supxlabel("epoch", fontsize=9)
    # at least twice the uniform probability, so that an undecided search does not look like a decided one
    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, *(mean.max() for mean in means.values())))
    for axes, (conv, mean) in zip(grid.flat, means.items(), strict=False):
        mesh = axes.pcolormesh(edges, np.arange(len(mean) + 1), mean, cmap="BrBG", norm=norm)
        _label_heatmap(axes, conv, candidates[conv])
    add_colour_bar(mesh, grid, "mean probability / uniform")
    save_png(figure, path)


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
    add_colour_bar(mesh, grid, "predicted change of loss", extend="both")
    save_png(figure, path)


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
    finish(axes, "actual change of the loss on held-back images", legend=False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)  # anywhere else it may cover trials
    save_png(figure, path)


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


def _label_heatmap(axes: Axes, conv: str, candidates: Sequence[Dilation]) -> None:
    axes.set_title(conv, fontsize=8)
    axes.set_yticks(np.arange(len(candidates)) + 0.5, [Dilation.name(d) for d in candidates], fontsize=7)
    axes.invert_yaxis()


def _edges(epochs: Sequence[float]) -> np.ndarray:
    """Columns' borders: a snapshot, taken when so many epochs were done, stands for the time since the one before."""
    typical = (epochs[-1] - epochs[0]) / (len(epochs) - 1) if len(epochs) > 1 else 1.0
    return np.insert(epochs, 0, epochs[0] - typical)
