r"""The only place that writes to the terminal: results on stdout, everything else on stderr.

What is written may come from anybody: names of files, labels, fields of a bundle, words of a library. So a line is a
line, whatever is in it: escapes, line breaks and marks that turn the reading order are written out (`\x1b`), and what
a stream cannot encode likewise. Paths of results are the exception where stdout is not a terminal but another program.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from edgemuse.engines.errors import OutputError, one_line, printable

MOST_CHARACTERS = 2000
"""Of a line on stderr: whoever wrote a bundle or a list of scans may have put megabytes into a name."""
GONE = (errno.EPIPE, errno.EINVAL)
"""What the system says where the program that reads stdout has ended, as `head` does; EINVAL is Windows'."""
Advance = Callable[[int, int], None]
"""Told how many steps are done, and of how many."""


def say(*lines: object) -> None:
    """Results that are text, on stdout: each of `lines` becomes one line, in which only tabs stay as they are.

    Raises OutputError where stdout cannot be written; a reader that has gone away is no error.
    """
    _write(_text(lines), err=False)


def note(*lines: object) -> None:
    """What else there is to tell, on stderr, likewise a line each. Nothing is raised where nobody listens.

    Of a line longer than `MOST_CHARACTERS` the middle is left out: its end says how to mend what its start names.
    """
    _write(_text(map(_shortened, lines)), err=True)


def say_paths(paths: Iterable[Path]) -> None:
    """Paths of results on stdout, one a line, as `say` writes them to a terminal.

    To a file or a pipe they are written byte for byte as the file system has them, whatever the encoding of stdout, so
    that a program finds them; only a line break inside one is written out, because it would make two paths of one.
    """
    if sys.platform == "win32" or watched(sys.stdout):
        say(*paths)
        return
    names = (os.fsencode(path).replace(b"\n", rb"\n").replace(b"\r", rb"\r") for path in paths)
    _write(b"".join(name + b"\n" for name in names), err=False)


def status(text: str) -> None:
    """A line on stderr that the next one overwrites; empty: it goes away. For terminals."""
    click.echo(f"\r\033[K{printable(text)}", err=True, nl=False)


def watched(stream: object = None) -> bool:
    """Whether the stream, or stderr, is a terminal."""
    stream = sys.stderr if stream is None else stream
    return isinstance(stream, io.TextIOBase) and stream.isatty()


@contextlib.contextmanager
def progress(label: str) -> Iterator[Advance]:
    """A bar on stderr where that is a terminal."""
    if not watched():
        yield lambda done, total: None
        return
    with bar(label, 1) as shown:

        def advance(done: int, total: int) -> None:
            shown.length = total
            shown.update(done - shown.pos)

        yield advance


def bar(label: str, length: int) -> Any:
    """Click's bar of so many steps on stderr; where that is no terminal, one line."""
    return click.progressbar(length=length, label=one_line(label), file=sys.stderr, show_eta=True)


def settle_streams(debug: bool) -> None:
    """Make this process the terminal's only writer: what cannot be encoded is written out, and libraries keep quiet.

    With `debug` Python's warnings and the log of other libraries are shown as well.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if debug:
        sys.excepthook = _show_traceback
        return
    warnings.showwarning = _ignore
    root = logging.getLogger()
    if not root.handlers:  # else Python shows what has no handler, and a library may add one
        root.addHandler(logging.NullHandler())


def _ignore(*_: object, **__: object) -> None:
    """In place of what shows a warning; a filter would also let pass what is to be an error."""


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    note(*"".join(traceback.format_exception(kind, error, trace)).rstrip("\n").split("\n"))


def _text(lines: Iterable[object]) -> str:
    return "".join("\t".join(printable(cell) for cell in str(line).split("\t")) + "\n" for line in lines)


def _shortened(line: object) -> str:
    text, half = str(line), MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def _write(data: str | bytes, err: bool) -> None:
    try:
        click.echo(data, err=err, nl=False)
    except OSError as error:
        _discard(sys.stderr if err else sys.stdout)
        if not err and error.errno not in GONE:
            raise OutputError(f"stdout: cannot be written ({error.strerror}); send it elsewhere") from error


def _discard(stream: Any) -> None:
    """Let what comes later, and what Python still holds when it ends, go nowhere instead of failing again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
