"""What reaches a terminal, a pipe and a file, whatever names hold: nothing that acts, no line that nobody wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import CommandLine, edit_manifest, run_process, tiny_bundle, write_scan

from edgemuse.runtime.batch.jobs import Job
from edgemuse.runtime.cli import terminal
from edgemuse.runtime.cli.screen import Screen
from edgemuse.runtime.results.files import output_paths

EVIL = {
    "escape": "\x1b]0;PWNED\x07\x1b[2J\x1b[1;1Hedgemuse: all is well",
    "newline": "a\nedgemuse: all is well",
    "return": "a\redgemuse: all is well",
    "bidi": "a\u202egz.iin",
    "separator": "a\u2028b\x85c",
}
NAMES = {**EVIL, "not UTF-8": os.fsdecode(b"a\xff\xfe"), "ordinary": "Köln 脑 b"}
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "tiny.bundle")


def on_a_terminal(*arguments: object, cache_dir: Path) -> str:
    """What `edgemuse ARGUMENTS` writes to a terminal."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    ours, theirs = pty.openpty()
    environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(cache_dir), "TERM": "xterm", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "edgemuse.runtime.cli", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        written = b""
        while part := _read(ours):
            written += part
    os.close(ours)
    assert process.returncode in (0, 2), written
    return written.decode()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # how Linux says that the other side is closed
        return b""


def assert_harmless(text: str) -> None:
    """Only what the program itself does to a terminal is left: the bar, which hides and shows the cursor."""
    for own in ("\r", "\n", "\t", "\x1b[?25l", "\x1b[?25h", "\x1b[K"):
        text = text.replace(own, "\n")
    assert not [character for character in text if not character.isprintable() and character != "\n"]
    assert "edgemuse: all is well" not in text.split("\n")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """A folder of tiny scans with `NAMES`."""
    folder = tmp_path / "in"
    for name in NAMES.values():
        write_scan(folder / "z_T1w.nii.gz").rename(folder / f"{name}_T1w.nii.gz".replace("/", ""))
    return folder


@posix
def test_names_of_scans_on_a_terminal(scans: Path, model: Path, cache_dir: Path, tmp_path: Path) -> None:
    for name in NAMES.values():
        (scans / f"{name}2_T1w.nii.gz").write_bytes(b"\x1f\x8b")
    for said in (f"{len(NAMES)} segmented", f"{len(NAMES)} done before"):
        text = on_a_terminal("segment", scans, "-o", tmp_path / "out", "-m", model, "--no-qc", cache_dir=cache_dir)
        assert_harmless(text)
        assert "internal error" not in text
        assert f"{said}, {len(NAMES)} failed" in text
    assert len(list((tmp_path / "out").glob("*_dseg.nii.gz"))) == len(NAMES)


@posix
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_paths_for_a_program_are_those_of_the_files(
    encoding: str, scans: Path, model: Path, cache_dir: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(cache_dir), "PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "edgemuse.runtime.cli", "segment", scans, "--no-qc", "-o", tmp_path / "out"]
    done = subprocess.run([*command, "-m", model], env=environment, capture_output=True, check=True)
    written = {os.fsencode(path) for path in (tmp_path / "out").iterdir()}
    lines = done.stdout.split(b"\n")[:-1]
    assert sorted(lines) == sorted(path.replace(b"\n", rb"\n").replace(b"\r", rb"\r") for path in written)
    assert len({*lines} & written) == 4 * (len(NAMES) - 2)
    assert b"internal error" not in done.stderr


@pytest.mark.parametrize("kind", EVIL)
def test_fields_of_a_bundle(kind: str, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    evil = EVIL[kind]
    records = {"trainer": evil, evil: 1, "deep": [{"x": [evil, [evil]]}]}
    edit_manifest(model, source=records, verification=records, calibration=records)
    for arguments in (
        ["info", model],
        ["models", "add", model, "--model-dir", tmp_path / "store"],
        ["models", "list", "--model-dir", tmp_path / "store"],
        ["models", "verify", "--model-dir", tmp_path / "store"],
    ):
        ran = cli(*arguments)
        assert ran.code == 0, ran.err
        assert_harmless(ran.out + ran.err)
    edit_manifest(model, name=evil)
    ran = cli("info", model)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert_harmless(ran.err)


@pytest.mark.parametrize("depth", [8, 480, 900, 20000])
@pytest.mark.parametrize("opening", ['{"a":', "[", '[{"a":'])
def test_records_in_records(depth: int, opening: str, model: Path, cli: CommandLine, tmp_path: Path) -> None:
    closing = "".join({"{": "}", "[": "]"}.get(mark, "") for mark in reversed(opening))
    manifest = model / "bundle.json"
    text = manifest.read_text().replace('"source": {}', f'"source": {{"a": {opening * depth}1{closing * depth}}}')
    manifest.write_text(text)
    for arguments in (
        ["info", model],
        ["models", "add", model, "--name", "x", "--model-dir", tmp_path / "store"],
        ["models", "list", "--model-dir", tmp_path / "store"],
    ):
        ran = cli(*arguments)
        assert ran.code in (0, 2)
        assert "internal error" not in ran.err
        assert len(ran.out.splitlines()) < 100


def test_a_name_in_the_store(model: Path, cli: CommandLine, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert cli("models", "add", model, "--model-dir", store, "--name", "x").code == 0
    if sys.platform != "win32":
        (store / "x.zip").rename(store / f"{EVIL['newline']}.zip")
    ran = cli("models", "list", "--model-dir", store)
    assert_harmless(ran.out + ran.err)


def test_label_of_the_bar(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(terminal, "watched", lambda stream=None: True)
    screen = Screen(2, debug=False)
    job = Job(Path(EVIL["escape"].replace("/", "")), output_paths(tmp_path, "x"))
    with screen.scan(job) as advance:
        advance(1, 2)
    with terminal.progress(EVIL["newline"]) as advance:
        advance(2, 2)
    terminal.status(EVIL["escape"])
    said = capfd.readouterr()
    assert said.out == ""
    assert_harmless(said.err)


def test_a_long_line_keeps_both_ends(capfd: pytest.CaptureFixture[str]) -> None:
    terminal.note("start " + "x" * 10**6 + " end")
    said = capfd.readouterr().err
    assert said.startswith("start xxx")
    assert said.endswith("xxx end\n")
    assert len(said) < 3000


@posix
def test_a_reader_that_goes_away_is_no_error(model: Path, cache_dir: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "edgemuse.runtime.cli", "info", model]
    environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(cache_dir)}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_behind_stdout_is_one_line(model: Path, cache_dir: Path) -> None:
    command = [sys.executable, "-m", "edgemuse.runtime.cli", "info", model]
    environment = os.environ | {"EDGEMUSE_CACHE_DIR": str(cache_dir)}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr == b"edgemuse: stdout: cannot be written (No space left on device); send it elsewhere\n"


LIBRARY = """
import logging, warnings
from edgemuse.runtime.model import bundle
before = bundle.Bundle.verify
def verify(self):
    warnings.warn("use something else", DeprecationWarning, stacklevel=1)
    warnings.warn("use something else", UserWarning, stacklevel=1)
    logging.warning("no telemetry for you")
    logging.getLogger("library").error("something")
    logging.basicConfig()
    logging.getLogger("edgemuse").warning("this is ours")
    before(self)
bundle.Bundle.verify = verify
"""


def test_libraries_say_nothing(model: Path, cache_dir: Path) -> None:
    ran = run_process("info", model, cache_dir=cache_dir, prelude=LIBRARY)
    assert (ran.code, ran.err) == (0, "edgemuse: this is ours\n")


def test_with_debug_libraries_may_speak(model: Path, cache_dir: Path) -> None:
    ran = run_process("--debug", "info", model, cache_dir=cache_dir, prelude=LIBRARY)
    assert ran.code == 0
    assert all(word in ran.err for word in ("UserWarning: use something else", "no telemetry for you"))
    assert ran.err.count("this is ours") == 1


def test_a_traceback_is_harmless_as_well(cache_dir: Path, tmp_path: Path) -> None:
    ran = run_process("--debug", "info", tmp_path / EVIL["escape"].replace("/", ""), cache_dir=cache_dir)
    assert "Traceback" in ran.err
    assert_harmless(ran.err)
