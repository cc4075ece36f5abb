"""`edgemuse models fetch` against a server that answers as the hub does, with tiny networks in upstream's layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundles import CommandLine, run_process, snapshot, write_scan
from hub import REVISION, Hub, running_hub

pytest.importorskip("torch", reason="exporting needs PyTorch: pip install '.[dev]'")
constants = pytest.importorskip(
    "huggingface_hub.constants", reason="fetching needs huggingface_hub: pip install '.[models]'"
)

from edgemuse.engines.errors import ModelFolderError, OutputError
from edgemuse.export import hub as hub_module
from edgemuse.export.fetch import DLICV, DLMUSE
from edgemuse.runtime.batch.claim import Claim
from edgemuse.runtime.model.cascade import Cascade
from edgemuse.runtime.regions.muse import is_muse

FETCH = ("models", "fetch", "dlmuse", "--accept-license")
CHECKPOINT = "fold_0/checkpoint_final.pth"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "dlmuse"
FILES = {"plans.json", "dataset.json", CHECKPOINT}


@pytest.fixture(scope="module")
def folders(nnunet_models: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Model folders as upstream's: old plans, 2 and 152 classes, and what training leaves besides."""
    base = tmp_path_factory.mktemp("upstream")
    made = [
        nnunet_models.make_model_folder(base / name, classes=classes, layout="old", seed=classes)
        for name, classes in (("dlicv", 2), ("dlmuse", 152))
    ]
    for folder in made:
        (folder / "fold_0" / "progress.png").write_bytes(b"not wanted")
    return made[0], made[1]


@pytest.fixture
def hub(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server, with both repositories; huggingface_hub in this process asks it."""
    with running_hub() as server:
        for network, folder in zip((DLICV, DLMUSE), folders, strict=True):
            server.add(network.repository, folder, network.folder)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEMUSE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's attempts
    monkeypatch.setattr(hub_module, "CHUNK", 20_000)
    return tmp_path / "home" / "models"


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    return CommandLine(capfd, tmp_path / "cache")


def content(hub: Hub, network: Any, name: str) -> bytes:
    return hub.repositories[network.repository].files[f"{network.folder}/{name}"]


def ranges(hub: Hub, network: Any) -> list[tuple[int, int]]:
    """First and last byte of every request for the checkpoint of `network`."""
    asked = [wanted for path, wanted in hub.served if path == f"{network.folder}/{CHECKPOINT}"]
    pairs = [str(wanted).removeprefix("bytes=").split("-") for wanted in asked]
    return [(int(first), int(last)) for first, last in pairs]


def test_fetched_and_segmented_with(hub: Hub, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing to labels, each command in a process of its own, as a user would."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    cache_dir, place = tmp_path / "cache", store / "dlmuse.zip"
    ran = run_process(*FETCH, cache_dir=cache_dir)
    assert (ran.code, ran.out) == (0, f"{place}\n"), ran.err
    assert f"licence of {DLICV.repository}: cc-by-nc-4.0; {DLMUSE.repository}: cc-by-nc-4.0" in ran.err
    assert [path.name for path in store.iterdir()] == ["dlmuse.zip"]
    assert {path.rpartition("3d_fullres/")[2] for path, _ in hub.served} == FILES

    model = Cascade(place)
    assert is_muse(model.labels)
    assert (model.name, model.manifest.license, model.manifest.orientation) == ("DLMUSE", "cc-by-nc-4.0", "LPS")
    for network, bundle in ((DLICV, model.mask), (DLMUSE, model.regions)):
        assert bundle.manifest.source["hub"] == {"repository": network.repository, "revision": REVISION}
        assert bundle.manifest.network.orientation == "LPS"
        assert bundle.name == network.name
    model.close()

    listed = run_process("models", "list", cache_dir=cache_dir)
    assert "nichart/DLICV@0123456 and nichart/DLMUSE@0123456" in listed.out
    scan = write_scan(tmp_path / "s_T1w.nii.gz")
    ran = run_process("segment", scan, "-o", tmp_path / "out", "-m", "dlmuse", cache_dir=cache_dir)
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "out" / "s_DLMUSE_Volumes.csv").is_file()
    provenance = json.loads((tmp_path / "out" / "s_provenance.json").read_text())
    assert model.sha256 in json.dumps(provenance)


def test_interrupted_and_resumed(hub: Hub, store: Path, cli: CommandLine) -> None:
    whole = [len(content(hub, network, CHECKPOINT)) for network in (DLICV, DLMUSE)]
    small = sum(len(content(hub, DLICV, name)) for name in FILES - {CHECKPOINT})
    hub.budget = small + whole[0] - 5_000  # all chunks of the first checkpoint but the last
    ran = cli(*FETCH)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1].startswith(f"edgemuse: {DLICV.repository}: the hub answered 403; run this again")
    assert not (store / "dlmuse.zip").exists()
    (part,) = store.rglob("*.part")
    held = part.stat().st_size
    assert 0 < held < whole[0]

    hub.budget = None
    hub.served.clear()
    assert cli(*FETCH).code == 0
    assert ranges(hub, DLICV)[0][0] == held
    assert ranges(hub, DLMUSE)[0][0] == 0
    assert sum(last + 1 - first for first, last in ranges(hub, DLICV)) == whole[0] - held
    assert not [path for path, _ in hub.served if path.startswith(DLICV.folder) and path.endswith(".json")]
    assert [path.name for path in store.iterdir()] == ["dlmuse.zip"]
    assert cli("models", "verify").code == 0


def test_a_second_process_leaves_the_first_alone(hub: Hub, store: Path, cli: CommandLine) -> None:
    store.mkdir(parents=True)
    first = Claim(store / "dlmuse.zip")
    assert first.acquire()
    ran = cli(*FETCH)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1] == (
        f"edgemuse: {store / 'dlmuse.zip'}: another 'edgemuse models fetch' is getting it; wait until that is done"
    )
    assert hub.served == []
    assert list(store.iterdir()) == [first.path]
    first.release()


def test_what_another_process_just_fetched_is_not_fetched_again(
    hub: Hub, store: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = Claim.acquire

    def last(claim: Claim) -> bool:
        (store / "dlmuse.zip").write_bytes(b"of the other")
        return acquire(claim)

    monkeypatch.setattr(Claim, "acquire", last)
    ran = cli(*FETCH)
    assert (ran.code, ran.out) == (2, "")
    assert "there is a model of the name dlmuse already" in ran.err
    assert (hub.served, snapshot(store).keys()) == ([], {"dlmuse.zip"})


def test_killed_and_resumed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the process is left to tidy up; what it had written is used."""
    for variable, value in (("HF_ENDPOINT", hub.url), ("HF_HOME", tmp_path / "hf"), ("EDGEMUSE_HOME", tmp_path)):
        monkeypatch.setenv(variable, str(value))
    chunks, path = 3, f"{DLICV.folder}/{CHECKPOINT}"
    hub.repositories[DLICV.repository].files[path] = os.urandom(hub_module.CHUNK * chunks)
    hub.hold = len(FILES) - 1 + chunks  # the last chunk of the first checkpoint
    code = "from edgemuse.runtime.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, *FETCH], stderr=subprocess.DEVNULL) as process:
        held = hub.held.wait(60)
        process.kill()
    hub.released.set()
    assert held
    hub.served.clear()
    (folder,) = (tmp_path / "models" / ".dlmuse.download").glob("nichart--DLICV@*")
    hub_module.download(hub_module.look_up(DLICV.repository, DLICV.folder), folder)
    assert ranges(hub, DLICV) == [(2 * hub_module.CHUNK, 3 * hub_module.CHUNK - 1)]
    assert (folder / CHECKPOINT).read_bytes() == content(hub, DLICV, CHECKPOINT)


def remote() -> Any:
    return hub_module.look_up(DLMUSE.repository, DLMUSE.folder)


def downloaded(hub: Hub, folder: Path) -> bool:
    """Whether `folder` holds the files of DLMUSE as the hub has them, and no other."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return names == FILES and all((folder / name).read_bytes() == content(hub, DLMUSE, name) for name in FILES)


def test_a_connection_that_breaks_is_taken_up_again(hub: Hub, store: Path) -> None:
    hub.cuts = 3
    assert downloaded(hub, hub_module.download(remote(), store))
    assert hub.cuts == 0


@pytest.mark.parametrize("name", ["dataset.json", CHECKPOINT])
def test_content_other_than_stated_is_thrown_away(name: str, hub: Hub, store: Path, cli: CommandLine) -> None:
    true = content(hub, DLMUSE, name)
    hub.swapped[f"{DLMUSE.folder}/{name}"] = bytes([true[0] ^ 1]) + true[1:]
    ran = cli(*FETCH)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.splitlines()[-1].startswith(f"edgemuse: {DLMUSE.repository}: {name} is not what the hub states")
    assert not (store / "dlmuse.zip").exists()
    (folder,) = store.glob(".dlmuse.download/nichart--DLMUSE@*")
    assert not list(folder.rglob(f"{Path(name).name}*"))
    hub.swapped.clear()
    assert downloaded(hub, hub_module.download(remote(), folder))


@pytest.mark.parametrize(("held", "name"), [(30_000, f"{CHECKPOINT}.part"), (200_000, f"{CHECKPOINT}.part")])
def test_a_part_of_something_else(held: int, name: str, hub: Hub, store: Path) -> None:
    (store / name).parent.mkdir(parents=True)
    (store / name).write_bytes(b"\0" * held)
    with pytest.raises(ModelFolderError, match="is not what the hub states"):
        hub_module.download(remote(), store)
    assert not (store / name).exists()
    assert downloaded(hub, hub_module.download(remote(), store))


def test_a_file_that_was_changed_is_fetched_again(hub: Hub, store: Path) -> None:
    hub_module.download(remote(), store)
    (store / "plans.json").write_bytes(b"{}")
    hub.served.clear()
    assert downloaded(hub, hub_module.download(remote(), store))
    assert [path.rpartition("/")[2] for path, _ in hub.served] == ["plans.json"]


def test_a_folder_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        hub_module.download(remote(), tmp_path / "file")


@pytest.mark.parametrize(
    ("card", "shown"),
    [
        ({"license": "cc-by-nc-4.0"}, "nichart/DLICV: cc-by-nc-4.0;"),
        (
            {"license": "other", "license_name": "cbica", "license_link": "https://x.org/l"},
            "nichart/DLICV: cbica https://x.org/l;",
        ),
        ({"license": ["mit", "bsd"]}, "nichart/DLICV: mit, bsd;"),
        ({"license": "a\x1b[2J\nb"}, r"nichart/DLICV: a\x1b[2J b;"),
        ({}, "nichart/DLICV: none stated;"),
        (None, "nichart/DLICV: none stated;"),
    ],
)
def test_licence_not_accepted(card: Any, shown: str, hub: Hub, store: Path, cli: CommandLine) -> None:
    hub.repositories[DLICV.repository].card = card
    ran = cli("models", "fetch", "dlmuse")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert shown in ran.err
    size = sum(len(content(hub, network, name)) for network in (DLICV, DLMUSE) for name in FILES)
    assert f"add --accept-license to download {size / 1e6:.1f} MB" in ran.err
    assert hub.served == []
    assert not store.exists()


def test_no_network(store: Path, hub: Hub, cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub() as gone:
        pass
    monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    ran = cli(*FETCH)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "cannot be reached" in ran.err
    assert "edgemuse models add" in ran.err
    assert not store.exists()


def test_no_such_repository(hub: Hub, store: Path, cli: CommandLine) -> None:
    del hub.repositories[DLMUSE.repository]
    ran = cli(*FETCH)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert f"{DLMUSE.repository}: the hub has no such repository" in ran.err
    assert (hub.served, store.exists()) == ([], False)


def test_gated(hub: Hub, store: Path, cli: CommandLine) -> None:
    hub.repositories[DLICV.repository].gated = True
    ran = cli(*FETCH)
    assert (ran.code, ran.out) == (2, "")
    assert "access on request" in ran.err.splitlines()[-1]
    assert not (store / "dlmuse.zip").exists()


def siblings(hub: Hub, **changes: Any) -> list[dict[str, Any]]:
    """What the hub lists of DLICV, with `changes` in its checkpoint."""
    return [
        {"rfilename": f"{DLICV.folder}/{name}", "size": 10, "blobId": "0" * 40}
        | (changes if name == CHECKPOINT else {})
        for name in sorted(FILES)
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sha": "../../../../evil"}, "no revision"),
        ({"sha": None}, "no revision"),
        ({"siblings": None}, "there is no plans.json"),
        ({"siblings": [{"rfilename": "../../plans.json"}]}, "there is no plans.json"),
        ({"siblings": [{"name": 1}]}, "not like the hub"),
        ({"siblings": [{"size": -1}]}, "not like the hub"),
        ({"siblings": [{"size": 1 << 40}]}, "not like the hub"),
        ({"siblings": [{"blobId": "../x"}]}, "not like the hub"),
        ({"siblings": [{"lfs": {"size": 10, "sha256": "short", "pointerSize": 1}}]}, "not like the hub"),
        ({"id": None, "siblings": "text"}, "not like the hub"),
    ],
)
def test_a_hostile_hub(changes: dict[str, Any], reason: str, hub: Hub, store: Path, cli: CommandLine) -> None:
    if isinstance(changes.get("siblings"), list) and not {"rfilename", "name"} & changes["siblings"][0].keys():
        changes = {"siblings": siblings(hub, **changes["siblings"][0])}
    hub.overrides = changes
    before = snapshot(store.parent)
    ran = cli(*FETCH)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert reason in ran.err
    assert (hub.served, snapshot(store.parent)) == ([], before)


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("/api/", "it sends more than the 16777216 bytes that were asked for"),
        ("plans.json", "bytes that were asked for"),
        ("/cdn/", "bytes that were asked for"),
    ],
)
def test_no_more_is_taken_than_was_announced(where: str, reason: str, hub: Hub, store: Path, cli: CommandLine) -> None:
    """8 GiB follow what was asked for, and would be taken if they were read."""
    hub.more, hub.more_at = 8 << 30, where
    ran = cli(*FETCH)
    assert (ran.code, ran.out) == (2, "")
    assert "not like the hub" in ran.err.splitlines()[-1]
    assert reason in ran.err.splitlines()[-1]
    assert hub.sent < 64 << 20  # what the sockets hold, and 16 MiB
    assert not (store / "dlmuse.zip").exists()


def test_refusal_of_8_gib_is_not_read(hub: Hub, store: Path, cli: CommandLine) -> None:
    hub.repositories[DLICV.repository].gated = True
    hub.more, hub.more_at = 8 << 30, "/resolve/"
    ran = cli(*FETCH)
    assert (ran.code, ran.out) == (2, "")
    assert "access on request" in ran.err.splitlines()[-1]
    assert hub.sent < 64 << 20


def test_packed_content_is_not_unpacked(hub: Hub, store: Path, cli: CommandLine) -> None:
    """The library would unpack it, whatever its size."""
    hub.packed = True
    ran = cli(*FETCH)
    assert (ran.code, ran.out) == (2, "")
    assert "it sends packed content" in ran.err.splitlines()[-1]
    assert not (store / "dlmuse.zip").exists()


def test_a_proxy_that_does_not_know_of_parts(hub: Hub, store: Path) -> None:
    whole = len(content(hub, DLMUSE, CHECKPOINT))
    hub.ranges = False
    with pytest.raises(ModelFolderError, match="it sends more than the 20000 bytes"):
        hub_module.download(remote(), store / "new")
    (store / "old" / "fold_0").mkdir(parents=True)
    (store / "old" / f"{CHECKPOINT}.part").write_bytes(bytes(whole - 10))
    with pytest.raises(ModelFolderError, match="it does not go on within a file"):
        hub_module.download(remote(), store / "old")


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(status: int, hub: Hub, store: Path) -> None:
    hub.busy = [status, status]
    assert downloaded(hub, hub_module.download(remote(), store))
    assert hub.busy == []


def test_a_hub_that_stays_busy(hub: Hub, store: Path) -> None:
    hub.busy = [503] * 5
    with pytest.raises(ModelFolderError, match="the hub answered 503; run this again later"):
        hub_module.download(remote(), store)
    assert hub.busy == []


@pytest.mark.parametrize("name", ["../dlmuse", "/tmp/dlmuse", ".dlmuse", "edgemuse-t1"])
def test_a_name_that_cannot_be_had(name: str, hub: Hub, store: Path, cli: CommandLine) -> None:
    ran = cli(*FETCH, f"--name={name}")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "--name" in ran.err
    assert (hub.served, store.exists()) == ([], False)


def test_a_model_of_that_name_is_left_alone(hub: Hub, store: Path, cli: CommandLine) -> None:
    store.mkdir(parents=True)
    (store / "dlmuse.zip").write_bytes(b"mine")
    ran = cli(*FETCH)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "choose another with --name" in ran.err
    assert snapshot(store) == {"dlmuse.zip": snapshot(store)["dlmuse.zip"]}
    assert (store / "dlmuse.zip").read_bytes() == b"mine"
    assert hub.served == []


def test_a_network_that_is_not_dlmuse(hub: Hub, store: Path, cli: CommandLine) -> None:
    for name in FILES:
        hub.repositories[DLMUSE.repository].files[f"{DLMUSE.folder}/{name}"] = content(hub, DLICV, name)
    ran = cli(*FETCH)
    assert ran.code == 2
    assert "the network has 2 classes where 152 were expected" in ran.err.splitlines()[-1]
    assert not (store / "dlmuse.zip").exists()


@pytest.mark.parametrize("missing", ["huggingface_hub", "torch"])
def test_missing_extra_says_what_to_install(
    missing: str, hub: Hub, store: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.startswith("edgemuse.export.") and name != "edgemuse.export.fetch":
            monkeypatch.delitem(sys.modules, name)
    package = sys.modules["edgemuse.export"]
    for name in ("hub", "exporter"):
        monkeypatch.delattr(package, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    ran = cli(*FETCH)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert missing in ran.err
    assert 'pip install ".[models]"' in ran.err
    assert hub.served == []
