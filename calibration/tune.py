"""`edgemuse tune`: measure every way to run a bundle that passed its accuracy gate, and remember how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import click

from edgemuse.calibration.evaluate import Setting, quiet, settings
from edgemuse.calibration.scans import find_scans
from edgemuse.engines.errors import BackendError, InputError
from edgemuse.runtime.bundle import Bundle, open_bundle
from edgemuse.runtime.describe import tuned_lines
from edgemuse.runtime.outputs import write_files
from edgemuse.runtime.pipeline import Options, Segmenter, default_cache_dir
from edgemuse.runtime.precision import may_choose
from edgemuse.runtime.store import find_model
from edgemuse.runtime.tuned import Timing, Tuned, tuned_path

Measure = Callable[[Bundle, Options, Path], float]
"""Segments a scan once and returns the seconds that it took."""

ROUNDS = 3
"""That are timed, after one that compiles."""


@click.command(short_help="Find a bundle's fastest engine on this machine.")
@click.argument("bundle", required=False, type=click.Path(path_type=Path), metavar="[BUNDLE]")
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), metavar="DIR",
    help="Folder of T1 scans (.nii.gz), like those that the bundle will be used on: the first by name is segmented.",
)  # fmt: skip
def tune(bundle: Path | None, data: Path) -> None:
    """Measure here every backend, precision and profile that passed a bundle's accuracy gate.

    Without BUNDLE: the built-in model. The first scan of DIR is segmented four times in each way, in turn; the
    first round compiles and is not counted. fp32 needs no gate. Medians are kept beside the compiled engines, for
    this bundle and this machine. From then on 'segment' takes the fastest where it may choose: where --backend,
    --device or --precision is auto. 'edgemuse info' shows the figures; measure again after an update of edgemuse or
    a change of the machine, when nothing else runs.

    \b
    Example:
      edgemuse tune dlmuse.bundle --data scans
      edgemuse segment T1.nii.gz -o out --model dlmuse.bundle --profile fast
    """  # noqa: D301  # \b keeps click from wrapping the example
    opened = open_bundle(find_model(bundle))
    scans = find_scans(data)
    if not scans:
        raise InputError(f"{data}: no scans there; put a T1 (.nii.gz) into it that is like those to be segmented")
    tuned = measure_all(opened, scans[0].path, partial(click.echo, err=True), seconds_of)
    folder = default_cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    write_files({tuned_path(folder, opened.sha256): tuned.to_json().encode()})
    click.echo("\n".join(tuned_lines(tuned)))


def measure_all(bundle: Bundle, scan: Path, progress: Callable[[str], None], measure: Measure) -> Tuned:
    """Time all candidates in turn; raises BackendError if none of them works."""
    candidates = _candidates(bundle)
    seconds: dict[Setting, list[float]] = {setting: [] for setting in candidates}
    for number in range(1 + ROUNDS):
        for setting in list(seconds):
            progress(f"{setting}: {f'round {number} of {ROUNDS}' if number else 'first run, which compiles'}")
            options = replace(setting.options.engine, cache_dir=default_cache_dir())
            try:
                taken = measure(bundle, Options(setting.profiles[0], options), scan)
            except BackendError as error:
                progress(f"{setting}: left out: {error}")
                del seconds[setting]
                continue
            if number:
                seconds[setting].append(taken)
    if not seconds:
        raise BackendError(f"{bundle.path}: nothing could be measured; 'edgemuse devices' shows what works here")
    timings = [timing for setting, all_rounds in seconds.items() for timing in _timings(bundle, setting, all_rounds)]
    return Tuned(bundle.manifest.name, scan.name, tuple(sorted(timings, key=lambda timing: timing.seconds)))


def _candidates(bundle: Bundle) -> list[Setting]:
    return [setting for setting in settings(bundle) if _allowed(bundle, setting)]


def _allowed(bundle: Bundle, setting: Setting) -> Sequence[str]:
    """The profiles of `setting` for which `auto` may choose it."""
    return [profile for profile in setting.profiles if may_choose(bundle, profile, setting.options.engine)]


def _timings(bundle: Bundle, setting: Setting, seconds: Sequence[float]) -> list[Timing]:
    return [
        Timing(setting.backend, setting.device, setting.precision, profile, median(seconds))
        for profile in _allowed(bundle, setting)
    ]


def seconds_of(bundle: Bundle, options: Options, scan: Path) -> float:
    """Segment `scan` once, the engine opened for it."""
    start = time.perf_counter()
    with quiet(), Segmenter(bundle, options) as segmenter:
        segmenter.segment(scan)
    return time.perf_counter() - start
