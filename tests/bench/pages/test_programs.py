"""Every program from its command line to its page and exit code, with what takes minutes replaced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundles import head_image, tiny_bundle, write_scan
from click.testing import CliRunner

for library in ("torch", "nnunetv2", "nncf", "matplotlib", "SimpleITK"):
    pytest.importorskip(library, reason=f"needs {library}: pip install '.[bench,calibrate]'")

from edgemuse.bench.measure.rows import CONTEXT
from edgemuse.bench.pages import builtin, cascade, document, gate, parity, tensorrt_builds
from edgemuse.bench.pages.page import AGE
from edgemuse.bench.report.render import Section

STATE = {
    "commit": "abc",
    "machine": {"cpu": "a processor", "cores": 2, "memory_bytes": 8e9, "system": "a system"},
    "versions": {"python": "3"},
}
MACHINE = "a processor, 2 cores, 8 GB, a system; python 3."
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a program, checks its exit code and returns its page."""

    def run(module: Any, *options: object, code: int = 0) -> str:
        monkeypatch.setattr(module, "state", lambda **versions: STATE)
        page = tmp_path / "page.md"
        arguments = [tmp_path, "-o", page, "--work", tmp_path / "work", *options]
        done = CliRunner().invoke(module.main, list(map(str, arguments)))
        assert done.exit_code == code, done.output
        return page.read_text()

    return run


def check(text: str, models: str, part: str) -> None:
    """The page begins with its age and has its title, and says what it was measured on."""
    first, _, rest = text.partition("\n")
    age = AGE.fullmatch(first)
    assert age is not None
    assert age.group(2, 3) == ("abc", models)
    assert age.group(4).endswith(f" --part {part}")
    assert rest.startswith("\n# ")
    assert MACHINE in text


def test_gate(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    development, built_in = (tiny_bundle(tmp_path / name, classes=classes) for name, classes in (("d", 4), ("b", 5)))
    monkeypatch.setattr(gate, "development_bundle", lambda *arguments: development)
    monkeypatch.setattr(gate, "BUILT_IN", built_in)
    monkeypatch.setattr(gate, "calibrated", lambda title, model, data, work: f"## {title}\n\n{model}")
    text = run(gate)
    hashes = [gate.open_bundle(path).sha256[:12] for path in (development, built_in)]
    check(text, f"development model {hashes[0]}; built-in model {hashes[1]}", "gate")
    assert f"## Development model\n\n{development}\n\n## Built-in model\n\n{built_in}\n" in text


@pytest.mark.parametrize(("agreement", "code"), [(1.0, 0), (0.9, 1)])
def test_parity(run: Run, monkeypatch: pytest.MonkeyPatch, agreement: float, code: int) -> None:
    cases = [parity.Case("dev", name, Path(), Path(), 0.99) for name in ("a", "b")]
    result = parity.Result("dev", "0123456789abcdef", "a", 0.99, agreement, 1.0, 1.0, 0.95, 1.0, 1.0)
    monkeypatch.setattr(parity.models, "parity_models", lambda shared, work: {"dev": Path()})
    monkeypatch.setattr(parity, "cases", lambda shared, work: iter(cases))
    monkeypatch.setattr(parity, "measured", lambda case, *folders: asdict(result) | {"name": case.name})
    text = run(parity, code=code)
    check(text, "dev 0123456789ab", "parity")
    reached = "no" if code else "yes"
    assert f"| dev | b | 99.00% | {agreement:.5%} | 1.00000 | {reached} | 100.00% |" in text


@pytest.mark.parametrize(("peak", "code"), [(1.9e9, 0), (2.1e9, 1)])
def test_cascade(run: Run, monkeypatch: pytest.MonkeyPatch, peak: float, code: int) -> None:
    def ours(model: Path, scan: Path, work: Path, setting: cascade.Setting) -> dict[str, Any]:
        seconds = {f"{role} {stage}": 1.5 for role in ("mask", "regions") for stage in ("infer", "load")}
        found = {"cold": 5.0, "wall": 4.0, "peak": peak if setting == cascade.SMALL else 3e9, "seconds": seconds}
        return found | {"tiles": {"mask": 1, "regions": 2}, "mask_voxels": 1_500_000, "crop": [10, 20, 30]}

    monkeypatch.setattr(cascade, "prepare", lambda shared, work: (work, work, work))
    monkeypatch.setattr(cascade, "nnunet_apart", lambda *paths: {"seconds": {"mask": 9, "regions": 7}, "peak": 5e9})
    monkeypatch.setattr(cascade, "edgemuse_steps", ours)
    monkeypatch.setattr(cascade, "open_scan", lambda path: SimpleNamespace(shape=(40, 50, 60)))
    monkeypatch.setattr(cascade, "open_model", lambda path: SimpleNamespace(sha256="0123456789abcdef"))
    text = run(cascade, code=code)
    check(text, "cascade of DLMUSE's size, random weights 0123456789ab", "cascade")
    assert "40 x 50 x 60" in text
    assert "| ratio to nnU-Net | 4.0 | 4.0 | 4.0 | 4.0 | 1 |" in text
    assert f"| peak memory | 3.00 GB | 3.00 GB | 3.00 GB | {peak / 1e9:.2f} GB | 5.00 GB |" in text
    assert "| regions | 3.0 s, 2 tiles | 3.0 s, 2 tiles | 3.0 s, 2 tiles | 3.0 s, 2 tiles | 7.0 s |" in text
    assert text.index("| mask load |") < text.index("| mask infer |") < text.index("| regions load |")


@pytest.mark.parametrize(("dice", "code"), [(0.9, 0), (0.8, 1)])
def test_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dice: float, code: int) -> None:
    for name in ("x", "y"):
        write_scan(tmp_path / "held-out" / f"{name}_T1w.nii.gz", head_image())
        write_scan(tmp_path / "held-out" / f"{name}_dseg.nii.gz", head_image())
    structures = {label.index: dice for label in builtin.open_bundle(builtin.BUILT_IN).manifest.labels if label.index}
    development = tiny_bundle(tmp_path / "d")
    monkeypatch.setattr(builtin, "development_bundle", lambda *arguments: development)
    monkeypatch.setattr(builtin.Judge, "labels", lambda *arguments: None)
    monkeypatch.setattr(builtin.Judge, "scores", lambda *arguments: structures)
    monkeypatch.setattr(builtin, "_truth", lambda scan: None)
    monkeypatch.setattr(builtin, "robustness", lambda *arguments: {"as scanned": dice})
    monkeypatch.setattr(builtin, "plausibility", lambda *arguments: ({2: 1.0, 10: 1.1}, 1.3))
    text = run(builtin, "--held-out", tmp_path / "held-out", code=code)
    hashes = [builtin.open_bundle(path).sha256[:12] for path in (builtin.BUILT_IN, development)]
    check(text, f"built-in model {hashes[0]}; development model {hashes[1]}", "model")
    assert f"| 10 left_thalamus | {dice:.3f} | {dice:.3f} | {dice:.3f} | {dice:.3f} |" in text
    assert "| chris_T1w.nii.gz | 1.30 l | cerebral_white_matter 1.00, thalamus 1.10 |" in text
    assert f"| as scanned | {dice:.3f} | {dice:.3f} | {dice:.3f} |" in text


@pytest.mark.parametrize(("failing", "code"), [("7.5", 0), ("8.6", 1)])
def test_tensorrt(run: Run, monkeypatch: pytest.MonkeyPatch, failing: str, code: int) -> None:
    def build(graph: Path, shape: object, precision: str, capability: str, folder: Path) -> dict[str, Any]:
        if capability == failing:
            return {"error": "it cannot (IBuilder says much)"}
        return {"path": "engine", "bytes": 5_000_000, "seconds": 1.0, "peak": 1e9}

    network = tensorrt_builds.Network("net", b"graph", (8, 8, 8), "0123456789abcdef")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1"))  # type: ignore[arg-type]
    monkeypatch.setattr(tensorrt_builds, "GRAPHS", {"fp32": bytes, "int8, else fp16": bytes})
    monkeypatch.setattr(tensorrt_builds, "built_in", lambda: network)
    monkeypatch.setattr(tensorrt_builds, "dlmuse", lambda shared, work: network)
    monkeypatch.setattr(tensorrt_builds, "build_apart", build)
    monkeypatch.setattr(tensorrt_builds, "mismatches", lambda network: [("a thing", "no | way")])
    monkeypatch.setattr(tensorrt_builds, "loading_rows", lambda: [["`FLAG`", "why"]])
    text = run(tensorrt_builds, code=code)
    check(text, "net 0123456789ab; net 0123456789ab", "tensorrt")
    assert f"| net | fp32 | {failing} | it cannot |  |  |  |" in text
    assert "| net | int8, else fp16 | 12.0 | built | 5.0 MB | 1.0 s | 1.00 GB |" in text
    assert "| a thing | no / way |" in text


def test_benchmark(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts, one after the other; the second leaves the first as it is."""
    row = dict.fromkeys(CONTEXT, "x") | {"commit": "abc", "bundle_sha256": "0123456789abcdef", "created": "2026-01-02T"}
    seen: list[Any] = []

    def report_on(name: str, material: Any, folder: Path) -> list[Any]:
        seen.append((name, material.bundle))
        return [row]

    parts = [Section("bench", MACHINE), Section("Pictures", figures={"pareto": b"<svg", "stages": b"<svg"})]
    monkeypatch.setattr(document, "development_bundle", lambda shared, work: work / "dev.bundle")
    monkeypatch.setattr(document, "report_on", report_on)
    monkeypatch.setattr(document, "scans_in", lambda folder: ())
    monkeypatch.setattr(document, "sections", lambda *arguments: iter(parts))
    run(document, "--part", "built-in")
    text = run(document, "--part", "development")
    assert [name for name, _ in seen] == ["built-in", "development"]
    assert text.startswith("*Measured a part at a time, the oldest on 2026-01-02, the newest on 2026-01-02: ")
    ages = list(AGE.finditer(text))
    assert [age.group(3) for age in ages] == ["development model 0123456789ab", "built-in model 0123456789ab"]
    assert [age.group(4).rpartition(" ")[2] for age in ages] == ["benchmark-development", "benchmark-built-in"]
    assert text.count("## How it was measured") == 1
    pictures = {path.name for path in (tmp_path / "page").iterdir()}
    assert pictures == {"built-in_pareto.svg", "development_pareto.svg", "development_stages.svg"}
    assert all(f"(page/{name})" in text for name in pictures)
