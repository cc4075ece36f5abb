"""Choosing a backend: the order of preference, and the reason for every one that is rejected."""

from __future__ import annotations

import re
import sys
from types import ModuleType

import pytest
from bundles import tiny_graph

from edgemuse.engines import registry
from edgemuse.engines.errors import BackendError
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import BACKENDS, basis, choose, open_engine, statuses

SHAPE = (1, 1, 8, 8, 8)


class FakeBackend(ModuleType):
    """The module of a backend that is not there: two devices, the first with two precisions."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.Engine = type("Engine", (), {"version": "1.2"})

    def probe(self) -> dict[str, list[str]]:
        return {"CPU": ["fp32", "bf16"], "NPU": ["bf16"]}

    def processor(self, device: str) -> str:
        return f"some {device}, driver 7"


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeBackend]:
    """The registry holds two fakes instead, `first` and `second`."""
    modules = [FakeBackend(name) for name in ("first", "second")]
    for module in modules:
        monkeypatch.setitem(sys.modules, f"fake.{module.__name__}", module)
    rows = tuple(registry.Backend(m.__name__, f"fake.{m.__name__}", "Engine", f"pip-{m.__name__}") for m in modules)
    monkeypatch.setattr(registry, "BACKENDS", rows)
    monkeypatch.setattr(registry, "NAMES", tuple(row.name for row in rows))
    return modules


def failing(message: str, error: type[Exception] = RuntimeError) -> object:
    def probe() -> None:
        raise error(message)

    return probe


def hide(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As if the library `name` were not installed."""
    monkeypatch.delitem(sys.modules, f"edgemuse.engines.{name}", raising=False)
    for library in [name, *(["tensorrt_rtx"] if name == "tensorrt" else [])]:
        monkeypatch.setitem(sys.modules, library, None)


def refusal(**options: str) -> str:
    with pytest.raises(BackendError) as caught:
        choose(EngineOptions(**options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("fakes")
def test_auto_takes_the_first() -> None:
    backend, options = choose(EngineOptions())
    assert backend.name == "first"
    assert options == EngineOptions(backend="first", precision="fp32", device="CPU")


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("device", ["npu", "NPU"])
def test_options_are_made_definite(device: str) -> None:
    _, options = choose(EngineOptions(backend="second", precision="bf16", device=device, threads=3))
    assert options == EngineOptions(backend="second", precision="bf16", device="NPU", threads=3)


def test_auto_goes_on_to_the_next(fakes: list[FakeBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes[0], "probe", dict)
    assert choose(EngineOptions())[0].name == "second"
    assert next(statuses()).reason == "it finds no device that edgemuse can use"


def test_a_backend_that_was_asked_for_is_never_replaced(
    fakes: list[FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fakes[0], "probe", dict)
    message = refusal(backend="first")
    assert message == "no usable backend: first: it finds no device that edgemuse can use"


@pytest.mark.usefixtures("fakes")
def test_what_is_refused_is_not_taken() -> None:
    """It is one precision on one device, and the reason is that of the caller."""
    refused = {("first", "CPU", "fp32"): "first is out of order"}
    assert choose(EngineOptions(), refused)[0].name == "second"
    assert choose(EngineOptions(precision="bf16"), refused)[0].name == "first"
    with pytest.raises(BackendError, match=r"^no usable backend: first is out of order$"):
        choose(EngineOptions("first"), refused)


@pytest.mark.usefixtures("fakes")
def test_what_results_rest_on() -> None:
    assert basis(EngineOptions("second", "bf16", "NPU")) == {
        "backend": "second",
        "version": "1.2",
        "device": "NPU",
        "precision": "bf16",
        "processor": "some NPU, driver 7",
    }


@pytest.mark.parametrize("name", registry.NAMES)
def test_real_backends_name_their_processor(name: str) -> None:
    status = next(statuses(name))
    if status.reason:
        pytest.skip(status.reason)
    found = basis(EngineOptions(name, "fp32", next(iter(status.devices))))
    assert found["version"] == status.version
    assert found["processor"]


def test_every_reason_is_given(fakes: list[FakeBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes[0], "probe", failing("driver\n  asleep"))
    message = refusal(device="gpu")
    assert message == (
        "no usable backend: first: it does not start (driver asleep); second: no device GPU, only CPU, NPU"
    )


@pytest.mark.usefixtures("fakes")
def test_precision_that_a_device_lacks() -> None:
    assert refusal(backend="first", precision="fp32", device="NPU").endswith("first: no fp32 on this NPU, only bf16")


@pytest.mark.usefixtures("fakes")
def test_unknown_backend() -> None:
    assert refusal(backend="third") == "unknown backend 'third'; choose from auto, first, second"


@pytest.mark.parametrize("row", BACKENDS, ids=lambda row: row.name)
def test_missing_library_names_the_pip_command(row: registry.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, row.name)
    message = refusal(backend=row.name)
    where = "" if row.name == "openvino" else " in edgemuse's source folder"
    assert message == (f'no usable backend: {row.name}: it is not installed; run: pip install "{row.install}"{where}')
    with pytest.raises(BackendError, match=re.escape(message)):
        open_engine(tiny_graph(), SHAPE, EngineOptions(backend=row.name))


def test_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is installed, but a shared library below it is missing: another message than where it is not."""
    monkeypatch.delitem(sys.modules, "edgemuse.engines.openvino", raising=False)

    class Broken:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "openvino":
                raise ImportError("libtbb.so.12: cannot open shared object file\nno such file", name="_pyopenvino")

    monkeypatch.delitem(sys.modules, "openvino", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    message = refusal(backend="openvino")
    assert "openvino: its installation does not load (libtbb.so.12" in message


def test_auto_survives_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="the next backend must be there")
    hide(monkeypatch, "openvino")
    engine = open_engine(tiny_graph(), SHAPE, EngineOptions())
    assert engine.backend == "onnxruntime"
    engine.close()
    assert 'openvino: it is not installed; run: pip install "openvino"' in [status.reason for status in statuses()]


@pytest.mark.parametrize("name", registry.NAMES)
@pytest.mark.parametrize(("what", "value"), [("device", "toaster"), ("precision", "int3")])
def test_real_backends_refuse_what_they_lack(name: str, what: str, value: str) -> None:
    status = next(status for status in statuses() if status.backend.name == name)
    if status.reason:
        pytest.skip(status.reason)
    message = refusal(backend=name, **{what: value})
    assert message.startswith(f"no usable backend: {name}: no ")
    assert value in message.lower()
