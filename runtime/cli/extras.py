"""Optional parts of edgemuse, which need more than `pip install .` brings."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from edgemuse.engines.errors import BackendError, pip_install


@contextlib.contextmanager
def needs_extra(extra: str, doing: str, library: str) -> Iterator[None]:
    """Turn an import that fails inside the block into a BackendError that says how to install what is missing.

    Args:
        extra: of edgemuse, which brings the libraries.
        doing: what the user asked for, such as "exporting".
        library: named where Python does not say which one is missing.
    """
    try:
        yield
    except ImportError as error:
        if error.name and error.name.startswith("edgemuse"):
            raise
        raise BackendError(
            f"{doing} needs {error.name or library}, which is missing here or does not load; "
            + pip_install(f".[{extra}]")
        ) from error
