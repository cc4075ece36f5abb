"""Cascades from file to file: what NiChart_DLMUSE's functions give around the same two networks."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import nichart
import numpy as np
import pytest
from bundles import CommandLine, head_image, snapshot, tiny_cascade, write_scan, zip_bundle

from edgemuse.engines.errors import BundleError, InputError, MemoryLimitError
from edgemuse.runtime.model.cascade import CASCADE, Cascade, open_model
from edgemuse.runtime.pipeline.cascade import CascadeSegmenter
from edgemuse.runtime.pipeline.open import open_segmenter
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.pipeline.result import Segmentation
from edgemuse.runtime.pipeline.segmenter import Segmenter
from edgemuse.runtime.regions.labels import Label, to_indices

CPU = Options("reference", "openvino", "fp32", cache_dir=None)
AFFINE = np.array([[0, 0.1, -1.1, 11], [-1.2, 0, 0, -22.5], [0, 1.5, 0.1, 33], [0, 0, 0, 1]])
"""Neither LPS nor 1 mm."""


def float_head(shape: tuple[int, int, int] = (34, 38, 30)) -> np.ndarray:
    """A head with an island. Float, because upstream rounds the intensities of integer files."""
    image = head_image(shape).astype(np.float32)
    image[:4, :4, :4] = 800
    return image


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cascade(tmp_path_factory.mktemp("model") / "tiny.bundle")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write_scan(tmp_path / "sub-01_T1w.nii.gz", float_head(), affine=AFFINE)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capfd, tmp_path / "cache")


def segment(model: Path, scan: Path, options: Options = CPU) -> Segmentation:
    with open_segmenter(model, options) as segmenter:
        return segmenter.segment(scan)


def upstream(cascade: Cascade, scan: Path, work: Path) -> np.ndarray:
    """The label map that NiChart_DLMUSE's functions make, file by file, with our networks in place of its own."""
    masks, reorient = nichart.module("MaskImage"), nichart.module("ReorientImage").reorient_img
    path = {name: str(work / f"{name}.nii.gz") for name in ("lps", "mask", "masked", "classes", "labels", "all", "out")}
    work.mkdir()
    reorient(str(scan), "LPS", path["lps"])
    run_to_file(cascade.mask, path["lps"], path["mask"])
    masks.mask_img(path["lps"], path["mask"], path["masked"])
    run_to_file(cascade.regions, path["masked"], path["classes"])
    table = work / "map.csv"
    rows = [f"{label.index},{label.number},{label.name}" for label in cascade.regions.labels]
    table.write_text("\n".join(["IndexMUSE,IndexConsecutive,ROINameMUSE", *rows]))
    nichart.module("RelabelROI").relabel_rois(
        path["classes"], str(table), "IndexConsecutive", "IndexMUSE", path["labels"]
    )
    masks.combine_masks(path["labels"], path["mask"], path["all"])
    reorient(path["all"], str(scan), path["out"])
    return np.asanyarray(nib.load(path["out"]).dataobj)


def run_to_file(bundle: object, scan: str, output: str) -> None:
    with Segmenter(bundle, CPU) as segmenter:
        found = segmenter.segment(scan)
    nib.save(nib.Nifti1Image(found.classes.astype(np.uint8), found.scan.affine), output)


@pytest.mark.parametrize(
    "affine", [AFFINE, np.diag([1, 1, 1, 1.0]), np.diag([-1, -1, 1.2, 1])], ids=["SLA", "RAS", "LPS"]
)
def test_labels_are_upstreams(affine: np.ndarray, model: Path, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "t1.nii.gz", float_head(), affine=affine)
    expected = upstream(Cascade(model), scan, tmp_path / "work")
    found = segment(model, scan)
    assert {0, 1} < set(np.unique(expected).tolist())  # 1: what was filled in
    np.testing.assert_array_equal(to_indices(found.classes, found.labels), expected)


def test_files(model: Path, scan: Path, cli: CommandLine, tmp_path: Path) -> None:
    ran = cli("segment", scan, "--model", model, "-o", tmp_path / "out", "--backend", "openvino")
    assert (ran.code, ran.err) == (0, "")
    assert len(ran.out.splitlines()) == 5
    labels = np.asanyarray(nib.load(tmp_path / "out" / "sub-01_dseg.nii.gz").dataobj)
    np.testing.assert_array_equal(labels, to_indices((found := segment(model, scan)).classes, found.labels))
    assert "1\tfilled\t" in (tmp_path / "out" / "sub-01_dseg.tsv").read_text()
    record = json.loads((tmp_path / "out" / "sub-01_provenance.json").read_text())
    opened = Cascade(model)
    assert record["model"] == {"name": "tiny cascade", "sha256": opened.sha256}
    assert record["stages"]["mask"]["model"]["sha256"] == opened.mask.sha256
    assert record["stages"]["regions"]["model"]["sha256"] == opened.regions.sha256
    assert record["stages"]["regions"]["profile"]["tiles"] >= 1
    assert {"mask infer", "regions infer", "regions paste", "write"} <= record["seconds"].keys()
    assert record["mask"]["voxels"] > 0
    assert record["memory"]["planned_bytes"] > 0


def test_progress_never_goes_back(model: Path, scan: Path) -> None:
    heard = []
    with open_segmenter(model, CPU) as segmenter:
        segmenter.segment(scan, lambda done, total: heard.append((done, total)))
    assert [done for done, _ in heard] == list(range(1, len(heard) + 1))
    assert heard[-1][0] == heard[-1][1]
    assert all(done <= total for done, total in heard)


def test_largest_component_alone(scan: Path, tmp_path: Path) -> None:
    all_parts = segment(tiny_cascade(tmp_path / "all.bundle"), scan).classes
    largest = segment(tiny_cascade(tmp_path / "largest.bundle", keep_largest=True), scan).classes
    assert all_parts[:3, :3, :3].any()
    assert not largest[:3, :3, :3].any()
    assert largest.any()


def test_without_filling(scan: Path, tmp_path: Path) -> None:
    found = segment(tiny_cascade(tmp_path / "plain.bundle", fill=None), scan)
    assert len(found.labels) == 6
    assert found.classes.max() <= 5


def test_a_zipped_cascade_gives_the_same(model: Path, scan: Path, tmp_path: Path) -> None:
    zipped = tiny_cascade(tmp_path / "tiny.zip")
    by_hand = zip_bundle(model, tmp_path / "hand.zip")
    expected = segment(model, scan).classes
    for path in (zipped, by_hand):
        opened = open_model(path)
        opened.verify()
        assert isinstance(opened, Cascade)
        np.testing.assert_array_equal(segment(path, scan).classes, expected)


def test_several_scans_give_what_each_gives(model: Path, scan: Path, tmp_path: Path) -> None:
    other = write_scan(tmp_path / "other.nii.gz", float_head((28, 30, 32)))
    expected = [segment(model, path).classes for path in (scan, other)]
    with open_segmenter(model, CPU) as segmenter:
        found = [segmenter.segment(path).classes for path in (scan, other, scan)]
    for one, wanted in zip(found, [*expected, expected[0]], strict=True):
        np.testing.assert_array_equal(one, wanted)


def test_engines_are_kept_only_where_both_fit(model: Path, scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    monkeypatch.setattr(Segmenter, "close", lambda self: closed.append(self))
    with CascadeSegmenter(Cascade(model), CPU) as segmenter:
        planned = segmenter.plan(segmenter.segment(scan).scan)  # opens the engines, after closing what there was
        closed.clear()
        segmenter.segment(scan)
        assert closed == []
        monkeypatch.setattr("edgemuse.runtime.pipeline.cascade.memory_limit", lambda max_ram: planned.total)
        segmenter.segment(scan)
        assert closed == [segmenter.mask, segmenter.regions]


def test_no_brain(scan: Path, tmp_path: Path) -> None:
    """A mask network that says background everywhere."""
    labels = Label(0, 0, "background"), Label(1, 0, "background too")
    model = tiny_cascade(tmp_path / "blind.bundle", mask={"labels": labels})
    with pytest.raises(InputError, match="found no brain"):
        segment(model, scan)


def test_too_little_memory(model: Path, scan: Path) -> None:
    with pytest.raises(MemoryLimitError, match="need"):
        segment(model, scan, Options("reference", "openvino", "fp32", max_ram=0.01, cache_dir=None))


def test_info(model: Path, cli: CommandLine) -> None:
    ran = cli("info", model)
    assert (ran.code, ran.err) == (0, "")
    assert "tiny cascade  (licence: CC0-1.0)" in ran.out
    assert "becomes 1 filled inside the mask" in ran.out
    assert ran.out.count("  patch ") == 2


MANIFESTS = {
    "no orientation": {"orientation": "LPX"},
    "padding": {"padding_percent": -1},
    "stages": {"stages": {}},
    "hash": {"stages": {"mask": "0" * 64, "regions": "1" * 64}},
    "fill": {"fill": {"number": 3, "index": 1, "name": "taken"}},
    "version": {"format_version": 9},
    "format": {"format": "something else"},
    "range": {"plausible_mm3": [1, "b"]},
    "name": {"name": "two\nlines"},
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_bad_cascades(change: dict[str, object], tmp_path: Path, scan: Path, cli: CommandLine) -> None:
    model = tiny_cascade(tmp_path / "bad.bundle")
    path = model / CASCADE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError):
        open_model(model)
    ran = cli("segment", scan, "--model", model, "-o", tmp_path / "out")
    assert ran.code == 2
    assert len(ran.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_stage(tmp_path: Path) -> None:
    model = tiny_cascade(tmp_path / "bad.bundle")
    before = snapshot(model)
    graph = model / "regions" / "fp32.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    assert snapshot(model).keys() == before.keys()
    with pytest.raises(BundleError, match="checksum"):
        open_model(model).verify()


def test_one_tile_a_stage_where_memory_allows(model: Path, scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Profile `fast`: the tile fits the crop, so no engine is kept for the next scan."""
    closed = []
    close = Segmenter.close
    monkeypatch.setattr(Segmenter, "close", lambda self: (closed.append(self), close(self)))
    with CascadeSegmenter(Cascade(model), Options("fast", "openvino", "fp32", cache_dir=None)) as segmenter:
        found = segmenter.segment(scan)
        assert {segmenter.mask, segmenter.regions} <= set(closed)
    assert [found.provenance["stages"][role]["profile"]["tiles"] for role in ("mask", "regions")] == [1, 1]
    balanced = segment(model, scan, Options("balanced", "openvino", "fp32", cache_dir=None))
    assert (found.classes == balanced.classes).mean() > 0.98


def test_no_more_memory_than_allowed_is_planned_for_large_tiles(model: Path, scan: Path) -> None:
    with CascadeSegmenter(Cascade(model), Options("fast", "openvino", "fp32", cache_dir=None)) as segmenter:
        least = segmenter.plan(segmenter.segment(scan).scan).total
    for spare in (1.05, 1.5):
        limit = least * spare
        options = Options("fast", "openvino", "fp32", max_ram=limit / 2**30, cache_dir=None)
        assert segment(model, scan, options).provenance["memory"]["planned_bytes"] <= limit
