"""The benchmark: four reports of `edgemuse bench`, shortened.

They are on the development model and the built-in one, with the T1 scans of SHARED; on the development model, run by
everything that can run it; and on DLMUSE's network with random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click

from edgemuse.bench.benchmark import Request, benchmark
from edgemuse.bench.measure.models import development_bundle, dlmuse_scan, exported, made, random_dlmuse
from edgemuse.bench.measure.rows import Row, read_rows, state
from edgemuse.bench.measure.run import scans_in
from edgemuse.bench.pages.page import age, command, named, parted, parts_of
from edgemuse.bench.pages.program import Workplace, page_options, say
from edgemuse.bench.report.render import Section, to_markdown
from edgemuse.bench.report.report import METHOD, pictures, sections

PAGE = "benchmark"


@dataclass(frozen=True)
class Material:
    """What a report is about: a bundle (None: the built-in one), scans, and the model folder it was exported from."""

    bundle: Path | None
    data: Path
    reference: Path | None = None


@dataclass(frozen=True)
class Part:
    """A report and what the page says of it; it shows the figures whose names begin with one of `figures`."""

    title: str
    text: str
    model: str
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
    folder = made(work / "model", partial(random_dlmuse, shared))
    return Material(exported(folder, work / "dlmuse.bundle"), dlmuse_scan(shared, work).parent, folder)


PARTS = {
    "development": Part(
        "Against nnU-Net's own predictor",
        "The development model: 33 classes at 2 mm, trained on synthesised scans. Three scans, one with a truth.",
        "development model",
        _development,
        ("nnunet/eager", "edgemuse/openvino"),
        2,
        ("pareto", "stages", "structures", "bland_altman", "worst_vxm"),
        mlperf=True,
    ),
    "peers": Part(
        "Against everything that runs the network",
        "The development model on the scan with a truth.",
        "development model",
        _development,
        ("nnunet", "plain", "edgemuse/openvino", "edgemuse/onnxruntime/fp32/reference"),
        1,
        ("pareto", "stages"),
        quick=True,
    ),
    "built-in": Part(
        "The built-in model",
        "33 classes, on the scan with a truth. The baseline is `reference` in fp32.",
        "built-in model",
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
        "DLMUSE's network, random weights",
        _dlmuse,
        ("nnunet/eager", "edgemuse/openvino"),
        1,
        ("stages",),
    ),
}


def report_on(name: str, material: Material, folder: Path) -> list[Row]:
    """Measure a part, as far as `folder` does not hold it yet; returns the rows of its report."""
    part = PARTS[name]
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
        command=command(f"{PAGE}-{name}"),
    )
    say(f"{part.title}: {benchmark(request, say)}")
    return read_rows(folder)


def age_of(name: str, rows: Sequence[Row]) -> str:
    """Return the line that says how old the figures of a report are."""
    date = max(row["created"] for row in rows if "created" in row)[: len("2026-01-01")]
    model = named(PARTS[name].model, rows[0]["bundle_sha256"])
    return age(date, rows[0]["commit"], [model], f"{PAGE}-{name}")


def part_of(name: str, first: str, report: Sequence[Section], stem: str) -> tuple[str, dict[str, bytes]]:
    """Return the text of a part, which begins with the line `first`, and its figures; the page is called `stem`."""
    part = PARTS[name]
    shown = [section for section in map(partial(_shown, part.figures), report) if section is not None]
    intro = Section(part.title, f"{first}\n\n{part.text}\n\n{shown[0].text}")
    text = to_markdown([intro, *shown[1:]], 2, f"{stem}/{name}_")
    return text.partition("\n")[2], {f"{name}_{key}.svg": data for key, data in pictures(shown).items()}


def document(texts: Mapping[str, str], target: Path) -> str:
    """Return the page at `target` with the parts `texts` by their names; the other parts stay as they are there."""
    parts = parts_of(target.read_text(encoding="utf-8") if target.is_file() else "")
    parts |= {PARTS[name].title: text for name, text in texts.items()}
    known = {part.title: parts[part.title] for part in PARTS.values() if part.title in parts}
    return parted(PAGE, "Benchmark", "", known, to_markdown([Section("How it was measured", METHOD)], 2))


def _shown(figures: tuple[str, ...], section: Section) -> Section | None:
    """Keep only the figures whose names begin so; None if nothing is left to show."""
    if section.text == METHOD:
        return None
    kept = {name: data for name, data in section.figures.items() if name.startswith(figures)}
    return replace(section, figures=kept) if kept or section.rows or not section.figures else None


@click.command()
@page_options(PAGE)
@click.option("--part", "names", multiple=True, type=click.Choice(list(PARTS)), default=list(PARTS), help="Measure "
              "only this; the page keeps what it says of the rest.  [default: all]")  # fmt: skip
def main(shared: Path, output: Path, work: Path, names: tuple[str, ...]) -> None:
    """Measure every part, one after the other, and write it into the page."""
    for name in names:
        place = Workplace(work / name, state())
        material, folder = PARTS[name].prepare(shared, place.folder), place.folder / "report"
        rows = report_on(name, material, folder)
        report = list(sections(folder, rows, scans_in(material.data), ""))
        text, figures = part_of(name, age_of(name, rows), report, output.stem)
        output.with_suffix("").mkdir(exist_ok=True)
        beside = {output.with_suffix("") / figure: data for figure, data in figures.items()}
        place.publish(output, document({name: text}, output), beside)


if __name__ == "__main__":
    main()
