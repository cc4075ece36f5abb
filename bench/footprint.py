"""Size of what gets installed: `python -m edgemuse.bench.footprint`.

Makes two virtual environments, one with this checkout's runtime and one with what upstream's inference needs (nnunetv2
and PyTorch for the CPU), and adds up their files.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import click

CHECKOUT = Path(__file__).resolve().parents[1]


def installed_bytes(requirements: list[str], folder: Path) -> int:
    """Bytes of a new virtual environment in `folder` after installing `requirements`, pip included."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    subprocess.run([str(folder / scripts / "python"), "-m", "pip", "install", "-q", *requirements], check=True)
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


@click.command()
@click.option("--torch", default="torch==2.13.0", show_default=True, help="A requirement that gives the CPU build.")
def main(torch: str) -> None:
    """Print both sizes and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        ours = installed_bytes([str(CHECKOUT)], Path(name) / "edgemuse")
        theirs = installed_bytes([torch, "nnunetv2"], Path(name) / "nnunet")
    click.echo(f"edgemuse {ours / 1e9:.2f} GB, nnunetv2 with PyTorch {theirs / 1e9:.2f} GB, ratio {theirs / ours:.1f}")


if __name__ == "__main__":
    main()
