"""The public interface: a model is opened, scans are segmented with it."""

from __future__ import annotations

from pathlib import Path

from edgemuse.runtime.model.bundle import Bundle
from edgemuse.runtime.model.cascade import Cascade, open_model
from edgemuse.runtime.model.store import find_model
from edgemuse.runtime.pipeline.cascade import CascadeSegmenter
from edgemuse.runtime.pipeline.options import Options
from edgemuse.runtime.pipeline.result import Segmentation
from edgemuse.runtime.pipeline.segmenter import Segmenter


def segmenter_of(model: Bundle | Cascade, options: Options) -> Segmenter | CascadeSegmenter:
    """What segments with the opened `model`."""
    return CascadeSegmenter(model, options) if isinstance(model, Cascade) else Segmenter(model, options)


def open_segmenter(model: str | Path | None = None, options: Options | None = None) -> Segmenter | CascadeSegmenter:
    """Open a model for any number of scans; use the result as a context manager.

    Args:
        model: a bundle or cascade, as a folder or a .zip, or the name of one in the store; None: the built-in model.
        options: how to segment; None: as `edgemuse segment` does by default.

    Raises:
        BundleError: there is no such model, or it is damaged.
        BackendError: this machine has no engine that does what `options` ask for.
    """
    return segmenter_of(open_model(find_model(None if model is None else Path(model))), options or Options())


def segment(path: str | Path, model: str | Path | None = None, options: Options | None = None) -> Segmentation:
    """Segment the NIfTI file at `path`. For several scans keep an `open_segmenter`.

    Args:
        path: a T1 scan, .nii or .nii.gz.
        model: as of `open_segmenter`.
        options: as of `open_segmenter`.

    Raises:
        EdgemuseError: one of its children, whose message says what is wrong and how to mend it.
    """
    with open_segmenter(model, options) as segmenter:
        return segmenter.segment(path)
