"""`edgemuse build`: a bundle's engines, compiled before they are needed, here or for a GPU elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemuse.engines.errors import BackendError, one_line
from edgemuse.runtime.cli.options import model_dir_option
from edgemuse.runtime.cli.terminal import note, say, status, watched

if TYPE_CHECKING:
    from edgemuse.runtime.pipeline.compile import Build


def _capabilities(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not re.fullmatch(r"[0-9]{1,2}\.[0-9]", value):
            raise click.BadParameter(f"{value!r} is not a compute capability such as 8.6")
    return tuple(dict.fromkeys(values))


@click.command(short_help="Compile a bundle's engines ahead of time.")
@click.argument("model", required=False, type=click.Path(path_type=Path), metavar="[BUNDLE]")
@click.option("--backend", type=click.Choice(["auto", "tensorrt", "openvino", "onnxruntime"]), default="auto",
              show_default=True, help="auto: what 'segment' would use here.")  # fmt: skip
@click.option("--precision", "precisions", multiple=True, type=click.Choice(["fp32", "bf16", "fp16", "int8"]),
              help="Of the engine; give it again for more.  [default: all that the bundle stores]")  # fmt: skip
@click.option("--compute-capability", "capabilities", multiple=True, callback=_capabilities, metavar="8.6",
              help="Build with TensorRT-RTX for GPUs of this compute capability; none needs to be here. Give it again "
              "for more.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Folder for the engines, which go into a sub-folder.  [default: this machine's cache]")  # fmt: skip
@model_dir_option
def build(
    model: Path | None,
    model_dir: Path | None,
    backend: str,
    precisions: tuple[str, ...],
    capabilities: tuple[str, ...],
    output: Path | None,
) -> None:
    """Compile a bundle's engines, so that the first scan does not wait for it. Without BUNDLE: the built-in model.

    They are for the profiles reference and balanced; the tiles of fast depend on the scan.

    BUNDLE may be a name that 'models list' shows, and a cascade such as DLMUSE, of which both networks are built.

    An engine is found again by the hash of its graph, the backend's version, the device and the shape of a tile. For
    another machine, copy DIR there with all that is in it and name it in EDGEMUSE_CACHE_DIR; it must belong to the user
    there and nobody else may write to it. edgemuse and TensorRT-RTX must have the same versions there as here.

    Prints the path, what it is for, size and seconds of each engine, and of a cascade the network, mask or regions.
    One that cannot be built does not stop the others.

    \b
    Examples:
      edgemuse build                                              this machine, what 'segment' would use
      edgemuse build dlmuse --compute-capability 8.6 -o engines
      EDGEMUSE_CACHE_DIR=engines edgemuse segment T1.nii.gz -m dlmuse -o out
    """  # noqa: D301  # \b keeps click from wrapping the example
    from edgemuse.runtime.model.cascade import open_model
    from edgemuse.runtime.model.folders import default_cache_dir
    from edgemuse.runtime.model.store import find_model
    from edgemuse.runtime.pipeline.compile import builds

    if capabilities and backend not in ("auto", "tensorrt"):
        raise click.UsageError(f"{backend} does not build for GPUs; --compute-capability is for tensorrt.")
    wanted = list(builds(open_model(find_model(model, model_dir)), backend, precisions, capabilities))
    folder = output or default_cache_dir()
    failed = 0
    for number, each in enumerate(wanted, 1):
        try:
            with _progress(f"{each} ({number} of {len(wanted)})") as progress:
                say(_built(each, folder, progress))
        except BackendError as error:
            if len(wanted) == 1:
                raise
            failed += 1
            note(f"edgemuse: {one_line(error)}")
    if failed:
        raise BackendError(f"{failed} of {len(wanted)} engines not built")


def _built(build: Build, folder: Path, progress: Callable[[str, int, int], None]) -> str:
    """Compile one engine; returns the line that describes it."""
    start = time.perf_counter()
    path = build.run(folder, progress)
    size, seconds = path.stat().st_size / 1e6, time.perf_counter() - start
    cells = (str(path), build.options.precision, build.target, f"{size:.1f} MB", f"{seconds:.1f} s", build.role)
    return "\t".join(cells).rstrip()


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A line for each engine on stderr; on a terminal the phases of its build too."""
    note(f"building {what}")
    if not watched():
        yield lambda phase, done, total: None
        return
    try:
        yield lambda phase, done, total: status(f"  {phase} {done}/{total}")
    finally:
        status("")
