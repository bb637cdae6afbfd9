"""The few pieces of Markdown that the references are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


class Undocumented(Exception):
    """A reference cannot be made: the text says what is missing, and where."""


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, a line a row."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("|" + "".join(map(_cell, line)) + "\n" for line in lines)


def _cell(text: str) -> str:
    return f" {text} |" if text else " |"


def slug(heading: str) -> str:
    """The anchor of a heading, as the site and Git hosts make it."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())
