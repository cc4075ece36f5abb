"""The accuracy gate on real scans.

Both trained networks are calibrated as `edgemuse calibrate` does it, on one T1 of SHARED, and judged on the others.
"""

from __future__ import annotations

import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click

from edgemuse.bench.measure.models import development_bundle
from edgemuse.bench.measure.rows import state
from edgemuse.bench.pages.page import joined, named
from edgemuse.bench.pages.program import Workplace, page_options, say
from edgemuse.bench.report.render import table
from edgemuse.calibration.calibrate import calibrate
from edgemuse.runtime.cli.describe import GATE_HEADER, gate_cells
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import Bundle, open_bundle

INTRODUCTION = """
What `edgemuse calibrate MODEL --data SHARED/data/t1` stores in a bundle and `edgemuse info` shows, for both trained
networks: int8 is calibrated on one whole head and everything is judged on two other scans, of which one has a truth.
*Agreement*: mean Dice with the labels of `reference` in fp32. *Dice*: against the truth, and what `reference` in fp32
has. *Largest drop*: of one structure's. *Seconds*: of the network, a scan. With so few scans these are examples: use
your own.
"""


def section(title: str, bundle: Bundle) -> str:
    """Write the table of a calibrated bundle, and what it was calibrated and judged on."""
    record = bundle.manifest.calibration
    chosen, held_out = (", ".join(scan["name"] for scan in record[key]) for key in ("calibrated_on", "evaluated_on"))
    left_out = record["int8"]["left_in_fp32"]
    kept = left_out if isinstance(left_out, str) else ", ".join(left_out)
    text = f"Calibrated on {chosen}, judged on {held_out}; convolutions left in fp32: {kept}."
    return joined(f"## {title}", text, table(GATE_HEADER, map(gate_cells, bundle.manifest.gate)))


def calibrated(title: str, model: Path, data: Path, work: Path) -> str:
    """Calibrate and judge `model` on the scans in `data`; returns the section on it."""
    return section(title, open_bundle(calibrate(model, data, work / f"{title}.calibrated", say)))


@click.command()
@page_options("gate")
def main(shared: Path, output: Path, work: Path) -> None:
    """Calibrate and judge both trained networks on the T1 scans of SHARED."""
    place = Workplace(work, state(nncf=version("nncf")))
    with tempfile.TemporaryDirectory() as name:
        models = {"Development model": development_bundle(shared, Path(name), say), "Built-in model": BUILT_IN}
        sections = [
            place.once(title, partial(calibrated, title, model, shared / "data" / "t1", Path(name)))
            for title, model in models.items()
        ]
        what = [named(title.lower(), open_bundle(model).sha256) for title, model in models.items()]
    title = "# The accuracy gate on real scans"
    place.publish(output, joined(place.age(what, "gate"), title, INTRODUCTION, *sections, place.machine))


if __name__ == "__main__":
    main()
