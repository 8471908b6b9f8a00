"""What may stand in the place of the state file, links, and where the state lies."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
from conftest import running

from gpu_resource_manager_v01 import (
    GPUResourceManagerV01,
    InvalidRequestError,
    LockTimeoutError,
    State,
    StateFileError,
    UnusableStateFileError,
    new_state,
    open_store,
    place,
    timestamp,
)

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


def test_dangling_links_set_aside_in_one_second_are_all_kept(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "20260101T000000")
    for target in ("a", "b", "c"):
        pool.unlink(missing_ok=True)
        pool.symlink_to(target)
        GPUResourceManagerV01(pool).reset_resources()
    assert {os.readlink(path) for path in pool.parent.glob("*.corrupt-*")} == {"a", "b", "c"}


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


def test_directory_in_the_place_of_the_file_is_refused_and_never_moved(pool: Path) -> None:
    make_directory(pool)
    (pool / "somebody's file").touch()
    manager = GPUResourceManagerV01(pool, lock_timeout_s=1)
    for ask in (lambda: manager.allocate_resources("task", 2, 1), manager.get_resource_summary):
        with pytest.raises(StateFileError, match="GPU_RESOURCE_FILE"):
            ask()
    with pytest.raises(StateFileError, match="GPU_RESOURCE_FILE"):
        manager.reset_resources()
    assert os.listdir(pool) == ["somebody's file"]


@pytest.mark.parametrize("make", [make_dangling_link, make_link_loop, make_fifo])
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


# --- Where the state lies -------------------------------------------------------------------------


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


def test_failure_behind_a_link_names_the_place_where_it_happened(pool: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    GPUResourceManagerV01(real / "pool.json")
    pool.symlink_to(real / "pool.json")
    (real / ".pool.json.tmp").mkdir()
    with pytest.raises(StateFileError, match=str(real / ".pool.json.tmp")):
        GPUResourceManagerV01(pool).allocate_resources("task", 2, 1)


@pytest.mark.parametrize("value", ["a\0b", b"bytes", 3.5])
def test_resource_file_that_is_no_path_is_refused(value: Any) -> None:
    with pytest.raises((InvalidRequestError, TypeError)):
        GPUResourceManagerV01(value)


def test_default_file_lies_beside_the_module_and_can_be_named(
    made_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module_file = Path(GPUResourceManagerV01.RESOURCE_FILE)
    assert module_file.name == "resource_status.json"
    assert (module_file.parent / "gpu_resource_manager_v01.py").exists()
    assert GPUResourceManagerV01().resource_file == str(made_pool), "the environment variable names it"
    assert GPUResourceManagerV01(tmp_path / "mine.json").resource_file == str(tmp_path / "mine.json")
    monkeypatch.chdir(tmp_path)
    relative = GPUResourceManagerV01("relative.json")
    monkeypatch.chdir("/")
    assert relative.allocate_resources("task", 2, 1)
    assert running(tmp_path / "relative.json") == ["task"]


def test_relative_argument_in_a_vanished_directory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vanished = tmp_path / "vanished"
    vanished.mkdir()
    monkeypatch.chdir(vanished)
    vanished.rmdir()
    with pytest.raises(StateFileError, match=r"relative\.json"):
        GPUResourceManagerV01("relative.json")


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


@pytest.mark.parametrize("exists", [True, False])
def test_change_through_a_link_to_a_directory_stays_in_the_pool_that_it_has_locked(
    tmp_path: Path, exists: bool
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        if exists or name == "b":
            GPUResourceManagerV01(tmp_path / name / "pool.json").allocate_resources(f"job-{name}", 2, 1)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    store = open_store(str(tmp_path / "link" / "pool.json"), 1)

    def change(state: State) -> None:
        """Somebody points the link at another pool in the middle of the change."""
        (tmp_path / "new").symlink_to(tmp_path / "b")
        (tmp_path / "new").rename(tmp_path / "link")
        place(state["servers"][1], "late", 2, 1, timestamp())

    store.update(change, new_state())
    assert running(tmp_path / "a" / "pool.json") == ["job-a"] * exists + ["late"]
    assert running(tmp_path / "b" / "pool.json") == ["job-b"], "whose lock nobody held"
