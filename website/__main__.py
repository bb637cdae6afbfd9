"""Writes the references in docs/ anew: the configuration's tables, the commands, the metrics.

Example: `python -m website`
"""

from __future__ import annotations

from pathlib import Path

from website import commands, configuration, metrics

DOCS = Path(__file__).resolve().parents[1] / "docs"


def references() -> dict[str, str]:
    """The text that each page has when it is current, by its name."""
    written = (DOCS / "configuration.md").read_text(encoding="utf-8")
    return {
        "configuration.md": configuration.with_tables(written),
        "commands.md": commands.page(),
        "metrics.md": metrics.page(),
    }


if __name__ == "__main__":
    for name, text in references().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(f"written: docs/{name}")
