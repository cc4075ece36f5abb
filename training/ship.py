"""From a training run to the bundle that is installed: `python -m edgemuse.training.ship RUN -o runtime/data`."""

from __future__ import annotations

from pathlib import Path

import click

from edgemuse.export.exporter import ExportOptions, export_model
from edgemuse.training.folder import label_table

NAME = "edgemuse-t1"
LICENSE = "Apache-2.0"


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--scan", "scans", multiple=True, type=click.Path(path_type=Path, exists=True), help="Verify on it.")
def main(run: Path, output: Path, scans: tuple[Path, ...]) -> None:
    """Export RUN/model, with FreeSurfer's numbers and colours, over the bundle in the output folder."""
    table, bundle = run / "labels.tsv", run / f"{NAME}.zip"
    table.write_text(label_table(), encoding="utf-8")
    bundle.unlink(missing_ok=True)
    options = ExportOptions(
        orientation="LPS", labels=table, name=NAME, license=LICENSE, scans=scans, progress=click.echo
    )
    export_model(run / "model", bundle, options)
    (output / bundle.name).write_bytes(bundle.read_bytes())
    click.echo(output / bundle.name)


if __name__ == "__main__":
    main()
