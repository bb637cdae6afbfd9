"""What the commands share: the options that all of them take, and how they print and fail."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.table import Table

ConfigOption = Annotated[
    Path,
    typer.Option(
        "--config", "-c", envvar="XKIPROXY_CONFIG", help="The configuration file.", metavar="FILE"
    ),
]
"""`--config`, on every command; its default is DEFAULT_CONFIG."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

DEFAULT_CONFIG = Path("xkiproxy.toml")

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class CommandError(Exception):
    """A command failed: the text goes to standard error and the exit status is 1."""


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    sys.stdout.write(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their column names, for people."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    out.print(table)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print a name and a value a line, aligned."""
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        out.print(f"{name:<{width}}  {value}", markup=False)
