"""A self-test for a bundle that has none, or a new one: `python -m edgemuse.training.selftest BUNDLE`."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import click

from edgemuse.calibration.selftest import selftest_file
from edgemuse.export.writer import write_bundle
from edgemuse.runtime.model.bundle import file_entry, open_bundle
from edgemuse.runtime.model.selftest import SELFTEST


def add_selftest(path: Path) -> None:
    """Add a self-test to the zip file of a bundle; everything else in it stays as it is, byte for byte."""
    bundle = open_bundle(path)
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    files[SELFTEST] = selftest_file(bundle, bundle.graph("int8") if "int8" in bundle.manifest.graphs else None)
    manifest = replace(bundle.manifest, files={name: file_entry(data) for name, data in files.items()})
    bundle.close()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        os.replace(write_bundle(Path(folder) / path.name, manifest, files), path)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(bundle: Path) -> None:
    """Add a self-test to the zip file BUNDLE."""
    add_selftest(bundle)
    click.echo(bundle)


if __name__ == "__main__":
    main()
