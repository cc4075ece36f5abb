"""`edgemuse segment`, and what every command does that segments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from edgemuse.engines.errors import InputError
from edgemuse.runtime.cli.options import bind_threads, engine_options
from edgemuse.runtime.cli.screen import FAILURE, Screen, show_log

if TYPE_CHECKING:
    from edgemuse.runtime.batch.jobs import Job
    from edgemuse.runtime.batch.many import Counts
    from edgemuse.runtime.model.bundle import Bundle
    from edgemuse.runtime.model.cascade import Cascade
    from edgemuse.runtime.pipeline.options import Options

Find = Callable[["Bundle | Cascade"], "list[Job]"]
"""Makes the jobs for an opened model."""
Found = Callable[[], "tuple[list[Job], Screen]"]
"""The jobs, made last of all, and who is told of them."""


@click.command()
@click.argument("inputs", nargs=-1, type=click.Path(path_type=Path), metavar="T1.nii.gz|FOLDER...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("--list", "listed", type=click.File(encoding="utf-8-sig"), metavar="FILE",
              help="More scans and folders: a text file with one path per line; - reads it from stdin.")  # fmt: skip
@engine_options
@click.pass_context
def segment(
    ctx: click.Context,
    /,
    inputs: tuple[Path, ...],
    output: Path,
    listed: IO[str] | None,
    **options: Any,
) -> None:
    """Segment T1 scans (NIfTI): files, or every T1 in a folder and below.

    For sub-01_T1w.nii.gz the folder OUTPUT receives

    \b
      sub-01_dseg.nii.gz         labels on the scan's own grid
      sub-01_dseg.tsv            what the labels mean
      sub-01_volumes.tsv         voxels and mm3 of every structure
      sub-01_DLMUSE_Volumes.csv  with DLMUSE: the table that NiChart_DLMUSE writes
      sub-01_provenance.json     inputs, model, versions, seconds, memory
      sub-01_qc.png              slices with the labels over them: look at it

    and their paths are printed. Where a result should be looked at before it is used (the brain cut off, structures
    missing or in pieces, strong noise, ...), a line says why, and so do the provenance and the picture.

    Of a folder every NIfTI file is taken, unless its name ends as that of another kind of image (_T2w, _bold, _mask,
    _dseg, ...) or it holds labels; OUTPUT gets the same sub-folders. Links to folders are followed. A scan that cannot
    be segmented does not stop the others. A run that was interrupted goes on where it stopped: give the same command
    again. Several processes may work on the same scans and OUTPUT at once; on a cluster's file system, where locks may
    not work, give each its own --shard.

    Exit code: 0 all done, 2 bad input or usage, 1 another failure.
    """  # noqa: D301 click reads the backspace itself

    def find(_: Bundle | Cascade) -> list[Job]:
        from edgemuse.runtime.batch.jobs import find_jobs, read_list

        return find_jobs([*inputs, *(read_list(listed) if listed else ())], output)

    if not inputs and listed is None:
        raise click.UsageError("Missing argument 'T1.nii.gz|FOLDER...'.")
    ctx.exit(segment_all(find, output, ctx.obj, **options))


def segment_all(
    find: Find,
    output: Path,
    debug: bool,
    *,
    model: Path | None,
    model_dir: Path | None,
    shard: tuple[int, int],
    scheduler: str | None,
    no_postprocess: bool,
    no_qc: bool,
    overwrite: bool,
    verbose: bool,
    **chosen: Any,
) -> int:
    """Segment the jobs that `find` makes for the model; returns the exit code. `chosen`: fields of `Options`."""
    show_log(verbose)
    bind_threads(chosen["threads"])
    from edgemuse.engines.hardware import map_large_arrays
    from edgemuse.runtime.batch import jobs as batch
    from edgemuse.runtime.batch.many import at_work
    from edgemuse.runtime.model.cascade import open_model
    from edgemuse.runtime.model.store import find_model
    from edgemuse.runtime.pipeline.options import Options
    from edgemuse.runtime.results.files import prepare_folder

    def found() -> tuple[list[Job], Screen]:
        jobs = batch.shard(find(opened), *shard)
        prepare_folder(output)
        if len(jobs) > 1:
            show_log(verbose, lambda: str(at_work.get() or ""))
        return jobs, Screen(len(jobs), debug)

    map_large_arrays()
    opened = open_model(find_model(model, model_dir))
    options = Options(postprocess=not no_postprocess, **chosen)
    if scheduler:
        counts, screen = _on_cluster(scheduler, opened, options, found, not no_qc, overwrite)
    else:
        counts, screen = _here(opened, options, found, not no_qc, overwrite)
    screen.summary(counts)
    if FAILURE in counts.codes:
        return FAILURE
    came_to_nothing = counts.passed_over and not (counts.segmented or counts.skipped)
    return InputError.exit_code if counts.codes or came_to_nothing else 0


def _here(
    opened: Bundle | Cascade, options: Options, found: Found, with_picture: bool, overwrite: bool
) -> tuple[Counts, Screen]:
    from edgemuse.runtime.batch.many import Batch, wanted
    from edgemuse.runtime.pipeline.open import segmenter_of

    with segmenter_of(opened, options) as segmenter:
        jobs, screen = found()
        return Batch(segmenter, wanted(opened.sha256, options), screen, with_picture, overwrite).run(jobs), screen


def _on_cluster(
    address: str, opened: Bundle | Cascade, options: Options, found: Found, with_picture: bool, overwrite: bool
) -> tuple[Counts, Screen]:
    from edgemuse.runtime.cli.extras import needs_extra

    with needs_extra("cluster", "--scheduler", "distributed"):
        from edgemuse.runtime.batch import cluster
    task = cluster.Task(opened.path, opened.sha256, options, with_picture, overwrite)
    jobs, screen = found()
    return cluster.run(address, task, jobs, screen), screen
