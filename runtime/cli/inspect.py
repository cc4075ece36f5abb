"""`edgemuse info` and `edgemuse devices`: what a bundle holds, what this machine can do."""

from __future__ import annotations

from pathlib import Path

import click

from edgemuse.runtime.cli.options import model_dir_option
from edgemuse.runtime.cli.terminal import say


@click.command(short_help="Show what a bundle holds, and check every file in it.")
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
        say(*MODEL_CARD.read_text(encoding="utf-8").splitlines())
        return
    opened = open_model(find_model(model, model_dir))
    opened.verify()
    say(*describe_model(opened))


@click.command()
@click.option("--check", is_flag=True, help="Have every backend compute a tile whose result is known.")
@click.option("-m", "--model", type=click.Path(path_type=Path), metavar="BUNDLE",
              help="Whose tile --check takes.  [default: the built-in model]")  # fmt: skip
@model_dir_option
def devices(check: bool, model: Path | None, model_dir: Path | None) -> None:
    """List the backends, what each can do on this machine, and why not.

    A backend may compute wrongly on one kind of processor. So a bundle stores a small tile and what its network makes
    of it, and before the first scan the engine chosen must give the same, within what its precision allows. What fails
    is refused, or replaced where it was chosen by auto. With --check every backend, device and precision is tried now,
    whatever was found before; exit code 1 if one fails.

    \b
    Example:
      edgemuse devices --check -m dlmuse
    """  # noqa: D301  # \b keeps click from wrapping the example
    from edgemuse.runtime.cli.describe import describe_devices

    if not check:
        if model is not None:
            raise click.UsageError("--model is for --check.")
        say(*describe_devices())
        return
    from edgemuse.runtime.cli.check import check_model
    from edgemuse.runtime.model.cascade import open_model
    from edgemuse.runtime.model.store import find_model

    lines, failed = check_model(open_model(find_model(model, model_dir)))
    say(*lines)
    if failed:
        raise click.exceptions.Exit(1)
