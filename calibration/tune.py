"""`edgemuse tune`: measures every way to run a bundle that passed its accuracy gate, and remembers the seconds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import click

from edgemuse.calibration.cascade import stage_inputs
from edgemuse.calibration.evaluate import Setting, quiet, settings
from edgemuse.calibration.scans import Source, find_scans
from edgemuse.engines.errors import BackendError, InputError, MemoryLimitError
from edgemuse.runtime.cli.describe import tuned_lines
from edgemuse.runtime.cli.options import model_dir_option
from edgemuse.runtime.cli.terminal import note, say
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.cascade import Cascade, open_model
from edgemuse.runtime.model.folders import default_cache_dir
from edgemuse.runtime.model.precision import may_choose
from edgemuse.runtime.model.store import find_model
from edgemuse.runtime.model.tuned import Tuned, keep, timed
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.pipeline.segmenter import Segmenter

Measure = Callable[[Bundle, Options, Path], float]
"""Segments a scan once and returns the seconds that it took."""

ROUNDS = 3
"""Rounds that are timed, after a first one that compiles."""


@click.command(short_help="Find a bundle's fastest engine on this machine.")
@click.argument("bundle", required=False, type=click.Path(path_type=Path), metavar="[BUNDLE]")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), metavar="DIR",
    help="Folder of T1 scans (.nii.gz), like those that the bundle will be used on: the first by name is segmented.",
)  # fmt: skip
@model_dir_option
def tune(bundle: Path | None, data: Path, model_dir: Path | None) -> None:
    """Measure on this machine every backend, precision and profile that passed a bundle's accuracy gate.

    Without BUNDLE the built-in model is measured. The first scan of DIR is segmented four times in each way, in turn;
    the first round compiles and is not counted. fp32 needs no gate. The medians are kept beside the compiled engines,
    for this bundle and this machine. Both networks of a cascade are measured, each on its own input.

    From then on 'segment' takes the fastest where it may choose: where --backend, --device or --precision is auto.
    'edgemuse info' shows the figures. They are not used after an update of edgemuse, of a backend or its driver, or on
    another processor: measure again then, when nothing else runs.

    \b
    Example:
      edgemuse tune dlmuse.bundle --data scans
      edgemuse segment T1.nii.gz -o out --model dlmuse.bundle --profile fast
    """  # noqa: D301  # \b keeps click from wrapping the example
    opened = open_model(find_model(bundle, model_dir))
    scans = find_scans(data)
    if not scans:
        raise InputError(f"{data}: no scans there; put a T1 (.nii.gz) into it that is like those to be segmented")
    progress = note
    with tempfile.TemporaryDirectory(prefix="edgemuse-") as folder:
        for role, network, scan in _networks(opened, scans[0], Path(folder), progress):
            tuned = measure_all(network, scan, lambda line, role=role: progress(role + line), seconds_of)  # type: ignore[misc]
            keep(default_cache_dir(), network.sha256, tuned)
            say(*(role + line for line in tuned_lines(tuned)))


def _networks(
    model: Bundle | Cascade, scan: Source, folder: Path, progress: Callable[[str], None]
) -> Iterator[tuple[str, Bundle, Path]]:
    """The bundle and its scan, after the text that its lines begin with; for a cascade those of both stages."""
    if isinstance(model, Bundle):
        yield "", model, scan.path
        return
    inputs = stage_inputs(model, [scan], folder, progress)
    for role, bundle in model.bundles.items():
        yield f"{role}: ", bundle, inputs[role][0].path


def measure_all(bundle: Bundle, scan: Path, progress: Callable[[str], None], measure: Measure) -> Tuned:
    """Time all candidates in turn; raises BackendError if none of them works."""
    candidates = _candidates(bundle)
    seconds: dict[Setting, list[float]] = {setting: [] for setting in candidates}
    for number in range(1 + ROUNDS):
        for setting in list(seconds):
            progress(f"{setting}: {f'round {number} of {ROUNDS}' if number else 'first run, which compiles'}")
            options = replace(setting.options, cache_dir=default_cache_dir())
            try:
                taken = measure(bundle, options, scan)
            except (BackendError, MemoryLimitError) as error:
                progress(f"{setting}: left out: {error}")
                del seconds[setting]
                continue
            if number:
                seconds[setting].append(taken)
    if not seconds:
        raise BackendError(f"{bundle.path}: nothing could be measured; 'edgemuse devices' shows what works here")
    timings = [timed(s.options.engine, s.profile, median(taken)) for s, taken in seconds.items()]
    return Tuned(bundle.manifest.name, scan.name, tuple(sorted(timings, key=lambda timing: timing.seconds)))


def _candidates(bundle: Bundle) -> list[Setting]:
    """What `auto` may choose."""
    return [s for s in settings(bundle) if may_choose(bundle, s.profile, s.options.engine)]


def seconds_of(bundle: Bundle, options: Options, scan: Path) -> float:
    """Segment `scan` once, the engine opened for it."""
    start = time.perf_counter()
    with quiet(), Segmenter(bundle, options) as segmenter:
        segmenter.segment(scan)
    return time.perf_counter() - start
