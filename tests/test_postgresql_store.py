"""A pool in PostgreSQL: real servers, cut connections, killed and stopped ones on either side, and clear errors."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import pytest
from conftest import GUARD_S, PROJECT, Children, needed
from database_servers import URL_VARIABLE, PostgreSQLServer, free_port, fresh_database, shared_server, wait_until
from screens import cli
from test_processes import Claims

from gpu_resource_manager_v01 import (
    GPUResourceManagerV01,
    InvalidRequestError,
    LockTimeoutError,
    NoPoolError,
    StateFileError,
    Store,
    new_state,
    open_store,
)

pytestmark = pytest.mark.services
psycopg = needed("psycopg")


@pytest.fixture
def url() -> Iterator[str]:
    """The URL of an empty database."""
    with fresh_database() as made:
        yield made


@pytest.fixture
def store(url: str) -> Store:
    """A store that holds an idle pool of two servers."""
    made = open_store(url, GUARD_S)
    made.create(new_state(2))
    return made


@pytest.fixture
def server() -> Iterator[PostgreSQLServer]:
    """A server of our own that a test may kill, stop and set as it likes, with an empty database ``lab``."""
    with own_server() as made:
        made.sql("CREATE DATABASE lab OWNER lab")
        yield made


def own_server(**settings: object) -> PostgreSQLServer:
    if URL_VARIABLE in os.environ:
        pytest.skip("a server of somebody else is left as it is")
    return PostgreSQLServer(**settings)  # type: ignore[arg-type]


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


def note_many(url: str, lock_timeout_s: float, worker: int, rounds: int) -> None:
    store, last = open_store(url, lock_timeout_s), 0
    for number in range(rounds):
        found = note(store, f"{worker}-{number}")
        assert found > last, "and the result is that of the change that was made"
        last = found


def all_entries(workers: int, rounds: int) -> list[str]:
    return sorted(f"{worker}-{number}" for worker in range(workers) for number in range(rounds))


# --- A proxy that cuts connections ----------------------------------------------------------------

Verdict = Literal["pass", "drop", "pass and cut"]


class Proxy:
    """Stands between clients and a server, and asks ``judge`` about every message in either direction.

    What it says goes for that message; with all but "pass" both ends of the connection find it closed.
    """

    def __init__(self, url: str, judge: Callable[[bool], Verdict]) -> None:
        parts = urlsplit(url)
        self.target, self.judge = (parts.hostname, parts.port), judge
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        address = f"{parts.username}@127.0.0.1:{self.listener.getsockname()[1]}"
        self.url = f"postgresql://{address}{parts.path}?sslmode=disable&gssencmode=disable"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                server = socket.socket()
                with contextlib.suppress(OSError):
                    server.connect(self.target)
                for source, sink, is_client in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._relay, args=(source, sink, is_client), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, is_client: bool) -> None:
        with contextlib.suppress(OSError), source.makefile("rb") as messages:
            sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            is_first = is_client  # which has no letter
            while head := messages.read(4 if is_first else 5):
                message = head + messages.read(struct.unpack("!I", head[-4:])[0] - 4)
                is_first = False
                verdict = self.judge(is_client)
                if verdict != "drop":
                    sink.sendall(message)
                if verdict != "pass":
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxy(url: str, judge: Callable[[bool], Verdict]) -> Iterator[Proxy]:
    if URL_VARIABLE in os.environ:
        pytest.skip("the way to the server of somebody else may be encrypted")
    with Proxy(url, judge) as made:
        yield made


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
    with psycopg.connect(url) as connection:
        [[now_s]] = connection.execute("SELECT extract(epoch FROM now())::bigint").fetchall()
    note(store, "one")
    found = store.read()
    assert len(found["pool"]) == 32 and now_s <= found["clock"] <= now_s + GUARD_S
    note(store, "two")
    assert store.read()["pool"] == found["pool"]


def test_document_can_be_read_with_psql(store: Store, url: str) -> None:
    note(store, "電話")
    with psycopg.connect(url) as connection:
        [[document]] = connection.execute("SELECT document FROM gpu_resource_pool").fetchall()
    assert json.loads(document) == store.read() and "電話" in document


def test_who_may_change_the_pool_needs_no_right_to_make_one(store: Store, url: str) -> None:
    role = f"student{os.urandom(4).hex()}"
    if URL_VARIABLE in os.environ:
        pytest.skip("needs rights that the server of somebody else may not give us")
    database = urlsplit(url).path[1:]
    shared_server().sql(f"CREATE ROLE {role} LOGIN")
    shared_server().sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}", database=database)
    student = open_store(shared_server().url(database, role), GUARD_S)
    student.create(new_state(3))
    assert student.read() == store.read()
    with pytest.raises(StateFileError, match=r"(?s)permission denied.*権限"):
        note(student, "one")
    rights = "INSERT, UPDATE, DELETE"
    shared_server().sql(f"GRANT {rights} ON ALL TABLES IN SCHEMA public TO {role}", database=database)
    assert note(student, "one") == 1
    with psycopg.connect(url) as connection:
        connection.execute("DELETE FROM gpu_resource_pool")
    with pytest.raises(NoPoolError):
        student.read()
    student.create(new_state(3))
    assert len(student.read()["servers"]) == 3


def test_ids_of_old_changes_are_deleted(store: Store, url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO gpu_resource_change VALUES ('old', now() - interval '2 days'), ('new', now())")
    note(store, "one")
    with psycopg.connect(url) as connection:
        found = [row[0] for row in connection.execute("SELECT id FROM gpu_resource_change")]
    assert "old" not in found and {"new", store.version_mark()} <= {*found}


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


# --- Lost answers ---------------------------------------------------------------------------------


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let hundreds of lost connections take no minutes."""
    monkeypatch.setattr("gpu_resource_extensions.databases.PAUSE_S", 0.01)


@pytest.mark.parametrize("verdict", ["drop", "pass and cut"])
@pytest.mark.usefixtures("no_pause")
def test_change_is_made_once_whichever_message_is_the_last_one(store: Store, url: str, verdict: Verdict) -> None:
    counter, last = itertools.count(), 0

    def judge(_: bool) -> Verdict:
        return verdict if next(counter) == last else "pass"

    made = 0
    with proxy(url, judge) as cut:
        through = open_store(cut.url, GUARD_S)
        for last in itertools.count():
            counter = itertools.count()
            made = note(through, f"{last}")
            if next(counter) <= last:
                break  # there are no more messages
    assert made > 20 and entries(store) == [f"{number}" for number in range(made)]


@pytest.mark.usefixtures("no_pause")
def test_pool_is_made_once_whichever_message_is_the_last_one(url: str) -> None:
    counter, last = itertools.count(), 0

    def judge(_: bool) -> Verdict:
        return "drop" if next(counter) == last else "pass"

    with proxy(url, judge) as cut:
        through = open_store(cut.url, GUARD_S)
        for last in itertools.count():
            counter = itertools.count()
            through.create(new_state(2))
            if next(counter) <= last:
                break
            assert len(open_store(url, GUARD_S).read()["servers"]) == 2
            with psycopg.connect(url) as connection:
                connection.execute("DROP TABLE gpu_resource_pool, gpu_resource_change, gpu_resource_aside")
    assert last > 20


@pytest.mark.usefixtures("no_pause")
def test_reader_asks_again_whichever_message_is_the_last_one(store: Store, url: str) -> None:
    counter, last, expected = itertools.count(), 0, (store.read(), store.version_mark())

    def judge(_: bool) -> Verdict:
        return "drop" if next(counter) == last else "pass"

    with proxy(url, judge) as cut:
        through = open_store(cut.url, GUARD_S)
        for number in range(20):
            counter, last = itertools.count(), number
            assert (through.read(), through.version_mark()) == expected


@pytest.mark.usefixtures("no_pause")
def test_connections_cut_at_random_lose_no_change_and_double_none(store: Store, url: str, children: Children) -> None:
    rng, cuts = random.Random(1), 0

    def judge(_: bool) -> Verdict:
        nonlocal cuts
        if rng.random() > 0.005:
            return "pass"
        cuts += 1
        return rng.choice(("drop", "pass and cut"))

    with proxy(url, judge) as cut:
        pids = [children.start(lambda n=n: note_many(cut.url, GUARD_S, n, 25)) for n in range(6)]  # type: ignore[misc]
        assert [children.wait(pid) for pid in pids] == [0] * 6
    assert cuts > 30 and sorted(entries(store)) == all_entries(6, 25)


def test_unanswered_commit_is_reported_as_such_if_the_server_stays_away(store: Store, url: str) -> None:
    is_away = False

    def judge(is_client: bool) -> Verdict:
        nonlocal is_away
        with psycopg.connect(url) as connection:  # which sees what is committed
            is_away = is_away or bool(connection.execute("SELECT 1 FROM gpu_resource_change LIMIT 2").rowcount > 1)
        return "drop" if is_away else "pass"

    with proxy(url, judge) as cut:
        with pytest.raises(StateFileError, match="変更が保存されたか確認できません"):
            note(open_store(cut.url, 0.5), "one")
    assert entries(store) == ["one"]


# --- Servers and clients that die or stop ---------------------------------------------------------


def test_kill_of_the_server_under_load_loses_no_change_and_doubles_none(
    server: PostgreSQLServer, children: Children
) -> None:
    store = made_pool(server.url("lab"))
    pids = [children.start(lambda n=n: note_many(server.url("lab"), GUARD_S, n, 100)) for n in range(6)]  # type: ignore[misc]
    for count in (50, 200, 350):
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


def test_client_that_is_stopped_while_it_waits_makes_its_change_later(
    store: Store, url: str, children: Children
) -> None:
    with psycopg.connect(url) as holder:
        holder.execute("SELECT FROM gpu_resource_pool FOR UPDATE")
        pid = children.start(lambda: note(open_store(url, 2), "waited"))
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        with psycopg.connect(url, autocommit=True) as observer:
            wait_until(lambda: observer.execute(waiting).fetchone(), "a client that waits")
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: is_stopped(pid), "a stop")
    assert note(open_store(url, 2), "one") == 1
    os.kill(pid, signal.SIGCONT)
    assert children.wait(pid) == 0
    assert entries(store) == ["one", "waited"]


def test_clients_that_are_stopped_and_killed_at_random_lose_no_change_and_double_none(
    store: Store, url: str, tmp_path: Path, children: Children
) -> None:
    def work(worker: int) -> None:
        own = open_store(url, 4)  # so that each one that stops in its change is in the way of the others for 2 s
        with open(tmp_path / f"{worker}", "a", buffering=1) as journal:
            for number in itertools.count():
                note(own, f"{worker}-{number}")
                journal.write(f"{worker}-{number}\n")

    rng, alive = random.Random(1), {children.start(lambda n=n: work(n)): n for n in range(8)}  # type: ignore[misc]
    for number in range(6):
        victim = rng.choice([*alive])
        os.kill(victim, signal.SIGSTOP)
        known = len(entries(store))
        wait_until(lambda known=known: len(entries(store)) >= known + 20, "changes of the others")
        os.kill(victim, signal.SIGCONT)
        if number % 3 == 2:
            os.kill(victim, signal.SIGKILL)
            assert children.wait(victim) == -signal.SIGKILL
            del alive[victim]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
        assert children.wait(pid) == -signal.SIGKILL, "and nobody has failed before"
    found = entries(store)
    acknowledged = {entry for worker in range(8) for entry in (tmp_path / f"{worker}").read_text().split()}
    assert len(found) == len({*found}) and acknowledged <= {*found}


def test_client_that_is_killed_in_its_change_leaves_the_old_document_and_no_lock(
    store: Store, url: str, children: Children
) -> None:
    def work() -> None:
        open_store(url, GUARD_S).update(stopping([signal.SIGKILL]))

    assert children.run(work) == -signal.SIGKILL
    assert note(open_store(url, 1), "one") == 1
    assert entries(store) == ["one"]


def test_server_that_is_stopped_makes_no_call_last_for_ever(server: PostgreSQLServer) -> None:
    store = made_pool(server.url("lab"), 0.5)
    server.signal(signal.SIGSTOP)
    for work in (store.read, store.version_mark, lambda: note(store, "one")):
        with pytest.raises(StateFileError, match=SILENT):
            work()
    server.signal(signal.SIGCONT)
    assert note(open_store(server.url("lab"), GUARD_S), "two") == 1


def test_server_that_stops_while_it_is_asked_makes_no_call_last_for_ever(server: PostgreSQLServer) -> None:
    store = made_pool(server.url("lab"), 0.5)

    def changed(state: Any) -> int:
        server.signal(signal.SIGSTOP)
        return noted(state, "one")

    with pytest.raises(StateFileError, match=SILENT):
        store.update(changed)
    server.signal(signal.SIGCONT)
    assert note(open_store(server.url("lab"), GUARD_S), "two") == 1


def test_commit_that_no_standby_confirms_is_reported_as_such(server: PostgreSQLServer) -> None:
    store = made_pool(server.url("lab"), 0.5)
    server.sql("ALTER ROLE lab SET statement_timeout = 100")  # which would end the wait, and say that all is well
    server.set(synchronous_standby_names="gone")
    with pytest.raises(StateFileError, match="変更が保存されたか確認できません"):
        note(store, "one")
    with pytest.raises(LockTimeoutError):
        note(store, "two")
    assert entries(store) == []
    server.set(synchronous_standby_names="")
    assert note(open_store(server.url("lab"), GUARD_S), "three") == 2
    assert entries(store) == ["one", "three"]


def test_five_promotions_of_a_synchronous_standby_lose_no_acknowledged_change_and_double_none(tmp_path: Path) -> None:
    if URL_VARIABLE in os.environ:
        pytest.skip("a server of somebody else is left as it is")
    words = ["--promotions", "5", "--changes", "60", "--standby", "synchronous", "--json", str(tmp_path / "outcome")]
    subprocess.run([sys.executable, str(PROJECT / "benchmarks/failover.py"), *words], check=True)
    [outcome] = json.loads((tmp_path / "outcome").read_text())
    assert (outcome["promotions"], outcome["lost"], outcome["made_twice"]) == (5, 0, 0)
    assert outcome["acknowledged"] >= 300


# --- Clear errors ---------------------------------------------------------------------------------

SILENT = r"応答がありません|timeout"
PASSWORD = "geheim@/:"  # of the user "guarded"
VERBS: list[Callable[[Store], object]] = [
    lambda store: store.create(new_state(2)),
    lambda store: store.read(),
    lambda store: store.version_mark(),
    lambda store: note(store, "one"),
]


def refusals(url: str, lock_timeout_s: float = 0.3) -> set[tuple[str, str]]:
    """Return reason and remedy of what every verb ends with at a place, whose password no text may show."""
    found = set()
    for verb in VERBS:
        with pytest.raises(StateFileError) as caught:
            verb(open_store(url, lock_timeout_s))
        assert_no_password(caught.value)
        found.add((caught.value.reason, caught.value.remedy))
    return found


def assert_no_password(error: BaseException) -> None:
    seen: BaseException | None = error
    while seen is not None:
        text = "".join(traceback.format_exception(seen)) + repr(vars(seen))
        assert "geheim" not in text and "%40" not in text
        seen = seen.__context__


def test_server_that_is_down(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("gpu_resource_extensions.databases.SILENT_S", 0)
    [(reason, remedy)] = refusals(f"postgresql://guarded:geheim@127.0.0.1:{free_port()}/lab")
    assert "Connection refused" in reason and "サーバーが動いているか" in remedy
    assert "再試行しています: connection failed" in caplog.text and "geheim" not in caplog.text


def test_host_that_is_unknown() -> None:
    [(reason, remedy)] = refusals("postgresql://guarded:geheim@no-such-host.invalid/lab")
    assert re.search("not known|resol", reason) and "ホスト名" in remedy


def test_server_that_comes_back_in_time_is_waited_for(server: PostgreSQLServer) -> None:
    store = made_pool(server.url("lab"))
    server.kill()
    starter = threading.Thread(target=server.start)
    starter.start()
    assert note(store, "one") == 1
    starter.join()


def test_login_that_is_refused(server: PostgreSQLServer, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"127.0.0.1:{server.port}/lab"
    monkeypatch.setenv("PGPASSFILE", "/nowhere")
    for user, what in (
        ("guarded:geheim", "password authentication failed"),
        ("guarded", "no password supplied"),
        ("nobody-we-know", "role .* does not exist"),
    ):
        [(reason, remedy)] = refusals(f"postgresql://{user}@{place}", GUARD_S)
        assert re.search(what, reason) and ".pgpass" in remedy


@pytest.mark.parametrize("where", ["URL", "PGPASSWORD", "PGPASSFILE", "PGSERVICEFILE"])
def test_password_comes_from_where_libpq_looks(
    server: PostgreSQLServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    server.sql("ALTER DATABASE lab OWNER TO guarded")
    place = f"127.0.0.1:{server.port}/lab"
    file = tmp_path / "file"
    url = f"postgresql://guarded@{place}"
    if where == "URL":
        url = f"postgresql://guarded:{quote(PASSWORD, safe='')}@{place}"
    elif where == "PGPASSWORD":
        monkeypatch.setenv(where, PASSWORD)
    elif where == "PGPASSFILE":
        monkeypatch.setenv(where, str(file))
        file.write_text("*:*:*:guarded:geheim@/\\:\n")
    else:
        monkeypatch.setenv(where, str(file))
        file.write_text(f"[lab]\nhost=127.0.0.1\nport={server.port}\ndbname=lab\nuser=guarded\npassword={PASSWORD}\n")
        url = "postgresql:///?service=lab"
    file.touch()
    file.chmod(0o600)
    store = made_pool(url)
    assert note(store, "one") == 1 and "geheim" not in store.path


def test_service_that_is_not_defined() -> None:
    [(reason, remedy)] = refusals("postgresql:///?service=nothing", GUARD_S)
    assert "nothing" in reason and "service" in remedy


def test_database_that_does_not_exist(server: PostgreSQLServer) -> None:
    [(reason, remedy)] = refusals(server.url("nothing"), GUARD_S)
    assert 'database "nothing" does not exist' in reason and "createdb" in remedy


def test_server_without_tls_where_it_is_demanded(server: PostgreSQLServer) -> None:
    [(reason, remedy)] = refusals(server.url("lab", sslmode="require"), GUARD_S)
    assert "does not support SSL" in reason and "sslmode" in remedy


def test_server_that_is_read_only(server: PostgreSQLServer) -> None:
    store = made_pool(server.url("lab"))
    server.sql("ALTER DATABASE lab SET default_transaction_read_only = on")
    [(reason, remedy)] = refusals(server.url("lab"))
    assert "read-only" in reason and "target_session_attrs" in remedy
    there = open_store(server.url("lab", target_session_attrs="any"), GUARD_S)
    assert entries(there) == []
    with pytest.raises(StateFileError, match=r"(?s)read-only transaction.*target_session_attrs"):
        note(there, "one")
    server.sql("ALTER DATABASE lab RESET default_transaction_read_only")
    assert note(store, "two") == 1


def test_server_with_no_connection_left(server: PostgreSQLServer) -> None:
    made_pool(server.url("lab"))
    server.sql("ALTER DATABASE lab CONNECTION LIMIT 0")
    [(reason, remedy)] = refusals(server.url("lab"))
    assert "too many connections" in reason and "max_connections" in remedy


def test_lock_that_somebody_else_holds(store: Store, url: str) -> None:
    for hold in ("SELECT FROM gpu_resource_pool FOR UPDATE", "LOCK TABLE gpu_resource_pool IN EXCLUSIVE MODE"):
        with psycopg.connect(url) as holder:
            holder.execute(hold)
            for lock_timeout_s in (0, 0.2):
                with pytest.raises(LockTimeoutError, match="別のプロセスが使用中です"):
                    note(open_store(url, lock_timeout_s), "one")
            assert entries(open_store(url, 0)) == [], "who reads needs no lock"
    assert [note(open_store(url, lock_timeout_s), f"{lock_timeout_s}") for lock_timeout_s in (0, math.inf, 1e9)] == [
        1,
        2,
        3,
    ]


def test_settings_of_the_database_for_others_do_no_harm(store: Store, url: str, children: Children) -> None:
    name = urlsplit(url).path[1:]
    with psycopg.connect(url, autocommit=True) as connection:
        for setting in (
            "statement_timeout = 100",
            "lock_timeout = 100",
            "idle_in_transaction_session_timeout = 100",
            "synchronous_commit = off",
            "default_transaction_isolation = serializable",
        ):
            connection.execute(f"ALTER DATABASE {name} SET {setting}")
    with psycopg.connect(url) as holder:
        holder.execute("SET idle_in_transaction_session_timeout = 0")
        holder.execute("SELECT FROM gpu_resource_pool FOR UPDATE")
        pid = children.start(lambda: note(open_store(url, GUARD_S), "waited"))
        holder.execute("SET statement_timeout = 0; SELECT pg_sleep(0.5)")
    assert children.wait(pid) == 0
    seen: list[Any] = []

    def change(state: Any) -> int:
        with psycopg.connect(url) as observer:
            seen.extend(observer.execute("SELECT 1"))
        return noted(state, "one")

    assert store.update(change) == 2 and seen


def test_disk_that_is_full() -> None:
    disk = Path(tempfile.mkdtemp())  # which others than us can reach
    mount = ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        disk.rmdir()
        pytest.skip("only root can mount a small disk")
    try:
        with own_server(directory=disk, wal_recycle="off") as server:
            server.sql("CREATE DATABASE lab OWNER lab")
            store = made_pool(server.url("lab"))
            note(store, "one")
            with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
                while filler.write(b"x" * 4096):
                    pass
            before, mark = store.read(), store.version_mark()
            with pytest.raises(StateFileError, match=r"(?s)No space left on device.*空き容量"):
                store.update(lambda state: note_much(state))
            assert (store.read(), store.version_mark()) == (before, mark)
            (disk / "filler").unlink()
            assert note(store, "two") == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)
        disk.rmdir()


def note_much(state: Any) -> None:
    state["much"] = os.urandom(1_000_000).hex()  # which nothing can compress by more than half


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://guarded:geheim@/:@127.0.0.1/lab",
        "postgresql://guarded:geheim@x@127.0.0.1/lab",
        "postgresql://guarded:geheim/x@127.0.0.1/lab",
        "postgresql://guarded:geheim%zz@127.0.0.1/lab",
        "postgresql://guarded:geheim@127.0.0.1/lab?colour=red",
        "postgresql://guarded:geheim@x?y@127.0.0.1/lab?colour=red",
        "postgresql://guarded:geheim\udc80@127.0.0.1/lab",
        "postgresql://guarded:geheim@node..lab/lab",
    ],
)
def test_url_that_cannot_be_read_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="PostgreSQL の URL として読めません") as caught:
        open_store(url, GUARD_S)
    assert_no_password(caught.value)


def test_texts_that_the_encoding_of_the_database_lacks(server: PostgreSQLServer) -> None:
    server.sql("CREATE DATABASE old OWNER lab ENCODING 'LATIN1' TEMPLATE template0")
    server.sql("CREATE DATABASE none OWNER lab ENCODING 'SQL_ASCII' TEMPLATE template0")
    store = made_pool(server.url("old"))
    assert note(store, "größer") == 1
    with pytest.raises(StateFileError, match=r"(?s)LATIN1.*UTF8"):
        note(store, "電話")
    assert entries(store) == ["größer"]
    assert note(made_pool(server.url("none")), "電話") == 1


def test_first_of_several_servers_that_can_be_changed_is_found(server: PostgreSQLServer) -> None:
    made_pool(server.url("lab"))
    url = f"postgresql://lab@127.0.0.1:{free_port()},127.0.0.1:{server.port}/lab"
    assert note(open_store(url, GUARD_S), "one") == 1


def test_missing_driver_is_named() -> None:
    code = "import sys; sys.modules['psycopg'] = None; import gpu_resource_manager_v01; "
    code += "gpu_resource_manager_v01.open_store(sys.argv[1], 1)"
    words = [sys.executable, "-c", code, "postgresql://guarded:geheim@127.0.0.1/lab"]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert 'pip install "psycopg[binary]>=3.2"' in done.stderr


def test_command_line_says_what_is_wrong_with_its_usual_codes(server: PostgreSQLServer, tmp_path: Path) -> None:
    env = {"GPU_RESOURCE_FILE": f"postgresql://guarded:geheim@127.0.0.1:{server.port}/lab"}
    refused = cli("--status", env=env)
    assert (refused.code, refused.out) == (74, "") and "geheim" not in refused.err
    assert "password authentication failed" in refused.err
    env = {"GPU_RESOURCE_FILE": server.url("lab")}
    missing = cli("--status", env=env)
    assert (missing.code, missing.out) == (74, "") and "プールがありません" in missing.err
    assert cli("--init", "--server", "node:8:64", env=env).code == 0
    assert cli("--allocate", "task", "2", "1", env=env).code == 0
    assert "postgresql://lab@" in cli("--status", env=env).out
    assert cli("--release", "task", env=env).code == 0
