"""Extract the paragraphs of a documentation file. Headings start with HEADING, which the splitter looks for."""

from __future__ import annotations

import gettext
import gzip
import io
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator

import html_text
from lxml import etree, html

from qwen_cl.config.errors import UserError

HEADING = "\ue000"  # a private use character, which no text contains
Page = list[str]

# Elements that are not prose: code, tables, forms, and the navigation of Sphinx, DocBook, doxygen and mdbook.
# fmt: off
NOT_PROSE = {
    "head", "script", "style", "pre", "table", "form", "select", "button", "nav", "header", "footer", "aside",
    "svg", "math", "video", "audio", "iframe", "noscript", "sup",
}
NOT_PROSE_CLASSES = {
    "toc", "toctree-wrapper", "contents", "navheader", "navfooter", "related", "sphinxsidebar", "headerlink",
    "indextable", "highlight", "programlisting", "screen", "literallayout", "synopsis", "footnotes", "index",
    "lot", "list-of-figures", "titlepage", "legalnotice", "sidebar", "nav-wrapper", "menu-bar", "toplang",
    "bottomlang", "qv", "manualnavbar", "colophon", "copyright", "example-contents", "Nd-table",
}
# fmt: on
HEADINGS = ("h1", "h2", "h3", "h4")


def pages(source_format: str, files: Iterable[tuple[str, bytes]], language: str) -> Iterator[Page]:
    """Yield the pages of a package's files in order, each a list of paragraphs."""
    if source_format == "story":
        yield from _story(list(files), language)
        return
    read: dict[str, Callable[[bytes], Iterable[Page]]] = {
        "html": lambda content: [_html(content)],
        "page": lambda content: [_mallard(content)],
        "manual": _manual,
        "dictionary": _dictionary,
    }
    for _, content in files:
        yield from read[source_format](content)


def _html(content: bytes) -> Page:
    if not content.strip():
        return []
    return _paragraphs(html.document_fromstring(content, parser=html.HTMLParser(encoding="utf-8")))


def _paragraphs(tree: html.HtmlElement) -> Page:
    unwanted = [
        element
        for element in tree.iter(etree.Element)
        if element.tag in NOT_PROSE or not NOT_PROSE_CLASSES.isdisjoint(element.get("class", "").split())
    ]
    for element in unwanted:
        if element.getparent() is not None:
            element.drop_tree()
    for heading in tree.iter(*HEADINGS):
        heading.text = HEADING + (heading.text or "")
    text = html_text.extract_text(tree, guess_layout=True)
    # List items are separated by one line break, blocks by two.
    return [line for line in text.split("\n") if line.strip()]


def _mallard(content: bytes) -> Page:
    """Parse a GNOME help page (Mallard XML), whose paragraphs are named as in HTML and whose titles are headings."""
    root = etree.fromstring(content, parser=etree.XMLParser(resolve_entities=False, recover=True))
    for element in root.iter(etree.Element):
        element.tag = etree.QName(element).localname
        element.tag = {"title": "h2", "page": "div", "code": "pre", "screen": "pre", "info": "nav"}.get(
            element.tag, element.tag
        )
    etree.strip_elements(root, "nav", "pre", "desc", with_tail=False)
    return _html(etree.tostring(root, encoding="utf-8", method="html"))


def _manual(content: bytes) -> Iterator[Page]:
    """Render a man page with mandoc; no Python library reads its macros."""
    if (mandoc := shutil.which("mandoc")) is None:
        raise UserError("mandoc is not on PATH; man pages are read with it: apt-get install mandoc")
    source = gzip.decompress(content)
    if source.startswith(b".so "):  # an alias of another page
        return
    # mandoc reports minor errors of a page in its exit code and renders the rest.
    rendered = subprocess.run(
        [mandoc, "-K", "utf-8", "-T", "html", "-O", "fragment"], input=source, capture_output=True, check=False
    )
    yield _html(rendered.stdout)


def _dictionary(content: bytes) -> Iterator[Page]:
    """Parse the dictd format, a headword at the start of a line with indented text below; entries share a page."""
    lines = gzip.decompress(content).decode("utf-8", "replace").splitlines()
    page: Page = []
    paragraph: list[str] = []
    for line in [*lines, "end"]:
        if line.startswith(" ") and line.strip() and not re.fullmatch(r"\s*\(\d{4}-\d\d-\d\d\)", line):
            paragraph.append(line.strip())
            continue
        if paragraph:
            page.append(re.sub(r"[{}]|^<[^>]*> ", "", " ".join(paragraph)))
            paragraph = []
        if line.strip() and not line.startswith(" ") and len(page) > 20:
            yield page
            page = []
    yield page


def _story(files: list[tuple[str, bytes]], language: str) -> Iterator[Page]:
    """Read the campaigns of Battle for Wesnoth: the marked strings of a scenario in order, or their translations."""
    catalogs = [gettext.GNUTranslations(io.BytesIO(content)) for name, content in files if name.endswith(".mo")]
    for name, content in files:
        if not name.endswith(".cfg"):
            continue
        page: Page = []
        for message in re.findall(r'_\s*"((?:[^"]|"")*)"', content.decode("utf-8")):
            text = message.replace('""', '"')
            if language != "english":
                text = next((found for catalog in catalogs if (found := catalog.gettext(text)) != text), "")
            page.extend(re.sub(r"<[^>]+>", "", line) for line in text.split("\n") if line.strip())
        yield page
