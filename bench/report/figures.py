"""The report's figures as SVG. They need no network and no script; the same rows give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from edgemuse.bench.measure.accuracy import read_labels
from edgemuse.bench.measure.worker import STAGES
from edgemuse.bench.report.summary import Summary
from edgemuse.engines.errors import printable
from edgemuse.runtime.results.picture import to_bytes
from edgemuse.runtime.scan.nifti import open_scan, read_scan

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgemuse",
    "text.parse_math": False,  # a name with two $ is a name
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
FAMILY_COLOURS = {"edgemuse": "#0b6e4f", "plain": "#c97b1a", "nnunet": "#5b4b8a"}
STAGE_COLOURS = dict(zip(STAGES, [*mpl.color_sequences["tab10"], "#e8c468", "#cccccc"], strict=True))
FAR_APART, RED = 7, 6
"""In the colour map tab20: the step between neighbouring labels, and what marks a difference."""
IMAGE_DPI = 80
"""Resolution of slices; everything else is drawn as lines."""
WORST = 30
"""How many structures the box plot shows."""


def svg(figure: Figure) -> bytes:
    """Return the `<svg>` element alone, to be put into a page or a file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", dpi=IMAGE_DPI, bbox_inches="tight", metadata={"Date": None})
    data = stream.getvalue()
    return data[data.index(b"<svg") :]


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure((width, height))
    return figure, figure.add_subplot()


def pareto(summaries: Sequence[Summary]) -> bytes | None:
    """Draw mean Dice, against the truth if there is one, over time; a line joins what nothing beats in both."""
    against_truth = any(summary.truth for summary in summaries)
    points = []
    for summary in summaries:
        scores = summary.truth if against_truth else summary.baseline
        if summary.seconds and scores:
            points.append((summary.seconds.median, scores.dice, summary))
    if not points:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _figure(7.5, 4)
        for number, (seconds, score, summary) in enumerate(points, 1):
            marker = "x" if summary.flags else "o"
            colour = FAMILY_COLOURS[summary.system.split("/")[0]]
            axes.plot(seconds, score, marker, color=colour, label=f"{number}  {summary.system}")
            axes.annotate(str(number), (seconds, score), (4, 4), textcoords="offset points", fontsize=7)
        front = [p for p in sorted(points, key=lambda p: p[:2]) if all(q[0] >= p[0] or q[1] < p[1] for q in points)]
        axes.plot([p[0] for p in front], [p[1] for p in front], color="#999999", linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("seconds for one scan, from the start of the process to its end (median, warm)")
        axes.set_ylabel(f"mean Dice, {'truth' if against_truth else 'baseline'}")
        axes.margins(0.1)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), title="x: flagged", title_fontsize=7)
        return svg(figure)


def stages(summaries: Sequence[Summary]) -> bytes | None:
    """Draw a bar for each system, with its stages in their order."""
    timed = [summary for summary in summaries if summary.stages][::-1]
    if not timed:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _figure(7.5, 0.8 + 0.32 * len(timed))
        left = np.zeros(len(timed))
        for stage in STAGES:
            seconds = np.array([summary.stages.get(stage, 0.0) for summary in timed])
            axes.barh(range(len(timed)), seconds, left=left, label=stage, color=STAGE_COLOURS[stage])
            left += seconds
        axes.set_yticks(range(len(timed)), [summary.system for summary in timed])
        axes.set_xlabel("seconds (median, warm)")
        axes.legend(ncols=6, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1))
        return svg(figure)


def structures(shown: Sequence[Summary]) -> bytes | None:
    """Draw box plots of Dice over scans for the structures that are worst in the last system shown."""
    against_truth = all(summary.truth for summary in shown)
    scores = [summary.truth if against_truth else summary.baseline for summary in shown]
    if not scores or any(score is None for score in scores):
        return None
    order = sorted(scores[-1].structures, key=lambda name: scores[-1].structures[name])[:WORST][::-1]  # type: ignore[union-attr]
    with mpl.rc_context(STYLE):
        figure, axes = _figure(7.5, 1 + 0.22 * len(order))
        for index, (summary, accuracy) in enumerate(zip(shown, scores, strict=True)):
            assert accuracy is not None
            values = [[score.dice for score in accuracy.scores if score.name == name] for name in order]
            colour = FAMILY_COLOURS[summary.system.split("/")[0]]
            _boxes(axes, values, np.arange(len(order)) + 0.18 - 0.36 * index, colour if index else "#888888")
            axes.plot([], [], color=colour if index else "#888888", label=summary.system)
        axes.set_yticks(range(len(order)), [printable(name) for name in order])
        axes.set_xlabel(f"Dice, {'truth' if against_truth else 'baseline'}")
        axes.legend(fontsize=7, loc="lower left")
        return svg(figure)


def _boxes(axes: Any, values: list[list[float]], positions: Any, colour: str) -> None:
    lines = {"color": colour}
    axes.boxplot(
        values, positions=positions, widths=0.3, orientation="horizontal", manage_ticks=False, boxprops=lines,
        whiskerprops=lines, capprops=lines, medianprops=lines | {"linewidth": 2},
        flierprops={"marker": ".", "markersize": 3},
    )  # fmt: skip


def bland_altman(summary: Summary) -> bytes | None:
    """Draw differences of volumes over their means: a dot for each structure and scan, and the limits of agreement."""
    panels = [(name, scores) for name, scores in (("truth", summary.truth), ("baseline", summary.baseline)) if scores]
    if not panels:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure((7.5, 3.2))
        for column, (name, scores) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), column + 1)
            pairs = np.array([(score.found_mm3, score.truth_mm3) for score in scores.scores]) / 1000
            means, differences = pairs.mean(1), pairs[:, 0] - pairs[:, 1]
            axes.plot(means, differences, ".", color="#0b6e4f", markersize=4)
            for level in differences.mean() + 1.96 * differences.std() * np.array([-1, 0, 1]):
                axes.axhline(level, color="#999999", linewidth=0.8, linestyle="--")
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
            axes.set_xlabel("mean volume, ml")
            axes.set_ylabel(f"minus {name}, ml")
        figure.tight_layout()
        return svg(figure)


def scaling(curves: Mapping[str, Sequence[tuple[float, float, float]]], names: Mapping[str, str]) -> bytes | None:
    """Draw seconds and gigabytes over what is varied, with a column for each curve."""
    if not curves:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure((2.3 * len(curves) + 0.5, 4))
        for column, (axis, points) in enumerate(curves.items(), 1):
            values, seconds, peaks = np.array(points).T
            for row, (measured, what) in enumerate(((seconds, "seconds"), (peaks / 1e9, "memory, GB"))):
                axes = figure.add_subplot(2, len(curves), row * len(curves) + column)
                axes.plot(values, measured, "o-", color="#0b6e4f", markersize=3)
                axes.set_ylim(0, 1.1 * measured.max())
                axes.set_xticks(values)
                axes.set_ylabel(what if column == 1 else "")
                axes.set_xlabel(names[axis] if row else "")
        figure.tight_layout()
        return svg(figure)


def worst_slices(scan: Path, maps: Sequence[tuple[str, Path]]) -> bytes:
    """Draw the axial slice in which the last of `maps` differs most from the first, and the differences."""
    image = to_bytes(read_scan(scan)[1])
    volumes = [read_labels(path)[0] for _, path in maps]
    differ = volumes[0] != volumes[-1]
    axis = _vertical(scan)
    where = int(differ.sum(axis=tuple(n for n in range(3) if n != axis)).argmax())
    panels = [("scan", np.zeros(image.shape, int)), *((n, v) for (n, _), v in zip(maps, volumes, strict=True))]
    colours = [(name, np.ma.masked_where(volume == 0, volume * FAR_APART % 20)) for name, volume in panels]
    colours.append((f"{int(differ.sum())} voxels differ", np.ma.masked_where(~differ, np.full(differ.shape, RED))))
    with mpl.rc_context(STYLE):
        figure = Figure((2.4 * len(colours), 2.8))
        for column, (name, volume) in enumerate(colours, 1):
            axes = figure.add_subplot(1, len(colours), column)
            axes.imshow(_shown(image, axis, where), cmap="gray", interpolation="nearest")
            shown = _shown(volume, axis, where)
            alpha = 0.55 if column < len(colours) else 1  # a voxel that differs must be seen
            axes.imshow(shown, cmap="tab20", alpha=alpha, interpolation="nearest", vmin=0, vmax=19)
            axes.set_title(printable(name), fontsize=6)
            axes.set_axis_off()
        figure.suptitle(f"{printable(scan.name)}, slice {where}", fontsize=8)
        return svg(figure)


def _vertical(scan: Path) -> int:
    """Return the axis that runs closest to superior."""
    return int(np.abs(open_scan(scan).affine[2, :3]).argmax())


def _shown(volume: Any, axis: int, where: int) -> Any:
    return volume.take(where, axis).T[::-1]
