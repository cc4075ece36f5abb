"""The accuracy gate on real scans: `python -m edgemuse.bench.pages.gate SHARED -o docs/measured/gate.md`.

Both trained networks are calibrated as `edgemuse calibrate` does it: on one T1 of SHARED, and judged on the others.
"""

from __future__ import annotations

import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click

from edgemuse.bench.measure.models import development_bundle
from edgemuse.bench.measure.rows import commit
from edgemuse.bench.pages.performance_report import table
from edgemuse.calibration.calibrate import calibrate
from edgemuse.engines.hardware import cpu_cores, cpu_name
from edgemuse.runtime.cli.describe import GATE_HEADER, gate_cells
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import Bundle, open_bundle

INTRODUCTION = """<!-- Written by: python -m edgemuse.bench.pages.gate SHARED -o docs/measured/gate.md -->
# The accuracy gate on real scans

What `edgemuse calibrate MODEL --data SHARED/data/t1` stores in a bundle and `edgemuse info` shows, for both trained
networks: int8 is calibrated on one whole head and everything is judged on two other scans, of which one has a truth.
*Agreement*: mean Dice with the labels of `reference` in fp32. *Dice*: against the truth, and what `reference` in fp32
has. *Largest drop*: of one structure's. *Seconds*: of the network, a scan. With so few scans these are examples: use
your own.
"""


def section(title: str, bundle: Bundle) -> str:
    """The table of a calibrated bundle, and what it was calibrated and judged on."""
    record = bundle.manifest.calibration
    chosen, held_out = (", ".join(scan["name"] for scan in record[key]) for key in ("calibrated_on", "evaluated_on"))
    left_out = record["int8"]["left_in_fp32"]
    kept = left_out if isinstance(left_out, str) else ", ".join(left_out)
    text = f"Calibrated on {chosen}, judged on {held_out}; convolutions left in fp32: {kept}."
    return f"\n## {title}\n\n{text}\n\n{table(GATE_HEADER, map(gate_cells, bundle.manifest.gate))}"


@click.command()
@click.argument("shared", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Markdown file to write.")
def main(shared: Path, output: Path) -> None:
    """Calibrate and judge both trained networks on the T1 scans of SHARED: about ten minutes."""
    say = partial(click.echo, err=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        models = {"Development model": development_bundle(shared, work, say), "Built-in model": BUILT_IN}
        pages = [INTRODUCTION]
        for title, model in models.items():
            made = calibrate(model, shared / "data" / "t1", work / f"{title}.calibrated", say)
            pages.append(section(title, open_bundle(made)))
    versions = ", ".join(f"{package} {version(package)}" for package in ("openvino", "onnxruntime", "nncf"))
    pages.append(f"\n{cpu_name()}, {cpu_cores()} cores; {versions}; commit {commit()}.\n")
    output.write_text("".join(pages), encoding="utf-8")
    click.echo(output)


if __name__ == "__main__":
    main()
