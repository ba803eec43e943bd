"""The commands that edit a memory and look into its past."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from treemem.cli import AsJson, At, MemoryPath, Where, app, out, print_json, progress_of, report_unreadable, shown
from treemem.errors import InputError

if TYPE_CHECKING:
    from treemem.hierarchy.edits import EditReport

Ids = Annotated[list[str] | None, typer.Argument(metavar="ID…", help="Ids of documents.")]
Message = Annotated[str | None, typer.Option("-m", "--message", help="What the snapshot is called in the history.")]
Branch = Annotated[str, typer.Option("--branch", help="The branch that is edited.")]


@app.command()
def add(
    memory: MemoryPath,
    paths: Annotated[list[str], typer.Argument(metavar="PATH…", help="Files, folders or globs to read.")],
    branch: Branch = "main",
    message: Message = None,
    as_json: AsJson = False,
) -> None:
    """Add documents: new and changed ones are taken in, those that are there as they are passed over."""
    from treemem import Memory
    from treemem.hierarchy.readers import ReadReport

    report = ReadReport()
    with progress_of(as_json) as progress:
        done = Memory.open(memory, at=branch, progress=progress).add(
            paths, message=message, report=report, progress=progress
        )
    if as_json:
        print_json({"edit": asdict(done), "read": report.to_json()})
        return
    report_unreadable(report)
    _print_edit(done)


@app.command()
def remove(
    memory: MemoryPath,
    ids: Ids = None,
    where: Where = None,
    branch: Branch = "main",
    message: Message = None,
    as_json: AsJson = False,
) -> None:
    """Remove documents; older snapshots keep them (see forget)."""
    _edit("remove", memory, ids, where, branch, message, as_json)


@app.command()
def forget(
    memory: MemoryPath, ids: Ids = None, where: Where = None, message: Message = None, as_json: AsJson = False
) -> None:
    """Remove documents from all branches, and all older snapshots with their bytes."""
    from treemem import Memory

    _require_some(ids, where)
    with progress_of(as_json) as progress:
        done = Memory.open(memory, progress=progress).forget(ids or [], where=where, message=message, progress=progress)
    if as_json:
        print_json(asdict(done))
        return
    out.print(f"Gone for good: {len(done.documents):,} documents, {len(done.snapshots):,} older snapshots, "
              f"{len(done.tags):,} tags, {done.bytes / 1e6:,.1f} MB")  # fmt: skip
    for kind, names in (("document", done.documents), ("tag", done.tags), ("snapshot", done.snapshots)):
        for name in names[:20]:
            out.print(f"  {kind} {shown(name)}", soft_wrap=True)
        if len(names) > 20:
            out.print(f"  and {len(names) - 20:,} more")


@app.command()
def mask(
    memory: MemoryPath,
    ids: Ids = None,
    where: Where = None,
    branch: Branch = "main",
    message: Message = None,
    as_json: AsJson = False,
) -> None:
    """Hide documents from searches and answers; nothing of them is lost."""
    _edit("mask", memory, ids, where, branch, message, as_json)


@app.command()
def unmask(
    memory: MemoryPath,
    ids: Ids = None,
    where: Where = None,
    branch: Branch = "main",
    message: Message = None,
    as_json: AsJson = False,
) -> None:
    """Show hidden documents again."""
    _edit("unmask", memory, ids, where, branch, message, as_json)


@app.command()
def history(memory: MemoryPath, at: At = None, as_json: AsJson = False) -> None:
    """The snapshots of a memory, newest first."""
    from treemem.hierarchy.edits import told
    from treemem.storage.history import history as snapshots
    from treemem.storage.history import resolve
    from treemem.storage.remote import local_side
    from treemem.storage.store import MAIN, Store

    store = Store.open(local_side(memory))
    store.require_finished()
    found = list(snapshots(resolve(store, at or MAIN)))
    if as_json:
        print_json({"snapshots": [own.to_json() for own in found]})
        return
    for own in found:
        moment = f"{own.time.astimezone():%Y-%m-%d %H:%M:%S}"
        names = f" [cyan]{shown(', '.join(own.names))}[/]" if own.names else ""
        counts = told(own.changes)  # which a message of one's own says nothing of
        after = f" [dim]({counts})[/]" if counts and counts != own.message else ""
        out.print(f"{own.id}  {moment} {names} {shown(own.message)}{after}", soft_wrap=True)


@app.command()
def diff(
    memory: MemoryPath,
    before: Annotated[str, typer.Argument(help="A branch, tag, snapshot or time.")],
    after: Annotated[str, typer.Argument(help="Another one.")] = "main",
    as_json: AsJson = False,
) -> None:
    """How the documents of two snapshots differ."""
    from treemem.storage.history import diff as difference
    from treemem.storage.history import resolve
    from treemem.storage.remote import local_side
    from treemem.storage.store import Store

    store = Store.open(local_side(memory))
    store.require_finished()
    found = difference(resolve(store, before), resolve(store, after)).to_json()
    if as_json:
        print_json(found)
        return
    signs = {"added": "[green]+[/]", "removed": "[red]-[/]", "changed": "~", "masked": "(", "unmasked": ")"}
    for name, ids in found.items():
        for document_id in ids:
            out.print(f"{signs[name]} {name:<8} {shown(document_id)}", soft_wrap=True)
    if not any(found.values()):
        out.print("The same documents.")


@app.command()
def rollback(
    memory: MemoryPath,
    to: Annotated[str, typer.Argument(help="A tag, snapshot or time.")],
    branch: Branch = "main",
    as_json: AsJson = False,
) -> None:
    """Put a branch back at an older snapshot."""
    from treemem.hierarchy.memory import rollback_memory
    from treemem.storage.store import MAIN

    with progress_of(as_json) as progress:
        before, snapshot = rollback_memory(memory, to, branch, progress)
    if as_json:
        print_json({"branch": branch, "snapshot": snapshot, "before": before})
        return
    there = "" if branch == MAIN else f" --branch {shown(branch)}"
    out.print(f"{shown(branch)} is at {snapshot} now. It was at {before}; to go back there: "
              f"treemem rollback {escape(str(memory))} {before}{there}", soft_wrap=True)  # fmt: skip


@app.command()
def branch(
    memory: MemoryPath,
    name: Annotated[str | None, typer.Argument(help="A new branch; without it the branches are listed.")] = None,
    at: At = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the branch.")] = False,
    as_json: AsJson = False,
) -> None:
    """List branches, make or remove one."""
    _names(memory, name, at, delete, as_json, "branches")


@app.command()
def tag(
    memory: MemoryPath,
    name: Annotated[str | None, typer.Argument(help="A new tag; without it the tags are listed.")] = None,
    at: At = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the tag.")] = False,
    as_json: AsJson = False,
) -> None:
    """List tags, make or remove one."""
    _names(memory, name, at, delete, as_json, "tags")


def _names(memory: str, name: str | None, at: str | None, delete: bool, as_json: bool, kind: str) -> None:
    from treemem.storage import history as past
    from treemem.storage.remote import local_side
    from treemem.storage.store import MAIN, Store

    store = Store.open(local_side(memory))
    store.require_finished()
    if name is not None and delete:
        past.delete(store, name, "branch" if kind == "branches" else "tag")
    elif name is not None:
        make = past.create_branch if kind == "branches" else past.create_tag
        make(store, name, past.resolve(store, at or MAIN).snapshot)
    elif delete:
        raise InputError("--delete: name what is to be removed")
    found = past.branches(store) if kind == "branches" else past.tags(store)
    if as_json:
        print_json({kind: found})
        return
    table = Table(box=None, show_header=False)
    for own, snapshot in found.items():
        table.add_row(f"[cyan]{shown(own)}[/]", snapshot)
    out.print(table if found else f"No {kind}.")


@app.command()
def verify(
    memory: MemoryPath,
    document: Annotated[str | None, typer.Option(metavar="ID", help="Only this document and the nodes above.")] = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Compare all that is stored with what it is made of; exit code 1 where something is wrong."""
    from treemem.hierarchy.memory import verify_memory

    with progress_of(as_json) as progress:
        found = verify_memory(memory, document, at=at, progress=progress)
    if as_json:
        print_json(found.to_json())
    else:
        checked = ", ".join(f"{count:,} {what}" for what, count in found.checked.items())
        out.print(f"Snapshot {found.snapshot}: {checked or 'nothing'} checked.", soft_wrap=True)
        for fault in found.faults:
            out.print(f"[red]wrong:[/] {shown(fault)}", soft_wrap=True)
        if found.sound:
            out.print("[green]All of it is what it is made of.[/]")
    if not found.sound:
        raise typer.Exit(1)


@app.command()
def compact(memory: MemoryPath, branch: Branch = "main", message: Message = None, as_json: AsJson = False) -> None:
    """Grow the tree anew, after many edits; searches go on meanwhile."""
    from treemem import Memory

    with progress_of(as_json) as progress:
        done = Memory.open(memory, at=branch, progress=progress).compact(message=message, progress=progress)
    if as_json:
        print_json(asdict(done))
        return
    for name, recall in (("before", done.recall_before), ("after", done.recall_after)):
        out.print(f"A walk finds {recall:.3f} of the ten chunks nearest to a chunk {name}.")
    out.print(f"Snapshot {done.snapshot}")


def _require_some(ids: list[str] | None, where: str | None) -> None:
    if not ids and where is None:
        raise InputError("name documents by their ids, or give --where")


def _edit(
    method: str,
    memory: str,
    ids: list[str] | None,
    where: str | None,
    branch: str,
    message: str | None,
    as_json: bool,
) -> None:
    """Call a method of `Memory` that edits some documents, and say what it did."""
    from treemem import Memory

    _require_some(ids, where)
    with progress_of(as_json) as progress:
        opened = Memory.open(memory, at=branch, progress=progress)
        done: EditReport = getattr(opened, method)(ids or [], where=where, message=message, progress=progress)
    if as_json:
        print_json(asdict(done))
    else:
        _print_edit(done)


def _print_edit(done: EditReport) -> None:
    out.print(f"{done.message()}{f', {len(done.unchanged):,} as they were' if done.unchanged else ''}. "
              f"Snapshot {done.snapshot}", soft_wrap=True)  # fmt: skip
