"""`edgemuse demo`: a first run on the sample scan."""

from __future__ import annotations

from pathlib import Path

import click

from edgemuse.runtime.cli.options import bind_threads, threads_option
from edgemuse.runtime.cli.terminal import note, progress, say_paths


@click.command(short_help="Segment a sample scan that comes with edgemuse.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("edgemuse-demo"), show_default=True,
              help="Folder for the results; those of an earlier demo are replaced.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace files that have the names of results, whoever made them.")
@threads_option
def demo(output: Path, overwrite: bool, threads: int | None) -> None:
    """Segment a sample scan that comes with edgemuse, and compare the result with the truth.

    The scan is synthetic, so its true labels are known. Prints the Dice, the volumes and the seconds, and writes the
    same files as 'segment', the picture among them.
    """
    bind_threads(threads)
    from edgemuse.runtime.cli.sample import run

    with progress("sample") as advance:
        report, paths = run(output, threads, advance, overwrite)
    note(*report.split("\n"))
    say_paths(paths)
