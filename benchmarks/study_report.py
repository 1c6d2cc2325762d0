"""What a study's folder says: results.csv, report.md and study.png. Reads finished runs only; see study.py."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import write_csv
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paired import ENOUGH_BLOCKS, Agreement, Paired, agreement, paired

from nats_zoo import Genotype, NatsError
from nats_zoo.base.files import atomic_file, read_json, write_text
from nats_zoo.genotype.runs import KINDS as DILATION_KINDS
from nats_zoo.search.controls import group_size

METRICS = {"AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_small", "APm": "ap_medium", "APl": "ap_large"}
KINDS = ("plain", "uniform", "random", "shares", "path", "searched", "shuffled", "file")
SHAPES = DILATION_KINDS[1:]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")


class Result(NamedTuple):
    """A finished run.

    Attributes:
        size: of the images: a side in pixels, or SHORTxLONG.
        transposed: whether the data set was.
        arm, block: which.
        metrics: AP, AP50, ... in percent; None where there is no such object.
        seconds: of training and evaluation; None for a run that was resumed.
        genotype: what was trained; the plain network's names no convolution.
    """

    size: str
    transposed: bool
    arm: str
    block: int
    metrics: Mapping[str, float | None]
    seconds: float | None
    genotype: Genotype

    @property
    def variant(self) -> tuple[str, bool]:
        return (self.size, self.transposed)

    def row(self) -> dict[str, Any]:
        """The line of the CSV file."""
        return {
            "size": self.size,
            "transposed": int(self.transposed),
            "arm": self.arm,
            "block": self.block,
            **self.metrics,
            "seconds": self.seconds,
            "share_changed": round(self.genotype.share_changed(), 4),
            "fingerprint": self.genotype.fingerprint(),
            **{shape: round(share, 4) for shape, share in shape_shares(self.genotype).items()},
        }


class Comparison(NamedTuple):
    """The differences first - second over the blocks that have both."""

    first: str
    second: str
    blocks: tuple[int, ...]
    result: Paired

    @property
    def name(self) -> str:
        return f"{self.first} - {self.second}"


def report(folder: Path) -> str:
    """Write results.csv, report.md and study.png; returns the Markdown.

    Raises:
        NatsError: a folder that holds no study.
    """
    if not (folder / "study.json").is_file():
        raise NatsError(f"{folder}: holds no study (no study.json in it)")
    results = write_results(folder)
    if not results:
        return "No run is finished yet."
    recipe = read_json(folder / "study.json")["train"]
    text = f"# {recipe['backbone']} on {Path(recipe['data']).name}, last weights, {recipe['val_split']} split\n\n"
    text += markdown(results)
    write_text(folder / "report.md", text + "\n")
    draw(results, folder / "study.png")
    return text


def write_results(folder: Path) -> list[Result]:
    """Write results.csv, one line per finished run; returns them."""
    results = read_results(folder)
    if results:
        write_csv([result.row() for result in results], folder / "results.csv")
    return results


def read_results(folder: Path) -> list[Result]:
    """All finished runs of arms, sorted by size, twin, block and arm."""
    results = [_read_result(path) for path in folder.glob("*/block_*/*/done.json") if "arm" in read_json(path)]
    return sorted(results, key=lambda r: (_number(r.size), r.transposed, r.block, arm_order(r.arm)))


def _read_result(path: Path) -> Result:
    done = read_json(path)
    short, long = done["min_size"], done["max_size"]
    return Result(
        size=str(short) if short == long else f"{short}x{long}",
        transposed=done["transposed"],
        arm=done["arm"],
        block=done["block"],
        metrics={name: done["metrics"][key] for name, key in METRICS.items()},
        seconds=done["seconds"],
        genotype=Genotype.load(path.parent / "genotype.json"),
    )


def _number(size: str) -> int:
    return int(size.partition("x")[0])


def arm_order(arm: str) -> tuple[int, str]:
    """Sorts arms: plain, the controls, the searches, what is made from them."""
    return (KINDS.index(re.split("[_:]", arm)[0]), arm)


def shape_shares(genotype: Genotype) -> dict[str, float]:
    """Share of the named convolutions' channels with isotropic (not plain), wide and tall dilations."""
    counts = genotype.all_runs().counts()
    total = counts.total() or 1
    return {shape: sum(n for d, n in counts.items() if d.kind() == shape) / total for shape in SHAPES}


# --- comparisons ------------------------------------------------------------------------------------------------------


def compare(results: Sequence[Result], first: str, second: str, metric: str = "AP") -> Comparison | None:
    """Paired differences of two arms, of one size and twin; None without a block that has both."""
    values = {(r.arm, r.block): r.metrics[metric] for r in results if r.metrics[metric] is not None}
    blocks = sorted(block for arm, block in values if arm == first and (second, block) in values)
    if not blocks:
        return None
    return Comparison(first, second, tuple(blocks), paired([values[first, b] - values[second, b] for b in blocks]))


def comparisons(results: Sequence[Result]) -> tuple[list[Comparison], list[Comparison]]:
    """(primary, further): searched - random and searched - plain; searched - shuffled, and every other arm - plain."""
    arms = sorted({result.arm for result in results}, key=arm_order)
    searched = [arm for arm in arms if arm.startswith("searched")]
    shuffled = {arm: arm.replace("searched", "shuffled") if arm.replace("searched", "shuffled") in arms else "shuffled"
                for arm in searched}  # fmt: skip
    primary = [(arm, other) for arm in searched for other in ("random", "plain")]
    further = [(arm, shuffled[arm]) for arm in searched]
    further += [(arm, "plain") for arm in arms if arm not in (*searched, "plain")]
    return tuple(
        [found for pair in pairs if (found := compare(results, *pair)) is not None] for pairs in (primary, further)
    )


def seed_agreement(results: Sequence[Result], arm: str) -> Agreement | None:
    """How far the genotypes of an arm's blocks agree; None if there are not two, or no groups to be shuffled."""
    genotypes = [result.genotype for result in results if result.arm == arm]
    if len(genotypes) < 2:
        return None
    layout = {name: _codes(genotypes, name) for name in genotypes[0].convs}
    return agreement(layout) if any(codes.shape[1] > 1 for codes, _ in layout.values()) else None


def _codes(genotypes: Sequence[Genotype], name: str) -> tuple[np.ndarray, int]:
    """The dilation of each group in each genotype, as a number, and the channels of a group."""
    size = int(np.gcd.reduce([group_size(genotype, name) for genotype in genotypes]))
    rows = [[d for run in g.convs[name] for d in [run.dilation] * (run.channels // size)] for g in genotypes]
    numbers = {dilation: number for number, dilation in enumerate(sorted({d for row in rows for d in row}))}
    return np.array([[numbers[dilation] for dilation in row] for row in rows]), size


class Twins(NamedTuple):
    """Tall minus wide share of an arm's genotypes, on the data set and on its transposed twin."""

    arm: str
    size: str
    upright: float
    transposed: float
    difference: Paired


def twins(results: Sequence[Result]) -> list[Twins]:
    """For each searched arm and size that has both: what (3,1) prefers must become what (1,3) prefers."""
    found = []
    for size, arm in sorted({(r.size, r.arm) for r in results if r.arm.startswith(("searched", "path"))}):
        lean: dict[bool, dict[int, float]] = {False: {}, True: {}}
        for r in results:
            if (r.size, r.arm) == (size, arm):
                shares = shape_shares(r.genotype)
                lean[r.transposed][r.block] = shares["tall"] - shares["wide"]
        both = sorted(lean[False].keys() & lean[True].keys())
        if both:
            means = [statistics.fmean(lean[twin][block] for block in both) for twin in (False, True)]
            found.append(Twins(arm, size, *means, paired([lean[False][b] - lean[True][b] for b in both])))
    return found


# --- text -------------------------------------------------------------------------------------------------------------


def markdown(results: Sequence[Result]) -> str:
    """The whole report."""
    variants = sorted({result.variant for result in results}, key=lambda v: (_number(v[0]), v[1]))
    parts = [_variant_markdown(variant, [r for r in results if r.variant == variant]) for variant in variants]
    if found := twins(results):
        parts.append(_twins_markdown(found))
    return "\n\n".join(parts)


def variant_name(variant: tuple[str, bool]) -> str:
    """As headings and the figure call a size and twin."""
    return f"{variant[0]} px{', transposed' if variant[1] else ''}"


def _variant_markdown(variant: tuple[str, bool], results: Sequence[Result]) -> str:
    primary, further = comparisons(results)
    parts = [f"## {variant_name(variant)}", _arms_table(results)]
    if primary or further:
        parts.append(_comparisons_table(results, primary, further))
    if table := _agreement_table(results):
        parts.append(table)
    return "\n\n".join(parts)


def _arms_table(results: Sequence[Result]) -> str:
    header = ["arm", "blocks", *METRICS, "sd of AP", "changed", *SHAPES, "minutes"]
    rows = []
    for arm in sorted({result.arm for result in results}, key=arm_order):
        own = [result for result in results if result.arm == arm]
        aps = [r.metrics["AP"] for r in own if r.metrics["AP"] is not None]
        cells = [_mean(r.metrics[metric] for r in own) for metric in METRICS]
        cells.append(f"{statistics.stdev(aps):.2f}" if len(aps) > 1 else "-")
        cells.append(f"{statistics.fmean(r.genotype.share_changed() for r in own):.0%}")
        cells += [f"{statistics.fmean(shape_shares(r.genotype)[shape] for r in own):.0%}" for shape in SHAPES]
        cells.append(_mean((r.seconds / 60 if r.seconds else None for r in own), digits=1))
        rows.append([arm, str(len(own)), *cells])
    return _table(header, rows)


def _comparisons_table(results: Sequence[Result], primary: Sequence[Comparison], further: Sequence[Comparison]) -> str:
    others = [metric for metric in METRICS if metric not in ("AP", "AP75")]
    header = ["difference", "blocks", "AP", "95% interval", "p", *others, "AP by block"]
    rows = []
    for comparison in [*primary, *further]:
        name = f"**{comparison.name}**" if comparison in primary else comparison.name
        cells = [*_paired_cells(comparison.result, 2)]
        for metric in others:
            other = compare(results, comparison.first, comparison.second, metric)
            cells.append("-" if other is None else f"{other.result.mean:+.2f}")
        by_block = " ".join(f"{difference:+.1f}" for difference in comparison.result.differences)
        rows.append([name, str(len(comparison.blocks)), *cells, by_block])
    return "\n\n".join([_title([*primary, *further]), _table(header, rows)])


def _title(found: Sequence[Comparison]) -> str:
    few = [c for c in found if c.result.is_descriptive]
    note = (
        f"**Descriptive: fewer than {ENOUGH_BLOCKS} blocks show no more than what happened in them.** " if few else ""
    )
    which = "" if not few or len(few) == len(found) else f"That holds for {', '.join(c.name for c in few)}. "
    return (
        f"{note}{which}Paired differences within blocks, primary comparisons in bold; interval of the mean by Student's"
        " t, p two-sided by sign flips (all of them up to 16 blocks), not corrected for several comparisons."
    )


def _paired_cells(result: Paired, digits: int) -> list[str]:
    interval = "-" if result.low is None else f"{result.low:+.{digits}f} to {result.high:+.{digits}f}"
    return [f"{result.mean:+.{digits}f}", interval, f"{result.p:.3f}"]


def _agreement_table(results: Sequence[Result]) -> str:
    rows = []
    for arm in sorted({r.arm for r in results if r.arm.startswith("searched")}, key=arm_order):
        found = seed_agreement(results, arm)
        if found is not None:
            beyond = "-" if found.beyond_chance is None else f"{found.beyond_chance:+.2f}"
            rows.append(
                [arm, str(found.pairs), f"{found.observed:.1%}", f"{found.expected:.1%}", beyond, f"{found.p:.4f}"]
            )
    if not rows:
        return ""
    text = (
        "Agreement of search seeds: share of channels with the same dilation, mean over pairs of blocks; by chance:"
        " each genotype's shares on random channels; p by shuffling every convolution's groups."
    )
    return f"{text}\n\n" + _table(["arm", "pairs", "agree", "by chance", "beyond chance (0..1)", "p"], rows)


def _twins_markdown(found: Sequence[Twins]) -> str:
    rows = [
        [t.arm, t.size, str(len(t.difference.differences)), f"{t.upright:+.3f}", f"{t.transposed:+.3f}",
         *_paired_cells(t.difference, 3)]
        for t in found
    ]  # fmt: skip
    few = any(t.difference.is_descriptive for t in found)
    text = (
        "## Transposed twin\n\n"
        + (f"**Descriptive: fewer than {ENOUGH_BLOCKS} blocks.** " if few else "")
        + "Share of tall minus share of wide dilations; on the transposed data its sign must turn."
    )
    header = ["arm", "size", "blocks", "upright", "transposed", "difference", "95% interval", "p"]
    return f"{text}\n\n" + _table(header, rows)


def _mean(values: Iterable[float | None], digits: int = 2) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.{digits}f}" if known else "-"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- figure -----------------------------------------------------------------------------------------------------------


def draw(results: Sequence[Result], path: Path) -> None:
    """The differences of each block with the mean's interval, a panel per size and twin; with several sizes, the gain
    of each searched arm over plain by size.

    Args:
        results: finished runs.
        path: the PNG file.
    """
    variants = sorted({result.variant for result in results}, key=lambda v: (_number(v[0]), v[1]))
    with_sizes = len({size for size, _ in variants}) > 1
    found = [[*chain.from_iterable(comparisons([r for r in results if r.variant == variant]))] for variant in variants]
    heights = [0.8 + 0.32 * max(len(rows), 1) for rows in found] + [2.6] * with_sizes
    figure = Figure(figsize=(7.5, sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    for axes, variant, rows in zip(panels, variants, found, strict=False):
        _draw_differences(axes, rows)
        axes.set_title(variant_name(variant), fontsize=9, loc="left")
    ends = [end for axes in panels[: len(variants)] for end in axes.get_xlim()]
    for axes in panels[: len(variants)]:
        axes.set_xlim(min(ends), max(ends))
    if with_sizes:
        _draw_dose_response(panels[-1], results)
    with atomic_file(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")


def _draw_differences(axes: Axes, found: Sequence[Comparison]) -> None:
    axes.axvline(0, color="#999999", linewidth=0.8)
    for place, comparison in enumerate(found):
        result, colour = comparison.result, COLOURS[place % len(COLOURS)]
        spread = np.linspace(-0.15, 0.15, len(result.differences)) if len(result.differences) > 1 else [0.0]
        axes.plot(result.differences, place + np.asarray(spread), "o", markersize=4, alpha=0.6, color=colour)
        if result.low is not None:
            axes.plot([result.low, result.high], [place, place], color=colour, linewidth=2)
        axes.plot([result.mean], [place], "|", markersize=14, markeredgewidth=2, color=colour)
    axes.set_yticks(range(len(found)), [f"{c.name} (n = {len(c.blocks)})" for c in found], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("difference in AP: dots are blocks, bars the mean's 95% interval", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)


def _draw_dose_response(axes: Axes, results: Sequence[Result]) -> None:
    axes.axhline(0, color="#999999", linewidth=0.8)
    lines = sorted({(r.arm, r.transposed) for r in results if r.arm.startswith("searched")})
    for number, (arm, transposed) in enumerate(lines):
        points = dose_response(results, arm, transposed)
        margins = [[p.mean - (p.mean if p.low is None else p.low) for _, p in points],
                   [(p.mean if p.high is None else p.high) - p.mean for _, p in points]]  # fmt: skip
        label = f"{arm} - plain{', transposed' if transposed else ''}"
        sizes, means = [size for size, _ in points], [p.mean for _, p in points]
        axes.errorbar(
            sizes, means, margins, marker="o", markersize=4, capsize=3, color=COLOURS[number % 7], label=label
        )
    axes.set_xlabel("size of the images in pixels", fontsize=8)
    axes.set_ylabel("gain in AP, 95% interval", fontsize=8)
    axes.tick_params(labelsize=8)
    if lines:
        axes.legend(fontsize=8)


def dose_response(results: Sequence[Result], arm: str, transposed: bool = False) -> list[tuple[int, Paired]]:
    """The arm's gain over plain at each size, in order of size."""
    points = []
    for size in sorted({r.size for r in results}, key=_number):
        found = compare([r for r in results if r.variant == (size, transposed)], arm, "plain")
        if found is not None:
            points.append((_number(size), found.result))
    return points
