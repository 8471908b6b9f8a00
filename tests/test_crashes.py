"""Crashes: kills ahead of any call, interrupts, a full disk, a limit of size."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import BOTH_FILES, Children, names, running
from syscalls import at_call, intercepted, recorded

from gpu_resource_manager_v01 import GPUResourceManagerV01, StateFileError

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


def test_interrupt_leaves_no_temporary_file(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)

    def before_call(name: str, args: tuple[Any, ...]) -> None:
        if name == "fsync":
            raise KeyboardInterrupt

    with intercepted(before_call), pytest.raises(KeyboardInterrupt):
        manager.allocate_resources("task", 2, 1)
    assert names(pool) == BOTH_FILES


# --- No room on the disk --------------------------------------------------------------------------


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
