"""`edgemuse build`: a bundle's engines, compiled before they are needed, here or for a GPU elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemuse.engines.errors import BackendError, OutputError
from edgemuse.runtime.cli.models import model_dir_option

if TYPE_CHECKING:
    from edgemuse.engines.protocol import EngineOptions
    from edgemuse.runtime.model.bundle import Bundle
    from edgemuse.runtime.model.cascade import Cascade


def _capabilities(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not re.fullmatch(r"\d{1,2}\.\d", value):
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
              help="Folder for the engines.  [default: this machine's cache]")  # fmt: skip
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

    An engine is found again by the hash of its graph, the backend's version, the device and the shape of a tile. Those
    for other machines are copied into the folder that EDGEMUSE_CACHE_DIR names there; edgemuse and TensorRT-RTX must
    have the same versions there as here.

    Prints the path, what it is for, size and seconds of each engine, and of a cascade the network, mask or regions.
    One that cannot be built does not stop the others.

    \b
    Examples:
      edgemuse build                                              this machine, what 'segment' would use
      edgemuse build dlmuse --compute-capability 8.6 -o engines
      EDGEMUSE_CACHE_DIR=engines edgemuse segment T1.nii.gz -m dlmuse -o out
    """  # noqa: D301  # \b keeps click from wrapping the example
    from edgemuse.engines.protocol import EngineOptions
    from edgemuse.runtime.model.cascade import open_model
    from edgemuse.runtime.model.store import find_model
    from edgemuse.runtime.pipeline.segmenter import default_cache_dir

    if capabilities and backend not in ("auto", "tensorrt"):
        raise click.UsageError(f"{backend} does not build for GPUs; --compute-capability is for tensorrt.")
    bundles = _networks(open_model(find_model(model, model_dir)))
    folder = output or default_cache_dir()
    options = EngineOptions("tensorrt" if capabilities else backend)
    jobs = [
        (role, bundle, precision, capability)
        for role, bundle in bundles.items()
        for precision in precisions or _stored(bundle, options, bool(capabilities))
        for capability in capabilities or (None,)
    ]
    failed = 0
    for number, (role, bundle, precision, capability) in enumerate(jobs, 1):
        what = f"{role} {precision} for {capability or 'this machine'}".lstrip()
        try:
            with _progress(f"{what} ({number} of {len(jobs)})") as progress:
                line = _build(bundle, replace(options, precision=precision), folder, capability, progress)
            click.echo(f"{line}\t{role}".rstrip())
        except BackendError as error:
            if len(jobs) == 1:
                raise
            failed += 1
            click.echo(f"edgemuse: {error}", err=True)
    if failed:
        raise BackendError(f"{failed} of {len(jobs)} engines not built")


def _networks(model: Bundle | Cascade) -> dict[str, Bundle]:
    """The bundle, or those of a cascade by their role."""
    from edgemuse.runtime.model.cascade import Cascade

    return model.bundles if isinstance(model, Cascade) else {"": model}


def _stored(bundle: Bundle, options: EngineOptions, ahead: bool) -> list[str]:
    """The precisions of the bundle's graphs, without those that the backend does not offer here."""
    from edgemuse.engines.registry import choose, statuses

    stored = list(bundle.manifest.graphs)
    if ahead:
        return stored
    chosen = choose(options)[1]
    (status,) = statuses(chosen.backend)
    return [precision for precision in stored if precision in status.devices[chosen.device]]


def _build(
    bundle: Bundle,
    options: EngineOptions,
    folder: Path,
    capability: str | None,
    progress: Callable[[str, int, int], None],
) -> str:
    """Build one engine; returns the line that describes it."""
    from edgemuse.engines.registry import build_engine
    from edgemuse.runtime.model.precision import stored_precision

    start = time.perf_counter()
    graph = bundle.graph(stored_precision(options.precision))
    shape = (1, 1, *bundle.manifest.network.patch)
    try:
        path = build_engine(graph, shape, options, folder, capability, progress)
    except OSError as error:
        raise OutputError(f"engine not written: {error}; choose another folder with --output") from error
    seconds = time.perf_counter() - start
    target = capability or "this machine"
    return f"{path}\t{options.precision}\t{target}\t{path.stat().st_size / 1e6:.1f} MB\t{seconds:.1f} s"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A line for each engine on stderr; on a terminal the phases of its build too."""
    click.echo(f"building {what}", err=True)
    if not sys.stderr.isatty():
        yield lambda phase, done, total: None
        return
    try:
        yield lambda phase, done, total: click.echo(f"\r\033[K  {phase} {done}/{total}", err=True, nl=False)
    finally:
        click.echo("\r\033[K", err=True, nl=False)
