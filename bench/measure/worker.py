"""The process that is measured: `python -m edgemuse.bench.measure.worker JOB RESULT` runs one system on some scans.

JOB is the JSON of a `Job`. RESULT is a file that receives the seconds of every stage. The clock of the stage `import`
starts when the parent starts the process, so nothing is imported unseen.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from edgemuse.runtime.pipeline.cascade import CascadeSegmenter
    from edgemuse.runtime.pipeline.segmenter import Segmenter

STAGES = (
    "import", "open", "load", "preprocess", "engine", "infer", "merge", "head", "restore", "quality", "write", "rest",
)  # fmt: skip
"""Stages in their order. `engine` compiles or loads from the cache; `rest` is the end of the process."""
PIPELINE = {"infer": "merge", "crop": "preprocess", "paste": "restore"}
"""What the pipeline calls a stage, if it has another name. Its `infer` holds the network and the head too."""
Segment = Callable[[Path], dict[str, Any]]
"""A function that segments one scan into the job's output and returns what is known of the engine."""


@dataclass(frozen=True)
class Job:
    """What the process is to run.

    `system` is a name as in `bench/measure/systems.py`; `reference` the nnU-Net model folder, its folds and the
    checkpoint's name, and `graph` the network with logits out, for the systems that need them; `started` the parent's
    `perf_counter` as it starts the process: the clock is the system's, not the process's.
    """

    system: str
    bundle: str
    reference: tuple[str, Sequence[str], str] | None
    graph: str
    scans: list[str]
    output: str
    threads: int | None
    started: float


class Stages:
    """Seconds of each stage, added up over scans, and of each scan."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.scans: list[float] = []

    def add(self, name: str, seconds: float) -> None:
        """Add to the stage `name`."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` so that the time during which any thread is in it counts for the stage `name`."""
        lock, inside, since = Lock(), 0, 0.0

        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside, since
            with lock:
                since = time.perf_counter() if inside == 0 else since
                inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                with lock:
                    inside -= 1
                    if inside == 0:
                        self.add(name, time.perf_counter() - since)

        return called

    def each(self, scans: list[str]) -> Iterator[Path]:
        """Yield the scans one by one and time what is done with each."""
        for scan in scans:
            start = time.perf_counter()
            yield Path(scan)
            self.scans.append(time.perf_counter() - start)


@contextlib.contextmanager
def edgemuse(job: Job, stages: Stages) -> Iterator[Segment]:
    """Do what `edgemuse segment --no-postprocess --no-qc` does: labels as nnU-Net gives them, and no picture."""
    _, backend, precision, profile = job.system.split("/")
    with _imports(job, stages):
        from edgemuse.engines.hardware import map_large_arrays
        from edgemuse.engines.registry import open_engine
        from edgemuse.runtime.pipeline import segmenter as pipeline
        from edgemuse.runtime.pipeline.open import open_segmenter
        from edgemuse.runtime.pipeline.options import Options

    def open_timed(*args: Any) -> Any:
        engine = open_engine(*args)
        engine.infer = stages.timed("infer", engine.infer)  # type: ignore[method-assign]
        return engine

    map_large_arrays()
    with stages.stage("open"):
        options = Options(profile, backend, precision, threads=job.threads, postprocess=False)
        segmenter = open_segmenter(Path(job.bundle), options)
    with mock.patch.object(pipeline, "open_engine", open_timed), _pipeline(job, stages, segmenter) as segment:
        yield segment


@contextlib.contextmanager
def plain(job: Job, stages: Stages) -> Iterator[Segment]:
    """Run the graph with logits out in the backend's session as it comes, with edgemuse's steps around it."""
    _, backend = job.system.split("/")
    with _imports(job, stages):
        from edgemuse.bench.measure.plain import PlainSegmenter, open_plain
        from edgemuse.runtime.model.bundle import open_bundle
    with stages.stage("open"):
        bundle = open_bundle(Path(job.bundle))
        graph = Path(job.graph).read_bytes()
    with stages.stage("engine"):
        engine = open_plain(backend, graph, bundle.manifest.network.patch, job.threads)
        engine.infer = stages.timed("infer", engine.infer)  # type: ignore[method-assign]
    with _pipeline(job, stages, PlainSegmenter(bundle, engine, job.threads)) as segment:
        yield segment


@contextlib.contextmanager
def _pipeline(job: Job, stages: Stages, segmenter: Segmenter | CascadeSegmenter) -> Iterator[Segment]:
    from edgemuse.runtime.network import head
    from edgemuse.runtime.pipeline.write import write
    from edgemuse.runtime.results.files import output_paths
    from edgemuse.runtime.scan.nifti import scan_stem

    def segment(scan: Path) -> dict[str, Any]:
        result = segmenter.segment(scan)
        for name, seconds in result.seconds.items():
            step = name.rpartition(" ")[2]  # of a cascade: "mask infer", "regions infer"
            stages.add(PIPELINE.get(step, step), seconds)
        with stages.stage("write"):
            write(result, output_paths(Path(job.output), scan_stem(scan)), with_picture=False)
        record = result.provenance
        return {"engine": _of_stages(record, "backend"), "profile": _of_stages(record, "profile")}

    with segmenter, mock.patch.object(head, "classify", stages.timed("head", head.classify)):
        yield segment


def _of_stages(provenance: dict[str, Any], key: str) -> dict[str, Any]:
    """Return what the provenance says of the network, or of each network of a cascade."""
    if "stages" not in provenance:
        return dict(provenance[key])
    return {role: record[key] for role, record in provenance["stages"].items()}


@contextlib.contextmanager
def nnunet(job: Job, stages: Stages) -> Iterator[Segment]:
    """Run nnU-Net's own predictor; its labels are class numbers on the grid of the scan that it was given."""
    _, variant, *rest = job.system.split("/")
    with _imports(job, stages):
        import multiprocessing

        import torch

        from edgemuse.bench.measure.reference import Reference
        from edgemuse.runtime.scan.nifti import scan_stem
    torch.set_num_threads(job.threads or multiprocessing.cpu_count())  # nnU-Net's own choice on a CPU
    with stages.stage("open"):
        assert job.reference is not None
        folder, folds, name = job.reference
        numbers = tuple(int(fold) if fold.isdigit() else fold for fold in folds)
        reference = Reference(Path(folder), rest == ["mirrored"], numbers, name)
        reference.run_as(variant, stages.timed)

    def segment(scan: Path) -> dict[str, Any]:
        reference.segment(scan, Path(job.output) / f"{scan_stem(scan)}_dseg.nii.gz", stages.stage)
        return {"engine": {"name": "pytorch", "version": torch.__version__, "threads": torch.get_num_threads()}}

    yield segment


@contextlib.contextmanager
def _imports(job: Job, stages: Stages) -> Iterator[None]:
    yield
    stages.add("import", time.perf_counter() - job.started)


FAMILIES = {"edgemuse": edgemuse, "plain": plain, "nnunet": nnunet}


def family(job: Job) -> Callable[[Job, Stages], contextlib.AbstractContextManager[Segment]]:
    """Return what makes the job's system ready."""
    return FAMILIES[job.system.split("/")[0]]


def main() -> None:
    """Run the job of the command line."""
    job = Job(**json.loads(sys.argv[1]))
    stages = Stages()
    facts: dict[str, Any] = {}
    with family(job)(job, stages) as segment:
        for scan in stages.each(job.scans):
            facts = segment(scan)
    # what is called merge so far holds the network, and the head where it stands apart
    stages.add("merge", -stages.seconds["infer"] - stages.seconds.get("head", 0.0))
    content = facts | {"stages": stages.seconds, "scan_seconds": stages.scans}
    Path(sys.argv[2]).write_text(json.dumps(content))


if __name__ == "__main__":
    main()
