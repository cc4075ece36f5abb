"""Options that several commands share, and what must happen before numerical libraries are imported."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

LINEAR_ALGEBRA = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""Threads of numpy's matrix products: one, because edgemuse itself works on several rows at once."""

model_dir_option = click.option(
    "--model-dir", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="The store: where models "
    "go by a name.  [default: 'models' in the folder EDGEMUSE_HOME, or in the user's data directory]",
)  # fmt: skip
MOST_THREADS = 4096
"""More than the largest machines have; a typing error would start them all."""
MOST_DIGITS = 9
"""Of a shard's number."""
threads_option = click.option(
    "--threads",
    type=click.IntRange(1, MOST_THREADS),
    help="Processor cores to use. In int8 a few labels depend on their number.  [default: the backend's choice]",
)


def _shard(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int]:
    """`2/8` as (2, 8)."""
    digits = f"([0-9]{{1,{MOST_DIGITS}}})"
    found = re.fullmatch(f"{digits}/{digits}", "1/1" if value is None else value)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count:
        raise click.BadParameter(f"{value!r} is not I/N with I from 1 to N, such as 2/8")
    return number, count


def _gibibytes(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    """A number that is one: click takes nan and inf as well."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number of GiB, such as 7.5")
    return value


ENGINE_OPTIONS = (
    click.option(
        "-m",
        "--model",
        type=click.Path(path_type=Path),
        metavar="BUNDLE",
        help="The model: a folder or .zip that 'export' or 'cascade' made, or a name that 'models list' shows.  "
        "[default: the built-in model]",
    ),
    model_dir_option,
    click.option(
        "--profile",
        type=click.Choice(["reference", "balanced", "fast"]),
        default="reference",
        show_default=True,
        help="reference: label for label what nnU-Net gives, its rounding to half precision included. balanced: "
        "without mirroring, up to 8 times faster where the network was trained with it; rounds less and takes less "
        "memory. fast: also with tiles as large as memory allows, at best the "
        "whole brain at once.",
    ),
    click.option(
        "--backend",
        type=click.Choice(["auto", "tensorrt", "openvino", "onnxruntime"]),
        default="auto",
        show_default=True,
        help="auto: what 'tune' found to be fastest here, or the first that works, see 'devices'.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "fp32", "bf16", "fp16", "int8"]),
        default="auto",
        show_default=True,
        help="auto: the fastest that passed the bundle's accuracy gate, see 'info'; fp32 with the profile reference.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="Device of the backend, such as CPU or GPU; 'devices' lists them. auto: the backend's first.",
    ),
    threads_option,
    click.option(
        "--max-ram",
        type=click.FloatRange(min=0, min_open=True),
        callback=_gibibytes,
        metavar="GIB",
        help="Memory to stay within. A scan that needs more is refused; with the profile fast the tiles are made to "
        "fit. Where several processes run at once, give each its share.  [default: 90 % of what is free]",
    ),
    click.option(
        "--no-postprocess",
        is_flag=True,
        help="Keep islands: parts of a structure apart from its largest part. They are removed of the structures that "
        "the bundle says are in one piece; a bundle exported without --labels names none.",
    ),
    click.option(
        "--no-qc", is_flag=True, help="Write no picture. Scans that are done are not segmented again to get one later."
    ),
    click.option(
        "--overwrite",
        is_flag=True,
        help="Segment again what is done already, and replace files that have the names of results.",
    ),
    click.option(
        "--shard",
        callback=_shard,
        metavar="I/N",
        help="Segment only the I-th of N parts of the scans, as a job of an array: 2/8 is the second of eight. Every "
        "scan is in one part.  [default: all]",
    ),
    click.option(
        "--scheduler",
        metavar="ADDRESS",
        help="Have the workers of a Dask cluster segment the scans: the address of its scheduler, such as "
        'tcp://host:8786. They need the same paths as this machine. Needs pip install ".[cluster]" in '
        "edgemuse's source folder.",
    ),
    click.option("-v", "--verbose", is_flag=True, help="Say the seconds of every stage and the planned memory."),
)

"""Of every command that segments."""


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that segments."""
    for option in reversed(ENGINE_OPTIONS):
        command = option(command)
    return command


def bind_threads(threads: int | None) -> None:
    """Limit numerical libraries to `threads` cores. They read these variables once, when they are imported."""
    for variable in LINEAR_ALGEBRA:
        os.environ.setdefault(variable, "1")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
