"""One change of the state file: the order of its calls, what it writes, what it keeps."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
from conftest import BOTH_FILES, GUARD_S, PROJECT, Children, names, running
from syscalls import failing, intercepted, recorded

from gpu_resource_manager_v01 import (
    GPUResourceManagerV01,
    InvalidRequestError,
    LockTimeoutError,
    ResourceManagerError,
    State,
    StateFileError,
    decode_state,
    open_store,
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


def test_few_frames_of_ours_stand_between_the_command_and_its_commit(pool: Path) -> None:
    """From ``main`` to ``os.replace``, during ``--allocate`` without ``--wait``: as ``design.md`` counts them."""
    GPUResourceManagerV01(pool, servers=[("node", 8, 64)])  # real ones, of which nothing is to be said
    script = (
        "import os, sys, traceback\n"
        "import cli_v01\n"
        "def replace(*args, really=os.replace, **kwargs):\n"
        "    names = [f.name for f in traceback.extract_stack()[:-1] if f.filename.startswith(sys.path[0])]\n"
        "    print(*names[names.index('main') + 1 :], file=sys.stderr)\n"
        "    really(*args, **kwargs)\n"
        "os.replace = replace\n"
        f"sys.path.insert(0, {str(PROJECT)!r})\n"
        "sys.exit(cli_v01.main(['--allocate', 'task', '2', '1']))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, result
    [between] = [line.split() for line in result.stderr.splitlines()]  # one line, for one file is replaced
    assert len(between) <= 8, between
    assert running(pool) == ["task"]


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


def test_change_that_breaks_the_invariant_is_not_written(pool: Path) -> None:
    GPUResourceManagerV01(pool)
    store = open_store(str(pool), GUARD_S)
    before = pool.read_bytes()

    def change(state: State) -> None:
        state["servers"][0]["available_gpus"].append(99)

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


def test_no_descriptor_is_left_open(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    before = os.listdir("/dev/fd")
    manager.allocate_resources("task", 2, 1)
    manager.release_resources("unknown")
    manager.get_resource_summary()
    assert os.listdir("/dev/fd") == before


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
