"""Every error that edgemuse raises on purpose.

EdgemuseError                   exit code 1
├── InputError                  2   the scan cannot be segmented as it is
├── BundleError                 2   the bundle is damaged, foreign or from a newer version
├── ModelFolderError            2   the nnU-Net model folder cannot be fetched or exported
├── BackendError                2   the backend, device or precision asked for is not usable here
├── MemoryLimitError            2   the work would not fit in the memory allowed
├── OutputError                 2   a result cannot be written
└── VerificationError           1   an exported graph does not reproduce the PyTorch network

Messages are one line: what was expected, what was found, how to mend it.
"""


class EdgemuseError(Exception):
    """Root of all errors that a caller may want to catch; `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(EdgemuseError):
    """The scan cannot be segmented as it is."""

    exit_code = 2


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


def one_line(text: object) -> str:
    """What others wrote, as one line without what a terminal would act on; of an error without words its class."""
    line = "".join(character for character in " ".join(str(text).split()) if character.isprintable())
    return line or (type(text).__name__ if isinstance(text, BaseException) else "")
