"""The steps of `edgemuse calibrate`: a bundle or cascade gets int8 and fp16 graphs, and the accuracy of each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgemuse.calibration.cascade import stage_inputs
from edgemuse.calibration.evaluate import Expected, Setting, evaluate, expect, settings
from edgemuse.calibration.half import half_precision
from edgemuse.calibration.quantise import Quantised, quantise, sensitivity
from edgemuse.calibration.scans import Source, calibration_patches, find_scans, split
from edgemuse.calibration.selftest import selftest_file
from edgemuse.engines.errors import VerificationError
from edgemuse.engines.protocol import Batch
from edgemuse.export.writer import (
    check_output,
    check_replaceable,
    replace_bundle,
    replace_cascade,
    write_bundle,
    write_cascade,
)
from edgemuse.runtime.model.bundle import Bundle, file_entry, open_bundle
from edgemuse.runtime.model.cascade import Cascade, CascadeManifest, open_model
from edgemuse.runtime.model.manifest import GateRow, Manifest
from edgemuse.runtime.model.precision import ALWAYS_FP32
from edgemuse.runtime.model.selftest import SELFTEST

FILES = {"int8": "backbone.int8.onnx", "fp16": "backbone.fp16.onnx"}
ATTEMPTS = 3
"""How often, at most, layers are left out of int8."""
LAYERS_PER_ATTEMPT = 1 / 8
SENSITIVITY_PATCHES = 2
RECORDED_PACKAGES = ("edgemuse", "nncf", "onnx")

Progress = Callable[[str], None]
Files = dict[str, bytes]


@dataclass(frozen=True)
class Work:
    """What all steps share: the bundle as it was, the files that the new one keeps, and the folder for drafts."""

    bundle: Bundle
    folder: Path
    files: Mapping[str, bytes]
    progress: Progress

    def draft(self, graphs: Mapping[str, bytes], **changes: Any) -> tuple[Manifest, Files]:
        """Manifest and files of the bundle with `graphs` added."""
        manifest = self.bundle.manifest
        files = {**self.files, **{FILES[precision]: data for precision, data in graphs.items()}}
        names = {"fp32": manifest.graphs["fp32"], **{precision: FILES[precision] for precision in graphs}}
        entries = {name: file_entry(data) for name, data in files.items()}
        return replace(manifest, graphs=names, files=entries, **changes), files

    def trial(self, graphs: Mapping[str, bytes]) -> Bundle:
        """A bundle with `graphs`, to be tried out."""
        path = Path(tempfile.mkdtemp(dir=self.folder)) / "bundle"
        return open_bundle(write_bundle(path, *self.draft(graphs, gate=())))


@dataclass(frozen=True)
class Int8:
    """The int8 graph. Of its `layers` convolutions `excluded` are fp32, because their `errors` were largest."""

    graph: bytes
    layers: int
    excluded: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)


def calibrate(source: Path, data: Path, output: Path, progress: Progress) -> Path:
    """Add int8 and fp16 graphs to the bundle at `source`, gate all that this machine can run, and write to `output`.

    Each stage of a cascade is calibrated and gated by itself. The mask network is calibrated on the scans and judged by
    its agreement with its own fp32 alone, because the truth does not name its classes. The region network is calibrated
    and judged on what the mask network, in fp32, finds in the scans.

    Args:
        source: the bundle or cascade; any lower precision that it has already is made anew.
        data: folder of scans, with truth as `STEM_dseg.nii.gz` beside a scan where it is known.
        output: may be `source`, which is then replaced when all is done.
        progress: called with a line of text at every step.

    Returns:
        `output`.

    Raises:
        BundleError: the bundle is damaged.
        InputError: there are too few scans, or one cannot be used; for a cascade, one holds no brain.
        OutputError: `output` exists and is not `source`, or cannot be written.
        MemoryLimitError: a scan does not fit in memory.
    """
    in_place = output.exists() and output.resolve() == source.resolve()
    model = open_model(source)
    if in_place:
        check_replaceable(model)
    else:
        check_output(output)
    chosen, held_out = split(find_scans(data), data)
    progress(f"calibrating on {_names(chosen)}; evaluating on {_names(held_out)}")
    with tempfile.TemporaryDirectory(prefix="edgemuse-") as folder:
        if isinstance(model, Cascade):
            joined, stages = _calibrated_stages(model, chosen, held_out, Path(folder), progress)
            progress(f"writing {output}")
            return replace_cascade(model, joined, *stages) if in_place else write_cascade(output, joined, *stages)
        if model.manifest.network.orientation is None:
            progress("the bundle names no orientation: the scans must be stored as the training data were")
        manifest, files = _calibrated(Work(model, Path(folder), _kept(model), progress), chosen, held_out)
        progress(f"writing {output}")
        return replace_bundle(model, manifest, files) if in_place else write_bundle(output, manifest, files)


def _kept(bundle: Bundle) -> Files:
    """The files that stay as they are, each of them checked."""
    return {name: bundle.read(name) for name in bundle.manifest.files if name not in FILES.values()}


def _calibrated_stages(
    cascade: Cascade, chosen: Sequence[Source], held_out: Sequence[Source], folder: Path, progress: Progress
) -> tuple[CascadeManifest, list[Bundle]]:
    """Calibrate `mask`, then `regions`; return the manifest that joins them and both bundles, written into `folder`."""
    kept = {role: _kept(bundle) for role, bundle in cascade.bundles.items()}
    inputs = stage_inputs(cascade, [*chosen, *held_out], folder, progress)
    stages: dict[str, Bundle] = {}
    for role, bundle in cascade.bundles.items():
        sources = inputs[role]
        with tempfile.TemporaryDirectory(dir=folder) as drafts:
            work = Work(bundle, Path(drafts), kept[role], partial(_say, progress, role))
            manifest, files = _calibrated(work, sources[: len(chosen)], sources[len(chosen) :])
        stages[role] = open_bundle(write_bundle(folder / f"{role}.bundle", manifest, files))
    hashes = {role: stage.sha256 for role, stage in stages.items()}
    return replace(cascade.manifest, stages=hashes), list(stages.values())


def _say(progress: Progress, role: str, line: str) -> None:
    progress(f"{role}: {line}")


def _calibrated(work: Work, chosen: Sequence[Source], held_out: Sequence[Source]) -> tuple[Manifest, Files]:
    bundle, progress = work.bundle, work.progress
    patches = calibration_patches(chosen, bundle.manifest.network)
    expected = expect(bundle, held_out, progress)
    int8, known = _int8(work, patches, expected)
    graphs = {"int8": int8.graph} | _fp16(work)
    trial = work.trial(graphs)
    rows = [known.get(setting) or evaluate(trial, setting, expected, progress) for setting in settings(trial)]
    work = replace(work, files={**work.files, SELFTEST: selftest_file(bundle, int8.graph)})
    return work.draft(graphs, gate=tuple(rows), calibration=_record(int8, len(patches), chosen, held_out))


def _fp16(work: Work) -> dict[str, bytes]:
    try:
        return {"fp16": half_precision(work.bundle.graph("fp32"))}
    except VerificationError as error:
        work.progress(f"no fp16 graph: {error}")
        return {}


def _int8(work: Work, patches: Sequence[Batch], expected: Expected) -> tuple[Int8, dict[Setting, GateRow]]:
    """Quantise every convolution. If that does not pass, leave out those that cost most, a few more at each attempt.

    Returns the graph and what was measured of it so far.
    """
    work.progress(f"quantising to int8 with {len(patches)} patches")
    quantised = quantise(work.bundle.graph("fp32"), patches)
    int8 = Int8(quantised.graph(), len(quantised.layers))
    known: dict[Setting, GateRow] = {}
    for attempt in range(1, ATTEMPTS + 2):
        trial = work.trial({"int8": int8.graph})
        setting = _int8_setting(trial)
        if setting is None:
            break
        known[setting] = evaluate(trial, setting, expected, work.progress)
        if attempt > ATTEMPTS or known[setting].passed:
            break
        int8 = _without_worst(quantised, int8, patches, setting, attempt, work.progress)
    return int8, known


def _int8_setting(bundle: Bundle) -> Setting | None:
    """int8 on the preferred backend, in the first profile that may use it; None where no backend offers it."""
    found = (setting for setting in settings(bundle) if setting.precision == "int8")
    return next(found, None)


def _without_worst(
    quantised: Quantised, int8: Int8, patches: Sequence[Batch], setting: Setting, attempt: int, progress: Progress
) -> Int8:
    few = patches[:: max(len(patches) // SENSITIVITY_PATCHES, 1)][:SENSITIVITY_PATCHES]
    errors = int8.errors or sensitivity(quantised, few, setting.options.engine, progress)
    count = attempt * max(round(int8.layers * LAYERS_PER_ATTEMPT), 1)
    excluded = tuple(errors)[:count]
    progress(f"int8 did not pass: leaving {', '.join(excluded)} in fp32")
    return Int8(quantised.graph(excluded), int8.layers, excluded, errors)


def _record(int8: Int8, patches: int, chosen: Sequence[Source], held_out: Sequence[Source]) -> dict[str, Any]:
    return {
        "calibrated_on": [source.record() for source in chosen],
        "patches": patches,
        "evaluated_on": [source.record() for source in held_out],
        "reference": f"profile {ALWAYS_FP32}, fp32",
        "int8": {
            "convolutions": int8.layers,
            "left_in_fp32": {name: f"error alone {int8.errors[name]:.2g}" for name in int8.excluded} or "none",
        },
        "versions": {package: version(package) for package in RECORDED_PACKAGES},
    }


def _names(sources: Sequence[Source]) -> str:
    return ", ".join(source.path.name + " (with truth)" * (source.truth is not None) for source in sources)
