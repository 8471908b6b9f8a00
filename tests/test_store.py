"""The state file: durable order of calls, failures, kills, damaged files, links, users."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
from conftest import ALICE, BOB, BOTH_FILES, GUARD_S, LAB, PROJECT, STRANGER, Children, become, names, running
from syscalls import at_call, failing, intercepted, recorded

import gpu_resource_manager_v01
from gpu_resource_manager_v01 import (
    GPUResourceManagerV01,
    InvalidRequestError,
    LockTimeoutError,
    ResourceManagerError,
    State,
    StateFileError,
    UnusableStateFileError,
    decode_state,
    put,
)

ERRNOS = [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EPERM, errno.ENOLCK]


# --- One change -----------------------------------------------------------------------------------


def test_change_locks_reads_writes_syncs_renames_syncs_the_directory_and_unlocks(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    manager.allocate_resources("first", 2, 1)
    calls = recorded(lambda: manager.allocate_resources("second", 2, 1))
    steps = [name if name != "flock" else ("lock" if args[1] & fcntl.LOCK_EX else "unlock") for name, args in calls]
    steps = [step for step in steps if step in ("lock", "read", "write", "fsync", "replace", "unlock")]
    assert steps == ["lock", "lock", "read", "write", "fsync", "replace", "fsync", "unlock", "unlock"]
    synced = [os.path.basename(str(args[0])) for name, args in calls if name == "open"]
    assert synced[-1] == ".resource_status.json.tmp", "the temporary file is made in the same directory"


def test_refused_change_leaves_the_file_unchanged(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    manager.allocate_resources("big", 8, 64, prefer_server_id=3)
    before = pool.read_bytes()
    assert manager.release_resources("unknown") is False
    with pytest.raises(ValueError, match="big"):
        manager.allocate_resources("big", 2, 1)
    with pytest.raises(InvalidRequestError):
        manager.allocate_resources("elsewhere", 2, 1, prefer_server_id=4)
    for task in range(3):
        assert manager.allocate_resources(f"fill-{task}", 8, 64)
    full = pool.read_bytes()
    assert manager.allocate_resources("no-room", 2, 1) is None
    assert pool.read_bytes() == full != before


def test_construction_never_overwrites_an_existing_file(pool: Path) -> None:
    GPUResourceManagerV01(pool).allocate_resources("kept", 2, 1)
    before = pool.read_bytes()
    GPUResourceManagerV01(pool)
    assert pool.read_bytes() == before


def test_unknown_keys_survive_every_change(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    manager.allocate_resources("kept", 2, 1)
    document = json.loads(pool.read_text("utf-8"))
    document["admin"] = {"電話": "内線 42", "odd": "\ud800"}
    document["servers"][1]["rack"] = [1, None]
    document["servers"][0]["running_tasks"][0]["user"] = "alice"
    pool.write_text(json.dumps(document), "utf-8")
    manager.allocate_resources("other", 2, 1)
    after = json.loads(pool.read_text("utf-8"))
    assert after["admin"] == document["admin"]
    assert after["servers"][1]["rack"] == [1, None]
    assert after["servers"][0]["running_tasks"][0]["user"] == "alice"
    manager.reset_resources()
    emptied = json.loads(pool.read_text("utf-8"))
    assert (emptied["admin"], emptied["servers"][1]["rack"]) == (document["admin"], [1, None])


def test_clock_that_jumps_changes_no_decision(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = GPUResourceManagerV01(pool)
    monkeypatch.setattr(time, "strftime", lambda _: "1970-01-01T00:00:00")
    first = manager.allocate_resources("past", 4, 1)
    monkeypatch.setattr(time, "strftime", lambda _: "2999-01-01T00:00:00")
    second = manager.allocate_resources("future", 4, 1)
    assert first and second
    assert (first["gpu_ids"], second["gpu_ids"]) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert manager.release_resources("past") and manager.release_resources("future")


def test_library_prints_nothing(pool: Path, capfd: pytest.CaptureFixture[str], children: Children) -> None:
    def work() -> None:
        manager = GPUResourceManagerV01(pool)
        manager.allocate_resources("a", 8, 64)
        manager.release_resources("unknown")
        with contextlib.suppress(ValueError):
            manager.allocate_resources("a", 2, 1)
        manager.reset_resources()

    assert children.run(work) == 0
    assert capfd.readouterr() == ("", "")
    # Nor where nobody has set up logging, as pytest has here.
    script = (
        "from gpu_resource_manager_v01 import GPUResourceManagerV01\n"
        "assert not GPUResourceManagerV01().release_resources('unknown')\n"
    )
    fresh = subprocess.run([sys.executable, "-c", script], cwd=PROJECT, capture_output=True, check=True)
    assert (fresh.stdout, fresh.stderr) == (b"", b"")


# --- Failing calls --------------------------------------------------------------------------------


def check_every_failure(pool: Path, prepare: Callable[[], None], work: Callable[[], object], done: Any) -> None:
    """Let each call of ``work`` fail in turn, once and for good; ``done()`` tells whether it is on disk."""
    prepare()
    calls = len(recorded(work))
    for number in range(calls):
        for code in ERRNOS:
            for for_good in (False, True):
                prepare()
                old = pool.read_bytes()
                with failing(number, code, for_good) as failed:
                    try:
                        work()
                        reported = True
                    except ResourceManagerError as error:
                        reported = False
                        message = str(error)
                        assert str(pool) in message and "対処" in message
                context = f"call {number} ({failed}) failing with {errno.errorcode[code]}, for_good={for_good}"
                assert failed, context
                if reported:
                    assert done(), f"success reported for what is not on disk: {context}"
                elif pool.read_bytes() != old:
                    assert "保存を確認できません" in message, f"failure reported for what is on disk: {context}"
                decode_state(pool.read_bytes())
                assert GPUResourceManagerV01(pool).get_resource_summary()["total_gpus"] == 32, context
                GPUResourceManagerV01(pool).allocate_resources("next", 2, 1)
                assert "next" in running(pool), context
                assert names(pool) == BOTH_FILES, context


def test_no_failing_call_hurts_an_allocation(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool, lock_timeout_s=1)
    check_every_failure(
        pool,
        prepare=lambda: (manager.reset_resources(), None)[1],
        work=lambda: manager.allocate_resources("task", 4, 32),
        done=lambda: "task" in running(pool),
    )


def test_no_failing_call_hurts_a_release_through_a_link(pool: Path, tmp_path: Path) -> None:
    manager = GPUResourceManagerV01(pool, lock_timeout_s=1)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.json"
    link.symlink_to(pool)
    through_link = GPUResourceManagerV01(link, lock_timeout_s=1)

    def prepare() -> None:
        manager.reset_resources()
        manager.allocate_resources("task", 4, 32)

    def work() -> None:
        through_link.release_resources("task")

    prepare()
    for number in range(len(recorded(work))):
        for code in ERRNOS:
            prepare()
            with failing(number, code) as failed, contextlib.suppress(StateFileError):
                work()
            assert failed
            assert link.is_symlink()
            assert GPUResourceManagerV01(link).allocate_resources("next", 2, 1)
            assert names(pool) == sorted([*BOTH_FILES, "elsewhere"])


def test_no_failing_call_hurts_making_the_file(pool: Path) -> None:
    calls = len(recorded(lambda: GPUResourceManagerV01(pool)))
    for number in range(calls):
        for code in ERRNOS:
            for name in names(pool):
                (pool.parent / name).unlink()
            with failing(number, code) as failed, contextlib.suppress(StateFileError):
                GPUResourceManagerV01(pool)
                assert running(pool) == []
            assert failed
            assert GPUResourceManagerV01(pool).allocate_resources("next", 2, 1)
            assert names(pool) == BOTH_FILES


def test_no_failing_call_makes_a_reset_lose_a_good_file(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    document = json.loads(pool.read_text("utf-8"))
    document["servers"] = document["servers"][:1]
    document["note"] = "one server"
    calls = len(recorded(manager.reset_resources))
    for number in range(calls):
        for code in ERRNOS:
            pool.write_text(json.dumps(document), "utf-8")
            with failing(number, code), contextlib.suppress(StateFileError):
                manager.reset_resources()
            kept = json.loads(pool.read_text("utf-8"))
            assert (kept["note"], len(kept["servers"])) == ("one server", 1)
            assert names(pool) == BOTH_FILES


def test_no_failing_call_in_a_reset_loses_a_damaged_file(pool: Path) -> None:
    damaged = b"not JSON"

    def reset() -> None:
        for name in names(pool):
            (pool.parent / name).unlink()
        pool.write_bytes(damaged)
        GPUResourceManagerV01(pool).reset_resources()

    for number in range(len(recorded(reset))):
        for name in names(pool):
            (pool.parent / name).unlink()
        pool.write_bytes(damaged)
        with failing(number, errno.EIO), contextlib.suppress(StateFileError):
            GPUResourceManagerV01(pool).reset_resources()
        kept = [path.read_bytes() for path in pool.parent.iterdir() if ".corrupt-" in path.name]
        assert pool.read_bytes() == damaged or kept == [damaged]
        GPUResourceManagerV01(pool).reset_resources()
        assert running(pool) == []


def test_failed_fsync_of_the_file_is_not_tried_again(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    before = pool.read_bytes()
    calls: list[str] = []

    def before_call(name: str, args: tuple[Any, ...]) -> None:
        calls.append(name)
        if name == "fsync" and calls.count("fsync") == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with intercepted(before_call), pytest.raises(StateFileError) as caught:
        manager.allocate_resources("task", 2, 1)
    assert (calls.count("fsync"), calls.count("replace")) == (1, 0)
    assert caught.value.path == str(pool) and caught.value.reason and caught.value.remedy
    assert pool.read_bytes() == before


def test_failed_fsync_of_the_directory_is_reported_as_unconfirmed_and_not_tried_again(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    calls: list[str] = []

    def before_call(name: str, args: tuple[Any, ...]) -> None:
        calls.append(name)
        if name == "fsync" and "replace" in calls and calls.count("fsync") == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with intercepted(before_call), pytest.raises(StateFileError, match="保存を確認できません"):
        manager.allocate_resources("task", 2, 1)
    assert calls.count("fsync") == 2
    assert running(pool) == ["task"]


def test_change_that_breaks_the_invariant_is_not_written(pool: Path) -> None:
    store = GPUResourceManagerV01(pool)._store
    before = pool.read_bytes()

    def change(state: State) -> tuple[bool, None]:
        server = state["servers"][0]
        put(state, {**server, "available_gpus": [*server["available_gpus"], 99]})
        return True, None

    with pytest.raises(StateFileError, match="書き込めない内容"):
        store.update(change)
    assert (pool.read_bytes(), names(pool)) == (before, BOTH_FILES)


def test_answer_no_writes_nothing_not_even_another_layout(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    for server in range(4):
        manager.allocate_resources(f"all-{server}", 8, 1)
    pool.write_text(json.dumps(json.loads(pool.read_text("utf-8")), indent=4), "utf-8")
    before = (pool.read_bytes(), os.stat(pool).st_ino)
    assert manager.release_resources("unknown") is False
    assert manager.allocate_resources("late", 2, 1) is None
    assert (pool.read_bytes(), os.stat(pool).st_ino) == before


def test_fifo_in_the_place_of_the_lock_file_makes_nobody_wait(pool: Path, children: Children) -> None:
    os.mkfifo(pool.parent / ".resource.lock")
    assert children.run(lambda: GPUResourceManagerV01(pool).allocate_resources("task", 2, 1)) == 0
    assert running(pool) == ["task"]


def test_interrupt_leaves_no_temporary_file(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)

    def before_call(name: str, args: tuple[Any, ...]) -> None:
        if name == "fsync":
            raise KeyboardInterrupt

    with intercepted(before_call), pytest.raises(KeyboardInterrupt):
        manager.allocate_resources("task", 2, 1)
    assert names(pool) == BOTH_FILES


def test_first_failure_is_the_one_reported(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    calls: list[str] = []

    def before_call(name: str, args: tuple[Any, ...]) -> None:
        calls.append(name)
        if name == "fsync":
            raise OSError(errno.EIO, "first")
        if name == "unlink" and "fsync" in calls:
            raise OSError(errno.EPERM, "second")

    with intercepted(before_call), pytest.raises(StateFileError, match="first"):
        manager.allocate_resources("task", 2, 1)


def test_neither_a_failure_nor_a_timeout_leaves_a_descriptor_open(pool: Path) -> None:
    before = os.listdir("/dev/fd")
    for number in range(len(recorded(lambda: GPUResourceManagerV01(pool)))):
        for name in names(pool):
            (pool.parent / name).unlink()
        with failing(number, errno.EIO), contextlib.suppress(StateFileError):
            GPUResourceManagerV01(pool)
        assert os.listdir("/dev/fd") == before
    manager = GPUResourceManagerV01(pool, lock_timeout_s=0)
    with filelock.FileLock(pool.parent / ".resource.lock"), pytest.raises(LockTimeoutError):
        manager.release_resources("task")
    assert os.listdir("/dev/fd") == before


def test_dangling_links_set_aside_in_one_second_are_all_kept(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "20260101T000000")
    for target in ("a", "b", "c"):
        pool.unlink(missing_ok=True)
        pool.symlink_to(target)
        GPUResourceManagerV01(pool).reset_resources()
    assert {os.readlink(path) for path in pool.parent.glob("*.corrupt-*")} == {"a", "b", "c"}


def test_class_attributes_of_a_subclass_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(GPUResourceManagerV01):
        RESOURCE_FILE = str(tmp_path / "small.json")
        LOCK_FILE = ".small.lock"
        TOTAL_SERVERS, GPUS_PER_SERVER, CPUS_PER_SERVER = 2, 4, 16

    monkeypatch.setenv("GPU_RESOURCE_FILE", "")
    manager = Small()
    summary = manager.get_resource_summary()
    assert (summary["total_servers"], summary["total_gpus"], summary["total_cpus"]) == (2, 8, 32)
    with pytest.raises(InvalidRequestError):
        manager.allocate_resources("task", 5, 1)
    assert sorted(os.listdir(tmp_path)) == [".small.lock", "small.json"]


def test_size_limit_leaves_the_old_document(pool: Path, children: Children) -> None:
    manager = GPUResourceManagerV01(pool)
    before = pool.read_bytes()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with pytest.raises(StateFileError, match="ulimit -f"):
            manager.allocate_resources("task", 2, 1)

    assert children.run(work) == 0
    assert pool.read_bytes() == before
    assert names(pool) == BOTH_FILES
    assert manager.allocate_resources("task", 2, 1)


def test_full_disk_leaves_the_old_document(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        pool = disk / "resource_status.json"
        manager = GPUResourceManagerV01(pool)
        before = pool.read_bytes()
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as filler:
            while filler.write(b"x" * 4096):
                pass
        with pytest.raises(StateFileError, match="空き容量"):
            manager.allocate_resources("task", 2, 1)
        assert pool.read_bytes() == before
        (disk / "filler").unlink()
        assert manager.allocate_resources("task", 2, 1)
        assert names(pool) == BOTH_FILES
    finally:
        subprocess.run(["umount", str(disk)], check=True)


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


def test_wait_given_up_holds_nobody_up_even_if_its_process_never_runs_again(pool: Path, children: Children) -> None:
    """The lock is granted to a thread of a process that hangs with the interpreter locked, as one may at its exit."""
    manager = GPUResourceManagerV01(pool, lock_timeout_s=0.05)
    reading, writing = os.pipe()

    def give_up_and_hang() -> None:
        with pytest.raises(LockTimeoutError):
            manager.release_resources("task")
        library = ctypes.PyDLL(None)  # its calls keep the interpreter locked, and none between them unlocks it
        sys.setswitchinterval(1000)
        library.write(writing, b"x", 1)
        library.pause()

    with directory_locked(pool):
        children.start(give_up_and_hang)
        assert os.read(reading, 1) == b"x"
    assert GPUResourceManagerV01(pool, lock_timeout_s=GUARD_S / 4).allocate_resources("task", 2, 1)
    os.close(reading)
    os.close(writing)


def test_child_forked_in_the_middle_of_a_change_holds_no_lock_when_the_parent_is_killed(
    pool: Path, children: Children
) -> None:
    manager = GPUResourceManagerV01(pool)
    reading, writing = os.pipe()

    def die_and_leave_a_child() -> None:
        def before_call(name: str, args: tuple[Any, ...]) -> None:
            if name == "fsync" and os.fork() == 0:
                os.close(writing)
                os.read(reading, 1)  # until the test is over
                os._exit(0)
            if name == "fsync":
                os.kill(os.getpid(), signal.SIGKILL)

        with intercepted(before_call):
            manager.allocate_resources("task", 2, 1)

    assert children.run(die_and_leave_a_child) == -signal.SIGKILL
    assert GPUResourceManagerV01(pool, lock_timeout_s=GUARD_S).allocate_resources("next", 2, 1)
    os.close(writing)
    os.close(reading)


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


def test_failure_behind_a_link_names_the_place_where_it_happened(pool: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    GPUResourceManagerV01(real / "pool.json")
    pool.symlink_to(real / "pool.json")
    (real / ".pool.json.tmp").mkdir()
    with pytest.raises(StateFileError, match=str(real / ".pool.json.tmp")):
        GPUResourceManagerV01(pool).allocate_resources("task", 2, 1)


def test_interrupted_wait_leaves_no_lock(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    before = held_by_us()

    def interrupt_the_wait() -> None:
        wait_until(lambda: held_by_us()[0] >= before[0] + 2)
        os.kill(os.getpid(), signal.SIGINT)

    with directory_locked(pool):
        helper = threading.Thread(target=interrupt_the_wait)
        helper.start()
        with pytest.raises(KeyboardInterrupt):
            manager.release_resources("task")
        helper.join()
    assert GPUResourceManagerV01(pool, lock_timeout_s=GUARD_S).allocate_resources("task", 2, 1)
    wait_until(lambda: held_by_us() == before)


def test_wait_goes_on_where_no_thread_can_be_started(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(gpu_resource_manager_v01, "start_new_thread", refuse)
    before = held_by_us()
    manager = GPUResourceManagerV01(pool, lock_timeout_s=0.05)
    with directory_locked(pool) as descriptor:
        with pytest.raises(LockTimeoutError):
            manager.release_resources("task")
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        assert manager.allocate_resources("task", 2, 1)
    assert held_by_us() == before


# --- Kills ----------------------------------------------------------------------------------------


def test_kill_ahead_of_any_call_leaves_the_old_document_or_the_new_one(pool: Path, children: Children) -> None:
    manager = GPUResourceManagerV01(pool)
    manager.allocate_resources("old", 2, 1)

    def work() -> None:
        manager.release_resources("old")
        manager.allocate_resources("new", 4, 2)

    calls = len(recorded(work))
    seen = set()
    for number in range(calls):
        manager.reset_resources()
        manager.allocate_resources("old", 2, 1)

        def killed(number: int = number) -> None:
            with intercepted(at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL))):
                work()

        assert children.run(killed) == -signal.SIGKILL
        seen.add(tuple(running(pool)))
        assert set(names(pool)) <= {*BOTH_FILES, ".resource_status.json.tmp"}
        # A deadline of 0 s: the lock of the dead is free at once.
        assert GPUResourceManagerV01(pool, lock_timeout_s=0).allocate_resources("next", 2, 1)
        assert names(pool) == BOTH_FILES
    assert seen == {("old",), (), ("new",)}


def test_kill_ahead_of_any_call_in_a_reset_leaves_the_damaged_file_or_the_new_one(
    pool: Path, children: Children
) -> None:
    damaged = b"not JSON"
    GPUResourceManagerV01(pool)
    pool.write_bytes(damaged)
    for number in range(len(recorded(GPUResourceManagerV01(pool).reset_resources))):
        for name in names(pool):
            (pool.parent / name).unlink()
        GPUResourceManagerV01(pool)
        pool.write_bytes(damaged)

        def killed(number: int = number) -> None:
            with intercepted(at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL))):
                GPUResourceManagerV01(pool).reset_resources()

        children.run(killed)
        assert pool.exists()
        if pool.read_bytes() != damaged:
            assert running(pool) == []
            assert [path.read_bytes() for path in pool.parent.iterdir() if ".corrupt-" in path.name] == [damaged]


def test_kill_ahead_of_any_call_while_the_files_are_made_leaves_nothing_in_the_way(
    pool: Path, children: Children
) -> None:
    calls = len(recorded(lambda: GPUResourceManagerV01(pool)))
    for number in range(calls):
        for name in names(pool):
            (pool.parent / name).unlink()

        def killed(number: int = number) -> None:
            with intercepted(at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL))):
                GPUResourceManagerV01(pool)

        assert children.run(killed) == -signal.SIGKILL
        assert GPUResourceManagerV01(pool, lock_timeout_s=0).allocate_resources("next", 2, 1)
        assert names(pool) == BOTH_FILES


def test_two_hundred_random_kills_do_no_harm(pool: Path, children: Children) -> None:
    manager = GPUResourceManagerV01(pool)
    rng = random.Random(1)

    def work() -> None:
        for number in range(10**6):
            manager.allocate_resources(f"task-{number}", rng.randint(2, 8), 1)
            manager.release_resources(f"task-{number}")

    for _ in range(200):
        manager.reset_resources()
        pid = children.start(work)
        time.sleep(rng.uniform(0, 0.01))  # a random instant is the point
        os.kill(pid, signal.SIGKILL)
        children.wait(pid)
        assert len(running(pool)) <= 1
        GPUResourceManagerV01(pool, lock_timeout_s=0).allocate_resources("next", 2, 1)
        assert names(pool) == BOTH_FILES


# --- Locks ----------------------------------------------------------------------------------------


def test_timeout_says_which_lock_and_how_long(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool, lock_timeout_s=0.02)
    with filelock.FileLock(pool.parent / ".resource.lock"), pytest.raises(TimeoutError) as caught:
        manager.allocate_resources("task", 2, 1)
    assert isinstance(caught.value, LockTimeoutError)
    assert (caught.value.lock_file, caught.value.timeout_s) == (str(pool.parent / ".resource.lock"), 0.02)
    assert running(pool) == []


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


def test_no_descriptor_is_left_open(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    before = os.listdir("/dev/fd")
    manager.allocate_resources("task", 2, 1)
    manager.release_resources("unknown")
    manager.get_resource_summary()
    assert os.listdir("/dev/fd") == before


# --- What may stand in the place of the state file ------------------------------------------------


def valid_document() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        document: dict[str, Any] = dict(GPUResourceManagerV01(Path(directory, "x.json")).get_detailed_status())
        return document


def damaged_files() -> Iterator[tuple[str, bytes]]:
    good = json.dumps(valid_document()).encode()
    yield "empty", b""
    yield "truncated", good[: len(good) // 2]
    yield "binary", bytes(range(256))
    yield "byte order mark", b"\xef\xbb\xbf" + good
    yield "UTF-16", good.decode().encode("utf-16")
    yield "deeply nested", b"[" * 100_000
    yield "deeply nested value", good[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    yield "list", b"[]"
    yield "number too long", good.replace(b'"total_cpus": 64', b'"total_cpus": ' + b"9" * 5000)
    yield "unknown version", good.replace(b'"0.1"', b'"9.9"')
    yield "negative", good.replace(b'"available_cpus": 64', b'"available_cpus": -1')
    yield "wrong type", good.replace(b'"total_gpus": 8', b'"total_gpus": true')
    yield "missing key", good.replace(b'"running_tasks"', b'"running"')
    yield "escape sequence", good.replace(b"gpu-server-0", b"\\u001b[2Jgpu")


@pytest.mark.parametrize(("what", "data"), list(damaged_files()), ids=[what for what, _ in damaged_files()])
def test_damaged_file_is_refused_untouched_until_it_is_reset(pool: Path, what: str, data: bytes) -> None:
    GPUResourceManagerV01(pool).allocate_resources("x", 2, 1)
    pool.write_bytes(data)
    manager = GPUResourceManagerV01(pool)
    for ask in (
        lambda: manager.allocate_resources("task", 2, 1),
        lambda: manager.release_resources("x"),
        manager.get_resource_summary,
        manager.get_detailed_status,
    ):
        with pytest.raises(UnusableStateFileError) as caught:
            ask()
        assert str(pool) in str(caught.value) and "--reset --yes" in caught.value.remedy
        assert pool.read_bytes() == data
    assert manager.reset_resources() is True
    assert manager.get_resource_summary()["total_available_gpus"] == 32
    [aside] = pool.parent.glob("resource_status.json.corrupt-*")
    assert aside.read_bytes() == data


def test_two_files_set_aside_in_one_second_keep_both(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    for data in (b"one", b"two", b"three"):
        pool.write_bytes(data)
        manager.reset_resources()
    kept = {path.read_bytes() for path in pool.parent.glob("*.corrupt-*")}
    assert kept == {b"one", b"two", b"three"}


def make_directory(pool: Path) -> None:
    pool.mkdir()


def make_dangling_link(pool: Path) -> None:
    pool.symlink_to("nowhere.json")


def make_link_loop(pool: Path) -> None:
    pool.symlink_to(pool.name)


def make_fifo(pool: Path) -> None:
    os.mkfifo(pool)


def make_device_link(pool: Path) -> None:
    pool.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [make_directory, make_dangling_link, make_link_loop, make_fifo])
def test_what_is_no_file_is_refused_untouched_until_it_is_reset(pool: Path, make: Callable[[Path], None]) -> None:
    make(pool)
    before = os.lstat(pool)
    manager = GPUResourceManagerV01(pool, lock_timeout_s=1)
    for ask in (lambda: manager.allocate_resources("task", 2, 1), manager.get_resource_summary):
        with pytest.raises(UnusableStateFileError):
            ask()
    assert os.lstat(pool).st_ino == before.st_ino
    assert manager.reset_resources()
    assert manager.allocate_resources("task", 2, 1)
    [aside] = pool.parent.glob("resource_status.json.corrupt-*")
    assert os.lstat(aside).st_ino == before.st_ino


def test_device_in_the_place_of_the_file_is_refused(pool: Path) -> None:
    make_device_link(pool)
    with pytest.raises(UnusableStateFileError):
        GPUResourceManagerV01(pool).get_resource_summary()


def test_file_that_vanishes_is_not_silently_made_anew(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    manager.allocate_resources("task", 2, 1)
    pool.unlink()
    with pytest.raises(UnusableStateFileError):
        manager.allocate_resources("other", 2, 1)
    assert manager.reset_resources()
    assert running(pool) == []


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateFileError) as caught:
        GPUResourceManagerV01(tmp_path / "missing" / "resource_status.json")
    assert str(tmp_path / "missing") in str(caught.value)


def test_link_stays_a_link_and_its_target_is_replaced(pool: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    target = real / "pool.json"
    GPUResourceManagerV01(target)
    inode = target.stat().st_ino
    pool.symlink_to(target)
    manager = GPUResourceManagerV01(pool)
    assert manager.allocate_resources("task", 2, 1)
    assert pool.is_symlink() and target.stat().st_ino != inode
    assert running(target) == ["task"]
    assert sorted(os.listdir(real)) == [".resource.lock", "pool.json"]
    # One document, one lock, by whatever name it is reached.
    with filelock.FileLock(real / ".resource.lock"), pytest.raises(LockTimeoutError):
        GPUResourceManagerV01(pool, lock_timeout_s=0).release_resources("task")


@pytest.mark.parametrize("value", ["a\0b", b"bytes", 3.5])
def test_resource_file_that_is_no_path_is_refused(value: Any) -> None:
    with pytest.raises((InvalidRequestError, TypeError)):
        GPUResourceManagerV01(value)


@pytest.mark.parametrize("value", [-1, float("nan"), "60", True, None])
def test_lock_timeout_that_is_no_time_is_refused(pool: Path, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="lock_timeout_s"):
        GPUResourceManagerV01(pool, lock_timeout_s=value)


# --- Where the state lies -------------------------------------------------------------------------


def test_default_file_lies_beside_the_module_and_can_be_named(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_file = Path(GPUResourceManagerV01.RESOURCE_FILE)
    assert module_file.name == "resource_status.json"
    assert (module_file.parent / "gpu_resource_manager_v01.py").exists()
    assert GPUResourceManagerV01().resource_file == str(pool), "the environment variable names it"
    assert GPUResourceManagerV01(tmp_path / "mine.json").resource_file == str(tmp_path / "mine.json")
    monkeypatch.chdir(tmp_path)
    relative = GPUResourceManagerV01("relative.json")
    monkeypatch.chdir("/")
    assert relative.allocate_resources("task", 2, 1)
    assert running(tmp_path / "relative.json") == ["task"]


# --- Users ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o2770, 0o770, 0o2775])
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_two_users_of_one_group_share_a_pool(lab: Path, mode: int, umask: int, children: Children) -> None:
    lab.chmod(mode)
    pool = lab / "resource_status.json"

    def work(uid: int) -> None:
        become(uid, [LAB], umask)
        manager = GPUResourceManagerV01(pool)
        assert manager.allocate_resources(f"task-of-{uid}", 2, 1)
        if uid == BOB:
            assert manager.release_resources(f"task-of-{ALICE}", force=True)

    for uid in (ALICE, BOB, ALICE):
        assert children.run(lambda uid=uid: work(uid)) == 0  # type: ignore[misc]
        for name in names(pool):
            found = os.stat(lab / name)
            assert (found.st_gid, found.st_mode & 0o7777) == (LAB, 0o660 | mode & 0o004), name


@pytest.mark.parametrize("number", range(30))
def test_kill_while_the_lock_file_is_made_does_not_shut_the_group_out(
    lab: Path, number: int, children: Children
) -> None:
    lab.chmod(0o2770)
    pool = lab / "resource_status.json"

    def alice() -> None:
        become(ALICE, [LAB], 0o077)
        with intercepted(at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL))):
            GPUResourceManagerV01(pool)

    def bob() -> None:
        become(BOB, [LAB], 0o077)
        assert GPUResourceManagerV01(pool).allocate_resources("task", 2, 1)

    children.run(alice)
    assert children.run(bob) == 0


def test_reader_outside_the_group_can_look_but_changes_nothing(lab: Path, children: Children) -> None:
    lab.chmod(0o2775)
    pool = lab / "resource_status.json"

    def alice() -> None:
        become(ALICE, [LAB], 0o077)
        GPUResourceManagerV01(pool).allocate_resources("task", 2, 1)

    def stranger() -> None:
        become(STRANGER, [], 0o022)
        manager = GPUResourceManagerV01(pool)
        assert manager.get_resource_summary()["total_running_tasks"] == 1
        with pytest.raises(StateFileError, match="権限"):
            manager.release_resources("task", force=True)
        with pytest.raises(StateFileError, match="権限"):
            manager.reset_resources()

    assert children.run(alice) == 0
    before = pool.read_bytes()
    assert children.run(stranger) == 0
    assert (pool.read_bytes(), names(pool)) == (before, BOTH_FILES)


def test_unreadable_file_is_refused_untouched_until_it_is_reset(lab: Path, children: Children) -> None:
    lab.chmod(0o2770)
    pool = lab / "resource_status.json"
    GPUResourceManagerV01(pool)
    pool.chmod(0o600)
    before = pool.read_bytes()

    def bob() -> None:
        become(BOB, [LAB], 0o022)
        manager = GPUResourceManagerV01(pool)
        for call in (manager.get_resource_summary, manager.get_detailed_status):
            with pytest.raises(StateFileError, match="--reset --yes"):
                call()
        with pytest.raises(StateFileError, match="--reset --yes"):
            manager.release_resources("task")
        assert pool.stat().st_size == len(before)
        manager.reset_resources()
        assert running(pool) == []

    assert children.run(bob) == 0
    [kept] = lab.glob("*.corrupt-*")
    assert kept.read_bytes() == before


def test_user_outside_the_group_of_a_directory_open_to_all_shares_with_nobody(lab: Path, children: Children) -> None:
    lab.chmod(0o777)

    def stranger() -> None:
        become(STRANGER, [], 0o077)
        GPUResourceManagerV01(lab / "resource_status.json").allocate_resources("task", 2, 1)

    assert children.run(stranger) == 0
    for name in BOTH_FILES:
        found = os.stat(lab / name)
        assert (found.st_gid, found.st_mode & 0o777) == (STRANGER, 0o600)


def test_umask_holds_in_a_directory_of_ones_own(lab: Path, children: Children) -> None:
    lab.chmod(0o755)
    pool = lab / "resource_status.json"

    def alice() -> None:
        become(ALICE, [LAB], 0o027)
        GPUResourceManagerV01(pool)

    assert children.run(alice) == 0
    assert {os.stat(lab / name).st_mode & 0o777 for name in names(pool)} == {0o640}


def test_unreadable_file_is_refused_with_its_name(lab: Path, children: Children) -> None:
    lab.chmod(0o755)
    pool = lab / "resource_status.json"
    GPUResourceManagerV01(pool)
    pool.chmod(0o600)

    def stranger() -> None:
        become(STRANGER, [], 0o022)
        with pytest.raises(StateFileError, match=r"Permission denied.*resource_status\.json"):
            GPUResourceManagerV01(pool).get_resource_summary()

    assert children.run(stranger) == 0
