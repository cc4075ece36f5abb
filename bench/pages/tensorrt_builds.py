"""TensorRT-RTX engines, built without a GPU.

DLMUSE's network (its plans, random weights) and the built-in model, in fp32, fp16 and int8, for several compute
capabilities: whether they build, and their size, seconds and memory. Each build is a process of its own. The page also
lists what edgemuse says where something does not fit. The scales of the int8 graphs are not calibrated.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgemuse.bench.measure.rows import state
from edgemuse.bench.measure.uncalibrated import to_int8
from edgemuse.bench.pages.page import joined, named
from edgemuse.bench.pages.program import Workplace, page_options, say
from edgemuse.bench.report.render import table
from edgemuse.calibration.half import half_precision
from edgemuse.engines.errors import BackendError
from edgemuse.engines.hardware import peak_memory
from edgemuse.engines.protocol import EngineOptions, TileShape
from edgemuse.engines.registry import build_engine, choose
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.scan.types import Shape

CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0")
GRAPHS: dict[str, Callable[[bytes], bytes]] = {
    "fp32": bytes,
    "fp16": half_precision,
    "int8": to_int8,
    "int8, else fp16": lambda graph: to_int8(half_precision(graph)),
}
OLDEST = CAPABILITIES[0]
"""Turing, for which TensorRT-RTX has no convolutions in fp32."""
MEMORY_LIMIT = 4e9
CHILD = """
import json, sys
from pathlib import Path
from edgemuse.bench.pages.tensorrt_builds import build_one
graph, shape, precision, capability, folder = sys.argv[1:]
print(json.dumps(build_one(Path(graph).read_bytes(), tuple(json.loads(shape)), precision, capability, Path(folder))))
"""
INTRODUCTION = """# TensorRT engines, built without a GPU

Parsed and built by the real TensorRT-RTX, for several compute capabilities, but not run: nothing here was measured on a
GPU. [GPUs](../guide/gpus.md) says how to install and use TensorRT.

## Engines

The fp16 graphs are those that `edgemuse calibrate` makes. The int8 graphs quantise the same operations as its do, with
scales that were not calibrated: good for this table and nothing else. Each build is a process of its own.
"""
HEADER = ("network", "precision", "compute capability", "result", "size", "seconds", "peak memory")


@dataclass(frozen=True)
class Network:
    """A graph in fp32, the patch it runs on, and the hash of its bundle or, without one, of the graph."""

    name: str
    graph: bytes
    patch: Shape
    sha256: str

    @property
    def shape(self) -> TileShape:
        """The shape of one tile, with batch and channel."""
        return (1, 1, *self.patch)


def built_in() -> Network:
    """Return the built-in model's network."""
    bundle = open_bundle(BUILT_IN)
    return Network("built-in model", bundle.graph("fp32"), bundle.manifest.network.patch, bundle.sha256)


def dlmuse(shared: Path, work: Path) -> Network:
    """Export DLMUSE's network with random weights; the export is not verified."""
    from edgemuse.bench.measure.models import random_dlmuse
    from edgemuse.export.architecture import backbone, load_network
    from edgemuse.export.checkpoint import read_checkpoints
    from edgemuse.export.graph import export_graph
    from edgemuse.export.plans import read_plan

    folder = random_dlmuse(shared, work / "model")
    (checkpoint,) = read_checkpoints(folder, ("0",), "checkpoint_final.pth")
    plan = read_plan(folder, checkpoint.configuration)
    graph = export_graph(backbone([load_network(plan.architecture, checkpoint)]), plan.patch)
    return Network("DLMUSE", graph, plan.patch, hashlib.sha256(graph).hexdigest())


def build_one(graph: bytes, shape: TileShape, precision: str, capability: str, folder: Path) -> dict[str, Any]:
    """Build one engine in this process; returns its bytes, seconds and peak memory, or its error."""
    start = time.perf_counter()
    try:
        path = build_engine(graph, shape, EngineOptions(precision=precision), folder, capability)
    except BackendError as error:
        return {"error": str(error)}
    seconds = time.perf_counter() - start
    return {"path": str(path), "bytes": path.stat().st_size, "seconds": seconds, "peak": peak_memory()}


def build_apart(graph: Path, shape: TileShape, precision: str, capability: str, folder: Path) -> dict[str, Any]:
    """Run `build_one` in a process of its own, so that no build profits from an earlier one."""
    arguments = [str(graph), json.dumps(shape), precision, capability, str(folder)]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def build_all(network: Network, place: Workplace) -> Iterator[tuple[list[str], bool]]:
    """Build every precision and compute capability; yields rows of the table, and whether each is as it should be."""
    for name, convert in GRAPHS.items():
        path = place.folder / "graph.onnx"
        path.write_bytes(convert(network.graph))
        for capability in CAPABILITIES:
            cells = [network.name, name, capability]
            arguments = (path, network.shape, name.split(",")[0], capability, place.folder / "engines")
            found = place.once(", ".join(cells), partial(build_apart, *arguments))
            cells += _cells(found)
            say(", ".join(cells))
            yield cells, found.get("peak", 0) < MEMORY_LIMIT and ("path" in found or capability == OLDEST)


def _cells(found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [_short(found["error"]), "", "", ""]
    return ["built", f"{found['bytes'] / 1e6:.1f} MB", f"{found['seconds']:.1f} s", f"{found['peak'] / 1e9:.2f} GB"]


def _short(message: str) -> str:
    """Drop TensorRT's own words, which follow ours in brackets."""
    return message.partition(" (IBuilder")[0].replace("|", "/")


def mismatches(network: Network) -> Iterator[tuple[str, str]]:
    """Try what does not fit with the real libraries; yields what it is and what edgemuse says."""
    graph, shape = network.graph, network.shape
    yield "no GPU on this machine, `--backend tensorrt`", _refusal(lambda: choose(EngineOptions("tensorrt")))
    yield "compute capability that TensorRT-RTX does not know", _build(graph, shape, capability="9.0")
    yield "fp32 for compute capability 7.5", _build(graph, shape, capability="7.5")
    yield "fp16 asked of an fp32 graph", _build(graph, shape, "fp16")
    yield "int8 with zero points that are not 0", _build(_shifted(to_int8(graph)), shape, "int8")
    yield "file that is no ONNX", _build(b"no network" * 100, shape)
    yield "empty file", _build(b"", shape)
    yield "operation that TensorRT lacks", _build(_with_unknown_operation(graph), shape)
    yield "tile that does not halve evenly", _build(graph, (1, 1, 33, 33, 33))
    yield "library of another version", _in_child("import tensorrt_rtx; tensorrt_rtx.__version__ = '2.0'")
    yield "library not installed", _in_child("sys.modules['tensorrt'] = sys.modules['tensorrt_rtx'] = None")
    yield "cuda-python not installed", _in_child("sys.modules['cuda'] = None")


def _build(graph: bytes, shape: TileShape, precision: str = "fp32", capability: str = "8.6") -> str:
    options = EngineOptions(precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        return _refusal(lambda: build_engine(graph, shape, options, Path(folder), capability))


def _refusal(work: Callable[[], object]) -> str:
    try:
        work()
    except BackendError as error:
        return str(error)
    return "(no error)"


def _in_child(prelude: str) -> str:
    """Return what 'segment --backend tensorrt' would say after `prelude`, in a process of its own."""
    code = f"import sys\n{prelude}\nfrom edgemuse.bench.pages.tensorrt_builds import refused\nprint(refused())"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip()


def refused() -> str:
    """Return why TensorRT cannot be used in this process."""
    return _refusal(lambda: choose(EngineOptions("tensorrt")))


def _shifted(graph: bytes) -> bytes:
    model = onnx.load_model_from_string(graph)
    zero = next(tensor for tensor in model.graph.initializer if tensor.name == "activation.zero")
    zero.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), zero.name))
    data: bytes = model.SerializeToString()
    return data


def _with_unknown_operation(graph: bytes) -> bytes:
    model = onnx.load_model_from_string(graph)
    last = model.graph.node[-1]
    name, last.output[0] = last.output[0], "before"
    model.graph.node.append(helper.make_node("Abacus", ["before"], [name], name="abacus", domain="example"))
    data: bytes = model.SerializeToString()
    return data


def loading_rows() -> Iterator[list[str]]:
    """List what TensorRT may find wrong with an engine, and what edgemuse then says."""
    from edgemuse.engines.tensorrt import COMPLAINTS, MISMATCHES

    yield from ([f"`{flag}`", meaning] for flag, meaning in MISMATCHES.items())
    yield from ([f"a message with “{part}”", meaning] for part, meaning in COMPLAINTS.items())


@click.command()
@page_options("tensorrt")
def main(shared: Path, output: Path, work: Path) -> None:
    """Build all engines; exit code 1 if one of 8.0 or later does not build, or takes 4 GB."""
    import tensorrt_rtx

    place = Workplace(work, state(tensorrt_rtx=tensorrt_rtx.__version__))
    with tempfile.TemporaryDirectory() as name:
        networks = [built_in(), dlmuse(shared, Path(name))]
    found = [row for network in networks for row in build_all(network, place)]
    said = [[what, message.replace("|", "/")] for what, message in mismatches(networks[-1])]
    first = place.age([named(network.name, network.sha256) for network in networks], "tensorrt")
    builds, messages = table(HEADER, [cells for cells, _ in found]), table(("what does not fit", "message"), said)
    loading = table(("TensorRT says", "edgemuse says"), loading_rows())
    titles = "## What edgemuse says", "What TensorRT says of an engine that does not load or run, tried over fakes:"
    texts = (INTRODUCTION, builds, place.machine, titles[0], messages, titles[1], loading)
    place.publish(output, joined(first, *texts))
    raise SystemExit(0 if all(as_wanted for _, as_wanted in found) else 1)


if __name__ == "__main__":
    main()
