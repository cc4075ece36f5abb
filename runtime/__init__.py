"""The runtime: from a T1 scan to labels and volumes, without PyTorch.

The public interface is `segment`, `open_segmenter` and `Options`; everything else may move. It is imported on first
use, so that importing this package loads neither numpy nor a backend.

    from edgemuse.runtime import Options, segment

    result = segment("sub-01_T1w.nii.gz", options=Options(profile="balanced"))
    result.classes  # (i, j, k) class numbers on the scan's grid
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemuse.engines.privacy import switch_off

if TYPE_CHECKING:
    from edgemuse.runtime.pipeline.open import open_segmenter, segment
    from edgemuse.runtime.pipeline.options import Options

__all__ = ["Options", "open_segmenter", "segment"]

switch_off()


def __getattr__(name: str) -> Any:
    if name == "Options":
        from edgemuse.runtime.pipeline.options import Options

        return Options
    if name in __all__:
        from edgemuse.runtime.pipeline import open

        return getattr(open, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
