"""The benchmark that README quotes.

`python -m edgemuse.bench.pages.document SHARED --work DIR -o docs/measured/benchmark.md`

Four reports, in DIR, which can be interrupted and gone on with: the development model and the built-in one on the T1
scans of SHARED, the development model run by everything that can run it, and DLMUSE's network with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click

from edgemuse.bench.benchmark import Request, benchmark
from edgemuse.bench.measure.models import development_bundle, prepare_dlmuse
from edgemuse.bench.measure.rows import read_rows
from edgemuse.bench.measure.run import scans_in
from edgemuse.bench.pages.performance_report import parts_of
from edgemuse.bench.report.report import METHOD, Section, pictures, sections, to_markdown
from edgemuse.runtime.results.files import write_files

COMMAND = "python -m edgemuse.bench.pages.document ../shared --work DIR -o docs/measured/benchmark.md"
LARGEST_PICTURE = 200_000
"""Bytes."""


@dataclass(frozen=True)
class Material:
    """What a report is made of: a bundle (None: the built-in one), scans, the nnU-Net folder it was exported from."""

    bundle: Path | None
    data: Path
    reference: Path | None = None


@dataclass(frozen=True)
class Part:
    """One report and what the document says of it; `figures` are the beginnings of the names of those it shows."""

    title: str
    text: str
    prepare: Callable[[Path, Path], Material]
    systems: tuple[str, ...]
    repeats: int
    figures: tuple[str, ...]
    quick: bool = False
    scaling: bool = False
    mlperf: bool = False


def _development(shared: Path, work: Path) -> Material:
    return Material(development_bundle(shared, work), shared / "data" / "t1", shared / "data" / "devmodel")


def _built_in(shared: Path, work: Path) -> Material:
    return Material(None, shared / "data" / "t1")


def _dlmuse(shared: Path, work: Path) -> Material:
    """DLMUSE's network, made once in `work`."""
    made = work / "dlmuse"
    if not (made / "scan").exists():
        made.mkdir(parents=True)
        prepare_dlmuse(shared, made)
    return Material(made / "dlmuse.bundle", made / "scan", made / "model")


PARTS = {
    "development": Part(
        "Against nnU-Net's own predictor",
        "The development model: 33 classes at 2 mm, trained on synthesised scans. Three scans, one with a truth.",
        _development,
        ("nnunet/eager", "edgemuse/openvino"),
        2,
        ("pareto", "stages", "structures", "bland_altman", "worst_vxm"),
        mlperf=True,
    ),
    "peers": Part(
        "Against everything that runs the network",
        "The development model on the scan with a truth.",
        _development,
        ("nnunet", "plain", "edgemuse/openvino", "edgemuse/onnxruntime/fp32/reference"),
        1,
        ("pareto", "stages"),
        quick=True,
    ),
    "built-in": Part(
        "The built-in model",
        "33 classes, on the scan with a truth. The baseline is `reference` in fp32.",
        _built_in,
        ("edgemuse/openvino", "plain/openvino"),
        2,
        ("pareto", "scaling"),
        quick=True,
        scaling=True,
    ),
    "dlmuse": Part(
        "DLMUSE's network",
        "DLMUSE's plans and 152 classes with random weights: upstream's may not be passed on. One T1 of 163 x 214 x "
        "155 voxels of 1 mm. Time and memory are those of the real one; Dice says only how alike the numbers are.",
        _dlmuse,
        ("nnunet/eager", "edgemuse/openvino"),
        1,
        ("stages",),
    ),
}


def report_on(part: Part, material: Material, folder: Path, say: Callable[[str], None]) -> None:
    """Measure a part, as far as `folder` does not hold it yet."""
    request = Request(
        material.bundle,
        folder,
        material.data,
        material.reference,
        systems=part.systems,
        repeats=part.repeats,
        threads=None,
        mapping=None,
        quick=part.quick,
        scaling=part.scaling,
        mlperf=part.mlperf,
        command=COMMAND,
    )
    say(f"{part.title}: {benchmark(request, say)}")


def document(parts: dict[str, list[Section]], target: Path) -> dict[Path, bytes]:
    """The page at `target` and the figures beside it, in a folder of its name; parts not given stay as they are there.

    Args:
        parts: sections of each part by its name.
        target: Markdown file, which need not exist.
    """
    contents: dict[Path, bytes] = {}
    pages = ["# Benchmark", f"Written by `{COMMAND}`, a part at a time; each says by which commit and where."]
    written = parts_of(target.read_text(encoding="utf-8") if target.is_file() else "")
    for name, part in PARTS.items():
        if name in parts:
            shown = [section for section in map(partial(_shown, part.figures), parts[name]) if section is not None]
            intro = Section(part.title, f"{part.text}\n\n{shown[0].text}")
            pages.append(to_markdown([intro, *shown[1:]], 2, f"{target.stem}/{name}_"))
            contents |= {target.with_suffix("") / f"{name}_{key}.svg": data for key, data in pictures(shown).items()}
        elif part.title in written:
            pages.append(f"## {part.title}\n{written[part.title]}")
    pages.append(to_markdown([Section("How it was measured", METHOD)], 2))
    return {target: "\n\n".join(page.rstrip() for page in pages).encode() + b"\n"} | contents


def _shown(figures: tuple[str, ...], section: Section) -> Section | None:
    """The section with those figures whose names begin so; None if there is nothing else in it to show."""
    if section.text == METHOD:
        return None
    kept = {name: data for name, data in section.figures.items() if name.startswith(figures)}
    return replace(section, figures=kept) if kept or section.rows or not section.figures else None


@click.command()
@click.argument("shared", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the reports.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Markdown file to write.")
@click.option(
    "--part", "names", multiple=True, type=click.Choice(list(PARTS)), help="Measure only this. [default: all]"
)
def main(shared: Path, work: Path, output: Path, names: tuple[str, ...]) -> None:
    """Measure what DIR does not hold yet and write the parts that it holds into the document."""
    work.mkdir(parents=True, exist_ok=True)
    materials = {name: PARTS[name].prepare(shared, work) for name in names or PARTS}
    for name, material in materials.items():
        if not (work / name / "report.html").exists():  # which is written last
            report_on(PARTS[name], material, work / name, partial(click.echo, err=True))
    found = {}
    for name, part in PARTS.items():
        if (work / name / "report.html").exists():
            rows, scans = read_rows(work / name), scans_in(part.prepare(shared, work).data)
            found[name] = list(sections(work / name, rows, scans, ""))
    contents = document(found, output)
    output.with_suffix("").mkdir(parents=True, exist_ok=True)
    write_files(contents)
    for path, data in contents.items():
        click.echo(f"{path}: {len(data) / 1000:.0f} kB" + (", too large" if len(data) > LARGEST_PICTURE else ""))


if __name__ == "__main__":
    main()
