"""Limits of groups above this process count, in both versions of control groups, read from a made-up root."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from edgemuse.engines import cgroups, hardware
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import choose

MB = 1 << 20
UNLIMITED_V1 = 9223372036854771712


def system(root: Path, membership: str, groups: Mapping[str, Mapping[str, object]]) -> Path:
    """A root of a file system: what `/proc/self/cgroup` says, and files of folders below `/sys/fs/cgroup`."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(membership)
    for place, files in groups.items():
        folder = root / "sys" / "fs" / "cgroup" / place
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(f"{content}\n")
    return root


def v2(limit: object = "max", used: int = 0, cache: int = 0, **others: object) -> dict[str, object]:
    named = {name.replace("_", "."): value for name, value in others.items()}
    return {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 1\ninactive_file {cache}"} | named


def v1(limit: int = UNLIMITED_V1, used: int = 0, cache: int = 0) -> dict[str, object]:
    statistics = f"cache 5\ninactive_file 7\ntotal_inactive_file {cache}"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": statistics}


SLURM = "system.slice/slurmstepd.scope/job_77"
TASK = f"{SLURM}/step_0/user/task_0"


@pytest.mark.parametrize(
    ("membership", "groups", "free"),
    [
        (f"0::/{TASK}\n", {SLURM: v2(400 * MB, 100 * MB), f"{SLURM}/step_0": v2(), TASK: v2()}, 300 * MB),
        (f"0::/{TASK}\n", {SLURM: v2(900 * MB), TASK: v2(400 * MB)}, 400 * MB),
        (f"0::/{TASK}\n", {SLURM: v2(900 * MB, 800 * MB, 50 * MB), TASK: v2(400 * MB)}, 150 * MB),
        ("0::/user.slice/run-1.scope\n", {"user.slice/run-1.scope": v2(memory_high=200 * MB, used=MB)}, 199 * MB),
        ("0::/a\n", {"a": v2(MB, 3 * MB)}, 0),
        ("0::/a\n", {"a": {"memory.max": 5 * MB}}, 5 * MB),
        ("0::/\n", {"": v2(5 * MB, MB)}, 4 * MB),  # a container with a namespace of its own
        ("0::/docker/123\n", {"": v2(5 * MB, MB)}, 4 * MB),  # and one that sees the path outside
        ("0::/../../other\n", {"": v2(5 * MB, MB)}, 4 * MB),
        ("0::/a\n1:name=systemd:/a\n", {"unified/a": v2(5 * MB)}, 5 * MB),
        ("4:memory:/slurm/uid_1/job_2/step_0\n", {"memory/slurm/uid_1/job_2": v1(9 * MB, 4 * MB, MB)}, 6 * MB),
        ("7:cpu,memory:/a\n", {"cpu,memory/a": v1(9 * MB)}, 9 * MB),
        ("4:memory:/docker/123\n0::/\n", {"memory": v1(9 * MB)}, 9 * MB),
        ("", {"memory": v1(9 * MB)}, 9 * MB),
        ("", {"": v2(9 * MB)}, 9 * MB),
        ("5:cpu:/a\n", {"memory/a": v1(9 * MB), "cpu/a": v1(9 * MB)}, None),
        ("0::/a\n", {"a": v2(), "": v2()}, None),
        ("0::/a\n", {}, None),
        ("nonsense\n\n::\n0::/a\n", {"a": v2(MB, 0)}, MB),
        ("0::/a\n", {"a": v2("a lot", 1)}, None),
    ],
)
def test_memory(membership: str, groups: Mapping[str, Mapping[str, object]], free: int | None, tmp_path: Path) -> None:
    root = system(tmp_path, membership, groups)
    assert cgroups.free_memory(root) == free
    available = psutil.virtual_memory().available
    assert hardware.available_memory(root) <= (available * 2 if free is None else free)


def test_no_limit_of_version_1_is_no_limit(tmp_path: Path) -> None:
    root = system(tmp_path, "4:memory:/a\n", {"memory/a": v1(), "memory": v1()})
    assert hardware.available_memory(root) > 1 << 20
    assert (cgroups.free_memory(root) or 0) > psutil.virtual_memory().total


def test_without_control_groups_nothing_limits(tmp_path: Path) -> None:
    assert cgroups.free_memory(tmp_path) is None
    assert cgroups.cores(tmp_path) is None
    assert hardware.available_memory(tmp_path) > 1 << 20


@pytest.mark.parametrize(
    ("membership", "groups", "cores"),
    [
        ("0::/a/b\n", {"a": {"cpu.max": "150000 100000"}, "a/b": {"cpu.max": "max 100000"}}, 1.5),
        ("0::/a/b\n", {"a": {"cpu.max": "400000 100000"}, "a/b": {"cpu.max": "20000 10000"}}, 2),
        ("0::/\n", {"": {"cpu.max": "50000 100000"}}, 0.5),
        ("3:cpu,cpuacct:/j\n", {"cpu,cpuacct/j": {"cpu.cfs_quota_us": 300000, "cpu.cfs_period_us": 100000}}, 3),
        ("3:cpu,cpuacct:/j\n", {"cpu": {"cpu.cfs_quota_us": 300000, "cpu.cfs_period_us": 100000}}, 3),
        ("3:cpu:/j\n", {"cpu/j": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000}}, None),
        ("3:cpu:/j\n", {"cpu/j": {"cpu.cfs_quota_us": 5, "cpu.cfs_period_us": 0}}, None),
        ("0::/a\n", {"a": {"cpu.max": "max"}}, None),
    ],
)
def test_time_of_the_processor(
    membership: str, groups: Mapping[str, Mapping[str, object]], cores: float | None, tmp_path: Path
) -> None:
    assert cgroups.cores(system(tmp_path, membership, groups)) == cores


@pytest.mark.parametrize(
    ("quota", "visible", "used", "threads"),
    [("150000", 8, 2, 2), ("10000", 8, 1, 1), ("800000", 8, 8, None), ("900000", 8, 8, None), ("max", 8, 8, None)],
)
def test_threads_are_no_more_than_there_is_time_for(
    quota: str, visible: int, used: int, threads: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = system(tmp_path, "0::/a\n", {"a": {"cpu.max": f"{quota} 100000"}})
    monkeypatch.setattr(hardware, "_visible_cores", lambda: visible)
    assert hardware.cpu_cores(root) == used
    assert hardware.engine_threads(None, root) == threads
    assert hardware.engine_threads(6, root) == 6  # as asked for


def test_a_backend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "cores", lambda root: 0.5)
    monkeypatch.setattr(hardware, "_visible_cores", lambda: 8)
    assert choose(EngineOptions("openvino"))[1].threads == 1
    assert choose(EngineOptions("openvino", threads=3))[1].threads == 3
