"""Runs a bundle in every way that this machine can and compares the results with those of `reference` in fp32."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from edgemuse.calibration.gate import Case, Measurement, failures, measure
from edgemuse.calibration.scans import Source, read_truth, structures
from edgemuse.engines.errors import BackendError, MemoryLimitError, one_line
from edgemuse.engines.hardware import cpu_name
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import choose, statuses
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.manifest import GateRow
from edgemuse.runtime.model.precision import ALWAYS_FP32, stored_precision
from edgemuse.runtime.network.profiles import PROFILES
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.pipeline.segmenter import Segmenter
from edgemuse.runtime.scan.types import Labels

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """One way to run a bundle."""

    backend: str
    version: str
    device: str
    precision: str
    profile: str

    @property
    def options(self) -> Options:
        """Options for a `Segmenter`. Engines are not cached, because most are used only this once."""
        return Options(self.profile, self.backend, self.precision, self.device, cache_dir=None)

    def __str__(self) -> str:
        return f"{self.backend} {self.device} {self.precision}, profile {self.profile}"


@dataclass(frozen=True)
class Expected:
    """What results are compared with.

    `references` are the labels that `setting`, which is `reference` in fp32, gave for each of the scans in `sources`;
    `truths` are their true labels, where they are known.
    """

    setting: Setting
    sources: tuple[Source, ...]
    references: tuple[Labels, ...]
    seconds: float
    truths: tuple[Labels | None, ...]


def settings(bundle: Bundle) -> Iterator[Setting]:
    """Every backend, device, precision and profile that can run here.

    The profile `reference`, which promises nnU-Net's labels, is always fp32 and is measured in fp32 only.
    """
    for status in statuses():
        for device, precisions in status.devices.items():
            for precision in precisions:
                if stored_precision(precision) not in bundle.manifest.graphs:
                    continue
                for profile in PROFILES:
                    if precision == "fp32" or profile != ALWAYS_FP32:
                        yield Setting(status.backend.name, status.version, device, precision, profile)


def expect(bundle: Bundle, sources: Sequence[Source], progress: Progress) -> Expected:
    """The fp32 `reference` labels and the truth of every scan; raises InputError where one cannot be used."""
    labels = bundle.manifest.labels
    truths = tuple(None if source.truth is None else read_truth(source.truth, labels) for source in sources)
    choose(EngineOptions(precision="fp32"))  # raises with every reason where there is none
    setting = next(s for s in settings(bundle) if s.precision == "fp32" and s.profile == ALWAYS_FP32)
    references, seconds = _segment(bundle, setting, sources, progress)
    return Expected(setting, tuple(sources), references, seconds, truths)


def evaluate(bundle: Bundle, setting: Setting, expected: Expected, progress: Progress) -> GateRow:
    """Run `setting` on every scan and judge it."""
    found: Measurement | None = None
    seconds: float | None = None
    reasons: tuple[str, ...]
    try:
        if setting == expected.setting:
            maps, seconds = expected.references, expected.seconds
        else:
            maps, seconds = _segment(bundle, setting, expected.sources, progress)
    except (BackendError, MemoryLimitError) as error:  # NaN among others
        reasons = (one_line(error),)
    else:
        cases = [Case(*maps) for maps in zip(expected.references, maps, expected.truths, strict=True)]
        found = measure(cases)
        reasons = failures(found, setting.precision)
    row = _row(bundle, setting, expected, found, seconds, reasons)
    agreement = "" if found is None else f"agreement {found.agreement:.4f}, "
    progress(f"{setting}: {agreement}{'failed: ' + '; '.join(reasons) if reasons else 'passed'}")
    return row


def _segment(
    bundle: Bundle, setting: Setting, sources: Sequence[Source], progress: Progress
) -> tuple[tuple[Labels, ...], float]:
    """The structures found in every scan, and the median seconds that the network took for one."""
    maps, seconds = [], []
    with quiet(), Segmenter(bundle, setting.options) as segmenter:
        for number, source in enumerate(sources, start=1):
            progress(f"{setting}: scan {number} of {len(sources)}")
            result = segmenter.segment(source.path)
            maps.append(structures(result.classes, bundle.manifest.labels))
            seconds.append(result.seconds["infer"])
    return tuple(maps), median(seconds)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the pipeline's warnings, such as that a precision is not proven: here it is being measured."""
    log = logging.getLogger("edgemuse")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _row(
    bundle: Bundle,
    setting: Setting,
    expected: Expected,
    found: Measurement | None,
    seconds: float | None,
    reasons: tuple[str, ...],
) -> GateRow:
    row = GateRow(
        backend=setting.backend,
        version=setting.version,
        device=setting.device,
        precision=setting.precision,
        profile=setting.profile,
        processor=cpu_name(),
        scans=len(expected.sources),
        failures=reasons,
    )
    if found is None:
        return row
    worst = None if found.worst is None else bundle.manifest.labels[found.worst].name
    return replace(
        row,
        seconds=seconds,
        agreement=found.agreement,
        dice=found.dice,
        reference_dice=found.reference_dice,
        drop=found.drop,
        worst=worst,
    )
