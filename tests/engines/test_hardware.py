"""What is found out about the machine."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgemuse.engines import hardware


def test_machine_is_described_in_plain_values() -> None:
    facts = hardware.machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"]
    assert 1 <= int(facts["cores"]) <= (psutil.cpu_count() or 1)


def test_available_memory_is_within_the_machine() -> None:
    assert 0 < hardware.available_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("limit", "used", "cache", "free"), [("1000", "400", 0, 600), ("1000", "900", 300, 400), ("1000", "1400", 0, 0)]
)
def test_container_limit_counts(
    limit: str, used: str, cache: int, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "limit").write_text(f"{limit}\n")
    (tmp_path / "used").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ncache {cache}\n")
    monkeypatch.setattr(hardware, "CGROUPS", [(tmp_path, "limit", "used", "cache")])
    assert hardware.available_memory() == free


def test_no_limit_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "limit").write_text("max\n")
    (tmp_path / "used").write_text("1\n")
    (tmp_path / "memory.stat").write_text("cache 0\n")
    monkeypatch.setattr(hardware, "CGROUPS", [(tmp_path, "limit", "used", "cache"), (tmp_path / "absent", "", "", "")])
    assert hardware.available_memory() > 1 << 20


def test_peak_memory_sees_an_allocation() -> None:
    size = max(0, hardware.peak_memory() - psutil.Process().memory_info().rss) + (64 << 20)
    before = hardware.peak_memory()
    assert np.ones(size // 8).sum() > 0
    assert 32 << 20 < hardware.peak_memory() - before < 128 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="where the peak of another process is inherited")
def test_peak_memory_of_a_child_is_its_own() -> None:
    """Linux hands `ru_maxrss` down through fork and exec: a small child of a large process would look large."""
    ballast = np.ones(60 << 20)
    code = "from edgemuse.engines.hardware import peak_memory; print(peak_memory())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert child < ballast.nbytes / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep no large arrays in a heap")
@pytest.mark.parametrize(("call", "kept"), [("map_large_arrays()", False), ("0", True)])
def test_large_arrays_are_given_back(call: str, kept: bool) -> None:
    """Those before the last one of twenty; a first one makes glibc take them from its heap unless it is told not to."""
    code = f"""
import numpy as np
from edgemuse.engines.hardware import map_large_arrays, resident_memory
{call}
np.ones(2 << 20)
before = resident_memory()
last = [np.ones(1 << 20) for _ in range(20)][-1]
print((resident_memory() - before) >> 20)
"""
    held = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert (held > 80) == kept
