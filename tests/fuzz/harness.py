"""Runs a fuzzer's cases in processes of their own, so that a crash or a case that never ends is found and survived.

A fuzzer is a module that has `prepare(folder)`, which returns a function: called with a case's number it makes that
case, always the same, and gives it to edgemuse. It may return, or raise a child of EdgemuseError with one line.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from edgemuse.engines.errors import EdgemuseError
from edgemuse.engines.hardware import peak_memory

Attempt = Callable[[int], None]
SECONDS = 60.0
"""For one case, on a machine that others use as well; most take hundredths."""
SPARE_BYTES = 2 << 30
"""Of address space, beyond what a worker has when it is ready: so that a case cannot take the machine with it."""
RETURNED = "returned"


def outcome(attempt: Attempt, number: int) -> tuple[str, str]:
    """What became of a case: `RETURNED` or the name of a child of EdgemuseError, and what is wrong with that."""
    try:
        attempt(number)
    except EdgemuseError as error:
        message = str(error)
        return type(error).__name__, "" if message.isprintable() and message else f"not a printable line: {message!r}"
    except BaseException as error:  # nothing else may be raised
        return type(error).__name__, traceback.format_exc()
    return RETURNED, ""


def run_cases(fuzzer: str, count: int, max_bytes: float) -> tuple[Counter[str], list[str]]:
    """Run the first `count` cases of the module `fuzzer` in workers; what became of them, and what is wrong with that.

    A worker that dies, hangs or takes more than `max_bytes` is replaced, because no later case is to blame.
    """
    outcomes, wrong, number = Counter[str](), list[str](), 0
    while number < count:
        with _worker(fuzzer, number, count) as hear:
            if hear() is None:
                raise RuntimeError(f"{fuzzer} cannot be prepared")
            over = False
            while number < count and not over:
                said = hear() or {"outcome": "none", "trouble": "the process died or hung", "peak": 0}
                over = said["outcome"] == "none" or said["peak"] > max_bytes
                outcomes[said["outcome"]] += 1
                if said["trouble"] or over:
                    wrong.append(f"case {number}: {said['outcome']}, {said['peak'] / 2**30:.2f} GiB {said['trouble']}")
                number += 1
    return outcomes, wrong


@contextlib.contextmanager
def _worker(fuzzer: str, first: int, end: int) -> Iterator[Callable[[], Any]]:
    """A process that runs cases; a function that gives what it says next, or None if it says no more."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "fuzz.harness", fuzzer, str(first), str(end)]
    said: queue.Queue[str] = queue.Queue()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        threading.Thread(target=_pass_on, args=(process.stdout, said), daemon=True).start()
        try:
            yield lambda: _next(said)
        finally:
            process.kill()


def _pass_on(lines: IO[str], said: queue.Queue[str]) -> None:
    with contextlib.suppress(ValueError):  # closed meanwhile
        for line in lines:
            said.put(line)
    said.put("")


def _next(said: queue.Queue[str]) -> Any:
    try:
        line = said.get(timeout=SECONDS)
    except queue.Empty:
        return None
    return json.loads(line) if line else None


def _work(fuzzer: str, first: int, end: int) -> None:
    """In the worker: a line on stdout for each case."""
    warnings.simplefilter("error")
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        attempt = importlib.import_module(fuzzer).prepare(Path(folder))
        _limit()
        print(json.dumps("ready"), flush=True)
        for number in range(first, end):
            found, trouble = outcome(attempt, number)
            print(json.dumps({"outcome": found, "trouble": trouble, "peak": peak_memory()}), flush=True)


def _limit() -> None:
    """Where the system can: no more than `SPARE_BYTES` of further address space."""
    with contextlib.suppress(ImportError, OSError, StopIteration):
        import resource

        lines = Path("/proc/self/status").read_text().splitlines()
        now = int(next(line for line in lines if line.startswith("VmSize")).split()[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (now + SPARE_BYTES, now + SPARE_BYTES))


if __name__ == "__main__":
    _work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
