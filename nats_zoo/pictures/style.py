"""Pictures of genotypes, of training runs and of searches, as PNG files.

Everything is drawn through matplotlib's object interface: no pyplot, so no global state, no display and no window.
Curves are read from logs as `run_log` has it.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from ..base.files import atomic_file

DPI = 120
# Inches. Bars get narrower before a chart gets so wide that a page or a screen would have to shrink it.
WIDEST_BAR, NARROWEST_BAR, BARS_WIDTH = 0.28, 0.15, 8.0
FEW_POINTS = 8


def draw_panels(heights: Mapping[str, float]) -> dict[str, Axes]:
    """Make one panel per key, above one another, with a common epoch axis.

    >>> panels = draw_panels({"loss": 2, "AP": 1})
    """
    figure = Figure(figsize=(7.0, 0.9 + 0.95 * sum(heights.values())), layout="constrained")
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights.values()))
    return dict(zip(heights, grid[:, 0], strict=True))


def plot(axes: Axes, epochs: Sequence[float], values: Sequence[float], **style: Any) -> None:
    """Draw a line, and dots where the points are too few to make one.

    >>> plot(panels["AP"], [1, 2], [10.5, 20.1], color="#0072b2")
    """
    axes.plot(epochs, values, marker="o" if len(values) < FEW_POINTS else None, markersize=4, **style)


def plot_loss(axes: Axes, epochs: list[float], values: list[float], *, label: str, colour: str) -> None:
    """Draw a loss faintly, and smoothed over it.

    >>> plot_loss(panels["loss"], *series(records, "loss"), label="loss", colour="#0072b2")
    """
    axes.plot(epochs, values, color=colour, alpha=0.3, linewidth=0.7)
    plot(axes, epochs, _smooth(values).tolist(), color=colour, linewidth=1.8, label=label)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Centred moving average over about a twentieth of the series; at its ends over what there is."""
    array = np.asarray(values, dtype=float)
    window = np.ones(2 * (len(array) // 40) + 1)
    finite = np.isfinite(array)
    count = np.convolve(finite, window, mode="same")
    total = np.convolve(np.where(finite, array, 0.0), window, mode="same")
    return np.divide(total, count, out=np.full(len(array), np.nan), where=count > 0.5)


def finish(axes: Axes, ylabel: str, *, bottom: float | None = None, legend: bool = True) -> None:
    """Give a panel its label, grid and legend.

    >>> finish(panels["AP"], "AP (%)", bottom=0)
    """
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    if legend and len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(fontsize=8, frameon=False, ncols=2)


def save_curves(panels: Mapping[str, Axes], path: str | os.PathLike) -> None:
    """Write panels of `draw_panels` as a PNG file.

    >>> save_curves(panels, "curves.png")
    """
    axes = list(panels.values())
    axes[-1].set_xlabel("epoch", fontsize=9)
    figure = axes[0].figure
    assert isinstance(figure, Figure)
    figure.align_ylabels(axes)
    save_png(figure, path)


def add_colour_bar(colours: ScalarMappable, grid: np.ndarray, label: str, **options: Any) -> None:
    """Put one colour bar for all panels to their right.

    >>> add_colour_bar(image, figure.subplots(1, 2, squeeze=False), "probability")
    """
    bar = grid.flat[0].figure.colorbar(colours, ax=grid, fraction=0.03, aspect=30, **options)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def save_png(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure as a PNG file, whole or not at all.

    >>> save_png(Figure(), "empty.png")
    """
    with atomic_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=DPI, metadata={"Software": None})
