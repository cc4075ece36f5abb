"""The text of a page in `docs/measured`: the line that says how old its figures are, and its parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

MEASURED = Path("docs", "measured")
AGE = re.compile(r"^\*Measured on (\d{4}-\d\d-\d\d) at commit (\S+): (.+)\. Written by `(.+)`\.\*$", re.MULTILINE)
"""The line that says how old figures are; its groups are date, commit, models and command."""


def command(part: str) -> str:
    """Return the command that writes the page, or the part of a page, called `part`."""
    return f"python -m edgemuse.bench.pages.all ../shared --part {part}"


def named(model: str, sha256: str) -> str:
    """Name a model and the beginning of its hash."""
    return f"{model} {sha256[:12]}"


def age(date: str, commit: str, models: Iterable[str], part: str) -> str:
    """Write the line that says how old figures are; the page, or the part of a page, called `part` begins with it."""
    return f"*Measured on {date} at commit {commit}: {'; '.join(models)}. Written by `{command(part)}`.*"


def joined(*texts: str) -> str:
    """Join paragraphs, tables and headings to a page, with an empty line between them."""
    return "\n\n".join(text.strip() for text in texts if text.strip()) + "\n"


def parted(page: str, title: str, introduction: str, parts: Mapping[str, str], closing: str = "") -> str:
    """Write a page whose parts, by their titles, were measured at different times; each begins with its `age`."""
    texts = [f"## {name}\n\n{text.strip()}" for name, text in parts.items()]
    dates = sorted(match.group(1) for match in map(AGE.search, texts) if match)
    first = (
        f"*Measured a part at a time, the oldest on {dates[0]}, the newest on {dates[-1]}: each part says at which "
        f"commit and of which model. Written by `{command(page)}`.*"
    )
    return joined(first, f"# {title}", introduction, *texts, closing)


def parts_of(text: str) -> dict[str, str]:
    """Read the parts of a page that was written before, by their titles."""
    found = (part.partition("\n") for part in text.split("\n## ")[1:])
    return {title: part for title, _, part in found}
