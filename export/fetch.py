"""`edgemuse models fetch`: downloads DLMUSE from where its authors publish it and exports it into the store."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgemuse.engines.errors import OutputError
from edgemuse.engines.files import discard_old
from edgemuse.runtime.cli.extras import needs_extra
from edgemuse.runtime.cli.options import model_dir_option
from edgemuse.runtime.cli.terminal import note, say_paths

if TYPE_CHECKING:
    from edgemuse.export.hub import Remote
    from edgemuse.runtime.model.bundle import Bundle
    from edgemuse.runtime.regions.labels import Label


@dataclass(frozen=True)
class Published:
    """Where a network is published: a repository of the hub and the nnU-Net model folder inside it."""

    name: str
    repository: str
    folder: str


DLICV = Published(
    "DLICV", "nichart/DLICV", "nnunet_results/Dataset901_Task901_dlicv/nnUNetTrainer__nnUNetPlans__3d_fullres"
)
DLMUSE = Published(
    "DLMUSE", "nichart/DLMUSE", "nnunet_results/Dataset903_Task903_DLMUSEV2/nnUNetTrainer__nnUNetPlans__3d_fullres"
)
ORIENTATION = "LPS"
"""The orientation of both networks' training data."""


@click.command(short_help="Get DLMUSE from the Hugging Face hub and export it here.")
@click.argument("model", type=click.Choice(["dlmuse"]))
@click.option("--accept-license", is_flag=True, help="You have read the licence of the weights and accept it. Without "
              "this the licence is shown and nothing is downloaded.")  # fmt: skip
@click.option("--name", help="Name that the store gives it.  [default: dlmuse]")
@model_dir_option
def fetch(model: str, accept_license: bool, name: str | None, model_dir: Path | None) -> None:
    """Get DLMUSE from the Hugging Face hub, export it here, and put it into the store as one bundle.

    Both networks, DLICV and DLMUSE, come from the repositories of their authors. Every file is checked against the hash
    that the hub states. Run it again after an interruption: it goes on where it stopped.

    Needs PyTorch and a network: pip install ".[models]" in edgemuse's source folder. The bundle, whose path is printed,
    needs neither.

    \b
    Example:
      edgemuse models fetch dlmuse --accept-license
      edgemuse segment T1.nii.gz -o out --model dlmuse
    """  # noqa: D301  # \b keeps click from wrapping the example
    with needs_extra("models", "fetching", "PyTorch"):  # all of it before anything is downloaded
        from edgemuse.export import exporter, hub  # noqa: F401
    from edgemuse.runtime.model.folders import store_folder
    from edgemuse.runtime.model.store import free_place

    place = free_place(name or model, store_folder(model_dir))
    remotes = [hub.look_up(network.repository, network.folder) for network in (DLICV, DLMUSE)]
    terms = "; ".join(f"{remote.repository}: {remote.license or 'none stated'}" for remote in remotes)
    if not accept_license:
        pages = " and ".join(f"https://huggingface.co/{remote.repository}" for remote in remotes)
        size = sum(file.bytes for remote in remotes for file in remote.files) / 1e6
        raise click.UsageError(
            f"nothing was downloaded. Licence of {terms}. Read it at {pages}; if you accept it, add --accept-license "
            f"to download {size:.1f} MB."
        )
    note(f"licence of {terms}")
    _make(remotes, place)
    say_paths([place])


def _make(remotes: Sequence[Remote], place: Path) -> None:
    """Make the bundle at `place`; only one process at a time does so."""
    from edgemuse.runtime.batch.claim import Claim
    from edgemuse.runtime.model.store import LEFT, free_place

    claim = Claim(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not claim.acquire():
            raise OutputError(f"{place}: another 'edgemuse models fetch' is getting it; wait until that is done")
        discard_old(place.parent, LEFT)
        free_place(place.stem, place.parent)  # again: another process may have just made it
        _download_and_join(remotes, place)
    except OSError as error:
        raise OutputError(f"{place}: cannot be written ({error.strerror or error})") from error
    finally:
        claim.release()


def _download_and_join(remotes: Sequence[Remote], place: Path) -> None:
    """Download both model folders, export them and join them at `place`; delete the folders if all that succeeded."""
    from edgemuse.export import hub
    from edgemuse.runtime.regions.muse import muse_labels

    downloads = place.with_name(f".{place.stem}.download")
    downloads.mkdir(exist_ok=True)
    discard_old(downloads, re.compile("tmp[a-z0-9_]{8}"))  # `work` of a run that was killed
    with tempfile.TemporaryDirectory(dir=downloads) as work:
        folders = [hub.download(remote, downloads / _short(remote)) for remote in remotes]
        mask = _export(DLICV, remotes[0], folders[0], Path(work), None)
        regions = _export(DLMUSE, remotes[1], folders[1], Path(work), muse_labels())
        _join(mask, regions, place)
    shutil.rmtree(downloads, ignore_errors=True)


def _short(remote: Remote) -> str:
    return f"{remote.repository.replace('/', '--')}@{remote.revision[:12]}"


def _export(network: Published, remote: Remote, folder: Path, work: Path, labels: tuple[Label, ...] | None) -> Bundle:
    from edgemuse.export.exporter import ExportOptions, export_model
    from edgemuse.runtime.model.bundle import open_bundle
    from edgemuse.runtime.model.store import HUB

    options = ExportOptions(
        folds=("0",),
        orientation=ORIENTATION,
        labels=labels,
        name=network.name,
        license=remote.license,
        progress=note,
        origin={HUB: {"repository": remote.repository, "revision": remote.revision}},
    )
    return open_bundle(export_model(folder, work / network.name, options))


def _join(mask: Bundle, regions: Bundle, place: Path) -> None:
    from edgemuse.export.cascade import manifest_of
    from edgemuse.export.writer import write_cascade

    licenses = dict.fromkeys((mask.manifest.license, regions.manifest.license))
    both = "; ".join(license for license in licenses if license)
    write_cascade(place, replace(manifest_of(mask, regions), license=both or None), mask, regions)
