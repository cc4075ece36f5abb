"""The command line as its users see it: what it prints, what it writes, what it returns."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundles import CommandLine, head_image, run_process, tiny_bundle, write_scan

from edgemuse.runtime.cli.group import COMMANDS
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.results.files import DLMUSE_CSV, NAMES

WRITTEN = tuple(name for name in NAMES if name != DLMUSE_CSV)
SHOWN = ("segment", "info", "demo", "devices", "models")
OPTIONS = {
    "segment": [
        *("--output", "--model", "--model-dir", "--profile", "--backend", "--precision", "--device", "--threads"),
        *("--max-ram", "--no-postprocess", "--no-qc", "--overwrite", "--verbose", "--list", "--shard"),
    ],
    "info": ["BUNDLE", "--model-dir", "--card"],
    "demo": ["--output", "--overwrite", "--threads"],
    "devices": [],
    "models": ["list", "fetch", "add", "verify"],
}
AFFINE = np.array([[0, 0.1, -1.1, 11], [-1.2, 0, 0, -22.5], [0, 1.5, 0.1, 33], [0, 0, 0, 1]])
HEAVY = ("torch", "onnx", "nncf", "nnunetv2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("model") / "tiny.bundle", mirror_axes=(0, 2))


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write_scan(tmp_path / "sub-01_T1w.nii.gz", affine=AFFINE)


@pytest.mark.parametrize("command", SHOWN)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_option(command: str, flag: str, cli: CommandLine) -> None:
    ran = cli(command, flag)
    assert (ran.code, ran.err) == (0, "")
    assert all(option in ran.out for option in OPTIONS[command])
    assert "\\b" not in ran.out


def test_overview_lists_every_command(cli: CommandLine) -> None:
    ran = cli("--help")
    assert (ran.code, ran.err) == (0, "")
    assert all(f"\n  {command} " in ran.out for command in COMMANDS)
    assert "\n  First time here:\n    edgemuse demo" in ran.out


def test_no_command_shows_the_overview(cli: CommandLine) -> None:
    ran = cli()
    assert "Commands:" in ran.out + ran.err


def test_version(cli: CommandLine) -> None:
    ran = cli("--version")
    assert (ran.code, ran.err) == (0, "")
    assert importlib.metadata.version("edgemuse") in ran.out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["segment", "--colour"], "No such option"),
        (["segment", "x.nii", "-o", "o", "--shard", "3/2"], "'3/2' is not I/N"),
        (["segment", "x.nii", "-o", "o", "--shard", "1"], "'1' is not I/N"),
        (["segment", "x.nii", "-o", "o", "--shard", "1/" + "9" * 5000], "is not I/N"),
        (["segment", "x.nii", "-o", "o", "--shard", "\u0662/\u0668"], "is not I/N"),
        (["segment", "x.nii", "-o", "o", "--shard", "1/\u00b2"], "is not I/N"),
        (["segment", "x.nii", "-o", "o", "--threads", "9" * 5000], "--threads"),
        (["segment", "x.nii", "-o", "o", "--threads", "100000"], "1<=x<=4096"),
        (["segment", "x.nii", "-o", "o", "--max-ram", "nan"], "nan is no number of GiB"),
        (["segment", "x.nii", "-o", "o", "--max-ram", "1e400"], "inf is no number of GiB"),
        (["build", "--compute-capability", "\u0668.\u0666"], "is not a compute capability"),
        (["segment", "-o", "o", "--list", "nowhere.txt"], "nowhere.txt"),
        (["segmnt"], "No such command"),
        (["segment", "-o", "o"], "Missing argument"),
        (["segment", "x.nii"], "Missing option"),
        (["segment", "x.nii", "-o", "o", "-m", "b", "--threads", "0"], "--threads"),
        (["segment", "x.nii", "-o", "o", "-m", "b", "--max-ram", "-1"], "--max-ram"),
        (["segment", "x.nii", "-o", "o", "-m", "b", "--profile", "quick"], "reference"),
        (["segment", "x.nii", "-o", "o", "-m", "b", "--precision", "int3"], "fp32"),
        (["segment", "x.nii", "-o", "o", "-m", "b"], "no such bundle"),
        (["info", "nowhere"], "no such bundle"),
        (["devices", "extra"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], reason: str, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cli(*arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
    assert ran.err.startswith("edgemuse: ")
    assert reason in ran.err
    assert not list(tmp_path.iterdir())


def test_an_error_holds_nothing_that_a_terminal_acts_on(model: Path, cli: CommandLine, tmp_path: Path) -> None:
    ran = cli("segment", tmp_path / "a\x1b[2J.nii.gz", tmp_path / "b.nii.gz", "-m", model, "-o", tmp_path / "out")
    assert ran.code == 2
    assert f"edgemuse: {tmp_path}/a\\x1b[2J.nii.gz: no such file" in ran.err
    assert "\x1b" not in ran.err


def test_unknown_backend_is_one_line(scan: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "out", "--backend", "abacus")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("edgemuse: Invalid value for '--backend': 'abacus' is not one of 'auto', 'tensorrt', ")
    assert ran.err.count("\n") == 1


def test_stdout_holds_the_paths_of_the_results_alone(scan: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "out")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [f"{tmp_path}/out/sub-01_{name}" for name in WRITTEN]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"sub-01_{name}" for name in WRITTEN}


def test_without_a_picture(scan: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "out", "--no-qc")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [f"{tmp_path}/out/sub-01_{name}" for name in WRITTEN if name != "qc.png"]


def test_verbose_is_a_line_a_stage(scan: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "out", "-v")
    assert ran.code == 0
    lines = ran.err.splitlines()
    assert all(line.startswith("edgemuse: ") for line in lines)
    for start in ("memory: ", "load: ", "preprocess: ", "engine: ", "infer: ", "restore: ", "postprocess: "):
        assert any(line.removeprefix("edgemuse: ").startswith(start) for line in lines), start
    assert len(ran.out.splitlines()) == len(WRITTEN)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_labels_lie_on_the_grid_of_the_scan(backend: str, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    image = nib.Nifti1Image(head_image(), AFFINE)
    image.header.set_qform(AFFINE, 3)
    image.header.set_sform(AFFINE, 4)
    nib.save(image, tmp_path / "t1.nii.gz")
    ran = cli("segment", tmp_path / "t1.nii.gz", "-m", model, "-o", tmp_path, "--backend", backend)
    assert (ran.code, ran.err) == (0, "")
    given, found = nib.load(tmp_path / "t1.nii.gz"), nib.load(tmp_path / "t1_dseg.nii.gz")
    assert found.shape == given.shape
    np.testing.assert_array_equal(found.affine, given.affine)
    assert (found.get_sform(coded=True)[1], found.get_qform(coded=True)[1]) == (4, 3)
    assert found.header.get_zooms() == given.header.get_zooms()
    assert found.get_data_dtype() == np.uint8
    indices = np.unique(np.asanyarray(found.dataobj))
    assert set(indices) <= {0, 10, 20, 30, 40, 50}
    assert len(indices) > 2


def test_volumes_agree_with_the_label_map(scan: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    assert cli("segment", scan, "-m", model, "-o", tmp_path).code == 0
    labels = np.asanyarray(nib.load(tmp_path / "sub-01_dseg.nii.gz").dataobj)
    voxel = abs(np.linalg.det(nib.load(scan).affine[:3, :3]))
    header, *rows = (tmp_path / "sub-01_volumes.tsv").read_text().splitlines()
    assert header == "index\tname\tvoxels\tvolume_mm3"
    assert [row.split("\t")[0] for row in rows] == ["10", "20", "30", "40", "50"]
    for row in rows:
        index, _, voxels, mm3 = row.split("\t")
        assert int(voxels) == (labels == int(index)).sum()
        assert float(mm3) == pytest.approx(int(voxels) * voxel, abs=1e-3)


def test_label_map_is_the_same_bytes_in_two_runs(scan: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    for folder in "ab":
        assert cli("segment", scan, "-m", model, "-o", tmp_path / folder).code == 0
    for name in ("dseg.nii.gz", "dseg.tsv", "volumes.tsv"):
        assert (tmp_path / "a" / f"sub-01_{name}").read_bytes() == (tmp_path / "b" / f"sub-01_{name}").read_bytes()


def test_several_scans_in_one_call_equal_single_calls(model: Path, cli: CommandLine, tmp_path: Path) -> None:
    shapes = {"a": (24, 28, 20), "b": (40, 12, 33)}
    scans = [write_scan(tmp_path / f"{name}.nii.gz", head_image(shape)) for name, shape in shapes.items()]
    assert cli("segment", *scans, "-m", model, "-o", tmp_path / "all").code == 0
    for name, path in zip(shapes, scans, strict=True):
        assert cli("segment", path, "-m", model, "-o", tmp_path / "one").code == 0
        result = f"{name}_dseg.nii.gz"
        assert (tmp_path / "all" / result).read_bytes() == (tmp_path / "one" / result).read_bytes()


def test_fast_takes_the_scan_at_once_if_memory_allows(
    scan: Path, model: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = []
    for limit in (1e12, 0.0):
        monkeypatch.setattr("edgemuse.runtime.pipeline.segmenter.memory_limit", lambda _, limit=limit: limit)
        assert cli("segment", scan, "-m", model, "-o", tmp_path, "--profile", "fast", "--overwrite").code == 0
        tiles.append(json.loads((tmp_path / "sub-01_provenance.json").read_text())["profile"])
    roomy, cramped = tiles
    network = open_bundle(model).manifest.network
    assert roomy["tiles"] == 1
    assert all(side % unit == 0 for side, unit in zip(roomy["tile"], network.stride, strict=True))
    assert cramped["tiles"] > 1
    assert cramped["tile"] == list(network.patch)


@pytest.mark.parametrize(("profile", "axes"), [("reference", [0, 2]), ("balanced", []), ("fast", [])])
def test_provenance(profile: str, axes: list[int], scan: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    arguments = ["--profile", profile, "--threads", 1]
    assert cli("segment", scan, "-m", model, "-o", tmp_path, *arguments).code == 0
    record = json.loads((tmp_path / "sub-01_provenance.json").read_text())
    assert record["edgemuse"] == importlib.metadata.version("edgemuse")
    assert record["input"]["name"] == scan.name
    assert record["input"]["sha256"] == hashlib.sha256(scan.read_bytes()).hexdigest()
    assert record["input"]["shape"] == [24, 28, 20]
    assert record["input"]["mm"] == pytest.approx([1.2, 1.5033, 1.1045], abs=1e-3)
    assert record["model"] == {"name": "tiny", "sha256": open_bundle(model).sha256}
    assert record["backend"]["precision"] == "fp32"
    assert record["backend"]["threads"] == 1
    assert (record["profile"]["name"], record["profile"]["mirrored_axes"]) == (profile, axes)
    assert set(record["seconds"]) == {
        "load",
        "preprocess",
        "engine",
        "infer",
        "restore",
        "postprocess",
        "quality",
        "write",
    }
    assert all(seconds >= 0 for seconds in record["seconds"].values())
    assert 0 < record["memory"]["peak_bytes"]
    assert str(tmp_path) not in json.dumps(record)


def test_info_describes_the_bundle(model: Path, cli: CommandLine) -> None:
    ran = cli("info", model)
    assert (ran.code, ran.err) == (0, "")
    wanted = ("tiny", "CC0-1.0", "LPS", "2 x 2 x 2 mm", "16 x 16 x 16", "d, w", "fp32.onnx", "structures (5)")
    assert all(word in ran.out for word in (*wanted, "50 structure 5", open_bundle(model).sha256))


def test_devices_names_every_backend(cli: CommandLine) -> None:
    ran = cli("devices")
    assert (ran.code, ran.err) == (0, "")
    assert all(name in ran.out for name in ("openvino", "onnxruntime", "cores", "GiB free"))
    assert "OpenVINO comes first: it is the fastest that was measured" in " ".join(ran.out.split())


def test_devices_names_a_missing_library_once(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "edgemuse.engines.onnxruntime", raising=False)
    (line,) = (line for line in cli("devices").out.splitlines() if "onnxruntime" in line)
    assert line.split("not usable: ")[1].startswith("it is not installed; run: pip install")


@pytest.mark.parametrize("where", [0, 2])
def test_debug_shows_a_traceback(where: int, model: Path, cache_dir: Path, tmp_path: Path) -> None:
    arguments = ["segment", str(tmp_path / "nowhere.nii"), "-m", str(model), "-o", str(tmp_path / "out")]
    arguments.insert(where, "--debug")
    ran = run_process(*arguments, cache_dir=cache_dir)
    assert ran.code != 0
    assert "Traceback" in ran.err
    assert "InputError" in ran.err


def test_unforeseen_error_is_one_line_and_code_1(
    scan: Path, model: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of\nall things")

    monkeypatch.setattr("edgemuse.runtime.pipeline.segmenter.preprocess", fail)
    ran = cli("segment", scan, "-m", model, "-o", tmp_path / "out")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "edgemuse: internal error: of all things; --debug shows where\n"


def test_failure_counts_more_than_bad_input(
    scan: Path, model: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgemuse.runtime.pipeline.segmenter.preprocess", lambda *_: 1 / 0)
    ran = cli("segment", tmp_path / "missing.nii", scan, "-m", model, "-o", tmp_path / "out")
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith("edgemuse: 2 scans: 2 failed; ")


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_segmenting_imports_nothing_heavy(
    backend: str, scan: Path, model: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """After a whole run, in a fresh interpreter."""
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    prelude = f"""
import atexit, sys
atexit.register(lambda: print("heavy:", sorted(set({HEAVY!r}) & set(sys.modules))))
"""
    arguments = ("segment", scan, "-m", model, "-o", tmp_path / "out", "--backend", backend)
    ran = run_process(*arguments, cache_dir=cache_dir, prelude=prelude)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[-1] == "heavy: []"
    assert len(ran.out.splitlines()) == len(WRITTEN) + 1


def test_help_imports_no_numerical_library(cache_dir: Path) -> None:
    prelude = """
import atexit, sys
atexit.register(lambda: print("heavy:", sorted({"numpy", "scipy", "nibabel", "openvino"} & set(sys.modules))))
"""
    ran = run_process("segment", "--help", cache_dir=cache_dir, prelude=prelude)
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("debug", [False, True])
def test_warnings_of_libraries_are_shown_only_with_debug(debug: bool, cache_dir: Path) -> None:
    prelude = """
import atexit, logging, warnings
logging.basicConfig()  # as some libraries do
atexit.register(lambda: warnings.warn("something changes in the next version", UserWarning))
"""
    ran = run_process(*(["--debug"] * debug), "--version", cache_dir=cache_dir, prelude=prelude)
    assert ran.code == 0
    assert ("something changes" in ran.err) == debug
    assert debug or not ran.err


def test_module_and_console_script_are_the_same(cli: CommandLine) -> None:
    for command in ([sys.executable, "-m", "edgemuse.runtime.cli"], [str(Path(sys.executable).with_name("edgemuse"))]):
        if not Path(command[0]).exists():
            pytest.skip("the console script is not beside this interpreter")
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == cli("--version").out


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is POSIX's")
def test_interrupt_ends_with_130_and_leaves_nothing(scan: Path, model: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C while the network runs, which here waits for it."""
    code = """
import signal, time
from edgemuse.runtime.pipeline import segmenter
from edgemuse.runtime.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has jobs in the background ignore it
def wait(*arguments):
    print("waiting", flush=True)
    time.sleep(60)
segmenter.preprocess = wait
main()
"""
    command = [sys.executable, "-c", code, "segment", scan, "-m", model, "-o", tmp_path / "out"]
    environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(cache_dir)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline() == "waiting\n"
        time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 130
        lines = [line for line in run.stderr.read().splitlines() if line]
    assert lines == ["edgemuse: interrupted"]
    assert not list((tmp_path / "out").iterdir())
