"""Builds the site, and refuses what a reader would stumble over.

The generator (zensical, strict) refuses links to pages and anchors that are not there. It says
nothing of other files that are missing, of a page that no menu lists, of a listed one that is
not there, and of what a browser would fetch from elsewhere: these are looked for here.

Example: `python -m website.build`
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
_RAW = re.compile(r"^\s*([-*] |1\. |\|).*", re.MULTILINE)


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
    _refuse(page_problems(site))
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


def page_problems(site: Path) -> Iterator[str]:
    """What a built page links to in vain, would fetch from elsewhere, or shows as it was typed."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    for path, page in pages.items():
        name = path.relative_to(site)
        for text in page.raw:
            yield f"{name}: a list or a table needs an empty line above it: {text}"
        for address in page.fetched:
            if address.startswith(("http:", "https:", "//")):
                yield f"{name} fetches {address}"
        for address in [*page.fetched, *page.links]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not there.exists():
                yield f"{name} links to {address}: there is no such file"
            elif parts.fragment and there in pages and parts.fragment not in pages[there].ids:
                yield f"{name} links to {address}: there is no such heading"


class Page(HTMLParser):
    """What a browser loads with a page, where its links lead, and what others may link to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.raw: list[str] = []
        self._paragraph: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """`href` is a link to follow in `a`, and something to load in all else."""
        if tag == "p":
            self._paragraph = []
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name == "href" and tag == "a":
                self.links.append(value or "")
            elif name in {"src", "srcset", "data", "href"} and tag != "base":
                self.fetched.append(value or "")

    def handle_data(self, data: str) -> None:
        """The words of a paragraph are kept until its end."""
        self._paragraph.append(data)

    def handle_endtag(self, tag: str) -> None:
        """A line of a paragraph that begins as an item or a row does was meant as one."""
        if tag == "p" and (line := _RAW.search("".join(self._paragraph))):
            self.raw.append(line[0].strip())


if __name__ == "__main__":
    try:
        print(f"built: {build(ROOT)}/index.html")
    except SiteError as error:
        sys.exit(str(error))
