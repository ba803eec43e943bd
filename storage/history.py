"""The snapshots of a memory: what was committed when, branches and tags, going back, and forgetting for good."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import icechunk

from treemem.errors import DamagedMemory, InputError
from treemem.storage.schema import MASKED, REMOVED
from treemem.storage.store import BUILD, MAIN, Store, guard

_NAME = re.compile(r"[A-Za-z0-9_+=@,-][A-Za-z0-9._+=@,-]{0,99}")
"""Names become the names of files and keys, of which stores write other characters in ways that they do not read."""
_SNAPSHOT = re.compile(r"[0-9A-HJKMNP-TV-Z]{4,20}")
"""Icechunk's ids: Crockford's base 32; some first characters are enough where they name one."""


@dataclass(frozen=True)
class Snapshot:
    """One committed state of a memory."""

    id: str
    time: datetime
    message: str
    changes: dict[str, Any] = field(default_factory=dict)
    """How many documents were added, removed and so on."""
    names: tuple[str, ...] = ()
    """The branches whose tip it is, and its tags."""

    def to_json(self) -> dict[str, Any]:
        """The documented JSON of `treemem history --json`."""
        return {
            "id": self.id,
            "time": self.time.isoformat(timespec="milliseconds"),
            "message": self.message,
            "changes": self.changes,
            "names": list(self.names),
        }


@dataclass(frozen=True)
class Difference:
    """How the documents of two snapshots differ, by id."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    masked: tuple[str, ...]
    unmasked: tuple[str, ...]

    def to_json(self) -> dict[str, list[str]]:
        """The documented JSON of `treemem diff --json`."""
        return {name: list(getattr(self, name)) for name in ("added", "removed", "changed", "masked", "unmasked")}


def history(store: Store) -> Iterator[Snapshot]:
    """The snapshots that lead to this one, newest first; what a build committed on its way is left out."""
    named: dict[str, list[str]] = {}
    for name, snapshot in {**branches(store), **tags(store)}.items():
        named.setdefault(snapshot, []).append(name)
    with guard(store.path):
        for found in store.repository.ancestry(snapshot_id=store.snapshot):
            if found.parent_id is None or "treemem" not in (found.metadata or {}):
                continue
            changes = dict(found.metadata["treemem"])
            yield Snapshot(found.id, found.written_at, found.message, changes, tuple(sorted(named.get(found.id, ()))))


def branches(store: Store) -> dict[str, str]:
    """Branches with the snapshots that they are at."""
    with guard(store.path):
        names = sorted(store.repository.list_branches() - {BUILD})
        return {name: store.repository.lookup_branch(name) for name in names}


def tags(store: Store) -> dict[str, str]:
    """Tags with their snapshots."""
    with guard(store.path):
        return {name: store.repository.lookup_tag(name) for name in sorted(store.repository.list_tags())}


def resolve(store: Store, at: str | datetime) -> Store:
    """The memory at a branch, a tag, a snapshot (its id or the beginning of it), or a time.

    At a branch it can be edited; at anything else only read.

    Raises InputError where there is no such thing.
    """
    if isinstance(at, str):
        known = branches(store)
        if at in known:
            return store.at(known[at], at)
        if at in (tagged := tags(store)):
            return store.at(tagged[at], None)
        if _SNAPSHOT.fullmatch(at):
            found = {own for own in _reachable(store) if own.startswith(at)} or _left(store, at)
            if len(found) == 1:
                return store.at(found.pop(), None)
            if found:
                raise InputError(f"{at!r} begins the ids of {len(found)} snapshots; give more of it")
        moment = _time(at)
        if moment is None:
            raise InputError(
                f"{store.name} has no branch, tag or snapshot {at!r}, and it is no time; see: treemem history"
            )
    else:
        moment = at if at.tzinfo else at.astimezone()
    for snapshot in history(store):
        if snapshot.time <= moment:
            return store.at(snapshot.id, None)
    raise InputError(f"{store.name} has no snapshot that is as old as {moment.isoformat(timespec='seconds')}")


def _time(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return moment if moment.tzinfo else moment.astimezone()


def _reachable(store: Store) -> set[str]:
    """The ids of all snapshots that a branch or a tag leads to."""
    found: set[str] = set()
    for snapshot in {*branches(store).values(), *tags(store).values(), store.snapshot}:
        with guard(store.path):
            for own in store.repository.ancestry(snapshot_id=snapshot):
                if own.id in found:
                    break
                if own.parent_id is not None and "treemem" in (own.metadata or {}):
                    found.add(own.id)
    return found


def _left(store: Store, snapshot: str) -> set[str]:
    """The id of a snapshot that nothing leads to any more, such as a rollback leaves, where it is there."""
    with suppress(icechunk.IcechunkError, ValueError):
        return {store.repository.lookup_snapshot(snapshot).id}
    return set()


def create_branch(store: Store, name: str, snapshot: str) -> None:
    """Make a branch at a snapshot. Raises InputError for a name that is taken or none."""
    _check_name(store, name)
    with guard(store.path):
        store.repository.create_branch(name, snapshot)


def create_tag(store: Store, name: str, snapshot: str) -> None:
    """Name a snapshot for good. Raises InputError for a name that is taken or none."""
    _check_name(store, name)
    try:
        with guard(store.path):
            store.repository.create_tag(name, snapshot)
    except DamagedMemory as error:  # as which everything comes that Icechunk refuses
        raise InputError(f"{name!r}: a tag that was deleted cannot be made again; choose another name") from error


def _check_name(store: Store, name: str) -> None:
    if not _NAME.fullmatch(name) or _SNAPSHOT.fullmatch(name) or _time(name) is not None or name == BUILD:
        raise InputError(
            f"{name!r} is no name: use up to 100 of A-Z a-z 0-9 . _ + = @ , - that do not begin with a dot and are not "
            "an id or a time"
        )
    if name in branches(store) or name in tags(store):
        raise InputError(f"{name!r}: there is a branch or tag of this name already")


def delete(store: Store, name: str, kind: str | None = None) -> None:
    """Remove a branch or a tag; its snapshots stay as long as something else leads to them.

    Raises InputError where there is none of this name, or it is not of the `kind`, `branch` or `tag`.
    """
    if name == MAIN:
        raise InputError(f"{MAIN!r} is the branch that a memory is opened at; it cannot be removed")
    with guard(store.path):
        is_branch = name in store.repository.list_branches() - {BUILD}
        if not is_branch and name not in store.repository.list_tags():
            raise InputError(f"{store.name} has no branch or tag {name!r}; see: treemem history")
        if kind is not None and is_branch != (kind == "branch"):
            other = "tag" if kind == "branch" else "branch"
            raise InputError(f"{name!r} is a {other}; to remove it: treemem {other} {store.name} {name} --delete")
        if is_branch:
            store.repository.delete_branch(name)
        else:
            store.repository.delete_tag(name)


def reset(store: Store, branch: str, snapshot: str) -> None:
    """Put a branch at another snapshot."""
    with guard(store.path):
        store.repository.reset_branch(branch, snapshot)


def diff(before: Store, after: Store) -> Difference:
    """How the documents of two snapshots differ."""
    first, second = _contents(before), _contents(after)
    both = first.keys() & second.keys()
    return Difference(
        added=tuple(sorted(second.keys() - first.keys())),
        removed=tuple(sorted(first.keys() - second.keys())),
        changed=tuple(sorted(own for own in both if first[own][0] != second[own][0])),
        masked=tuple(sorted(own for own in both if second[own][1] and not first[own][1])),
        unmasked=tuple(sorted(own for own in both if first[own][1] and not second[own][1])),
    )


def _contents(store: Store) -> dict[str, tuple[bytes, bool]]:
    """Hash, and whether it is masked, of every document by id."""
    return {record["id"]: (own, masked) for record, own, masked in _records(store)}


def _records(store: Store) -> Iterator[tuple[dict[str, Any], bytes, bool]]:
    """Of every document its record, its hash, and whether it is masked."""
    records, ends = store.read("documents/records").tobytes(), store.read("documents/record_ends")
    hashes, status = store.read("documents/hashes"), store.read("documents/status")
    begin = 0
    for end, own, state in zip(ends.tolist(), hashes, status.tolist(), strict=True):
        if state != REMOVED:
            yield json.loads(records[begin:end]), own.tobytes(), state == MASKED
        begin = end


def meeting(store: Store, holds: Callable[[dict[str, Any]], bool]) -> list[str]:
    """The ids of the documents of all branches and tags whose records meet a condition."""
    found: dict[str, None] = {}
    for snapshot in {**branches(store), **tags(store)}.values():
        found.update((record["id"], None) for record, _, _ in _records(store.at(snapshot)) if holds(record))
    return list(found)


def holding(store: Store, ids: Sequence[str]) -> dict[str, set[str]]:
    """The branches and tags that hold any of some documents, each with those that it holds."""
    wanted = set(ids)
    out = {}
    for name, snapshot in {**branches(store), **tags(store)}.items():
        held = wanted & _contents(store.at(snapshot)).keys()
        if held:
            out[name] = held
    return out


def remembered(store: Store, ids: Sequence[str]) -> set[str]:
    """Which of some documents a snapshot holds, those included that nothing leads to any more."""
    wanted = set(ids)
    names = _reachable(store) | _stored(store)
    found: set[str] = set()
    for name in sorted(names):
        with suppress(DamagedMemory):  # the empty snapshot that all begin with
            found |= wanted & _contents(store.at(name)).keys()
    return found


def _stored(store: Store) -> set[str]:
    """The ids of all snapshots that a store on this disk holds, those included that nothing leads to any more."""
    with guard(store.path), suppress(FileNotFoundError):  # a remote one is not asked for what it stores
        return {file.name for file in (store.path / "store" / "snapshots").iterdir() if "#" not in file.name}
    return set()


def moment_between() -> datetime:
    """A moment that all that was stored lies before, and all that will be stored behind.

    It is the end of this second, which is waited for: object storage tells whole seconds. The clocks of machines that
    write at once are taken to agree by a second.
    """
    moment = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=1)
    while (left := (moment - datetime.now(UTC)).total_seconds()) > 0:
        time.sleep(left)
    return moment


def expire(store: Store, before: datetime) -> tuple[list[str], int]:
    """Remove all older snapshots that are no branch's tip and have no tag, with the bytes that only they used.

    Another machine's edit may have stored something before that moment that no snapshot has yet: every branch must
    have been committed to since, so that it is made again.

    Returns the ids of the snapshots that are gone, and how many bytes were collected.
    """
    with guard(store.path):
        kept = {*branches(store).values(), *tags(store).values()}
        there = _all_snapshots(store.repository, kept) | _stored(store)
        store.repository.expire_snapshots(before)
        summary = store.repository.garbage_collect(before)
        _remove_staged(store)
        left = _all_snapshots(store.repository, kept) | _stored(store)
        return sorted(there - left), int(summary.bytes_deleted)


def _remove_staged(store: Store) -> None:
    """Remove the files that killed processes had begun in a store on this disk: they have no name that it knows yet.

    A file is written as `NAME#1` and then renamed (the `object_store` crate). The caller holds the memory's lock.
    """
    for file in (store.path / "store").rglob("*#*"):
        file.unlink()


def _all_snapshots(repository: icechunk.Repository, tips: set[str]) -> set[str]:
    return {own.id for tip in tips for own in repository.ancestry(snapshot_id=tip)}
