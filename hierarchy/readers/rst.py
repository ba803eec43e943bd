"""reStructuredText, parsed by docutils; what only Sphinx knows is read as far as its text goes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

from treemem.hierarchy.readers import layout
from treemem.hierarchy.readers.source import Draft, Source
from treemem.hierarchy.readers.text import clean, decode, with_encoding

_Node = Any
"""A node of docutils' document tree; docutils carries no types."""

_CODE = frozenset({"code", "code-block", "sourcecode", "prompt", "doctest", "testcode", "productionlist"})
_NO_TEXT = frozenset(
    [
        "raw",
        "include",
        "literalinclude",
        "toctree",
        "index",
        "highlight",
        "module",
        "currentmodule",
        "testsetup",
        "testcleanup",
        "testoutput",
        "tabularcolumns",
        "automodule",
        "autoclass",
        "autofunction",
        "autosummary",
        "contents",
        "sectnum",
        "meta",
        "default-role",
    ]
)
_SILENT = frozenset(
    ["comment", "target", "substitution_definition", "pending", "raw", "generated", "label", "meta", "colspec"]
)
_ADMONITIONS = frozenset(["attention", "caution", "danger", "error", "hint", "important", "note", "tip", "warning"])


def parse(data: bytes, source: Source) -> Draft:
    """Headings, lists, code and tables as plain text. No file is inserted, no raw markup is passed on."""
    from docutils.core import publish_doctree

    decoded, encoding = decode(data)
    text = clean(decoded)
    settings = {
        "report_level": 5,
        "halt_level": 5,
        "warning_stream": io.StringIO(),
        "file_insertion_enabled": False,
        "raw_enabled": False,
        "syntax_highlight": "none",
        "smart_quotes": False,
        "_disable_config": True,
        # docutils drops a whole document for one longer line; the same limit stops substitutions from exploding
        "line_length_limit": max(10_000, *map(len, text.split("\n")), 0),
    }
    with _lenient():
        tree = publish_doctree(text, settings_overrides=settings)
    return Draft(layout.blocks(_blocks(tree, 1)), tree.get("title", ""), metadata=with_encoding(encoding))


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """While it lasts, docutils finds something for every directive and role; it knows no other way to be told so."""
    from docutils.parsers.rst import directives, roles

    find_directive, find_role = directives.directive, roles.role

    def directive(name: str, language: Any, document: Any) -> Any:
        if name.lower() in _CODE | _NO_TEXT:
            return _any_directive(), []
        found, messages = find_directive(name, language, document)
        return (found, messages) if found else (_any_directive(), [])

    def role(name: str, language: Any, line: int, reporter: Any) -> Any:
        found, messages = find_role(name, language, line, reporter)
        return (found, messages) if found else (_any_role, [])

    directives.directive, roles.role = directive, role
    try:
        yield
    finally:
        directives.directive, roles.role = find_directive, find_role


def _any_role(name: str, raw: str, text: str, *_: Any, **__: Any) -> tuple[list[_Node], list[_Node]]:
    """A role of Sphinx: ``:func:`~os.path.join``` and ``:ref:`what is shown <target>```."""
    from docutils import nodes

    shown = text.replace("\0", "")
    if shown.endswith(">") and " <" in shown:
        shown = shown.rpartition(" <")[0]
    return [nodes.literal(raw, shown.lstrip("~!"))], []


class _AnyOption(dict[str, Callable[[str], str]]):
    """Accepts every option of a directive as it stands."""

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, name: str) -> Callable[[str], str]:
        return str


def _any_directive() -> type:
    from docutils import nodes
    from docutils.parsers.rst import Directive

    class AnyDirective(Directive):
        """`.. name:: argument` with any options: its argument and its content, code as code, markup as markup."""

        optional_arguments = 1
        final_argument_whitespace = True
        option_spec = _AnyOption()
        has_content = True

        def run(self) -> list[_Node]:
            name = self.name.lower()
            body = "\n".join(self.content)
            if name in _NO_TEXT:
                return []
            if name in _CODE:
                # what follows at once is no language but the code itself, for the directives that name none
                first = [] if name.startswith(("code", "source", "prompt")) else self.arguments
                code = "\n".join([*first, body])
                return [nodes.literal_block(code, code)]
            words = " ".join([name.rpartition(":")[2], *" ".join(self.arguments).split()])
            inside = nodes.container(body)
            self.state.nested_parse(self.content, self.content_offset, inside)
            return [nodes.paragraph(words, words), inside] if self.arguments else [inside]

    return AnyDirective


def _blocks(node: _Node, level: int) -> list[str]:
    return [text for child in node.children for text in _block(child, level)]


def _block(node: _Node, level: int) -> list[str]:
    """The blocks that a node of the document tree becomes; `level` is that of the headings in it."""
    kind = node.tagname
    if kind in _SILENT:
        return []
    if kind in _ADMONITIONS:
        return [layout.hang(f"{kind.capitalize()}: ", layout.blocks(_blocks(node, level)), "")]
    render = _RENDERERS.get(kind)
    if render is not None:
        return [render(node, level)]
    if kind == "section":
        return _blocks(node, level + 1)
    if _is_text(node):
        return [_unwrapped(node)]
    return _blocks(node, level)


def _is_text(node: _Node) -> bool:
    """Whether it holds inline text, as paragraphs do."""
    from docutils import nodes

    return isinstance(node, nodes.TextElement | nodes.Text | nodes.Inline)


def _unwrapped(node: _Node) -> str:
    return " ".join(node.astext().split())


def _title(node: _Node, level: int) -> str:
    return layout.heading(level, _unwrapped(node))


def _subtitle(node: _Node, level: int) -> str:
    return layout.heading(level + 1, _unwrapped(node))


def _code(node: _Node, level: int) -> str:
    return layout.code(node.astext())


def _bullets(node: _Node, level: int) -> str:
    return layout.lines(layout.hang("- ", _tight(item, level)) for item in node.children)


def _numbered(node: _Node, level: int) -> str:
    start = int(node.get("start", 1))
    return layout.lines(layout.hang(f"{n}. ", _tight(item, level)) for n, item in enumerate(node.children, start))


def _tight(node: _Node, level: int) -> str:
    return layout.lines(_blocks(node, level))


def _definition(node: _Node, level: int) -> str:
    """A definition list's item: the term, its definition below it."""
    terms = " : ".join(_unwrapped(child) for child in node.children if child.tagname in ("term", "classifier"))
    bodies = (_tight(child, level) for child in node.children if child.tagname == "definition")
    return layout.lines([terms, *(layout.hang("  ", body) for body in bodies)])


def _field(node: _Node, level: int) -> str:
    name, body = node.children[0], node.children[-1]
    return layout.hang(f"{_unwrapped(name)}: ", _tight(body, level), "  ") or _unwrapped(name)


def _docinfo(node: _Node, level: int) -> str:
    entries = (
        _field(entry, level) if entry.tagname == "field" else f"{entry.tagname.capitalize()}: {_unwrapped(entry)}"
        for entry in node.children
    )
    return layout.lines(entries)


def _option(node: _Node, level: int) -> str:
    names, body = node.children[0], node.children[-1]
    shown = ", ".join(option.astext().replace("\n", " ") for option in names.children)
    return layout.lines([shown, layout.hang("  ", _tight(body, level))])


def _quote(node: _Node, level: int) -> str:
    return layout.hang("> ", layout.blocks(_blocks(node, level)), "> ")


def _verse(node: _Node, level: int) -> str:
    return "\n".join(_unwrapped(line) for line in node.findall() if line.tagname == "line")


def _note(node: _Node, level: int) -> str:
    """A footnote or citation with its label."""
    label = next((child.astext() for child in node.children if child.tagname == "label"), "")
    return layout.hang(f"[{label}] ", layout.blocks(_blocks(node, level)), "")


def _table(node: _Node, level: int) -> str:
    title = [_unwrapped(child) for child in node.children if child.tagname == "title"]
    rows = ([_tight(cell, level) for cell in row.children] for row in node.findall() if row.tagname == "row")
    return layout.lines([*title, layout.table(rows)])


def _image(node: _Node, level: int) -> str:
    return str(node.get("alt", ""))


def _rescued(node: _Node, level: int) -> str:
    """What docutils could not make sense of, such as a table with a slip in it: its source."""
    return layout.blocks(layout.code(child.astext()) for child in node.children if child.tagname == "literal_block")


_RENDERERS: dict[str, Callable[[Any, int], str]] = {
    "title": _title,
    "subtitle": _subtitle,
    "literal_block": _code,
    "doctest_block": _code,
    "math_block": _code,
    "bullet_list": _bullets,
    "enumerated_list": _numbered,
    "definition_list_item": _definition,
    "field": _field,
    "docinfo": _docinfo,
    "option_list_item": _option,
    "block_quote": _quote,
    "line_block": _verse,
    "footnote": _note,
    "citation": _note,
    "table": _table,
    "image": _image,
    "system_message": _rescued,
}
