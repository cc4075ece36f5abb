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
RUNTIME_LIBRARIES = {"PIL", "click", "nibabel", "numpy", "platformdirs", "scipy", "threadpoolctl"}
ENGINE_LIBRARIES = {"numpy"}
EXCEPTIONS = {
    "engines/hardware.py": {"psutil"},
    "engines/tensorrt.py": {"tensorrt_rtx"},
    "engines/tensorrt_cuda.py": {"cuda"},
    "runtime/cluster.py": {"distributed"},
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


def libraries(path: Path) -> set[str]:
    """Top-level names from outside edgemuse and the standard library."""
    return {name.partition(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"edgemuse"}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_arrows_point_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    assert own_imports(path) - {folder} <= MAY_IMPORT[folder]


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


def test_importing_is_all_that_arrows_need() -> None:
    """`importlib.import_module("edgemuse.x")` would go around the table: only the two registries do it."""
    users = {relative(path) for path in MODULES if "import_module(" in path.read_text()}
    assert users <= {"engines/registry.py", "runtime/cli.py"}


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
    assert table["package-dir"] == {name: name.removeprefix("edgemuse.").replace(".", "/") for name in on_disk}
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "edgemuse").exists()


@pytest.mark.parametrize("package", PROJECT["tool"]["setuptools"]["packages"])
def test_package_is_typed_and_linked_for_mypy(package: str) -> None:
    name = package.removeprefix("edgemuse.")
    links = ROOT / "tests" / "typing" / "edgemuse"
    assert (ROOT / name / "__init__.py").is_file()
    assert (ROOT / name / "py.typed").is_file()
    assert (links / name).is_symlink()
    assert (links / name).resolve() == ROOT / name
    assert not (links / name).readlink().is_absolute()
    assert (links / "__init__.pyi").read_text() == ""


def test_every_link_leads_to_a_package() -> None:
    links = {path.name for path in (ROOT / "tests" / "typing" / "edgemuse").iterdir() if path.is_symlink()}
    assert links == {name.removeprefix("edgemuse.") for name in PROJECT["tool"]["setuptools"]["packages"]}


def test_commands_of_other_packages_exist() -> None:
    from edgemuse.runtime.cli import LAZY_COMMANDS, MODEL_COMMANDS

    for module, attribute, _ in (*LAZY_COMMANDS.values(), *MODEL_COMMANDS.values()):
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
