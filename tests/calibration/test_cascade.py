"""Calibrating a cascade: what calibrating its two networks by hand gives, and the old one stays until all is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundles import CommandLine, head_image, replace_graph, snapshot, tiny_bundle, tiny_cascade, write_scan, zip_bundle
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray
from scipy import ndimage
from unets import unet

pytest.importorskip("nncf", reason="NNCF is not installed: pip install '.[calibrate]'")

from edgemuse.calibration import calibrate as module
from edgemuse.calibration.cascade import stage_inputs
from edgemuse.calibration.graphs import graph_bytes
from edgemuse.calibration.scans import Source, find_scans
from edgemuse.engines.errors import InputError
from edgemuse.export.writer import write_cascade
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import Bundle, open_bundle
from edgemuse.runtime.model.cascade import Cascade, CascadeManifest
from edgemuse.runtime.model.manifest import GateRow
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.pipeline.segmenter import Segmenter
from edgemuse.runtime.regions.labels import Label
from edgemuse.runtime.scan.nifti import file_sha256

CPU = Options("reference", "openvino", "fp32", cache_dir=None)
AFFINE = np.array([[0, 0.1, -1.1, 11], [-1.2, 0, 0, -22.5], [0, 1.5, 0.1, 33], [0, 0, 0, 1]])
"""Neither LPS nor 1 mm."""
PADDING = 10


def silent(_: str) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scans, the last with truth: every structure, in blocks, so that it differs from itself if it is turned."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        image = head_image((34, 38, 30), seed=number)
        write_scan(folder / f"sub-{number}_T1w.nii.gz", image, affine=AFFINE)
    blocks = np.random.default_rng(0).integers(0, 6, (9, 10, 8)).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    truth = 10 * blocks[:34, :38, :30].astype(np.uint8)
    write_scan(folder / "sub-2_dseg.nii.gz", truth, affine=AFFINE)
    return folder


def stages(folder: Path) -> tuple[Path, Path]:
    """A network that finds the brighter half of a scan, and a random U-Net."""
    mask = tiny_bundle(folder / "mask.bundle", classes=2, deferred=False, threshold=True)
    regions = tiny_bundle(folder / "regions.bundle", stride=(2, 2, 2))
    return mask, replace_graph(regions, graph_bytes(unet()))


def cascade_at(path: Path) -> Path:
    """A cascade of the two."""
    mask, regions = (open_bundle(bundle) for bundle in stages(path.with_name(f"stages of {path.name}")))
    manifest = CascadeManifest(
        name="tiny cascade",
        license="CC0-1.0",
        orientation="LPS",
        stages={"mask": mask.sha256, "regions": regions.sha256},
        padding_percent=PADDING,
        keep_largest=False,
        plausible_mm3=None,
        fill=Label(6, 1, "filled"),
    )
    return write_cascade(path, manifest, mask, regions)


@pytest.fixture(scope="module")
def calibrated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A cascade that was calibrated, and what was said on the way."""
    folder = tmp_path_factory.mktemp("calibrated")
    heard: list[str] = []
    return module.calibrate(cascade_at(folder / "old.zip"), data, folder / "new.bundle", heard.append), heard


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    return CommandLine(capfd, tmp_path_factory.mktemp("cache"))


def lps(path: Path) -> Any:
    """The image at `path`, turned to LPS by nibabel."""
    image = nib.load(path)
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(tuple("LPS"))))


def crop_by_hand(scan: Path, mask: Bundle, target: Path) -> None:
    """Write what lies inside the mask, and the truth at the same box, into the folder `target`."""
    target.mkdir(exist_ok=True)
    turned = lps(scan)
    nib.save(turned, target / "turned.nii.gz")
    with Segmenter(mask, CPU) as segmenter:
        inside = segmenter.segment(target / "turned.nii.gz").classes != 0
    (target / "turned.nii.gz").unlink()
    box = _box(inside)
    masked = np.where(inside, turned.get_fdata(dtype=np.float32), 0).astype(np.float32)
    nib.save(nib.Nifti1Image(masked, turned.affine).slicer[box], target / scan.name)
    truth = scan.with_name(scan.name.replace("T1w", "dseg"))
    if truth.exists():
        nib.save(lps(truth).slicer[box], target / truth.name)


def _box(inside: NDArray[np.bool_]) -> tuple[slice, ...]:
    parts, _ = ndimage.label(inside)
    places = np.argwhere(parts == np.bincount(parts[inside]).argmax())
    first, last = places.min(axis=0), places.max(axis=0)
    padding = np.rint((last - first) * PADDING / 100).astype(int)
    ends = np.minimum(np.maximum(last + padding, last + 1), inside.shape)
    return tuple(slice(int(a), int(b)) for a, b in zip(np.maximum(first - padding, 0), ends, strict=True))


def test_each_stage_is_what_calibrating_it_by_hand_gives(
    calibrated: tuple[Path, list[str]], data: Path, tmp_path: Path
) -> None:
    whole, crops = tmp_path / "whole", tmp_path / "crops"
    mask, regions = stages(tmp_path)
    shutil.copytree(data, whole, ignore=shutil.ignore_patterns("*_dseg*"))
    for scan in sorted(data.glob("*_T1w*")):
        crop_by_hand(scan, open_bundle(mask), crops)
    expected = {
        "mask": open_bundle(module.calibrate(mask, whole, tmp_path / "mask", silent)),
        "regions": open_bundle(module.calibrate(regions, crops, tmp_path / "regions", silent)),
    }
    found = Cascade(calibrated[0])
    found.verify()
    assert found.bundles.keys() == expected.keys()
    for role, bundle in found.bundles.items():
        assert bundle.manifest.files == expected[role].manifest.files, role
        assert set(bundle.manifest.graphs) == {"fp32", "int8", "fp16"}
        assert untimed(bundle.manifest.gate) == untimed(expected[role].manifest.gate)
    assert {row.dice is None for row in found.mask.manifest.gate} == {True}
    assert min(row.dice or 0 for row in found.regions.manifest.gate) > 0


def untimed(rows: tuple[GateRow, ...]) -> list[GateRow]:
    return [replace(row, seconds=None) for row in rows]


def test_source_is_left_alone_and_all_else_kept(calibrated: tuple[Path, list[str]]) -> None:
    old, new = Cascade(calibrated[0].with_name("old.zip")), Cascade(calibrated[0])
    old.verify()
    assert replace(new.manifest, stages={}) == replace(old.manifest, stages={})
    added = {"graphs", "files", "gate", "calibration"}
    for role, bundle in old.bundles.items():
        assert set(bundle.manifest.graphs) == {"fp32"}
        later = new.bundles[role]
        assert all(later.read(name) == bundle.read(name) for name in bundle.manifest.files)
        for name, value in vars(bundle.manifest).items():
            assert name in added or getattr(later.manifest, name) == value


def test_scans_are_recorded_as_they_are_not_their_crops(calibrated: tuple[Path, list[str]], data: Path) -> None:
    for bundle in Cascade(calibrated[0]).bundles.values():
        record = bundle.manifest.calibration
        scans = [[scan["name"] for scan in record[key]] for key in ("calibrated_on", "evaluated_on")]
        assert scans == [["sub-0_T1w.nii.gz"], ["sub-1_T1w.nii.gz", "sub-2_T1w.nii.gz"]]
        for scan in (*record["calibrated_on"], *record["evaluated_on"]):
            assert scan["sha256"] == file_sha256(data / scan["name"])


def test_lines_say_which_stage(calibrated: tuple[Path, list[str]]) -> None:
    first, *lines, last = calibrated[1]
    assert first.startswith("calibrating on sub-0_T1w.nii.gz")
    assert last == f"writing {calibrated[0]}"
    roles = [line.split()[0] for line in lines]
    assert list(dict.fromkeys(roles)) == ["cropping", "mask:", "regions:"]
    assert roles == sorted(roles)
    assert any(line.startswith("regions: quantising to int8 with") for line in lines)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_segmenting_uses_the_new_graphs(
    precision: str, calibrated: tuple[Path, list[str]], data: Path, cli: CommandLine, tmp_path: Path
) -> None:
    scan, path = data / "sub-1_T1w.nii.gz", calibrated[0]
    arguments = ["--profile", "balanced", "--backend", "onnxruntime", "--precision", precision]
    ran = cli("segment", scan, "-o", tmp_path, "-m", path, *arguments)
    assert ran.code == 0, ran.err
    record = json.loads((tmp_path / "sub-1_provenance.json").read_text())["stages"]
    for role, bundle in Cascade(path).bundles.items():
        rows = [
            row
            for row in bundle.manifest.gate
            if (row.backend, row.precision, row.profile) == ("onnxruntime", precision, "balanced")
        ]
        assert record[role]["backend"]["precision"] == precision
        assert record[role]["backend"]["gate"].split(":")[0] == ("passed" if rows[0].passed else "failed")


def test_info_shows_both_tables(calibrated: tuple[Path, list[str]], cli: CommandLine) -> None:
    ran = cli("info", calibrated[0])
    assert (ran.code, ran.err) == (0, "")
    parts = ran.out.split("stage regions\n")
    assert [part.count("\naccuracy gate\n") for part in parts] == [1, 1]
    assert [part.count("\ncalibration\n") for part in parts] == [1, 1]


@pytest.mark.usefixtures("only_fp32")
@pytest.mark.parametrize("name", ["tiny.bundle", "tiny.zip"])
def test_in_place_by_its_name_in_the_store(
    name: str, data: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEMUSE_HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    made = cascade_at(tmp_path / name)
    path = tmp_path / "models" / name
    made.rename(path)
    ran = cli("calibrate", name.removesuffix(".zip"), "--data", data)
    assert (ran.code, ran.out) == (0, f"{path}\n"), ran.err
    assert [entry.name for entry in path.parent.iterdir()] == [name]
    Cascade(path).verify()
    assert all("int8" in bundle.manifest.graphs for bundle in Cascade(path).bundles.values())


def fail_at(call: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, but its `call`-th call raises."""
    calls = iter(range(1, 99))

    def function(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise InputError("planted")
        return real(*arguments, **named)

    return function


@pytest.mark.usefixtures("only_fp32")
@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_a_failure_in_the_second_stage_leaves_the_cascade_as_it_was(
    zipped: bool, data: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cascade_at(tmp_path / ("tiny.zip" if zipped else "tiny.bundle"))
    before = snapshot(tmp_path)
    monkeypatch.setattr(module, "calibration_patches", fail_at(2, module.calibration_patches))
    ran = cli("calibrate", path, "--data", data)
    assert (ran.code, ran.out) == (2, "")
    assert "\nmask: " in ran.err
    assert ran.err.endswith("\nedgemuse: planted\n")
    assert snapshot(tmp_path) == before


@pytest.mark.usefixtures("only_fp32")
def test_a_failure_in_writing_leaves_the_cascade_as_it_was(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cascade_at(tmp_path / "tiny.bundle")
    before = snapshot(tmp_path)
    rename = Path.rename

    def fail(source: Path, target: Path) -> Path:
        if target == path and ".tmp-" in str(source):
            raise OSError(28, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(Exception, match="No space left on device"):
        module.calibrate(path, data, path, silent)
    monkeypatch.undo()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_files_of_others_are_not_deleted(zipped: bool, data: Path, cli: CommandLine, tmp_path: Path) -> None:
    path = tiny_cascade(tmp_path / "tiny.bundle")
    (path / "mask" / "notes.txt").write_text("mine")
    if zipped:
        path = zip_bundle(path, tmp_path / "tiny.zip")
    before = snapshot(tmp_path)
    ran = cli("calibrate", path, "--data", data)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "replacing it would delete mask/notes.txt" in ran.err
    assert snapshot(tmp_path) == before


def test_the_built_in_model_is_not_replaced(
    data: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy stands in for it: a failure of this test must not cost the installation its model."""
    copy = tmp_path / "edgemuse-t1.zip"
    shutil.copy(BUILT_IN, copy)
    for module_name in ("edgemuse.export.writer", "edgemuse.runtime.model.store"):
        monkeypatch.setattr(f"{module_name}.BUILT_IN", copy)
    monkeypatch.setattr(module, "_calibrated", lambda *_: pytest.fail("calibrated it"))
    ran = cli("calibrate", "edgemuse-t1", "--data", data)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "comes with edgemuse and is not replaced; choose another output with --output" in ran.err
    assert file_sha256(copy) == file_sha256(BUILT_IN)


def test_a_scan_without_a_brain_stops_it_before_anything_is_measured(data: Path, tmp_path: Path) -> None:
    labels = Label(0, 0, "background"), Label(1, 0, "background too")
    heard: list[str] = []
    with pytest.raises(InputError, match=r"sub-0_T1w\.nii\.gz: tiny found no brain"):
        module.calibrate(tiny_cascade(tmp_path / "blind", mask={"labels": labels}), data, tmp_path / "n", heard.append)
    assert heard[1:] == ["cropping scan 1 of 3 to the mask"]
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((0, 77), "holds none of the model's structures"),
        ((10, 0), "no structure lies where tiny found the brain"),
        ((0.5, 1), "values between whole numbers"),
    ],
)
def test_a_useless_truth_is_named(values: tuple[float, float], reason: str, tmp_path: Path) -> None:
    """`values`: in a corner far from the head, and elsewhere."""
    head = np.pad(head_image(), 10)
    write_scan(tmp_path / "a_T1w.nii.gz", head)
    labels = np.full(head.shape, values[1], np.float32)
    labels[0, 0, 0] = values[0]
    truth = write_scan(tmp_path / "a_dseg.nii.gz", labels)
    (tmp_path / "work").mkdir()
    with pytest.raises(InputError, match=reason) as raised:
        stage_inputs(Cascade(tiny_cascade(tmp_path / "tiny")), find_scans(tmp_path), tmp_path / "work", silent)
    assert str(raised.value).startswith(str(truth))


@pytest.mark.parametrize("orientation", ["LPS", "RAS", None])
def test_a_mask_network_that_does_not_turn_scans_gets_them_turned(
    orientation: str | None, data: Path, tmp_path: Path
) -> None:
    cascade = Cascade(tiny_cascade(tmp_path / "tiny", mask={"orientation": orientation}))
    (tmp_path / "work").mkdir()
    sources = find_scans(data)
    inputs = stage_inputs(cascade, sources, tmp_path / "work", silent)["mask"]
    if orientation is not None:
        assert inputs == [replace(source, truth=None) for source in sources]
        return
    for source, turned in zip(sources, inputs, strict=True):
        assert asdict(turned) | {"path": source.path} == asdict(Source(source.path, source.sha256, None))
        found, expected = nib.load(turned.path), lps(source.path)
        np.testing.assert_array_equal(found.get_fdata(), expected.get_fdata())
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
