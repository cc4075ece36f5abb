"""`edgemuse build`, and `edgemuse segment` on a GPU: the command line over fakes of TensorRT."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from bundles import (
    CommandLine,
    cached,
    edit_manifest,
    head_image,
    replace_file,
    run_process,
    snapshot,
    tiny_bundle,
    tiny_cascade,
    tiny_graph,
    write_scan,
)
from tensorrt_fakes import Machine, Status, install

from edgemuse.calibration.half import half_precision
from edgemuse.engines.openvino import probe
from edgemuse.engines.protocol import EngineOptions
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.model.tuned import Tuned, keep, timed
from edgemuse.runtime.network.profiles import PROFILES
from edgemuse.runtime.results.files import NAMES

LINE = re.compile(r"(.+\.engine)\t(fp32|fp16)\t(8\.6|12\.0|this machine)\t\d+\.\d MB\t\d+\.\d s")


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capfd, tmp_path / "cache")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A bundle with an fp16 graph beside the fp32 one."""
    folder = replace_file(tiny_bundle(tmp_path / "tiny.bundle"), "fp16.onnx", half_precision(tiny_graph()))
    return edit_manifest(folder, graphs={"fp32": "fp32.onnx", "fp16": "fp16.onnx"})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with TensorRT-RTX and a GPU."""
    return install(monkeypatch)


@pytest.fixture
def tuned(gpu: Machine, model: Path, tmp_path: Path) -> None:
    """The GPU was found to be the fastest, so `auto` takes it."""
    timings = tuple(timed(EngineOptions("tensorrt", "fp32", "GPU"), profile, 0.1) for profile in PROFILES)
    keep(tmp_path / "cache", open_bundle(model).sha256, Tuned("tiny", "a_T1w.nii.gz", timings))


def test_help_lists_every_option(cli: CommandLine) -> None:
    ran = cli("build", "--help")
    assert (ran.code, ran.err) == (0, "")
    for option in ("BUNDLE", "--backend", "--precision", "--compute-capability", "--output"):
        assert option in ran.out


def test_engines_for_gpus_elsewhere(cli: CommandLine, gpu: Machine, model: Path, tmp_path: Path) -> None:
    """Every graph of the bundle for every capability, no driver needed; then found by a machine that has the GPU."""
    driver, gpu.driver = gpu.driver, 0
    capabilities = ("--compute-capability", "8.6", "--compute-capability", "12.0")
    ran = cli("build", model, *capabilities, "-o", tmp_path / "cache")
    assert ran.code == 0, ran.err
    found = [LINE.fullmatch(line) for line in ran.out.splitlines()]
    assert all(found)
    assert {match.group(2, 3) for match in found if match} == {
        (p, c) for p in ("fp32", "fp16") for c in ("8.6", "12.0")
    }
    assert {Path(match[1]) for match in found if match} == set(cached(tmp_path / "cache"))
    assert "building fp32 for 8.6 (1 of 4)" in ran.err
    gpu.driver = driver
    scan = write_scan(tmp_path / "sub-01_T1w.nii.gz")
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "out", "-v", "--device", "gpu")
    assert ran.code == 0, ran.err
    assert "engine from cache" in ran.err


def test_engines_of_a_cascade(cli: CommandLine, gpu: Machine, tmp_path: Path) -> None:
    """Both networks, named in the last column, each with its own patch; then 'segment' finds both."""
    (tmp_path / "models").mkdir()
    model = tiny_cascade(tmp_path / "models" / "both.zip", mask={"patch": (24, 20, 28)})
    driver, gpu.driver = gpu.driver, 0
    arguments = ("--model-dir", tmp_path / "models", "--compute-capability", "8.6", "--compute-capability", "12.0")
    ran = cli("build", "both", *arguments, "-o", tmp_path / "cache")
    assert ran.code == 0, ran.err
    lines, roles = zip(*(line.rsplit("\t", 1) for line in ran.out.splitlines()), strict=True)
    assert roles == ("mask", "mask", "regions", "regions")
    found = [LINE.fullmatch(line) for line in lines]
    assert {Path(match[1]) for match in found if match} == set(cached(tmp_path / "cache"))
    assert "building regions fp32 for 8.6 (3 of 4)" in ran.err
    gpu.driver = driver
    scan = write_scan(tmp_path / "sub-01_T1w.nii.gz", head_image((40, 44, 36)))
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "out", "-v", "--backend", "tensorrt")
    assert ran.code == 0, ran.err
    assert ran.err.count("engine from cache") == 2


def test_cascade_on_openvino_is_warmed(cli: CommandLine, tmp_path: Path) -> None:
    model = tiny_cascade(tmp_path / "both.bundle")
    ran = cli("build", model, "--backend", "openvino")
    assert ran.code == 0, ran.err
    assert [line.rsplit("\t", 1)[1] for line in ran.out.splitlines()] == ["mask", "regions"]
    ran = cli("segment", write_scan(tmp_path / "a.nii.gz"), "-m", model, "-o", tmp_path / "out", "-v",
              "--backend", "openvino")  # fmt: skip
    assert ran.err.count("engine from cache") == 2


def test_engine_file_is_what_the_library_made(cli: CommandLine, gpu: Machine, model: Path, tmp_path: Path) -> None:
    cli("build", model, "--precision", "fp32", "--compute-capability", "8.6", "-o", tmp_path / "engines")
    (path,) = cached(tmp_path / "engines")
    data = path.read_bytes()
    assert data[:32] == hashlib.sha256(data[32:]).digest()
    assert data.endswith(tiny_graph())


def test_openvino_is_warmed(cli: CommandLine, model: Path, tmp_path: Path) -> None:
    """Without a GPU it is what 'segment' uses; graphs that it does not offer are left alone."""
    ran = cli("build", model, "--backend", "openvino")
    assert ran.code == 0, ran.err
    built = ran.out.splitlines()
    assert all(LINE.fullmatch(line) for line in built)
    assert len(built) == len({"fp32", "fp16"}.intersection(probe()["CPU"]))
    ran = cli("segment", write_scan(tmp_path / "a.nii.gz"), "-m", model, "-o", tmp_path / "out", "-v",
              "--backend", "openvino")  # fmt: skip
    assert "engine from cache" in ran.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compute-capability", "8"], "'8' is not a compute capability such as 8.6"),
        (["--compute-capability", "9.0", "--precision", "fp32"], "12.1, not 9.0"),
        (["--compute-capability", "8.6", "--backend", "openvino"], "--compute-capability is for tensorrt"),
        (["--compute-capability", "8.6", "--precision", "int8"], "no int8 graph is stored, only fp32, fp16"),
    ],
)
@pytest.mark.usefixtures("gpu")
def test_refusals(arguments: list[str], said: str, cli: CommandLine, model: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    ran = cli("build", model, *arguments, "-o", tmp_path / "engines")
    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err.splitlines()[-1]
    assert snapshot(tmp_path) == before


def test_folder_that_cannot_be_written(cli: CommandLine, gpu: Machine, model: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "below").write_text("a file")
    ran = cli("build", model, "--compute-capability", "8.6", "-o", tmp_path / "taken" / "below" / "engines")
    assert ran.code == 2
    assert "choose another folder with --output" in ran.err
    assert (tmp_path / "taken" / "below").read_text() == "a file"


def test_one_that_fails_does_not_stop_the_others(cli: CommandLine, gpu: Machine, model: Path, tmp_path: Path) -> None:
    ran = cli("build", model, "--compute-capability", "9.0", "--compute-capability", "8.6", "-o", tmp_path / "engines")
    assert ran.code == 2
    assert len(ran.out.splitlines()) == 2
    assert "2 of 4 engines not built" in ran.err.splitlines()[-1]


def test_building_imports_no_pytorch(model: Path, tmp_path: Path) -> None:
    prelude = 'import atexit, sys\natexit.register(lambda: print(*[n for n in ("torch", "onnx") if n in sys.modules]))'
    ran = run_process("build", model, "--backend", "openvino", cache_dir=tmp_path / "cache", prelude=prelude)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == ""


@pytest.mark.usefixtures("tuned")
def test_lost_gpu_costs_no_result(cli: CommandLine, gpu: Machine, model: Path, tmp_path: Path) -> None:
    """Stderr and provenance say that the CPU took over; the labels are those of the CPU."""
    scan = write_scan(tmp_path / "sub-01_T1w.nii.gz")
    gpu.failing = {"cudaStreamSynchronize": Status.cudaErrorIllegalAddress}
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "gpu")
    assert ran.code == 0, ran.err
    assert len(ran.out.splitlines()) == len(NAMES) - 1  # all but the table of DLMUSE
    (line,) = (line for line in ran.err.splitlines() if "going on with the CPU" in line)
    assert line.startswith("edgemuse: tensorrt: CUDA failed")
    record = json.loads((tmp_path / "gpu" / "sub-01_provenance.json").read_text())["backend"]
    assert record["name"] in ("openvino", "onnxruntime")
    assert record["instead_of"].startswith("tensorrt: CUDA failed")
    cli("segment", scan, "-m", model, "-o", tmp_path / "cpu", "--device", "cpu")
    assert json.loads((tmp_path / "cpu" / "sub-01_provenance.json").read_text())["backend"]["instead_of"] == ""
    names = ("gpu", "cpu")
    assert len({(tmp_path / name / "sub-01_dseg.nii.gz").read_bytes() for name in names}) == 1


@pytest.mark.usefixtures("tuned")
def test_lost_gpu_is_not_tried_again(cli: CommandLine, gpu: Machine, model: Path, tmp_path: Path) -> None:
    """Nor for scans whose tiles have another shape, and the records of all say so."""
    scans = [
        write_scan(tmp_path / f"sub-0{n}_T1w.nii.gz", head_image(shape))
        for n, shape in enumerate([(24, 28, 20), (40, 44, 36)])
    ]
    gpu.failing = {"cudaStreamSynchronize": Status.cudaErrorIllegalAddress}
    ran = cli("segment", *scans, "-m", model, "-o", tmp_path / "out", "--profile", "fast")
    assert ran.code == 0, ran.err
    assert ran.err.count("going on with the CPU") == 1
    for scan in ("sub-00", "sub-01"):
        record = json.loads((tmp_path / "out" / f"{scan}_provenance.json").read_text())["backend"]
        assert record["device"] == "CPU"
        assert record["instead_of"].startswith("tensorrt: CUDA failed")


@pytest.mark.parametrize("named", [("--backend", "tensorrt"), ("--device", "gpu")], ids=["backend", "device"])
def test_lost_gpu_that_was_named_is_an_error(
    named: tuple[str, str], cli: CommandLine, gpu: Machine, model: Path, tmp_path: Path
) -> None:
    gpu.failing = {"cudaStreamSynchronize": Status.cudaErrorIllegalAddress}
    scan = write_scan(tmp_path / "sub-01_T1w.nii.gz")
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "out", *named)
    assert ran.code == 2
    assert ran.err.startswith("edgemuse: CUDA failed while running the network")
    assert list((tmp_path / "out").iterdir()) == []


def test_devices_say_why_not(cli: CommandLine, gpu: Machine) -> None:
    assert "tensorrt     tensorrt_rtx 1.7.1: GPU with fp32, fp16, int8" in cli("devices").out
    gpu.driver = 0
    assert "tensorrt     not usable: no NVIDIA driver is loaded" in cli("devices").out
