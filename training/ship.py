"""From a training run to the bundle that is installed: `python -m edgemuse.training.ship RUN -o runtime/data`."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import click

from edgemuse.calibration.calibrate import calibrate
from edgemuse.export.exporter import ExportOptions, export_model
from edgemuse.export.writer import write_bundle
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.training.folder import label_table

NAME = "edgemuse-t1"
LICENSE = "Apache-2.0"


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--calibrate", "data", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Folder of held-out scans with truth: int8 is added and gated on them.")  # fmt: skip
@click.option("--scan", "scans", multiple=True, type=click.Path(path_type=Path, exists=True), help="Verify on it.")
def main(run: Path, output: Path, data: Path | None, scans: tuple[Path, ...]) -> None:
    """Export RUN/model, with FreeSurfer's numbers and colours, over the bundle in the output folder."""
    table, bundle = run / "labels.tsv", run / f"{NAME}.zip"
    table.write_text(label_table(), encoding="utf-8")
    bundle.unlink(missing_ok=True)
    options = ExportOptions(
        orientation="LPS", labels=table, name=NAME, license=LICENSE, scans=scans, progress=click.echo
    )
    export_model(run / "model", bundle, options)
    if data is not None:
        add_int8(bundle, data)
    (output / bundle.name).write_bytes(bundle.read_bytes())
    click.echo(output / bundle.name)


def add_int8(bundle: Path, data: Path) -> None:
    """Calibrate the file `bundle` on the scans in `data` and leave fp16 out: no processor computes in it alone."""
    with tempfile.TemporaryDirectory() as folder:
        full = open_bundle(calibrate(bundle, data, Path(folder) / bundle.name, click.echo))
        manifest, graphs = full.manifest, dict(full.manifest.graphs)
        dropped = graphs.pop("fp16", None)
        files = {name: full.read(name) for name in manifest.files if name != dropped}
        gate = tuple(row for row in manifest.gate if row.precision != "fp16")
        entries = {name: entry for name, entry in manifest.files.items() if name != dropped}
        bundle.unlink()
        write_bundle(bundle, replace(manifest, graphs=graphs, files=entries, gate=gate), files)


if __name__ == "__main__":
    main()
