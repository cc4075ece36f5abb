"""How much disk a system needs: `python -m edgemuse.bench.measure.footprint`, and a row of every report.

Adds up the files of the packages that a system needs here, with all that they require. What only an extra brings is
not counted.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import click
from packaging.requirements import Requirement

from edgemuse.runtime.cli.terminal import say

OWN = ("edgemuse.engines", "edgemuse.runtime", "edgemuse.calibration", "edgemuse.export", "edgemuse.bench")
"""Packages of edgemuse, whose files an editable install does not list."""
NEEDS = {
    "edgemuse/openvino": ("edgemuse",),
    "edgemuse/onnxruntime": ("edgemuse", "onnxruntime"),
    "edgemuse/tensorrt": ("edgemuse", "tensorrt-rtx-cu13", "cuda-python"),
    "plain/openvino": ("openvino", "nibabel", "scipy"),
    "plain/onnxruntime": ("onnxruntime", "nibabel", "scipy"),
    "nnunet": ("nnunetv2", "torch"),
}
"""The packages that a system needs, by the beginning of its name."""


def required_by(names: Iterable[str]) -> set[str]:
    """Return the canonical names of `names` and of every package that they require here, extras left out."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # for another system or Python than this
        found.add(name)
        needed = [requirement for requirement in map(Requirement, requires) if _applies(requirement)]
        waiting += [requirement.name for requirement in needed]
    return found


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def installed_bytes(names: Iterable[str]) -> int:
    """Bytes of the packages called `names` and of all that they require."""
    files = {path for name in required_by(names) for path in _files(name)}
    return sum(path.stat().st_size for path in files if path.is_file())


def _files(name: str) -> Iterable[Path]:
    package = distribution(name)
    yield from (Path(str(package.locate_file(file))).resolve() for file in package.files or ())
    if name == "edgemuse":
        for module in OWN:
            spec = importlib.util.find_spec(module)
            for folder in (spec.submodule_search_locations or ()) if spec else ():
                yield from (path.resolve() for path in Path(folder).rglob("*") if "__pycache__" not in path.parts)


def footprint(system: str) -> int:
    """Bytes that the system of this name needs installed."""
    return installed_bytes(next(needs for prefix, needs in NEEDS.items() if system.startswith(prefix)))


@click.command()
def main() -> None:
    """Print the size of edgemuse, of nnunetv2 with PyTorch, and their ratio."""
    ours, theirs = footprint("edgemuse/openvino"), footprint("nnunet")
    say(f"edgemuse {ours / 1e9:.2f} GB, nnunetv2 with PyTorch {theirs / 1e9:.2f} GB, ratio {theirs / ours:.1f}")


if __name__ == "__main__":
    main()
