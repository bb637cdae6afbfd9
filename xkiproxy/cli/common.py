"""What the commands share: the options that all of them take, and how they print and fail."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.text import Text

from xkiproxy.observability.logging import for_journal

ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config", "-c", envvar="XKIPROXY_CONFIG", help="The configuration file.", metavar="FILE"
    ),
]
"""`--config`, on every command; its default is DEFAULT_CONFIG."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

DEFAULT_CONFIG = Path("xkiproxy.toml")


class _Terminal(Console):
    """What is printed for people: names and texts in it are often a stranger's.

    A principal, a label or a server's answer may hold what a terminal obeys: nothing but lines
    leaves here.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Every text that is printed comes by."""
        return super().render_str(_printable(text, but="\n"), **options)


# `acs:ram:` in a name is no picture of a ram: no emoji.
out = _Terminal(highlight=False, soft_wrap=True, emoji=False)
err = _Terminal(stderr=True, highlight=False, soft_wrap=True, emoji=False)


class CommandError(Exception):
    """A command failed: the text goes to standard error and the exit status is 1."""


def print_failure(error: Exception) -> None:
    """Print why a command failed, to standard error."""
    said = for_journal(f"xkiproxy: {error}", logging.ERROR)  # a service that cannot start
    err.print(said, markup=False, style="red")


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their column names, for people; nothing is ever cut off."""
    lines = [[_printable(str(cell)) for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        cells = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        out.print("  ".join(cells).rstrip(), markup=False, style="bold" if number == 0 else None)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print a name and a value a line, aligned."""
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        out.print(f"{name:<{width}}  {_printable(str(value))}", markup=False)


def _printable(text: str, but: str = "") -> str:
    """The text, with a sign of the same width for each character that is none to be seen."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in but else "\N{REPLACEMENT CHARACTER}" for c in text)
