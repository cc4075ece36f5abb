"""The store: a folder of bundles that go by a name, each a file NAME.zip or a folder NAME."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgemuse.engines.errors import BundleError, OutputError, one_line
from edgemuse.engines.files import discard_old, place_new, sync
from edgemuse.runtime.model.archive import write_zip
from edgemuse.runtime.model.builtin import BUILT_IN
from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.cascade import CASCADE, Cascade, open_model
from edgemuse.runtime.model.folders import store_folder
from edgemuse.runtime.model.manifest import MANIFEST

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LEFT = re.compile(rf"\.{NAME.pattern}(\.[0-9a-f]{{8}}\.part|\.zip\.tmp-[0-9a-f]{{8}})")
"""What 'models add' and 'models fetch' call what they are still writing."""
HUB = "hub"
"""Key of a manifest's `source` under which the repository and the revision of a fetched model are recorded."""


@dataclass(frozen=True)
class Entry:
    """A name and where its bundle lies."""

    name: str
    path: Path


@dataclass(frozen=True)
class Facts:
    """What is known of an entry.

    Attributes:
        origin: where it comes from.
        bytes: on disk.
        license: of the weights.
        problem: why it cannot be used; None: every file has the SHA-256 that the bundle lists.
    """

    origin: str
    bytes: int
    license: str
    problem: str | None


def entries(store: Path) -> list[Entry]:
    """The built-in model, then what is in `store`, by name; a store that is not there is empty. Raises BundleError."""
    try:
        paths = sorted(store.iterdir()) if store.exists() else []
        found = [Entry(path.name.removesuffix(".zip"), path) for path in paths if _is_model(path)]
    except OSError as error:
        raise BundleError(f"{store}: cannot be read ({error.strerror}); choose another with --model-dir") from error
    return [Entry(BUILT_IN.stem, BUILT_IN), *found]


def _is_model(path: Path) -> bool:
    """Whether `path` is a model; hidden files are models that are still being copied."""
    return not path.name.startswith(".") and (_is_folder(path) or (path.suffix == ".zip" and path.is_file()))


def _is_folder(path: Path) -> bool:
    """Whether `path` is a folder that holds a bundle or a cascade."""
    return (path / MANIFEST).is_file() or (path / CASCADE).is_file()


def find_model(model: Path | None, model_dir: Path | None = None) -> Path:
    """Where the bundle `model` lies: a path, or else a name in the store; None: the built-in model.

    A folder that is no bundle, such as one for results, does not hide the name.

    Raises:
        BundleError: there is neither a file or folder nor an entry of that name.
    """
    if model is None:
        return BUILT_IN
    if model.is_file() or _is_folder(model) or not NAME.fullmatch(str(model)):
        return model
    try:
        return named(str(model), store_folder(model_dir)).path
    except BundleError:
        if model.exists():  # what it lacks is said when it is opened
            return model
        raise


def named(name: str, store: Path) -> Entry:
    """The entry `name` of `store`; raises BundleError, which lists those that are there."""
    known = entries(store)
    for entry in known:
        if entry.name == name:
            return entry
    raise BundleError(
        f"{name}: no such bundle, nor a model of that name in {store} (there: {', '.join(e.name for e in known)}); "
        "get one with 'edgemuse models fetch dlmuse', 'edgemuse models add BUNDLE' or 'edgemuse export'"
    )


def free_place(name: str, store: Path) -> Path:
    """Where a new model `name` goes in `store`; raises OutputError if the name is taken or is none."""
    if not NAME.fullmatch(name):
        raise OutputError(
            f"{name!r} cannot be the name of a model: letters, digits, '.', '-', '_', and a letter or digit first; "
            "choose one with --name"
        )
    for entry in entries(store):
        if entry.name.casefold() == name.casefold():
            raise OutputError(
                f"{entry.path}: there is a model of the name {name} already; choose another with --name, or remove it"
            )
    return store / f"{name}.zip"


def add(model: Path, name: str, store: Path) -> Path:
    """Copy the bundle or cascade at `model` into `store` as NAME.zip, each file checked; what it does not list stays.

    Returns:
        Where it is now; it is there whole or not at all.

    Raises:
        BundleError: `model` is damaged or is no bundle.
        OutputError: the name is taken, or the store cannot be written.
    """
    place = free_place(name, store)
    staged = store / f".{name}.{secrets.token_hex(4)}.part"
    with contextlib.closing(open_model(model)) as opened:
        try:
            store.mkdir(parents=True, exist_ok=True)
            discard_old(store, LEFT)
            write_zip(staged, opened.contents())
            free_place(name, store)
            sync(staged)
            place_new(staged, place)
            sync(store)
        except FileExistsError as error:
            raise OutputError(f"{place}: another process has just put a model there; choose another --name") from error
        except OSError as error:
            raise OutputError(f"{place}: cannot be written ({error.strerror})") from error
        finally:
            with contextlib.suppress(OSError):
                staged.unlink(missing_ok=True)
    return place


def inspect(entry: Entry) -> Facts:
    """Open `entry` and check every file of it."""
    size = _size(entry.path)
    try:
        with contextlib.closing(open_model(entry.path)) as model:
            origin = "comes with edgemuse" if entry.path == BUILT_IN else _origin(model)
            license = model.manifest.license or "not recorded"
            try:
                model.verify()
            except BundleError as error:
                return Facts(origin, size, license, str(error))
            return Facts(origin, size, license, None)
    except BundleError as error:
        return Facts("-", size, "-", str(error))


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _origin(model: Bundle | Cascade) -> str:
    if isinstance(model, Cascade):
        return " and ".join(dict.fromkeys([_origin(model.mask), _origin(model.regions)]))
    source = model.manifest.source  # a record may hold anything
    hub = source.get(HUB)
    if isinstance(hub, Mapping):
        return f"{one_line(hub.get('repository'))[:80]}@{one_line(hub.get('revision'))[:7]}"
    return f"exported from {one_line(source['dataset_name'])[:80]}" if "dataset_name" in source else "not recorded"
