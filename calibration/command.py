"""`edgemuse calibrate`: the command line. NNCF is imported when the command runs."""

from __future__ import annotations

from pathlib import Path

import click

from edgemuse.runtime.cli.extras import needs_extra
from edgemuse.runtime.cli.options import model_dir_option
from edgemuse.runtime.cli.terminal import note, say_paths


@click.command(short_help="Add int8 and fp16 to a bundle, accuracy measured.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), metavar="DIR",
    help="Folder of T1 scans (.nii.gz), like those that the bundle will be used on: at least 2, better 10 or more. "
    "Where the true labels of sub-01_T1w.nii.gz are known, put them beside it as sub-01_dseg.nii.gz.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="BUNDLE",
    help="Where to write: a new directory, or a new file if it ends with .zip.  [default: replace the bundle itself, "
    "when all is done]",
)  # fmt: skip
@model_dir_option
def calibrate(bundle: Path, data: Path, output: Path | None, model_dir: Path | None) -> None:
    """Add int8 and fp16 graphs to a bundle and measure how accurate every backend is with them.

    A third of the scans, at most 8, set the ranges of int8. The others are segmented by every backend, precision and
    profile that this machine can run. The results are compared with those of fp32 under the profile reference, and with
    the truth where it is known. To pass, the mean Dice against the truth must be at least 99.9 % of fp32's (int8: 99
    %), no structure may lose more than 0.02, and the Dice with fp32's labels must be at least 0.98. If int8 fails, the
    layers that cost most are left in fp32.

    The table is stored in the bundle. 'edgemuse info' shows it, and 'segment' chooses by it. Plan for a few
    minutes for each scan in each combination of backend, precision and profile.

    BUNDLE may be a name that 'models list' shows, and it may be a cascade such as DLMUSE. Each network of a cascade is
    calibrated and measured by itself, the second on what the first finds in the scans. Only the second is compared with
    the truth; the first is compared with its own fp32.

    Needs NNCF: pip install ".[calibrate]" in edgemuse's source folder. The bundle does not.

    \b
    Example:
      edgemuse calibrate dlmuse --data scans
      edgemuse segment T1.nii.gz -o out --model dlmuse --profile balanced
    """  # noqa: D301  # \b keeps click from wrapping the example
    with needs_extra("calibrate", "calibrating", "NNCF"):
        from edgemuse.calibration import calibrate as module
    from edgemuse.runtime.model.store import find_model

    source = find_model(bundle, model_dir)
    say_paths([module.calibrate(source, data, output or source, note)])
