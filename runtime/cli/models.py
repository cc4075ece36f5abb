"""`edgemuse models`: what is in the store, whether it is whole, and putting bundles there; `fetch` is in `export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from edgemuse.engines.errors import BundleError, one_line
from edgemuse.runtime.cli.lazy import LazyGroup
from edgemuse.runtime.cli.options import model_dir_option
from edgemuse.runtime.cli.terminal import note, say, say_paths

COMMANDS = {
    "list": ("edgemuse.runtime.cli.models", "list_models", "List the models that go by a name, and check them."),
    "fetch": ("edgemuse.export.fetch", "fetch", "Get DLMUSE from the Hugging Face hub and export it here."),
    "add": ("edgemuse.runtime.cli.models", "add", "Put a bundle into the store, so that it goes by a name."),
    "verify": ("edgemuse.runtime.cli.models", "verify", "Check the SHA-256 of every file of every model."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS, invoke_without_command=True)
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
        say(*ctx.get_help().splitlines())


@click.command("list")
@model_dir_option
def list_models(model_dir: Path | None) -> None:
    """List the models that go by a name, and check them: name, where from, size, licence, whether each file is whole.

    The built-in model comes first. The others lie in the folder that the last line names, one file or folder each.
    """
    from edgemuse.runtime.model.folders import store_folder
    from edgemuse.runtime.model.store import entries, inspect

    store = store_folder(model_dir)
    rows = [("name", "from", "size", "licence", "verified")]
    for entry in entries(store):
        facts = inspect(entry)
        verified = f"NO: {facts.problem}" if facts.problem else "yes"
        rows.append((entry.name, facts.origin, f"{facts.bytes / 1e6:.1f} MB", facts.license, verified))
    say(*_columns([[one_line(cell) for cell in row] for row in rows]))
    hint = "; 'edgemuse models fetch dlmuse' gets DLMUSE" if len(rows) == 2 else ""
    note(f"models are in {store}{hint}")


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path), metavar="BUNDLE")
@click.option("--name", help="Name to call it by.  [default: its file name, without .zip or .bundle]")
@model_dir_option
def add(model: Path, name: str | None, model_dir: Path | None) -> None:
    """Put a bundle or cascade, a folder or a .zip, into the store, so that it goes by a name.

    Every file is checked on the way. Prints where it is now: one .zip, which is also what to carry to a machine
    without a network, to be added there in the same way.

    \b
    Example:
      edgemuse models add dlmuse.zip
      edgemuse segment T1.nii.gz -o out --model dlmuse
    """  # noqa: D301  # \b keeps click from wrapping the example
    from edgemuse.runtime.model import store
    from edgemuse.runtime.model.folders import store_folder

    default = model.resolve().name.removesuffix(".zip").removesuffix(".bundle")
    say_paths([store.add(model, name or default, store_folder(model_dir))])


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@model_dir_option
@click.pass_context
def verify(ctx: click.Context, /, names: tuple[str, ...], model_dir: Path | None) -> None:
    """Check the SHA-256 of every file of every model, or of those named. Exit code 2 if one is damaged."""
    from edgemuse.runtime.model.folders import store_folder
    from edgemuse.runtime.model.store import entries, inspect, named

    store = store_folder(model_dir)
    damaged = False
    for entry in [named(name, store) for name in names] or entries(store):
        problem = inspect(entry).problem
        if problem:
            note(f"edgemuse: {entry.name}: {one_line(problem)}")
        else:
            say(f"{entry.name}: whole")
        damaged = damaged or problem is not None
    if damaged:
        ctx.exit(BundleError.exit_code)
