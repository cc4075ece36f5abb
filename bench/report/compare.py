"""Set two reports side by side, to show what changed between two commits, machines or models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from edgemuse.bench.measure.rows import CONTEXT, Row, read_rows
from edgemuse.bench.report.render import Section, to_markdown
from edgemuse.bench.report.report import NOTHING
from edgemuse.bench.report.summary import Spread, Summary, summarise
from edgemuse.engines.errors import InputError

OVERLAP = "overlap"


def compare(first: Path, second: Path) -> str:
    """Compare the systems that both reports hold, as Markdown; raises InputError if they have none in common."""
    rows = read_rows(first), read_rows(second)
    before, after = ({summary.system: summary for summary in summarise(each)} for each in rows)
    both = [name for name in before if name in after]
    if not both:
        raise InputError(f"{first} and {second} have no system in common")
    _same_scans(first, second, rows)
    header = ["system", "seconds A", "seconds B", "B / A", "memory A", "memory B", "Dice A", "Dice B", "flags A", "B"]
    table = [_row(before[name], after[name]) for name in both]
    text = (
        "B / A: ratio of medians; *overlap* where the ranges from the 10th to the 90th percentile do. "
        "The runs were not made in turn, so what else the machines did counts. Dice: against the truth, or without one "
        "against each report's own baseline."
    )
    sections = [Section("Two reports", points=list(_differences(first, second, rows)))]
    sections.append(Section("Systems", text, header=header, rows=table))
    return to_markdown(sections)


def _same_scans(first: Path, second: Path, rows: tuple[Sequence[Row], Sequence[Row]]) -> None:
    scans = [{tuple(row["scan_sha256"]) for row in each if row["kind"] == "run"} for each in rows]
    if scans[0] != scans[1]:
        raise InputError(f"{first} and {second} were made on different scans, so their times cannot be compared")


def _differences(first: Path, second: Path, rows: tuple[Sequence[Row], Sequence[Row]]) -> Iterator[str]:
    yield f"A: {first}"
    yield f"B: {second}"
    for key in CONTEXT:
        one, two = rows[0][0][key], rows[1][0][key]
        if isinstance(one, dict) and isinstance(two, dict):
            for name in dict.fromkeys([*one, *two]):
                if one.get(name) != two.get(name):
                    yield f"{key}, {name}: {one.get(name)} and {two.get(name)}"
        elif one != two:
            yield f"{key}: " + (f"{one} and {two}" if not isinstance(one, list) else "differ")


def _row(before: Summary, after: Summary) -> list[str]:
    return [
        before.system,
        *(f"{summary.seconds.median:.2f}" if summary.seconds else NOTHING for summary in (before, after)),
        _ratio(before.seconds, after.seconds),
        *(f"{summary.peak / 1e9:.2f} GB" if summary.peak else NOTHING for summary in (before, after)),
        *(_dice(summary) for summary in (before, after)),
        *(str(len(summary.flags) + len(summary.errors)) for summary in (before, after)),
    ]


def _ratio(before: Spread | None, after: Spread | None) -> str:
    if before is None or after is None:
        return NOTHING
    overlap = before.p10 <= after.p90 and after.p10 <= before.p90
    return f"{after.median / before.median:.2f}" + (f" ({OVERLAP})" if overlap else "")


def _dice(summary: Summary) -> str:
    scores = summary.truth or summary.baseline
    return f"{scores.dice:.4f}" if scores else NOTHING
