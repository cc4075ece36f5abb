"""The house rules that a machine can check: who may import whom, what is packaged, which Python it is written for."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomllib", reason="TOML can be read from Python 3.11 on")

ROOT = Path(__file__).parents[1]
FOLDERS = ("engines", "runtime", "export", "calibration", "bench", "training")
MAY_IMPORT = {
    "engines": set(),
    "runtime": {"engines"},
    "export": {"engines", "runtime"},
    "calibration": {"engines", "runtime", "export"},
    "bench": {"engines", "runtime", "export", "calibration"},
    "training": {"calibration", "export", "runtime", "engines"},
}
STAIRS = {
    "runtime": ("cli", "node", "page", "dicom", "batch", "pipeline", "results", "network", "model", "regions", "scan"),
    "bench": ("pages", "report", "measure"),
}
"""Rooms of a folder from the top: each may import those after it and nothing before it."""
WRITER = "runtime/cli/terminal.py"
"""The only module that writes to the terminal, because it makes safe what it writes. The programs of developers in
`bench/pages/` and `training/` print, too."""
RUNTIME_LIBRARIES = {"PIL", "click", "nibabel", "numpy", "platformdirs", "scipy", "threadpoolctl"}
ENGINE_LIBRARIES = {"numpy"}
EXCEPTIONS = {
    "engines/hardware.py": {"psutil"},
    "engines/tensorrt.py": {"tensorrt_rtx"},
    "engines/tensorrt_cuda.py": {"cuda"},
    "runtime/batch/cluster.py": {"distributed"},
}
"""What a single file may import besides: memory and processors are asked for in one place, and so is CUDA."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PRESENT = [folder for folder in FOLDERS if (ROOT / folder).is_dir()]
MODULES = [path for folder in PRESENT for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES = MODULES + sorted(
    path for path in (ROOT / "tests").rglob("*.py") if "typing" not in path.relative_to(ROOT).parts
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every module that `path` imports anywhere in it, in full; for `from a import b`, both `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: a relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """The sub-packages of edgemuse that `path` imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("edgemuse.")}


def room_of(path: Path) -> str:
    """`folder/room` of a file in a room of `STAIRS`, else nothing."""
    folder, *rest = path.relative_to(ROOT).parts
    return f"{folder}/{rest[0]}" if folder in STAIRS and len(rest) > 1 else ""


def printing(path: Path) -> Iterator[int]:
    """Lines of `path` that write to the terminal by `print`, click or the streams themselves."""
    streams = {"click.echo", "click.secho", "click.progressbar", "sys.stdout", "sys.stderr"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield node.lineno
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if f"{node.value.id}.{node.attr}" in streams:
                yield node.lineno


def libraries(path: Path) -> set[str]:
    """Top-level names from outside edgemuse and the standard library."""
    return {name.partition(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"edgemuse"}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_arrows_point_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert own_imports(path) - {folder} <= MAY_IMPORT[folder]


ROOMS = {f"{folder}/{room}": rooms[place + 1 :] for folder, rooms in STAIRS.items() for place, room in enumerate(rooms)}


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path)], ids=relative)
def test_no_step_of_a_stair_leads_up(path: Path) -> None:
    folder, _, room = room_of(path).partition("/")
    others = {name.split(".")[2] for name in imports(path) if name.startswith(f"edgemuse.{folder}.")}
    assert others & set(STAIRS[folder]) - {room} <= set(ROOMS[f"{folder}/{room}"])


def test_every_room_has_its_step() -> None:
    for folder, rooms in STAIRS.items():
        assert {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")} <= set(rooms)
    loose = {relative(path) for folder in STAIRS for path in (ROOT / folder).glob("*.py")}
    assert loose == {"runtime/__init__.py", "bench/__init__.py", "bench/benchmark.py", "bench/command.py"}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_one_module_writes_to_the_terminal(path: Path) -> None:
    name = relative(path)
    if name != WRITER and not name.startswith(("bench/pages/", "training/")):
        assert not list(printing(path))


@pytest.mark.parametrize("path", [path for path in MODULES if relative(path).startswith("engines/")], ids=relative)
def test_engines_import_only_their_own_backend(path: Path) -> None:
    backend = {path.stem.partition("_")[0]} & {"openvino", "onnxruntime", "tensorrt"}
    assert libraries(path) <= ENGINE_LIBRARIES | backend | EXCEPTIONS.get(relative(path), set())


@pytest.mark.parametrize("path", [path for path in MODULES if relative(path).startswith("runtime/")], ids=relative)
def test_runtime_imports_only_what_pip_install_brings(path: Path) -> None:
    assert libraries(path) <= RUNTIME_LIBRARIES | EXCEPTIONS.get(relative(path), set())


def test_rules_cover_what_pip_install_brings() -> None:
    """The libraries allowed above are the project's dependencies, no more and no less."""
    declared = {re.split(r"[<>=\[ ]", line)[0] for line in PROJECT["project"]["dependencies"]}
    assert declared == RUNTIME_LIBRARIES - {"PIL"} | {"openvino", "pillow", "psutil"}


def test_versions_of_openvino_that_end_the_process_are_refused() -> None:
    requirements = pytest.importorskip("packaging.requirements", reason="it reads ranges: pip install packaging")
    (line,) = (line for line in PROJECT["project"]["dependencies"] if line.startswith("openvino"))
    allowed = requirements.Requirement(line).specifier
    assert all(version in allowed for version in ("2025.0.0", "2025.2.0", "2026.2.0", "2026.4.1"))
    assert not any(version in allowed for version in ("2025.3.0", "2025.4.1", "2026.0.0", "2026.1.0"))


def test_importing_is_all_that_arrows_need() -> None:
    """`importlib.import_module("edgemuse.x")` would go around the table: only the two registries do it."""
    users = {relative(path) for path in MODULES if "import_module(" in path.read_text()}
    assert users <= {"engines/registry.py", "runtime/cli/lazy.py"}


def test_packages_are_what_is_on_disk() -> None:
    """Every folder is listed: one that is not cannot be imported. What stays out of the wheel, setup.py drops."""
    table = PROJECT["tool"]["setuptools"]
    on_disk = {
        f"edgemuse.{'.'.join(path.parent.relative_to(ROOT).parts)}"
        for folder in PRESENT
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(table["packages"]) == on_disk
    assert table["packages"] == sorted(table["packages"])
    assert table["package-dir"] == {f"edgemuse.{folder}": folder for folder in PRESENT}
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "edgemuse").exists()


@pytest.mark.parametrize("name", FOLDERS)
def test_package_is_typed_and_linked_for_mypy(name: str) -> None:
    links = ROOT / "tests" / "typing" / "edgemuse"
    assert (ROOT / name / "__init__.py").is_file()
    assert (ROOT / name / "py.typed").is_file()
    assert (links / name).is_symlink()
    assert (links / name).resolve() == ROOT / name
    assert not (links / name).readlink().is_absolute()
    assert (links / "__init__.pyi").read_text() == ""


def test_every_link_leads_to_a_package() -> None:
    links = {path.name for path in (ROOT / "tests" / "typing" / "edgemuse").iterdir() if path.is_symlink()}
    assert links == set(FOLDERS)


def test_commands_of_other_packages_exist() -> None:
    from edgemuse.runtime.cli.group import COMMANDS
    from edgemuse.runtime.cli.models import COMMANDS as OF_MODELS

    for module, attribute, _ in (*COMMANDS.values(), *OF_MODELS.values()):
        path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
        names = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert attribute in names


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_source_is_python_3_10(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 10))


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_says_what_it_is_for(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring
