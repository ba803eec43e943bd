"""The memory as users hold it: build, open, search, ask."""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from jaxtyping import Float16

from treemem.config import SearchConfig, TreeConfig
from treemem.errors import (
    Conflict,
    DamagedMemory,
    InputError,
    ModelError,
    StoreError,
    TreememError,
    UnreadableInput,
)
from treemem.hierarchy.ask import AskConfig, Attribute, ask, config_for
from treemem.hierarchy.build import alone, build, check_encoder, require_free, write_image
from treemem.hierarchy.edits import EditReport, apply, compact, encode, masked_status, numbers_of, recall, sort_out
from treemem.hierarchy.embed import DEFAULT_ENCODER, Encoder, EncoderInfo, load_encoder
from treemem.hierarchy.generate import DEFAULT_LANGUAGE_MODEL, LanguageModel, load_language_model
from treemem.hierarchy.migrations import migrate
from treemem.hierarchy.readers import ReadReport, read
from treemem.hierarchy.verify import Verification, verify, verify_document
from treemem.hierarchy.walk import Searcher
from treemem.hierarchy.weights import DEFAULT_HIERARCHY, Hierarchy, load_hierarchy
from treemem.hierarchy.where import condition
from treemem.storage import history as past
from treemem.storage.files import is_work
from treemem.storage.history import Difference, Snapshot
from treemem.storage.image import Image, image_folder
from treemem.storage.remote import local_side
from treemem.storage.schema import MASKED, PRESENT, READER, REMOVED
from treemem.storage.store import MAIN, Store, StoreInfo, guard
from treemem.types import Answer, Document, Progress, SearchResult, no_progress

TRIES = 4
"""How often an edit is made again because another process has committed to the branch meanwhile."""
COMPACT_FROM = 0.5
"""From which part of chunks that came or went since the tree was grown `info` advises to grow it anew."""
LOCK_SECONDS = 10.0
"""How long an edit waits for another process to end its own."""
IMAGES_KEPT = 4
"""How many serving images of snapshots that nothing is at any more stay, for those who open them soon."""
_FORGETTING = "forgetting"
_EDITED_BEFORE = "chunks_edited_before"
"""A file that is there while what was forgotten is removed from the disk."""
ASK_HITS = 10
"""From how many chunks the passages of an answer are made."""
_Edit = TypeVar("_Edit", bound=Callable[..., Any])


@dataclass(frozen=True)
class MemoryInfo:
    """What `treemem info` tells."""

    path: str
    documents: int
    masked: int
    """Documents that are hidden."""
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
    branch: str | None
    """What edits go to; None where a snapshot of the past is open."""
    reader_vectors: bool
    """Whether what a language model reads of each chunk is kept in the store."""
    edited: float
    """Which part of the chunks came or went since the tree was grown."""
    store_bytes: int
    image_bytes: int

    @property
    def advice(self) -> str | None:
        """What is better done next, None where nothing is."""
        if self.edited <= COMPACT_FROM:
            return None
        return f"{self.edited:.0%} of the chunks came or went since the tree was grown: treemem compact {self.path}"


def _retried(edit: _Edit) -> _Edit:
    """An edit that is made again on what another process has committed meanwhile, where no lock could keep it away."""

    @wraps(edit)
    def again(self: Memory, *arguments: Any, **options: Any) -> Any:
        for _ in range(TRIES - 1):
            try:
                return edit(self, *arguments, **options)
            except Conflict:
                continue
        return edit(self, *arguments, **options)

    return cast(_Edit, again)


@dataclass(frozen=True)
class Forgotten:
    """What does not exist any more."""

    documents: tuple[str, ...]
    snapshots: tuple[str, ...]
    """Older snapshots: all of them, since bytes are shared between them."""
    tags: tuple[str, ...]
    bytes: int
    """How many bytes of the store were collected."""


class Memory:
    """A tree of embeddings over documents, opened at one snapshot. Close at hand, lazy, safe to share.

    Edits make a new snapshot, which the memory is at afterwards; those who search meanwhile search the one before.
    """

    def __init__(self, store: Store, image: Image, info: StoreInfo, encoder: Callable[[], Encoder]) -> None:
        """Wrap opened parts; `Memory.open` and `Memory.build` make one."""
        self.store = store
        self.image = image
        self._info = info
        self._load_encoder = encoder
        self._encoder: Encoder | None = None
        self._hierarchy: Hierarchy | None = None
        self._searcher: Searcher | None = None
        self._masked_for_a_while = 0
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
        store_reader_vectors: bool = False,
        progress: Progress = no_progress,
    ) -> Memory:
        """Build a memory; an interrupted build of the same sources continues after its last commit.

        Args:
            sources: files, folders and globs, or a document or several; none at all make an empty memory.
            path: where the memory is to lie, a folder or `s3://bucket/prefix`; nothing else may be there.
            encoder: encoder 1, by name or loaded.
            hierarchy: a trained one to grow the tree with, its folder or loaded; `default` for the packaged one, which
                is left out with another encoder than the packaged; None or `none` for an untrained tree.
            config: how the tree is built.
            report: filled with what could not be read.
            strict: stop before the tree is grown if anything could not be read.
            store_reader_vectors: keep what a language model reads of each chunk (`ask(reader="vectors")`) in the store,
                so that it need not be computed at every question; it is larger than the text.
            progress: told how far it has come.

        Raises:
            StoreError: something is at `path` already, or the disk is full.
            InputError: a path does not exist, nothing can be read, or two documents have one id.
            UnreadableInput: something could not be read and `strict` was asked for.
            UnknownModel: there is no such encoder.
            ModelError: the hierarchy cannot be used, or was trained on another encoder.
        """
        path = local_side(path)
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
            path,
            documents,
            loaded,
            config,
            _extrapolated(progress, fraction),
            distinct_ids=from_files,
            hierarchy=weights,
            reader_vectors=store_reader_vectors,
        )
        return cls.open(path, encoder=loaded)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        at: str | datetime | None = None,
        encoder: str | Encoder | None = None,
        progress: Progress = no_progress,
    ) -> Memory:
        """Open a memory. The encoder is loaded at the first query; a missing serving image is made again.

        Args:
            path: the memory's folder, or `s3://bucket/prefix`.
            at: a branch, a tag, a snapshot (its id, or the beginning of it) or a time, as ISO 8601 or a datetime; by
                default the branch `main`. Only at a branch it can be edited.
            encoder: encoder 1 where the recorded name does not lead to it; its weights must be the recorded ones.
            progress: told about the making of a serving image.

        Raises:
            NotAMemory, NewerFormat, UnfinishedMemory, DamagedMemory: the memory cannot be used.
            InputError: there is no such branch, tag, snapshot or time.
            EncoderMismatch: at the first query, where the encoder is another.
        """
        path = local_side(path)
        store = Store.open(path)
        store.require_finished()
        migrate(store, progress)
        store = past.resolve(store, MAIN if at is None else at)
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
        where: str | None = None,
        config: SearchConfig | None = None,
    ) -> SearchResult:
        """Find the chunks that answer a query.

        Args:
            query: any text; a long one is cut like a document; an empty one finds nothing.
            k: how many hits; `SearchConfig.k` says of how many there can be.
            mode: `hybrid`, `deep`, `walk`, `exact`, `bm25` or `exact+bm25`.
            beam: how many nodes the walk keeps per level.
            within: ids of the documents to search in.
            where: search in the documents whose metadata meet this: `kind == "mail" and year >= 2020`.
            config: all settings at once; `k`, `mode` and `beam` are then not looked at.

        Raises InputError for settings out of range or an id that the memory does not hold.
        """
        config = config or SearchConfig(mode=mode, k=k, beam=beam)  # type: ignore[arg-type]
        return self.search_many([query], config, within=within, where=where)[0]

    def search_many(
        self,
        queries: Sequence[str],
        config: SearchConfig | None = None,
        *,
        within: Iterable[str] | None = None,
        where: str | None = None,
    ) -> list[SearchResult]:
        """Search for several queries, which are encoded together; see `search`."""
        config = config or SearchConfig()
        here = self._as_it_is(encoder=config.mode != "bm25")
        within = here._restricted(within, where)
        if config.mode == "bm25":  # needs no encoder, so none is loaded
            tokens, language = here._info.config.chunk_tokens, here._info.config.language
            return Searcher(here.image, None, tokens, language).search(queries, config, within)
        return here.searcher.search(queries, config, within)

    def _as_it_is(self, *, encoder: bool) -> Memory:
        """This memory at its snapshot, for what reads it more than once while another thread edits it."""
        with self._lock:
            if encoder:
                _ = self.searcher
            return copy.copy(self)

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
        where: str | None = None,
        max_tokens: int | None = None,
        threshold: float | None = None,
        config: AskConfig | None = None,
        on_text: Callable[[str], None] | None = None,
        reader: str = "auto",
        attribute: Attribute | None = None,
    ) -> Answer:
        """Answer a question from the memory, with citations.

        Args:
            question: any text.
            llm: a language model by name (kept for the next question) or loaded; `none` or None answers with quotes.
            llm_url: an OpenAI-compatible endpoint that serves `llm`.
            mode: how passages are found.
            beam: how many nodes the walk keeps per level.
            within: ids of the documents to look in.
            where: look in the documents whose metadata meet this; see `search`.
            max_tokens: longest reply.
            threshold: least score of the best hit, in the scores of `mode`; None for what is known of the memory.
            config: everything else about asking; what suits the model if none is given.
            on_text: is given the reply piece by piece as the model writes it, before it is checked.
            reader: what the model is given of the memory: `text`, `vectors` or `both`, through the packaged reader; a
                folder, or `vectors@FOLDER`, for another; `none` asks the model as it is; `auto` takes what measured
                best, where a reader fits the model. See `treemem.hierarchy.reader.choose_reader`.
            attribute: also tell where the model looked, in `Answer.attribution`: by `attention`, or by that and by
                `gradients`, which take a pass backward for each token; needs a reader.

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
        reading = None
        if reader != "none":
            from treemem.hierarchy.reader import choose_reader  # torch is slow to import, and quotes need none of it

            reading = choose_reader(reader, llm, EncoderInfo(**self.store.info().encoder))
            tuned = self.hierarchy is not None and self.hierarchy.adapter is not None
            if tuned and reading is not None and reading[1] != "text":
                raise InputError(
                    f"reader = {reader!r}: encoder 1 of {self.store.name} was fine-tuned, and no reader has "
                    "learned what it gives now; ask with --reader text"
                )
        config = config or config_for(llm, reading)
        if max_tokens is not None:
            config = replace(config, max_tokens=max_tokens)
        if threshold is not None:
            config = replace(config, threshold=threshold)
        search = SearchConfig(mode=mode, k=ASK_HITS, beam=beam)  # type: ignore[arg-type]
        here = self._as_it_is(encoder=True)
        within = here._restricted(within, where)
        return ask(here, question, llm, search, config, within, on_text, reading, attribute)

    def stored_reader_vectors(self, chunks: Sequence[int]) -> list[Float16[np.ndarray, "windows d"]] | None:
        """What a language model reads of each of some chunks, None where the memory does not keep it."""
        store = self.store.at(self._info.snapshot, None)  # another thread's edit may give chunks other numbers
        if not store.keeps_reader_vectors:
            return None
        rows = store.rows(READER, np.array(chunks, np.int64)) if len(chunks) else ()
        return [own[own.any(1)] for own in rows]

    def document(self, document_id: str) -> Document:
        """A whole document.

        Raises InputError where the memory does not hold it.
        """
        image = self.image
        number = image.number_of(document_id)
        if number is None:
            raise InputError(f"document {document_id!r} is not in {self.store.name}")
        return image.document(number)

    def ids(self, where: str | None = None) -> list[str]:
        """The ids of the documents, masked ones included, or of those whose metadata meet a condition."""
        holds = condition(where) if where is not None else None
        image = self.image
        records = (image.record(n) for n in np.flatnonzero(image.status != REMOVED).tolist())
        return [record["id"] for record in records if holds is None or holds(record)]

    def _restricted(self, within: Iterable[str] | None, where: str | None) -> Iterable[str] | None:
        if where is None:
            return within
        found = self.ids(where)
        if within is None:
            return found
        chosen = {within} if isinstance(within, str) else set(within)
        return [own for own in found if own in chosen]

    # ---- editing

    @_retried
    def add(
        self,
        sources: str | Path | Sequence[str | Path] | Document | Iterable[Document],
        *,
        message: str | None = None,
        report: ReadReport | None = None,
        progress: Progress = no_progress,
    ) -> EditReport:
        """Add documents: those that are new, and those whose content has changed, in place of what was there.

        A file whose path alone is given otherwise than before counts as unchanged.

        Args:
            sources: files, folders and globs, or a document or several.
            message: of the snapshot; by default what has changed.
            report: filled with what could not be read.
            progress: told what is done.

        Raises:
            StoreError: another process is writing this memory, or the disk is full; nothing has changed then.
            InputError: nothing can be read, or two documents have one id.
        """
        if not isinstance(sources, str | Path | Document | Sequence):
            sources = list(sources)
        documents, _ = _documents(sources, report if report is not None else ReadReport())
        with self._writing():
            plan = sort_out(self.store, self.image, documents, from_files=_are_paths(sources))
            replaced = numbers_of(self.image, [own.id for own in plan.changed])
            fresh = [*plan.new, *plan.changed]
            begin = time.perf_counter()
            kept = self.store.keeps_reader_vectors
            encoded = encode(fresh, self.encoder, self.config, progress, reader_vectors=kept) if fresh else None
            new, encodings, reader = encoded or ([], None, None)
            done = EditReport(
                self.store.snapshot,
                added=tuple(own.id for own in plan.new),
                replaced=tuple(own.id for own in plan.changed),
                unchanged=tuple(plan.unchanged),
                chunks_added=sum(len(own.spans) for own in new),
                chunks_removed=self._chunks_of(replaced),
                seconds={"encode": time.perf_counter() - begin},
            )
            # A document that was masked stays so when its content is replaced.
            hidden = [n for n, own in enumerate(plan.changed, len(plan.new)) if self._is_masked(own.id)]
            return self._edited(
                done, message, added=new, encodings=encodings, reader=reader, removed=replaced, hidden=hidden,
                progress=progress,
            )  # fmt: skip

    @_retried
    def remove(
        self, ids: Iterable[str] = (), *, where: str | None = None, message: str | None = None,
        progress: Progress = no_progress,
    ) -> EditReport:  # fmt: skip
        """Remove documents: their texts, chunks and vectors leave the memory, and all nodes above are computed anew.

        Older snapshots hold them still: see `forget`.

        Args:
            ids: of the documents.
            where: those whose metadata meet this, too; see `search`.
            message: of the snapshot.
            progress: told what is done.

        Raises:
            InputError: the memory does not hold one of them.
            StoreError: another process is writing this memory, or the disk is full; nothing has changed then.
        """
        with self._writing():
            numbers = self._chosen(ids, where)
            removed = tuple(self.image.record(number)["id"] for number in numbers)
            done = EditReport(self.store.snapshot, removed=removed, chunks_removed=self._chunks_of(numbers))
            return self._edited(done, message, removed=numbers, progress=progress)

    @_retried
    def forget(
        self, ids: Iterable[str] = (), *, where: str | None = None, message: str | None = None,
        progress: Progress = no_progress,
    ) -> Forgotten:  # fmt: skip
        """Remove documents for good: from every branch, and every older snapshot goes with its bytes.

        Tags of snapshots that hold them are deleted. Who has an older snapshot open may read it until they close it.
        Documents that were removed before are forgotten, too, and where this was interrupted, it is done to its end.
        Every branch gets a commit, so that what another machine has begun on object storage is made again.

        Args:
            ids: of the documents.
            where: those of all branches and tags whose metadata meet this, too; see `search`.
            message: of the snapshots.
            progress: told what is done.

        Raises:
            InputError: no branch, tag or older snapshot holds one of them.
            StoreError: another process is writing this memory.
        """
        wanted = list(dict.fromkeys([ids] if isinstance(ids, str) else ids))
        if where is not None:
            wanted += [own for own in past.meeting(self.store, condition(where)) if own not in wanted]
        begun = self.store.path / _FORGETTING
        if not wanted and not begun.exists():
            return Forgotten((), (), (), 0)
        with self._writing():
            held = past.holding(self.store, wanted)
            missing = [own for own in wanted if not any(own in there for there in held.values())]
            if missing and not begun.exists():
                older = past.remembered(self.store, missing)
                for own in missing:
                    if own not in older:
                        raise InputError(f"document {own!r} is in no branch or tag of {self.store.name}")
            tags: list[str] = []
            snapshots: list[str] = []
            collected = 0
            while True:
                moment = past.moment_between()
                branches = past.branches(self.store)
                for name in held.keys() - branches.keys():
                    past.delete(self.store, name)
                    tags.append(name)
                for name, snapshot in sorted(branches.items(), key=lambda own: own[0] == self.store.branch):
                    if name not in held:
                        store = self.store if name == self.store.branch else self.store.at(snapshot, name)
                        with store.transaction(message or "forget", {_EDITED_BEFORE: _edited_chunks(store)}):
                            pass
                    elif name == self.store.branch:
                        self._removed_from_here(held[name], message, progress)
                    else:
                        other = Memory.open(self.store.path, at=name, encoder=self._encoder, progress=progress)
                        other._removed_from_here(held[name], message, progress)
                # Bytes may be left where this is interrupted, and no snapshot then that tells of what: a file does.
                with guard(self.store.path):
                    begun.touch()
                gone, freed = past.expire(self.store, moment)
                snapshots += gone
                collected += freed
                held = past.holding(self.store, wanted)
                if not held:
                    break  # else a tag or branch was made meanwhile of what is to be forgotten
            self._drop_images(progress)
            with guard(self.store.path):
                begun.unlink()
        return Forgotten(tuple(wanted), tuple(snapshots), tuple(tags), collected)

    def _removed_from_here(self, ids: Iterable[str], message: str | None, progress: Progress) -> None:
        numbers, before = numbers_of(self.image, sorted(ids)), _edited_chunks(self.store)
        done = EditReport(self.store.snapshot, removed=tuple(sorted(ids)), chunks_removed=self._chunks_of(numbers))
        self._edited(done, message, told={_EDITED_BEFORE: before}, removed=numbers, progress=progress)

    def _drop_images(self, progress: Progress) -> None:
        """Remove all serving images, which share files that hold what was forgotten, and make this one's anew."""
        for folder in (self.store.path / "cache").iterdir():
            shutil.rmtree(folder, ignore_errors=True)
        self._swap(Image(write_image(self.store, self._info.config, progress)))

    def mask(
        self, ids: Iterable[str] = (), *, where: str | None = None, message: str | None = None,
        progress: Progress = no_progress,
    ) -> EditReport:  # fmt: skip
        """Hide documents from searches and answers until `unmask`; the tree stays as it is."""
        return self._hide(ids, where, message, MASKED, progress)

    def unmask(
        self, ids: Iterable[str] = (), *, where: str | None = None, message: str | None = None,
        progress: Progress = no_progress,
    ) -> EditReport:  # fmt: skip
        """Show documents again."""
        return self._hide(ids, where, message, PRESENT, progress)

    @_retried
    def _hide(
        self, ids: Iterable[str], where: str | None, message: str | None, value: int, progress: Progress
    ) -> EditReport:
        with self._writing():
            numbers = [n for n in self._chosen(ids, where) if self.image.status[n] != value]
            named = tuple(self.image.record(number)["id"] for number in numbers)
            before = self.store.snapshot
            done = EditReport(before, masked=named) if value == MASKED else EditReport(before, unmasked=named)
            status = masked_status(self.image, numbers, value)
            return self._edited(done, message, status=status, progress=progress)

    @contextmanager
    def masked(self, ids: Iterable[str] = (), *, where: str | None = None) -> Iterator[Memory]:
        """Hide documents from this memory's searches and answers inside a `with`, where it cannot be edited.

        Nothing is written.
        """
        image = copy.copy(self.image)
        for derived in ("hidden", "visible"):
            image.__dict__.pop(derived, None)
        image.status = masked_status(image, self._chosen(ids, where), MASKED)
        before = self.image
        self._swap(image, kept=True)
        self._masked_for_a_while += 1
        try:
            yield self
        finally:
            self._masked_for_a_while -= 1
            self._swap(before, kept=True)

    @_retried
    def compact(self, *, message: str | None = None, progress: Progress = no_progress) -> EditReport:
        """Grow the tree anew over what is there: what many edits have unbalanced, and the numbers of what was removed.

        Those who search meanwhile go on undisturbed.
        """
        with self._writing():
            return self._compacted(message or "compact", progress)

    def dense(self, progress: Progress = no_progress) -> None:
        """Compact where anything was edited since the tree was grown: training wants numbers without gaps."""
        if self._has_gaps:
            with self._writing():
                if self._has_gaps:  # another process may have done it
                    self._compacted("compact before training", progress)

    @property
    def _has_gaps(self) -> bool:
        return not self.image.fresh or bool((self.image.status == REMOVED).any())

    def _compacted(self, message: str, progress: Progress) -> EditReport:
        before = recall(self.image, self.config.seed)
        self._swap(compact(self.store, message, progress))
        after = recall(self.image, self.config.seed)
        return EditReport(self.store.snapshot, recall_before=before, recall_after=after)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the memory's lock, at the tip of the branch."""
        if self.store.branch is None:
            raise StoreError(
                f"{self.store.name}: opened at a snapshot of the past, which stays as it is; open a branch to edit it"
            )
        if self._masked_for_a_while:  # an edit would write down what is hidden
            raise StoreError(f"{self.store.name}: documents are masked for a while; edit it when they are no longer")
        with alone(self.store.path, wait=LOCK_SECONDS):
            self.refresh()
            yield

    def refresh(self) -> bool:
        """Go to the tip of the branch, where another process has written to it. Returns whether there was anything.

        Not while documents are masked for a while (`masked`): they would be shown.
        """
        if self.store.branch is None or self._masked_for_a_while:
            return False
        store = past.resolve(Store.open(self.store.path), self.store.branch)
        if store.snapshot == self.image.snapshot:
            return False
        self.store = store
        self._swap(_image(store, store.info(), no_progress))
        return True

    def _edited(
        self,
        done: EditReport,
        message: str | None,
        *,
        hidden: Sequence[int] = (),
        told: dict[str, int] | None = None,
        **changes: Any,
    ) -> EditReport:
        """Commit what an edit does, if it does anything; what is `told` is kept with the snapshot too."""
        if not done.counts():
            return done
        text, metadata = message or done.message(), {**done.counts(), **(told or {})}
        given = self.store, self.image, self.config, self.hierarchy
        image, seconds = apply(*given, message=text, metadata=metadata, hidden=hidden, **changes)
        self._swap(image)
        self._sweep()
        return replace(done, snapshot=self.store.snapshot, seconds={**done.seconds, **seconds})

    def _swap(self, image: Image, *, kept: bool = False) -> None:
        """Search another image from now on; searches that have begun go on in the one before."""
        with self._lock:
            before = self.image.hierarchy
            self.image = image
            self._searcher = None
            if not kept:
                if image.hierarchy != before:
                    self._hierarchy = None
                self._info = self.store.info()

    def _sweep(self) -> None:
        """Remove the images of snapshots that no branch or tag is at, but for the last few."""
        kept = {*past.branches(self.store).values(), *past.tags(self.store).values()}
        with suppress(OSError):
            folders = [own for own in (self.store.path / "cache").iterdir() if own.is_dir() and own.name not in kept]
            folders = [own for own in folders if not is_work(own)]
            for folder in sorted(folders, key=lambda own: own.stat().st_mtime)[:-IMAGES_KEPT]:
                shutil.rmtree(folder, ignore_errors=True)

    def _chosen(self, ids: Iterable[str], where: str | None) -> list[int]:
        numbers = numbers_of(self.image, ids)
        if where is not None:
            known = set(numbers)
            numbers += [n for n in numbers_of(self.image, self.ids(where)) if n not in known]
        return numbers

    def _chunks_of(self, numbers: Iterable[int]) -> int:
        return sum(len(self.image.chunks_of(number)) for number in numbers)

    def _is_masked(self, document_id: str) -> bool:
        number = self.image.number_of(document_id)
        return number is not None and bool(self.image.status[number] == MASKED)

    # ---- the past

    def history(self) -> list[Snapshot]:
        """The snapshots that lead to this one, newest first."""
        return list(past.history(self.store))

    def diff(self, before: str | datetime, after: str | datetime | None = None) -> Difference:
        """How the documents of two snapshots differ; `after` is by default what is open.

        Both are a branch, a tag, a snapshot or a time. Raises InputError where there is no such thing.
        """
        later = self.store if after is None else past.resolve(self.store, after)
        return past.diff(past.resolve(self.store, before), later)

    def rollback(self, to: str | datetime, progress: Progress = no_progress) -> str:
        """Put the branch back at a tag, snapshot or time. Returns the snapshot that it was at, which leads back."""
        with self._writing():
            branch, before = self.store.branch, self.store.snapshot
            assert branch is not None
            target = past.resolve(self.store, to).snapshot
            past.reset(self.store, branch, target)
            self.store = self.store.at(target, branch)
            self._swap(_image(self.store, self.store.info(), progress))
        return before

    def branches(self) -> dict[str, str]:
        """Branches with the snapshots that they are at."""
        return past.branches(self.store)

    def tags(self) -> dict[str, str]:
        """Tags with their snapshots."""
        return past.tags(self.store)

    def branch(self, name: str) -> None:
        """Make a branch that begins at this snapshot; `Memory.open(path, at=name)` opens it."""
        past.create_branch(self.store, name, self.store.snapshot)

    def tag(self, name: str) -> None:
        """Name this snapshot for good."""
        past.create_tag(self.store, name, self.store.snapshot)

    def delete(self, name: str) -> None:
        """Remove a branch or a tag."""
        past.delete(self.store, name)

    def verify(self, document: str | None = None, progress: Progress = no_progress) -> Verification:
        """Compare all that is stored with what it is made of, or one document and the nodes above it.

        Where nothing but the serving image is damaged, that is told and it is made anew from the store.
        """
        if document is not None:
            return verify_document(self.store, self.image, document)
        found = verify(self.store, self.image, progress)
        if found.damaged_files and len(found.faults) == 1:
            with suppress(TreememError):  # where nothing can be written it stays as it is
                with guard(self.store.path):
                    shutil.rmtree(self.image.folder)
                self._swap(Image(write_image(self.store, self._info.config, progress)))
                files = ", ".join(found.damaged_files)
                found.faults = [f"{self.store.name}: the serving image was damaged ({files}); it was made anew"]
        return found

    # ---- about it

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
            path=self.store.name,
            documents=info.documents,
            masked=info.masked,
            chunks=info.chunks,
            levels=self.image.sizes,
            encoder=info.encoder["name"],
            dimension=info.dimension,
            snapshot=info.snapshot,
            format=info.format,
            config=info.config,
            trained=None if self.hierarchy is None else str(self.hierarchy.card.get("summary", "yes")),
            branch=self.store.branch,
            reader_vectors=self.store.keeps_reader_vectors,
            edited=self._edited_share(),
            store_bytes=self.store.stored_bytes(),
            image_bytes=_bytes(self.image.folder),
        )

    def _edited_share(self) -> float:
        return _edited_chunks(self.store) / max(1, self.image.chunks)


def _edited_chunks(store: Store) -> int:
    """How many chunks were added or removed since the tree was grown."""
    changed = 0
    for snapshot in past.history(store):
        if "documents" in snapshot.changes or "compacted" in snapshot.changes:
            break
        changed += snapshot.changes.get("chunks_added", 0) + snapshot.changes.get("chunks_removed", 0)
        if _EDITED_BEFORE in snapshot.changes:  # what the history told that `forget` has cut off
            changed += snapshot.changes[_EDITED_BEFORE]
            break
    return changed


def verify_memory(
    path: str | Path,
    document: str | None = None,
    *,
    at: str | datetime | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Verify a memory that may be too damaged to be opened; then its store alone is looked at. See `Memory.verify`."""
    try:
        memory = Memory.open(path, at=at, progress=progress)
    except DamagedMemory:
        return verify(past.resolve(Store.open(local_side(path)), MAIN if at is None else at), None, progress)
    return memory.verify(document, progress)


def rollback_memory(
    path: str | Path, to: str | datetime, branch: str = MAIN, progress: Progress = no_progress
) -> tuple[str, str]:
    """Put a branch back, though its tip may be too damaged to be opened. See `Memory.rollback`.

    Returns the snapshot that it was at, and the one that it is at now.
    """
    try:
        memory = Memory.open(path, at=branch, progress=progress)
    except DamagedMemory:
        found = Memory.open(path, at=to, progress=progress).store.snapshot  # which must be a sound one
        store = Store.open(local_side(path))
        with alone(store.path, wait=LOCK_SECONDS):
            before = past.branches(store)[branch]
            past.reset(store, branch, found)
        return before, found
    before = memory.rollback(to, progress)
    return before, memory.store.snapshot


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
