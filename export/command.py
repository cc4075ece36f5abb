"""`edgemuse export`: the command line of the exporter. PyTorch is imported when the command runs."""

from __future__ import annotations

from pathlib import Path

import click

from edgemuse.runtime.cli.extras import needs_extra
from edgemuse.runtime.cli.terminal import note, say_paths

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(short_help="Turn an nnU-Net v2 model folder into a verified bundle.")
@click.argument("model_folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "-o", "--output", "bundle", required=True, type=click.Path(path_type=Path), metavar="BUNDLE",
    help="Where to write: a new directory, or a new file if it ends with .zip. Nothing that exists is overwritten.",
)  # fmt: skip
@click.option(
    "--fold", "folds", multiple=True, metavar="N",
    help="Fold to export, a number or 'all'; give it again for more. Several folds become one ensemble, each adding "
    "its full run time.  [default: every fold that has the checkpoint]",
)  # fmt: skip
@click.option(
    "--checkpoint", default="checkpoint_final.pth", show_default=True, metavar="NAME",
    help="File to take from each fold, for example checkpoint_best.pth.",
)  # fmt: skip
@click.option(
    "--configuration", metavar="NAME",
    help="Configuration of plans.json.  [default: the one that the checkpoint was trained with]",
)  # fmt: skip
@click.option(
    "--orientation", metavar="CODES",
    help="Orientation of the training data, three letters for where its axes run to: LPS (left, posterior, superior) "
    "for DLMUSE. Scans are turned to it before the network sees them. Without it, voxels are taken as they are stored, "
    "as nnU-Net does: then a scan that is stored differently than the training data gives wrong labels.",
)  # fmt: skip
@click.option(
    "--labels", type=FILE, metavar="TABLE",
    help="Table with the columns class, index, name and optionally color (#rrggbb) and single (yes, no), separated by "
    "tabs or commas: what the network's classes are called, which number each gets in the result, and which are in one "
    "piece, so that islands of them are removed.  [default: names and numbers of dataset.json]",
)  # fmt: skip
@click.option("--name", help="Name of the model.  [default: the data set's]")
@click.option("--license", help="Licence of the weights, recorded in the bundle, such as CC-BY-4.0.  [default: none]")
@click.option(
    "--scan", "scans", multiple=True, type=FILE, metavar="T1",
    help="NIfTI scan to verify on, besides a synthetic patch; give it again for more.",
)  # fmt: skip
def export(
    model_folder: Path,
    bundle: Path,
    folds: tuple[str, ...],
    checkpoint: str,
    configuration: str | None,
    orientation: str | None,
    labels: Path | None,
    name: str | None,
    license: str | None,
    scans: tuple[Path, ...],
) -> None:
    """Turn an nnU-Net v2 model folder into a bundle that runs without PyTorch.

    MODEL_FOLDER is the folder that holds plans.json, dataset.json and fold_0, fold_1, ..., as nnU-Net's training
    leaves it: DatasetXXX_Name/nnUNetTrainer__nnUNetPlans__3d_fullres.

    The bundle is written only after its graph gave the same features and labels as PyTorch, on OpenVINO and, where it
    is installed, on ONNX Runtime. Checkpoints are read as data: nothing in them is run.

    Needs PyTorch: pip install ".[export]" in edgemuse's source folder. The bundle does not.

    \b
    Example:
      edgemuse export DLMUSE/nnUNetTrainer__nnUNetPlans__3d_fullres -o dlmuse.bundle --orientation LPS
      edgemuse segment T1.nii.gz -o out --model dlmuse.bundle
    """  # noqa: D301  # \b keeps click from wrapping the example
    with needs_extra("export", "exporting", "PyTorch"):
        from edgemuse.export import exporter
    options = exporter.ExportOptions(
        folds=folds or None,
        checkpoint=checkpoint,
        configuration=configuration,
        orientation=orientation.upper() if orientation else None,
        labels=labels,
        name=name,
        license=license,
        scans=scans,
        progress=note,
    )
    say_paths([exporter.export_model(model_folder, bundle, options)])
