"""`edgemuse bids`: a BIDS App."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemuse.runtime.cli.options import engine_options
from edgemuse.runtime.cli.segment import segment_all
from edgemuse.runtime.cli.terminal import say_paths

if TYPE_CHECKING:
    from edgemuse.runtime.batch.jobs import Job
    from edgemuse.runtime.model.bundle import Bundle
    from edgemuse.runtime.model.cascade import Cascade


class BidsApp(click.Command):
    """Options of labels take several words, as BIDS Apps do: `--participant-label 01 02`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give every label an option of its own, which is how click reads them."""
        spread, option = list[str](), ""
        for word in args:
            if word.startswith("-"):
                name = word.replace("_", "-")
                option = name if name in ("--participant-label", "--session-label") else ""
                spread.append(option or word)
            else:
                spread += [option, word] if option and spread[-1] != option else [word]
        return super().parse_args(ctx, spread)


@click.command(cls=BidsApp)
@click.argument("dataset", metavar="BIDS_DIR", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUTPUT_DIR", type=click.Path(path_type=Path))
@click.argument("level", metavar="participant|group", type=click.Choice(["participant", "group"]))
@click.option("--participant-label", "participants", multiple=True, metavar="LABEL...",
              help="Only these participants; with or without sub-.  [default: all]")  # fmt: skip
@click.option("--session-label", "sessions", multiple=True, metavar="LABEL...",
              help="Only these sessions; with or without ses-.  [default: all]")  # fmt: skip
@engine_options
@click.pass_context
def bids(
    ctx: click.Context,
    /,
    dataset: Path,
    output: Path,
    level: str,
    participants: tuple[str, ...],
    sessions: tuple[str, ...],
    **options: Any,
) -> None:
    """Segment the T1w images of a BIDS dataset, as a BIDS App does.

    participant: every sub-*/[ses-*/]anat/*_T1w.nii[.gz] of BIDS_DIR gives, in the same place of OUTPUT_DIR,

    \b
      sub-01_seg-MODEL_dseg.nii.gz   labels on the image's own grid
      sub-01_seg-MODEL_dseg.tsv      what the labels mean
      sub-01_seg-MODEL_dseg.json     how they were made
      sub-01_seg-MODEL_volumes.tsv   voxels and mm3 of every structure
      sub-01/figures/sub-01_seg-MODEL_qc.png

    where MODEL is the model's name, and with DLMUSE its table of volumes. OUTPUT_DIR becomes a BIDS derivative dataset.
    What is done already is skipped, and several processes may work at once, as with 'segment'.

    group: the tables of volumes in OUTPUT_DIR are merged into one, group_seg-MODEL_volumes.tsv. One of that name that
    was made or changed by hand is replaced with --overwrite alone.

    \b
    Example:
      edgemuse bids data data/derivatives/edgemuse participant --participant-label 01 02
      edgemuse bids data data/derivatives/edgemuse group
    """  # noqa: D301 click reads the backspace itself
    if level == "group":
        from edgemuse.runtime.batch.bids import merge_tables

        if options["scheduler"] or options["shard"] != (1, 1):
            raise click.UsageError("--scheduler and --shard are for participant; group is one short step.")
        say_paths(merge_tables(output, participants, sessions, options["overwrite"]))
        return

    def find(opened: Bundle | Cascade) -> list[Job]:
        from edgemuse.runtime.batch.bids import find_jobs, start_dataset

        jobs = find_jobs(dataset, output, opened.name, participants, sessions)
        start_dataset(dataset, output)
        return jobs

    ctx.exit(segment_all(find, output, ctx.obj, **options))
