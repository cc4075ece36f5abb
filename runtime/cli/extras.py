"""Optional parts of edgemuse, which need more than `pip install .` brings."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from edgemuse.engines.errors import BackendError, pip_install
from edgemuse.engines.private import private_folder
from edgemuse.runtime.model.folders import default_cache_dir

KEPT = {"MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
"""Where libraries are told to keep what they would keep in the user's home or among temporary files: the variable that
they read when they are imported, and a folder in the cache."""


@contextlib.contextmanager
def needs_extra(extra: str, doing: str, library: str) -> Iterator[None]:
    """Turn an import that fails inside the block into a BackendError that says how to install what is missing.

    Args:
        extra: of edgemuse, which brings the libraries.
        doing: what the user asked for, such as "exporting".
        library: named where Python does not say which one is missing.
    """
    _keep_in_cache()
    try:
        yield
    except ImportError as error:
        if error.name and error.name.startswith("edgemuse"):
            raise
        raise BackendError(
            f"{doing} needs {error.name or library}, which is missing here or does not load; "
            + pip_install(f".[{extra}]")
        ) from error


def _keep_in_cache() -> None:
    """Set the variables of `KEPT` that the user has not set; where there is no cache, libraries do as they like."""
    with contextlib.suppress(OSError), private_folder(default_cache_dir(), make=True) as folder:
        for variable, name in KEPT.items():
            os.environ.setdefault(variable, str(folder.path / name))
