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
def devices() -> None:
    """List the backends, what each can do on this machine, and why not."""
    from edgemuse.runtime.cli.describe import describe_devices

    say(*describe_devices())
