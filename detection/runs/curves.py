"""The curves of a training."""

import os

from ...base.errors import NatsError
from ...base.run_log import has_key, read_log, series
from ...pictures.style import draw_panels, finish, plot, plot_loss, save_curves


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
    panels = draw_panels({key: heights[key] for key in heights if has_key(records, key)})
    plot_loss(panels["loss"], *series(records, "loss"), label="loss", colour="#0072b2")
    if "AP" in panels:
        for key, colour in (("AP", "#d55e00"), ("AP50", "#009e73"), ("mask_AP", "#0072b2")):
            if has_key(records, key):
                label = key.replace("_", " ")
                panels["AP"].plot(*series(records, key), marker="o", markersize=4, color=colour, label=label)
        finish(panels["AP"], "AP (%)", bottom=0)
    if "lr" in panels:
        plot(panels["lr"], *series(records, "lr"), color="#555555", linewidth=1)
        finish(panels["lr"], "learning\nrate", bottom=0)
    finish(panels["loss"], "loss")
    save_curves(panels, path)
