"""A server on this machine that answers as the Hugging Face hub does, as far as huggingface_hub asks to download."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
NO_REPOSITORY = (404, {"X-Error-Code": "RepoNotFound"})
GATED = (403, {"X-Error-Code": "GatedRepo"})
BLOCK = 1 << 20


@dataclass
class Repository:
    """Files by their path, and the metadata of the card. Those that end with `.pth` are large files (LFS)."""

    files: dict[str, bytes]
    card: dict[str, Any] | None = field(default_factory=lambda: {"license": "cc-by-nc-4.0"})
    gated: bool = False


@dataclass
class Hub:
    """What the server has, what goes wrong, and what it was asked.

    Attributes:
        url: for HF_ENDPOINT.
        repositories: by `owner/name`.
        overrides: keys of the answer about a repository that replace the true ones.
        served: path and range of every request for the content of a file.
        budget: bytes of content still to be given; when they are used up, 403. None: any number.
        cuts: how many more times a connection is cut in the middle of a file.
        swapped: content by path that is sent instead of what is listed.
        busy: status codes of the next answers to requests for files.
        more: zeros that follow every answer whose path contains `more_at`, and are announced.
        more_at: see `more`.
        ranges: answer with the part of a file that is asked for; else with all of it.
        packed: send content packed with gzip, asked for or not.
        sent: bytes of answers that were taken.
        hold: at this request for content, counted from 1, `held` is set and nothing is sent until `released` is set.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    served: list[tuple[str, str | None]] = field(default_factory=list)
    budget: int | None = None
    cuts: int = 0
    swapped: dict[str, bytes] = field(default_factory=dict)
    busy: list[int] = field(default_factory=list)
    more: int = 0
    more_at: str = ""
    ranges: bool = True
    packed: bool = False
    sent: int = 0
    hold: int = 0
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, folder: Path, inside: str, **changes: Any) -> Repository:
        """Publish the files under `folder` as the folder `inside` of the repository `name`."""
        files = {
            f"{inside}/{file.relative_to(folder).as_posix()}": file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        self.repositories[name] = Repository({"README.md": b"# a card\n"} | files, **changes)
        return self.repositories[name]


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """A server for as long as the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(data: bytes, path: str) -> dict[str, Any]:
    """A file as the hub's API lists it: hash of git's blob, and SHA-256 of large files."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found: dict[str, Any] = {"size": len(data), "blobId": blob}
    if path.endswith(".pth"):
        found["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return found


class _Answers(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] == "cdn":
            name, path = "/".join(parts[1:3]), "/".join(parts[3:])
            self._content(self.hub.repositories[name].files[path], path, {})
        elif parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parse_qs(url.query))
        elif "/".join(parts[:2]) in self.hub.repositories:
            self._resolve("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._fail(*NO_REPOSITORY)

    def _api(self, name: str, query: dict[str, list[str]]) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self._fail(*NO_REPOSITORY)
        blobs = query.get("blobs", [""])[0].lower() == "true"
        siblings = [
            {"rfilename": path} | (entry(data, path) if blobs else {}) for path, data in repository.files.items()
        ]
        answer = {"id": name, "sha": REVISION, "cardData": repository.card, "siblings": siblings}
        return self._json(answer | self.hub.overrides)

    def _resolve(self, name: str, path: str) -> None:
        repository = self.hub.repositories[name]
        if repository.gated:
            return self._fail(*GATED)
        data = repository.files[path]
        facts = entry(data, path)
        headers = {"X-Repo-Commit": REVISION, "ETag": f'"{facts["blobId"]}"'}
        if "lfs" not in facts:
            return self._content(data, path, headers)
        headers |= {"X-Linked-Etag": f'"{facts["lfs"]["sha256"]}"', "X-Linked-Size": str(len(data))}
        return self._send(302, b"", headers | {"Location": f"{self.hub.url}/cdn/{name}/{path}"})

    def _content(self, data: bytes, path: str, headers: dict[str, str]) -> None:
        if self.hub.busy:
            return self._fail(self.hub.busy.pop(0), {})
        data, wanted = self.hub.swapped.get(path, data), self.headers.get("Range")
        self.hub.served.append((path, wanted))
        if len(self.hub.served) == self.hub.hold:
            self.hub.held.set()
            self.hub.released.wait(60)
            self.close_connection = True
            return
        code, part = 200, data
        if wanted and self.hub.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            code, part = 206, data[int(first) : int(last) + 1 if last else None]
            headers = headers | {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}
        if self.hub.budget is not None and self.command == "GET":
            if self.hub.budget < len(part):
                return self._fail(403, {})
            self.hub.budget -= len(part)
        return self._send(code, part, headers | {"Accept-Ranges": "bytes"})

    def _json(self, answer: object) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _fail(self, code: int, headers: dict[str, str]) -> None:
        self._send(code, b"", headers)

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        more = self.hub.more if self.hub.more_at in self.path else 0
        if self.hub.packed and body:
            body, headers = gzip.compress(body), headers | {"Content-Encoding": "gzip"}
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(body) + more)}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cuts and code == 206:
            self.hub.cuts -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        with contextlib.suppress(ConnectionError):  # who asked takes no more
            for data in (body, *(bytes(BLOCK) for _ in range(more // BLOCK))):
                self.wfile.write(data)
                self.hub.sent += len(data)
            return
        self.close_connection = True
