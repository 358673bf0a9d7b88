"""Builds the pages of docs/ as a site, and checks it: no warnings, no dead links, nothing loaded from elsewhere.

    python tests/docs_site.py

The site is written into site/ beside zensical.toml. Zensical checks the links between pages; this module checks
the links in the HTML that results, those made from docstrings among them, and what a browser would load.
"""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
BUILD_SECONDS = 120.0
COMPLAINT = re.compile(r"\b(?:warning|error|griffe|traceback)\b", re.IGNORECASE)
"""What a line of the generator has if something is wrong; griffe reads the docstrings."""

LOADED = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "object": ("data",),
    "audio": ("src",),
    "video": ("src", "poster"),
}
"""The attributes by which an element loads something."""

LOADING_LINKS = {
    "stylesheet",
    "icon",
    "preload",
    "modulepreload",
    "prefetch",
    "preconnect",
    "dns-prefetch",
    "manifest",
}
IMPORTED = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""")
DRAWN_BY_A_SCRIPT = {"mermaid", "glightbox", "arithmatex"}
"""Classes of elements for which the theme's script loads another script from the network."""


class Page(HTMLParser):
    """What a page has: anchors, links to follow, addresses that the browser loads, and classes of elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element has."""
        found: Mapping[str, str] = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        self.classes |= set(found.get("class", "").split())
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "link" and LOADING_LINKS & set(found.get("rel", "").split()):
            self.loaded.append(found.get("href", ""))
        self.loaded += [found[name] for name in LOADED.get(tag, ()) if name in found]
        self.loaded += IMPORTED.findall(found.get("style", ""))


def build(project: Path) -> list[str]:
    """Build the site of a folder with zensical.toml from scratch; returns the complaints of the generator."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(
        command,
        cwd=project,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    if done.returncode:
        return done.stdout.splitlines()
    return [line for line in done.stdout.splitlines() if COMPLAINT.search(line)]


def problems(site: Path) -> list[str]:
    """What is wrong with the pages of a site: dead links, and what a browser would load from elsewhere."""
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site)
        found += [f"{name}: {address} is loaded from elsewhere" for address in page.loaded if _is_foreign(address)]
        found += [
            f"{name}: an element of class {each} loads a script from elsewhere"
            for each in sorted(page.classes & DRAWN_BY_A_SCRIPT)
        ]
        local = [link for link in page.links if not urlsplit(link).scheme and not urlsplit(link).netloc]
        found += [
            f"{name}: {link} leads nowhere" for link in local if not _leads_somewhere(link, path, site, pages)
        ]
    found += [f"{path.relative_to(site)}: {address} is loaded from elsewhere" for path, address in _imports(site)]
    return found


def _is_foreign(address: str) -> bool:
    return urlsplit(address).netloc != ""


def _imports(site: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(site.rglob("*.css")):
        for address in IMPORTED.findall(path.read_text(encoding="utf-8")):
            yield path, address


def _leads_somewhere(link: str, path: Path, site: Path, pages: Mapping[Path, Page]) -> bool:
    parts = urlsplit(link)
    target = unquote(parts.path)
    start = site if target.startswith("/") else path.parent  # the page for wrong addresses starts at the root
    place = (start / target.lstrip("/")).resolve() if target else path
    if parts.fragment and place in pages:
        return unquote(parts.fragment) in pages[place].anchors
    return place.is_file()


def main() -> int:
    """Build site/ of this repository; 1 if something is wrong."""
    found = build(ROOT) or problems(ROOT / "site")
    for line in found:
        print(line, file=sys.stderr)
    if found:
        return 1
    print(f"built {ROOT / 'site' / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
