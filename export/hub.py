"""Model folders on the Hugging Face hub: what they hold, and getting them, resumed where it stopped and checked.

`huggingface_hub` keeps nothing of a file whose download was interrupted, so files are read through its file system,
which can start anywhere in them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from edgemuse.engines.errors import ModelFolderError, OutputError, one_line
from edgemuse.runtime.cli.terminal import bar
from edgemuse.runtime.model.manifest import MAX_FILE_BYTES

FILES = ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth")
SHA256 = re.compile(r"[0-9a-f]{64}")
SHA1 = re.compile(r"[0-9a-f]{40}")
CHUNK = 4 << 20
"""Bytes asked for at a time, and the most that an interruption loses."""
MOST = 200
"""Characters shown of what the hub says."""
TIMEOUT = 30
"""Seconds to wait for the hub's first answer."""
UNREACHABLE: tuple[Any, ...] = HfHubHTTPError.__bases__
"""What its HTTP library raises, which one that is having changed over time, and OSError."""
UNLIKE_THE_HUB = (ValueError, KeyError, TypeError, AttributeError)


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

    `license`: as the repository's card gives it; None: it gives none.
    """

    repository: str
    folder: str
    revision: str
    license: str | None
    files: tuple[RemoteFile, ...]


def look_up(repository: str, folder: str) -> Remote:
    """What the hub says of `folder` in `repository` as it is now; raises ModelFolderError."""
    with _reported(repository):
        info = HfApi().model_info(repository, files_metadata=True, timeout=TIMEOUT)
        listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        revision, license = str(info.sha), _license(info.card_data)
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
    """Get the files of `remote` into the folder `target`, which may hold part of them, and return it.

    Raises:
        ModelFolderError: the hub cannot be reached, or a file is not what it states; what is right is kept.
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
    """Add to `part` what it lacks of `file`."""
    path = f"{remote.repository}@{remote.revision}/{remote.folder}/{file.name}"
    with part.open("ab") as local, _bar(remote, file) as bar:
        bar.update(local.tell())
        if local.tell() >= file.bytes:
            return
        with _reported(remote.repository):
            source = HfFileSystem(skip_instance_cache=True).open(path, "rb", block_size=CHUNK, cache_type="none")
            source.seek(local.tell())
        while data := _read(remote, source, min(CHUNK, file.bytes - local.tell())):
            local.write(data)
            bar.update(len(data))


def _read(remote: Remote, source: Any, size: int) -> bytes:
    with _reported(remote.repository):
        data: bytes = source.read(size) if size > 0 else b""
        return data


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
    size = sibling.size
    sha256, sha1 = sibling.lfs.sha256 if sibling.lfs else None, sibling.blob_id
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
    """What asking the hub raises, as ModelFolderError."""
    try:
        yield
    except GatedRepoError as error:
        raise ModelFolderError(
            f"{repository}: its owners give access on request; ask for it on the repository's page, then set HF_TOKEN "
            "or run 'hf auth login', and run this again"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelFolderError(
            f"{repository}: the hub has no such repository, or shows it to its members alone; if you are one, set "
            "HF_TOKEN or run 'hf auth login'"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise ModelFolderError(
            f"{repository}: the hub answered {status}; run this again later: what is here already is not fetched twice"
        ) from error
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
