"""Nobody learns from a library that edgemuse runs: what would send or note that is off before any is imported.

The `__init__.py` of each folder calls `switch_off`, so it is done before OpenVINO, NNCF, ONNX Runtime or
huggingface_hub is imported, in every command, in every process that a command starts, and for those who import
edgemuse.
"""

from __future__ import annotations

import os
import sys

SENDERS = ("openvino_telemetry",)
"""Packages that do nothing but send. OpenVINO and NNCF go on without theirs, as where it is not installed."""
SWITCHES = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime from 1.29 on
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "DO_NOT_TRACK": "1",  # what others may come to obey
}
"""Environment variables that libraries read when they start."""


def switch_off() -> None:
    """Make `SENDERS` look as if they were not installed, and set `SWITCHES`, here and for processes started from here.

    What this process has already sent, because it imported such a library before edgemuse, cannot be taken back.
    """
    for name in SENDERS:
        sys.modules[name] = None  # type: ignore[assignment]  # to Python: importing it fails
    os.environ.update(SWITCHES)
