"""Locks: who waits, for how long, and what threads and forked children do to each other."""

from __future__ import annotations

import _thread
import contextlib
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
from conftest import GUARD_S, Children, running
from syscalls import intercepted

from gpu_resource_manager_v01 import GPUResourceManagerV01, InvalidRequestError, LockTimeoutError, StateFileError

# --- Waiting for the lock -------------------------------------------------------------------------


@contextlib.contextmanager
def directory_locked(pool: Path) -> Iterator[int]:
    """Hold what a change of another process holds; yields the descriptor."""
    descriptor = os.open(pool.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked child may have a copy
        os.close(descriptor)


def held_by_us() -> tuple[int, int]:
    """Return how many threads and descriptors this process has."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + GUARD_S
    while not condition():
        assert time.monotonic() < deadline_s, "a guard against a hang"
        time.sleep(0.001)


@pytest.fixture
def sigint_interrupts() -> Iterator[None]:
    """Let SIGINT raise ``KeyboardInterrupt``, which ``nohup bash -c '... &'`` has it not do."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_waits_given_up_collect_neither_threads_nor_descriptors(pool: Path) -> None:
    before = held_by_us()
    manager = GPUResourceManagerV01(pool, lock_timeout_s=0.01)
    with directory_locked(pool):
        for _ in range(20):
            with pytest.raises(LockTimeoutError):
                manager.release_resources("task")
        threads, descriptors = held_by_us()
        assert threads <= before[0] + 1 and descriptors <= before[1] + 2  # the lock held here is one
    wait_until(lambda: held_by_us() == before)
    assert GPUResourceManagerV01(pool, lock_timeout_s=GUARD_S).allocate_resources("task", 2, 1)
    assert held_by_us() == before


def test_timeout_of_no_time_at_all_starts_no_thread(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool, lock_timeout_s=0)
    with directory_locked(pool):
        before = held_by_us()
        with pytest.raises(LockTimeoutError) as caught:
            manager.release_resources("task")
        assert held_by_us() == before
    assert caught.value.lock_file == str(pool.parent / ".resource.lock")


@pytest.mark.parametrize(
    ("parameter", "request_"),
    [
        ("task_id", ("-x", 2, 1)),
        ("required_gpus", ("task", 9, 1)),
        ("required_gpus", ("task", True, 1)),
        ("required_cpus", ("task", 2, 65)),
        ("required_cpus", ("task", 2, "1")),
        ("prefer_server_id", ("task", 2, 1, 4)),
        ("prefer_server_id", ("task", 2, 1, True)),
    ],
)
def test_what_can_never_be_granted_is_refused_without_waiting_for_the_lock(
    pool: Path, parameter: str, request_: tuple[Any, ...]
) -> None:
    manager = GPUResourceManagerV01(pool, lock_timeout_s=0)
    with directory_locked(pool), pytest.raises(InvalidRequestError) as caught:
        manager.allocate_resources(*request_)
    assert caught.value.parameter == parameter


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a directory the root of all")
def test_pool_in_the_root_directory_waits_for_its_lock_like_any_other(pool: Path, children: Children) -> None:
    GPUResourceManagerV01(pool).allocate_resources("task", 2, 1)  # imports what a lock needs

    def release_in_root() -> None:
        os.chroot(pool.parent)
        with pytest.raises(LockTimeoutError) as caught:
            GPUResourceManagerV01("/resource_status.json", lock_timeout_s=0).release_resources("task")
        assert caught.value.lock_file == "/.resource.lock"
        assert GPUResourceManagerV01("/resource_status.json", lock_timeout_s=GUARD_S).release_resources("task")

    with directory_locked(pool):
        child = children.start(release_in_root)
        wait_until(lambda: len(os.listdir(f"/proc/{child}/task")) == 2)  # it, and the one that stands in the queue
    assert children.wait(child) == 0


def test_lock_had_after_a_wait_was_given_up_is_free_again_even_with_a_forked_child(
    pool: Path, children: Children
) -> None:
    """The child has copies of the descriptors of the wait, so that closing them here would not free the lock."""
    manager = GPUResourceManagerV01(pool, lock_timeout_s=0.5)
    failed: list[BaseException] = []
    reading, writing = os.pipe()

    def wait_in_vain() -> None:
        try:
            manager.release_resources("task")
        except LockTimeoutError as error:
            failed.append(error)

    with directory_locked(pool):
        before = held_by_us()
        waiting = threading.Thread(target=wait_in_vain)
        waiting.start()
        wait_until(lambda: held_by_us()[0] >= before[0] + 2)  # it, and the one that stands in the queue

        def outlive_the_wait() -> None:
            os.close(writing)
            os.read(reading, 1)

        child = children.start(outlive_the_wait)
        waiting.join()
        assert len(failed) == 1
    try:
        assert GPUResourceManagerV01(pool, lock_timeout_s=GUARD_S).allocate_resources("task", 2, 1)
    finally:
        os.close(writing)
        os.close(reading)
    assert children.wait(child) == 0


def test_directory_moved_away_while_the_lock_is_waited_for_is_not_written_to(tmp_path: Path) -> None:
    pool = tmp_path / "pool" / "resource_status.json"
    pool.parent.mkdir()
    manager = GPUResourceManagerV01(pool)
    before = held_by_us()
    failed: list[BaseException] = []

    def allocate() -> None:
        try:
            manager.allocate_resources("task", 2, 1)
        except StateFileError as error:
            failed.append(error)

    waiting = threading.Thread(target=allocate)
    with directory_locked(pool):
        waiting.start()
        wait_until(lambda: held_by_us()[0] >= before[0] + 2)
        pool.parent.rename(tmp_path / "old")
        pool.parent.mkdir()
        GPUResourceManagerV01(pool)
    waiting.join()
    assert [str(pool.parent) in str(error) for error in failed] == [True]
    assert running(pool) == running(tmp_path / "old" / pool.name) == []


def test_interrupted_wait_leaves_no_lock(pool: Path, sigint_interrupts: None) -> None:
    manager = GPUResourceManagerV01(pool)
    before = held_by_us()
    interrupted = threading.Event()

    def interrupt_the_wait() -> None:
        wait_until(lambda: held_by_us()[0] >= before[0] + 2)
        # Again, should it have come in the very moment before the wait: the interpreter looks only after it.
        while True:
            os.kill(os.getpid(), signal.SIGINT)
            if interrupted.wait(2):
                break

    with directory_locked(pool):
        helper = threading.Thread(target=interrupt_the_wait)
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            manager.release_resources("task")
        interrupted.set()
        helper.join()
    assert GPUResourceManagerV01(pool, lock_timeout_s=GUARD_S).allocate_resources("task", 2, 1)
    wait_until(lambda: held_by_us() == before)


def test_wait_goes_on_where_no_thread_can_be_started(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(_thread, "start_new_thread", refuse)
    before = held_by_us()
    manager = GPUResourceManagerV01(pool, lock_timeout_s=0.05)
    with directory_locked(pool) as descriptor:
        with pytest.raises(LockTimeoutError):
            manager.release_resources("task")
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        assert manager.allocate_resources("task", 2, 1)
    assert held_by_us() == before


# --- Locks ----------------------------------------------------------------------------------------


def test_timeout_says_which_lock_and_how_long(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool, lock_timeout_s=0.02)
    with filelock.FileLock(pool.parent / ".resource.lock"), pytest.raises(TimeoutError) as caught:
        manager.allocate_resources("task", 2, 1)
    assert isinstance(caught.value, LockTimeoutError)
    assert (caught.value.lock_file, caught.value.timeout_s) == (str(pool.parent / ".resource.lock"), 0.02)
    assert running(pool) == []


@pytest.mark.parametrize("value", [-1, float("nan"), "60", True, None])
def test_lock_timeout_that_is_no_time_is_refused(pool: Path, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="lock_timeout_s"):
        GPUResourceManagerV01(pool, lock_timeout_s=value)


def test_reading_needs_no_lock(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    with filelock.FileLock(pool.parent / ".resource.lock"):
        assert manager.get_resource_summary()["total_available_gpus"] == 32
        assert manager.get_detailed_status()["version"] == "0.1"


def test_lock_file_deleted_under_a_stopped_writer_does_not_undo_the_work_of_others(
    pool: Path, children: Children
) -> None:
    manager = GPUResourceManagerV01(pool)

    def stopped() -> None:
        def before(name: str, args: tuple[Any, ...]) -> None:
            if name == "replace":
                os.kill(os.getpid(), signal.SIGSTOP)

        with intercepted(before):
            assert manager.allocate_resources("stopped", 4, 1)

    pid = children.start(stopped)
    os.waitpid(pid, os.WUNTRACED)  # returns when the child has stopped
    (pool.parent / ".resource.lock").unlink()
    with pytest.raises(LockTimeoutError):
        GPUResourceManagerV01(pool, lock_timeout_s=0.05).allocate_resources("other", 4, 1)
    started = threading.Barrier(2)
    results: list[Any] = []

    def other() -> None:
        started.wait()
        results.append(manager.allocate_resources("other", 4, 1))

    thread = threading.Thread(target=other)
    thread.start()
    started.wait()
    os.kill(pid, signal.SIGCONT)
    assert children.wait(pid) == 0
    thread.join()
    assert results[0]["gpu_ids"] == [4, 5, 6, 7]
    assert sorted(running(pool)) == ["other", "stopped"]


def test_left_over_lock_file_is_no_lock(pool: Path) -> None:
    (pool.parent / ".resource.lock").write_text("left over")
    assert GPUResourceManagerV01(pool, lock_timeout_s=0).allocate_resources("task", 2, 1)


def test_fifo_in_the_place_of_the_lock_file_makes_nobody_wait(pool: Path, children: Children) -> None:
    os.mkfifo(pool.parent / ".resource.lock")
    assert children.run(lambda: GPUResourceManagerV01(pool).allocate_resources("task", 2, 1)) == 0
    assert running(pool) == ["task"]


def test_manager_inherited_through_fork_gives_no_gpu_twice(pool: Path, children: Children) -> None:
    manager = GPUResourceManagerV01(pool)
    pids = [children.start(lambda n=n: manager.allocate_resources(f"task-{n}", 2, 1)) for n in range(16)]  # type: ignore[misc]
    assert [children.wait(pid) for pid in pids] == [0] * 16
    assert len(running(pool)) == 16


def test_manager_shared_by_threads_gives_no_gpu_twice(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    barrier = threading.Barrier(16)

    def work(number: int) -> None:
        barrier.wait()
        manager.allocate_resources(f"task-{number}", 2, 1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(running(pool)) == 16
    assert manager.get_resource_summary()["total_available_gpus"] == 0
