"""Models that go by a name: finding them, listing and checking them, putting bundles into the store."""

from __future__ import annotations

import os
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from bundles import CommandLine, edit_manifest, run_process, snapshot, tiny_bundle, tiny_cascade, write_scan, zip_bundle
from hypothesis import given
from hypothesis import strategies as st

from edgemuse.engines.errors import BundleError, OutputError
from edgemuse.engines.files import OLD
from edgemuse.runtime.model import store as store_module
from edgemuse.runtime.model.archive import write_zip
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import open_bundle
from edgemuse.runtime.model.cascade import Cascade, open_model
from edgemuse.runtime.model.folders import store_folder
from edgemuse.runtime.model.store import add, entries, find_model, free_place
from edgemuse.runtime.pipeline.open import segment

BUILT_IN_NAME = "edgemuse-t1"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEMUSE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capfd, tmp_path / "cache")


def damaged(path: Path) -> Path:
    """Change one byte of the weights in the zip file of a bundle, so that only the SHA-256 shows it."""
    with zipfile.ZipFile(path) as archive:
        files = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    files["fp32.onnx"][100] ^= 1
    return write_zip(path, ((name, bytes(data)) for name, data in files.items()))


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEMUSE_HOME", str(tmp_path))
    assert store_folder() == tmp_path / "models"
    assert store_folder(Path("elsewhere")) == Path("elsewhere")
    monkeypatch.setenv("EDGEMUSE_HOME", "")
    assert store_folder().parts[-2:] == ("edgemuse", "models")


def test_a_name_segments_as_its_path_does(home: Path, cli: CommandLine, tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "s_T1w.nii.gz")
    bundle = tiny_bundle(tmp_path / "tiny.bundle")
    ran = cli("models", "add", bundle)
    assert (ran.code, ran.out, ran.err) == (0, f"{home / 'models' / 'tiny.zip'}\n", "")
    assert cli("segment", scan, "-o", "by-path", "-m", bundle).code == 0
    assert cli("segment", scan, "-o", "by-name", "-m", "tiny").code == 0
    results = [(tmp_path / folder / "s_dseg.nii.gz").read_bytes() for folder in ("by-path", "by-name")]
    assert results[0] == results[1]
    assert cli("info", "tiny").out == cli("info", bundle).out
    assert segment(scan, "tiny").provenance["model"]["sha256"] == open_bundle(bundle).sha256


def test_a_bundle_goes_before_a_name_and_other_folders_do_not(home: Path, tmp_path: Path) -> None:
    for name in ("tiny", "small"):
        add(tiny_bundle(tmp_path / f"{name}.bundle"), name, home / "models")
    assert find_model(Path("tiny")) == home / "models" / "tiny.zip"
    Path("tiny").mkdir()  # results, perhaps
    assert find_model(Path("tiny")) == home / "models" / "tiny.zip"
    Path("small").touch()
    assert find_model(Path("small")) == Path("small")
    tiny_bundle(Path("tiny") / "both")
    assert find_model(Path("tiny/both")) == Path("tiny/both")
    tiny_cascade(Path("other"))
    assert find_model(Path("other")) == Path("other")
    Path("empty").mkdir()
    assert find_model(Path("empty")) == Path("empty")
    assert find_model(None) == find_model(Path(BUILT_IN_NAME)) == BUILT_IN


def test_an_unknown_name_says_what_there_is(home: Path, cli: CommandLine, tmp_path: Path) -> None:
    cli("models", "add", tiny_bundle(tmp_path / "tiny.bundle"))
    ran = cli("segment", "s.nii", "-o", "out", "-m", "dlmuse")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert f"(there: {BUILT_IN_NAME}, tiny)" in ran.err
    assert "edgemuse models fetch dlmuse" in ran.err
    assert not Path("out").exists()


@given(st.text(max_size=20) | st.sampled_from(["..", "../secret", "/etc/passwd", "a/b", "a\\b", ".hidden", "x\0"]))
def test_no_name_leads_out_of_the_store(name: str) -> None:
    store = Path("absent") / "store"
    try:
        place = free_place(name, store)
    except OutputError:
        return
    assert place.parent == store
    assert place.name == f"{name}.zip"
    assert not name.startswith(".")


def test_model_dir_goes_before_the_environment(home: Path, cli: CommandLine, tmp_path: Path) -> None:
    bundle, other = tiny_bundle(tmp_path / "tiny.bundle"), tmp_path / "other"
    assert cli("models", "add", bundle, "--model-dir", other, "--name", "mine").out == f"{other / 'mine.zip'}\n"
    assert "mine" not in cli("models", "list").out
    assert "mine" in cli("models", "list", "--model-dir", other).out
    assert not home.exists()  # looking changes nothing


def test_list(home: Path, cli: CommandLine, tmp_path: Path) -> None:
    hub = {"repository": "owner/network\x1b[2J", "revision": "0123456789"}
    cli("models", "add", edit_manifest(tiny_bundle(tmp_path / "fetched"), source={"hub": hub}))
    cli("models", "add", edit_manifest(tiny_bundle(tmp_path / "own"), source={"dataset_name": "Dataset001_Own"}))
    tiny_cascade(home / "models" / "both")  # as copied there by hand
    damaged(add(tiny_bundle(tmp_path / "x"), "broken", home / "models"))
    (home / "models" / "empty.zip").touch()
    (home / "models" / "notes.txt").touch()
    tiny_bundle(home / "models" / ".on-its-way")
    ran = cli("models", "list")
    assert (ran.code, ran.err) == (0, f"models are in {home / 'models'}\n")
    header, *rows = [line.split("  ") for line in ran.out.splitlines()]
    cells = {row[0]: [cell.strip() for cell in row if cell.strip()] for row in rows}
    assert [cell.strip() for cell in header if cell.strip()] == ["name", "from", "size", "licence", "verified"]
    assert list(cells) == [BUILT_IN_NAME, "both", "broken", "empty", "fetched", "own"]
    size = f"{BUILT_IN.stat().st_size / 1e6:.1f} MB"
    assert cells[BUILT_IN_NAME][1:] == ["comes with edgemuse", size, open_bundle(BUILT_IN).manifest.license, "yes"]
    assert cells["fetched"][1:] == [r"owner/network\x1b[2J@0123456", "0.0 MB", "CC0-1.0", "yes"]
    assert cells["own"][1] == "exported from Dataset001_Own"
    assert cells["both"][-2:] == ["CC0-1.0", "yes"]
    assert cells["broken"][-1].startswith("NO: ")
    assert "checksum" in cells["broken"][-1]
    assert cells["empty"][-1].startswith("NO: ")


def test_verify_names_the_damaged_one(home: Path, cli: CommandLine, tmp_path: Path) -> None:
    for name in ("first", "second"):
        cli("models", "add", tiny_bundle(tmp_path / name))
    ran = cli("models", "verify")
    assert (ran.code, ran.out, ran.err) == (0, f"{BUILT_IN_NAME}: whole\nfirst: whole\nsecond: whole\n", "")
    damaged(home / "models" / "first.zip")
    ran = cli("models", "verify")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, f"{BUILT_IN_NAME}: whole\nsecond: whole\n", 1)
    assert ran.err.startswith(f"edgemuse: first: {home / 'models' / 'first.zip'}: ")
    assert cli("models", "verify", "second").code == 0
    assert cli("models", "verify", "second", "first").code == 2
    assert cli("models", "verify", "third").code == 2


def folder_bundle(path: Path) -> Path:
    return tiny_bundle(path / "tiny.bundle")


def zipped_bundle(path: Path) -> Path:
    return zip_bundle(tiny_bundle(path / "unzipped"), path / "tiny.zip")


def folder_cascade(path: Path) -> Path:
    return tiny_cascade(path / "tiny")


def zipped_cascade(path: Path) -> Path:
    return tiny_cascade(path / "tiny.zip")


@pytest.mark.parametrize("make", [folder_bundle, zipped_bundle, folder_cascade, zipped_cascade])
def test_add_keeps_what_is_listed_and_nothing_else(make: Any, home: Path, cli: CommandLine, tmp_path: Path) -> None:
    source = make(tmp_path)
    if source.is_dir():
        (source / "letter.txt").write_text("private")
    before = snapshot(tmp_path)
    ran = cli("models", "add", source)
    place = home / "models" / "tiny.zip"
    assert (ran.code, ran.out, ran.err) == (0, f"{place}\n", "")
    added, original = open_model(place), open_model(source)
    assert added.sha256 == original.sha256
    assert dict(added.contents()) == dict(original.contents())
    assert zipfile.ZipFile(place).namelist() == [name for name, _ in original.contents()]
    assert snapshot(tmp_path) == before | snapshot(tmp_path)
    assert isinstance(added, Cascade) == isinstance(original, Cascade)
    carried = place.rename(tmp_path / "stick.zip")
    assert cli("models", "add", carried, "--name", "again").code == 0
    assert (home / "models" / "again.zip").read_bytes() == carried.read_bytes()


def test_add_refuses_and_leaves_all_as_it_was(home: Path, cli: CommandLine, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "tiny.bundle")
    cli("models", "add", bundle)
    broken = damaged(zip_bundle(tiny_bundle(tmp_path / "b"), tmp_path / "broken.zip"))
    (tmp_path / "folder").mkdir()
    before = snapshot(tmp_path)
    for arguments, reason in (
        ([bundle], "already"),
        ([bundle, "--name", "TINY"], "already"),
        ([bundle, "--name", BUILT_IN_NAME], "already"),
        ([bundle, "--name", "../up"], "cannot be the name"),
        ([bundle, "--name", str(tmp_path / "out")], "cannot be the name"),
        ([broken], "checksum"),
        ([tmp_path / "folder"], "not a bundle"),
        ([tmp_path / "absent"], "does not exist"),
        ([bundle, "--name", "x", "--model-dir", bundle / "bundle.json" / "store"], "store"),
    ):
        ran = cli("models", "add", *arguments)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), arguments
        assert reason in ran.err
        assert snapshot(tmp_path) == before


def test_what_a_killed_one_left_goes(home: Path, cli: CommandLine, tmp_path: Path) -> None:
    """When it is old: until then it may be on its way. What else lies there stays."""
    store = home / "models"
    store.mkdir(parents=True)
    left = [".tiny.0123abcd.part", ".other.model.89abcdef.part", ".dlmuse.zip.tmp-0123abcd/dlmuse.zip/head.npz"]
    kept = [".dlmuse.download/plans.json", ".tiny.part", ".tiny.0123abcd.part~", ".new.0123abcd.part", "notes.part"]
    for name in (*left, *kept):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_bytes(b"x")
    for path in store.iterdir():
        if not path.name.startswith(".new"):
            os.utime(path, (time.time() - 2 * OLD,) * 2)
    assert cli("models", "list").code == 0
    assert len(list(store.iterdir())) == len(left) + len(kept)
    assert cli("models", "add", tiny_bundle(tmp_path / "tiny.bundle")).code == 0
    found = {path.relative_to(store).parts[0] for path in store.iterdir()}
    assert found == {"tiny.zip", *(Path(name).parts[0] for name in kept)}


def test_a_model_that_appears_meanwhile_stays(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(path: Path, files: Any) -> Path:
        (path.parent / "tiny.zip").write_bytes(b"another's")
        return write_zip(path, files)

    monkeypatch.setattr(store_module, "free_place", lambda name, store: store / f"{name}.zip")
    monkeypatch.setattr(store_module, "write_zip", late)
    with pytest.raises(OutputError, match="another process has just put a model there"):
        add(tiny_bundle(tmp_path / "tiny.bundle"), "tiny", home / "models")
    assert [(path.name, path.read_bytes()) for path in (home / "models").iterdir()] == [("tiny.zip", b"another's")]


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot be read"):
        entries(tmp_path / "file")


def test_needs_no_pytorch(home: Path, tmp_path: Path) -> None:
    heavy = "torch", "onnx", "nncf", "nnunetv2", "huggingface_hub"
    prelude = f"import sys; sys.modules.update(dict.fromkeys({heavy}))"
    for arguments in (["models"], ["models", "list"], ["models", "verify"], ["models", "fetch", "--help"]):
        ran = run_process(*arguments, cache_dir=tmp_path / "cache", prelude=prelude)
        assert (ran.code, ran.out != "") == (0, True), ran.err
    ran = run_process("models", "fetch", "dlmuse", cache_dir=tmp_path / "cache", prelude=prelude)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert 'pip install ".[models]"' in ran.err
    assert not home.exists()
