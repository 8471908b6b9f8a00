"""What a pool promises wherever it is kept: in a file, in PostgreSQL, in Redis. Real processes, the real command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import GUARD_S, Children
from database_servers import fresh_database
from redis_servers import fresh_redis
from screens import CLI, Result, finish, start

from gpu_resource_extensions.databases import shown
from gpu_resource_extensions.leases import LAPSE_S
from gpu_resource_manager_v01 import GPUResourceManagerV01, State, Store, WaitCancelledError, open_store, records

SERVERS = [("here", 4, 8), ("there", 4, 8)]
PROCESSES, ROUNDS = 16, 12


@contextlib.contextmanager
def file_place(directory: Path) -> Iterator[str]:
    yield str(directory / "resource_status.json")


@contextlib.contextmanager
def postgresql_place(directory: Path) -> Iterator[str]:
    with fresh_database() as url:
        yield url


@contextlib.contextmanager
def redis_place(directory: Path) -> Iterator[str]:
    with fresh_redis() as url:
        yield url


@pytest.fixture(
    params=[
        pytest.param(file_place, id="file"),
        pytest.param(postgresql_place, id="postgresql", marks=pytest.mark.services),
        pytest.param(redis_place, id="redis", marks=pytest.mark.services),
    ]
)
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a pool of two servers is kept, of which this machine is the first, as its environment says."""
    with request.param(tmp_path) as made:
        monkeypatch.setenv("GPU_RESOURCE_FILE", made)
        monkeypatch.setenv("GPU_RESOURCE_SERVER", "here")
        GPUResourceManagerV01(made, servers=SERVERS)
        yield made


@pytest.fixture
def store(place: str) -> Store:
    return open_store(place, GUARD_S)


@pytest.fixture
def manager(place: str) -> GPUResourceManagerV01:
    return GPUResourceManagerV01(place)


def cli(*words: str) -> Result:
    return finish(start(str(CLI), *words))


def held(state: State) -> list[str]:
    """Return who holds or waits for something."""
    return sorted(record["task_id"] for record in records(state))


def becomes(what: Callable[[], object]) -> None:
    end = time.monotonic() + GUARD_S
    while not what():
        assert time.monotonic() < end, "it never became so"
        time.sleep(0.01)


def job(task_id: str, script: str, *options: str) -> subprocess.Popen[bytes]:
    """Start a job of two GPUs that says when it runs, and return once it has."""
    process = start(str(CLI), "--run", task_id, "2", "2", *options, "--", "sh", "-c", f"echo ready; {script}")
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


# --- Many at once ---------------------------------------------------------------------------------


def test_no_gpu_is_given_twice_and_no_change_is_lost(
    place: str, store: Store, tmp_path: Path, children: Children
) -> None:
    claims = tmp_path / "claims"
    claims.mkdir()

    def work(number: int) -> None:
        manager = GPUResourceManagerV01(place)
        for turn in range(ROUNDS):
            granted = manager.obtain_resources(f"{number}-{turn}", 1 + number % 2, 1, wait_s=GUARD_S)
            marks = [claims / f"{granted['server_name']}-{gpu}" for gpu in granted["gpu_ids"]]
            for mark in marks:
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
            for mark in marks:
                mark.unlink()
            assert manager.release_resources(f"{number}-{turn}")

            def count(state: Any) -> None:
                state["count"] = state.get("count", 0) + 1

            open_store(place, GUARD_S).update(count)

    pids = [children.start(lambda number=number: work(number)) for number in range(PROCESSES)]  # type: ignore[misc]
    seen = 0
    while any(os.path.exists(f"/proc/{pid}/fd") and os.listdir(f"/proc/{pid}/fd") for pid in pids):
        store.read()  # which checks it
        seen += 1
    assert [children.wait(pid) for pid in pids] == [0] * PROCESSES
    after: Any = store.read()
    assert seen and (after["count"], held(after), list(claims.iterdir())) == (PROCESSES * ROUNDS, [], [])


# --- Jobs -----------------------------------------------------------------------------------------


def test_job_has_its_gpus_until_it_ends(place: str, store: Store) -> None:
    ran = cli("--run", "job", "2", "2", "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES; exit 3")
    assert (ran.code, ran.out, held(store.read())) == (3, "0,1\n", [])


def test_job_that_lives_keeps_its_gpus_and_one_that_has_died_loses_them(place: str, store: Store) -> None:
    process = job("job", "sleep 1000 & echo $!; wait")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    assert cli("--reclaim").code == 0
    assert held(store.read()) == ["job"], "a process of it lives"
    refused = cli("--release", "job", "--json")
    assert (refused.code, json.loads(refused.out)["error"]["code"]) == (1, "task_running")
    assert cli("--allocate", "rest", "4", "2", "--prefer-server", "here").out.count("there") == 2
    os.kill(child, signal.SIGKILL)
    becomes(lambda: cli("--reclaim").code == 0 and held(store.read()) == ["rest"])


def test_job_is_stopped(place: str, store: Store) -> None:
    process = job("job", "trap '' TERM; sleep 1000 & wait")
    assert cli("--stop", "job", "--grace", "0").code == 0
    assert (process.wait(), held(store.read())) == (137, [])


def test_document_that_has_lost_a_living_job_gets_it_back(place: str, store: Store) -> None:
    process = job("job", "exec sleep 1000")

    def forget(state: Any) -> None:
        for server in state["servers"]:
            server.update(running_tasks=[], available_gpus=[0, 1, 2, 3], available_cpus=8)

    store.update(forget)
    assert cli("--reclaim").code == 0
    assert held(store.read()) == ["job"]
    assert cli("--reset", "--yes").code == 0
    assert held(store.read()) == ["job"]
    assert cli("--reset", "--yes", "--force").code == 0
    assert held(store.read()) == []
    process.terminate()
    assert process.wait() == 143


# --- The line -------------------------------------------------------------------------------------


def test_waiter_is_served_when_there_is_room_and_leaves_the_line_on_ctrl_c(place: str, store: Store) -> None:
    for name in ("here", "there"):
        assert cli("--allocate", name, "4", "8", "--prefer-server", name).code == 0
    waiters = [start(str(CLI), "--allocate", f"waiter-{number}", "4", "8", "--wait") for number in range(2)]
    becomes(lambda: len(held(store.read())) == 4)
    waiters[1].send_signal(signal.SIGINT)
    assert finish(waiters[1]).code == 130
    assert "waiter-1" not in held(store.read())
    assert cli("--release", "there").code == 0
    assert finish(waiters[0]).code == 0
    assert held(store.read()) == ["here", "waiter-0"]


def test_waiter_that_is_killed_leaves_the_line_and_one_that_stands_still_too(
    manager: GPUResourceManagerV01, store: Store, tmp_path: Path, children: Children
) -> None:
    for name in ("here", "there"):
        manager.obtain_resources(name, 4, 8)

    def stand_still() -> None:
        with pytest.raises(WaitCancelledError):
            manager.obtain_resources("still", 4, 8, wait_s=GUARD_S, on_wait=lambda *_: os.kill(os.getpid(), 19))

    still = children.start(stand_still)
    os.waitpid(still, os.WUNTRACED)
    killed = start(str(CLI), "--allocate", "killed", "4", "8", "--wait")
    becomes(lambda: held(store.read()) == ["here", "killed", "still", "there"])
    killed.kill()
    killed.wait()

    def a_minute_later(state: Any) -> None:
        for request in state.get("waiting", ()):
            request["seen"] -= LAPSE_S + 1

    store.update(a_minute_later)
    for lease in tmp_path.glob(".leases/*"):  # of a file's pool, where that is the sign of life
        os.utime(lease, (0, 0))
    assert sorted(manager.reclaim_ended()) == ["killed", "still"]
    assert held(store.read()) == ["here", "there"]
    os.kill(still, signal.SIGCONT)
    assert children.wait(still) == 0


# --- Everything else ------------------------------------------------------------------------------


def test_every_command_works_as_on_a_file(place: str, store: Store) -> None:
    for words in (
        ["--init", "--server", "here:4:8", "--server", "there:4:8"],
        ["--status"],
        ["--status", "--json"],
        ["--allocate", "task", "2", "2"],
        ["--detail"],
        ["--release", "task"],
        ["--add-server", "new:8:16"],
        ["--disable", "new:0,1", "--reason", "fan"],
        ["--enable", "new"],
        ["--remove-server", "new"],
        ["--reclaim"],
        ["--reset", "--yes"],
    ):
        ran = cli(*words)
        assert (ran.code, ran.err) == (0, ""), words
        if words[0] in ("--detail", "--init"):
            assert (shown(place) if "://" in place else place) in ran.out
    assert cli("--init", "--server", "other:4:8").code == 1
    assert [server["server_name"] for server in store.read()["servers"]] == ["here", "there"]


def test_pool_in_a_file_imports_nothing_for_several_machines_or_for_those_who_watch(tmp_path: Path) -> None:
    pool = tmp_path / "resource_status.json"
    script = """
import sys
import cli_v01
for words in (["--init", "--server", "here:4:8"], ["--allocate", "a", "2", "2"], ["--status"], ["--release", "a"],
              ["--allocate", "b", "2", "2", "--wait", "0"], ["--run", "c", "2", "2", "--", "true"], ["--reclaim"]):
    assert cli_v01.main(words) == 0, words
print(sorted(name for name in sys.modules if name.split(".")[-1] in
    ("databases", "postgresql_store", "redis_store", "remote_run", "psycopg", "redis", "metrics", "prometheus_client",
     "web_monitor", "web_page", "starlette", "uvicorn", "docker_job", "airflow_tasks", "airflow")), file=sys.stderr)
"""
    env = {"GPU_RESOURCE_FILE": str(pool), "GPU_RESOURCE_SERVER": "here", "PYTHONPATH": str(CLI.parent)}
    ran = finish(start("-c", script, env=env))
    assert (ran.code, ran.err.splitlines()[-1]) == (0, "[]")
