"""From a training run to the bundle that is installed: `python -m edgemuse.training.ship RUN -o runtime/data`.

`--model muse` for the model of MUSE regions; its scans for `--calibrate` are the held-out ones of the folder `pairs`
reads, which are linked as `edgemuse calibrate` wants them.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import click

from edgemuse.calibration.calibrate import calibrate
from edgemuse.export.exporter import ExportOptions, export_model
from edgemuse.export.writer import write_bundle
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.regions.labels import Label
from edgemuse.training import regions
from edgemuse.training.folder import T1, label_table
from edgemuse.training.pairs import find_subjects


@dataclass(frozen=True)
class Release:
    """What a bundle is called, its licence, and its label table."""

    name: str
    license: str
    labels: tuple[Label, ...]


RELEASES = {
    "t1": Release("edgemuse-t1", "Apache-2.0", T1.labels),
    "muse": Release("edgemuse-muse", "CC-BY-SA-3.0 AND LicenseRef-SBIA-1.1", regions.class_labels()),
}


@click.command(context_settings={"show_default": True})
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--model", type=click.Choice([*RELEASES]), default="t1", help="Which model RUN trained.")
@click.option("--calibrate", "data", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Folder of held-out scans with truth: int8 is added and gated on them.")  # fmt: skip
@click.option("--scan", "scans", multiple=True, type=click.Path(path_type=Path, exists=True), help="Verify on it.")
def main(run: Path, output: Path, model: str, data: Path | None, scans: tuple[Path, ...]) -> None:
    """Export RUN/model, with numbers and colours of its structures, over the bundle in the output folder."""
    release = RELEASES[model]
    table, bundle = run / "labels.tsv", run / f"{release.name}.zip"
    table.write_text(label_table(release.labels), encoding="utf-8")
    bundle.unlink(missing_ok=True)
    options = ExportOptions(
        orientation="LPS",
        labels=table,
        name=release.name,
        license=release.license,
        scans=scans,
        progress=click.echo,
    )
    export_model(run / "model", bundle, options)
    if data is not None:
        with tempfile.TemporaryDirectory() as folder:
            add_int8(bundle, link_held_out(data, Path(folder)) if model == "muse" else data)
    (output / bundle.name).write_bytes(bundle.read_bytes())
    click.echo(output / bundle.name)


def link_held_out(pairs: Path, folder: Path) -> Path:
    """Put links to the held-out scans, and their label maps beside them, into `folder`."""
    for name in find_subjects(pairs, held_out=True):
        for kind, file in (("t1", f"{name}_T1w.nii.gz"), ("dlmuse", f"{name}_dseg.nii.gz")):
            (folder / file).symlink_to((pairs / kind / file).resolve())
    return folder


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
