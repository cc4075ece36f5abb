"""Bundles: what is damaged, foreign or malicious is refused in one line; a directory and a zip are the same."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import (
    CommandLine,
    Tiny,
    edit_manifest,
    gate_row,
    little_memory,
    npz_bytes,
    replace_file,
    snapshot,
    tiny_bundle,
    tiny_graph,
    write_scan,
)
from bundles import zip_bundle as zipped
from hostile import overlapping, zip64

from edgemuse.engines.errors import BundleError, MemoryLimitError
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.model.manifest import MANIFEST, Manifest, parse_manifest
from edgemuse.runtime.network.memory import check_memory, plan_memory
from edgemuse.runtime.scan.nifti import open_scan


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "tiny.bundle")


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_bundle(tmp_path_factory.mktemp("document") / "tiny.bundle", mirror_axes=(0, 2))
    edit_manifest(folder, gate=[asdict(gate_row())])
    return json.loads((folder / MANIFEST).read_text())


def refusal(path: Path) -> str:
    """The one line with which the bundle at `path` is refused, when it is opened or when all of it is read."""
    with pytest.raises(BundleError) as caught:
        read_all(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message


def read_all(path: Path) -> None:
    opened = open_bundle(path)
    opened.verify()
    opened.head()


def parse(document: Any) -> Manifest:
    return parse_manifest(json.dumps(document).encode(), Path("b"))


def test_bundle_is_read_whole(bundle: Path) -> None:
    opened = open_bundle(bundle)
    opened.verify()
    head = opened.head()
    assert opened.graph("fp32") == (bundle / "fp32.onnx").read_bytes()
    assert head is not None
    assert (head.weight.shape, head.bias.shape) == ((6, 4), (6,))
    assert [label.number for label in opened.manifest.labels] == list(range(6))


def test_manifest_survives_writing_and_reading(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert parse_manifest(manifest.to_json().encode(), bundle) == manifest


def test_zip_equals_directory(bundle: Path, tmp_path: Path) -> None:
    folder, archive = open_bundle(bundle), open_bundle(zipped(bundle, tmp_path / "tiny.zip"))
    archive.verify()
    assert archive.manifest == folder.manifest
    assert archive.sha256 == folder.sha256
    assert archive.graph("fp32") == folder.graph("fp32")
    heads = folder.head(), archive.head()
    assert heads[0] is not None
    assert heads[1] is not None
    np.testing.assert_array_equal(heads[0].weight, heads[1].weight)


def test_zip_segments_as_the_directory_does(bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scan, cli = write_scan(tmp_path / "t1.nii.gz"), CommandLine(capfd, tmp_path / "cache")
    for model, output in ((bundle, "a"), (zipped(bundle, tmp_path / "tiny.zip"), "b")):
        assert cli("segment", scan, "-m", model, "-o", tmp_path / output).code == 0
    a, b = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    assert a["t1_dseg.nii.gz"] == b["t1_dseg.nii.gz"]


def test_head_is_absent_where_it_is_not_deferred(tmp_path: Path) -> None:
    opened = open_bundle(tiny_bundle(tmp_path / "b", deferred=False))
    assert opened.head() is None
    assert list(opened.manifest.files) == ["fp32.onnx"]


@pytest.mark.parametrize("name", ["fp32.onnx", "head.npz"])
def test_changed_byte_is_noticed(name: str, bundle: Path) -> None:
    raw = bytearray((bundle / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (bundle / name).write_bytes(raw)
    assert f"{name} has a wrong checksum" in refusal(bundle)


@pytest.mark.parametrize("name", ["fp32.onnx", "head.npz"])
def test_cut_file_is_noticed(name: str, bundle: Path) -> None:
    (bundle / name).write_bytes((bundle / name).read_bytes()[:-1])
    assert f"{name} has a wrong checksum" in refusal(bundle)


@pytest.mark.parametrize("name", ["fp32.onnx", "head.npz"])
def test_longer_file_is_noticed(name: str, bundle: Path) -> None:
    size = (bundle / name).stat().st_size
    (bundle / name).write_bytes((bundle / name).read_bytes() + b"x")
    assert f"{name} is larger than the {size} bytes expected" in refusal(bundle)


@pytest.mark.parametrize("name", ["fp32.onnx", "head.npz"])
def test_missing_file_is_noticed(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    assert f"{name} cannot be read" in refusal(bundle)


def test_folder_in_place_of_a_file(bundle: Path) -> None:
    (bundle / "head.npz").unlink()
    (bundle / "head.npz").mkdir()
    assert "head.npz cannot be read" in refusal(bundle)


def test_link_to_the_same_content_is_followed(bundle: Path, tmp_path: Path) -> None:
    """What was read is what was checked, so where it lay makes no difference."""
    (bundle / "fp32.onnx").rename(tmp_path / "elsewhere")
    (bundle / "fp32.onnx").symlink_to(tmp_path / "elsewhere")
    open_bundle(bundle).verify()


def test_unlisted_file_is_not_read(bundle: Path) -> None:
    (bundle / "extra").write_text("x")
    with pytest.raises(BundleError, match="extra is not listed"):
        open_bundle(bundle).read("extra")


def test_precision_that_is_not_stored(bundle: Path) -> None:
    with pytest.raises(BundleError, match="no int8 graph is stored, only fp32"):
        open_bundle(bundle).graph("int8")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing", "no such bundle"), ("empty", "there is no bundle.json"), ("nnunet", "edgemuse export")],
)
def test_no_bundle_at_all(name: str, reason: str, tmp_path: Path) -> None:
    if name != "missing":
        (tmp_path / name).mkdir()
    if name == "nnunet":
        (tmp_path / name / "plans.json").write_text("{}")
    assert reason in refusal(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no zip" * 99, random.Random(1).randbytes(500)])
def test_file_that_is_no_zip(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "b.zip").write_bytes(content)
    assert "neither a bundle directory nor a zip file" in refusal(tmp_path / "b.zip")


def test_zip_without_a_manifest(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    assert "no whole bundle" in refusal(tmp_path / "b.zip")


def test_damaged_zips_raise_bundle_error_or_are_whole(bundle: Path, tmp_path: Path) -> None:
    whole, rng = zipped(bundle, tmp_path / "whole.zip").read_bytes(), random.Random(3)
    refused = 0
    for case in range(150):
        raw = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path = tmp_path / f"{case}.zip"
        path.write_bytes(raw)
        try:
            read_all(path)
        except BundleError:
            refused += 1
    assert refused > 75


def test_zip_bomb_is_not_unpacked(bundle: Path, tmp_path: Path) -> None:
    """300 MB of zeros, 1000 times as large as what they are packed in."""
    (bundle / "fp32.onnx").write_bytes(bytes(300 << 20))
    path = zipped(bundle, tmp_path / "bomb.zip")
    with little_memory():
        assert "more than 100 times as large when it is unpacked" in refusal(path)


@pytest.mark.parametrize("pack", [True, False])
def test_file_is_read_no_further_than_listed(pack: bool, bundle: Path, tmp_path: Path) -> None:
    """12 MB where 743 bytes are listed."""
    (bundle / "fp32.onnx").write_bytes(bytes(12 << 20))
    path = zipped(bundle, tmp_path / "bomb.zip") if pack else bundle
    with little_memory():
        assert "fp32.onnx is larger than" in refusal(path)


def test_checking_takes_a_block_at_a_time(bundle: Path) -> None:
    replace_file(bundle, "fp32.onnx", bytes(40 << 20))
    with little_memory():
        open_bundle(bundle).verify()


def test_manifest_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, b" " * ((16 << 20) + 1))
    assert "bundle.json is larger than the 16777216 bytes expected" in refusal(tmp_path / "bomb.zip")


def test_zip_of_thousands_of_files_is_refused(bundle: Path, tmp_path: Path) -> None:
    path = zipped(bundle, tmp_path / "many.zip")
    with zipfile.ZipFile(path, "a") as archive:
        for index in range(1200):
            archive.writestr(f"f{index}", b"")
    assert "1203 files where 1000 are expected at most" in refusal(path)


@pytest.mark.parametrize("claimed", [2 << 20, 1 << 40, (1 << 64) - 1])
def test_zip_with_a_huge_list_is_refused_before_it_is_read(claimed: int, bundle: Path, tmp_path: Path) -> None:
    path = zip64(zipped(bundle, tmp_path / "b.zip"), claimed)
    with little_memory(1 << 20):
        assert f"its list of members has {claimed} bytes" in refusal(path)


def test_members_that_share_their_bytes_are_refused(bundle: Path, tmp_path: Path) -> None:
    path = overlapping(zipped(bundle, tmp_path / "b.zip"), "fp32.onnx", 50)
    assert "files that overlap" in refusal(path)


def test_members_of_one_name_are_refused(bundle: Path, tmp_path: Path) -> None:
    path = zipped(bundle, tmp_path / "b.zip")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("fp32.onnx", b"another")
    assert "two files of one name" in refusal(path)


def test_member_that_claims_another_size_is_refused(bundle: Path, tmp_path: Path) -> None:
    """The size that counts is in the list; the file itself has more, or fewer bytes."""
    size = (bundle / "fp32.onnx").stat().st_size
    for claimed in (size - 10, size + 10):
        path = zipped(bundle, tmp_path / f"{claimed}.zip", zipfile.ZIP_STORED)
        raw = path.read_bytes()
        start = raw.index(b"PK\x01\x02")
        entry = raw.index(struct.pack("<L", size), raw.index(b"fp32.onnx", start) - 46)
        path.write_bytes(raw[: entry + 4] + struct.pack("<L", claimed) + raw[entry + 8 :])
        assert "fp32.onnx" in refusal(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes by name")
@pytest.mark.parametrize("name", [MANIFEST, "fp32.onnx"])
def test_pipe_in_place_of_a_file_is_not_waited_for(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    reason = "it is not a file" if name != MANIFEST else "there is no bundle.json"
    assert reason in refusal(bundle)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 22\n"


@pytest.mark.parametrize("name", ["fp32.onnx", "head.npz", "b.zip"])
def test_pointer_in_place_of_a_file_is_named(name: str, bundle: Path) -> None:
    (bundle / name).write_bytes(POINTER)
    assert "a pointer of Git LFS" in refusal(bundle / name if name == "b.zip" else bundle)


@pytest.mark.parametrize("depth", [40, 300, 900, 20_000])
@pytest.mark.parametrize("key", ["source", "gate", "labels"])
def test_nested_records_are_refused(depth: int, key: str, bundle: Path) -> None:
    text = json.dumps(json.loads((bundle / MANIFEST).read_text()) | {key: "@@"})
    (bundle / MANIFEST).write_text(text.replace('"@@"', '{"a":' * depth + "1" + "}" * depth))
    assert "nested" in refusal(bundle)


@pytest.mark.parametrize("piece", ["[],", "{},", "0,"])
def test_manifest_of_millions_of_values_is_refused(piece: str, bundle: Path) -> None:
    (bundle / MANIFEST).write_text(f'{{"a": [{piece * ((15 << 20) // len(piece))} 0]}}')
    with little_memory(64 << 20):
        assert "it has too many values" in refusal(bundle)


@pytest.mark.parametrize("value", ["x" * 1001, "x" * (1 << 20), ["x" * 100_000] * 20, 10**4000])
def test_huge_value_is_refused_in_a_short_line(value: object, document: Any) -> None:
    with pytest.raises(BundleError, match="is not a line of printable text") as caught:
        parse(document | {"name": value})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    ["", "not json", "[" * 100_000, "\xff\xfe", '{"a": ' * 5000, "1" * 5000, '{"format": "edgemuse-bundle"', "\x00"],
)
def test_manifest_that_is_no_json(text: str, bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(text.encode("latin-1"))
    assert "bundle.json is not valid JSON" in refusal(bundle)


@pytest.mark.parametrize("text", ["[]", "null", "7", "NaN", '"text"', "{}", '{"format": "other"}', '{"format": []}'])
def test_manifest_of_something_else(text: str, bundle: Path) -> None:
    (bundle / MANIFEST).write_text(text)
    assert "does not describe an edgemuse bundle" in refusal(bundle)


@pytest.mark.parametrize("version", [2, 0, -1, "1", None, 1.5, [], {}])
def test_other_format_version(version: object, bundle: Path) -> None:
    edit_manifest(bundle, format_version=version)
    assert "this edgemuse reads 1; upgrade edgemuse or export again" in refusal(bundle)


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "../head.npz", "a/b", "a\\b", "..", ".", "", "C:head", "C:\\x", "a\0b", ".hidden", "a\n"),
        *("x" * 101, MANIFEST, "-rf", "~", " a", "ä"),
    ],
)
def test_file_names_stay_inside_the_bundle(name: str, document: Any) -> None:
    files = document["files"] | {name: {"bytes": 1, "sha256": "0" * 64}}
    with pytest.raises(BundleError, match="is not a plain file name inside the bundle") as caught:
        parse(document | {"files": files})
    assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match="is not a plain file name inside the bundle"):
        parse(document | {"graphs": {"fp32": name}})


def paths_of(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside `node`, containers and leaves."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths_of(value, (*path, key))


def changed(document: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A copy of `document` after `change(container, key)` at `path`."""
    result = copy.deepcopy(document)
    node = result
    for key in path[:-1]:
        node = node[key]
    change(node, path[-1])
    return result


def test_every_key_is_needed(document: Any) -> None:
    """Without any one key the manifest is refused, but for the records, colours and the like that are optional."""
    optional = {("network", "mirror_axes", 0), ("network", "mirror_axes", 1), ("gate",), ("gate", 0)}
    for path in paths_of(document):
        if path[0] in ("source", "verification", "calibration") or path[-1] in ("color", "single") or path in optional:
            continue
        with pytest.raises(BundleError) as caught:
            parse(changed(document, path, lambda node, key: node.pop(key)))
        assert "\n" not in str(caught.value), path


STRANGE = [None, [], {}, "", "x", "\n", -1, 0, 1, True, 1.5, 1e300, 1e-300, 10**30, 10**400, float("nan"), float("inf")]


def test_strange_values_are_refused_or_understood(document: Any) -> None:
    """Any value in any place: BundleError, or a manifest that can be written and read again. Nothing else."""
    accepted = 0
    for path in paths_of(document):
        for value in STRANGE:
            try:
                manifest = parse(changed(document, path, lambda node, key, value=value: node.update({key: value})
                                         if isinstance(node, dict) else node.__setitem__(key, value)))  # fmt: skip
            except BundleError as error:
                assert len(str(error).splitlines()) == 1, (path, value)  # noqa: PT017
                continue
            accepted += 1
            if path[0] not in ("source", "verification"):
                assert parse_manifest(manifest.to_json().encode(), Path("b")) == manifest, (path, value)
    assert accepted < 0.2 * sum(len(STRANGE) for _ in paths_of(document))


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("orientation", "LPP", "not three axis codes"),
        ("orientation", "lps", "not three axis codes"),
        ("transpose", [0, 0, 1], "not a permutation"),
        ("spacing", [1, 0, 1], "is outside 0.001 to 1000 mm"),
        ("spacing", [1, 1e-300, 1], "is outside 0.001 to 1000 mm"),
        ("patch", [16, 16], "not enough values"),
        ("patch", [16, 16, 5000], "not a whole number from 1 to 4096"),
        ("stride", [1, 1, 5], "not a multiple of stride"),
        ("mirror_axes", [0, 0], "names an axis twice"),
        ("mirror_axes", [3], "not a whole number from 0 to 2"),
        ("classes", 7, "labels must name classes 0 to 6 in order"),
        ("classes", 5, "labels must name classes 0 to 4 in order"),
        ("deferred_head", False, "one channel a class"),
    ],
)
def test_network_that_makes_no_sense(key: str, value: object, reason: str, document: Any) -> None:
    with pytest.raises(BundleError, match=reason):
        parse(changed(document, ("network", key), lambda node, name: node.__setitem__(name, value)))


def test_labels_must_be_in_the_order_of_their_classes(document: Any) -> None:
    rows = document["labels"]
    with pytest.raises(BundleError, match="labels must name classes 0 to 5 in order"):
        parse(document | {"labels": [rows[1], rows[0], *rows[2:]]})


def test_head_must_be_listed_if_it_is_deferred(document: Any) -> None:
    files = {name: entry for name, entry in document["files"].items() if name != "head.npz"}
    with pytest.raises(BundleError, match=r"head\.npz not listed under files"):
        parse(document | {"files": files})


def test_only_precisions_that_exist_have_graphs(document: Any) -> None:
    with pytest.raises(BundleError, match="'fp33' is no precision of fp32, fp16, int8"):
        parse(document | {"graphs": document["graphs"] | {"fp33": "fp32.onnx"}})


def test_gate_is_read_as_it_was_written(document: Any) -> None:
    assert parse(document).gate == (gate_row(),)
    failed = gate_row(failures=("too far", "and too slow"), agreement=None, seconds=None, worst=None, drop=None)
    again = parse(document | {"gate": [asdict(failed)]}).gate
    assert again == (failed,)
    assert not again[0].passed


def test_bundle_without_a_gate_is_as_before(document: Any) -> None:
    manifest = parse({key: value for key, value in document.items() if key not in ("gate", "calibration")})
    assert (manifest.gate, manifest.calibration) == ((), {})


@pytest.mark.parametrize("missing", ["agreement", "seconds"])
def test_nothing_passes_unmeasured(missing: str, document: Any) -> None:
    with pytest.raises(BundleError, match="passed without a measurement"):
        parse(document | {"gate": [asdict(gate_row()) | {missing: None}]})


def test_fp32_is_the_graph_that_must_be_there(document: Any) -> None:
    with pytest.raises(BundleError, match="no fp32 graph is named"):
        parse(document | {"graphs": {"fp16": "fp32.onnx"}})


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("wrapped", [True, False])
def test_pickles_are_refused_and_never_run(wrapped: bool, bundle: Path, tmp_path: Path) -> None:
    trap = Trap(tmp_path / "sprung")
    data = (
        npz_bytes(weight=np.array([trap], dtype=object), bias=np.zeros(6, np.float32))
        if wrapped
        else pickle.dumps({"weight": trap})
    )
    replace_file(bundle, "head.npz", data)
    assert "head.npz cannot be read" in refusal(bundle)
    assert not (tmp_path / "sprung").exists()


def npy_bytes(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def huge_npz() -> bytes:
    """An array whose header promises 4 TB."""
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    text += b" " * (117 - len(text)) + b"\n"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("weight.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
        archive.writestr("bias.npy", npy_bytes(np.zeros(6, np.float32)))
    return out.getvalue()


HEAD = np.zeros((6, 4), np.float32)
BIAS = np.zeros(6, np.float32)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npz_bytes(weight=HEAD.T.copy(), bias=BIAS), "holds float32"),
        (npz_bytes(weight=HEAD, bias=BIAS[:5]), "holds float32"),
        (npz_bytes(weight=HEAD, bias=np.float32(1)), "holds float32"),
        (npz_bytes(weight=HEAD, bias=BIAS, fold_bias=np.float32(1)), "holds float32"),
        (npz_bytes(weight=HEAD, bias=BIAS, fold_bias=BIAS[None, :5]), "holds float32"),
        (npz_bytes(weight=HEAD, bias=BIAS, fold_bias=BIAS[None].astype(np.float64)), "holds float32"),
        (npz_bytes(weight=HEAD, bias=BIAS, fold_bias=np.repeat(BIAS[None], 7, 0)), "has 7 folds"),
        (npz_bytes(weight=HEAD, bias=BIAS, fold_bias=BIAS[None][:0]), "has 0 folds"),
        (npz_bytes(weight=HEAD, bias=BIAS, fold_bias=BIAS[None] * np.nan), "holds NaN or infinity"),
        (npz_bytes(weight=HEAD.astype(np.float64), bias=BIAS), "holds float32"),
        (npz_bytes(weight=HEAD * np.nan, bias=BIAS), "holds NaN or infinity"),
        (npz_bytes(weight=HEAD), "cannot be read"),
        (npz_bytes(weight=HEAD, bias=BIAS)[:-30], "cannot be read"),
        (npy_bytes(HEAD), "cannot be read"),
        (huge_npz(), "cannot be read"),
        (b"", "cannot be read"),
        (b"text", "cannot be read"),
    ],
    ids=[
        *("turned", "short", "scalar", "fold scalar", "fold short", "fold float64", "too many folds", "no folds"),
        *("fold nan", "float64", "nan", "no bias", "cut", "npy", "huge", "empty", "text"),
    ],
)
def test_head_of_the_wrong_kind(data: bytes, reason: str, bundle: Path) -> None:
    message = refusal(replace_file(bundle, "head.npz", data))
    assert f"head.npz {reason}" in message
    assert "\n" not in message


def test_huge_patch_is_refused_by_the_memory_plan(tmp_path: Path) -> None:
    manifest = open_bundle(tiny_bundle(tmp_path / "b", patch=(4096, 4096, 4096))).manifest
    scan = open_scan(write_scan(tmp_path / "t1.nii.gz"))
    with pytest.raises(MemoryLimitError, match="24 x 28 x 20 voxels need"):
        check_memory(scan, plan_memory(scan, manifest.network, 1000), None)


def test_huge_patch_is_refused_before_anything_of_its_size_is_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def window(patch: tuple[int, ...]) -> None:
        raise AssertionError(f"a window of {patch}")

    monkeypatch.setattr("edgemuse.runtime.network.tiles.gaussian_window", window)
    model, scan = tiny_bundle(tmp_path / "b", patch=(4096, 4096, 4096)), write_scan(tmp_path / "t1.nii.gz")
    ran = CommandLine(capfd, tmp_path / "cache")("segment", scan, "-m", model, "-o", tmp_path / "out")
    assert ran.code == 2, ran.err
    assert ran.err.startswith(f"edgemuse: {scan}: 24 x 28 x 20 voxels need")


@pytest.mark.parametrize("damage", ["checksum", "version", "no json", "absent"])
def test_commands_refuse_a_bad_bundle_in_one_line(
    damage: str, bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    match damage:
        case "checksum":
            (bundle / "fp32.onnx").write_bytes(bytes((bundle / "fp32.onnx").stat().st_size))
        case "version":
            edit_manifest(bundle, format_version=9)
        case "no json":
            (bundle / MANIFEST).write_text("{")
        case _:
            bundle = tmp_path / "nowhere"
    cli, scan = CommandLine(capfd, tmp_path / "cache"), write_scan(tmp_path / "t1.nii.gz")
    for ran in (cli("info", bundle), cli("segment", scan, "-m", bundle, "-o", tmp_path / "out")):
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
        assert ran.err.startswith(f"edgemuse: {bundle}: ")
    assert not list((tmp_path / "out").glob("*"))


def test_fields_of_the_helper_reach_the_manifest(tmp_path: Path) -> None:
    network = open_bundle(tiny_bundle(tmp_path / "b", classes=3, features=5, spacing=(1, 2, 3))).manifest.network
    assert (network.classes, network.channels_out, network.spacing) == (3, 5, (1.0, 2.0, 3.0))
    assert Tiny().channels == 4


@pytest.mark.parametrize("location", ["secret.bin", "../secret.bin", "/etc/hostname"])
def test_weights_outside_the_bundle_are_refused(location: str, tmp_path: Path) -> None:
    model = onnx.load_from_string(tiny_graph())
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.ClearField("float_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    folder = replace_file(tiny_bundle(tmp_path / "b"), "fp32.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(folder).graph("fp32")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_zip_methods_without_an_output_limit_are_refused(method: int, tmp_path: Path) -> None:
    archive = zipped(tiny_bundle(tmp_path / "b"), tmp_path / "b.zip", method)
    with pytest.raises(BundleError, match="other than deflate"):
        open_bundle(archive)


def test_compressed_head_is_refused(tmp_path: Path) -> None:
    data = io.BytesIO()
    np.savez_compressed(data, weight=np.zeros((1000, 1000), np.float32), bias=np.zeros(1000, np.float32))
    folder = replace_file(tiny_bundle(tmp_path / "b"), "head.npz", data.getvalue())
    with pytest.raises(BundleError, match="compressed"):
        open_bundle(folder).head()


def test_graph_with_other_channels_than_its_manifest_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = replace_file(tiny_bundle(tmp_path / "b"), "fp32.onnx", tiny_graph(Tiny(features=7)))
    ran = CommandLine(capfd, tmp_path / "cache")(
        "segment", write_scan(tmp_path / "t1.nii.gz"), "-m", folder, "-o", tmp_path / "out"
    )
    assert (ran.code, ran.out) == (2, "")
    assert "its manifest says" in ran.err
