"""The memory as users hold it: build, open, search, ask."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from treemem.config import SearchConfig, TreeConfig
from treemem.errors import DamagedMemory, InputError, ModelError, UnreadableInput
from treemem.hierarchy.ask import AskConfig, ask, config_for
from treemem.hierarchy.build import build, check_encoder, require_free, write_image
from treemem.hierarchy.embed import DEFAULT_ENCODER, Encoder, load_encoder
from treemem.hierarchy.generate import DEFAULT_LANGUAGE_MODEL, LanguageModel, load_language_model
from treemem.hierarchy.readers import ReadReport, read
from treemem.hierarchy.walk import Searcher
from treemem.hierarchy.weights import DEFAULT_HIERARCHY, Hierarchy, load_hierarchy
from treemem.storage.image import Image, image_folder
from treemem.storage.store import Store, StoreInfo
from treemem.types import Answer, Document, Progress, SearchResult, no_progress

ASK_HITS = 10
"""From how many chunks the passages of an answer are made."""


@dataclass(frozen=True)
class MemoryInfo:
    """What `treemem info` tells."""

    path: str
    documents: int
    chunks: int
    levels: tuple[int, ...]
    """Number of elements of each level, top first."""
    encoder: str
    dimension: int
    snapshot: str
    format: int
    config: TreeConfig
    trained: str | None
    """Of the tree's hierarchy: when and on what it was trained; None where it is untrained."""
    store_bytes: int
    image_bytes: int


class Memory:
    """A tree of embeddings over documents, opened at its current snapshot. Close at hand, lazy, safe to share."""

    def __init__(self, store: Store, image: Image, info: StoreInfo, encoder: Callable[[], Encoder]) -> None:
        """Wrap opened parts; `Memory.open` and `Memory.build` make one."""
        self.store = store
        self.image = image
        self._info = info
        self._load_encoder = encoder
        self._encoder: Encoder | None = None
        self._hierarchy: Hierarchy | None = None
        self._searcher: Searcher | None = None
        self._models: dict[tuple[str, str | None], LanguageModel | None] = {}
        # Threads that come first together load a thing once.
        self._lock = threading.RLock()
        self._models_lock = threading.Lock()

    # ---- making and opening

    @classmethod
    def build(
        cls,
        sources: str | Path | Sequence[str | Path] | Document | Iterable[Document],
        path: str | Path,
        *,
        encoder: str | Encoder = DEFAULT_ENCODER,
        hierarchy: str | Path | Hierarchy | None = DEFAULT_HIERARCHY,
        config: TreeConfig | None = None,
        report: ReadReport | None = None,
        strict: bool = False,
        progress: Progress = no_progress,
    ) -> Memory:
        """Build a memory; an interrupted build of the same sources continues after its last commit.

        Args:
            sources: files, folders and globs, or a document or several; none at all make an empty memory.
            path: where the memory is to lie; nothing else may be there.
            encoder: encoder 1, by name or loaded.
            hierarchy: a trained one to grow the tree with, its folder or loaded; `default` for the packaged one, which
                is left out with another encoder than the packaged; None or `none` for an untrained tree.
            config: how the tree is built.
            report: filled with what could not be read.
            strict: stop before the tree is grown if anything could not be read.
            progress: told how far it has come.

        Raises:
            StoreError: something is at `path` already, or the disk is full.
            InputError: a path does not exist, nothing can be read, or two documents have one id.
            UnreadableInput: something could not be read and `strict` was asked for.
            UnknownModel: there is no such encoder.
            ModelError: the hierarchy cannot be used, or was trained on another encoder.
        """
        path = Path(path)
        config = config or TreeConfig()
        weights = load_hierarchy(hierarchy) if isinstance(hierarchy, str | Path) else hierarchy
        report = report if report is not None else ReadReport()
        require_free(path)
        from_files = _are_paths(sources)
        documents, fraction = _documents(sources, report)
        # The first is read before anything is loaded or written: sources that hold nothing fail at once, without trace.
        documents = chain([first for first in [next(documents, None)] if first is not None], documents)
        if strict:
            documents = _strictly(documents, report, path)
        loaded = load_encoder(encoder) if isinstance(encoder, str) else encoder
        if hierarchy == DEFAULT_HIERARCHY and weights is not None and not weights.fits(loaded.info):
            weights = None
        build(
            path, documents, loaded, config, _extrapolated(progress, fraction), distinct=from_files, hierarchy=weights
        )
        return cls.open(path, encoder=loaded)

    @classmethod
    def open(
        cls, path: str | Path, *, encoder: str | Encoder | None = None, progress: Progress = no_progress
    ) -> Memory:
        """Open a memory. The encoder is loaded at the first query; a missing serving image is made again.

        Args:
            path: the memory's folder.
            encoder: encoder 1 where the recorded name does not lead to it; its weights must be the recorded ones.
            progress: told about the making of a serving image.

        Raises:
            NotAMemory, NewerFormat, UnfinishedMemory, DamagedMemory: the memory cannot be used.
            EncoderMismatch: at the first query, where the encoder is another.
        """
        path = Path(path)
        store = Store.open(path)
        store.require_finished()
        info = store.info()

        def loaded() -> Encoder:
            given = encoder if encoder is not None else info.encoder["name"]
            result = load_encoder(given) if isinstance(given, str) else given
            check_encoder(path, info.encoder, result)
            return result

        return cls(store, _image(store, info, progress), info, loaded)

    # ---- using

    @property
    def encoder(self) -> Encoder:
        """Encoder 1, loaded when first needed, with what training has changed of it."""
        with self._lock:
            if self._encoder is None:
                encoder, hierarchy = self.recorded_encoder, self.hierarchy
                self._encoder = encoder if hierarchy is None else hierarchy.tuned(encoder)
            return self._encoder

    @property
    def recorded_encoder(self) -> Encoder:
        """Encoder 1 as the memory records it, without what training has changed; loaded at every call."""
        return self._load_encoder()

    @property
    def hierarchy(self) -> Hierarchy | None:
        """What the tree has learned, None where it is untrained."""
        with self._lock:
            if self._hierarchy is None and self.image.hierarchy is not None:
                try:
                    self._hierarchy = Hierarchy.from_bytes(*self.image.hierarchy)
                except ModelError as error:
                    raise DamagedMemory(f"{self.image.folder}: {error}; delete the folder") from error
            return self._hierarchy

    @property
    def searcher(self) -> Searcher:
        """What answers queries, with the encoder."""
        with self._lock:
            if self._searcher is None:
                config = self._info.config
                self._searcher = Searcher(
                    self.image, self.encoder, config.chunk_tokens, config.language, self.hierarchy
                )
            return self._searcher

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        mode: str = "hybrid",
        beam: int = 32,
        within: Iterable[str] | None = None,
        config: SearchConfig | None = None,
    ) -> SearchResult:
        """Find the chunks that answer a query.

        Args:
            query: any text; a long one is cut like a document; an empty one finds nothing.
            k: how many hits; `SearchConfig.k` says of how many there can be.
            mode: `hybrid`, `deep`, `walk`, `exact`, `bm25` or `exact+bm25`.
            beam: how many nodes the walk keeps per level.
            within: ids of the documents to search in.
            config: all settings at once; `k`, `mode` and `beam` are then not looked at.

        Raises InputError for settings out of range or an id that the memory does not hold.
        """
        config = config or SearchConfig(mode=mode, k=k, beam=beam)  # type: ignore[arg-type]
        return self.search_many([query], config, within=within)[0]

    def search_many(
        self, queries: Sequence[str], config: SearchConfig | None = None, *, within: Iterable[str] | None = None
    ) -> list[SearchResult]:
        """Search for several queries, which are encoded together."""
        config = config or SearchConfig()
        if config.mode == "bm25":  # needs no encoder, so none is loaded
            tokens, language = self._info.config.chunk_tokens, self._info.config.language
            return Searcher(self.image, None, tokens, language).search(queries, config, within)
        return self.searcher.search(queries, config, within)

    def language_model(
        self, name: str = DEFAULT_LANGUAGE_MODEL, *, url: str | None = None, progress: Progress = no_progress
    ) -> LanguageModel | None:
        """Load a language model for `ask`; see `treemem.hierarchy.generate.load_language_model`."""
        return load_language_model(name, url=url, notify=lambda stage: progress(stage, 0, None))

    def ask(
        self,
        question: str,
        *,
        llm: str | LanguageModel | None = DEFAULT_LANGUAGE_MODEL,
        llm_url: str | None = None,
        mode: str = "deep",
        beam: int = 32,
        within: Iterable[str] | None = None,
        max_tokens: int | None = None,
        config: AskConfig | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question from the memory, with citations.

        Args:
            question: any text.
            llm: a language model by name (kept for the next question) or loaded; `none` or None answers with quotes.
            llm_url: an OpenAI-compatible endpoint that serves `llm`.
            mode: how passages are found.
            beam: how many nodes the walk keeps per level.
            within: ids of the documents to look in.
            max_tokens: longest reply.
            config: everything else about asking; what suits the model if none is given.
            on_text: is given the reply piece by piece as the model writes it, before it is checked.

        Raises:
            UnknownModel: there is no such language model.
            ModelError: the model fails.
            InputError: settings out of range or an id that the memory does not hold.
        """
        if isinstance(llm, str):
            with self._models_lock:
                if (llm, llm_url) not in self._models:
                    self._models[llm, llm_url] = self.language_model(llm, url=llm_url)
                llm = self._models[llm, llm_url]
        config = config or config_for(llm)
        if max_tokens is not None:
            config = replace(config, max_tokens=max_tokens)
        search = SearchConfig(mode=mode, k=ASK_HITS, beam=beam)  # type: ignore[arg-type]
        return ask(self, question, llm, search, config, within, on_text)

    def document(self, document_id: str) -> Document:
        """A whole document.

        Raises InputError where the memory does not hold it.
        """
        number = self.image.number_of(document_id)
        if number is None:
            raise InputError(f"document {document_id!r} is not in {self.store.path}")
        return self.image.document(number)

    @property
    def config(self) -> TreeConfig:
        """How the memory was built."""
        return self._info.config

    @property
    def encoder_name(self) -> str:
        """Which encoder it was built with."""
        return str(self._info.encoder["name"])

    def info(self) -> MemoryInfo:
        """Counts, settings and sizes."""
        info = self._info
        return MemoryInfo(
            path=str(self.store.path),
            documents=info.documents,
            chunks=info.chunks,
            levels=info.levels[::-1],
            encoder=info.encoder["name"],
            dimension=info.dimension,
            snapshot=info.snapshot,
            format=info.format,
            config=info.config,
            trained=None if self.hierarchy is None else str(self.hierarchy.card.get("summary", "yes")),
            store_bytes=_bytes(self.store.path / "store"),
            image_bytes=_bytes(self.image.folder),
        )


def _are_paths(sources: Any) -> bool:
    if isinstance(sources, str | Path):
        return True
    return isinstance(sources, Sequence) and bool(sources) and all(isinstance(part, str | Path) for part in sources)


def _documents(sources: Any, report: ReadReport) -> tuple[Iterator[Document], Callable[[], float | None]]:
    """The documents, and what tells how much of them was read so far, None where that is not known."""
    if _are_paths(sources):
        return read([sources] if isinstance(sources, str | Path) else list(sources), report), lambda: report.fraction
    if isinstance(sources, Document):
        sources = [sources]
    if not isinstance(sources, Iterable):
        raise InputError(f"sources of type {type(sources).__name__}: they must be paths or treemem.Document")
    total = len(sources) if isinstance(sources, Sized) else None
    read_so_far = 0

    def counted() -> Iterator[Document]:
        nonlocal read_so_far
        for document in sources:
            read_so_far += 1
            yield document

    return counted(), lambda: read_so_far / total if total else None


def _extrapolated(progress: Progress, fraction: Callable[[], float | None]) -> Progress:
    """`progress` that expects as many chunks of what is not read yet as there were so far."""

    def tell(stage: str, done: float, total: float | None) -> None:
        if stage == "encoding" and total is not None:
            share = fraction()
            total = round(total / share) if share else None
        progress(stage, done, total)

    return tell


def _strictly(documents: Iterable[Document], report: ReadReport, path: Path) -> Iterator[Document]:
    yield from documents
    if report.failures:
        raise UnreadableInput(
            f"{path}: {report.failures} inputs could not be read, first {report.unreadable[0]}; "
            "run again without strict to build from the others, which are kept"
        )


def _image(store: Store, info: StoreInfo, progress: Progress) -> Image:
    """The serving image of the current snapshot, made (again) where it is missing or damaged."""
    folder = image_folder(store, info.snapshot)
    if folder.exists():
        try:
            return Image(folder)
        except DamagedMemory:
            pass  # derived: made again below
    return Image(write_image(store, info.config, progress))


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
