"""Looks up nnU-Net model folders on the Hugging Face hub and downloads them.

A download goes on where it stopped, and every file is checked.

`huggingface_hub` keeps nothing of a file whose download was interrupted, and takes into memory whatever is answered. So
its session, which knows proxies and tokens, is asked for one part of a file after the other, and no more is received
than was asked for, nor anything packed, whose size nobody knows.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers

from edgemuse.engines.errors import ModelFolderError, OutputError, one_line
from edgemuse.runtime.cli.terminal import bar
from edgemuse.runtime.model.checks import parse_json

FILES = ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth")
SHA256 = re.compile(r"[0-9a-f]{64}")
SHA1 = re.compile(r"[0-9a-f]{40}")
CHUNK = 4 << 20
"""The hub is asked for this many bytes at a time, and an interruption loses no more than that."""
MAX_FILE_BYTES = 2 << 30
"""The most bytes that a file may have; the largest that is published has 0.3 GB."""
MAX_ANSWER_BYTES = 16 << 20
"""The most bytes that the hub may say about a repository."""
MOST = 200
"""No more characters than this are shown of what the hub says."""
TIMEOUT = 30
"""So many seconds the hub may take for each answer."""
WAITS = (1, 2, 4, 8)
"""Seconds before each further attempt to get a part of a file of which nothing came."""
BUSY = (408, 429, 500, 502, 503, 504)
"""Status codes after which another attempt makes sense."""
UNREACHABLE: tuple[Any, ...] = HfHubHTTPError.__bases__
"""The errors of the hub's HTTP library, which has changed over time, and OSError."""
UNLIKE_THE_HUB = (ValueError, KeyError, TypeError, AttributeError)


class _Refusal(Exception):
    """The hub's answer has another `status` than that all is well, and perhaps the hub's own name of the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class RemoteFile:
    """A file of the model folder, with the hash that the hub states: SHA-256 for large files, else git's SHA-1."""

    name: str
    bytes: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class Remote:
    """An nnU-Net model folder in a repository of the hub, at one revision.

    `license` is what the repository's card says, or None if it says nothing.
    """

    repository: str
    folder: str
    revision: str
    license: str | None
    files: tuple[RemoteFile, ...]


def look_up(repository: str, folder: str) -> Remote:
    """What the hub says about `folder` in the current revision of `repository`; raises ModelFolderError."""
    with _reported(repository):
        info = parse_json(_receive(f"{constants.ENDPOINT}/api/models/{repository}?blobs=true", MAX_ANSWER_BYTES))
        listed = {sibling["rfilename"]: sibling for sibling in info["siblings"] or ()}
        revision, license = str(info["sha"]), _license(info.get("cardData"))
    if not SHA1.fullmatch(revision):
        raise ModelFolderError(f"{repository}: the hub gives no revision, so it cannot be recorded; try again later")
    missing = [name for name in FILES if f"{folder}/{name}" not in listed]
    if missing:
        raise ModelFolderError(
            f"{repository}: there is no {missing[0]} in {folder}, so it changed; a newer edgemuse may know how"
        )
    with _reported(repository):
        files = tuple(_remote_file(name, listed[f"{folder}/{name}"]) for name in FILES)
    return Remote(repository, folder, revision, license, files)


def download(remote: Remote, target: Path) -> Path:
    """Download the files of `remote` into the folder `target`, which may hold some of them already, and return it.

    Raises:
        ModelFolderError: the hub cannot be reached, or a file differs from what it states; correct files are kept.
        OutputError: `target` cannot be written.
    """
    try:
        for file in remote.files:
            _fetch(remote, file, target / file.name)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror or error})") from error
    return target


def _fetch(remote: Remote, file: RemoteFile, target: Path) -> None:
    if target.is_file() and _is_right(target, file):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    _append(remote, file, part)
    if not _is_right(part, file):
        part.unlink()
        raise ModelFolderError(
            f"{remote.repository}: {file.name} is not what the hub states (size or hash), so it was thrown away; run "
            "this again, and if that does not help, ask who runs the network or the repository"
        )
    part.replace(target)


def _append(remote: Remote, file: RemoteFile, part: Path) -> None:
    """Append to `part` what it still lacks of `file`."""
    url = hf_hub_url(remote.repository, f"{remote.folder}/{file.name}", revision=remote.revision)
    with part.open("ab") as local, _bar(remote, file) as bar:
        bar.update(local.tell())
        while (left := file.bytes - local.tell()) > 0:
            with _reported(remote.repository):
                data = _receive_again(url, local.tell(), min(CHUNK, left))
            local.write(data)
            bar.update(len(data))


def _receive_again(url: str, first: int, count: int) -> bytes:
    """Up to `count` bytes of the file at `url` from byte `first` on, at least one; tried again where none comes."""
    for wait in WAITS:
        try:
            return _receive(url, count, first)
        except (_Refusal, *UNREACHABLE) as error:
            if isinstance(error, _Refusal) and error.status not in BUSY:
                raise
            time.sleep(wait)
    return _receive(url, count, first)


def _receive(url: str, most: int, first: int | None = None) -> bytes:
    """What is answered at `url`, at most `most` bytes, or as many of a file from byte `first` on.

    If the connection breaks, what came until then. Raises _Refusal, ValueError or what the HTTP library raises.
    """
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}
    if first is not None:
        headers["Range"] = f"bytes={first}-{first + most - 1}"
    received = bytearray()
    try:
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            _check(response, first)
            for data in response.iter_raw():
                if len(received) + len(data) > most:
                    raise ValueError(f"it sends more than the {most} bytes that were asked for")
                received += data
    except UNREACHABLE:
        if not received or first is None:
            raise
    if not received:
        raise ValueError("it sends nothing")
    return bytes(received)


def _check(response: Any, first: int | None) -> None:
    """Raise _Refusal or ValueError unless what follows is the content asked for, as it is."""
    if response.status_code not in (200, 206):
        raise _Refusal(response.status_code, response.headers.get("X-Error-Code", ""))
    if first and response.status_code != 206:
        raise ValueError("it does not go on within a file")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("it sends packed content, whose size is not known")


def _bar(remote: Remote, file: RemoteFile) -> Any:
    """A bar on stderr where that is a terminal, else one line."""
    size = f", {file.bytes / 1e6:.0f} MB" if file.bytes > 1e6 else ""
    label = f"getting {remote.repository} {Path(file.name).name}{size}"
    return bar(label, file.bytes)


def _is_right(path: Path, file: RemoteFile) -> bool:
    size = path.stat().st_size
    digest = hashlib.sha256()
    if not file.sha256:
        digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)  # as git names a file
    with path.open("rb") as content:
        while data := content.read(1 << 20):
            digest.update(data)
    return size == file.bytes and digest.hexdigest() == (file.sha256 or file.git_sha1)


def _remote_file(name: str, sibling: Any) -> RemoteFile:
    size, lfs = sibling["size"], sibling.get("lfs")
    sha256, sha1 = lfs["sha256"] if lfs else None, sibling["blobId"]
    if not isinstance(size, int) or not 0 < size <= MAX_FILE_BYTES:
        raise ValueError(f"{name} has no size")
    if not (SHA256.fullmatch(sha256) if sha256 else SHA1.fullmatch(sha1)):
        raise ValueError(f"{name} has no hash")
    return RemoteFile(name, size, sha256, None if sha256 else sha1)


def _license(card: Any) -> str | None:
    """The card's licence: an identifier of the hub's list, or for `other` the name and the link."""
    if card is None:
        return None
    stated = card.get("license")
    if stated == "other":
        stated = " ".join(str(part) for part in (card.get("license_name"), card.get("license_link")) if part) or "other"
    stated = ", ".join(map(str, stated)) if isinstance(stated, list) else stated
    return one_line(stated)[:MOST] if stated else None


@contextmanager
def _reported(repository: str) -> Iterator[None]:
    """Turn whatever a question to the hub raises into ModelFolderError."""
    try:
        yield
    except _Refusal as error:
        raise ModelFolderError(f"{repository}: {_refusal(error)}") from error
    except UNREACHABLE as error:
        raise ModelFolderError(
            f"{repository}: the hub cannot be reached ({one_line(error)[:MOST]}); run this again with a network: "
            "what is here already is not fetched twice. Or fetch on another machine and bring the file: "
            "'edgemuse models add'"
        ) from error
    except UNLIKE_THE_HUB as error:
        raise ModelFolderError(
            f"{repository}: what answers is not like the hub ({one_line(error)[:MOST]}); is HF_ENDPOINT right, or "
            "is a login page in between?"
        ) from error


def _refusal(error: _Refusal) -> str:
    if error.reason == "GatedRepo":
        return (
            "its owners give access on request; ask for it on the repository's page, then set HF_TOKEN or run "
            "'hf auth login', and run this again"
        )
    if error.reason == "RepoNotFound" or error.status == 401:
        return (
            "the hub has no such repository, or shows it to its members alone; if you are one, set HF_TOKEN or run "
            "'hf auth login'"
        )
    return f"the hub answered {error.status}; run this again later: what is here already is not fetched twice"
