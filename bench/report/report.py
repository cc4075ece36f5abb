"""The report: `report.md` with its figures and `report.html` in one file; both are made from the rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from edgemuse.bench.measure.mlperf import SHARES, scenarios
from edgemuse.bench.measure.rows import Row, machine_text, versions_text
from edgemuse.bench.measure.run import label_path
from edgemuse.bench.measure.scaling import AXES, curves
from edgemuse.bench.measure.scores import Accuracy
from edgemuse.bench.measure.worker import STAGES
from edgemuse.bench.report import figures
from edgemuse.bench.report.render import Section, to_html, to_markdown
from edgemuse.bench.report.summary import (
    SHIFT,
    STRUCTURE_AGREEMENT,
    Spread,
    Summary,
    focus,
    summarise,
)
from edgemuse.calibration.gate import LARGEST_DROP, SMALLEST_AGREEMENT
from edgemuse.calibration.scans import Source
from edgemuse.runtime.results.files import write_files
from edgemuse.runtime.scan.nifti import scan_stem

NOTHING = "–"
WORST_SCANS = 3
METHOD = f"""Every run is a process of its own, and the systems run in turn, round after round. Time is wall time from \
the start of the process to its end, Python and its imports included. *Cold* is the first run on a scan, with nothing \
compiled before (files may be in the system's cache); it also warms up and enters no other column. Every other time is \
a median with the 10th and 90th percentile over scans and rounds. *Ratio* is the time over the baseline's in the same \
round on the same scan: 2 is twice as slow. *Memory* is the highest resident memory of the process and its children. \
*Installed* is the size of the packages that the system needs, with all that they require.

nnU-Net does not reorient scans: where the network was trained in another orientation, it gets a copy in that one, \
whose making is not timed. It uses all processors, as its own command does on a CPU, unless --threads is given. \
edgemuse runs as `edgemuse segment --no-postprocess --no-qc`.

Dice is the mean over structures of their mean over scans. Structures that neither map has are left out and counted; \
one that only one map has scores 0 and has no distance. *HD95* is the larger of the two 95th percentiles of distances \
between borders. A system is flagged where its mean Dice against the truth falls below 99.9 % (int8: 99 %) of the \
baseline's, that of a structure by more than {LARGEST_DROP}, where its mean Dice with the baseline's labels is below \
{SMALLEST_AGREEMENT}, that of a structure below {STRUCTURE_AGREEMENT}, or where a structure's centre lies more than \
{SHIFT} voxels off the baseline's."""
MLPERF = """Through MLPerf's load generator, LoadGen, in one warm process: a query is a scan on disk, the answer its \
label map on disk. *Dice* is that of the label maps in LoadGen's accuracy log; MLPerf's 3D-UNet benchmark asks for \
99 % or 99.9 % of the reference's. This is no MLPerf result: its rules ask for other data and for ten minutes or more, \
and LoadGen finds SingleStream valid from 64 queries on."""


def write_report(folder: Path, rows: Sequence[Row], scans: Sequence[Source] = (), command: str = "") -> Path:
    """Write the report on `rows` into `folder`, with pictures of `scans` if they are given; returns the HTML file."""
    parts = list(sections(folder, rows, scans, command))
    (folder / "figures").mkdir(exist_ok=True)
    contents = {folder / "figures" / f"{name}.svg": data for name, data in pictures(parts).items()}
    contents[folder / "report.md"] = to_markdown(parts).encode()
    contents[folder / "report.html"] = to_html(parts).encode()
    write_files(contents)
    return folder / "report.html"


def pictures(parts: Sequence[Section]) -> dict[str, bytes]:
    """Return the figures by their names."""
    return {name: data for part in parts for name, data in part.figures.items() if data is not None}


def sections(folder: Path, rows: Sequence[Row], scans: Sequence[Source], command: str) -> Iterator[Section]:
    """Make the parts of a report on `rows`, whose label maps lie in `folder`."""
    summaries = summarise(rows)
    shown = focus(summaries)
    yield Section("edgemuse bench", _environment(rows, command))
    yield _results(summaries)
    yield _flagged(summaries, rows)
    yield Section("Accuracy and time", figures={"pareto": figures.pareto(summaries)})
    yield _stages(summaries)
    for name, where in (("the truth", "truth"), ("the baseline's labels", "baseline")):
        yield from _accuracy(name, [(s.system, getattr(s, where)) for s in summaries])
    if shown is not None:
        boxes, volumes = figures.structures([summaries[0], shown]), figures.bland_altman(shown)
        yield Section("Structures", f"{shown.system} beside the baseline.", figures={"structures": boxes})
        yield Section("Volumes", f"{shown.system}: differences over means.", figures={"bland_altman": volumes})
        yield Section("Worst slices", figures=_slices(folder, rows, scans, summaries[0], shown))
    drawn = curves(rows)
    yield Section("Scaling", _scaled(rows), figures={"scaling": figures.scaling(drawn, AXES)})
    yield _mlperf(rows)
    yield Section("How it was measured", METHOD)


def _scaled(rows: Sequence[Row]) -> str:
    systems = dict.fromkeys(row["system"] for row in rows if row["kind"] == "scaling")
    return f"{', '.join(systems)}: whole processes, warm, each point once." if systems else ""


def _mlperf(rows: Sequence[Row]) -> Section:
    found = scenarios(rows)
    if not found:
        return Section("MLPerf's scenarios")
    header = [
        "system",
        "scenario",
        "result",
        "scans",
        "Dice",
        "of the baseline's",
        *(f"{x:.1%}" for x in SHARES),
        "LoadGen",
    ]
    units = {"SingleStream": "s a scan, 90th percentile", "Offline": "scans a second"}
    table = [
        [x.system, x.scenario, f"{x.result:.3f} {units[x.scenario]}", str(x.queries), f"{x.dice:.4f}", f"{x.share:.3%}"]
        + ["kept" if x.share >= share else "missed" for share in SHARES]
        + ["valid" if x.valid else "too short"]
        for x in found
    ]
    return Section("MLPerf's scenarios", MLPERF, header=header, rows=table)


def _environment(rows: Sequence[Row], command: str) -> str:
    row = rows[0]
    scans = dict.fromkeys(row["scan"] for row in rows if row["kind"] == "run")
    lines = [
        f"Made by `{command}`." if command else "",
        f"{machine_text(row)}; threads: {row['threads'] or 'as each system chooses'}.",
        f"{versions_text(row)}; commit {row['commit']}.",
        f"Network {row['bundle_sha256'][:12]}; scans: {', '.join(scans)}.",
        "No system ran on a GPU." if _devices(rows) <= {"CPU"} else "GPU memory is not measured.",
        "Energy is not reported: this machine lets nobody read its RAPL counters."
        if not any(row.get("joules") for row in rows)
        else "Energy is what the processor packages used meanwhile, the rest of the machine's work included.",
    ]
    return "\n\n".join(line for line in lines if line)


def _devices(rows: Sequence[Row]) -> set[str]:
    engines = [row["engine"] for row in rows if row["kind"] == "run" and row.get("engine")]
    each = [engine for found in engines for engine in ([found] if "name" in found else found.values())]  # of a cascade
    return {engine.get("device", "CPU") for engine in each}


def _results(summaries: Sequence[Summary]) -> Section:
    header = [
        "system",
        "Dice, truth",
        "Dice, baseline",
        "seconds",
        "runs",
        "ratio",
        "cold",
        "batch, s/scan",
        "memory",
        "installed",
        "energy",
    ]
    rows = [_result(summary, is_baseline=index == 0) for index, summary in enumerate(summaries)]
    return Section("Results", header=header, rows=rows)


def _result(summary: Summary, is_baseline: bool) -> list[str]:
    baseline, warning = " (baseline)" * is_baseline, " ⚠" * bool(summary.flags or summary.errors)
    return [
        f"{summary.system}{baseline}{warning}",
        _number(summary.truth.dice if summary.truth else None, "{:.4f}"),
        NOTHING if is_baseline else _number(summary.baseline.dice if summary.baseline else None, "{:.4f}"),
        _spread(summary.seconds),
        str(summary.seconds.count if summary.seconds else 0),
        NOTHING if is_baseline else _spread(summary.ratio),
        _number(summary.cold.median if summary.cold else None, "{:.2f}"),
        _number(summary.batch, "{:.2f}"),
        _number(summary.peak / 1e9 if summary.peak else None, "{:.2f} GB"),
        _number(summary.installed / 1e9 if summary.installed else None, "{:.2f} GB"),
        _number(summary.joules, "{:.0f} J"),
    ]


def _number(value: float | None, form: str) -> str:
    """Write `value` as `form` says, and a dash for what is not known."""
    return NOTHING if value is None or math.isnan(value) else form.format(value)


def _spread(values: Spread | None) -> str:
    return f"{values.median:.2f} ({values.p10:.2f}–{values.p90:.2f})" if values else NOTHING


def _flagged(summaries: Sequence[Summary], rows: Sequence[Row]) -> Section:
    points = [f"{s.system}: {flag}" for s in summaries for flag in s.flags]
    points += [f"{s.system} failed on {error}" for s in summaries for error in s.errors]
    points += [
        f"{x.system}: MLPerf's {x.scenario}: {x.share:.2%} of the baseline's Dice, less than {SHARES[0]:.0%}"
        for x in scenarios(rows)
        if not x.share >= SHARES[0]
    ]
    for row in rows:
        if row["kind"] in ("scaling", "mlperf") and row["failed"]:
            what = row["scenario"] if row["kind"] == "mlperf" else f"{row['axis']} {row['value']:g}"
            points.append(f"{row['system']} failed, {what}: {row['error']}")
    text = "" if points else "Every system ran on every scan, and nothing speaks against the labels of any."
    return Section("Flags", text, points=points)


def _stages(summaries: Sequence[Summary]) -> Section:
    rows = [
        [summary.system, *(_number(summary.stages.get(stage), "{:.3f}") for stage in STAGES)] for summary in summaries
    ]
    text = "Seconds, medians. `engine` compiles the network or loads it from the cache, `merge` adds tiles up."
    return Section("Stages", text, header=["system", *STAGES], rows=rows, figures={"stages": figures.stages(summaries)})


def _accuracy(name: str, systems: Sequence[tuple[str, Accuracy | None]]) -> Iterator[Section]:
    scored = [(system, accuracy) for system, accuracy in systems if accuracy]
    if not scored:
        return
    header = ["system", "Dice", "worst structure", "same label", "HD95, mm", "one-sided", "absent"]
    header += ["volumes: r", "ICC", "mean difference, mm³", "per structure: r", "ICC"]
    rows = [[system, *_accuracy_row(accuracy)] for system, accuracy in scored]
    text = (
        "*one-sided*: structures that only one map has; *absent*: that neither has, counted over scans. Volumes: over "
        "all structures and scans together, and the median over structures with three scans or more."
    )
    yield Section(f"Against {name}", text, header=header, rows=rows)
    names = dict.fromkeys(name for _, accuracy in scored for name in accuracy.structures)
    table = [[name, *(_number(a.structures.get(name), "{:.4f}") for _, a in scored)] for name in names]
    means = ["mean", *(f"{fmean(accuracy.structures.values()):.4f}" for _, accuracy in scored)]
    header = ["structure", *(system for system, _ in scored)]
    yield Section(f"Dice of each structure against {name}", header=header, rows=[*table, means], long=True)


def _accuracy_row(accuracy: Accuracy) -> list[str]:
    worst = min(accuracy.structures, key=lambda name: accuracy.structures[name])
    each = accuracy.volumes_by_structure
    return [
        f"{accuracy.dice:.4f}",
        f"{accuracy.structures[worst]:.4f} {worst}",
        f"{accuracy.agreement:.4%}",
        _number(accuracy.hd95, "{:.3f}"),
        str(accuracy.one_sided),
        str(accuracy.absent),
        _number(accuracy.volumes.pearson, "{:.5f}"),
        _number(accuracy.volumes.icc, "{:.5f}"),
        _number(accuracy.volumes.mean_absolute_mm3, "{:.1f}"),
        _number(each.pearson if each else None, "{:.5f}"),
        _number(each.icc if each else None, "{:.5f}"),
    ]


def _slices(
    folder: Path, rows: Sequence[Row], scans: Sequence[Source], base: Summary, shown: Summary
) -> dict[str, bytes | None]:
    """Draw the scans on which the system shown is worst, against the truth if there is one."""
    dice = {
        row["scan"]: fmean(score["dice"] for score in row["structures"])
        for row in sorted(rows, key=lambda row: row.get("against") == "truth")
        if row["kind"] == "accuracy" and row["system"] == shown.system and row["structures"]
    }
    known = [scan for scan in scans if scan_stem(scan.path) in dice]
    pictures: dict[str, bytes | None] = {}
    for scan in sorted(known, key=lambda scan: dice[scan_stem(scan.path)])[:WORST_SCANS]:
        maps = [] if scan.truth is None else [("truth", scan.truth)]
        maps += [(system, label_path(folder, system, scan.path)) for system in (base.system, shown.system)]
        if all(path.exists() for _, path in maps):
            pictures[f"worst_{scan_stem(scan.path)}"] = figures.worst_slices(scan.path, maps)
    return pictures
