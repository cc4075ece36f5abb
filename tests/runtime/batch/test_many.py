"""Many scans: nothing lost, nothing done twice, whatever happens in between."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CommandLine, Ran, head_image, run_process, snapshot, tiny_bundle, tiny_cascade, write_scan

from edgemuse.runtime.batch import many
from edgemuse.runtime.batch.claim import Claim
from edgemuse.runtime.model.cascade import open_model
from edgemuse.runtime.network.memory import gib
from edgemuse.runtime.pipeline.cascade import CascadeSegmenter
from edgemuse.runtime.pipeline.open import open_segmenter
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.pipeline.segmenter import Segmenter
from edgemuse.runtime.results.files import PROVENANCE, output_paths
from edgemuse.runtime.scan.nifti import Scan, open_scan

SCANS = 5
posix = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cascade(tmp_path_factory.mktemp("cascade") / "tiny.bundle")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of scans that all differ."""
    for n in range(SCANS):
        write_scan(tmp_path / "data" / f"sub-{n}_T1w.nii.gz", head_image((24 + 2 * n, 28, 20), seed=n))
    return tmp_path / "data"


def labels(folder: Path) -> dict[str, bytes]:
    """The label maps and tables below `folder`."""
    files = [path for path in folder.rglob("*") if path.suffix in (".gz", ".tsv")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def lines(ran: Ran, text: str) -> list[str]:
    return [line for line in ran.err.splitlines() if text in line]


@pytest.mark.parametrize("kind", ["model", "cascade"])
def test_a_batch_gives_what_single_scans_give(
    kind: str, data: Path, cli: CommandLine, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(kind)
    ran = cli("segment", data, "-m", bundle, "-o", tmp_path / "all")
    assert ran.code == 0, ran.err
    for scan in sorted(data.iterdir()):
        assert cli("segment", scan, "-m", bundle, "-o", tmp_path / "single").code == 0
    assert labels(tmp_path / "all") == labels(tmp_path / "single")
    assert len(labels(tmp_path / "all")) == 3 * SCANS
    assert not list((tmp_path / "all").glob(".*"))
    assert [line.split()[1] for line in ran.err.splitlines()[:-1]] == [f"{n}/{SCANS}" for n in range(1, SCANS + 1)]
    assert ran.err.splitlines()[-1].startswith(f"edgemuse: {SCANS} scans: {SCANS} segmented; ")


def threads_of_prepare(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[str]:
    """The names of the threads that prepare scans, as they do."""
    heard, prepare = [], kind.prepare

    def listening(self: Any, path: Path, *room: float) -> Any:
        heard.append(threading.current_thread().name)
        return prepare(self, path, *room)

    monkeypatch.setattr(kind, "prepare", listening)
    return heard


@pytest.mark.parametrize(("kind", "name"), [(Segmenter, "model"), (CascadeSegmenter, "cascade")])
def test_the_next_scan_is_prepared_meanwhile_if_memory_allows(
    kind: type,
    name: str,
    data: Path,
    cli: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    bundle = request.getfixturevalue(name)
    with open_segmenter(bundle, Options(backend="openvino", precision="fp32", cache_dir=None)) as segmenter:
        plans = [segmenter.plan(open_scan(scan)) for scan in sorted(data.iterdir())]
    heard = threads_of_prepare(monkeypatch, kind)
    assert cli("segment", data, "-m", bundle, "-o", tmp_path / "roomy").code == 0
    main = threading.current_thread().name
    assert heard[0] == main
    assert len(heard) == SCANS
    assert main not in heard[1:]
    heard.clear()
    tight = max(plan.total for plan in plans) / 2**30
    assert cli("segment", data, "-m", bundle, "-o", tmp_path / "tight", "--max-ram", tight).code == 0
    assert heard == [main] * SCANS
    assert labels(tmp_path / "roomy") == labels(tmp_path / "tight")


@pytest.mark.parametrize("name", ["model", "cascade"])
def test_verbose_lines_name_their_scan(
    name: str, data: Path, cli: CommandLine, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ran = cli("segment", data, "-m", request.getfixturevalue(name), "-o", tmp_path / "out", "-v")
    assert ran.code == 0
    stages = re.compile(r"edgemuse: (\S+?): (?:mask |regions )?(memory|load|preprocess|engine|infer|quality): ")
    found = [match.groups() for line in ran.err.splitlines() if (match := stages.match(line))]
    for scan in data.iterdir():
        for stage in ("memory", "load", "preprocess", "infer", "quality"):
            assert (str(scan), stage) in found
    assert not lines(ran, "edgemuse: load: ")


def test_a_second_run_has_nothing_to_do(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("segment", data, "-m", model, "-o", out).code == 0
    before = snapshot(out)
    ran = cli("segment", data, "-m", model, "-o", out)
    assert (ran.code, ran.out, ran.flags) == (0, "", ())
    assert len(lines(ran, "done already, skipped")) == SCANS
    assert ran.err.splitlines()[-1].startswith(f"edgemuse: {SCANS} scans: {SCANS} done before; ")
    assert snapshot(out) == before
    ran = cli("segment", data, "-m", model, "-o", out, "--overwrite")
    assert (ran.code, len(ran.out.splitlines())) == (0, 5 * SCANS)


CHANGES = {
    "model": "another model",
    "option": "other options",
    "input": "another scan of this name",
    "result": "changed since",
    "foreign": "exists; choose",
    "nonsense": "exists; choose",
}


@pytest.mark.parametrize("change", CHANGES)
def test_results_of_something_else_are_refused_for_that_scan_alone(
    change: str, data: Path, model: Path, cli: CommandLine, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", []
    others = [path for path in sorted(data.iterdir()) if path.name != "sub-1_T1w.nii.gz"]
    first = data / "sub-1_T1w.nii.gz"
    assert cli("segment", first, "-m", model, "-o", out).code == 0
    paths = output_paths(out, "sub-1")
    if change == "model":
        tiny_bundle(tmp_path / "other.bundle", seed=9)
        assert cli("segment", first, "-m", tmp_path / "other.bundle", "-o", out, "--overwrite").code == 0
    elif change == "option":
        assert cli("segment", first, "-m", model, "-o", out, "--overwrite", "--no-postprocess").code == 0
    elif change == "input":
        write_scan(first, head_image(seed=77))
    elif change == "result":
        paths["volumes.tsv"].write_text("corrected by hand")
    elif change == "foreign":
        paths[PROVENANCE].unlink()
    else:
        paths[PROVENANCE].write_text('{"files": [1], "model": 3}')
    before = snapshot(out)
    ran = cli("segment", data, "-m", model, "-o", out, *options)
    assert ran.code == 2
    (line,) = lines(ran, "--overwrite")
    assert CHANGES[change] in line
    assert len(ran.out.splitlines()) == 5 * len(others)
    assert {name: content for name, content in snapshot(out).items() if name.startswith("sub-1")} == before
    assert cli("segment", data, "-m", model, "-o", out, "--overwrite").code == 0


ANNEX = "../.git/annex/objects/x1/2X/MD5E-s9--a/MD5E-s9--a"
ELSEWHERE = {
    "link of git-annex": (lambda path: path.symlink_to(ANNEX), "a pointer of git-annex"),
    "pointer of git-annex": (lambda path: path.write_text("/annex/objects/MD5E-s9--a\n"), "a pointer of git-annex"),
    "link to nothing": (lambda path: path.symlink_to("gone"), "a link to gone, which is not there"),
}


@pytest.mark.parametrize("name", ["volumes.tsv", "dseg.nii.gz", PROVENANCE])
@pytest.mark.parametrize("how", ELSEWHERE)
def test_a_result_whose_content_is_elsewhere_is_in_the_way(
    how: str, name: str, data: Path, model: Path, cli: CommandLine, tmp_path: Path
) -> None:
    if (how, name) == ("pointer of git-annex", PROVENANCE):
        pytest.skip("a provenance that cannot be read is in the way, whatever it is")
    scan, out = data / "sub-1_T1w.nii.gz", tmp_path / "out"
    assert cli("segment", scan, "-m", model, "-o", out).code == 0
    path, (put, said) = output_paths(out, "sub-1")[name], ELSEWHERE[how]
    whole = path.read_bytes()
    path.unlink()
    put(path)
    before = snapshot(out)
    ran = cli("segment", scan, "-m", model, "-o", out)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith(f"edgemuse: {path} exists and is {said}")
    assert "--overwrite" in ran.err
    assert snapshot(out) == before
    assert cli("segment", scan, "-m", model, "-o", out, "--overwrite").code == 0
    assert not path.is_symlink()
    assert path.read_bytes() == whole or name == PROVENANCE


@pytest.mark.parametrize("name", ["volumes.tsv", "dseg.nii.gz", "qc.png"])
@pytest.mark.parametrize("when", ["before", "while it is looked at"])
def test_a_result_that_is_gone_is_made_again(
    name: str, when: str, data: Path, model: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan, out = data / "sub-1_T1w.nii.gz", tmp_path / "out"
    assert cli("segment", scan, "-m", model, "-o", out).code == 0
    path, present = output_paths(out, "sub-1")[name], many.present
    whole = path.read_bytes()

    def removing(paths: Any) -> list[str]:
        found = present(paths)
        path.unlink()
        return found

    if when == "before":
        path.unlink()
    else:
        monkeypatch.setattr(many, "present", removing)
    ran = cli("segment", scan, "-m", model, "-o", out)
    assert (ran.code, len(ran.out.splitlines())) == (0, 5)
    assert path.read_bytes() == whole


def test_a_link_to_nothing_that_is_not_written_again_is_removed(
    data: Path, model: Path, cli: CommandLine, tmp_path: Path
) -> None:
    scan, out = data / "sub-1_T1w.nii.gz", tmp_path / "out"
    picture = output_paths(out, "sub-1")["qc.png"]
    picture.parent.mkdir()
    picture.symlink_to("gone")
    assert cli("segment", scan, "-m", model, "-o", out, "--overwrite", "--no-qc").code == 0
    assert not picture.is_symlink()


def test_a_scan_that_is_replaced_by_a_larger_one_before_it_is_read_ahead(
    data: Path, model: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its turn to be read came with the memory for the smaller one."""
    first, second = data / "sub-0_T1w.nii.gz", data / "sub-1_T1w.nii.gz"
    large = write_scan(tmp_path / "large.nii.gz", head_image((96, 96, 96)))
    real = many.open_scan

    def replacing(path: Path) -> Scan:
        scan = real(path)
        if path == second:
            os.replace(large, path)
        return scan

    with open_segmenter(model, Options(backend="openvino", precision="fp32", cache_dir=None)) as segmenter:
        plans = [segmenter.plan(open_scan(path)) for path in (first, second)]
        room = segmenter.plan(open_scan(large)).ahead - 1
    monkeypatch.setattr(many, "open_scan", replacing)
    monkeypatch.setattr(many.Batch, "_planned", lambda self, total, last: ahead(self, room))

    def ahead(batch: Any, room: float) -> None:
        batch._ahead = batch._pool.submit(batch._take, room)

    assert max(plan.ahead for plan in plans) < room
    ran = cli("segment", first, second, "-m", model, "-o", tmp_path / "out")
    assert ran.code == 2
    (line,) = lines(ran, "took its place")
    assert line == f"edgemuse: {second}: a larger scan took its place since it was looked at; segment it again"
    monkeypatch.undo()
    assert cli("segment", first, second, "-m", model, "-o", tmp_path / "out").code == 0


KILLED = """
import os, signal
from edgemuse.runtime.pipeline.segmenter import Segmenter
real, left = {owner}.{name}, [{at}]
def killed(*arguments, **named):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)
{owner}.{name} = killed
"""


@posix
@pytest.mark.parametrize(
    "prelude",
    [
        KILLED.format(owner="Segmenter", name="run", at=3),
        *(KILLED.format(owner="os", name="link", at=at) for at in (2, 5, 6)),
    ],
    ids=["network", *(f"rename {at}" for at in (2, 5, 6))],
)
def test_a_killed_run_goes_on_where_it_stopped(
    prelude: str, data: Path, model: Path, cli: CommandLine, cache_dir: Path, tmp_path: Path
) -> None:
    assert cli("segment", data, "-m", model, "-o", tmp_path / "whole").code == 0
    out = tmp_path / "out"
    killed = run_process("segment", data, "-m", model, "-o", out, cache_dir=cache_dir, prelude=prelude)
    assert killed.code == -9
    assert list(out.glob(".*.lock"))  # left over, and in nobody's way
    done = len(list(out.glob("*_qc.png")))
    ran = cli("segment", data, "-m", model, "-o", out)
    assert ran.code == 0, ran.err
    assert len(lines(ran, "done already")) == done
    assert labels(out) == labels(tmp_path / "whole")
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_what_appears_while_the_network_runs_is_not_replaced(
    data: Path, model: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless another machine, whose claims are not seen here, made the same results; --overwrite replaces all."""
    out, scan, run = tmp_path / "out", data / "sub-1_T1w.nii.gz", Segmenter.run
    assert cli("segment", scan, "-m", model, "-o", tmp_path / "other").code == 0

    def meanwhile(*arguments: Any) -> Any:
        for path in here:
            (out / path.name).write_bytes(path.read_bytes())
        return run(*arguments)

    monkeypatch.setattr(Segmenter, "run", meanwhile)
    here = [tmp_path / "other" / "sub-1_volumes.tsv"]
    ran = cli("segment", scan, "-m", model, "-o", out)
    assert (ran.code, ran.out) == (2, "")
    assert f"{out / 'sub-1_volumes.tsv'} was put there meanwhile" in ran.err
    assert [path.name for path in out.iterdir()] == ["sub-1_volumes.tsv"]
    assert cli("segment", scan, "-m", model, "-o", out, "--overwrite").code == 0
    for path in out.iterdir():
        path.unlink()
    here = list((tmp_path / "other").iterdir())
    assert cli("segment", scan, "-m", model, "-o", out).code == 0
    assert labels(out) == labels(tmp_path / "other")
    assert not list(out.glob(".*"))


TOGETHER = """
import pathlib, time
from edgemuse.runtime.batch import many
run, here = many.Batch.run, pathlib.Path({here!r})
def together(*arguments):
    here.with_suffix({name!r}).touch()
    while len(list(here.parent.glob(here.name + ".*"))) < 2:
        time.sleep(0.01)
    return run(*arguments)
many.Batch.run = together
"""


def test_two_processes_share_the_work(
    data: Path, model: Path, cli: CommandLine, cache_dir: Path, tmp_path: Path
) -> None:
    assert cli("segment", data, "-m", model, "-o", tmp_path / "alone").code == 0
    out = tmp_path / "shared"

    def process(name: str) -> Ran:
        prelude = TOGETHER.format(here=str(tmp_path / "here"), name=name)
        return run_process("segment", data, "-m", model, "-o", out, cache_dir=cache_dir, prelude=prelude)

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(process, (".a", ".b")))
    assert [ran.code for ran in both] == [0, 0], [ran.err for ran in both]
    written = [line for ran in both for line in ran.out.splitlines()]
    assert len(written) == len(set(written)) == 5 * SCANS  # nothing twice, nothing lost
    assert labels(out) == labels(tmp_path / "alone")
    assert not list(out.glob(".*"))


WITHOUT_LOCKS = """
from edgemuse.runtime.batch import claim
def unsupported(descriptor):
    raise OSError(38, "Function not implemented")
claim._lock = unsupported
"""


def test_without_locks_two_processes_do_no_harm(
    data: Path, model: Path, cli: CommandLine, cache_dir: Path, tmp_path: Path
) -> None:
    assert cli("segment", data, "-m", model, "-o", tmp_path / "alone").code == 0
    out = tmp_path / "shared"

    def process(name: str) -> Ran:
        prelude = TOGETHER.format(here=str(tmp_path / "here"), name=name) + WITHOUT_LOCKS
        return run_process("segment", data, "-m", model, "-o", out, cache_dir=cache_dir, prelude=prelude)

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(process, (".a", ".b")))
    assert [ran.code for ran in both] == [0, 0], [ran.err for ran in both]
    assert labels(out) == labels(tmp_path / "alone")
    assert not list(out.glob(".*"))
    ran = cli("segment", data, "-m", model, "-o", out)
    assert (ran.code, len(lines(ran, "done already"))) == (0, SCANS)


SURVIVES = """
import pathlib, time
from edgemuse.runtime.batch import many
run, sleep, here = many.Batch.run, time.sleep, pathlib.Path({here!r})
def after_the_other(*arguments):
    while not (here / "claimed").exists():
        sleep(0.01)
    return run(*arguments)
def waiting(seconds):
    (here / "waiting").touch()
    sleep(0.05)
many.Batch.run, many.time.sleep = after_the_other, waiting
"""
DIES = """
import os, pathlib, signal, time
from edgemuse.runtime.pipeline.segmenter import Segmenter
here = pathlib.Path({here!r})
def killed(*arguments):
    (here / "claimed").touch()
    while not (here / "waiting").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
Segmenter.run = killed
"""


@posix
def test_scans_of_a_process_that_dies_are_done_by_the_other(
    data: Path, model: Path, cli: CommandLine, cache_dir: Path, tmp_path: Path
) -> None:
    """The survivor has done all the others and waits when the process that has the first scan is killed."""
    assert cli("segment", data, "-m", model, "-o", tmp_path / "alone").code == 0
    out, here = tmp_path / "shared", tmp_path / "here"
    here.mkdir()

    def process(prelude: str) -> Ran:
        prelude = prelude.format(here=str(here))
        return run_process("segment", data, "-m", model, "-o", out, cache_dir=cache_dir, prelude=prelude)

    with ThreadPoolExecutor(2) as pool:
        survivor, dead = pool.map(process, (SURVIVES, DIES))
    assert (survivor.code, dead.code) == (0, -9), survivor.err
    assert len(lines(survivor, "waiting for 1 scan ")) == 1
    assert labels(out) == labels(tmp_path / "alone")
    assert len(survivor.out.splitlines()) == 5 * SCANS


def test_claimed_scans_are_waited_for(
    data: Path, model: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    claim = Claim(output_paths(out, "sub-2")[PROVENANCE])
    assert claim.acquire()
    slept = []
    monkeypatch.setattr(
        many.time, "sleep", lambda seconds: (slept.append(seconds), len(slept) == 3 and claim.release())
    )
    ran = cli("segment", data, "-m", model, "-o", out)
    assert ran.code == 0
    assert len(slept) == 3
    assert len(lines(ran, "waiting for 1 scan that other processes work on")) == 1
    assert ran.out.splitlines()[-5] == str(out / "sub-2_dseg.nii.gz")
    assert len(ran.out.splitlines()) == 5 * SCANS


def test_a_claim_excludes_and_ends(tmp_path: Path) -> None:
    first, second, other = Claim(tmp_path / "a"), Claim(tmp_path / "a"), Claim(tmp_path / "b")
    assert first.acquire()
    assert not second.acquire()
    assert other.acquire()
    first.release()
    first.release()
    assert second.acquire()
    assert not first.acquire()
    second.release()
    other.release()
    assert not list(tmp_path.iterdir())


def test_without_locks_every_claim_is_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(_: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("edgemuse.runtime.batch.claim._lock", unsupported)
    first, second = Claim(tmp_path / "a"), Claim(tmp_path / "a")
    assert first.acquire()
    assert second.acquire()
    first.release()
    second.release()
    assert not list(tmp_path.iterdir())


def test_what_is_not_written_again_is_removed(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    """A picture or a table of another run beside these labels would be wrong; and the next run knows all files."""
    segment = ("segment", data, "-m", model, "-o", tmp_path / "out")
    assert cli(*segment).code == 0
    pictures = sorted((tmp_path / "out").glob("*_qc.png"))
    assert len(pictures) == SCANS
    assert cli(*segment, "--overwrite", "--no-qc").code == 0
    assert not any(path.exists() for path in pictures)
    ran = cli(*segment)
    assert (ran.code, len(lines(ran, "skipped"))) == (0, SCANS)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names there are Unicode")
def test_a_name_that_is_no_text_fails_alone_or_not_at_all(
    data: Path, model: Path, cli: CommandLine, tmp_path: Path
) -> None:
    os.rename(data / "sub-1_T1w.nii.gz", os.fsencode(data) + b"/sub-M\xfcller_T1w.nii.gz")
    ran = cli("segment", data, "-m", model, "-o", tmp_path / "out", "--no-qc")
    assert len([path for path in labels(tmp_path / "out") if path.endswith("_dseg.nii.gz")]) >= SCANS - 1
    assert f"{SCANS} scans:" in ran.err


def test_an_engine_of_a_stage_that_fails_is_closed(cascade: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would take memory beside that of the next scan's first stage."""
    with CascadeSegmenter(open_model(cascade), Options("fast", cache_dir=None)) as segmenter:
        monkeypatch.setattr(segmenter.regions, "_classes", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            segmenter.segment(data / "sub-0_T1w.nii.gz")
        assert not segmenter.regions.is_open


def test_bad_scans_are_reported_and_the_others_done(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    cut, empty = data / "sub-1_T1w.nii.gz", data / "sub-3_T1w.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-200])
    empty.write_bytes(b"")
    for already in (0, SCANS - 2):
        ran = cli("segment", data, "-m", model, "-o", tmp_path / "out")
        assert ran.code == 2
        assert len(lines(ran, f"{cut}: the file is cut off or damaged")) == 1
        assert len(lines(ran, f"{empty}: the file is empty")) == 1
        assert len(lines(ran, "done already")) == already
        assert ", 2 failed; " in ran.err.splitlines()[-1]
    assert len(labels(tmp_path / "out")) == 3 * (SCANS - 2)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_result_that_cannot_be_written_is_reported(
    data: Path, model: Path, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = many.write

    def failing(result: Any, *arguments: Any) -> list[Path]:
        if result.scan.path.name.startswith("sub-2"):
            raise ZeroDivisionError("of all things")
        return real(result, *arguments)

    monkeypatch.setattr(many, "write", failing)
    ran = cli("segment", data, "-m", model, "-o", tmp_path / "out")
    assert ran.code == 1
    (line,) = lines(ran, "of all things")
    assert line.startswith(f"edgemuse: internal error: {data / 'sub-2_T1w.nii.gz'}: ")
    assert len(ran.out.splitlines()) == 5 * (SCANS - 1)
    assert not list((tmp_path / "out").glob(".*"))


def test_shards_together_are_everything(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    assert cli("segment", data, "-m", model, "-o", tmp_path / "whole").code == 0
    written = []
    for number in range(1, 4):
        ran = cli("segment", data, "-m", model, "-o", tmp_path / "parts", "--shard", f"{number}/3")
        assert ran.code == 0
        written += ran.out.splitlines()
    assert len(written) == len(set(written)) == 5 * SCANS
    assert labels(tmp_path / "parts") == labels(tmp_path / "whole")


def test_a_list_that_is_no_text(model: Path, cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("sub-1_T1w.nii.gz\n".encode("utf-16"))
    ran = cli("segment", "--list", tmp_path / "list.txt", "-m", model, "-o", tmp_path / "out")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert "save it as UTF-8" in ran.err


def test_an_empty_shard_is_not_everything(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    ran = cli("segment", data, "-m", model, "-o", tmp_path / "out", "--shard", "")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert not (tmp_path / "out").exists()


def test_list_of_scans(data: Path, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"# two\n{data / 'sub-0_T1w.nii.gz'}\n{data / 'sub-4_T1w.nii.gz'}\n")
    ran = cli("segment", "--list", tmp_path / "list.txt", "-m", model, "-o", tmp_path / "out")
    assert ran.code == 0
    assert {Path(line).name[:5] for line in ran.out.splitlines()} == {"sub-0", "sub-4"}


def test_provenance_lists_the_files_and_what_was_asked(
    data: Path, model: Path, cli: CommandLine, tmp_path: Path
) -> None:
    assert cli("segment", data / "sub-0_T1w.nii.gz", "-m", model, "-o", tmp_path, "--profile", "balanced").code == 0
    record = json.loads((tmp_path / "sub-0_provenance.json").read_text())
    hashes = snapshot(tmp_path)
    assert record["files"] == {
        name: hashes[f"sub-0_{name}"] for name in ("dseg.nii.gz", "dseg.tsv", "volumes.tsv", "qc.png")
    }
    assert record["asked"] == {
        "profile": "balanced",
        "backend": "auto",
        "device": "auto",
        "precision": "auto",
        "postprocess": True,
        "max_ram": None,
    }


def test_memory_stays_within_the_plan_and_flat(tmp_path: Path) -> None:
    model = tiny_bundle(tmp_path / "b", patch=(64, 64, 64), features=16, classes=24)
    image = np.maximum(head_image((128, 128, 128)), 1)
    data = [write_scan(tmp_path / f"{n}.nii", image) for n in range(8)]
    ran = run_process("segment", *data, "-m", model, "-o", tmp_path / "out", cache_dir=tmp_path / "cache")
    assert ran.code == 0, ran.err
    records = [json.loads((tmp_path / "out" / f"{n}_provenance.json").read_text()) for n in (2, 7)]
    few, more = (record["memory"]["peak_bytes"] for record in records)  # so far, since the process began
    with open_segmenter(model, Options()) as segmenter:
        plan = segmenter.plan(open_scan(data[0]))
    bound = plan.total + plan.ahead + plan.behind
    assert more <= bound, f"{gib(more)} used, {gib(bound)} planned"
    assert more - few < plan.behind / 2, f"{gib(few)} with 3 scans, {gib(more)} with 8"
