"""HTML, parsed by lexbor (through selectolax) as a browser would."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from treemem.hierarchy.readers import layout
from treemem.hierarchy.readers.source import Draft, Source
from treemem.hierarchy.readers.text import clean, decode, with_encoding

if TYPE_CHECKING:
    from selectolax.lexbor import LexborHTMLParser, LexborNode

_DROPPED = ["script", "style", "nav", "template", "noscript", "svg", "iframe", "object", "canvas", "head"]
_HEADINGS = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6}
_BREAKING = frozenset(
    [
        "address",
        "article",
        "aside",
        "body",
        "caption",
        "center",
        "dd",
        "details",
        "dialog",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "header",
        "hgroup",
        "hr",
        "html",
        "legend",
        "main",
        "optgroup",
        "option",
        "p",
        "search",
        "section",
        "select",
        "summary",
        "textarea",
    ]
)
_WEB_NAMES = {  # what these labels mean on the web (WHATWG Encoding Standard, section 4.2)
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "shift_jis": "cp932",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "euc_kr": "cp949",
}
_DEEPEST = 50
"""Below so many nested elements the text is taken without its structure."""


def parse(data: bytes, source: Source) -> Draft:
    """The text of the page, blocks apart; the title from `<title>` or the first `<h1>`."""
    decoded, encoding = decode(data, _declared(data))
    tree = _parser(clean(decoded))
    title = _first_text(tree, "head > title") or _first_text(tree, "h1")
    return Draft(_body(tree), title, metadata=with_encoding(encoding))


def fragment(markup: str) -> str:
    """The text of a piece of markup."""
    return _body(_parser(markup))


def _parser(markup: str) -> LexborHTMLParser:
    from selectolax.lexbor import LexborHTMLParser

    return LexborHTMLParser(markup)


def _first_text(tree: LexborHTMLParser, selector: str) -> str:
    node = tree.css_first(selector)
    return " ".join(_text(node).split()) if node else ""


def _text(node: LexborNode) -> str:
    """All text below a node as it stands; `<br>` breaks lines."""
    for line_break in node.css("br"):
        line_break.replace_with("\n")
    return node.text()


def _declared(data: bytes) -> str | None:
    """The encoding that a `<meta>` in the first 1,024 bytes names, if Python can read it."""
    tree = _parser(data[:1024].decode("latin-1"))
    label = ""
    for meta in tree.css("meta"):
        content = (meta.attributes.get("content") or "").lower()
        label = label or meta.attributes.get("charset") or content.partition("charset=")[2]
    try:
        name = codecs.lookup(label.strip(" \"';")).name
        "".encode(name)  # fails for codecs that are no text encodings, such as base64
    except (LookupError, ValueError):
        return None
    return _WEB_NAMES.get(name, name)


def _body(tree: LexborHTMLParser) -> str:
    tree.strip_tags(_DROPPED, recursive=True)
    flow = _Flow()
    if tree.root is not None:
        _walk(tree.root, flow, 0)
    return flow.text()


@dataclass
class _Flow:
    """Finished blocks, and the run of inline text that is being gathered."""

    done: list[str] = field(default_factory=list)
    run: list[str] = field(default_factory=list)

    def flush(self) -> None:
        """End the run: white space collapses, only `<br>` breaks lines."""
        rows = (" ".join(row.split()) for row in "".join(self.run).split("\n"))
        self.done.append("\n".join(rows).strip("\n"))
        self.run.clear()

    def block(self, text: str) -> None:
        self.flush()
        self.done.append(text)

    def text(self) -> str:
        self.flush()
        return layout.blocks(self.done)

    def tight(self) -> str:
        self.flush()
        return layout.lines(self.done)


def _walk(node: LexborNode, flow: _Flow, depth: int) -> None:
    for child in node.iter(include_text=True):
        if depth > _DEEPEST:
            flow.run.append(_unbroken(child.text(separator=" ") or ""))
        else:
            _element(child, flow, depth + 1)


def _element(node: LexborNode, flow: _Flow, depth: int) -> None:
    tag = node.tag or ""
    if tag == "-text":
        flow.run.append(_unbroken(node.text_content or ""))
    elif tag == "br":
        flow.run.append("\n")
    elif tag == "img":
        flow.run.append(_unbroken(node.attributes.get("alt") or ""))
    elif tag in _HEADINGS:
        flow.block(layout.heading(_HEADINGS[tag], " ".join(_inside(node, depth).text().split())))
    elif tag in ("ul", "ol", "menu"):
        flow.block(_list(node, depth, numbered=tag == "ol"))
    elif tag == "li":  # outside of any list
        flow.block(layout.hang("- ", _inside(node, depth).tight()))
    elif tag in ("pre", "listing"):
        flow.block(layout.code(_text(node)))
    elif tag == "blockquote":
        flow.block(layout.hang("> ", _inside(node, depth).text(), "> "))
    elif tag == "table":
        _table(node, flow, depth)
    elif tag in _BREAKING:
        flow.flush()
        _walk(node, flow, depth)
        flow.flush()
    elif node.is_element_node:
        _walk(node, flow, depth)


def _unbroken(text: str) -> str:
    return text.replace("\n", " ")


def _inside(node: LexborNode, depth: int) -> _Flow:
    flow = _Flow()
    _walk(node, flow, depth + 1)
    return flow


def _list(node: LexborNode, depth: int, numbered: bool) -> str:
    parts: list[str] = []
    number = 0
    for child in node.iter(include_text=True):
        if child.tag == "li":
            body = _inside(child, depth).tight()
            number += bool(body)
            parts.append(layout.hang(f"{number}. " if numbered else "- ", body))
        else:  # a list nested without an item around it, and other slips
            stray = _Flow()
            _element(child, stray, depth + 1)
            parts.append(stray.tight())
    return layout.lines(parts)


def _table(node: LexborNode, flow: _Flow, depth: int) -> None:
    """Rows of cells; a table that only lays out the page (one that holds another) is read block by block."""
    if len(node.css("table")) > 1:  # the selection holds the node itself
        for cell in node.iter():
            _cells_apart(cell, flow, depth)
        return
    caption = node.css_first("caption")
    rows = ([_inside(cell, depth).tight() for cell in row.iter()] for row in node.css("tr"))
    flow.block(layout.lines(["" if caption is None else " ".join(_text(caption).split()), layout.table(rows)]))


def _cells_apart(node: LexborNode, flow: _Flow, depth: int) -> None:
    if node.tag in ("thead", "tbody", "tfoot", "tr"):
        for child in node.iter():
            _cells_apart(child, flow, depth)
    else:
        flow.block(_inside(node, depth).text())
