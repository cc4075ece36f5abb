"""A GPU that `auto` chose may fail: the CPU takes over, once, and says so. One that was named may not."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from edgemuse.engines.errors import BackendError
from edgemuse.engines.fake import FunctionEngine
from edgemuse.engines.fallback import open_with_fallback
from edgemuse.engines.protocol import Batch, Engine, EngineOptions

TILE = np.ones((1, 1, 2, 2, 2), np.float32)


GPU, CPU = (EngineOptions("some", "fp32", device) for device in ("GPU", "CPU"))


class Machine:
    """A GPU that fails at opening or at the tile `broken`, and a CPU; `used` lists what ran, `told` why it had to."""

    def __init__(self, broken: int | None, cpu_works: bool = True) -> None:
        self.broken, self.cpu_works = broken, cpu_works
        self.used: list[str] = []
        self.closed: list[str] = []
        self.told: list[str] = []

    def spare(self, reason: str) -> EngineOptions:
        self.told.append(reason)
        if not self.cpu_works:
            raise BackendError("no usable backend")
        return CPU

    def open(self, options: EngineOptions) -> Engine:
        if options.device == "GPU" and self.broken == -1:
            raise BackendError("out of memory")
        engine = FunctionEngine(lambda batch: self.run(options.device, batch))
        engine.device, engine.backend = options.device, f"{options.device}-backend"
        engine.close = lambda: self.closed.append(options.device)  # type: ignore[method-assign]
        return engine

    def run(self, device: str, batch: Batch) -> Batch:
        if device == "GPU" and len(self.used) == self.broken:
            raise BackendError("the GPU is lost")
        self.used.append(device)
        return 2 * batch


@pytest.mark.parametrize("broken", [-1, 0, 2])
def test_cpu_takes_over_once(broken: int, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(broken)
    engine = open_with_fallback(machine.open, GPU, machine.spare)
    for _ in range(4):
        np.testing.assert_array_equal(engine.infer(TILE), 2 * TILE)
    assert machine.used == ["GPU"] * max(broken, 0) + ["CPU"] * (4 - max(broken, 0))
    assert (engine.device, engine.backend) == ("CPU", "CPU-backend")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert [record.getMessage()] == [f"{reason}; going on with the CPU" for reason in machine.told]
    assert machine.closed == (["GPU"] if broken >= 0 else [])
    engine.close()
    assert machine.closed[-1] == "CPU"


def test_gpu_that_works_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(None)
    engine = open_with_fallback(machine.open, GPU, machine.spare)
    engine.infer(TILE)
    assert (engine.device, machine.told, caplog.records) == ("GPU", [], [])


@pytest.mark.parametrize("broken", [-1, 0])
def test_without_a_spare_a_failure_is_an_error(broken: int) -> None:
    machine = Machine(broken)
    with pytest.raises(BackendError):
        open_with_fallback(machine.open, GPU, None).infer(TILE)
    assert machine.used == []


@pytest.mark.parametrize("broken", [-1, 0])
def test_no_cpu_either(broken: int) -> None:
    """Both reasons are given."""
    machine = Machine(broken, cpu_works=False)
    with pytest.raises(BackendError, match=r"(memory|lost); and the CPU cannot take over: no usable backend"):
        open_with_fallback(machine.open, GPU, machine.spare).infer(TILE)


def test_cpu_that_fails_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(0)
    engine = open_with_fallback(machine.open, GPU, machine.spare)
    engine.infer(TILE)
    monkeypatch.setattr(machine, "run", lambda *_: (_ for _ in ()).throw(BackendError("the CPU fails too")))
    with pytest.raises(BackendError, match=r"^the CPU fails too$"):
        engine.infer(TILE)
    assert machine.closed == ["GPU"]
    assert len(machine.told) == 1
