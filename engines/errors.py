"""Every error that edgemuse raises on purpose.

EdgemuseError                   exit code 1
├── InputError                  2   the scan cannot be segmented as it is
│   └── LabelMapError           2   the file holds labels and no scan
├── BundleError                 2   the bundle is damaged, foreign or from a newer version
├── ModelFolderError            2   the nnU-Net model folder cannot be fetched or exported
├── BackendError                2   the backend, device or precision asked for is not usable here
├── MemoryLimitError            2   the work would not fit in the memory allowed
├── OutputError                 2   a result cannot be written
└── VerificationError           1   an exported graph does not reproduce the PyTorch network

Messages are one line: what was expected, what was found, how to mend it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class EdgemuseError(Exception):
    """Root of all errors that a caller may want to catch; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(EdgemuseError):
    """The scan cannot be segmented as it is."""

    exit_code = 2


class LabelMapError(InputError):
    """The file holds labels and no scan: found in a folder, it is passed over."""


class BundleError(EdgemuseError):
    """The bundle is damaged, foreign or from a newer version."""

    exit_code = 2


class ModelFolderError(EdgemuseError):
    """The nnU-Net model folder cannot be fetched or exported."""

    exit_code = 2


class BackendError(EdgemuseError):
    """The backend, device or precision asked for is not usable here."""

    exit_code = 2


class MemoryLimitError(EdgemuseError):
    """The work would not fit in the memory allowed."""

    exit_code = 2


class OutputError(EdgemuseError):
    """A result cannot be written."""

    exit_code = 2


class VerificationError(EdgemuseError):
    """An exported graph does not reproduce the PyTorch network."""


def pip_install(requirement: str) -> str:
    """The end of a message: the command that installs `requirement`. An extra such as `.[export]` needs the source."""
    where = " in edgemuse's source folder" if requirement.startswith(".") else ""
    return f'run: pip install "{requirement}"{where}'


def printable(text: object) -> str:
    r"""`text` with what a terminal would act on written out: escapes, line breaks, marks that turn the reading order.

    Of the letters of every language nothing changes; `\x1b[2J` becomes those seven characters.
    """
    line = str(text)
    if line.isprintable():
        return line
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in line
    )


def one_line(text: object) -> str:
    """What others wrote, as one printable line with single spaces; of an error without words its class."""
    line = printable(" ".join(str(text).split()))
    return line or (type(text).__name__ if isinstance(text, BaseException) else "")


@contextlib.contextmanager
def foreign(kind: type[EdgemuseError], what: str) -> Iterator[None]:
    """Turn whatever code of others raises inside the block into an error of this `kind`, which says `what` failed.

    A library is not held to a list of exceptions: the next version, or the next damaged input, raises another one.
    Errors of edgemuse pass.
    """
    try:
        yield
    except EdgemuseError:
        raise
    except Exception as error:
        raise kind(f"{what} ({one_line(error)})") from error
