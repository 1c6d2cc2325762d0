"""Charts are checked by what a reader sees: colours in proportion to shares, curves where the numbers are."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image

from nats_zoo import NatsError
from nats_zoo.detection.runs.curves import training_curves
from nats_zoo.genotype.genotype import Genotype
from nats_zoo.genotype.runs import Dilation, Run
from nats_zoo.pictures.erf_picture import erf_picture
from nats_zoo.pictures.genotype_chart import (
    dilation_colour,
    dilation_hatch,
    genotype_chart,
)
from nats_zoo.search.report.pictures import alpha_heatmaps, prediction_scatter, score_heatmaps, search_curves

IC_CONV = [(height, width) for height in range(1, 5) for width in range(1, 5)]
CIRCLE = "#5fd7ff"
BROWN_TO_GREEN = colormaps["BrBG"]
SPACE_C = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (1, 3), (3, 1), (1, 5), (5, 1)]
# Machado, Oliveira and Fernandes 2009, full severity, on linear RGB
COLOUR_VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def read(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def pixels_of(image, colour):
    return int((np.abs(image - np.array(to_rgb(colour)) * 255).max(axis=-1) <= 1).sum())


def write_log(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def cielab(rgb, vision):
    rgb = np.array(rgb)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(np.array(vision) @ linear, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_a_dilations_colour_fills_the_chart_in_proportion_to_its_share(tmp_path):
    runs = (Run(8, 1, 1), Run(16, 2, 2), Run(8, 1, 3), Run(16, 3, 1), Run(16, 1, 3))
    genotype = Genotype("resnet18", {"layer2.0.conv2": runs, "layer3.0.conv2": runs})
    genotype_chart(genotype, tmp_path / "chart.png")
    image = read(tmp_path / "chart.png")
    image = image[:, : int(0.78 * image.shape[1])]  # without the legend
    counts = np.array([pixels_of(image, dilation_colour(d)) for d in [(1, 1), (2, 2), (1, 3), (3, 1)]])
    np.testing.assert_allclose(counts / counts.sum(), [8 / 64, 16 / 64, 24 / 64, 16 / 64], atol=0.02)


def test_dilations_with_no_direction_to_themselves_are_hatched(tmp_path):
    genotype_chart(Genotype("resnet18", {"layer2.0.conv2": (Run(8, 2, 3), Run(8, 2, 4))}), tmp_path / "mixed.png")
    genotype_chart(Genotype("resnet18", {"layer2.0.conv2": (Run(8, 2, 2), Run(8, 1, 4))}), tmp_path / "pure.png")
    mixed, pure = read(tmp_path / "mixed.png"), read(tmp_path / "pure.png")
    ratio = pixels_of(mixed, dilation_colour((2, 3))) / pixels_of(pure, dilation_colour((2, 2)))
    assert 0.4 < ratio < 0.95  # white lines over it, and most of it still seen


def test_stacks_stand_in_the_order_of_the_convolutions(tmp_path):
    convs = {"layer2.0.conv2": (Run(8, 1, 3),), "layer2.1.conv2": (Run(8, 3, 1),), "layer3.0.conv2": (Run(8, 2, 2),)}
    genotype_chart(Genotype("resnet18", convs), tmp_path / "chart.png")
    row = read(tmp_path / "chart.png")[250]
    centres = []
    for dilation in [(1, 3), (3, 1), (2, 2)]:
        [columns] = np.nonzero((np.abs(row - np.array(to_rgb(dilation_colour(dilation))) * 255) <= 1).all(axis=-1))
        centres.append(columns.mean())
    assert centres == sorted(centres)
    assert centres[2] - centres[1] > 1.5 * (centres[1] - centres[0])  # a gap between the stages


@pytest.mark.parametrize("vision", COLOUR_VISION)
def test_dilations_of_the_search_spaces_can_be_told_apart(vision):
    colours = [cielab(to_rgb(dilation_colour(d)), COLOUR_VISION[vision]) for d in SPACE_C]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(colours) for b in colours[:i]]
    assert min(distances) > 14


@pytest.mark.parametrize("vision", COLOUR_VISION)
def test_inception_convolutions_16_dilations_can_be_told_apart_by_colour_or_hatching(vision):
    looks = [(dilation_hatch(d), cielab(to_rgb(dilation_colour(d)), COLOUR_VISION[vision])) for d in IC_CONV]
    assert min(np.linalg.norm(a - b) for i, (h, a) in enumerate(looks) for g, b in looks[:i] if h == g) > 12


def test_colours_say_direction_by_hue_and_differ_for_all_of_inception_convolutions_dilations():
    for small, large in [(1, 2), (1, 3), (1, 5), (2, 3), (2, 9), (1, 40)]:
        red, _, blue = to_rgb(dilation_colour((small, large)))
        assert blue > red
        red, _, blue = to_rgb(dilation_colour((large, small)))
        assert red > blue
    colours = {dilation_colour((h, w)) for h in range(1, 5) for w in range(1, 5)}
    assert len(colours) == 16


def test_names_are_height_by_width():
    assert [Dilation(*d).name() for d in [(1, 1), (3, 3), (1, 3), (3, 1)]] == ["1", "3", "1×3", "3×1"]


def test_charts_grow_with_the_number_of_convolutions(tmp_path):
    sizes = []
    for blocks in (1, 13, 33):
        convs = {f"layer3.{block}.conv2": (Run(8, 1, 1), Run(8, 1, 3)) for block in range(blocks)}
        genotype_chart(
            Genotype("resnet101", convs, provenance={"note": "x" * 999, "method": "y" * 999}), tmp_path / "c"
        )
        sizes.append(Image.open(tmp_path / "c").size)
    assert sizes[0][0] < sizes[1][0] < sizes[2][0] < 1400
    assert len({height for _, height in sizes}) == 1


@pytest.mark.parametrize(
    "convs",
    [
        {},
        {"features.0": (Run(8, 1, 1),), "features.3": (Run(8, 2, 2),)},
        {"conv": (Run(8, 1, 1),)},
        {"stages.2.blocks.0.conv_dw": (Run(8, 1, 1),), "s1.b1.conv2.conv": (Run(8, 200, 1000),)},
    ],
)
def test_any_names_and_dilations_are_drawn(convs, tmp_path):
    genotype_chart(Genotype("vgg16", convs), tmp_path / "chart.png")
    image = read(tmp_path / "chart.png")
    for runs in convs.values():
        assert pixels_of(image, dilation_colour(runs[0].dilation)) > 1000


def columns_of(image, dilation):
    [columns] = np.nonzero((np.abs(image - np.array(to_rgb(dilation_colour(dilation))) * 255) <= 1).all(axis=-1))
    return columns


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("hrnet_w18_small", ["stage2.0.branches.0.0.conv1", "stage3.0.branches.0.0.conv1", "stage2.0.fuse.1"]),
        ("vgg11", ["features.6", "features.11", "features.8"]),  # timm's stages: the names tell none
    ],
)
def test_bars_of_one_stage_stand_together(architecture, names, tmp_path):
    runs = [(Run(8, 2, 2),), (Run(8, 1, 3),), (Run(8, 3, 1),)]
    genotype_chart(Genotype(architecture, dict(zip(names, runs, strict=True))), tmp_path / "chart.png")
    row = read(tmp_path / "chart.png")[200]
    first, third, second = (columns_of(row, dilation).mean() for dilation in [(2, 2), (1, 3), (3, 1)])
    assert first < second < third
    assert third - second > 1.5 * (second - first)


@pytest.mark.parametrize(("largest", "convolutions"), [(4, 16), (6, 50)])
def test_charts_of_many_convolutions_and_dilations_fit(largest, convolutions, tmp_path):
    dilations = [(height, width) for height in range(1, largest + 1) for width in range(1, largest + 1)]
    convs = {f"layer3.{i}.conv2": tuple(Run(1, *dilation) for dilation in dilations) for i in range(convolutions)}
    provenance = {"method": "mixture", "dataset": "a long word " * 9}
    genotype_chart(Genotype("resnet152", convs, provenance=provenance), tmp_path / "chart.png")
    image = read(tmp_path / "chart.png")
    assert image.shape[1] < 1700
    dark = np.flatnonzero((image.sum(-1) < 200).any(0))  # text
    legend = image[:, dark.max() - 145 * -(-len(dilations) // 16) :]
    assert all(pixels_of(legend, dilation_colour(dilation)) > 20 for dilation in dilations)


def gaussian(height, width, side=200):
    rows, columns = np.arange(side)[:, None] - side / 2, np.arange(side)[None, :] - side / 2
    return torch.from_numpy(np.exp(-((rows / height) ** 2 + (columns / width) ** 2) / 2))


def panels(image):
    """The two pictures: the largest connected spans of columns that are not white in the middle row."""
    row = image[image.shape[0] // 2].sum(-1) < 700
    edges = np.flatnonzero(np.diff(row.astype(int)))
    spans = sorted(itertools.pairwise(edges), key=lambda span: span[0] - span[1])[:2]
    return [image[:, start + 4 : stop - 4] for start, stop in sorted(spans)]


def test_receptive_fields_stand_side_by_side_on_one_scale(tmp_path):
    small, large = gaussian(12, 12), gaussian(12, 30)
    erf_picture(small, 3 * small, tmp_path / "same.png", "title", "twin")
    erf_picture(small, large, tmp_path / "other.png", "title", "NATS")
    one, other = panels(read(tmp_path / "same.png"))
    height = slice(150, 500)  # without the titles
    assert np.abs(one[height].mean((0, 1)) - other[height].mean((0, 1))).max() < 3
    narrow, wide = panels(read(tmp_path / "other.png"))
    assert narrow[height].max() > 200 > wide[height].reshape(-1, 3).min(1).max()  # the same sum, spread out


def test_the_circle_of_the_radius_is_drawn_and_repeated_beside(tmp_path):
    erf_picture(gaussian(10, 10), gaussian(20, 20), tmp_path / "erf.png")
    plain, nats = panels(read(tmp_path / "erf.png"))
    radii = []
    for panel in (plain, nats):
        columns = np.nonzero((np.abs(panel - np.array(to_rgb(CIRCLE)) * 255).max(-1) < 12).any(0))[0]
        radii.append((columns.max() - columns.min()) / 2 / panel.shape[1] * 200)
    assert radii == pytest.approx([10 * 2.146, 20 * 2.146], rel=0.05)
    assert pixels_of(nats, CIRCLE) > 1.5 * pixels_of(plain, CIRCLE)


def test_the_same_genotype_gives_the_same_bytes(tmp_path):
    genotype = Genotype("resnet18", {"layer2.0.conv2": (Run(64, 1, 1), Run(64, 1, 3))})
    for name in ("a.png", "b.png"):
        genotype_chart(genotype, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png"}


def test_a_picture_that_fails_leaves_the_old_one_alone(tmp_path):
    (tmp_path / "curves.png").write_text("old")
    log = write_log(tmp_path / "log.jsonl", [{"step": 1, "epoch": 1.0, "loss": "high"}])
    with pytest.raises(NatsError, match="loss: expected a number, found 'high'"):
        training_curves(log, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_text() == "old"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        genotype_chart(Genotype("resnet18", {}), tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "log.jsonl", "folder"}


def losses(steps=60):
    return [{"step": s, "epoch": s / 10, "loss": 2.0 - s / 40, "lr": 0.01} for s in range(steps)]


def test_training_curves_show_ap_when_it_was_measured(tmp_path):
    points = [{"step": s, "epoch": s / 10, "AP": s / 2, "AP50": float(s)} for s in (20, 40)]
    points.append({"step": 50, "epoch": 5.0, "AP": None, "AP50": None, "note": "nothing measured"})
    training_curves(write_log(tmp_path / "a", losses()), tmp_path / "without.png")
    training_curves(write_log(tmp_path / "b", losses() + points), tmp_path / "with.png")
    training_curves(write_log(tmp_path / "c", [*losses(), {"step": 20, "epoch": 2, "AP": 1}]), tmp_path / "ap.png")
    without, both, ap = (read(tmp_path / name) for name in ("without.png", "with.png", "ap.png"))
    assert both.shape[0] > without.shape[0]
    blue, orange, green = "#0072b2", "#d55e00", "#009e73"
    assert pixels_of(without, blue) > 300
    assert pixels_of(without, orange) == pixels_of(without, green) == pixels_of(ap, green) == 0
    assert min(pixels_of(both, orange), pixels_of(both, green), pixels_of(ap, orange)) > 20


def test_a_loss_that_falls_is_drawn_falling(tmp_path):
    training_curves(write_log(tmp_path / "log", losses()), tmp_path / "curves.png")
    rows, columns = np.nonzero(np.abs(read(tmp_path / "curves.png") - [0, 114, 178]).max(axis=-1) <= 1)
    assert np.corrcoef(rows, columns)[0, 1] > 0.99  # rows count from the top


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    wild = [{**record, "loss": 50.0} for record in losses()[40:]]
    training_curves(write_log(tmp_path / "a", losses()), tmp_path / "once.png")
    training_curves(write_log(tmp_path / "b", losses()[:40] + wild + losses()[40:]), tmp_path / "resumed.png")
    assert (tmp_path / "once.png").read_bytes() == (tmp_path / "resumed.png").read_bytes()


def test_a_diverged_loss_is_left_out_and_not_the_curve(tmp_path):
    records = [record | ({"loss": float("nan")} if 20 <= record["step"] < 23 else {}) for record in losses()]
    training_curves(write_log(tmp_path / "log", records), tmp_path / "curves.png")
    assert pixels_of(read(tmp_path / "curves.png"), "#0072b2") > 300


def test_search_curves_draw_alphas_loss_only_if_there_is_one(tmp_path):
    records = [r | {"entropy": 1 - r["step"] / 100, "share_changed": r["step"] / 100} for r in losses()]
    search_curves(write_log(tmp_path / "a", records), tmp_path / "single.png")
    records = [r | {"alpha_loss": 1.0} if r["step"] > 30 else r for r in records]
    search_curves(write_log(tmp_path / "b", records), tmp_path / "bilevel.png")
    orange = [pixels_of(read(tmp_path / name), "#d55e00") for name in ("single.png", "bilevel.png")]
    assert orange[0] == 0
    assert orange[1] > 300


@pytest.mark.parametrize("missing", ["loss", "alpha_loss", "entropy", "share_changed"])
def test_search_curves_bear_any_key_to_be_absent_and_not_all_of_them(missing, tmp_path):
    keys = ["loss", "alpha_loss", "entropy", "share_changed"]
    records = [{"step": s, "epoch": s / 10, missing: None} | {k: 0.5 for k in keys if k != missing} for s in range(30)]
    search_curves(write_log(tmp_path / "log", records), tmp_path / "curves.png")
    search_curves(
        write_log(tmp_path / "one", [{**r, **dict.fromkeys(keys), missing: 0.5} for r in records]), tmp_path / "o"
    )
    assert read(tmp_path / "curves.png").shape[0] > read(tmp_path / "o").shape[0]
    with pytest.raises(NatsError, match="none: no record has one of the keys loss, alpha_loss"):
        search_curves(write_log(tmp_path / "none", [{"step": 1, "epoch": 1, "lr": 1}]), tmp_path / "curves.png")


@pytest.mark.parametrize("draw", [training_curves, search_curves])
def test_a_torn_last_line_changes_nothing_and_a_single_step_is_seen(draw, tmp_path):
    draw(write_log(tmp_path / "log", losses(1)), tmp_path / "whole.png")
    with (tmp_path / "log").open("a") as file:
        file.write('{"step": 1, "epoch": 0.1, "lo')
    draw(tmp_path / "log", tmp_path / "torn.png")
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "torn.png").read_bytes()
    assert pixels_of(read(tmp_path / "torn.png"), "#0072b2") > 20


@pytest.mark.parametrize("draw", [training_curves, search_curves])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no record has .*loss"),
        ('{"step": 1, "epoch": 1.0, "AP": 3}\n', "no record has .*loss"),
        ('{"step": 1, "epoch": 1.0, "loss": 3}\n{"step": 2, "ep\n', "log.jsonl: line 2: not JSON"),
        ('\n{"step": 1, "loss": 3}', "log.jsonl: line 2: expected an object with the keys 'step' and 'epoch'"),
        ("[1]\n", "log.jsonl: line 1: expected an object"),
    ],
)
def test_a_bad_log_is_named_with_its_line(draw, text, message, tmp_path):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(NatsError, match=message) as caught:
        draw(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "curves.png").exists()


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(NatsError, match=r"nowhere\.jsonl"):
        training_curves(tmp_path / "nowhere.jsonl", tmp_path / "curves.png")


def test_heatmaps_show_the_mean_of_the_groups_probabilities(tmp_path):
    """Two of three groups are sure of the first candidate, one of the third: 2/3, 0, 1/3, 0 from top to bottom.

    In multiples of the uniform 1/4: 8/3, the most, then 0, 4/3 and 0. Green begins at 1: 4/3 is a fifth of its way.
    """
    alpha = [[50.0, 0, 0, 0], [50.0, 0, 0, 0], [0, 0, 50.0, 0]]
    history = [{"epoch": float(epoch), "alpha": {"layer2.0.conv2": alpha}} for epoch in range(3)]
    candidates = {"layer2.0.conv2": [(1, 1), (2, 2), (1, 3), (3, 1)]}
    alpha_heatmaps(history, candidates, tmp_path / "alpha.png")
    image = read(tmp_path / "alpha.png")
    column = image[:, image.shape[1] // 3]  # through the panel, left of the colour bar
    colours = {
        name: np.array(BROWN_TO_GREEN(at)[:3]) * 255 for name, at in (("top", 1.0), ("some", 0.6), ("zero", 0.0))
    }
    found = [next((name for name, c in colours.items() if np.abs(pixel - c).max() <= 3), None) for pixel in column]
    bands = [(name, len(list(band))) for name, band in itertools.groupby(found) if name]
    assert [name for name, _ in bands] == ["top", "zero", "some", "zero"]
    assert max(height for _, height in bands) - min(height for _, height in bands) <= 2


def test_an_undecided_search_is_white_for_any_number_of_candidates(tmp_path):
    candidates = {"layer2.0.conv2": SPACE_C[:5], "layer4.0.conv2": SPACE_C}
    history = [{"epoch": 1, "alpha": {conv: np.zeros((4, len(found))) for conv, found in candidates.items()}}]
    alpha_heatmaps(history, candidates, tmp_path / "alpha.png")
    white = np.abs(read(tmp_path / "alpha.png") - np.array(BROWN_TO_GREEN(0.5)[:3]) * 255).max(-1) <= 1
    assert white[:, : white.shape[1] // 3].sum() > 10_000
    assert white[:, white.shape[1] // 2 : -120].sum() > 10_000


def test_heatmaps_divide_alpha_by_each_snapshots_temperature(tmp_path):
    rng = np.random.default_rng(0)
    candidates = {"layer2.0.conv2": SPACE_C[:4]}
    alphas, temperatures = rng.normal(size=(3, 2, 4)), [1.0, 0.5, 0.2]
    for name, scale in (("hot", np.ones(3)), ("cold", np.array(temperatures))):
        rows = zip(alphas, scale, strict=True)
        history = [{"epoch": i, "alpha": {"layer2.0.conv2": alpha / s}} for i, (alpha, s) in enumerate(rows)]
        alpha_heatmaps(history, candidates, tmp_path / name, temperatures if name == "hot" else None)
    assert (tmp_path / "hot").read_bytes() == (tmp_path / "cold").read_bytes()
    alpha_heatmaps(history, candidates, tmp_path / "hot", temperatures)
    assert (tmp_path / "hot").read_bytes() != (tmp_path / "cold").read_bytes()


def test_a_snapshot_stands_for_the_epoch_that_it_ends(tmp_path):
    """Alpha moves in the second of two epochs: the right half of the panel."""
    alphas = [np.zeros((1, 2)), np.array([[50.0, 0]])]
    history = [{"epoch": i, "alpha": {"layer2.0.conv2": alpha}} for i, alpha in enumerate(alphas, 1)]
    alpha_heatmaps(history, {"layer2.0.conv2": [(1, 1), (2, 2)]}, tmp_path / "alpha.png")
    image = read(tmp_path / "alpha.png")[:, :-90]  # without the colour bar
    columns = {}
    for name, at in (("white", 0.5), ("green", 1.0)):
        is_colour = np.abs(image - np.array(BROWN_TO_GREEN(at)[:3]) * 255).max(-1) <= 2
        columns[name] = np.flatnonzero(is_colour.sum(0) > 50)
    assert columns["white"].max() < columns["green"].min()
    assert len(columns["white"]) == pytest.approx(len(columns["green"]), abs=5)


def test_scores_that_promise_a_lower_loss_are_blue_and_the_others_red(tmp_path):
    """Group 0 gains by the second candidate, group 1 by nothing: blue, then red, in the lower row; white above."""
    score_heatmaps({"c": [[0, -1.0], [0, 1.0]]}, {"c": [(1, 1), (2, 2)]}, tmp_path / "scores.png", "round 1")
    image = read(tmp_path / "scores.png")[:, :-100]
    blue = (image[..., 2] - image[..., 0]) > 60
    red = (image[..., 0] - image[..., 2]) > 60
    rows = [np.flatnonzero(colour.any(1)) for colour in (blue, red)]
    assert abs(rows[0].min() - rows[1].min()) <= 2
    assert rows[0].min() > 0.4 * len(image) * 0.8
    assert np.flatnonzero(blue.any(0)).max() <= np.flatnonzero(red.any(0)).min() + 1
    assert blue.sum() == pytest.approx(red.sum(), rel=0.05)


def test_scores_of_nothing_are_drawn(tmp_path):
    score_heatmaps({"c": [[0.0, 0.0]]}, {"c": [(1, 1), (2, 2)]}, tmp_path / "scores.png")
    assert read(tmp_path / "scores.png").min() < 100


def centre_of(image, colour):
    rows, columns = np.nonzero((np.abs(image - np.array(to_rgb(colour)) * 255) <= 1).all(-1))
    return np.array([columns.mean(), -rows.mean()])


def test_trials_lie_where_their_numbers_are_accepted_and_rejected_told_apart(tmp_path):
    trials = [
        {"predicted": -4.0, "actual": 1.0, "accepted": False, "changes": 8},
        {"predicted": -2.0, "actual": -1.0, "accepted": True, "changes": 4},
        {"predicted": -1.0, "actual": float("nan"), "accepted": False},
    ]
    prediction_scatter(trials, tmp_path / "both.png")
    prediction_scatter([trials[0] | {"accepted": None}], tmp_path / "rejected.png")
    image = read(tmp_path / "both.png")[40:]  # without the legend
    rejected, accepted = centre_of(image, "#d55e00"), centre_of(image, "#0072b2")
    assert (rejected < accepted).tolist() == [True, False]
    assert rejected[1] - accepted[1] > 0.6 * len(image)  # at 1.0 and -1.0 of an axis with little more
    alone = read(tmp_path / "rejected.png")
    assert pixels_of(alone, "#d55e00") > 20
    assert pixels_of(alone, "#0072b2") == 0


def test_a_trial_as_predicted_lies_on_the_line(tmp_path):
    """The line's pixels, a straight line fitted to them, pass through the point."""
    trials = [{"predicted": p, "actual": a, "accepted": True} for p, a in ((-3.0, -3.0), (-2.5, -0.5))]
    prediction_scatter([{**trial, "accepted": trial is trials[0]} for trial in trials], tmp_path / "one.png")
    image = read(tmp_path / "one.png")
    below = image[130:-80, 80:]  # without the legend and the labels
    rows, columns = np.nonzero(np.abs(below - 0x55).max(-1) <= 1)
    slope, start = np.polyfit(columns, rows, 1)
    x, y = centre_of(below, "#0072b2")
    assert slope * x + start == pytest.approx(-y, abs=4)
    x, y = centre_of(below, "#d55e00")
    assert abs(slope * x + start + y) > 50


def test_a_scatter_needs_a_trial(tmp_path):
    with pytest.raises(NatsError, match="at least one trial"):
        prediction_scatter([{"predicted": 1.0, "actual": float("inf")}], tmp_path / "p.png")


@pytest.mark.parametrize(
    ("dilation", "kind"),
    [((1, 1), "plain"), ((3, 3), "isotropic"), ((1, 3), "wide"), ((2, 4), "wide"), ((5, 1), "tall"), ((3, 2), "tall")],
)
def test_kinds_of_dilations(dilation, kind):
    assert Dilation(*dilation).kind() == kind


def test_heatmaps_of_many_convolutions_with_different_candidates(tmp_path):
    counts = {f"layer3.{i}.conv2": 5 for i in range(6)} | {"layer4.0.conv2": 9}
    rng = np.random.default_rng(0)
    history = [
        {"epoch": e / 2, "alpha": {name: (e * rng.normal(size=(4, n))).tolist() for name, n in counts.items()}}
        for e in range(4)
    ]
    candidates = {name: SPACE_C[:n] for name, n in counts.items()}
    alpha_heatmaps(history, candidates, tmp_path / "many.png")
    alpha_heatmaps(history[:1], {"layer4.0.conv2": SPACE_C}, tmp_path / "one.png")
    many, one = read(tmp_path / "many.png"), read(tmp_path / "one.png")
    assert many.shape[0] > 1.5 * one.shape[0]
    assert many.shape[1] > 1.5 * one.shape[1]


def test_heatmaps_need_a_snapshot(tmp_path):
    with pytest.raises(NatsError, match="at least one snapshot"):
        alpha_heatmaps([], {"layer2.0.conv2": SPACE_C}, tmp_path / "alpha.png")


def test_drawing_leaves_pyplot_alone_and_the_package_matplotlib():
    code = (
        "import sys, nats_zoo; assert 'matplotlib' not in sys.modules;"
        "import nats_zoo.pictures.genotype_chart; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
