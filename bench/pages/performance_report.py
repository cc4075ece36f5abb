"""The tables of the performance page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgemuse.bench.measure.rows import Row
from edgemuse.bench.pages.page import joined
from edgemuse.bench.report.render import table

INTRODUCTION = """
Every run is a process of its own, from its start to its files on disk. *Time*: median of the runs that found a
compiled engine, in turn with all other systems; *cold*: the first run, which compiles it. *Ratio*: nnU-Net's
predictor in the same session over this. *Peak*: highest resident memory. *Agreement*: mean Dice with the labels of
`reference` in fp32, over all scans; with random weights logits are nearly tied, so there it says little. *Dice*: mean
over the structures of the scan with known labels. *Gate*: what the accuracy gate of `edgemuse calibrate` says, on all
scans and that truth. Islands are kept, as nnU-Net keeps them. A system that takes
minutes, or a backend that `auto` would not take, runs once, cold. Trained networks whose bundle stores no int8 are
quantised on the sample scan that comes with edgemuse. With random weights every structure is also scattered over the
whole volume, so that *quality*, which looks for the components of each, takes longer than with a trained network.

Stages: *rest* is starting Python, imports, opening the bundle, putting files in place, ending the process; *infer* is
the network, merging tiles and the head.

Peak of the processor: the most that chained products of matrices of 1536 x 1536 reach on all cores, compiled by
OpenVINO. GFLOP: multiplications and additions of the convolutions as the ONNX graph has them; edgemuse's rewrites save
some of them, so a share of the peak may be flattering. *Infer* is the stage, *run* the whole process.
"""
STAGES = ("load", "preprocess", "engine", "infer", "restore", "quality", "write")


def network_part(rows: Sequence[Row], left_out: Mapping[str, str], peaks: Mapping[str, float], machine: str) -> str:
    """Write what was measured of one network; `left_out` says why a system did not run, by its name."""
    parts = [machine, _overview(rows), *(f"Did not run: {name}: {why}" for name, why in left_out.items())]
    parts += ["### Stages, seconds", _stages(rows), "### Share of the processor's peak", _roofline(rows, peaks)]
    return joined(*parts)


def _overview(rows: Sequence[Row]) -> str:
    header = (
        "profile | backend | precision",
        "time",
        "runs",
        "cold",
        "ratio, mirroring off",
        "on",
        "peak",
        "agreement",
    )
    truth = any("dice" in row for row in rows)
    nnunet = {row["nnunet"]: row["seconds"] for row in rows if row["nnunet"]}
    lines = []
    for row in rows:
        ratios = (f"{nnunet[on] / row['seconds']:.1f}" if on in nnunet else "" for on in ("off", "on"))
        cold = "" if row["cold"] is None else f"{row['cold']:.1f} s"
        cells = [row["system"], f"{row['seconds']:.1f} s", str(row["runs"]), cold, *ratios]
        cells += [f"{row['peak'] / 1e9:.2f} GB", f"{row['agreement']:.4f}"]
        lines.append([*cells, f"{row['dice']:.4f}", row["gate"]] if truth else cells)
    return table((*header, "Dice", "gate") if truth else header, lines)


def _stages(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if not row["stages"]:
            continue
        stages = [row["stages"].get(name, 0.0) for name in STAGES]
        rest = row["seconds"] - sum(row["stages"].values())
        lines.append([row["system"], *(f"{value:.2f}" for value in (*stages, rest, row["seconds"]))])
    return table(("profile | backend | precision", *STAGES, "rest", "all"), lines)


def _roofline(rows: Sequence[Row], peaks: Mapping[str, float]) -> str:
    reached = ", ".join(f"{precision} {value / 1e9:.0f}" for precision, value in peaks.items())
    shares = []
    for row in rows:
        if row["nnunet"] or row["precision"] not in peaks:
            continue
        best = row["operations"] / peaks[row["precision"]]
        tile = f"{row['tiles']} of {' x '.join(map(str, row['tile']))}"
        tile += f", {row['copies']} mirrored copies" if row["copies"] > 1 else ""
        rate = row["operations"] / row["stages"]["infer"] / 1e9
        cells = [row["system"], tile, f"{row['operations'] / 1e9:.0f}", f"{rate:.0f}"]
        shares.append([*cells, f"{best / row['stages']['infer']:.0%}", f"{best / row['seconds']:.0%}"])
    header = ("profile | backend | precision", "tiles", "GFLOP", "GFLOP/s", "infer of peak", "run of peak")
    return f"Peak, GFLOP/s: {reached}.\n\n{table(header, shares)}"
