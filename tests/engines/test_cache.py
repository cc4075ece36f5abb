"""The engine cache: found again when nothing changed, rebuilt when anything did, and never a reason to fail."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from bundles import Tiny, tiny_graph, tiny_oracle

from edgemuse.engines import cache
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import NAMES, open_engine, statuses

SHAPE = (1, 1, 8, 10, 12)
HIT = "engine from cache"


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    status = next(status for status in statuses() if status.backend.name == request.param)
    if status.reason:
        pytest.skip(status.reason)
    return str(request.param)


@pytest.fixture(autouse=True)
def _hear_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "edgemuse")


def run(name: str, folder: Path | None, seed: int = 0, **changes: object) -> None:
    """Open an engine with the cache in `folder` and see that it computes what it should."""
    options = EngineOptions(backend=name, cache_dir=folder, **changes)  # type: ignore[arg-type]
    tiny = Tiny(seed=seed)
    engine = open_engine(tiny_graph(tiny), SHAPE, options)
    batch = np.random.default_rng(1).normal(0, 1, SHAPE).astype(np.float32)
    wanted = tiny_oracle(batch[0, 0], tiny)
    assert np.abs(engine.infer(batch)[0] - wanted).max() < 1e-5 * np.abs(wanted).max()
    engine.close()


def entries(folder: Path) -> list[Path]:
    """Compiled models; TensorRT-RTX keeps the kernels of a GPU beside them."""
    return sorted(path for path in folder.glob("*.engine") if not path.stem.endswith(".kernels"))


def test_second_time_is_from_the_cache(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(name, tmp_path / "new" / "folder")
    assert HIT not in caplog.text
    run(name, tmp_path / "new" / "folder")
    assert HIT in caplog.text
    assert len(entries(tmp_path / "new" / "folder")) == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_without_a_folder_nothing_is_kept(name: str, caplog: pytest.LogCaptureFixture) -> None:
    run(name, None)
    run(name, None)
    assert HIT not in caplog.text


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "short"])
def test_damaged_entry_is_built_anew(damage: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(name, tmp_path)
    (entry,) = entries(tmp_path)
    raw = entry.read_bytes()
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 1
    entry.write_bytes({"flipped": bytes(flipped), "cut": raw[:-1], "empty": b"", "short": raw[:20]}[damage])
    run(name, tmp_path)
    assert "is damaged; compiling again" in caplog.text
    assert HIT not in caplog.text
    run(name, tmp_path)
    assert HIT in caplog.text


@pytest.mark.parametrize("blob", [b"", b"not an engine" * 100], ids=["empty", "text"])
def test_entry_that_the_backend_refuses_is_built_anew(
    blob: bytes, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its checksum is right: another version's format, or a bug of ours."""
    run(name, tmp_path)
    (entry,) = entries(tmp_path)
    entry.write_bytes(hashlib.sha256(blob).digest() + blob)
    run(name, tmp_path)
    assert HIT not in caplog.text
    run(name, tmp_path)
    assert HIT in caplog.text


@pytest.mark.parametrize("below", [".", "below"])
def test_unusable_folder_is_only_a_warning(
    below: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("a file")
    run(name, tmp_path / "taken" / below)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "compiled engine not kept" in caplog.text


def test_every_choice_has_an_entry_of_its_own(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(name, tmp_path)
    run(name, tmp_path, seed=1)
    if name != "tensorrt":  # processor cores are nothing to a GPU
        run(name, tmp_path, threads=1)
    open_engine(tiny_graph(), (1, 1, 8, 10, 13), EngineOptions(name, cache_dir=tmp_path)).close()
    assert len(entries(tmp_path)) == (3 if name == "tensorrt" else 4)
    assert HIT not in caplog.text


def test_another_version_of_edgemuse_builds_anew(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(name, tmp_path)
    monkeypatch.setattr("edgemuse.engines.registry.version", lambda package: f"next {package}")
    run(name, tmp_path)
    assert HIT not in caplog.text


FACTS = {
    "graph": "ab",
    "backend": "openvino",
    "version": "1",
    "device": "CPU",
    "precision": "fp32",
    "shape": (1, 1, 2, 3, 4),
    "processor": "x",
    "threads": None,
}


@pytest.mark.parametrize("fact", FACTS)
def test_key_depends_on_every_fact(fact: str) -> None:
    assert cache.cache_key(FACTS) == cache.cache_key(dict(reversed(FACTS.items())))
    assert cache.cache_key(FACTS) != cache.cache_key(FACTS | {fact: "other"})
    assert cache.cache_key(FACTS) != cache.cache_key({k: v for k, v in FACTS.items() if k != fact})


def test_what_is_stored_is_loaded(tmp_path: Path) -> None:
    cache.store(tmp_path, "key", b"blob")
    assert cache.load(tmp_path, "key") == b"blob"
    assert cache.load(tmp_path, "other") is None
    assert cache.load(tmp_path / "missing", "key") is None


def test_memory_that_is_given_back_is_read_again(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).bytes(1 << 20)
    cache.store(tmp_path, "key", stored)
    blob = cache.load(tmp_path, "key")
    assert blob is not None
    cache.give_back(blob)
    (tmp_path / "key.engine").unlink()
    assert blob == stored


def test_least_recently_used_entries_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * (32 + 1000))
    for age, key in enumerate("abc"):
        cache.store(tmp_path, key, bytes(1000))
        os.utime(tmp_path / f"{key}.engine", (1000 + age, 1000 + age))
    (tmp_path / "notes.txt").write_text("somebody else's")
    assert cache.load(tmp_path, "a") is not None  # so that b is now the oldest
    cache.store(tmp_path, "d", bytes(1000))
    assert [path.stem for path in entries(tmp_path)] == ["a", "c", "d"]
    assert (tmp_path / "notes.txt").exists()


def test_failure_while_storing_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache.store(tmp_path, "key", b"blob")
    assert not list(tmp_path.iterdir())
    assert "No space left on device" in caplog.text
