"""What every store promises; a further one joins the list and has its tests."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import GUARD_S, needed
from database_servers import fresh_database
from memory_store import MemoryStore
from redis_servers import client, fresh_redis

from gpu_resource_manager_v01 import (
    GPUResourceManagerV01,
    JsonFileStore,
    NoPoolError,
    State,
    StateFileError,
    Store,
    UnusableStateFileError,
    decode_state,
    end_task,
    new_state,
    open_store,
    place,
)

DAMAGED = b"not a document"


class Place(NamedTuple):
    """A place for a pool that is not there yet, and what a test must do behind the back of its store."""

    store: Store
    #: put these bytes where the document is
    overwrite: Callable[[bytes], object]
    #: return what was kept aside
    kept_aside: Callable[[], Sequence[bytes]]


def json_file(directory: Path, _: contextlib.ExitStack) -> Place:
    path = directory / "resource_status.json"

    def kept_aside() -> list[bytes]:
        return [aside.read_bytes() for aside in directory.glob("*.corrupt-*")]

    return Place(open_store(str(path), GUARD_S), path.write_bytes, kept_aside)


def memory(directory: Path, _: contextlib.ExitStack) -> Place:
    store = MemoryStore(str(directory / ".leases"))
    return Place(store, lambda data: setattr(store, "document", data), lambda: store.kept_aside)


def postgresql(directory: Path, stack: contextlib.ExitStack) -> Place:
    url = stack.enter_context(fresh_database())
    store = open_store(url, GUARD_S)
    store.lease_directory = str(directory / ".leases")  # not the one of this machine
    psycopg = needed("psycopg")
    connection = stack.enter_context(psycopg.connect(url, autocommit=True))

    def overwrite(data: bytes) -> None:
        store.create(new_state(1))  # if there is nothing
        connection.execute("UPDATE gpu_resource_pool SET document = %s", [data.decode()])

    def kept_aside() -> list[bytes]:
        return [row[0].encode() for row in connection.execute("SELECT document FROM gpu_resource_aside")]

    return Place(store, overwrite, kept_aside)


def redis(directory: Path, stack: contextlib.ExitStack) -> Place:
    url = stack.enter_context(fresh_redis())
    store = open_store(url, GUARD_S)
    store.lease_directory = str(directory / ".leases")  # not the one of this machine
    connection = stack.enter_context(client(url))

    def overwrite(data: bytes) -> None:
        connection.hset("gpu_resource:pool", "document", data)

    def kept_aside() -> list[bytes]:
        return [connection.hget(key, "document") for key in connection.scan_iter("gpu_resource:corrupt-*")]

    return Place(store, overwrite, kept_aside)


@pytest.fixture(
    params=[
        json_file,
        memory,
        pytest.param(postgresql, marks=pytest.mark.services),
        pytest.param(redis, marks=pytest.mark.services),
    ]
)
def place_of_pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        yield request.param(tmp_path, stack)


@pytest.fixture
def store(place_of_pool: Place) -> Store:
    """A store that holds an idle pool of two servers."""
    place_of_pool.store.create(new_state(2))
    return place_of_pool.store


def start(task_id: str) -> Callable[[State], str]:
    """Return a change that lets a task hold two GPUs of the first server, and returns what it is called."""
    return lambda state: place(state["servers"][0], task_id, 2, 1, "2026-01-01T00:00:00")["task_id"]


def tasks(state: State) -> list[str]:
    return [task["task_id"] for server in state["servers"] for task in server["running_tasks"]]


def pool_alone(state: State) -> dict[str, object]:
    """Return ``state`` without what only a pool in a database has, and with each change another one."""
    return {key: value for key, value in state.items() if key not in ("pool", "clock")}


def set_note(value: object) -> Callable[[Any], None]:
    """Return a change of a key that we do not know."""
    return lambda state: state.update(note=value)


# --- Creating and reading -------------------------------------------------------------------------


def test_a_path_is_that_of_a_json_file(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "resource_status.json"), GUARD_S)
    assert isinstance(store, JsonFileStore)
    assert (store.path, store.lease_directory) == (str(tmp_path / "resource_status.json"), str(tmp_path / ".leases"))


def test_what_is_created_is_read_with_the_time_of_its_making(
    place_of_pool: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "2026-01-01T00:00:00")
    pool = new_state(2)
    place_of_pool.store.create(pool)
    assert pool_alone(place_of_pool.store.read()) == {**new_state(2), "last_updated": "2026-01-01T00:00:00"}
    assert pool == new_state(2), "what was given is left as it was"


def test_create_does_not_overwrite_a_pool(store: Store) -> None:
    store.update(start("task"))
    before, mark = store.read(), store.version_mark()
    store.create(new_state(3))
    assert (store.read(), store.version_mark()) == (before, mark)


def test_create_does_not_overwrite_what_is_no_pool(place_of_pool: Place) -> None:
    place_of_pool.overwrite(DAMAGED)
    place_of_pool.store.create(new_state(2))
    with pytest.raises(UnusableStateFileError):
        place_of_pool.store.read()
    assert place_of_pool.kept_aside() == []


def test_without_a_pool_there_is_nothing_to_read_or_change(place_of_pool: Place) -> None:
    store = place_of_pool.store
    for work in (store.read, store.version_mark, lambda: store.update(start("task"))):
        with pytest.raises(NoPoolError) as caught:
            work()
        assert caught.value.path == store.path and caught.value.reason and caught.value.remedy


def test_what_is_read_is_a_private_copy(store: Store) -> None:
    before = store.read()
    mine = store.read()
    start("mine")(mine)
    mine["servers"].pop()
    assert store.read() == before
    assert store.update(tasks) == []


# --- Changing -------------------------------------------------------------------------------------


def test_update_writes_what_changed_and_returns_what_the_change_returns(store: Store) -> None:
    before = store.read()
    assert store.update(start("task")) == "task"
    after = store.read()
    assert tasks(after) == ["task"]
    start("task")(before)
    assert pool_alone(after) == {**pool_alone(before), "last_updated": after["last_updated"]}
    assert after.get("pool") == before.get("pool")
    store.update(lambda state: end_task(state, "task"))
    assert tasks(store.read()) == []


def test_change_of_an_unknown_key_is_a_change(store: Store) -> None:
    store.update(set_note({"電話": ["内線", 42, None, "\ud800"]}))
    found: Any = store.read()
    assert found["note"] == {"電話": ["内線", 42, None, "\ud800"]}


def test_what_a_change_leaves_equal_is_not_written(store: Store) -> None:
    store.update(start("task"))
    before, mark = store.read(), store.version_mark()

    def in_vain(state: State) -> list[str]:
        start("other")(state)
        end_task(state, "other")
        state["servers"] = copy.deepcopy(state["servers"])
        return tasks(state)

    for change in (tasks, in_vain):
        assert store.update(change) == ["task"]
        assert (store.read(), store.version_mark()) == (before, mark)


def test_nothing_is_written_if_the_change_raises(store: Store) -> None:
    before, mark = store.read(), store.version_mark()

    def change(state: State) -> None:
        start("task")(state)
        raise KeyError("task")

    with pytest.raises(KeyError):
        store.update(change)
    assert (store.read(), store.version_mark()) == (before, mark)
    assert store.update(start("next")) == "next", "and no lock is left behind"


def test_document_that_a_change_keeps_is_no_way_in(store: Store) -> None:
    kept: list[State] = []

    def keep(state: State) -> None:
        start("task")(state)
        kept.append(state)

    store.update(keep)
    before = store.read()
    end_task(kept[0], "task")
    assert store.read() == before


def test_unsound_document_is_refused_and_the_old_one_stands(store: Store) -> None:
    before, mark = store.read(), store.version_mark()
    unsound: list[Callable[[Any], object]] = [
        lambda state: state["servers"][1]["available_gpus"].append(99),
        lambda state: state["servers"][0].update(available_cpus=-1),
        lambda state: state.update(servers=[]),
        lambda state: state.update(version="9.9"),
        lambda state: (start("twice")(state), place(state["servers"][1], "twice", 2, 1, ""))[0],
        set_note(float("inf")),
    ]
    for change in unsound:
        with pytest.raises(StateFileError):
            store.update(change)
        assert (store.read(), store.version_mark()) == (before, mark)


def test_mark_is_another_one_after_every_change(store: Store) -> None:
    for number in range(20):
        mark = store.version_mark()
        assert store.version_mark() == mark
        store.update(set_note(number))
        assert store.version_mark() != mark


def test_time_of_the_last_change_is_set_ahead_of_the_change(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "2031-02-03T04:05:06")
    assert store.update(lambda state: state["last_updated"]) == "2031-02-03T04:05:06"
    assert store.read()["last_updated"] != "2031-02-03T04:05:06", "that alone is nothing to write"
    store.update(start("task"))
    assert store.read()["last_updated"] == "2031-02-03T04:05:06"


# --- What is no pool ------------------------------------------------------------------------------


def test_unusable_document_is_refused_and_left_as_it_is(place_of_pool: Place, store: Store) -> None:
    place_of_pool.overwrite(DAMAGED)
    mark = store.version_mark()
    with pytest.raises(UnusableStateFileError):
        store.read()
    with pytest.raises(UnusableStateFileError):
        store.update(start("task"))
    assert (place_of_pool.kept_aside(), store.version_mark()) == ([], mark)


def test_change_may_begin_with_another_document_instead_of_an_unusable_one(place_of_pool: Place, store: Store) -> None:
    place_of_pool.overwrite(DAMAGED)
    assert store.update(start("task"), new_state(3)) == "task"
    found = store.read()
    assert (len(found["servers"]), tasks(found)) == (3, ["task"])
    assert found["last_updated"], "which has its time too"
    assert place_of_pool.kept_aside() == [DAMAGED]


def test_change_may_begin_with_another_document_where_there_is_nothing(place_of_pool: Place) -> None:
    assert place_of_pool.store.update(start("task"), new_state(3)) == "task"
    assert tasks(place_of_pool.store.read()) == ["task"]
    assert place_of_pool.kept_aside() == []


def test_change_that_leaves_the_other_document_as_it_is_writes_it_all_the_same(
    place_of_pool: Place, store: Store
) -> None:
    place_of_pool.overwrite(DAMAGED)
    store.update(tasks, new_state(3))
    assert len(store.read()["servers"]) == 3
    assert place_of_pool.kept_aside() == [DAMAGED]


def test_usable_document_is_never_exchanged(place_of_pool: Place, store: Store) -> None:
    store.update(start("kept"))
    assert store.update(tasks, new_state(3)) == ["kept"]
    assert len(store.read()["servers"]) == 2
    assert place_of_pool.kept_aside() == []


# --- Many at once ---------------------------------------------------------------------------------


def test_eight_threads_lose_no_change(store: Store) -> None:
    barrier = threading.Barrier(8)

    def increment(state: Any) -> int:
        state["count"] = state.get("count", 0) + 1
        count: int = state["count"]
        return count

    results: list[int] = []

    def work() -> None:
        barrier.wait()
        results.extend(store.update(increment) for _ in range(25))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found: Any = store.read()
    assert found["count"] == 200
    assert sorted(results) == list(range(1, 201)), "and each change has seen all before it"


def test_reader_sees_a_whole_document_at_any_time(store: Store) -> None:
    done = threading.Event()
    changes: list[int] = []

    def work() -> None:
        while not done.is_set():
            store.update(start("task"))
            store.update(lambda state: end_task(state, "task"))
            changes.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    seen = [tasks(store.read()) for _ in range(200)]
    done.set()
    thread.join()
    assert changes and all(found in ([], ["task"]) for found in seen)


# --- The manager knows nothing else ---------------------------------------------------------------


def test_manager_works_over_any_store(place_of_pool: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gpu_resource_manager_v01

    monkeypatch.setattr(gpu_resource_manager_v01, "open_store", lambda *_: place_of_pool.store)
    manager = GPUResourceManagerV01(tmp_path / "resource_status.json")
    assert manager.allocate_resources("a", 8, 1)
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "gpu-server-1")
    with manager.allocation("b", 8, 1, wait_s=GUARD_S):
        assert tasks(place_of_pool.store.read()) == ["a", "b"]
        assert manager.allocate_resources("c", 8, 1, local=True, wait_s=0.01) is None
    assert tasks(place_of_pool.store.read()) == ["a"]
    assert manager.release_resources("a") and manager.reset_resources()
    assert manager.get_resource_summary()["total_available_gpus"] == 32


def test_documents_that_tests_call_damaged_are() -> None:
    with pytest.raises(ValueError):
        decode_state(DAMAGED)
