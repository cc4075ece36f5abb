"""A backend that computes wrongly on this machine is found out by the tile that the bundle stores."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import (
    CommandLine,
    add_selftest,
    edit_manifest,
    gate_row,
    npz_bytes,
    replace_file,
    tiny_bundle,
    tiny_cascade,
    tiny_graph,
    tiny_oracle,
    write_scan,
)
from hypothesis import given
from hypothesis import strategies as st

from edgemuse.engines import hardware, registry
from edgemuse.engines.errors import BackendError, BundleError
from edgemuse.engines.fake import FunctionEngine
from edgemuse.engines.protocol import Batch, Engine, EngineOptions, TileShape
from edgemuse.runtime.model import selftest
from edgemuse.runtime.model.bundle import Bundle, open_bundle
from edgemuse.runtime.model.selftest import LIMITS, SELFTEST, check, deviation, measure, read_selftest, trusted

pytest.importorskip("onnxruntime", reason="two backends are needed: pip install 'edgemuse[onnxruntime]'")

Fault = Callable[[Batch], Batch]
AUTO = EngineOptions(precision="auto")
OPENVINO = EngineOptions("openvino", "fp32", "CPU")
PASSED = ("openvino", "fp32", 2.0), ("openvino", "int8", 1.0), ("onnxruntime", "fp32", 3.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A bundle with a tile, whose int8 graph is its fp32 one and is the faster by its gate."""
    folder = add_selftest(replace_file(tiny_bundle(tmp_path / "tiny.bundle"), "int8.onnx", tiny_graph()))
    rows = [gate_row(backend=backend, precision=precision, seconds=t) for backend, precision, t in PASSED]
    return edit_manifest(folder, graphs={"fp32": "fp32.onnx", "int8": "int8.onnx"}, gate=[asdict(row) for row in rows])


@pytest.fixture
def bundle(path: Path) -> Bundle:
    return open_bundle(path)


class Machine:
    """Runs the tile with scipy, and then what `faults` says of the backend and the precision; lists what it `ran`."""

    def __init__(self) -> None:
        self.faults: dict[tuple[str, str], Fault] = {}
        self.ran: list[tuple[str, str]] = []

    def open(self, graph: bytes, shape: TileShape, options: EngineOptions) -> Engine:
        way = options.backend, options.precision
        self.ran.append(way)
        fault = self.faults.get(way, lambda output: output)
        return FunctionEngine(lambda tile: fault(tiny_oracle(tile[0, 0])[None].astype(np.float32)))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(selftest, "open_engine", machine.open)
    return machine


def one_channel(output: Batch) -> Batch:
    output[:, 2] = output[:, 1]
    return output


def noisy(share: float) -> Fault:
    """Noise of `share` of each channel's spread."""

    def fault(output: Batch) -> Batch:
        noise = np.random.default_rng(0).normal(0, share, output.shape)
        return output + noise * output.std(axis=(0, 2, 3, 4), keepdims=True)

    return fault


def not_numbers(output: Batch) -> Batch:
    """NaN in half of the voxels."""
    return np.where(output > output.mean(), np.nan, output)


def rounded(bits: int) -> Fault:
    """To so many bits of mantissa."""

    def fault(output: Batch) -> Batch:
        mantissa, exponent = np.frexp(output)
        return np.ldexp(np.rint(mantissa * 2**bits) / 2**bits, exponent)

    return fault


@pytest.mark.parametrize("backend", registry.NAMES[:2])
def test_real_backends_are_right(backend: str, bundle: Bundle) -> None:
    for way in selftest.ways(bundle, EngineOptions()):
        if way.backend == backend:
            found = measure(bundle, way)
            assert found is not None
            assert found.passed
            assert found.error < 1e-5 or way.precision != "fp32"


@pytest.mark.parametrize(
    ("precision", "fault", "passes"),
    [
        ("fp32", rounded(14), True),
        ("fp32", rounded(8), False),
        ("fp32", lambda output: output[:, ::-1], False),
        ("bf16", noisy(0.016), True),
        ("bf16", noisy(0.16), False),
        ("bf16", one_channel, False),
        ("bf16", not_numbers, False),
        ("fp16", noisy(0.0015), True),
        ("int8", noisy(0.12), True),
        ("int8", noisy(0.8), False),
        ("int8", one_channel, False),
        ("int8", lambda output: 5.5 * output, False),
    ],
)
def test_what_is_wrong_is_told_from_what_a_precision_costs(
    precision: str, fault: Fault, passes: bool, path: Path, machine: Machine
) -> None:
    bundle = open_bundle(edit_manifest(path, graphs=dict.fromkeys(("fp32", "fp16", "int8"), "fp32.onnx")))
    machine.faults["openvino", precision] = fault
    found = measure(bundle, EngineOptions("openvino", precision, "CPU"))
    assert found is not None
    assert found.passed == passes, found
    assert found.limit == LIMITS[precision]


@given(st.integers(0, 3), st.floats(0.01, 100))
def test_the_worst_channel_counts(channel: int, scale: float) -> None:
    rng = np.random.default_rng(channel)
    expected = (rng.normal(size=(4, 500)) * [[scale]] + 7).astype(np.float32)
    found = expected.copy()
    found[channel] += (0.3 * expected[channel].std()).astype(np.float32)
    assert deviation(found, expected) == pytest.approx(0.3, rel=0.05)
    assert deviation(expected, expected) == 0


def test_a_channel_that_never_varies_does_not_count_for_more() -> None:
    expected = np.vstack([np.random.default_rng(0).normal(size=500), np.zeros(500)]).astype(np.float32)
    assert deviation(expected + np.float32(1e-5), expected) < 2e-4
    assert deviation(np.zeros((2, 5), np.float32), np.zeros((2, 5), np.float32)) == 0


def test_the_verdict_is_kept(bundle: Bundle, machine: Machine, tmp_path: Path) -> None:
    options = EngineOptions("openvino", "fp32", "CPU", cache_dir=tmp_path / "cache")
    machine.faults["openvino", "fp32"] = noisy(0.5)
    first, second = check(bundle, options), check(bundle, options)
    assert first == second
    assert first is not None
    assert not first.passed
    assert machine.ran == [("openvino", "fp32")]


@pytest.mark.parametrize("changed", ["version", "processor", "tile", "graph", "edgemuse", "precision"])
def test_another_backend_processor_or_graph_is_tried_anew(
    changed: str, path: Path, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions("openvino", "fp32", "CPU", cache_dir=tmp_path / "cache")
    check(open_bundle(path), options)
    if changed == "version":
        monkeypatch.setattr("edgemuse.engines.openvino.OpenVINOEngine.version", "2030.1")
    elif changed == "processor":
        monkeypatch.setattr("edgemuse.engines.openvino.cpu_identity", lambda: "another")
    elif changed == "tile":
        replace_file(path, SELFTEST, (path / SELFTEST).read_bytes() + b"\0" * 10)
    elif changed == "graph":
        replace_file(path, "fp32.onnx", tiny_graph() + b"\x12\x01x")
    elif changed == "edgemuse":
        monkeypatch.setattr(selftest, "version", lambda name: "99")
    else:
        options = EngineOptions("openvino", "int8", "CPU", cache_dir=tmp_path / "cache")
    check(open_bundle(path), options)
    assert len(machine.ran) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"nonsense", b'{"error": "low"}', b'{"error": null}'])
def test_a_damaged_verdict_is_measured_again(content: bytes, bundle: Bundle, machine: Machine, tmp_path: Path) -> None:
    options = EngineOptions("openvino", "fp32", "CPU", cache_dir=tmp_path / "cache")
    selftest.cache.store(tmp_path / "cache", selftest._key(bundle, options), content)
    found = check(bundle, options)
    assert found is not None
    assert found.passed
    assert len(machine.ran) == 1


def test_without_a_cache_or_a_tile_nothing_is_tried(bundle: Bundle, machine: Machine, tmp_path: Path) -> None:
    assert check(bundle, OPENVINO) is None
    old = open_bundle(tiny_bundle(tmp_path / "old.bundle"))
    assert check(old, EngineOptions("openvino", "fp32", "CPU", cache_dir=tmp_path / "cache")) is None
    assert trusted(old, "balanced", AUTO)[1] == ""
    assert machine.ran == []


def test_the_processor_is_more_than_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in virtual machines, which give many processors one name."""

    def named(text: str) -> str:
        class Listed(type(tmp_path)):  # type: ignore[misc]
            def read_text(self, *_: Any) -> str:
                return text

        monkeypatch.setattr(hardware, "Path", Listed)
        return hardware.cpu_identity()

    plain = "processor : 0\nmodel name : Some CPU\nflags : sse avx2\ncpu MHz : 1000\n"
    assert named(plain).startswith("Some CPU (")
    assert named(plain) == named(plain.replace("1000", "2000").replace("processor : 0", "processor : 1"))
    assert named(plain) != named(plain.replace("avx2", "avx2 amx_int8"))


CACHE = "cache"


def chosen(bundle: Bundle, tmp_path: Path, **asked: str) -> tuple[str, str, str]:
    """Backend, precision and the reason for not taking another."""
    options = EngineOptions(**{"precision": "auto", **asked}, cache_dir=tmp_path / CACHE)  # type: ignore[arg-type]
    found, reason = trusted(bundle, "balanced", options)
    return found.backend, found.precision, reason


WRONG_INT8, WRONG_FP32 = ("openvino", "int8"), ("openvino", "fp32")


def test_what_is_right_is_taken_without_a_word(
    bundle: Bundle, machine: Machine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert chosen(bundle, tmp_path) == ("openvino", "int8", "")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("asked", "wrong", "taken"),
    [
        ({}, [WRONG_INT8], ("openvino", "fp32")),
        ({}, [WRONG_INT8, WRONG_FP32], ("onnxruntime", "fp32")),
        ({"backend": "openvino"}, [WRONG_INT8], ("openvino", "fp32")),
        ({"precision": "int8"}, [WRONG_INT8], ("onnxruntime", "int8")),
        ({"precision": "fp32"}, [WRONG_FP32], ("onnxruntime", "fp32")),
    ],
    ids=str,
)
def test_auto_goes_on_to_the_next_in_one_sentence(
    asked: dict[str, str],
    wrong: list[tuple[str, str]],
    taken: tuple[str, str],
    bundle: Bundle,
    machine: Machine,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine.faults |= dict.fromkeys(wrong, noisy(0.9))
    backend, precision, reason = chosen(bundle, tmp_path, **asked)
    assert (backend, precision) == taken
    assert machine.ran == [*wrong, taken]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"{reason}; going on with {backend} {precision}"
    assert all(f"computes wrongly in {of} on this CPU" in reason for _, of in wrong)


def test_what_was_named_is_refused(bundle: Bundle, machine: Machine, tmp_path: Path) -> None:
    machine.faults[WRONG_INT8] = noisy(0.9)
    with pytest.raises(
        BackendError, match=r"^openvino 20\S+ computes wrongly in int8 on this CPU: .* off by "
    ) as found:
        chosen(bundle, tmp_path, backend="openvino", precision="int8")
    assert "choose another --precision or --backend" in str(found.value)
    assert "\n" not in str(found.value)


def test_nothing_is_left(bundle: Bundle, machine: Machine, tmp_path: Path) -> None:
    machine.faults |= {(backend, "int8"): noisy(0.9) for backend in registry.NAMES}
    with pytest.raises(BackendError, match=r"no usable backend: openvino .* wrongly .*; onnxruntime .* wrongly"):
        chosen(bundle, tmp_path, precision="int8")


def test_what_does_not_run_is_reported_where_it_is_opened(bundle: Bundle, machine: Machine, tmp_path: Path) -> None:
    """By the engine for the scan, which may be replaced by another."""

    def broken(output: Batch) -> Batch:
        raise BackendError("out of memory")

    machine.faults[WRONG_INT8] = broken
    assert chosen(bundle, tmp_path) == ("openvino", "int8", "")
    assert chosen(bundle, tmp_path)
    assert len(machine.ran) == 2  # nothing was kept


TILE, PLACES = np.zeros((16, 16, 16), np.int8), np.arange(5, dtype=np.int32)
FEATURES = np.zeros((4, 5), np.float32)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        npz_bytes(tile=TILE, fp32=FEATURES),
        npz_bytes(places=PLACES, fp32=FEATURES),
        npz_bytes(tile=TILE.astype(np.float32), places=PLACES, fp32=FEATURES),
        npz_bytes(tile=np.zeros((17, 16, 16), np.int8), places=PLACES, fp32=FEATURES),
        npz_bytes(tile=np.zeros((0, 16, 16), np.int8), places=PLACES[:0], fp32=FEATURES[:, :0]),
        npz_bytes(tile=TILE[0], places=PLACES, fp32=FEATURES),
        npz_bytes(tile=TILE, places=PLACES - 1, fp32=FEATURES),
        npz_bytes(tile=TILE, places=PLACES + 16**3 - 4, fp32=FEATURES),
        npz_bytes(tile=TILE, places=PLACES, fp32=FEATURES[:3]),
        npz_bytes(tile=TILE, places=PLACES, fp32=FEATURES.astype(np.float64)),
        npz_bytes(tile=TILE, places=PLACES, fp32=FEATURES[0]),
        npz_bytes(tile=TILE, places=PLACES, fp32=FEATURES + np.float32("nan")),
    ],
    ids=range(13),
)
def test_a_damaged_tile_is_one_line(content: bytes, path: Path) -> None:
    """One that is larger than a patch among them: it would take more memory than was planned."""
    bundle = open_bundle(replace_file(path, SELFTEST, content))
    with pytest.raises(BundleError, match=r"selftest\.npz") as found:
        read_selftest(bundle)
    assert "\n" not in str(found.value)


def test_features_of_something_else_are_passed_over(path: Path, cli: CommandLine) -> None:
    """Their names may be anything, and would reach the terminal."""
    with np.load(path / SELFTEST) as arrays:
        replace_file(path, SELFTEST, npz_bytes(**arrays, **{"\033[31mred": FEATURES}))
    assert "features in fp32 and int8;" in cli("info", path).out


def test_arrays_are_as_stored(bundle: Bundle) -> None:
    found = read_selftest(bundle)
    assert found is not None
    with np.load(io.BytesIO(bundle.read(SELFTEST))) as arrays:
        np.testing.assert_array_equal(found.tile[0, 0] * selftest.STEPS, arrays["tile"])
    assert found.tile.dtype == np.float32
    assert 0.9 < found.tile.std() < 1.1


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capfd, tmp_path / CACHE)


def test_segment_goes_on_with_what_is_right_and_records_it(
    path: Path, machine: Machine, cli: CommandLine, tmp_path: Path
) -> None:
    machine.faults[WRONG_INT8] = noisy(0.9)
    scan = write_scan(tmp_path / "a_T1w.nii.gz")
    for _ in range(2):
        ran = cli("segment", scan, "-m", path, "-o", tmp_path, "--profile", "balanced", "--overwrite")
        assert ran.code == 0, ran.err
        assert ran.err.count("\n") == 1
        assert "computes wrongly in int8" in ran.err
        record = json.loads((tmp_path / "a_provenance.json").read_text())["backend"]
        assert (record["name"], record["precision"]) == ("openvino", "fp32")
        assert record["instead_of"] in ran.err
    assert machine.ran == [WRONG_INT8, WRONG_FP32]


def test_segment_refuses_what_was_named(path: Path, machine: Machine, cli: CommandLine, tmp_path: Path) -> None:
    machine.faults[WRONG_INT8] = noisy(0.9)
    scan = write_scan(tmp_path / "a_T1w.nii.gz")
    ran = cli("segment", scan, "-m", path, "-o", tmp_path / "out", "--precision", "int8", "--backend", "openvino")
    assert (ran.code, ran.out) == (2, "")
    assert "computes wrongly in int8" in ran.err.splitlines()[-1]
    assert not [*(tmp_path / "out").glob("*dseg*")]


def test_what_takes_over_must_fit_in_memory(path: Path, machine: Machine, cli: CommandLine, tmp_path: Path) -> None:
    """int8 takes less than fp32; the limit here lies between."""
    edit_manifest(
        path, network=json.loads((path / "bundle.json").read_text())["network"] | {"activation_bytes": 1 << 17}
    )
    machine.faults[WRONG_INT8] = noisy(0.9)
    scan = write_scan(tmp_path / "a_T1w.nii.gz")
    asked = ("segment", scan, "-m", path, "-o", tmp_path / "out", "--profile", "balanced", "--max-ram", "0.6")
    ran = cli(*asked)
    assert (ran.code, ran.out) == (2, "")
    assert "are allowed by --max-ram" in ran.err
    machine.faults.clear()
    assert CommandLine(cli.capfd, tmp_path / "other")(*asked).code == 0


def test_devices_check_shows_every_way(path: Path, machine: Machine, cli: CommandLine) -> None:
    machine.faults["onnxruntime", "int8"] = noisy(0.9)
    ran = cli("devices", "--check", "-m", path)
    assert ran.code == 1
    rows = {tuple(line.split()[i] for i in (0, 3)): line.split() for line in ran.out.splitlines()[2:-1]}
    assert {way: row[-1] for way, row in rows.items()} == {
        way: "failed" if way == ("onnxruntime", "int8") else "passed" for way in machine.ran
    }
    assert ("openvino", "fp32") in rows
    assert rows["openvino", "int8"][5] == "2.0e-01"
    machine.faults.clear()
    assert cli("devices", "--check", "-m", path).code == 0  # measured again, whatever was kept


def test_devices_check_of_what_does_not_run(path: Path, machine: Machine, cli: CommandLine) -> None:
    def broken(output: Batch) -> Batch:
        raise BackendError("out of\nmemory")

    machine.faults[WRONG_INT8] = broken
    ran = cli("devices", "--check", "-m", path)
    assert ran.code == 1
    assert "failed: it does not run (out of memory)" in ran.out


def test_an_old_bundle_is_said_to_be_unchecked(cli: CommandLine, tmp_path: Path) -> None:
    cascade = tiny_cascade(tmp_path / "both.bundle")
    ran = cli("devices", "--check", "-m", cascade)
    assert ran.code == 0
    assert ran.out.count("not checked: no self-test is stored") == 2
    assert "self-test: none is stored" in cli("info", tiny_bundle(tmp_path / "old.bundle")).out


def test_features_that_are_missing_are_said_to_be(path: Path, cli: CommandLine) -> None:
    with np.load(path / SELFTEST) as arrays:
        replace_file(path, SELFTEST, npz_bytes(**{name: arrays[name] for name in ("tile", "places", "fp32")}))
    ran = cli("devices", "--check", "-m", path)
    assert ran.code == 0, ran.out
    assert ran.out.count("not checked: no features are stored for it") == 2
    assert "self-test: a tile of 16 x 16 x 16 with features in fp32;" in cli("info", path).out


def test_model_is_for_check_alone(cli: CommandLine, path: Path) -> None:
    ran = cli("devices", "-m", path)
    assert ran.code == 2
    assert "--model is for --check" in ran.err
