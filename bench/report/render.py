"""Turn sections of text, tables and figures into Markdown or into one HTML page."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-size:13px;display:block;overflow-x:auto}
td,th{border-bottom:1px solid #ddd;padding:.25em .7em;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}code{background:#f4f4f4}
.flag{color:#a40000}"""


@dataclass(frozen=True)
class Section:
    """A part of the report. A `long` table is only in the HTML page, folded; `figures` are SVG by name."""

    title: str
    text: str = ""
    points: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    long: bool = False
    figures: dict[str, bytes | None] = field(default_factory=dict)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table as Markdown; a header such as `a | b` stands for as many columns."""
    columns = " | ".join(header)
    lines = [f"| {columns} |", "|---" * (columns.count("|") + 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def to_markdown(sections: Sequence[Section], level: int = 1, link: str = "figures/") -> str:
    """Write the sections as Markdown, without long tables.

    Args:
        sections: the first one's heading is of `level`, the others' of the next.
        level: 1 for a page of its own.
        link: what the path of a figure begins with.
    """
    parts = []
    for index, section in enumerate(sections):
        if section.long or _empty(section):
            continue
        parts += [
            f"{'#' * (level + (index > 0))} {section.title}",
            section.text,
            "\n".join(f"- {p}" for p in section.points),
        ]
        if section.rows:
            cells = [[cell.replace("|", "¦") for cell in row] for row in section.rows]
            parts.append(table(section.header, cells).rstrip())
        parts += [f"![{name}]({link}{name}.svg)" for name, data in section.figures.items() if data is not None]
    return "\n\n".join(part for part in parts if part) + "\n"


def _empty(section: Section) -> bool:
    return not (section.text or section.points or section.rows or any(section.figures.values()))


def to_html(sections: Sequence[Section]) -> str:
    """Write the sections as one page that needs no other file."""
    title = html.escape(sections[0].title)
    body = "\n".join(_html(section, level) for level, section in enumerate(sections) if not _empty(section))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _html(section: Section, level: int) -> str:
    tag = "h2" if level else "h1"
    title, parts = html.escape(section.title), []
    parts += [f"<p>{_inline(paragraph)}</p>" for paragraph in section.text.split("\n\n") if paragraph]
    if section.points:
        parts.append(f"<ul>{''.join(f'<li class=flag>{html.escape(point)}</li>' for point in section.points)}</ul>")
    if section.rows:
        parts.append(_html_table(section))
    parts += [data.decode() for data in section.figures.values() if data is not None]
    content = "\n".join(parts)
    if section.long:
        return f"<details><summary>{title}</summary>\n{content}</details>"
    return f"<{tag}>{title}</{tag}>\n{content}"


def _inline(text: str) -> str:
    """Escape `text` and translate Markdown's code and emphasis."""
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", escaped)


def _html_table(section: Section) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.header)
    body = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in section.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
