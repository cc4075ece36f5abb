"""The bytes of a file, read once: what gzip holds, what its checksum and hash are, and what changes meanwhile."""

from __future__ import annotations

import gzip
import hashlib
import os
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemuse.engines.errors import InputError
from edgemuse.runtime.scan import source
from edgemuse.runtime.scan.source import Source, unzipped

CONTENT = random.Random(0).randbytes(5000) + bytes(300_000)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def everything(path: Path) -> tuple[bytes, str]:
    with Source(path) as opened:
        return opened.read(1 << 30), opened.finish()


@given(
    members=st.lists(st.binary(max_size=300).map(lambda part: part * 40), min_size=1, max_size=4),
    zeros=st.integers(0, 9),
    garbage=st.sampled_from([b"", b"x", b"x" * 50, b"\x1f", b"\0\1", b"\x1e\x8b" * 20]),
    size=st.integers(1, 200),
)
def test_members_are_one_content_in_blocks_of_any_size(
    members: list[bytes], zeros: int, garbage: bytes, size: int
) -> None:
    """Zeros between and behind them are padding; what is no member ends it, as with the program gzip."""
    stored = b"".join(gzip.compress(member) + bytes(zeros) for member in members) + garbage
    blocks = iter([stored[start : start + size] for start in range(0, len(stored), size)])
    assert b"".join(unzipped(blocks)) == b"".join(members)
    assert next(blocks, None) is None  # all of them were hashed


@pytest.mark.parametrize("cut", [1, 4, 9, 100])
def test_a_member_that_is_cut_off_raises(cut: int) -> None:
    for stored in (gzip.compress(CONTENT)[:-cut], gzip.compress(b"whole") + gzip.compress(CONTENT)[:-cut]):
        with pytest.raises(EOFError, match="ends too early"):
            list(unzipped(iter([stored])))


@pytest.mark.parametrize("where", [-6, -2])
def test_checksum_and_length_are_compared(where: int) -> None:
    stored = bytearray(gzip.compress(CONTENT))
    stored[where] ^= 1
    with pytest.raises(zlib.error):
        list(unzipped(iter([bytes(stored)])))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_content_in_pieces_and_hash_of_the_file(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, gzip.compress(CONTENT) + b"behind" if name.endswith("gz") else CONTENT)
    with Source(path) as opened:
        assert opened.zipped == name.endswith("gz")
        assert opened.read(10) == CONTENT[:10]
        assert opened.skip(90) == 90
        assert opened.read(299_000) == CONTENT[100:299_100]
        assert opened.finish() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert everything(path)[0] == CONTENT


def test_hash_is_of_what_was_read_though_the_file_is_replaced(tmp_path: Path) -> None:
    path, other = written(tmp_path / "a.nii", CONTENT), written(tmp_path / "b.nii", CONTENT[::-1])
    with Source(path) as opened:
        os.replace(other, path)
        assert opened.read(1 << 30) == CONTENT
        assert opened.finish() == hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("added", [b"", b"more"])
def test_a_file_that_is_changed_while_it_is_read_is_refused(added: bytes, tmp_path: Path) -> None:
    path = written(tmp_path / "a.nii", CONTENT)
    os.utime(path, (0, 0))
    with Source(path) as opened:
        written(path, CONTENT[::-1][len(added) :] + added)
        with pytest.raises(InputError, match=r"a\.nii: the file was changed while it was read; segment it again"):
            opened.finish()


def test_what_follows_is_read_up_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_TAIL_BYTES", 300_000)
    path = written(tmp_path / "a.nii.gz", gzip.compress(CONTENT))
    with Source(path) as opened:
        opened.read(5000)
        assert opened.finish() == hashlib.sha256(path.read_bytes()).hexdigest()
    with Source(path) as opened:
        opened.read(4999)
        with pytest.raises(EOFError, match="follow the voxels"):
            opened.finish()
