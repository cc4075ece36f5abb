"""The group of commands, and how a run of the program ends."""

from __future__ import annotations

import atexit
import gc
import sys

import click

from edgemuse.engines.errors import one_line
from edgemuse.runtime.cli.lazy import LazyGroup
from edgemuse.runtime.cli.screen import guard, show_log
from edgemuse.runtime.cli.terminal import note, settle_streams

COMMANDS = {
    "segment": ("edgemuse.runtime.cli.segment", "segment", "Segment T1 scans: files, or all in a folder."),
    "bids": ("edgemuse.runtime.cli.bids", "bids", "Segment the T1w images of a BIDS dataset, as a BIDS App does."),
    "demo": ("edgemuse.runtime.cli.demo", "demo", "Segment a sample scan that comes with edgemuse."),
    "info": ("edgemuse.runtime.cli.inspect", "info", "Show what a bundle holds, and check every file in it."),
    "devices": ("edgemuse.runtime.cli.inspect", "devices", "List the backends and what each can do on this machine."),
    "models": ("edgemuse.runtime.cli.models", "models", "Models that go by a name: list, fetch, add, verify."),
    "build": ("edgemuse.runtime.cli.build", "build", "Compile a bundle's engines ahead of time."),
    "export": ("edgemuse.export.command", "export", "Turn an nnU-Net v2 model folder into a verified bundle."),
    "cascade": ("edgemuse.export.cascade", "cascade", "Join a brain mask bundle and a region bundle into one."),
    "calibrate": ("edgemuse.calibration.command", "calibrate", "Add int8 and fp16 to a bundle, accuracy measured."),
    "tune": ("edgemuse.calibration.tune", "tune", "Find a bundle's fastest engine on this machine."),
    "bench": ("edgemuse.bench.command", "bench", "Measure accuracy, time and memory against nnU-Net and others."),
}
"""Commands in the order of a first visit: use, inspect, make. They import numerical libraries inside themselves, so
that `--help` is quick and `--threads` can still bind these."""


@click.group(cls=LazyGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
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


def run_program() -> None:
    """Run the command that the program was called with, and exit: one line and an exit code for every error."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    settle_streams(debug)
    show_log(False)
    atexit.register(gc.freeze)  # looking through all modules for garbage before they go takes a tenth of a second
    sys.exit(guard(lambda: _run(arguments, debug), debug))


def _run(arguments: list[str], debug: bool) -> int:
    try:
        result = cli.main((["--debug"] if debug else []) + arguments, "edgemuse", standalone_mode=False)
    except click.exceptions.Abort:
        note("edgemuse: interrupted")
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
    note(f"edgemuse: {one_line(error.format_message())} See '{command} --help'.")
