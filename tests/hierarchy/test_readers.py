"""Every format, every kind of damage, with real files made on the spot."""

from __future__ import annotations

import gzip
import json
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from treemem.errors import InputError
from treemem.hierarchy import readers
from treemem.hierarchy.readers import KNOWN_SUFFIXES, ReadReport, Unreadable, clean, read, standard_library
from treemem.types import Document

FRENCH = "Le café était fermé à cause de la grève. Où irons-nous déjeuner ? Près de l'église, peut-être.\n"
JAPANESE = (
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で泣いていた。\n"
)
RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю. Широкая электрификация южных губерний.\n"


def make(folder: Path, **files: str | bytes) -> Path:
    """Write files named by keyword: `a__b_txt` is a/b.txt."""
    for key, content in files.items():
        stem, _, suffix = key.replace("__", "/").rpartition("_")
        put(folder / f"{stem}.{suffix}", content)
    return folder


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def everything(*paths: str | Path) -> tuple[list[Document], ReadReport]:
    report = ReadReport()
    return list(read(list(paths), report)), report


def one(path: Path) -> Document:
    """The only document of a file that reads without complaint."""
    documents, report = everything(path)
    assert report.to_json() == {"documents": 1, "unreadable": [], "unlisted": 0, "skipped": {}, "empty": 0}
    (document,) = documents
    return document


def refused(folder: Path, name: str, content: str | bytes) -> Unreadable:
    """The complaint about a bad file that stands beside a good one, which is read all the same."""
    put(folder / "good.txt", "good")
    put(folder / name, content)
    documents, report = everything(folder)
    assert [document.id for document in documents] == ["good.txt"]
    (failure,) = report.unreadable
    assert failure.path == (folder / name).as_posix()
    return failure


def pdf_bytes(*pages: str, title: str = "", extra: str = "") -> bytes:
    """A minimal PDF whose pages have these content streams."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for n, content in enumerate(pages):
        page = "/Type /Page /Parent 2 0 R /MediaBox [0 0 400 400] /Resources << /Font << /F1 3 0 R >> >>"
        objects.append(f"<< {page} /Contents {5 + 2 * n} 0 R >>")
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    objects.append(f"<< /Title ({title}) >>")
    out, offsets = "%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R {extra} >>"
    xref = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n{trailer}\nstartxref\n{len(out)}\n%%EOF\n"
    return (out + xref).encode("latin-1")


def shown_text(text: str) -> str:
    return f"BT /F1 12 Tf 20 300 Td ({text}) Tj ET"


DRAWING = "20 20 100 100 re f"


# ---------------------------------------------------------------- clean


@given(st.text(st.characters(), max_size=60) | st.text("\ud800\udc00\udfff\r\n\0\ufeffa", max_size=20))
@settings(deadline=None)
def test_clean_is_idempotent_and_always_encodes(text: str) -> None:
    result = clean(text)
    result.encode("utf-8")
    assert clean(result) == result
    assert not {"\0", "\r"} & set(result)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff")))
def test_clean_leaves_good_text_alone(text: str) -> None:
    assert clean(text) == text


def test_clean_by_example() -> None:
    assert clean("\ufeffa\r\nb\rc\0d\ud800e") == "a\nb\nc d\ufffde"
    assert clean("\ud83d\ude00") == "😀"  # two halves of one character


# ---------------------------------------------------------------- formats


def test_plain_text_is_kept_as_it_stands(tmp_path: Path) -> None:
    document = one(put(tmp_path / "Notes.TXT", "\n  a\r\nb \n\n"))
    assert document == Document("Notes.TXT", "\n  a\nb \n\n", "Notes", {"source": f"{tmp_path.as_posix()}/Notes.TXT"})


MARKDOWN = """\
# Head *one*

A wrapped
line with `code` and a [link](http://x).

Setext
------
- a
- b
  1. c

> quote
> more

| a | b |
|---|---|
| 1 | **2** |

<details><summary>Sum</summary>inner<script>bad()</script></details>

```python
def f():

    return 1
```
<!-- hidden -->
"""
MARKDOWN_TEXT = """\
# Head one

A wrapped line with code and a link.

## Setext

- a
- b
  1. c

> quote more

a | b
1 | 2

Sum

inner

    def f():

        return 1"""


def test_markdown(tmp_path: Path) -> None:
    document = one(put(tmp_path / "a.md", MARKDOWN))
    assert document.text == MARKDOWN_TEXT
    assert document.title == "Head one"


def test_markdown_front_matter_gives_the_title_and_a_rule_does_not(tmp_path: Path) -> None:
    settings_block = one(put(tmp_path / "a.md", '---\ntags: [x]\ntitle: "From the front"\n---\n\n# Head\n'))
    assert (settings_block.title, settings_block.text) == ("From the front", "# Head")
    rules = one(put(tmp_path / "b.md", "---\n\nSome words\n\n---\n\nothers\n"))
    assert (rules.title, rules.text) == ("b", "Some words\n\nothers")


RST = """\
=====
Title
=====

Wrapped
:func:`~os.path.join` and :ref:`shown <target>` and ``literal``.

.. versionadded:: 3.5
   New text.

.. code-block:: python
   :emphasize-lines: 3

   x = 1
     y

.. toctree::

   other

.. include:: {secret}

.. raw:: html

   <b>RAW</b>

Section
-------

* a
* b

  - c

term
    meaning

== ==
A  B
== ==
1  2
== ==

+--+ not a table after all
|x

>>> 1 + 1
2
"""
RST_TEXT = """\
# Title

Wrapped os.path.join and shown and literal.

versionadded 3.5 New text.

    x = 1
      y

## Section

- a
- b
  - c

term
  meaning

A | B
1 | 2
"""


def test_rst(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    secret = put(tmp_path / "secret.inc", "SECRET")
    document = one(put(tmp_path / "a.rst", RST.format(secret=secret)))
    assert document.text.startswith(RST_TEXT)
    assert document.title == "Title"
    assert "not a table after all" in document.text  # a slip in the markup loses no text
    assert document.text.endswith(">>> 1 + 1\n    2")
    assert "SECRET" not in document.text
    assert "RAW" not in document.text
    assert capfd.readouterr().err == ""  # no system messages


def test_rst_with_a_very_long_line_is_kept(tmp_path: Path) -> None:
    assert len(one(put(tmp_path / "a.rst", "word " * 5000)).text) == 24_999


def test_rst_leaves_docutils_as_it_was(tmp_path: Path) -> None:
    from docutils.parsers.rst import directives, roles

    before = directives.directive, roles.role
    one(put(tmp_path / "a.rst", ".. unheard-of:: x\n\n:unheard:`y`\n"))
    assert (directives.directive, roles.role) == before


HTML = """\
<!doctype html><html><head><title> The
 Title </title><style>p{}</style></head><body><nav>NAV</nav>
<h1>Head <em>x</em></h1><p>para
 one<br>two &amp; <a href="#">link</a>ed</p><div>div1<div>div2</div>tail</div>
<ul>stray<li>a<li>b<ul><li>c</ul></ul><ol><li><p>x</p></li><li>y</li></ol>
<pre>  code
    more
</pre><blockquote><p>q1</p></blockquote>
<table><tr><th>A<th>B</tr><tr><td>1<td>2<br>3</table>
<table><tr><td><table><tr><td>i1<td>i2</table></td><td>right</td></table>
<script>evil()</script><template><p>T</p></template><custom-x>cust<p>om</p></custom-x></body></html>"""
HTML_TEXT = """\
# Head x

para one
two & linked

div1

div2

tail

stray
- a
- b
  - c

1. x
2. y

      code
        more

> q1

A | B
1 | 2 3

i1 | i2

right

cust

om"""


def test_html(tmp_path: Path) -> None:
    document = one(put(tmp_path / "a.html", HTML))
    assert document.text == HTML_TEXT
    assert document.title == "The Title"


def test_html_title_falls_back_to_the_first_heading_then_the_name(tmp_path: Path) -> None:
    assert one(put(tmp_path / "a.htm", "<p>x<h1>First <b>h</b></h1><h1>Second</h1>")).title == "First h"
    assert one(put(tmp_path / "page.htm", "<p>x")).title == "page"


def test_html_line_breaks_are_white_space_everywhere(tmp_path: Path) -> None:
    page = "<h1>A<br>head</h1><pre>line one<br>line two</pre><table><caption>The<br/>caption</caption><tr><td>x</table>"
    document = one(put(tmp_path / "a.html", page))
    assert document.title == "A head"
    assert document.text == "# A head\n\n    line one\n    line two\n\nThe caption\nx"


@pytest.mark.parametrize("opening", ["<div>", "<ul><li>", "<blockquote>", "<table><tr><td>", "<b>"])
def test_html_nested_without_end(tmp_path: Path, opening: str) -> None:
    assert one(put(tmp_path / "a.html", opening * 5_000 + "deep")).text.endswith("deep")


@pytest.mark.parametrize(
    ("declared", "encoding", "text"),
    [("shift_jis", "cp932", JAPANESE), ("iso-8859-1", "cp1252", FRENCH), ("iso-2022-jp", "iso2022_jp", JAPANESE)],
)
def test_html_declares_its_encoding(tmp_path: Path, declared: str, encoding: str, text: str) -> None:
    page = f'<meta charset="{declared}"><p>{text}'
    document = one(put(tmp_path / "a.html", page.encode(encoding)))
    assert document.text == text.strip()
    assert document.metadata["encoding"] == encoding


@pytest.mark.parametrize("declared", ["iso-8859-1", "utf-16", "base64", "no-such-thing"])
def test_html_that_lies_about_its_encoding(tmp_path: Path, declared: str) -> None:
    page = f'<meta http-equiv="content-type" content="text/html; charset={declared}"><p>{FRENCH}'
    assert one(put(tmp_path / "a.html", page.encode())).text == FRENCH.strip()


def test_pdf(tmp_path: Path) -> None:
    pages = shown_text("First page, with words."), DRAWING, shown_text("Third page.")
    document = one(put(tmp_path / "a.pdf", pdf_bytes(*pages, title="A title")))
    assert document.text == "First page, with words.\n\nThird page."
    assert document.title == "A title"
    assert (document.metadata["pages"], document.metadata["bare_pages"]) == (3, 1)


def test_pdf_with_damaged_pages_keeps_the_others(tmp_path: Path) -> None:
    data = pdf_bytes(shown_text("First."), shown_text("Second."), shown_text("Third."))
    (document,), report = everything(put(tmp_path / "a.pdf", data.replace(b" 6 0 R", b" 99 0 R")))
    assert document.text == "First.\n\nThird."
    assert [failure.reason for failure in report.unreadable] == ["damaged pages left out, the others kept: 2"]
    nothing = pdf_bytes(shown_text("First.")).replace(b"[4 0 R]", b"[99 0 R]")
    assert "none of its pages" in refused(tmp_path / "alone", "b.pdf", nothing).reason


def test_pdf_joins_words_that_were_hyphenated(tmp_path: Path) -> None:
    two_lines = "BT /F1 12 Tf 20 300 Td (a long exam-) Tj 0 -14 Td (ple of it) Tj ET"
    assert one(put(tmp_path / "a.pdf", pdf_bytes(two_lines))).text == "a long example of it"


def test_pdf_of_images_alone(tmp_path: Path) -> None:
    assert "only images" in refused(tmp_path, "a.pdf", pdf_bytes(DRAWING, DRAWING)).reason


def test_pdf_encrypted(tmp_path: Path) -> None:
    key = "A" * 32
    encrypt = f"/Encrypt << /Filter /Standard /V 1 /R 2 /O ({key}) /U ({key}) /P -4 >> /ID [<00> <00>]"
    assert refused(tmp_path, "a.pdf", pdf_bytes(shown_text("x"), extra=encrypt)).reason.startswith("encrypted")


def test_pdf_damaged(tmp_path: Path) -> None:
    assert refused(tmp_path, "a.pdf", b"%PDF-1.4\n nothing more").reason.startswith("not a valid PDF")


MODULE = '''\
"""What the module does.

More of it.
"""
import treemem_must_never_import_this
from typing import overload

class Base: pass

class Thing(Base, metaclass=type):
    """A thing.

        indented
    end
    """
    def __init__(self, size: int = 3) -> None: ...
    def grow(self, *, by: float) -> "Thing":
        """Make it larger."""
    @property
    def size(self) -> int:
        """How large."""
    @size.setter
    def size(self, value): """never shown"""
    @staticmethod
    def make(x): ...
    def _hidden(self): """never shown"""
    class Inner:
        """Inside."""
        @classmethod
        async def run(cls, x, /): ...

try:
    def choose(a, *rest):
        """First of two."""
except ImportError:
    pass

@overload
def twice(a: int) -> int: ...
def twice(a):
    """Both."""
def _private(): """never shown"""
'''
MODULE_TEXT = """\
What the module does.

More of it.

## class Base

## class Thing(Base, metaclass=type)

A thing.

    indented
end

### Thing.__init__(size: int=3) -> None

### Thing.grow(*, by: float) -> 'Thing'

Make it larger.

### Thing.size -> int

How large.

### Thing.make(x)

## class Thing.Inner

Inside.

### async Thing.Inner.run(x, /)

## def choose(a, *rest)

First of two.

## def twice(a)

Both."""


def test_python(tmp_path: Path) -> None:
    document = one(put(tmp_path / "module.py", MODULE))
    assert document.text == MODULE_TEXT
    assert (document.id, document.title) == ("module", "module")


def test_python_ids_are_dotted_as_far_as_packages_go_up(tmp_path: Path) -> None:
    files = ["src/pack/__init__.py", "src/pack/sub/__init__.py", "src/pack/sub/leaf.py", "a/setup.py", "b/setup.py"]
    for name in files:
        put(tmp_path / name, '"""Doc."""')
    expected = {"a/setup", "b/setup", "pack", "pack.sub", "pack.sub.leaf"}
    assert {document.id for document in everything(tmp_path)[0]} == expected
    assert everything(tmp_path / "src/pack/sub")[0][1].id == "pack.sub.leaf"
    assert one(tmp_path / "src/pack/sub/leaf.py").id == "pack.sub.leaf"


def test_python_modules_of_one_dotted_name_are_told_apart(tmp_path: Path) -> None:
    for name in ["a/tests/__init__.py", "b/tests/__init__.py", "b/tests/test_x.py", "c/tests/test_x.py"]:
        put(tmp_path / name, '"""Doc."""')
    put(tmp_path / "c/tests/__init__.py", "")
    documents, report = everything(tmp_path)
    assert report.failures == 0
    assert [(document.id, document.title) for document in documents] == [
        ("tests", "tests"),
        ("b/tests/__init__.py", "tests"),
        ("tests.test_x", "tests.test_x"),
        ("c/tests/test_x.py", "tests.test_x"),
    ]


def test_python_without_docstrings_is_counted_apart(tmp_path: Path) -> None:
    make(tmp_path, a_py="x = 1\ndef f(): pass\n", b_py="", c_py='"""Doc."""')
    documents, report = everything(tmp_path)
    assert [document.id for document in documents] == ["c"]
    assert (report.empty, report.unreadable) == (2, [])
    assert report.summary()[-1] == "2 Python files left out: no docstrings"


@pytest.mark.parametrize(
    ("content", "line"), [("x = 1\ndef f(:\n", 2), ("print 'two'\n", 1), ("x = '\0'", None), ("(" * 100_000, None)]
)
def test_python_that_is_not_valid(tmp_path: Path, content: str, line: int | None) -> None:
    failure = refused(tmp_path, "a.py", content)
    assert failure.reason.startswith(("not valid Python", "nested too deeply"))
    assert line is None or failure.line == line


def test_python_in_a_declared_encoding(tmp_path: Path) -> None:
    source = f'# -*- coding: koi8-r -*-\n"""{RUSSIAN}"""\n'
    document = one(put(tmp_path / "a.py", source.encode("koi8-r")))
    assert document.text == RUSSIAN.strip()
    assert document.metadata["encoding"] == "koi8-r"


def test_standard_library() -> None:
    paths = standard_library()
    assert paths == standard_library() == sorted(set(paths))
    assert all(path.suffix == ".py" for path in paths)
    parts = {part for path in paths for part in path.parts}
    assert not parts & {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "__phello__", "_pyio.py"}
    some = [path for path in paths if path.name in ("heapq.py", "decoder.py", "abc.py")]
    ids = {document.id: document for document in everything(*some)[0]}
    assert {"heapq", "json.decoder", "abc", "importlib.abc"} <= set(ids)
    assert "## def heappush(heap, item)" in ids["heapq"].text


# ---------------------------------------------------------------- JSON Lines


def lines_of(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


RECORDS = [
    {"id": "a", "title": "T", "text": "first", "year": 1999, "metadata": {"url": "u"}, "source": "web"},
    {"_id": 7, "text": "second"},
    {"title": None, "text": "third \ud800 \u0000"},
]


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


PACKED: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_json_lines(tmp_path: Path, suffix: str, packed: str) -> None:
    path = put(tmp_path / f"set{suffix}{packed}", PACKED[packed](lines_of(*RECORDS)))
    documents, report = everything(path)
    assert [document.id for document in documents] == ["a", "7", f"set{suffix}{packed}:3"]
    assert [document.text for document in documents] == ["first", "second", "third \ufffd  "]
    assert [document.title for document in documents] == ["T", "", ""]
    source = path.as_posix()
    assert documents[0].metadata == {"year": 1999, "url": "u", "record_source": "web", "source": source}
    assert documents[1].metadata == {"source": source}
    assert report.failures == 0


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_json_lines_of_several_compressed_parts(tmp_path: Path, packed: str) -> None:
    parts = [PACKED[packed](lines_of({"id": str(n), "text": "x"})) for n in range(3)]
    documents, report = everything(put(tmp_path / f"a.jsonl{packed}", b"".join(parts)))
    assert [document.id for document in documents] == ["0", "1", "2"]
    assert report.failures == 0


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "tail"])
def test_json_lines_damaged_keep_what_came_before(tmp_path: Path, packed: str, damage: str) -> None:
    rng = random.Random(3)
    words = (" ".join(rng.choices("abcdefghij", k=2000)) for _ in range(200))
    records = lines_of(*({"id": str(n), "text": text} for n, text in enumerate(words)))
    data = PACKED[packed](records)
    middle = len(data) // 2
    damaged = {
        "cut": data[:middle],
        "flipped": data[:middle] + bytes(255 - byte for byte in data[middle : middle + 64]) + data[middle + 64 :],
        "tail": data + b"not compressed",
    }[damage]
    documents, report = everything(put(tmp_path / f"a.jsonl{packed}", damaged))
    last = report.unreadable[-1]
    assert "damaged or cut short" in last.reason
    assert last.line is not None
    assert last.line > len(documents) > (199 if damage == "tail" else 20)
    assert [document.id for document in documents] == [str(n) for n in range(len(documents))]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json", "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"id": "x"}', 'no "text"'),
        (b'{"text": 3}', '"text" is not a string'),
        (b'{"text": "x", "title": ["t"]}', '"title" is not a string'),
        (b'{"text": "x", "id": [1]}', '"id" is neither'),
        (b'{"text": "x", "id": true}', '"id" is neither'),
        (b'{"text": " \\n", "id": "x"}', "no text"),
        (b'{"text": "x", "score": NaN}', "NaN"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "not usable JSON"),
        (b'{"text": "x", "deep": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"text": "caf\xe9"}', "not UTF-8 text"),
        (b'{"text": "again", "id": "first"}', "already used by"),
    ],
)
def test_json_lines_report_bad_lines_and_keep_the_others(tmp_path: Path, line: bytes, reason: str) -> None:
    good = lines_of({"id": "first", "text": "é" * 20}), lines_of({"id": "last", "text": "y"})
    path = put(
        tmp_path / "a.jsonl",
        b"\xef\xbb\xbf" + good[0].replace(b"\\u00e9", "é".encode()) + b"\n" + line + b"\n" + good[1],
    )
    documents, report = everything(path)
    assert [document.id for document in documents] == ["first", "last"]
    (failure,) = report.unreadable
    assert failure.line == 3
    assert reason in failure.reason
    assert str(failure).startswith(f"{path.as_posix()}, line 3: ")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "cp1252"])
def test_json_lines_in_another_encoding(tmp_path: Path, encoding: str) -> None:
    text = "".join(json.dumps({"id": n, "text": FRENCH}, ensure_ascii=False) + "\n" for n in range(3))
    documents, report = everything(put(tmp_path / "a.jsonl", text.encode(encoding)))
    assert [document.text for document in documents] == [FRENCH] * 3
    assert documents[0].metadata["encoding"] == encoding
    assert report.failures == 0


def test_json_lines_stream(tmp_path: Path) -> None:
    """The first document is out long before the file has been gone through: the rest may even be damaged."""
    text = "word " * 20_000
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for n in range(200):
            file.write(lines_of({"id": n, "text": text}))
    import tracemalloc

    tracemalloc.start()
    count = sum(1 for _ in read(path, ReadReport()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 200
    assert peak < 60 * len(text)  # 20 million characters went through


def test_an_overlong_line_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treemem.hierarchy.readers.jsonl.MAX_DOCUMENT_BYTES", 1000)
    data = lines_of({"id": "a", "text": "x"}, {"id": "b", "text": "x" * 5000}, {"id": "c", "text": "x"})
    documents, report = everything(put(tmp_path / "a.jsonl", data))
    assert [document.id for document in documents] == ["a", "c"]
    assert report.unreadable[0].line == 2
    assert "larger than" in report.unreadable[0].reason


# ---------------------------------------------------------------- encodings and damage


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        (FRENCH, "latin-1", "cp1252"),
        ("“Smart quotes” — it’s 5 € at the café…\n", "cp1252", "cp1252"),
        ("café crème", "latin-1", "cp1252"),
        (FRENCH, "utf-16", "utf-16"),
        (FRENCH, "utf-16-le", "utf-16-le"),
        (FRENCH, "utf-16-be", "utf-16-be"),
        (FRENCH, "utf-32", "utf-32"),
        (JAPANESE, "utf-16", "utf-16"),
        (JAPANESE, "shift_jis", "cp932"),
        (RUSSIAN, "cp1251", "cp1251"),
        (RUSSIAN, "koi8-r", "koi8_r"),
        ("plain English\n" * 200_000 + FRENCH * 3, "latin-1", "cp1252"),
    ],
)
def test_encodings(tmp_path: Path, text: str, encoding: str, named: str) -> None:
    document = one(put(tmp_path / "a.txt", text.encode(encoding)))
    assert document.text == text
    assert document.metadata["encoding"] == named


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf8_is_not_worth_a_note(tmp_path: Path, encoding: str) -> None:
    document = one(put(tmp_path / "a.txt", FRENCH.encode(encoding)))
    assert (document.text, set(document.metadata)) == (FRENCH, {"source"})


def test_utf8_with_a_damaged_byte_stays_utf8(tmp_path: Path) -> None:
    damaged = (FRENCH * 3).encode() + b"\xff end"
    assert one(put(tmp_path / "a.txt", damaged)).text == FRENCH * 3 + "\ufffd end"


def test_a_few_nuls_become_spaces(tmp_path: Path) -> None:
    assert (
        one(put(tmp_path / "a.txt", b"some text\0with a stray\0NUL or two")).text == "some text with a stray NUL or two"
    )


RNG = random.Random(0)


@pytest.mark.parametrize(
    "content",
    [
        RNG.randbytes(40),
        RNG.randbytes(5000),
        b"\x7fELF" + bytes(500),
        gzip.compress(FRENCH.encode() * 50),
        b"a" + bytes(1000),
        b"\xff\xfe" + b"\x00\xd8" * 200,
    ],
    ids=["random 40", "random", "elf", "gzip", "padding", "broken utf-16"],
)
@pytest.mark.parametrize("name", ["blob.txt", "blob.md", "blob.html", "blob.jsonl"])
def test_binary_is_not_text(tmp_path: Path, name: str, content: bytes) -> None:
    assert refused(tmp_path, name, content).reason == "not text"


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".html", ".pdf", ".jsonl"])
@pytest.mark.parametrize("content", [b"", b" \n\t\r\n"])
def test_no_text(tmp_path: Path, suffix: str, content: bytes) -> None:
    assert refused(tmp_path, "void" + suffix, content).reason == "no text"


@pytest.mark.parametrize(("name", "content"), [("a.gz", b""), ("a.zst", b""), ("a.html", b"<script>x</script>")])
def test_no_text_behind_the_format(tmp_path: Path, name: str, content: bytes) -> None:
    stem, suffix = name.split(".")
    full = f"{stem}.{suffix}" if suffix == "html" else f"{stem}.jsonl.{suffix}"
    packed = content if suffix == "html" else PACKED["." + suffix](content)
    assert refused(tmp_path, full, packed).reason == "no text"


def test_fifty_megabytes(tmp_path: Path) -> None:
    text = "A sentence of some length, with an é in it.\n" * 1_140_000
    document = one(put(tmp_path / "large.txt", text))
    assert len(text.encode()) > 50_000_000
    assert document.text == text


def test_too_large(tmp_path: Path) -> None:
    put(tmp_path / "good.txt", "x")
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(300 * 2**20)  # sparse: takes no room
    assert "larger than 256 MiB" in everything(tmp_path)[1].unreadable[0].reason


def test_a_failing_parser_does_not_end_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AttributeError("surprise\nin two lines")

    monkeypatch.setattr("docutils.core.publish_doctree", fail)
    assert refused(tmp_path, "a.rst", "x").reason == "its parser failed (AttributeError: surprise in two lines)"


# ---------------------------------------------------------------- finding files


def test_folders_are_walked_in_order_and_some_entries_passed_over(tmp_path: Path) -> None:
    names = ["b.txt", "a/z.txt", "a/b/c.md", "a.txt", "Z.txt", "é.txt"]
    hidden = [".hidden.txt", ".git/x.txt", "node_modules/x.txt", "__pycache__/x.txt", "a/.b/x.txt"]
    for name in names + hidden:
        put(tmp_path / name, f"text of {name}")
    documents, report = everything(tmp_path)
    assert [document.id for document in documents] == ["Z.txt", "a/b/c.md", "a/z.txt", "a.txt", "b.txt", "é.txt"]
    assert documents[1].metadata["source"] == f"{tmp_path.as_posix()}/a/b/c.md"
    assert (report.documents, report.failures, report.skipped) == (6, 0, {})
    assert documents == everything(tmp_path)[0]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, docs__a_txt="x")
    monkeypatch.chdir(tmp_path)
    for given_path, source in [("docs", "docs/a.txt"), ("docs/", "docs/a.txt"), ("./docs/a.txt", "docs/a.txt")]:
        ((document,), _) = everything(given_path)
        assert (document.id, document.metadata["source"]) == ("a.txt", source)
    monkeypatch.chdir(tmp_path / "docs")
    assert [document.id for document in everything(".")[0]] == ["a.txt"]
    assert [document.id for document in everything("../docs")[0]] == ["a.txt"]


def test_unknown_formats_are_counted_in_folders_and_reported_when_named(tmp_path: Path) -> None:
    make(tmp_path, a_txt="x", b_png=b"x", c_PNG=b"x", d_css="x")
    put(tmp_path / "Makefile", "all:")
    put(tmp_path / "old.tar.gz", "x")
    _, report = everything(tmp_path)
    assert report.skipped == {".png": 2, ".css": 1, "(none)": 1, ".tar.gz": 1}
    assert report.failures == 0
    assert report.summary()[-1] == "5 skipped, their formats are not known: .png 2, (none) 1, .css 1, .tar.gz 1"
    _, report = everything(tmp_path / "a.txt", tmp_path / "d.css")
    assert report.skipped == {}
    assert "unknown format" in report.unreadable[0].reason
    assert ".jsonl.zst" in report.unreadable[0].reason


def test_globs(tmp_path: Path) -> None:
    make(tmp_path, docs__a_md="x", docs__sub__b_md="y", docs__c_txt="z", docs__node_modules__d_md="n")
    assert [document.id for document in everything(tmp_path / "docs/*.md")[0]] == ["a.md"]
    assert [document.id for document in everything(tmp_path / "docs/**/*.md")[0]] == ["a.md", "sub/b.md"]
    assert [document.id for document in everything(tmp_path / "docs/*")[0]] == ["a.md", "c.txt", "sub/b.md"]
    with pytest.raises(InputError, match=r"\*\.pdf: no file or folder matches"):
        read([tmp_path / "*.pdf"], ReadReport())


def test_a_name_that_looks_like_a_glob(tmp_path: Path) -> None:
    assert one(put(tmp_path / "a[1].txt", "x")).id == "a[1].txt"


def test_named_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    make(tmp_path, x__a__README_md="1", x__b__README_md="2", x__other_md="3")
    paths = [tmp_path / "x/a/README.md", tmp_path / "x/b/README.md", tmp_path / "x/other.md"]
    assert [document.id for document in everything(*paths)[0]] == ["a/README.md", "b/README.md", "other.md"]
    assert [document.id for document in everything(*paths[::-1])[0]] == ["other.md", "b/README.md", "a/README.md"]


def test_files_of_several_folders_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, r__a__README_md="1", r__b__README_md="2", r__b__c__x_txt="3", r__README_md="4")
    a, b, readme = tmp_path / "r/a", tmp_path / "r/b", tmp_path / "r/README.md"
    assert [document.id for document in everything(a, b)[0]] == ["a/README.md", "b/README.md", "b/c/x.txt"]
    assert [document.id for document in everything(b / "c", a)[0]] == ["b/c/x.txt", "a/README.md"]
    assert [document.id for document in everything(a, readme)[0]] == ["a/README.md", "README.md"]
    assert [document.id for document in everything(a / "*.md", b / "*.md")[0]] == ["a/README.md", "b/README.md"]
    assert [document.id for document in everything(b / "*.md", b / "**/*.txt")[0]] == ["README.md", "c/x.txt"]
    monkeypatch.chdir(a)
    assert [document.id for document in everything(".", "../b/c")[0]] == ["a/README.md", "b/c/x.txt"]


def test_an_id_that_is_taken_is_reported(tmp_path: Path) -> None:
    make(tmp_path, a_jsonl='{"id": "x", "text": "1"}', b_jsonl='{"id": "x", "text": "2"}')
    documents, report = everything(tmp_path)
    assert [document.text for document in documents] == ["1"]
    assert report.unreadable[0].path == f"{tmp_path.as_posix()}/b.jsonl"
    assert report.unreadable[0].reason == f'its id "x" is already used by {tmp_path.as_posix()}/a.jsonl'


def test_a_file_that_several_paths_lead_to_is_read_once(tmp_path: Path) -> None:
    make(tmp_path, a_txt="1", sub__b_txt="2")
    documents, report = everything(tmp_path / "sub", tmp_path, tmp_path / "a.txt", tmp_path / "*.txt")
    assert [document.id for document in documents] == ["sub/b.txt", "a.txt"]
    assert report.failures == 0


def test_links(tmp_path: Path) -> None:
    make(tmp_path, root__real__a_txt="1", outside__b_txt="2")
    root = tmp_path / "root"
    (root / "loop").symlink_to(root)
    (root / "real/up").symlink_to("..")
    (root / "alias").symlink_to("real")
    (root / "away").symlink_to(tmp_path / "outside")
    (root / "self.txt").symlink_to("self.txt")
    (root / "nowhere.txt").symlink_to("missing")
    documents, report = everything(root)
    assert [document.id for document in documents] == ["real/a.txt", "away/b.txt"]
    reasons = {Path(failure.path).name: failure.reason for failure in report.unreadable}
    assert "link to nothing" in reasons["nowhere.txt"]
    assert "symbolic links" in reasons["self.txt"]


@pytest.fixture
def special_files() -> Iterator[Path]:
    """A short path, because names of sockets are short."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.mkfifo(root / "pipe.txt")
        os.mkfifo(root / "pipe.jsonl")
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(root / "socket.md"))
        (root / "device.txt").symlink_to("/dev/zero")
        put(root / "good.txt", "x")
        yield root
        server.close()


def test_special_files_are_never_waited_for(special_files: Path) -> None:
    documents, report = everything(special_files)
    assert [document.id for document in documents] == ["good.txt"]
    reasons = {Path(failure.path).name: failure.reason for failure in report.unreadable}
    assert reasons == {
        "pipe.txt": "a named pipe, not a file",
        "pipe.jsonl": "a named pipe, not a file",
        "socket.md": "a socket, not a file",
        "device.txt": "a device, not a file",
    }
    with pytest.raises(InputError, match="a named pipe"):
        list(read(special_files / "pipe.txt", ReadReport()))


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder in which permissions hold, also where the tests run as root."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_no_permission(as_nobody: Path) -> None:
    for name in ["open.txt", "closed.txt", "folder/x.txt"]:
        put(as_nobody / name, "x")
    (as_nobody / "closed.txt").chmod(0)
    (as_nobody / "folder").chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        documents, report = everything(as_nobody)
    finally:
        if root:
            os.seteuid(0)
        (as_nobody / "folder").chmod(0o755)
    assert [document.id for document in documents] == ["open.txt"]
    assert {(Path(f.path).name, f.reason) for f in report.unreadable} == {
        ("closed.txt", "permission denied"),
        ("folder", "permission denied"),
    }


def test_files_that_vanish(tmp_path: Path) -> None:
    make(tmp_path, a_txt="1", b_txt="2", c_jsonl=lines_of({"text": "3"}), d_txt="4")
    report = ReadReport()
    documents = read(tmp_path, report)
    assert next(documents).id == "a.txt"
    (tmp_path / "b.txt").unlink()
    (tmp_path / "c.jsonl").unlink()
    assert [document.id for document in documents] == ["d.txt"]
    assert [failure.reason for failure in report.unreadable] == ["no longer there, or a link to nothing"] * 2


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    try:
        with open(path, "wb") as file:
            file.write(b"x")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    ((document,), _) = everything(tmp_path)
    assert document.id == "caf\ufffd.txt"
    document.metadata["source"].encode()


# ---------------------------------------------------------------- errors and reports


@pytest.mark.parametrize("bad", ["missing.txt", "missing/", "nul\0.txt"])
def test_a_missing_path_is_refused_before_anything_is_read(tmp_path: Path, bad: str) -> None:
    make(tmp_path, a_txt="x")
    report = ReadReport()
    with pytest.raises(InputError, match="no such file or folder"):
        read([tmp_path / "a.txt", f"{tmp_path}/{bad}"], report)
    assert report.documents == 0


@pytest.mark.parametrize(("paths", "message"), [([], "no paths"), ([""], "an empty path"), ("", "an empty path")])
def test_no_path_at_all(paths: list[str] | str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(paths, ReadReport())


def test_nothing_readable(tmp_path: Path) -> None:
    make(tmp_path, a_png=b"x", b_txt="", c_py="x = 1")
    with pytest.raises(InputError, match="nothing readable") as caught:
        everything(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in [".png 1", "b.txt: no text", "no docstrings", *KNOWN_SUFFIXES]:
        assert part in message
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="nothing readable"):
        everything(tmp_path / "empty")


def test_a_single_path_need_not_be_a_list(tmp_path: Path) -> None:
    make(tmp_path, a_txt="x")
    assert len(list(read(tmp_path, ReadReport()))) == len(list(read(str(tmp_path), ReadReport()))) == 1


def test_the_report(tmp_path: Path) -> None:
    bad = b"\n".join([b"{"] * 30) + b"\n" + lines_of({"text": "x"})
    make(tmp_path, a_jsonl=bad, b_png=b"x")
    _, report = everything(tmp_path)
    summary = report.summary(listed=2)
    assert summary[:2] == ["1 document read", "30 could not be read:"]
    assert summary[2].strip().startswith(f"{tmp_path.as_posix()}/a.jsonl, line 1: not JSON")
    assert summary[4] == "  and 28 more"
    assert json.loads(json.dumps(report.to_json()))["unreadable"][29]["line"] == 30


def test_the_report_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treemem.hierarchy.readers.report.MOST_LISTED", 3)
    report = ReadReport()
    for line in range(10):
        report.add(Unreadable("x", "bad", line))
    assert (len(report.unreadable), report.failures) == (3, 10)
    assert report.summary(listed=2)[-1] == "  and 8 more"


def test_importing_stays_quick() -> None:
    """Parsers are loaded when their format is met."""
    import subprocess
    import sys

    heavy = "docutils", "markdown_it", "selectolax", "pypdfium2", "charset_normalizer", "zstandard"
    code = f"import sys, treemem.hierarchy.readers; print([name for name in {heavy} if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_exports() -> None:
    exported = {"KNOWN_SUFFIXES", "ReadReport", "Unreadable", "clean", "read", "standard_library"}
    assert set(readers.__all__) == exported
