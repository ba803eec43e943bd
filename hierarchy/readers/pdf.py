"""PDF, read by PDFium (through pypdfium2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from treemem.hierarchy.readers import layout
from treemem.hierarchy.readers.source import Draft, NotReadable, Source
from treemem.hierarchy.readers.text import clean

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument


def parse(data: bytes, source: Source) -> Draft:
    """The text of the pages, a blank line between them; how many pages there are goes to the metadata."""
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        encrypted = "password" in str(error).lower()
        raise NotReadable("encrypted, it needs a password" if encrypted else f"not a valid PDF ({error})") from None
    try:
        pages = [_page(document, number) for number in range(len(document))]
        title = document.get_metadata_dict().get("Title", "")
    finally:
        document.close()
    damaged = [str(number) for number, page in enumerate(pages, 1) if page is None]
    if len(damaged) == len(pages):
        raise NotReadable("damaged, none of its pages can be loaded")
    bare = pages.count("")
    if bare + len(damaged) == len(pages):
        raise NotReadable(f"no text: its {len(pages)} pages hold only images or drawings")
    metadata = {"pages": len(pages)} | ({"bare_pages": bare} if bare else {})
    lost = f"damaged pages left out, the others kept: {', '.join(damaged[:20])}" if damaged else ""
    return Draft(layout.blocks(page or "" for page in pages), title, metadata=metadata, lost=lost)


def _page(document: PdfDocument, number: int) -> str | None:
    """The text of a page; None for one that is damaged."""
    import pypdfium2

    try:
        page = document[number]
    except pypdfium2.PdfiumError:
        return None
    try:
        text_page = page.get_textpage()
        try:
            text = clean(text_page.get_text_bounded())
        finally:
            text_page.close()
    finally:
        page.close()
    # PDFium writes U+FFFE (or STX) where a word was hyphenated at the end of a line.
    for hyphen in ("\ufffe\n", "\ufffe", "\x02\n", "\x02"):
        text = text.replace(hyphen, "")
    return text.strip()
