"""Nobody is contacted, and nothing is left anywhere but in the cache and the results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bundles import head_image, snapshot, tiny_bundle, write_scan

from edgemuse.engines.private import NAME
from edgemuse.engines.registry import statuses

REFUSE = """
import sys
def refuse(event, arguments):
    if not event.startswith("socket.") or event in ("socket.__new__", "socket.bind", "socket.gethostname"):
        return
    to = arguments[-1] if event in ("socket.connect", "socket.sendto", "socket.sendmsg") else arguments[0]
    host = to[0] if isinstance(to, tuple) else to
    if isinstance(host, str) and (host.startswith(("127.", "/")) or host in ("localhost", "::1")):
        return
    with open({heard!r}, "a") as file:
        file.write(f"{{event}} {{to}}\\n")
    raise OSError("no network here")
sys.addaudithook(refuse)
"""
"""Python runs it at the start of every process: notes and refuses each try to reach or to look up another machine."""
FOLDERS = ("engines", "runtime", "export", "calibration", "bench", "training")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle and scans, which the commands find by their names."""
    folder = tmp_path_factory.mktemp("files")
    tiny_bundle(folder / "tiny.bundle")
    for number in range(3):
        write_scan(folder / "data" / f"s{number}_T1w.nii.gz", head_image() + number)
    return folder


class House:
    """An empty home, folders for temporary files and for the cache, and the network refused to whoever runs in it."""

    def __init__(self, place: Path) -> None:
        self.folders = {name: place / name for name in ("home", "tmp", "cache", "work", "python")}
        for folder in self.folders.values():
            folder.mkdir()
        self.heard = place / "heard"
        self.heard.touch()
        (self.folders["python"] / "sitecustomize.py").write_text(REFUSE.format(heard=str(self.heard)))

    def environment(self) -> dict[str, str]:
        """Without what says that nobody looks, such as `CI`."""
        names = ("CI", "MPLCONFIGDIR", "XDG_", "HF_", "ORT_", "NNCF_", "EDGEMUSE_", "DO_NOT_TRACK", "TORCH")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        home, tmp = str(self.folders["home"]), str(self.folders["tmp"])
        return kept | {
            **dict.fromkeys(("HOME", "USERPROFILE", "LOCALAPPDATA", "APPDATA"), home),
            **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), tmp),
            "EDGEMUSE_CACHE_DIR": str(self.folders["cache"]),
            "PYTHONPATH": str(self.folders["python"]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def run(self, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run Python code in a process of its own."""
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env=self.environment(),
            cwd=self.folders["work"],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


MAIN = "from edgemuse.runtime.cli import main; main()"
SEGMENT = ("segment", "{files}/data/s0_T1w.nii.gz", "-m", "{files}/tiny.bundle", "-o", "out", "--backend")
TINY = "{files}/tiny.bundle"


def slow(*arguments: str) -> Any:
    return pytest.param(arguments, marks=pytest.mark.slow, id=arguments[0])


@pytest.mark.parametrize(
    "arguments",
    [
        (*SEGMENT, "openvino"),
        (*SEGMENT, "onnxruntime"),
        ("info", TINY),
        ("devices",),
        ("build", TINY),
        ("models", "list"),
        slow("demo", "-o", "out"),
        slow("export", "{model}", "-o", "out"),
        slow("calibrate", "{exported}", "--data", "{files}/data", "-o", "out"),
        slow("tune", TINY, "--data", "{files}/data"),
        slow("bench", TINY, "--data", "{files}/data", "-o", "out", "--quick"),
    ],
    ids=lambda arguments: " ".join((arguments[0], *arguments[7:])),
)
def test_a_command_contacts_nobody_and_leaves_nothing_elsewhere(
    arguments: tuple[str, ...], files: Path, house: House, request: pytest.FixtureRequest
) -> None:
    if arguments[-1] == "onnxruntime" and next(status for status in statuses("onnxruntime")).reason:
        pytest.skip("ONNX Runtime is not installed")
    made = made_for(arguments, request)
    before = snapshot(files)
    ran = house.run(MAIN, *(argument.format(files=files, **made) for argument in arguments))
    assert ran.returncode == 0, ran.stderr
    assert house.heard.read_text() == ""
    left = {name: sorted(str(path.relative_to(folder)) for path in folder.iterdir()) for name, folder in folders(house)}
    assert left["home"] == left["tmp"] == []
    assert set(left["cache"]) <= {NAME}
    assert set(left["work"]) <= {"out"}
    assert snapshot(files) == before


def folders(house: House) -> list[tuple[str, Path]]:
    return [(name, house.folders[name]) for name in ("home", "tmp", "cache", "work")]


def made_for(arguments: tuple[str, ...], request: pytest.FixtureRequest) -> dict[str, Path]:
    """A model folder, and a bundle made of it, for the commands that need one."""
    if not {"{model}", "{exported}"} & {*arguments}:
        return {}
    pytest.importorskip("nncf", reason="NNCF is not installed: pip install 'edgemuse[calibrate]'")
    folder = request.getfixturevalue("model_folder")()
    if "{model}" in arguments:
        return {"model": folder}
    from edgemuse.export.exporter import ExportOptions, export_model

    return {"exported": export_model(folder, folder.with_name("exported.bundle"), ExportOptions())}


def test_the_watch_sees_a_contact(house: House) -> None:
    """Of a child, too; and that of a library that is left alone would be seen."""
    code = "import subprocess, sys, urllib.request as r; r.urlopen(sys.argv[1])"
    for nested in (code, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}, sys.argv[1]])"):
        house.run(nested, "http://example.invalid")
    assert house.heard.read_text().count("socket.getaddrinfo example.invalid") == 2


@pytest.mark.parametrize("folder", FOLDERS)
def test_senders_are_off_before_any_library_is_imported(folder: str, house: House) -> None:
    """Whatever of edgemuse is imported first."""
    code = f"""
import os, sys
import edgemuse.{folder}
assert not {{"openvino", "nncf", "onnxruntime", "huggingface_hub"}} & {{*sys.modules}}
assert {{os.environ[name] for name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")}} == {{"1"}}
import openvino
try:
    import openvino_telemetry
except ImportError:
    print("off")
"""
    ran = house.run(code)
    assert ran.stdout == "off\n", ran.stderr
    assert house.heard.read_text() == ""
    assert list(house.folders["home"].iterdir()) == []


def test_lines_are_said_once_whoever_sets_up_the_root_logger(files: Path, house: House) -> None:
    code = f"import logging; logging.basicConfig(); {MAIN}"
    arguments = [argument.format(files=files) for argument in SEGMENT]
    ran = house.run(code, *arguments, "openvino")
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stderr.splitlines() if "look at this result" in line]
    assert lines
    assert len(lines) == len(set(lines))
    assert "INFO:" not in ran.stderr
    assert "WARNING:" not in ran.stderr


def test_the_hub_is_told_nothing_besides(house: House) -> None:
    """Neither events nor, in its own header, what is installed here."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install 'edgemuse[models]'")
    code = "import edgemuse.export; from huggingface_hub.utils import build_hf_headers as h; print(h()['user-agent'])"
    ran = house.run(code)
    assert ran.returncode == 0, ran.stderr
    assert "torch" not in ran.stdout
    assert house.heard.read_text() == ""
