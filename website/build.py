"""Builds the site, and refuses what a reader would stumble over.

The generator (zensical, strict) refuses links and anchors that lead nowhere. It says nothing of a
page that no menu lists, of a listed one that is not there, and of files that a browser would
fetch from elsewhere: these are looked for here.

Example: `python -m website.build`
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class SiteError(Exception):
    """The site cannot be built: the text has every reason."""


def build(root: Path) -> Path:
    """The folder of the site that is made of `root`; raises SiteError."""
    _refuse(menu_problems(root))
    site = root / "site"
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(  # noqa: S603
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode or "No issues found" not in done.stdout:
        raise SiteError(done.stdout)
    _refuse(foreign(site))
    return site


def _refuse(problems: Iterator[str]) -> None:
    if found := list(problems):
        raise SiteError("\n".join(found))


def menu_problems(root: Path) -> Iterator[str]:
    """Pages that the menu lacks, and entries of the menu that have no page."""
    project = tomllib.loads((root / "zensical.toml").read_text(encoding="utf-8"))["project"]
    listed = set(_listed(project["nav"]))
    docs = root / "docs"
    there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    for page in sorted(there - listed):
        yield f"docs/{page} is in no menu: add it to nav in zensical.toml"
    for page in sorted(listed - there):
        yield f"zensical.toml: there is no docs/{page}"


def _listed(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from _listed(value)


def foreign(site: Path) -> Iterator[str]:
    """What a page would fetch from elsewhere by itself; links to follow are none of it."""
    for path in sorted(site.rglob("*.html")):
        for address in Fetched(path).addresses:
            if address.startswith(("http:", "https:", "//")):
                yield f"{path.relative_to(site)} fetches {address}"


class Fetched(HTMLParser):
    """The addresses of all that a browser loads with a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Every `src`, and the `href` of what is no link to follow."""
        for name, value in attrs:
            if name in {"src", "srcset", "data"} or (name == "href" and tag not in {"a", "base"}):
                self.addresses.append(value or "")


if __name__ == "__main__":
    try:
        print(f"built: {build(ROOT)}/index.html")
    except SiteError as error:
        sys.exit(str(error))
