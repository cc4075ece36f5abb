"""The command line. Only this module prints; results go to stdout, everything else to stderr.

Numerical libraries are imported inside the commands, so that `--help` is quick and `--threads` can still bind them.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from edgemuse.engines.errors import EdgemuseError, one_line
from edgemuse.runtime.cli.models import model_dir_option

if TYPE_CHECKING:
    from edgemuse.runtime.batch.jobs import Job
    from edgemuse.runtime.batch.many import Counts
    from edgemuse.runtime.model.bundle import Bundle
    from edgemuse.runtime.model.cascade import Cascade
    from edgemuse.runtime.pipeline.segmenter import Options

LAZY_COMMANDS = {
    "build": ("edgemuse.runtime.cli.build", "build", "Compile a bundle's engines ahead of time."),
    "export": ("edgemuse.export.command", "export", "Turn an nnU-Net v2 model folder into a verified bundle."),
    "cascade": ("edgemuse.export.cascade", "cascade", "Join a brain mask bundle and a region bundle into one."),
    "calibrate": ("edgemuse.calibration.command", "calibrate", "Add int8 and fp16 to a bundle, accuracy measured."),
    "tune": ("edgemuse.calibration.tune", "tune", "Find a bundle's fastest engine on this machine."),
    "bench": ("edgemuse.bench.command", "bench", "Measure accuracy, time and memory against nnU-Net and others."),
}
"""Commands of other sub-packages: module, attribute, summary for the overview."""
MODEL_COMMANDS = {
    "list": ("edgemuse.runtime.cli.models", "list_models", "List the models that go by a name, and check them."),
    "fetch": ("edgemuse.export.fetch", "fetch", "Get DLMUSE from the Hugging Face hub and export it here."),
    "add": ("edgemuse.runtime.cli.models", "add", "Put a bundle into the store, so that it goes by a name."),
    "verify": ("edgemuse.runtime.cli.models", "verify", "Check the SHA-256 of every file of every model."),
}
"""The same for those of `edgemuse models`."""
LINEAR_ALGEBRA = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""Threads of numpy's matrix products: one, because edgemuse itself works on several rows at once."""
FAILURE, BAD_INPUT = 1, 2


class Commands(click.Group):
    """A group of commands; the `lazy` ones are imported when they are called."""

    def __init__(self, lazy: Mapping[str, tuple[str, str, str]], **attributes: Any) -> None:
        super().__init__(**attributes)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of a first visit: use, then make, then inspect."""
        return [*super().list_commands(ctx), *self.lazy]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command called `name`, imported if need be."""
        if name not in self.lazy:
            return super().get_command(ctx, name)
        module, attribute, _ = self.lazy[name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The overview, without importing lazy commands."""
        rows = [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows + [(name, row[2]) for name, row in self.lazy.items()])


def _shard(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int]:
    """`2/8` as (2, 8)."""
    number, slash, count = ("1/1" if value is None else value).partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise click.BadParameter(f"{value!r} is not I/N with I from 1 to N, such as 2/8")
    return int(number), int(count)


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
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        help="Processor cores to use. In int8 a few labels depend on their number.  [default: the backend's choice]",
    ),
    click.option(
        "--max-ram",
        type=click.FloatRange(min=0, min_open=True),
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
        'tcp://host:8786. They need the same paths as this machine. Needs pip install "edgemuse[cluster]".',
    ),
    click.option("-v", "--verbose", is_flag=True, help="Say the seconds of every stage and the planned memory."),
)
"""Of every command that segments."""


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that segments."""
    for option in reversed(ENGINE_OPTIONS):
        command = option(command)
    return command


@click.group(cls=Commands, lazy=LAZY_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="edgemuse")
@click.option("--debug", is_flag=True, help="Show a traceback where something fails.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Segment T1 brain MRI with nnU-Net v2 networks, without PyTorch.

    \b
    First time here:
      edgemuse demo                                    segment a sample scan and look at the result
      edgemuse segment T1.nii.gz -o results            your own scan, with the built-in model
      edgemuse segment FOLDER -o results               or all in a folder
    With your own nnU-Net:
      edgemuse export MODEL_FOLDER -o model.bundle     once, where PyTorch is installed
      edgemuse segment T1.nii.gz --model model.bundle -o results
    """  # noqa: D301 click reads the backspace itself
    ctx.obj = debug


@cli.command()
@click.argument("inputs", nargs=-1, type=click.Path(path_type=Path), metavar="T1.nii.gz|FOLDER...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option("--list", "listed", type=click.File(encoding="utf-8-sig"), metavar="FILE",
              help="More scans and folders: a text file with one path per line; - reads it from stdin.")  # fmt: skip
@engine_options
@click.pass_context
def segment(
    ctx: click.Context,
    /,
    inputs: tuple[Path, ...],
    output: Path,
    listed: IO[str] | None,
    **options: Any,
) -> None:
    """Segment T1 scans (NIfTI): files, or every T1 in a folder and below.

    For sub-01_T1w.nii.gz the folder OUTPUT receives

    \b
      sub-01_dseg.nii.gz         labels on the scan's own grid
      sub-01_dseg.tsv            what the labels mean
      sub-01_volumes.tsv         voxels and mm3 of every structure
      sub-01_DLMUSE_Volumes.csv  with DLMUSE: the table that NiChart_DLMUSE writes
      sub-01_provenance.json     inputs, model, versions, seconds, memory
      sub-01_qc.png              slices with the labels over them: look at it

    and their paths are printed. Where a result should be looked at before it is used (the brain cut off, structures
    missing or in pieces, strong noise, ...), a line says why, and so do the provenance and the picture.

    Of a folder every NIfTI file is taken, unless its name ends as that of another kind of image (_T2w, _bold, _mask,
    _dseg, ...); OUTPUT gets the same sub-folders. A scan that cannot be segmented does not stop the others. A run that
    was interrupted goes on where it stopped: give the same command again. Several processes may work on the same scans
    and OUTPUT at once; on a cluster's file system, where locks may not work, give each its own --shard.

    Exit code: 0 all done, 2 bad input or usage, 1 another failure.
    """  # noqa: D301 click reads the backspace itself

    def find(_: Bundle | Cascade) -> list[Job]:
        from edgemuse.runtime.batch.jobs import find_jobs, read_list

        return find_jobs([*inputs, *(read_list(listed) if listed else ())], output)

    if not inputs and listed is None:
        raise click.UsageError("Missing argument 'T1.nii.gz|FOLDER...'.")
    ctx.exit(_segment_all(find, output, ctx.obj, **options))


class BidsApp(click.Command):
    """Options of labels take several words, as BIDS Apps do: `--participant-label 01 02`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give every label an option of its own, which is how click reads them."""
        spread, option = list[str](), ""
        for word in args:
            if word.startswith("-"):
                name = word.replace("_", "-")
                option = name if name in ("--participant-label", "--session-label") else ""
                spread.append(option or word)
            else:
                spread += [option, word] if option and spread[-1] != option else [word]
        return super().parse_args(ctx, spread)


@cli.command(cls=BidsApp)
@click.argument("dataset", metavar="BIDS_DIR", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUTPUT_DIR", type=click.Path(path_type=Path))
@click.argument("level", metavar="participant|group", type=click.Choice(["participant", "group"]))
@click.option("--participant-label", "participants", multiple=True, metavar="LABEL...",
              help="Only these participants; with or without sub-.  [default: all]")  # fmt: skip
@click.option("--session-label", "sessions", multiple=True, metavar="LABEL...",
              help="Only these sessions; with or without ses-.  [default: all]")  # fmt: skip
@engine_options
@click.pass_context
def bids(
    ctx: click.Context,
    /,
    dataset: Path,
    output: Path,
    level: str,
    participants: tuple[str, ...],
    sessions: tuple[str, ...],
    **options: Any,
) -> None:
    """Segment the T1w images of a BIDS dataset, as a BIDS App does.

    participant: every sub-*/[ses-*/]anat/*_T1w.nii[.gz] of BIDS_DIR gives, in the same place of OUTPUT_DIR,

    \b
      sub-01_seg-MODEL_dseg.nii.gz   labels on the image's own grid
      sub-01_seg-MODEL_dseg.tsv      what the labels mean
      sub-01_seg-MODEL_dseg.json     how they were made
      sub-01_seg-MODEL_volumes.tsv   voxels and mm3 of every structure
      sub-01/figures/sub-01_seg-MODEL_qc.png

    where MODEL is the model's name, and with DLMUSE its table of volumes. OUTPUT_DIR becomes a BIDS derivative dataset.
    What is done already is skipped, and several processes may work at once, as with 'segment'.

    group: the tables of volumes in OUTPUT_DIR are merged into one, group_seg-MODEL_volumes.tsv.

    \b
    Example:
      edgemuse bids data data/derivatives/edgemuse participant --participant-label 01 02
      edgemuse bids data data/derivatives/edgemuse group
    """  # noqa: D301 click reads the backspace itself
    if level == "group":
        from edgemuse.runtime.batch.bids import merge_tables

        if options["scheduler"] or options["shard"] != (1, 1):
            raise click.UsageError("--scheduler and --shard are for participant; group is one short step.")
        click.echo("\n".join(map(str, merge_tables(output, participants, sessions))))
        return

    def find(opened: Bundle | Cascade) -> list[Job]:
        from edgemuse.runtime.batch.bids import find_jobs, start_dataset

        jobs = find_jobs(dataset, output, opened.name, participants, sessions)
        start_dataset(dataset, output)
        return jobs

    ctx.exit(_segment_all(find, output, ctx.obj, **options))


@cli.command(short_help="Show what a bundle holds, and check every file in it.")
@click.argument("model", required=False, type=click.Path(path_type=Path), metavar="[BUNDLE]")
@model_dir_option
@click.option("--card", is_flag=True, help="Print the built-in model's card: data, accuracy, known weaknesses.")
def info(model: Path | None, model_dir: Path | None, card: bool) -> None:
    """Show what a bundle holds and what passed its accuracy gate; check every file in it.

    BUNDLE is a folder or .zip, or a name that 'models list' shows; without it, the built-in model.
    """
    from edgemuse.runtime.cli.describe import describe_model
    from edgemuse.runtime.model.builtin import MODEL_CARD
    from edgemuse.runtime.model.cascade import open_model
    from edgemuse.runtime.model.store import find_model

    if card:
        click.echo(MODEL_CARD.read_text(encoding="utf-8"))
        return
    opened = open_model(find_model(model, model_dir))
    opened.verify()
    click.echo(describe_model(opened))


@cli.command(short_help="Segment a sample scan that comes with edgemuse.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("edgemuse-demo"), show_default=True,
              help="Folder for the results; those of an earlier demo are replaced.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Processor cores to use.  [default: the backend's choice]")
def demo(output: Path, threads: int | None) -> None:
    """Segment a sample scan that comes with edgemuse, and compare the result with the truth.

    The scan is synthetic, so its true labels are known. Prints the Dice, the volumes and the seconds, and writes the
    same files as 'segment', the picture among them.
    """
    _show_log(False)
    _bind_threads(threads)
    from edgemuse.runtime.cli.demo import run

    with _progress("sample") as progress:
        report, paths = run(output, threads, progress)
    click.echo(report, err=True)
    for path in paths:
        click.echo(path)


@cli.group(cls=Commands, lazy=MODEL_COMMANDS, invoke_without_command=True)
@click.pass_context
def models(ctx: click.Context) -> None:
    """Models that go by a name: list, fetch, add and verify them.

    They lie in a store, a folder with one file or folder for each. 'segment --model NAME' finds them there.

    \b
      edgemuse models fetch dlmuse --accept-license    with a network and PyTorch
      edgemuse models list                             what is there, from where, whether whole
      edgemuse models add STICK/dlmuse.zip             without either: from the store of another machine
    """  # noqa: D301 click reads the backspace itself
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command()
def devices() -> None:
    """List the backends, what each can do on this machine, and why not."""
    from edgemuse.runtime.cli.describe import describe_devices

    click.echo(describe_devices())


def main() -> None:
    """Entry point: one line and an exit code for every error."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    atexit.register(gc.freeze)  # looking through all modules for garbage before they go takes a tenth of a second
    sys.exit(_guard(lambda: _run(arguments, debug), debug))


def _run(arguments: list[str], debug: bool) -> int:
    try:
        result = cli.main((["--debug"] if debug else []) + arguments, "edgemuse", standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("edgemuse: interrupted", err=True)
        return 130
    except click.ClickException as error:
        _show_usage_error(error, help_wanted=not arguments)
        return error.exit_code
    return result if isinstance(result, int) else 0


def _show_usage_error(error: click.ClickException, help_wanted: bool) -> None:
    """One line; the whole help only where no command was given at all."""
    if help_wanted:
        error.show()
        return
    command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "edgemuse"
    click.echo(f"edgemuse: {one_line(error.format_message())} See '{command} --help'.", err=True)


def _guard(work: Callable[[], int | None], debug: bool, about: str = "") -> int:
    """Run `work`; turn what it raises into a line on stderr, which names what it is `about`, and the exit code."""
    try:
        return work() or 0
    except (EdgemuseError, MemoryError, OSError) as error:
        if debug:
            raise
        click.echo(f"edgemuse: {_named(error, about)}", err=True)
        return error.exit_code if isinstance(error, EdgemuseError) else FAILURE
    except (click.ClickException, click.exceptions.Abort, click.exceptions.Exit):
        raise
    except Exception as error:
        if debug:
            raise
        click.echo(f"edgemuse: internal error: {_named(error, about)}; --debug shows where", err=True)
        return FAILURE


def _named(text: object, about: str) -> str:
    line, about = one_line(text), one_line(about)
    return line if about in line else f"{about}: {line}"


class _Line(logging.Formatter):
    """Lines of the log, which name what they are `about` at that moment."""

    def __init__(self, about: Callable[[], str]) -> None:
        super().__init__()
        self.about = about

    def format(self, record: logging.LogRecord) -> str:
        return f"edgemuse: {_named(super().format(record), self.about())}"


def _show_log(verbose: bool, about: Callable[[], str] = str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Line(about))
    logger = logging.getLogger("edgemuse")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # what is wrong with a header, edgemuse says


def _bind_threads(threads: int | None) -> None:
    """Libraries read these once, on import."""
    for variable in LINEAR_ALGEBRA:
        os.environ.setdefault(variable, "1")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _options(max_ram: float | None, postprocess: bool, profile: str, **engine: Any) -> Options:
    from edgemuse.engines.protocol import EngineOptions
    from edgemuse.runtime.pipeline.segmenter import Options, default_cache_dir

    return Options(profile, EngineOptions(**engine, cache_dir=default_cache_dir()), max_ram, postprocess)


def _segment_all(
    find: Callable[[Bundle | Cascade], list[Job]],
    output: Path,
    debug: bool,
    *,
    model: Path | None,
    model_dir: Path | None,
    shard: tuple[int, int],
    scheduler: str | None,
    max_ram: float | None,
    no_postprocess: bool,
    no_qc: bool,
    overwrite: bool,
    verbose: bool,
    **engine: Any,
) -> int:
    """Segment the jobs that `find` makes for the model; returns the exit code."""
    _show_log(verbose)
    _bind_threads(engine["threads"])
    from edgemuse.engines.hardware import map_large_arrays
    from edgemuse.runtime.batch.jobs import shard as part
    from edgemuse.runtime.batch.many import Batch, at_work, wanted
    from edgemuse.runtime.cli.extras import needs_extra
    from edgemuse.runtime.model.cascade import open_model
    from edgemuse.runtime.model.store import find_model
    from edgemuse.runtime.pipeline.cascade import segmenter_of
    from edgemuse.runtime.results.files import prepare_folder

    map_large_arrays()

    def found() -> tuple[list[Job], Screen]:
        """Last of all, because it makes the folder of the results."""
        jobs = part(find(opened), *shard)
        prepare_folder(output)
        if len(jobs) > 1:
            _show_log(verbose, lambda: str(at_work.get() or ""))
        return jobs, Screen(len(jobs), debug)

    opened = open_model(find_model(model, model_dir))
    options = _options(max_ram, not no_postprocess, **engine)
    if scheduler:
        with needs_extra("cluster", "--scheduler", "distributed"):
            from edgemuse.runtime.batch import cluster
        task = cluster.Task(opened.path, opened.sha256, options, not no_qc, overwrite)
        jobs, screen = found()
        counts = cluster.run(scheduler, task, jobs, screen)
    else:
        with segmenter_of(opened, options) as segmenter:
            jobs, screen = found()
            batch = Batch(segmenter, wanted(opened.sha256, options), screen, not no_qc, overwrite)
            counts = batch.run(jobs)
    screen.summary(counts)
    return (FAILURE if FAILURE in counts.codes else BAD_INPUT) if counts.codes else 0


class Screen:
    """Tells people how far a run over `total` scans is. Of a single scan only the results are told."""

    def __init__(self, total: int, debug: bool) -> None:
        self.total, self.debug = total, debug
        self._started, self._begun, self._handled = time.perf_counter(), 0, 0
        self._waiting = False

    def guard(self, work: Callable[[], None], job: Job) -> int:
        """Run `work`; what it raises becomes a line, which names the scan if there are several, and the exit code."""
        return _guard(work, self.debug, str(job.scan) if self.total > 1 else "")

    @contextmanager
    def scan(self, job: Job) -> Iterator[Callable[[int, int], None]]:
        """A bar of tiles where stderr is a terminal, else a line when the network is done with the scan."""
        self._handled += 1
        number, left = f"{self._handled}/{self.total} " if self.total > 1 else "", self._left()
        with _progress(f"{number}{job.scan.name}{left and f' ({left})'}") as progress:
            start = time.perf_counter()
            yield progress
        self._begun += 1
        if not sys.stderr.isatty():
            self._line(job, time.perf_counter() - start)

    def elsewhere(self, job: Job, seconds: float | None) -> None:
        """A worker on some machine has done it in `seconds`; None: it could not."""
        self._handled += 1
        if seconds is not None:
            self._begun += 1
            self._line(job, seconds)

    def _line(self, job: Job, seconds: float) -> None:
        if self.total > 1:
            left = self._left()
            self._say(f"{self._handled}/{self.total} {job.scan}: {_duration(seconds)}{left and f', {left}'}")

    def _left(self) -> str:
        rest = self.total - self._handled
        if not self._begun or not rest:
            return ""
        return f"about {_duration((time.perf_counter() - self._started) / self._begun * rest)} left"

    def skipped(self, job: Job) -> None:
        """It is done already."""
        self._handled += 1
        self._say(f"{job.scan}: done already, skipped; --overwrite does it again")

    def waiting(self, count: int) -> None:
        """Other processes work on the `count` scans that are left."""
        if not self._waiting:
            self._say(f"waiting for {count} scan{'s' * (count > 1)} that other processes work on")
        self._waiting = True

    def written(self, paths: list[Path]) -> None:
        """The paths of the results, on stdout."""
        click.echo("\n".join(map(str, paths)))

    def summary(self, counts: Counts) -> None:
        """How many scans came to what."""
        if self.total > 1:
            rows = [(counts.segmented, "segmented"), (counts.skipped, "done before"), (len(counts.codes), "failed")]
            said = ", ".join(f"{count} {what}" for count, what in rows if count)
            self._say(f"{self.total} scans: {said}; {_duration(time.perf_counter() - self._started)}")

    def _say(self, line: str) -> None:
        click.echo(f"edgemuse: {line}", err=True)


def _duration(seconds: float) -> str:
    """As `4.2 s`, `3 min 20 s` or `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of tiles on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with click.progressbar(length=1, label=label, file=sys.stderr, show_eta=True) as bar:

        def advance(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield advance


if __name__ == "__main__":
    main()
