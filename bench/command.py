"""`edgemuse bench`: the command line of the benchmarks. Everything heavy is imported when a command runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import click

from edgemuse.runtime.cli.extras import needs_extra
from edgemuse.runtime.cli.terminal import note, say, say_paths

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING = click.Path(exists=True, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
REPEATS, QUICK_REPEATS = 5, 2


class Bench(click.Group):
    """A group whose first command is also what it does without one: `edgemuse bench BUNDLE ...`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `run` in front of arguments that begin with no command."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which a new user needs them."""
        return list(self.commands)


@click.group(cls=Bench, short_help="Measure accuracy, time and memory against nnU-Net and others.")
def bench() -> None:
    """Measure accuracy, time and memory against nnU-Net's own predictor and others, in one report.

    \b
    Examples:
      edgemuse bench -o report --quick
          the built-in model on the sample scan, in a minute or two
      edgemuse bench dlmuse.bundle --data SCANS --reference MODEL_FOLDER -o report
          everything that can run the network, against nnU-Net's own predictor
      edgemuse bench compare before after
          two reports side by side

    A first argument that is no command means 'run': 'edgemuse bench run --help' lists its options.
    It needs more than the runtime. In the folder of the source: pip install ".[bench]"
    """  # noqa: D301 click reads the backspace itself


@bench.command(short_help="Measure and write a report.")
@click.argument("bundle", required=False, type=click.Path(path_type=Path), metavar="[BUNDLE]")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False), metavar="REPORT",
              help="Folder for the report. A run that was interrupted goes on where it stopped.")  # fmt: skip
@click.option("--data", type=FOLDER, metavar="DIR", help="Folder of T1 scans. A label map <stem>_dseg.nii.gz beside a "
              "scan is its truth.  [default: the sample scan that comes with edgemuse]")  # fmt: skip
@click.option("--reference", type=FOLDER, metavar="MODEL_FOLDER", help="The nnU-Net model folder that BUNDLE was "
              "exported from: nnU-Net's own predictor is then the baseline.")  # fmt: skip
@click.option("--systems", "asked", multiple=True, metavar="NAME", help="What to measure, such as edgemuse, "
              "edgemuse/openvino/bf16, plain, nnunet/eager; a name stands for all that begin with it. Give it again "
              "for more.  [default: all that work here]")  # fmt: skip
@click.option("--repeats", type=click.IntRange(min=1), help=f"Runs of each system on each scan after one that warms "
              f"up.  [default: {REPEATS}]")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Processor cores for every system.  [default: each "
              "system's own choice]")  # fmt: skip
@click.option("--mapping", type=FILE, metavar="TSV", help="Where the truth has other structures than the "
              "model: a table with the columns name, model, truth; the label numbers of one structure are separated by "
              "commas.")  # fmt: skip
@click.option("--quick", is_flag=True, help="One scan, with its truth if any has one, three systems, "
              f"{QUICK_REPEATS} runs of each: two minutes with a small model on two cores.")  # fmt: skip
@click.option("--scaling", is_flag=True, help="Measure as well how time and memory grow with resolution, classes, "
              "threads and the number of scans.")  # fmt: skip
@click.option("--mlperf", is_flag=True, help="Run MLPerf's load generator as well, SingleStream and Offline, with the "
              "fastest of edgemuse's systems whose accuracy is not flagged. Needs mlcommons-loadgen.")  # fmt: skip
def run(
    bundle: Path | None,
    output: Path,
    data: Path | None,
    reference: Path | None,
    asked: tuple[str, ...],
    repeats: int | None,
    threads: int | None,
    mapping: Path | None,
    quick: bool,
    scaling: bool,
    mlperf: bool,
) -> None:
    """Measure every system on every scan and write a report.

    BUNDLE is a folder or a .zip that 'export' made, or a name that 'models list' shows; without it, the built-in model.

    Each run is a process of its own, measured from its start to its end. The systems take turns.
    Accuracy stands beside speed: Dice, 95 % Hausdorff distance and volumes against the truth, where there is one, and
    against the baseline: nnU-Net's own predictor with --reference, else edgemuse's profile 'reference' in fp32.

    \b
    REPORT receives
      report.html     the report, in one file that opens offline
      report.md       the same as text, with figures/
      results.jsonl   every measurement with machine, versions, commit and hashes
      labels/         the label maps
      mlperf/         the load generator's logs, with --mlperf

    \b
    Systems:
      edgemuse/BACKEND/PRECISION/PROFILE   edgemuse segment
      nnunet/eager[/mirrored]              nnU-Net's own predictor, PyTorch on the CPU
      nnunet/compile, channels-last, bf16  the same, its network run another way
      plain/openvino, plain/onnxruntime    the exported graph with logits out, in a session as it comes
    """  # noqa: D301 click reads the backspace itself
    with needs_extra("bench", "benchmarking", "a package"):
        from edgemuse.bench.benchmark import Request, benchmark
    count = repeats or (QUICK_REPEATS if quick else REPEATS)
    request = Request(bundle, output, data, reference, asked, count, threads, mapping, quick, scaling, mlperf, _typed())
    say_paths([benchmark(request, note)])


@bench.command(short_help="Set two reports side by side.")
@click.argument("first", type=FOLDER, metavar="A")
@click.argument("second", type=FOLDER, metavar="B")
def compare(first: Path, second: Path) -> None:
    """Print what differs between the reports in the folders A and B, and the ratio of their times, as Markdown.

    Both must be on the same scans; commits, machines, versions and models may differ and are named.
    """
    with needs_extra("bench", "benchmarking", "a package"):
        from edgemuse.bench.report.compare import compare as compared
    say(*compared(first, second).splitlines())


@bench.command(short_help="Show whether a study would find the same with either method's volumes.")
@click.argument("reference", type=EXISTING)
@click.argument("engine", type=EXISTING)
@click.option("--covariates", required=True, type=FILE, metavar="CSV", help="Table with the columns subject, age, "
              "diagnosis (1 patient, 0 healthy) and sex; either age or diagnosis may be missing.")  # fmt: skip
def downstream(reference: Path, engine: Path, covariates: Path) -> None:
    """Compare what the volumes of two methods are worth in a study of your own cohort.

    REFERENCE and ENGINE are tables with the column subject and one for each structure, or folders of
    <subject>_volumes.tsv as 'edgemuse segment' writes them. Brain age (ridge regression) and
    Alzheimer's (logistic regression) are predicted from either method's volumes on the same folds of a
    cross-validation; Mann-Whitney's U test on the errors and McNemar's on the decisions say whether they differ.
    Prints Markdown.
    """
    with needs_extra("bench", "benchmarking", "a package"):
        from edgemuse.bench.report.downstream import downstream as compared
    say(*compared(reference, engine, covariates).splitlines())


def _typed() -> str:
    """Return the command line as it was typed, so that the report can name it."""
    return shlex.join(["edgemuse", *sys.argv[1:]])
