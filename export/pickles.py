"""PyTorch's files read without PyTorch: nothing that a pickle names is called, and only what is asked for is read.

A file of PyTorch is a zip file: a pickle, which says how tensors lie in storages, and the bytes of each storage. A
pickle from elsewhere may call anything, and even with `weights_only` PyTorch unpacks and makes whatever it is told to.
Here names become notes, tensors become a description, and sizes are known before a byte of a storage is read.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from edgemuse.runtime.model.archive import check_listing, check_members

KNOWN = re.compile(
    r"torch (?:Size|device|bool|b?float\d+|u?int\d+|complex\d+)|_codecs encode"
    r"|(?:builtins|__builtin__) (?:set|complex)|numpy dtype|numpy\._?core\.multiarray scalar|numpy\.dtypes \w+DType"
)
"""What the pickle of a checkpoint names besides tensors, as module and name: the numbers of a log, and the like."""
STORAGE = re.compile(r"torch (\w+)Storage")
TYPES: Mapping[str, torch.dtype] = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
}
"""By the name of a storage; other types are not needed for weights."""
MAX_PICKLE_BYTES = 32 << 20
"""The log of a long training with many classes has a quarter of that."""
MAX_MEMBERS = 100_000
"""Parts of a file; there is one for each weight and each state of the optimizer."""
OPENERS = b"}]\x85\x86\x87"
"""Instructions of one byte that make an object of fifty; the log of a training has one in 14 bytes."""
MAX_SHARE, SLACK = 0.25, 100_000
"""Of a pickle that may be such instructions, and how many may be in any."""


OLD = 0x1950A86A20F9469CFC6C
"""The first pickle of a file from before PyTorch 1.6."""


class ForbiddenError(ValueError):
    """A pickle would call something that no checkpoint needs; its text is what."""


@dataclass(frozen=True)
class Storage:
    """`count` numbers of a type, in the part of the file that is called `key`; of types not needed `type` is None."""

    type: torch.dtype | None
    key: str
    count: int


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a storage: all counted in numbers of it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """That it would take by itself."""
        return math.prod(self.shape) * (1 if self.storage.type is None else self.storage.type.itemsize)


class TorchFile:
    """An opened file of PyTorch: `content`, with a `Stored` for each tensor. Raises ValueError, and in other ways."""

    def __init__(self, file: IO[bytes]) -> None:
        check_listing(file, MAX_MEMBERS)
        self._zip = zipfile.ZipFile(file)
        members = self._zip.infolist()
        self.size = file.seek(0, 2)
        check_members(members, self.size, MAX_MEMBERS)
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its parts are compressed, which PyTorch does not do")
        (found,) = (member.filename for member in members if member.filename.endswith("/data.pkl"))
        self._folder = found.removesuffix("data.pkl")
        if self._part("byteorder", sys.byteorder.encode()).strip() != sys.byteorder.encode():
            raise ValueError(f"it was not written by a {sys.byteorder}-endian machine")
        self.content = unpickle(self._part("data.pkl"))

    def _part(self, name: str, otherwise: bytes | None = None) -> bytes:
        if otherwise is not None and self._folder + name not in self._zip.namelist():
            return otherwise
        if self._zip.getinfo(self._folder + name).file_size > MAX_PICKLE_BYTES:
            raise ValueError(f"its {name} is larger than {MAX_PICKLE_BYTES} bytes")
        return self._zip.read(self._folder + name)

    def tensors(self, stored: Mapping[str, Stored]) -> dict[str, torch.Tensor]:
        """The tensors that `stored` describes; raises ValueError if they would be larger than the file."""
        total = sum(tensor.bytes for tensor in set(stored.values()))  # one may go by several names
        if total > self.size:
            raise ValueError(f"its weights have {total} bytes, more than the file itself")
        storages = {tensor.storage.key: self._storage(tensor.storage) for tensor in stored.values()}
        return {
            name: torch.as_strided(storages[tensor.storage.key], tensor.shape, tensor.stride, tensor.offset)
            for name, tensor in stored.items()
        }

    def _storage(self, storage: Storage) -> torch.Tensor:
        name = f"{self._folder}data/{storage.key}"
        if storage.type is None or self._zip.getinfo(name).file_size != storage.count * storage.type.itemsize:
            raise ValueError(f"its part data/{storage.key} is not as large as it says")
        data = bytearray(self._zip.read(name))
        return torch.frombuffer(data, dtype=storage.type) if data else torch.empty(0, dtype=storage.type)


def unpickle(data: bytes) -> Any:
    """What a pickle describes, with notes in place of what it would call; raises ForbiddenError and in other ways."""
    if sum(data.count(opener) for opener in OPENERS) > MAX_SHARE * len(data) + SLACK:
        raise ValueError("its pickle makes more than it holds")
    return _Unpickler(io.BytesIO(data), encoding="latin1").load()


def is_old(data: bytes) -> bool:
    """Whether a file that begins with `data` is as PyTorch wrote it before 1.6: pickles one after the other.

    Raises ForbiddenError if one of them would call what it should not, and in other ways if it is no pickle.
    """
    stream = io.BytesIO(data)
    first = _Unpickler(stream, encoding="latin1").load()
    with contextlib.suppress(EOFError):
        for _ in range(3):  # the version, the system, the content
            _Unpickler(stream, encoding="latin1").load()
    return bool(first == OLD)


class _Note:
    """What a pickle makes of anything that is not needed. It holds nothing and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Note:
        return object.__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


class _Names(dict[Any, Any]):
    """An OrderedDict; Python's are in order. What it is made from would be copied, so it stays away."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module} {name}"
        if found := STORAGE.fullmatch(full):
            return TYPES.get(found[1])
        if full in MAKERS:
            return MAKERS[full]
        if KNOWN.fullmatch(full):
            return _Note
        raise ForbiddenError(full.replace(" ", "."))

    def persistent_load(self, pid: Any) -> Storage:
        kind, type, key, _, count, *_ = pid
        if kind != "storage" or not isinstance(key, str) or not _is_count(count):
            raise ValueError("its pickle names something that is not a storage")
        return Storage(type if isinstance(type, torch.dtype) else None, key, count)


def _tensor(storage: object, offset: Any, shape: object, stride: object, *_: object) -> Stored:
    """As PyTorch's function that puts a tensor together."""
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise ValueError("its pickle makes a tensor of something else")
    if not all(map(_is_count, (offset, *shape, *stride))):
        raise ValueError("its pickle makes a tensor of no size")
    return Stored(storage, offset, shape, stride)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _parameter(tensor: object, *_: object) -> object:
    return tensor


MAKERS: Mapping[str, Any] = {
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
    "collections OrderedDict": _Names,
}
"""What is made here of what a pickle calls, by module and name."""
