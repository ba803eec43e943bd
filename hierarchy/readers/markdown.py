"""Markdown (CommonMark with tables), parsed by markdown-it-py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treemem.hierarchy.readers import html, layout
from treemem.hierarchy.readers.source import Draft, Source
from treemem.hierarchy.readers.text import clean, decode, with_encoding

if TYPE_CHECKING:
    from markdown_it.tree import SyntaxTreeNode


def parse(data: bytes, source: Source) -> Draft:
    """Headings, lists, code and tables as plain text; the text of raw HTML without its tags."""
    from markdown_it import MarkdownIt
    from markdown_it.tree import SyntaxTreeNode

    decoded, encoding = decode(data)
    title, body = _front_matter(clean(decoded))
    parser = MarkdownIt("commonmark", {"maxNesting": 100}).enable("table")
    root = SyntaxTreeNode(parser.parse(body))
    return Draft(_children(root), title or _first_heading(root), metadata=with_encoding(encoding))


def _front_matter(text: str) -> tuple[str, str]:
    """The title and the rest of a file that begins with a block of settings between `---` lines."""
    if not text.startswith("---\n"):
        return "", text
    settings, closed, body = text[4:].partition("\n---\n")
    if not closed or ":" not in settings.partition("\n")[0]:  # a rule, then text
        return "", text
    titles = [value for key, _, value in (line.partition(":") for line in settings.split("\n")) if key == "title"]
    return (titles[0].strip().strip("\"'") if titles else ""), body


def _first_heading(root: SyntaxTreeNode) -> str:
    headings = [node for node in root.children if node.type == "heading"]
    best = min(headings, key=lambda node: node.tag, default=None)  # min keeps the first of equals
    return _inline(best) if best else ""


def _children(node: SyntaxTreeNode) -> str:
    return layout.blocks(_block(child) for child in node.children)


def _block(node: SyntaxTreeNode) -> str:
    match node.type:
        case "heading":
            return layout.heading(int(node.tag[1:]), _inline(node))
        case "paragraph":
            return _inline(node)
        case "bullet_list":
            return layout.lines(layout.hang("- ", _item(item)) for item in node.children)
        case "ordered_list":
            start = int(node.attrs.get("start", 1))
            return layout.lines(layout.hang(f"{n}. ", _item(item)) for n, item in enumerate(node.children, start))
        case "fence" | "code_block":
            return layout.code(node.content)
        case "blockquote":
            return layout.hang("> ", _children(node), "> ")
        case "table":
            rows = (row for part in node.children for row in part.children)
            return layout.table([_inline(cell) for cell in row.children] for row in rows)
        case "html_block":
            return html.fragment(node.content)
        case _:
            return _children(node)


def _item(node: SyntaxTreeNode) -> str:
    return layout.lines(_block(child) for child in node.children)


def _inline(node: SyntaxTreeNode) -> str:
    match node.type:
        case "softbreak":  # a line of the source that goes on in the next one
            return " "
        case "hardbreak":
            return "\n"
        case "html_inline":
            return "\n" if node.content.lower().startswith("<br") else ""
    return "".join(_inline(child) for child in node.children) if node.children else _content(node)


def _content(node: SyntaxTreeNode) -> str:
    return node.content if node.token is not None else ""
