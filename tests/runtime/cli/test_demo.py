"""`edgemuse demo` replaces what a demo wrote, and nothing else; with a tiny model in place of the built-in one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bundles import CommandLine, snapshot, write_scan

from edgemuse.runtime.cli import sample


@pytest.fixture(autouse=True)
def _tiny(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = write_scan(tmp_path / "sample" / "sample_T1w.nii.gz")
    for name, path in (("BUILT_IN", model), ("SAMPLE_SCAN", scan), ("SAMPLE_TRUTH", scan)):
        monkeypatch.setattr(sample, name, path)


def test_an_earlier_demo_is_replaced(cli: CommandLine, tmp_path: Path) -> None:
    first = cli("demo", "-o", tmp_path / "demo")
    assert first.code == 0, first.err
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    provenance = tmp_path / "demo" / "sample_provenance.json"
    before = provenance.read_bytes()
    second = cli("demo", "-o", tmp_path / "demo")
    assert (second.code, second.out) == (0, first.out)
    assert provenance.read_bytes() != before
    assert (tmp_path / "demo" / "notes.txt").read_text() == "mine"
    assert not list((tmp_path / "demo").glob(".*"))


@pytest.mark.parametrize("after", [False, True], ids=["by hand", "changed since"])
@pytest.mark.parametrize(
    "name", ["dseg.nii.gz", "dseg.tsv", "volumes.tsv", "DLMUSE_Volumes.csv", "provenance.json", "qc.png"]
)
def test_what_it_did_not_write_stays(name: str, after: bool, cli: CommandLine, tmp_path: Path) -> None:
    """Also where this model has no such result; with --overwrite it goes."""
    out = tmp_path / "demo"
    if after:
        assert cli("demo", "-o", out).code == 0
    out.mkdir(exist_ok=True)
    (out / f"sample_{name}").write_text("my own")
    before = snapshot(tmp_path)
    ran = cli("demo", "-o", out)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert f"{out}/sample_" in ran.err
    assert "replace it with --overwrite" in ran.err
    assert snapshot(tmp_path) == before
    ran = cli("demo", "-o", out, "--overwrite")
    assert ran.code == 0, ran.err
    assert snapshot(out).get(f"sample_{name}") != before[f"demo/sample_{name}"]


@pytest.mark.skipif(os.name != "posix", reason="links of other systems need rights")
def test_a_link_is_not_followed(cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert cli("demo", "-o", out).code == 0
    (out / "sample_dseg.tsv").rename(tmp_path / "elsewhere")
    (out / "sample_dseg.tsv").symlink_to(tmp_path / "elsewhere")
    before = snapshot(tmp_path)
    assert cli("demo", "-o", out).code == 2
    assert snapshot(tmp_path) == before


def test_what_appears_meanwhile_stays(cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, write = tmp_path / "demo", sample.write

    def written(*arguments: object, **named: object) -> object:
        (out / "sample_volumes.tsv").write_text("mine")
        return write(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(sample, "write", written)
    ran = cli("demo", "-o", out)
    assert (ran.code, ran.out) == (2, "")
    assert "sample_volumes.tsv was put there meanwhile; nothing was changed" in ran.err
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("sample_volumes.tsv", "mine")]
