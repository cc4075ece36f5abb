"""The engine cache: found again when nothing changed, rebuilt when anything did, and never a reason to fail."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import Tiny, cached, snapshot, tiny_graph, tiny_oracle

from edgemuse.engines import cache
from edgemuse.engines.protocol import EngineOptions
from edgemuse.engines.registry import NAMES, open_engine, statuses

SHAPE = (1, 1, 8, 10, 12)
HIT = "engine from cache"
KEY = "0123456789" * 4


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
    return [path for path in cached(folder, ".engine") if not path.stem.endswith(".kernels")]


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
    entries(tmp_path)[0].unlink()
    assert blob == stored


def test_least_recently_used_entries_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_BYTES", 3 * (32 + 1000))
    a, b, c, d = (digit * 40 for digit in "abcd")
    for age, key in enumerate((a, b, c)):
        cache.store(tmp_path, key, bytes(1000))
        os.utime(cache.place_of(tmp_path, f"{key}.engine"), (1000 + age, 1000 + age))
    assert cache.load(tmp_path, a) is not None  # so that b is now the oldest
    cache.store(tmp_path, d, bytes(1000))
    assert [path.stem for path in entries(tmp_path)] == [a, c, d]


def test_what_others_keep_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the sub-folder and even in it: only names that are given here are removed."""
    monkeypatch.setattr(cache, "MAX_BYTES", 0)
    cache.store(tmp_path, KEY, b"blob")
    own = tmp_path / cache.NAME
    strange = ["thesis.tmp", "resnet50.engine", f"{KEY}.onnx", f"{KEY[:-1]}.engine", f"{KEY}.engine.bak"]
    for folder in (tmp_path, own):
        for name in strange:
            (folder / name).write_bytes(b"somebody else's")
            os.utime(folder / name, (1000, 1000))
    left = [
        "CACHEDIR.TAG.0123abcd.tmp",
        f"{KEY}.engine.0123abcd.tmp",
        f"{KEY}.tuned.json.0123abcd.tmp",
        f"{KEY}.kernels.engine.0123abcd.tmp",
    ]
    for name in left:
        (own / name).touch()
        os.utime(own / name, (1000, 1000))
    (own / f"{KEY}.engine.89abcdef.tmp").touch()
    cache.store(tmp_path, KEY[::-1], b"blob")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([cache.NAME, *strange])
    assert sorted(path.name for path in own.iterdir()) == sorted(
        [*strange, "CACHEDIR.TAG", f"{KEY}.engine.89abcdef.tmp"]
    )


def test_the_folder_is_marked_as_a_cache(tmp_path: Path) -> None:
    """By the text of bford.info/cachedir, and nobody else may look into it."""
    path = cache.save(tmp_path / "new" / "folder", KEY, b"blob")
    assert path.parent == tmp_path / "new" / "folder" / cache.NAME
    tag = (path.parent / "CACHEDIR.TAG").read_bytes()
    assert tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    if os.name == "posix":
        assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `path` belong to somebody else, by root's right or by being somebody else."""
    if os.geteuid() == 0:
        os.chown(path, 4242, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)


def link(path: Path, _: pytest.MonkeyPatch) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def pipe(path: Path, _: pytest.MonkeyPatch) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def open_to_all(path: Path, _: pytest.MonkeyPatch) -> None:
    path.chmod(0o777)


def open_to_the_group(path: Path, _: pytest.MonkeyPatch) -> None:
    path.chmod(0o770)


posix = pytest.mark.skipif(os.name != "posix", reason="Windows has other rights")


@posix
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (give_away, "belongs to another user (number "),
        (
            open_to_all,
            "may be written to by others, so nothing in it is used and nothing is kept there; run: chmod go-w ",
        ),
        (open_to_the_group, "may be written to by others"),
        (
            link,
            "is a link, so nothing in it is used and nothing is kept there; set EDGEMUSE_CACHE_DIR to another folder",
        ),
    ],
)
def test_a_folder_that_others_may_write_to_is_neither_used_nor_written(
    spoil: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, although it is looked at again and again."""
    own = cache.save(tmp_path, KEY, b"blob").parent
    before = snapshot(own)
    spoil(own, monkeypatch)
    assert cache.load(tmp_path, KEY) is None
    cache.store(tmp_path, KEY[::-1], b"other")
    assert cache.read(tmp_path, f"{KEY}.engine", 100) is None
    assert cache.names(tmp_path, ".engine") == []
    with pytest.raises(OSError, match="nothing is kept there"):
        cache.save(tmp_path, KEY, b"other")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"{own} " in record.getMessage()
    assert said in record.getMessage()
    assert snapshot(own) == before


@posix
@pytest.mark.parametrize("spoil", [give_away, open_to_all, open_to_the_group, link, pipe])
def test_a_file_that_others_may_have_written_is_made_anew(
    spoil: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if spoil is give_away and os.geteuid():
        pytest.skip("only root can give a single file away")
    path = cache.save(tmp_path, KEY, b"blob")
    spoil(path, monkeypatch)
    assert cache.load(tmp_path, KEY) is None
    assert cache.load(tmp_path, KEY) is None
    assert cache.read(tmp_path, path.name, 100) is None
    (record,) = caplog.records
    assert f"{path} " in record.getMessage()
    assert record.getMessage().endswith(", so it is not used; remove it")
    cache.store(tmp_path, KEY, b"new")
    assert cache.load(tmp_path, KEY) == b"new"
    if spoil is link:
        assert path.with_name("elsewhere").read_bytes().endswith(b"blob")


def test_without_folders_that_can_be_opened_all_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on Windows, where files are reached by their paths and only links are refused."""
    monkeypatch.setattr("edgemuse.engines.private.RELATIVE", False)
    monkeypatch.setattr("edgemuse.engines.private.FLAGS", 0)
    monkeypatch.setattr("edgemuse.engines.private.READ", os.O_RDONLY | getattr(os, "O_BINARY", 0))
    test_what_is_stored_is_loaded(tmp_path)
    test_least_recently_used_entries_go(tmp_path / "other", monkeypatch)
    path = cache.save(tmp_path, KEY, b"blob")
    path.rename(tmp_path / "elsewhere")
    try:
        path.symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("no right to make links")
    assert cache.load(tmp_path, KEY) is None
    assert "is a link, so it is not used; remove it" in caplog.text


def test_failure_while_storing_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache.store(tmp_path, KEY, b"blob")
    assert [path.name for path in tmp_path.rglob("*")] == [cache.NAME]
    assert "No space left on device" in caplog.text
