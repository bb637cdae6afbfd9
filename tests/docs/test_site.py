"""The documentation as a site: it builds, no link leads nowhere, nothing comes from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from website.build import Page, SiteError, build, menu_problems, page_problems
from website.markdown import slug

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
_CHROMIUM = shutil.which("chromium")


def copy(folder: Path) -> Path:
    """All that the site is made of, to be changed and built."""
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copytree(ROOT / "website" / "overrides", folder / "website" / "overrides")
    shutil.copy(ROOT / "zensical.toml", folder)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly; a warning is an error."""
    return build(copy(tmp_path_factory.mktemp("documentation")))


def test_every_page_is_in_it(site: Path) -> None:
    for path in (ROOT / "docs").rglob("*.md"):
        assert (site / path.relative_to(ROOT / "docs").with_suffix(".html")).is_file()
    assert (site / "openapi" / "xki.json").read_text() == (
        ROOT / "docs" / "openapi" / "xki.json"
    ).read_text()


def test_its_links_hold_and_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    assert list(page_problems(site)) == []
    pages = [Page(path) for path in site.rglob("*.html")]
    assert sum(len(page.links) for page in pages) > 500
    assert all(len(page.fetched) > 5 for page in pages)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text()), sheet


@pytest.mark.parametrize(
    "element",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/x.css">',
        '<img src="http://images.example/x.png">',
        '<iframe src="https://video.example/"></iframe>',
    ],
)
def test_what_would_be_fetched_is_found(tmp_path: Path, element: str) -> None:
    (tmp_path / "x.html").write_text(f'<a href="https://example.com/">link</a>{element}')
    assert len(list(page_problems(tmp_path))) == 1


@pytest.mark.parametrize(
    ("link", "reason"),
    [
        ("[x](nowhere.md)", "page does not exist"),
        ("[x](audit.md#nowhere)", "anchor does not exist"),
        ("[x](#nowhere)", "anchor does not exist"),
        ("![x](images/nowhere.png)", "there is no such file"),
        ("[x](openapi/nowhere.json)", "there is no such file"),
        ('<a href="audit.html#nowhere">x</a>', "there is no such heading"),
    ],
)
def test_a_link_that_leads_nowhere_stops_the_build(tmp_path: Path, link: str, reason: str) -> None:
    root = copy(tmp_path)
    with (root / "docs" / "security.md").open("a") as page:
        page.write(f"\n{link}\n")
    with pytest.raises(SiteError, match=reason):
        build(root)


def test_an_image_from_elsewhere_stops_the_build(tmp_path: Path) -> None:
    root = copy(tmp_path)
    with (root / "docs" / "security.md").open("a") as page:
        page.write("\n![x](https://images.example/x.png)\n")
    with pytest.raises(SiteError, match=r"security\.html fetches https://images\.example/x\.png"):
        build(root)


@pytest.mark.parametrize("text", ["Three:\n- a\n- b", "Three:\n1. a", "Three:\n| a |\n| --- |"])
def test_a_list_that_would_be_shown_as_it_was_typed_stops_the_build(
    tmp_path: Path, text: str
) -> None:
    root = copy(tmp_path)
    with (root / "docs" / "security.md").open("a") as page:
        page.write(f"\n{text}\n")
    with pytest.raises(SiteError, match="needs an empty line above it"):
        build(root)


def test_a_page_in_no_menu_stops_the_build(tmp_path: Path) -> None:
    root = copy(tmp_path)
    (root / "docs" / "kmis" / "new.md").write_text("# New\n")
    with pytest.raises(SiteError, match=r"docs/kmis/new\.md is in no menu"):
        build(root)


def test_a_menu_entry_without_its_page_is_named(tmp_path: Path) -> None:
    root = copy(tmp_path)
    (root / "docs" / "runbook.md").unlink()
    assert list(menu_problems(root)) == ["zensical.toml: there is no docs/runbook.md"]


def links(path: Path) -> Iterator[str]:
    """The targets of a page's links and images; what stands in code is none."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "`code`", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not urlsplit(target).scheme:
            yield target


def headings(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_hold_on_a_git_host(path: Path) -> None:
    """Relative links in the repository: the file is there, and so is the heading."""
    for target in links(path):
        parts = urlsplit(target)
        there = (path.parent / parts.path).resolve() if parts.path else path
        assert there.exists(), target
        assert there.is_relative_to(ROOT), target
        if parts.fragment and there.suffix == ".md":
            assert parts.fragment in headings(there), target


# Types into the search as a reader does, then leaves in the page what was to be seen.
_LOOK = """
<script>
addEventListener("load", () => setTimeout(() => {
  const seen = {}
  seen.scheme = document.body.dataset.mdColorScheme
  seen.background = getComputedStyle(document.body).backgroundColor
  seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth
  document.querySelector(".md-search__button").click()
  setTimeout(() => {
    const below = [...document.querySelectorAll("*")].map(e => e.shadowRoot).filter(Boolean)
    const box = below.map(root => root.querySelector("input[role=combobox]")).filter(Boolean)[0]
    box.value = "hedge_after_ms"
    box.dispatchEvent(new Event("input", {bubbles: true}))
    setTimeout(() => {
      seen.found = below.map(root => root.textContent).join(" ")
      console.log("SEEN " + encodeURIComponent(JSON.stringify(seen)))
    }, 3000)
  }, 1000)
}, 1000))
</script>
"""


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("default", ["--window-size=1300,900", "--blink-settings=preferredColorScheme=1"]),
        ("slate", ["--window-size=500,900", "--blink-settings=preferredColorScheme=0"]),
    ],
    ids=["light", "dark, on a phone"],
)
def test_in_a_browser_from_the_file_system(
    site: Path, tmp_path: Path, scheme: str, options: list[str]
) -> None:
    assert _CHROMIUM, "chromium is missing: run tests/system-packages.sh"
    shutil.copytree(site, tmp_path / "site")
    page = tmp_path / "site" / "configuration.html"
    page.write_text(page.read_text() + _LOOK)
    done = subprocess.run(
        [
            _CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=10000", "--dump-dom", *options, page.as_uri(),
        ],
        capture_output=True, text=True, check=True, timeout=90,
    )  # fmt: skip
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert len(console) == 1, console  # ours, and no complaint of the browser's
    found = re.search(r'"SEEN ([^"]+)"', console[0])
    assert found, console
    seen = json.loads(unquote(found[1]))
    assert seen["scheme"] == scheme
    dark = sum(map(int, re.findall(r"\d+", seen["background"])[:3])) < 3 * 128
    assert dark == (scheme == "slate"), seen["background"]
    assert seen["overflow"] == 0
    assert "Configuration" in seen["found"]
    assert "hedge_after_ms" in seen["found"]
