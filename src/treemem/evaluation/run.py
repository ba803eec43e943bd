"""One evaluation from a folder to its figures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from treemem import __version__
from treemem.config import FORMAT_VERSION, SearchConfig, TreeConfig, cache_folder
from treemem.errors import InputError
from treemem.evaluation.answers import evaluate_answers
from treemem.evaluation.dataset import EvalQuery, EvalSet, load_set
from treemem.evaluation.report import EvalReport
from treemem.evaluation.retrieval import DEFAULT_MODES, checked_modes, evaluate
from treemem.hierarchy.embed import DEFAULT_ENCODER, load_encoder
from treemem.hierarchy.generate import DEFAULT_LANGUAGE_MODEL, LocalModel, load_language_model
from treemem.hierarchy.memory import Memory
from treemem.storage.store import Store
from treemem.types import Answer, Progress, no_progress


def run(
    folder: str | Path,
    *,
    memory_path: str | Path | None = None,
    split: str | None = None,
    modes: Sequence[str] | None = None,
    max_queries: int | None = None,
    answers: bool = False,
    readers: bool = False,
    reader: str = "auto",
    llm: str = DEFAULT_LANGUAGE_MODEL,
    llm_url: str | None = None,
    within_document: bool = False,
    beam: int = 32,
    decoder: bool = True,
    encoder: str = DEFAULT_ENCODER,
    seed: int = 0,
    progress: Progress = no_progress,
) -> EvalReport:
    """Evaluate retrieval, and if asked for the replies of a language model, on a set in BEIR's layout.

    Args:
        folder: the set; see `load_set`.
        memory_path: a memory of its corpus. If none is named, one is built, and kept for the next time, in the folder
            `eval` of the user's cache (or of $TREEMEM_CACHE).
        split: only queries of this split, or of several: `dev,test`.
        modes: modes of search, and `rrf`.
        max_queries: at most so many queries, drawn at random; for answers, from those that have gold answers.
        answers: ask the questions too.
        readers: with answers: compare what the model says from nothing, from vectors, from text and from both.
        reader: as `Memory.ask` takes it.
        llm: language model for the answers, by name.
        llm_url: an OpenAI-compatible endpoint that serves it.
        within_document: search and ask inside each query's relevant documents.
        beam: how many nodes a walk keeps per level.
        decoder: whether a trained decoder ranks the best candidates anew, where the memory has one.
        encoder: encoder 1 of a memory that is built here.
        seed: of the drawing.
        progress: told how far it has come.

    Raises:
        InputError: the set or a setting cannot be used, or the memory does not hold the set.
        StoreError, ModelError: as `Memory.build`, `Memory.open` and `Memory.ask`.
    """
    # Everything that can be wrong with what was given is found before an hour of encoding.
    modes = checked_modes(DEFAULT_MODES if modes is None else modes)
    eval_set = load_set(folder, split, progress)
    eval_set.sample(max_queries, seed)
    SearchConfig(beam=beam)
    if readers and not answers:
        raise InputError("--readers: it compares answers; add --answers")
    if answers:
        eval_set.with_answers()
        model = load_language_model(llm, url=llm_url, notify=lambda stage: progress(stage, 0, None))
    if readers and not isinstance(model, LocalModel):
        raise InputError("--readers: it compares what a language model on this machine says; name one with --llm")
    if readers and reader == "none":
        raise InputError("--readers: it compares what a reader does with the memory; name one with --reader")
    memory = Memory.open(memory_path, progress=progress) if memory_path else _built(eval_set, encoder, progress)
    chosen = None
    if readers:
        from treemem.hierarchy.reader import choose_reader

        chosen = choose_reader("text" if reader == "auto" else reader, model, memory.recorded_encoder.info)
    report = evaluate(
        memory,
        eval_set,
        modes,
        beam=beam,
        decoder=decoder,
        within_document=within_document,
        max_queries=max_queries,
        seed=seed,
        progress=progress,
    )
    if not answers:
        return report

    def ask(query: EvalQuery) -> Answer:
        known = [document for document in query.relevant if memory.image.number_of(document) is not None]
        return memory.ask(query.text, llm=model, beam=beam, within=known if within_document else None, reader=reader)

    gates = None
    if chosen is not None:
        from treemem.evaluation.readers import evaluate_readers

        gates = evaluate_readers(
            memory, eval_set, chosen[0], beam=beam, max_queries=max_queries, seed=seed, progress=progress
        )
    figures = evaluate_answers(eval_set, ask, max_queries=max_queries, seed=seed, progress=progress)
    return replace(report, answers=figures, gates=gates, settings={**report.settings, "llm": llm, "llm_url": llm_url})


def _built(eval_set: EvalSet, encoder: str, progress: Progress) -> Memory:
    """The memory of a set's corpus, from the cache if an earlier evaluation built it."""
    loaded = load_encoder(encoder)
    path = memory_folder(eval_set, loaded.info.weights)
    if Store.exists(path) and Store.open(path).finished:
        progress(f"using {path}", 0, None)
        return Memory.open(path, encoder=loaded, progress=progress)
    progress(f"building {path}", 0, None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path.parent}: cannot be written to ({error}); set TREEMEM_CACHE to a folder that can, or name a memory"
        ) from error
    return Memory.build(eval_set.read_documents(), path, encoder=loaded, progress=progress)


def memory_folder(eval_set: EvalSet, encoder_weights: str) -> Path:
    """Where the memory of a set is kept: a name of its corpus's content and of all that shapes the memory."""
    with eval_set.corpus.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(f"{encoder_weights} {TreeConfig()} {FORMAT_VERSION} {__version__}".encode())
    name = re.sub(r"[^\w.-]+", "-", eval_set.name) or "set"
    return cache_folder() / "eval" / f"{name}-{digest.hexdigest()[:16]}.memory"
