"""Write all pages in `docs/measured`, a part at a time: `python -m edgemuse.bench.pages.all ../shared`.

Each part is a process of its own. What parts need besides SHARED is made with `edgemuse.training`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from edgemuse.bench.measure.rows import commit
from edgemuse.bench.pages.page import MEASURED
from edgemuse.bench.pages.program import EXISTING, FOLDER, WORK, say
from edgemuse.runtime.results.files import read_record, write_file

RECORD = "all.json"
"""In the folder for work: which parts a call was asked for, at which commit, and which of them are done."""


def nothing(shared: Path, work: Path) -> list[str]:
    """What a part needs that needs nothing but SHARED."""
    return []


def held_out_scans(shared: Path, work: Path) -> list[str]:
    """Scans synthesised from label maps that were held out of training, made anew."""
    folder = _empty(work / "held-out")
    _train("sample", str(shared / "data" / "labelmaps"), "-o", str(folder), "--held-out")
    return ["--held-out", str(folder)]


def built_in_folder(shared: Path, work: Path) -> list[str]:
    """The built-in model in nnU-Net's own format, made anew."""
    folder = _empty(work / "built-in")
    _train("folder", "-o", str(folder))
    return ["--built-in-folder", str(folder)]


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _train(module: str, *arguments: str) -> None:
    command = [sys.executable, "-m", f"edgemuse.training.{module}", *arguments]
    if code := call(command):
        raise click.ClickException(f"{' '.join(command)}: exit code {code}")


@dataclass(frozen=True)
class Part:
    """A page, or a part of one.

    Attributes:
        page: its name in `docs/measured`.
        part: the name that the page's program has for it; empty if it is the whole page.
        module: the program, in this folder.
        minutes: how long it takes on two cores that have nothing else to do, about.
        what: what is measured, for people.
        prepare: makes what it needs besides SHARED in a folder, and returns the options that name it.
    """

    page: str
    part: str
    module: str
    minutes: int
    what: str
    prepare: Callable[[Path, Path], list[str]] = nothing

    @property
    def name(self) -> str:
        """What `--part` calls it."""
        return f"{self.page}-{self.part}" if self.part else self.page

    @property
    def line(self) -> str:
        """The part in one line, for people."""
        return f"{self.name:23} about {self.minutes:2} min  {self.what}"

    def command(self, shared: Path, output: Path, work: Path) -> list[str]:
        """The command that measures it and writes it into its page in `output`."""
        command = [sys.executable, "-m", f"edgemuse.bench.pages.{self.module}", str(shared)]
        command += ["-o", str(output / f"{self.page}.md"), "--work", str(work / self.page)]
        command += ["--part", self.part] if self.part else []
        return command + self.prepare(shared, work)


PARTS = (
    Part("performance", "development", "performance", 5, "time, memory and accuracy of the development model"),
    Part("performance", "built-in", "performance", 7, "the same of the built-in model", built_in_folder),
    Part("performance", "dlmuse", "performance", 35, "the same of DLMUSE's network, half of it nnU-Net mirrored"),
    Part("benchmark", "development", "document", 12, "the development model against nnU-Net's own predictor"),
    Part("benchmark", "peers", "document", 7, "the development model run by everything that can run it"),
    Part("benchmark", "built-in", "document", 8, "the built-in model, with scaling curves"),
    Part("benchmark", "dlmuse", "document", 10, "DLMUSE's network against nnU-Net's own predictor"),
    Part("parity", "", "parity", 20, "labels compared with those of nnU-Net's own predictor"),
    Part("gate", "", "gate", 10, "the accuracy gate of both trained networks on real scans"),
    Part("cascade", "", "cascade", 15, "two networks of DLMUSE's size on a whole head"),
    Part("many", "", "many", 12, "a dataset of 26 scans, segmented by one process, several, and killed ones"),
    Part("model", "", "builtin", 10, "how good the built-in model is", held_out_scans),
    Part("flags", "", "flags", 15, "the quality flags on good scans and on spoilt copies of some"),
    Part("tensorrt", "", "tensorrt_builds", 5, "engines for NVIDIA GPUs, built without a GPU"),
)
"""In the order in which they are measured. The minutes follow from the seconds on the pages."""


def select(names: Sequence[str]) -> list[Part]:
    """The parts called `names`, all if there are none; a page stands for its parts."""
    known = {part.name for part in PARTS} | {part.page for part in PARTS}
    for name in names:
        if name not in known:
            raise click.BadParameter(f"no part {name!r}; choose from {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if not names or part.name in names or part.page in names]


def call(command: Sequence[str]) -> int:
    """Run a command to its end; returns its exit code."""
    return subprocess.run(command, check=False).returncode


def measure(part: Part, shared: Path, output: Path, work: Path) -> bool:
    """Measure one part, saying how long it takes; returns whether that went well."""
    start = time.perf_counter()
    try:
        code = call(part.command(shared, output, work))
    except (click.ClickException, OSError) as error:
        say(str(error))
        code = 1
    took = f"{(time.perf_counter() - start) / 60:.1f} min"
    say(f"{part.name}: " + (f"exit code {code} after {took}" if code else f"written in {took}"))
    return code == 0


def list_parts(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    """Print what there is to measure, and end."""
    if wanted:
        for part in PARTS:
            click.echo(part.line)
        click.echo(f"{'all':23} about {sum(part.minutes for part in PARTS) / 60:.1f} h on two cores")
        context.exit()


@click.command()
@click.argument("shared", type=EXISTING)
@click.option("--part", "names", multiple=True, metavar="NAME", help="Measure only this, a page or a part of one; give "
              "it again for more.  [default: all]")  # fmt: skip
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=list_parts, help="List the parts and "
              "about how long each takes, and end.")  # fmt: skip
@click.option("-o", "--output", type=EXISTING, default=MEASURED, show_default=True, help="Folder of the pages.")
@click.option("--work", type=FOLDER, default=WORK, help="Folder for what is made on the way.  [default: in the user's "
              "cache]")  # fmt: skip
def main(shared: Path, names: tuple[str, ...], output: Path, work: Path) -> None:
    """Measure parts of the pages and write each as soon as it is measured; exit code 1 if any went wrong.

    A part that goes wrong does not stop the others. The same call at the same commit, given again after an
    interruption or a failure, leaves out what is done and goes on with the rest.
    """
    parts = select(names)
    asked = {"commit": commit(), "parts": [part.name for part in parts]}
    done = left_done(work / RECORD, asked)
    for number, part in enumerate(parts, 1):
        if part.name in done:
            say(f"[{number}/{len(parts)}] {part.name}: done by the call before")
            continue
        say(f"[{number}/{len(parts)}] {time.strftime('%H:%M')} {part.line}")
        if measure(part, shared, output, work):
            done.append(part.name)
            work.mkdir(parents=True, exist_ok=True)
            write_file(work / RECORD, json.dumps(asked | {"done": done}).encode())
    wrong = [part.name for part in parts if part.name not in done]
    if wrong:
        say(f"went wrong: {', '.join(wrong)}")
        raise SystemExit(1)
    (work / RECORD).unlink()


def left_done(record: Path, asked: Mapping[str, object]) -> list[str]:
    """The parts that an earlier call finished which was asked for the same at the same commit."""
    left = read_record(record)
    same = all(left.get(key) == value for key, value in asked.items())
    return list(left["done"]) if same and not str(asked["commit"]).endswith("-dirty") else []


if __name__ == "__main__":
    main()
