"""Optional parts of edgemuse, which need more than `pip install edgemuse` brings."""

from __future__ import annotations

import importlib
from types import ModuleType

from edgemuse.engines.errors import BackendError


def load_extra(module: str, doing: str, library: str, extra: str) -> ModuleType:
    """Import edgemuse's own `module`; BackendError says that `doing` needs a library and how to install it.

    Args:
        module: full name.
        doing: what the user asked for, such as "exporting".
        library: named where Python does not say which one is missing.
        extra: of edgemuse, which brings the libraries.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name and error.name.startswith("edgemuse"):
            raise
        raise BackendError(
            f"{doing} needs {error.name or library}, which is missing here or does not load; "
            f'run: pip install "edgemuse[{extra}]"'
        ) from error
