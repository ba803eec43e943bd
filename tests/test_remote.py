"""Memories on object storage, on a server that the tests start."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tests.fakes import FakeEncoder, documents
from tests.test_cli import Run, run

from treemem.config import TreeConfig
from treemem.errors import Conflict, InputError, NotAMemory, StoreError
from treemem.hierarchy import build as building
from treemem.hierarchy import memory as module
from treemem.hierarchy.memory import Memory
from treemem.storage import store as stores
from treemem.storage.remote import local_side, named, url_of

__all__ = ["run"]

CONFIG = TreeConfig(chunk_tokens=40, fanout=4)
ENCODER = FakeEncoder()
DOCUMENTS = documents(40, 8)


@dataclass(frozen=True)
class Place:
    endpoint: str

    def url(self, name: str) -> str:
        return f"s3://bucket/{name}?endpoint={self.endpoint}"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    threaded = pytest.importorskip("moto.server", reason="moto is not installed").ThreadedMotoServer(port=0)
    threaded.start()
    _, port = threaded.get_host_and_port()
    yield f"http://127.0.0.1:{port}"
    threaded.stop()


@pytest.fixture
def place(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    import boto3

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("TREEMEM_CACHE", str(tmp_path / "cache"))
    boto3.client("s3", endpoint_url=server, region_name="us-east-1").create_bucket(Bucket="bucket")
    return Place(server)


def built(url: str, count: int = 20) -> Memory:
    return Memory.build(DOCUMENTS[:count], url, encoder=ENCODER, config=CONFIG)


def test_a_memory_lives_on_object_storage(place: Place, tmp_path: Path) -> None:
    url = place.url("one")
    memory = built(url)
    first = memory.store.snapshot
    memory.add(DOCUMENTS[20:24])
    memory.remove([DOCUMENTS[0].id])
    assert memory.verify().faults == []
    again = Memory.open(url, encoder=ENCODER)
    assert sorted(again.ids()) == sorted(own.id for own in DOCUMENTS[1:24])
    assert again.search(DOCUMENTS[22].text[:70], k=1).hits[0].document.id == DOCUMENTS[22].id
    assert [own.message for own in again.history()][:2] == ["1 removed, 3 chunks removed", "4 added, 12 chunks added"]
    assert len(Memory.open(url, at=first, encoder=ENCODER).ids()) == 20
    info = again.info()
    assert info.path == url
    assert info.store_bytes > 10_000
    assert not (memory.store.path / "store").exists()
    with pytest.raises(StoreError, match="a memory is there already"):
        built(url)


def test_another_machine_makes_its_own_image(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = built(place.url("two"))
    monkeypatch.setenv("TREEMEM_CACHE", str(tmp_path / "elsewhere"))
    other = Memory.open(place.url("two"), encoder=ENCODER)
    assert other.image.folder != memory.image.folder
    query = DOCUMENTS[3].text[:70]
    assert [hit.score for hit in other.search(query)] == [hit.score for hit in memory.search(query)]


def test_two_machines_that_write_at_once(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock keeps them apart: the storage refuses the second commit, and its change is made again on the first."""
    url = place.url("three")
    one = built(url)
    monkeypatch.setenv("TREEMEM_CACHE", str(tmp_path / "elsewhere"))
    two = Memory.open(url, encoder=ENCODER)
    done: list[str] = []
    real = module.apply

    def late(*arguments: Any, **options: Any) -> Any:
        if not done:
            done.append("first")
            one.add(DOCUMENTS[20:22])
        return real(*arguments, **options)

    monkeypatch.setattr(module, "apply", late)
    # One lock for each machine: in this process they would be the same.
    two.add(DOCUMENTS[22:24])
    assert done == ["first"]
    assert sorted(two.ids()) == sorted(own.id for own in DOCUMENTS[:24])
    assert two.verify().faults == []
    assert [own.changes.get("added") for own in two.history()][:2] == [2, 2]


def test_a_change_that_never_gets_through_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = built(place.url("four"))

    def refused(*_: Any, **__: Any) -> Any:
        raise Conflict("another process has committed meanwhile")

    monkeypatch.setattr(module, "apply", refused)
    with pytest.raises(Conflict, match="another process has committed"):
        memory.add(DOCUMENTS[20:21])


def test_a_killed_build_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    url = place.url("five")
    with monkeypatch.context() as patch:
        patch.setattr(building, "COMMIT_CHUNKS", 10)
        patch.setattr(building, "grow", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            built(url)
    memory = built(url)
    assert len(memory.ids()) == 20
    assert memory.verify().faults == []


def test_what_is_forgotten_leaves_the_bucket(place: Place) -> None:
    import boto3

    memory = built(place.url("six"))
    secret = replace(DOCUMENTS[30], id="secret", text="Zebedee hides under the veranda and eats marzipan. " * 3)
    memory.add([secret])
    memory.forget(["secret"])
    client = boto3.client("s3", endpoint_url=place.endpoint, region_name="us-east-1")
    for own in client.list_objects_v2(Bucket="bucket", Prefix="six/")["Contents"]:
        assert b"Zebedee" not in client.get_object(Bucket="bucket", Key=own["Key"])["Body"].read()
    assert memory.verify().faults == []


def test_forgetting_beside_a_writer_on_another_machine(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other has stored, and no snapshot has yet, is collected: its edit is made again on the new tip."""
    url = place.url("nine")
    one = built(url)
    one.add([replace(DOCUMENTS[30], id="secret")])
    one.remove(["secret"])
    monkeypatch.setenv("TREEMEM_CACHE", str(tmp_path / "elsewhere"))
    two = Memory.open(url, encoder=ENCODER)
    real, done = stores.close, []

    def late(writer: Any) -> None:
        real(writer)
        if not done:
            done.append("begun")
            time.sleep(1.1)  # so that what was stored is older than what is kept
            done.append(one.forget(["secret"]).documents)

    monkeypatch.setattr(stores, "close", late)
    two.add(DOCUMENTS[20:24])
    assert done == ["begun", ("secret",)]
    monkeypatch.setenv("TREEMEM_CACHE", str(tmp_path / "a third"))
    fresh = Memory.open(url, encoder=ENCODER)
    assert sorted(fresh.ids()) == sorted(own.id for own in DOCUMENTS[:24])
    assert fresh.verify().faults == []


def test_readers_beside_a_writer(place: Place) -> None:
    url = place.url("seven")
    memory = built(url)
    reader = Memory.open(url, encoder=ENCODER)
    query = DOCUMENTS[3].text[:70]
    before = [hit.score for hit in reader.search(query)]
    results: list[list[float]] = []
    writer = threading.Thread(target=lambda: memory.add(DOCUMENTS[20:30]))
    writer.start()
    while writer.is_alive():
        results.append([hit.score for hit in reader.search(query)])
    writer.join()
    assert all(result == before for result in results)
    assert reader.refresh()
    assert len(reader.ids()) == 30


def test_from_the_command_line(place: Place, run: Run, tmp_path: Path) -> None:
    (tmp_path / "bees.txt").write_text("Smoke calms a hive because the bees fill themselves with honey.")
    (tmp_path / "key.txt").write_text("The spare key lies under the third flower pot.")
    url = place.url("eight")
    assert url in run("build", url, tmp_path / "bees.txt").out.replace("\n", "")
    assert run("add", url, tmp_path / "key.txt").out.startswith("1 added")
    assert "flower pot" in run("search", url, "Where is the key?", "-k", "1").out
    assert "1 added" in run("history", url).out
    assert "All of it is what it is made of." in run("verify", url).out
    assert run("search", place.url("nothing"), "x").error.startswith(f"{place.url('nothing')}: there is nothing there")


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREEMEM_CACHE", str(tmp_path))
    assert local_side("a/b") == Path("a/b")
    assert url_of(Path("a/b")) is None
    assert named(Path("a/b")) == "a/b"
    one, other = local_side("s3://bucket/a/b"), local_side("s3://bucket/a-b")
    assert one != other
    assert local_side(Path("s3://bucket/a/b")) == one  # a Path leaves one of the slashes out
    assert named(one) == "s3://bucket/a/b"
    for wrong in ("s3://bucket", "s3://bucket/", "s3://bucket/a?colour=red", "gs://bucket/a", "https://host/x"):
        with pytest.raises(InputError):
            local_side(wrong)


@pytest.mark.slow  # the storage tries again for half a minute
def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREEMEM_CACHE", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    with pytest.raises((StoreError, NotAMemory)) as raised:
        Memory.open("s3://bucket/a?endpoint=http://127.0.0.1:9")
    assert len(str(raised.value).splitlines()) == 1
    assert "s3://bucket/a" in str(raised.value)
