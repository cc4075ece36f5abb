"""What is found out about the machine."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

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
