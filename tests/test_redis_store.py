"""A pool in Redis: real servers, cut connections, killed and stopped ones on either side, and clear errors."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from conftest import GUARD_S, Children, needed
from database_servers import free_port, wait_until
from redis_servers import URL_VARIABLE, Link, Proxy, RedisServer, Verdict, client, fresh_redis
from screens import cli
from test_processes import Claims

from gpu_resource_manager_v01 import (
    GPUResourceManagerV01,
    InvalidRequestError,
    LockTimeoutError,
    MissingPackageError,
    NoPoolError,
    StateFileError,
    Store,
    UnusableStateFileError,
    new_state,
    open_store,
)

pytestmark = pytest.mark.services
needed("redis")

POOL = "gpu_resource:pool"
SECRET = "ge%2Fheim"  # what stands for ge/heim in a URL
#: all that a user of a pool needs, from Redis 7 on
RIGHTS = "~gpu_resource:* +config|get +time +type +hmget +hget +hset +exists +expire +set +rename +eval +wait +select"


@pytest.fixture
def url() -> Iterator[str]:
    """The URL of a database without a pool."""
    with fresh_redis() as made:
        yield made


@pytest.fixture
def store(url: str) -> Store:
    """A store that holds an idle pool of two servers."""
    return made_pool(url)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server of our own that a test may kill, stop and set as it likes."""
    with own_server() as made:
        yield made


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let hundreds of lost connections take no minutes."""
    monkeypatch.setattr("gpu_resource_extensions.databases.PAUSE_S", 0.01)


def own_server(primary: RedisServer | Link | None = None, **settings: Any) -> RedisServer:
    if URL_VARIABLE in os.environ:
        pytest.skip("a server of somebody else is left as it is")
    return RedisServer(primary, **settings)


def proxy(url: str, judge: Callable[[bytes], Verdict] = lambda _: "pass", tls: ssl.SSLContext | None = None) -> Proxy:
    if url.startswith("rediss"):
        pytest.skip("the way to the server of somebody else is encrypted")
    return Proxy(url, judge, tls)


def made_pool(url: str, lock_timeout_s: float = GUARD_S) -> Store:
    open_store(url, GUARD_S).create(new_state(2))
    return open_store(url, lock_timeout_s)


def noted(state: Any, entry: str) -> int:
    """Let ``state`` note an entry that it must not know yet; return how many it knows."""
    entries = state.setdefault("entries", [])
    assert entry not in entries, "a change was made twice"
    entries.append(entry)
    return len(entries)


def note(store: Store, entry: str) -> int:
    return store.update(lambda state: noted(state, entry))


def entries(store: Store) -> list[str]:
    found: Any = store.read()
    made: list[str] = found.get("entries", [])
    return made


def note_many(url: str, worker: int, rounds: int) -> None:
    store, last = open_store(url, GUARD_S), 0
    for number in range(rounds):
        found = note(store, f"{worker}-{number}")
        assert found > last, "and the result is that of the change that was made"
        last = found


def all_entries(workers: int, rounds: int) -> list[str]:
    return sorted(f"{worker}-{number}" for worker in range(workers) for number in range(rounds))


def noting(children: Children, url: str, workers: int, rounds: int) -> list[int]:
    return [children.start(lambda n=n: note_many(url, n, rounds)) for n in range(workers)]  # type: ignore[misc]


# --- One pool -------------------------------------------------------------------------------------


def test_sixteen_processes_that_make_the_pool_end_with_one(url: str, children: Children) -> None:
    barrier = get_context("fork").Barrier(16)

    def work(number: int) -> None:
        store = open_store(url, GUARD_S)
        barrier.wait()
        store.create(new_state(2))
        note(store, f"{number}")

    pids = [children.start(lambda n=n: work(n)) for n in range(16)]  # type: ignore[misc]
    assert [children.wait(pid) for pid in pids] == [0] * 16
    assert sorted(entries(open_store(url, GUARD_S)), key=int) == [f"{number}" for number in range(16)]


def test_document_names_the_pool_and_the_time_of_the_server(store: Store, url: str) -> None:
    with client(url) as connection:
        now_s = connection.time()[0]
    note(store, "one")
    found = store.read()
    assert len(found["pool"]) == 32 and now_s <= found["clock"] <= now_s + GUARD_S
    note(store, "two")
    assert store.read()["pool"] == found["pool"]


def test_document_can_be_read_with_any_client(store: Store, url: str) -> None:
    note(store, "電話")
    with client(url) as connection:
        document = connection.hget(POOL, "document").decode()
    assert json.loads(document) == store.read() and "電話" in document


def test_server_forgets_the_id_of_a_change_after_an_hour(store: Store, url: str) -> None:
    note(store, "one")
    with client(url) as connection:
        change = connection.hget(POOL, "change").decode()
        assert 3000 < connection.ttl(f"gpu_resource:change:{change}") <= 3600


def test_sixteen_processes_never_share_a_gpu_and_every_reader_sees_a_sound_pool(
    url: str, tmp_path: Path, children: Children
) -> None:
    claims, rounds = Claims(tmp_path / "claims"), 75
    GPUResourceManagerV01(url)
    barrier = get_context("fork").Barrier(16)

    def work(worker: int) -> None:
        manager, rng = GPUResourceManagerV01(url), random.Random(worker)
        barrier.wait()
        for number in range(rounds):
            held = manager.allocate_resources(f"{worker}-{number}", rng.randint(2, 4), rng.randint(1, 16))
            if held is not None:
                claims.take(held["server_name"], held["gpu_ids"])
                claims.give_back(held["server_name"], held["gpu_ids"])
                assert manager.release_resources(f"{worker}-{number}")
        barrier.wait()
        assert manager.allocate_resources(f"kept-{worker}", 2, 1), "16 processes with 2 GPUs each just fill the pool"

    done, marks = threading.Event(), set()

    def look() -> None:
        store = open_store(url, GUARD_S)
        while not done.is_set():
            marks.add(store.version_mark())
            store.read()  # which checks the invariant

    reader = threading.Thread(target=look)
    pids = [children.start(lambda n=n: work(n)) for n in range(16)]  # type: ignore[misc]
    reader.start()
    try:
        assert [children.wait(pid) for pid in pids] == [0] * 16
    finally:
        done.set()
        reader.join()
    assert len(marks) > 100
    assert GPUResourceManagerV01(url).get_resource_summary()["total_available_gpus"] == 0


def test_change_that_others_were_always_quicker_than_gives_up(store: Store, url: str) -> None:
    def change(state: Any) -> int:
        number: int = note(open_store(url, GUARD_S), os.urandom(4).hex())
        return noted(state, f"late {number}")

    with pytest.raises(LockTimeoutError, match="1 秒待ちましたが、別のプロセスが使用中です"):
        open_store(url, 0).update(change)
    assert not [entry for entry in entries(store) if entry.startswith("late")]


# --- Lost answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", ["drop", "pass and cut"])
@pytest.mark.usefixtures("no_pause")
def test_change_is_made_once_whichever_command_is_the_last_one(store: Store, url: str, verdict: Verdict) -> None:
    counter, last, made = itertools.count(), 0, 0

    def judge(_: bytes) -> Verdict:
        return verdict if next(counter) == last else "pass"

    with proxy(url, judge) as cut:
        through = open_store(cut.url, GUARD_S)
        for last in itertools.count():
            counter = itertools.count()
            made = note(through, f"{last}")
            if next(counter) <= last:
                break  # there are no more commands
    assert made > 8 and entries(store) == [f"{number}" for number in range(made)]


@pytest.mark.parametrize("verdict", ["drop", "pass and cut"])
@pytest.mark.usefixtures("no_pause")
def test_pool_is_made_once_whichever_command_is_the_last_one(url: str, verdict: Verdict) -> None:
    counter, last = itertools.count(), 0

    def judge(_: bytes) -> Verdict:
        return verdict if next(counter) == last else "pass"

    with proxy(url, judge) as cut, client(url) as connection:
        for last in itertools.count():
            counter = itertools.count()
            open_store(cut.url, GUARD_S).create(new_state(2))
            assert len(open_store(url, GUARD_S).read()["servers"]) == 2
            if next(counter) <= last:
                break
            connection.delete(POOL)
    assert last > 8


@pytest.mark.usefixtures("no_pause")
def test_reader_asks_again_whichever_command_is_the_last_one(store: Store, url: str) -> None:
    counter, last, expected = itertools.count(), 0, (store.read(), store.version_mark())

    def judge(_: bytes) -> Verdict:
        return "drop" if next(counter) == last else "pass"

    with proxy(url, judge) as cut:
        through = open_store(cut.url, GUARD_S)
        for last in range(12):  # noqa: B007 - the judge reads it
            counter = itertools.count()
            assert (through.read(), through.version_mark()) == expected


@pytest.mark.usefixtures("no_pause")
def test_connections_cut_at_random_lose_no_change_and_double_none(store: Store, url: str, children: Children) -> None:
    rng, cuts = random.Random(1), 0

    def judge(_: bytes) -> Verdict:
        nonlocal cuts
        if rng.random() > 0.03:
            return "pass"
        cuts += 1
        return rng.choice(("drop", "pass and cut"))

    with proxy(url, judge) as cut:
        pids = noting(children, cut.url, 6, 40)
        assert [children.wait(pid) for pid in pids] == [0] * 6
    assert cuts > 50 and sorted(entries(store)) == all_entries(6, 40)


@pytest.mark.usefixtures("no_pause")
def test_change_that_another_one_has_followed_is_known_to_be_made(store: Store, url: str) -> None:
    is_cut = False

    def judge(command: bytes) -> Verdict:
        nonlocal is_cut
        if is_cut and b"TIME" in command:
            pytest.fail("it is made again")
        if b"EVAL" not in command:
            return "pass"
        if is_cut:
            note(store, "two")  # so that the document is another one's by now
            return "pass"
        is_cut = True
        return "pass and cut"

    with proxy(url, judge) as cut:
        assert note(open_store(cut.url, GUARD_S), "one") == 1
    assert entries(store) == ["one", "two"]


@pytest.mark.usefixtures("no_pause")
def test_change_that_another_one_has_overtaken_is_made_anew(store: Store, url: str) -> None:
    dropped = 0

    def judge(command: bytes) -> Verdict:
        nonlocal dropped
        if b"EVAL" not in command or dropped:
            return "pass"
        dropped += 1
        note(store, "quicker")
        return "drop"

    with proxy(url, judge) as cut:
        assert note(open_store(cut.url, GUARD_S), "one") == 2
    assert entries(store) == ["quicker", "one"]


@pytest.mark.usefixtures("no_pause")
def test_refusal_after_a_lost_answer_says_nothing_about_the_change(store: Store, url: str) -> None:
    attempts, refusals = itertools.count(), math.inf

    def judge(command: bytes) -> Verdict:
        attempt = next(attempts) if b"EVAL" in command else -1
        if attempt == 0:
            return "pass and cut"
        return b"-READONLY You can't write against a read only replica." if 0 < attempt <= refusals else "pass"

    with proxy(url, judge) as cut:
        with pytest.raises(StateFileError, match=r"(?s)確認できません.*read only replica"):
            note(open_store(cut.url, 0), "one")
        attempts, refusals = itertools.count(), 3
        assert note(open_store(cut.url, GUARD_S), "two") == 2
    assert entries(store) == ["one", "two"]


@pytest.mark.parametrize(("verdict", "made"), [("drop", []), ("pass and cut", ["one"])])
def test_unanswered_change_is_reported_as_such_if_the_server_stays_away(
    store: Store, url: str, verdict: Verdict, made: list[str]
) -> None:
    is_away = False

    def judge(command: bytes) -> Verdict:
        nonlocal is_away
        if is_away:
            return "drop"
        is_away = b"EVAL" in command
        return verdict if is_away else "pass"

    with proxy(url, judge) as cut:
        with pytest.raises(StateFileError, match="変更が保存されたか確認できません"):
            note(open_store(cut.url, 0), "one")
    assert entries(store) == made


# --- Servers and clients that die or stop ---------------------------------------------------------


def test_kill_of_the_server_under_load_loses_no_change_and_doubles_none(
    server: RedisServer, children: Children
) -> None:
    store = made_pool(server.url())
    pids = noting(children, server.url(), 6, 100)
    for count in (50, 150, 250, 350, 450):
        wait_until(lambda count=count: len(entries(store)) >= count, "changes")
        server.kill()
        server.start()
    assert [children.wait(pid) for pid in pids] == [0] * 6
    assert sorted(entries(store)) == all_entries(6, 100)


def stopping(signals: list[signal.Signals]) -> Callable[[Any], int]:
    """Return a change that gives this process the next signal each time it is made."""

    def change(state: Any) -> int:
        if signals:
            os.kill(os.getpid(), signals.pop(0))
        return noted(state, "stopped")

    return change


def is_stopped(pid: int) -> bool:
    found, status = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
    return found == pid and os.WIFSTOPPED(status)


def test_client_that_is_stopped_in_its_change_holds_up_nobody_and_makes_it_later(
    store: Store, url: str, children: Children
) -> None:
    def work() -> None:
        assert open_store(url, 1).update(stopping([signal.SIGSTOP, signal.SIGSTOP])) == 5

    pid = children.start(work)
    wait_until(lambda: is_stopped(pid), "a stop")
    assert [note(open_store(url, 1), entry) for entry in ("one", "two")] == [1, 2]
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: is_stopped(pid), "another stop, as the change is made again")
    assert [note(open_store(url, 1), entry) for entry in ("three", "four")] == [3, 4]
    os.kill(pid, signal.SIGCONT)
    assert children.wait(pid) == 0
    assert entries(store) == ["one", "two", "three", "four", "stopped"]


def test_client_that_is_killed_in_its_change_leaves_the_old_document(
    store: Store, url: str, children: Children
) -> None:
    def work() -> None:
        open_store(url, GUARD_S).update(stopping([signal.SIGKILL]))

    assert children.run(work) == -signal.SIGKILL
    assert note(open_store(url, 1), "one") == 1
    assert entries(store) == ["one"]


def test_clients_killed_at_any_command_leave_a_whole_document(store: Store, url: str, children: Children) -> None:
    rng, victim = random.Random(2), 0

    def judge(_: bytes) -> Verdict:
        if victim and rng.random() < 0.02:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        return "pass"

    with proxy(url, judge) as watched:
        for number in range(25):
            victim = children.start(lambda n=number: note_many(watched.url, n, 1000))  # type: ignore[misc]
            assert children.wait(victim) == -signal.SIGKILL
            victim = 0
    found = entries(store)
    assert len(found) > 25
    for number in range(25):
        made = [entry for entry in found if entry.startswith(f"{number}-")]
        assert made == [f"{number}-{count}" for count in range(len(made))], "one after the other, and none twice"


def test_server_that_is_stopped_makes_no_call_last_for_ever(server: RedisServer) -> None:
    store = made_pool(server.url(), 0)
    server.signal(signal.SIGSTOP)
    for work in (store.read, store.version_mark, lambda: note(store, "one")):
        with pytest.raises(StateFileError, match=r"(?s)Timeout.*Redis が動いているか"):
            work()
    server.signal(signal.SIGCONT)
    assert note(open_store(server.url(), GUARD_S), "two") == 1


def test_server_that_stops_while_it_makes_a_change_makes_no_call_last_for_ever(server: RedisServer) -> None:
    def judge(command: bytes) -> Verdict:
        if b"EVAL" in command:
            server.signal(signal.SIGSTOP)
        return "pass"

    store = made_pool(server.url())
    with proxy(server.url(), judge) as watched:
        with pytest.raises(StateFileError, match="変更が保存されたか確認できません"):
            note(open_store(watched.url, 0), "one")
    server.signal(signal.SIGCONT)
    assert note(store, "two") == 2, "it was made later"
    assert entries(store) == ["one", "two"]


# --- Replicas -------------------------------------------------------------------------------------


@contextlib.contextmanager
def pair(**settings: Any) -> Iterator[tuple[RedisServer, RedisServer]]:
    with own_server(**settings) as primary, own_server(primary, **settings) as replica:
        yield primary, replica


def acknowledged(url: str, acknowledged_file: Path, worker: int) -> None:
    """Note one entry after the other, and write down which are known to be made, until told to stop."""
    store = open_store(url, GUARD_S)
    with open(acknowledged_file, "a") as file:
        for number in itertools.count():
            if os.path.exists(f"{acknowledged_file}.stop"):
                break
            with contextlib.suppress(StateFileError):
                note(store, f"{worker}-{number}")
                print(f"{worker}-{number}", file=file, flush=True)


def waits_or_knows(primary: RedisServer, known: Callable[[], list[str]], count: int) -> Callable[[], object]:
    return lambda: primary.ask("INFO", "clients")["blocked_clients"] or len(known()) > count


@pytest.mark.usefixtures("no_pause")
def test_fail_over_to_a_replica_that_confirms_loses_no_acknowledged_change(tmp_path: Path, children: Children) -> None:
    files = [tmp_path / f"{number}" for number in range(4)]

    def known() -> list[str]:
        return [line for file in files if file.exists() for line in file.read_text().split()]

    def replica_of(server: RedisServer) -> tuple[RedisServer, Link, RedisServer]:
        link = Link(server)
        return server, link, stack.enter_context(own_server(link, min_replicas_to_write=1))

    with contextlib.ExitStack() as stack:
        primary, link, replica = replica_of(stack.enter_context(own_server(min_replicas_to_write=1)))
        made_pool(primary.url())
        address = stack.enter_context(proxy(primary.url()))
        pids = [children.start(lambda n=n: acknowledged(address.url, files[n], n)) for n in range(4)]  # type: ignore[misc]
        for _ in range(5):
            before = len(known())
            wait_until(lambda before=before: len(known()) > before + 20, "changes")
            link.hold()
            wait_until(waits_or_knows(primary, known, len(known()) + 20), "a client that waits, or one that does not")
            primary.kill()
            link.cut()
            replica.promote()
            address.target = ("127.0.0.1", replica.port)
            primary, link, replica = replica_of(replica)
        for file in files:
            Path(f"{file}.stop").touch()
        assert [children.wait(pid) for pid in pids] == [0] * 4
        found = entries(open_store(primary.url(), GUARD_S))
    assert len(known()) > 100 and sorted({*known()} - {*found}) == []
    assert len(found) == len({*found})


def test_change_that_no_replica_confirms_is_reported_as_such(children: Children) -> None:
    with pair(min_replicas_to_write=1) as (primary, replica):
        store = made_pool(primary.url(), 0)
        replica.signal(signal.SIGSTOP)
        with pytest.raises(StateFileError, match=r"(?s)確認できません.*1 台の複製"):
            note(store, "one")
        with pytest.raises(StateFileError, match="1 台の複製"):
            store.update(entries_of)  # which would tell of what may be lost
        replica.signal(signal.SIGCONT)
        assert note(open_store(primary.url(), GUARD_S), "two") == 2


def entries_of(state: Any) -> object:
    return state.get("entries")


def test_server_that_lacks_replicas_refuses_a_change(server: RedisServer) -> None:
    store = made_pool(server.url(), 0)
    server.set(min_replicas_to_write=1)
    with pytest.raises(StateFileError, match=r"(?s)NOREPLICAS.*min-replicas-to-write"):
        note(store, "one")
    assert entries(store) == []


def test_replica_can_be_read_and_refuses_a_change() -> None:
    with pair() as (primary, replica):
        note(made_pool(primary.url()), "one")
        store = open_store(replica.url(), GUARD_S)
        wait_until(lambda: replica.ask("EXISTS", POOL) and entries(store), "a replica that has the change")
        assert entries(store) == ["one"]
        with pytest.raises(StateFileError, match=r"(?s)read only replica.*プライマリ"):
            note(store, "two")


# --- Servers that may lose a change ---------------------------------------------------------------

RISKS = [
    {"appendonly": "no"},
    {"appendfsync": "everysec"},
    {"no_appendfsync_on_rewrite": "yes"},
    {"maxmemory_policy": "allkeys-lru"},
]


@pytest.mark.parametrize("risk", RISKS, ids=lambda risk: next(iter(risk)))
def test_server_that_may_lose_a_change_is_refused_unless_told_otherwise(
    server: RedisServer, risk: dict[str, str]
) -> None:
    store = made_pool(server.url())
    server.set(**risk)
    [(name, value)] = [(name.replace("_", "-"), value) for name, value in risk.items()]
    for work in (lambda: note(store, "one"), lambda: store.create(new_state(2))):
        with pytest.raises(StateFileError, match=rf"(?s)失われることがあります .{name} {value}.*unsafe=1"):
            work()
    assert entries(store) == [], "which can be read all the same"
    assert note(open_store(f"{server.url()}?unsafe=1", GUARD_S), "one") == 1


def test_server_that_does_not_show_its_settings_is_refused_unless_told_otherwise(server: RedisServer) -> None:
    server.ask("ACL", "SETUSER", "lab", "on", f">{SECRET}", *RIGHTS.replace("+config|get", "").split())
    url = server.url(0, SECRET.replace("%", "%25"), "lab")
    with pytest.raises(StateFileError, match=r"(?s)config.*CONFIG GET を許可.*unsafe=1"):
        made_pool(url)
    assert note(made_pool(f"{url}?unsafe=1"), "one") == 1


# --- Clear errors ---------------------------------------------------------------------------------


def test_user_with_few_rights_can_use_the_pool(server: RedisServer) -> None:
    server.ask("ACL", "SETUSER", "lab", "on", ">geheim", *RIGHTS.split())
    store = made_pool(server.url(0, "geheim", "lab"))
    assert note(store, "one") == 1
    with client(server.url()) as connection:
        connection.hset(POOL, "document", "damaged")
    store.update(lambda state: None, new_state(3))
    assert len(store.read()["servers"]) == 3 and store.version_mark()


def failure(work: Callable[[], object]) -> str:
    """Return what people are told, which must be about the store and hold no password, as all that led to it."""
    with pytest.raises(StateFileError) as caught:
        work()
    assert "geheim" not in "".join(traceback.format_exception(caught.value)) and "geheim" not in repr(caught.value)
    assert type(caught.value) is StateFileError and caught.value.path in str(caught.value)
    return str(caught.value)


def test_store_that_is_down_is_told_from_one_that_is_not_known(url: str) -> None:
    for host, reason in [(f"127.0.0.1:{free_port()}", "Connection refused"), ("redis.invalid", "redis.invalid")]:
        store = open_store(f"redis://lab:geheim@{host}/0", 0)
        for work in (store.read, lambda store=store: note(store, "one")):
            text = failure(work)
            assert f"redis://lab@{host}/0\n" in text and reason in text and "Redis が動いているか" in text


def test_login_that_is_refused_is_told(server: RedisServer) -> None:
    made_pool(server.url())
    server.ask("ACL", "SETUSER", "lab", "on", ">richtig", "~other:*", "+@all")
    server.set(requirepass="richtig")
    server.settings["requirepass"] = "richtig"
    for login, reason in [(("geheim", ""), "invalid username-password"), (("", ""), "Authentication required")]:
        text = failure(open_store(server.url(0, *login), GUARD_S).read)
        assert reason in text and "パスワード" in text
    text = failure(lambda: note(open_store(server.url(0, "richtig", "lab"), GUARD_S), "one"))
    assert "permissions" in text and "ACL" in text


def test_full_server_refuses_a_change(server: RedisServer) -> None:
    store = made_pool(server.url())
    server.set(maxmemory=1)
    text = failure(lambda: note(store, "one"))
    assert "maxmemory" in text and "確認できません" not in text
    server.set(maxmemory=0)
    assert note(store, "one") == 1


def test_server_that_cannot_save_refuses_a_change(server: RedisServer) -> None:
    store = made_pool(server.url())
    server.set(save="3600 1000000")
    shutil.rmtree(server.directory)
    server.ask("BGSAVE")
    wait_until(lambda: server.ask("INFO", "persistence")["rdb_last_bgsave_status"] == "err", "a failure")
    text = failure(lambda: note(store, "one"))
    assert "MISCONF" in text and "ディスク" in text


def test_member_of_a_cluster_is_no_place_for_a_pool() -> None:
    with own_server(cluster_enabled="yes", databases=1) as member:
        text = failure(lambda: made_pool(member.url()))
    assert "Cluster には対応していません" in text


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"-MOVED 7365 127.0.0.1:7001", "Cluster"),
        (b"-ASK 7365 127.0.0.1:7001", "Cluster"),
        (b"-CROSSSLOT Keys in request don't hash to the same slot", "Cluster"),
        (b"-ERR unknown command 'EVAL', with args beginning with: 'geheim'", "unknown command 'EVAL'\n"),
    ],
    ids=lambda value: value.split()[0].decode() if isinstance(value, bytes) else "",
)
def test_answer_that_is_final_is_told_at_once(store: Store, url: str, answer: bytes, told: str) -> None:
    with proxy(url, lambda command: answer if b"EVAL" in command else "pass") as changed:
        text = failure(lambda: note(open_store(changed.url, GUARD_S), "one"))
    assert told in text and "確認できません" not in text
    assert entries(store) == []


@pytest.mark.parametrize("word", ["LOADING", "MASTERDOWN", "TRYAGAIN"])
@pytest.mark.usefixtures("no_pause")
def test_server_that_is_not_ready_is_asked_again(store: Store, url: str, word: str) -> None:
    refusals = itertools.count()

    def judge(command: bytes) -> Verdict:
        is_ours = b"TIME" in command or b"HMGET" in command
        return f"-{word} Not yet.".encode() if is_ours and next(refusals) < 20 else "pass"

    with proxy(url, judge) as changed:
        through = open_store(changed.url, GUARD_S)
        assert note(through, "one") == 1
    assert entries(store) == ["one"]
    with proxy(url, lambda command: f"-{word} Not yet.".encode() if b"HMGET" in command else "pass") as never:
        assert "Not yet" in failure(open_store(never.url, 0).read)


def test_server_that_is_none_is_told(url: str) -> None:
    with proxy(url, lambda _: b"HTTP/1.1 400 Bad Request") as other:
        assert "protocol error" in failure(open_store(other.url, GUARD_S).read).lower()


def test_key_of_another_type_is_no_pool_until_a_reset(url: str) -> None:
    store = open_store(url, GUARD_S)
    with client(url) as connection:
        connection.set(POOL, "somebody's")
        store.create(new_state(2))
        for work in (store.read, lambda: note(store, "one")):
            with pytest.raises(UnusableStateFileError):
                work()
        assert store.version_mark()
        store.update(lambda state: None, new_state(3))
        assert len(store.read()["servers"]) == 3
        [aside] = connection.scan_iter("gpu_resource:corrupt-*")
        assert connection.get(aside) == b"somebody's"


def test_document_that_is_no_text_is_no_pool(store: Store, url: str) -> None:
    with client(url) as connection:
        connection.hset(POOL, "document", b"{\xff}")
    with pytest.raises(UnusableStateFileError, match="UTF-8"):
        store.read()


def test_deleted_pool_is_missing(store: Store, url: str) -> None:
    with client(url) as connection:
        connection.delete(POOL)
    for work in (store.read, store.version_mark, lambda: note(store, "one")):
        with pytest.raises(NoPoolError):
            work()


@pytest.mark.parametrize("lock_timeout_s", [0, math.inf])
def test_any_time_limit_will_do(store: Store, url: str, lock_timeout_s: float) -> None:
    through = open_store(url, lock_timeout_s)
    assert note(through, "one") == 1 and entries(through) == ["one"]


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis:///0",
        "redis://lab:geheim@host:port/0",
        "redis://lab:12/geheim@host/0",
        "redis://lab:12#geheim@host/0",
        "redis://lab:12?geheim@host/0",
        "redis://lab:geheim@host/lab1",
        "redis://lab:geheim@host/0?colour=geheim",
        "redis://lab:geheim@host/0?socket_timeout=geheim",
        "redis://lab:geheim@[::1/0",
        "redis://lab:geheim@ho..st/0",
        "rediss://lab:geheim@host/0?ssl_cert_reqs=geheim",
    ],
)
def test_url_of_no_use_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        open_store(url, GUARD_S)
    assert "geheim" not in "".join(traceback.format_exception(caught.value))
    assert "redis://USER:PASSWORD@HOST:PORT/NUMBER" in str(caught.value)


@pytest.mark.parametrize("state", ["missing", "old"])
def test_package_that_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    import redis

    monkeypatch.delitem(sys.modules, "gpu_resource_extensions.redis_store", raising=False)
    if state == "missing":
        monkeypatch.setitem(sys.modules, "redis", None)
    else:
        monkeypatch.setattr(redis, "VERSION", (5, 3, 0))
    with pytest.raises(MissingPackageError, match=r'pip install "redis>=6.0"'):
        open_store("redis://host/0", GUARD_S)


def test_command_line_says_it_in_one_message_without_the_password(server: RedisServer) -> None:
    server.set(requirepass="richtig")
    server.settings["requirepass"] = "richtig"
    for words in (["--init"], ["--status"], ["--allocate", "task", "2", "1"]):
        result = cli(*words, env={"GPU_RESOURCE_FILE": server.url(0, "geheim", "lab")})
        assert result.code == 74 and result.out == "" and result.err.count("✗") == 1, result
        assert "geheim" not in result.err and f"redis://lab@127.0.0.1:{server.port}/0\n" in result.err


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of this machine that nobody else has signed, with its key."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    made = tmp_path_factory.mktemp("tls") / "both.pem"
    line = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    line += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(made.with_name("key.pem")), "-out", str(made)]
    subprocess.run(line, check=True, capture_output=True)
    made.write_text(made.read_text() + made.with_name("key.pem").read_text())
    return made


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def test_certificate_is_checked(url: str, certificate: Path, tls: ssl.SSLContext) -> None:
    with proxy(url, tls=tls) as secure:
        assert note(made_pool(f"{secure.url}?ssl_ca_certs={certificate}"), "one") == 1
        text = failure(open_store(secure.url, GUARD_S).read)
        assert "CERTIFICATE_VERIFY_FAILED" in text and "ssl_ca_certs" in text
        other = f"{secure.url}?ssl_ca_certs={certificate}".replace("127.0.0.1", "localhost")
        assert "CERTIFICATE_VERIFY_FAILED" in failure(open_store(other, GUARD_S).read)


def test_wrong_scheme_is_told(url: str, certificate: Path, tls: ssl.SSLContext) -> None:
    with proxy(url, tls=tls) as secure, proxy(url) as plain:
        text = failure(open_store(secure.url.replace("rediss:", "redis:"), 0).read)
        assert "rediss://" in text, text
        text = failure(open_store(plain.url.replace("redis:", "rediss:"), 0).read)
        assert "rediss://" in text, text


@pytest.mark.usefixtures("no_pause")
def test_connections_cut_under_tls_lose_no_change(
    store: Store, url: str, certificate: Path, tls: ssl.SSLContext
) -> None:
    counter, last = itertools.count(), 0

    def judge(_: bytes) -> Verdict:
        return "pass and cut" if next(counter) == last else "pass"

    with proxy(url, judge, tls) as secure:
        through = open_store(f"{secure.url}?ssl_ca_certs={certificate}", GUARD_S)
        for last in range(14):
            counter = itertools.count()
            assert note(through, f"{last}") == last + 1
