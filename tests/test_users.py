"""Several Unix users of one pool: who may read and write its files, and what a rewrite keeps of that."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import ALICE, BOB, BOTH_FILES, LAB, STRANGER, Children, become, names, running
from syscalls import at_call, intercepted

from gpu_resource_manager_v01 import GPUResourceManagerV01, StateFileError

# --- Sharing a pool -------------------------------------------------------------------------------


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


# --- What a rewrite keeps -------------------------------------------------------------------------


def access(pool: Path) -> tuple[int, int, int]:
    found = os.stat(pool)
    return found.st_uid, found.st_gid, found.st_mode & 0o7777


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o000])
def test_rewrite_in_a_directory_of_ones_own_keeps_the_permission_bits(
    lab: Path, mode: int, umask: int, children: Children
) -> None:
    lab.chmod(0o755)
    pool = lab / "resource_status.json"

    def alice() -> None:
        become(ALICE, [LAB], umask)
        manager = GPUResourceManagerV01(pool)
        pool.chmod(mode)
        for number in range(2):
            assert manager.allocate_resources(f"task-{number}", 2, 1)
        assert manager.release_resources("task-0")
        assert manager.reset_resources()

    assert children.run(alice) == 0
    assert access(pool) == (ALICE, ALICE, mode)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_reset_of_a_damaged_file_keeps_the_permission_bits(lab: Path, mode: int, children: Children) -> None:
    lab.chmod(0o755)
    pool = lab / "resource_status.json"

    def alice() -> None:
        become(ALICE, [LAB], 0o022)
        pool.write_bytes(b"not JSON")
        pool.chmod(mode)
        assert GPUResourceManagerV01(pool).reset_resources()
        assert running(pool) == []

    assert children.run(alice) == 0
    assert access(pool) == (ALICE, ALICE, mode)
    [kept] = lab.glob("*.corrupt-*")
    assert access(kept) == (ALICE, ALICE, mode)


def test_rewrite_keeps_the_group_that_somebody_gave_the_file(lab: Path, children: Children) -> None:
    lab.chmod(0o755)
    pool = lab / "resource_status.json"

    def alice() -> None:
        become(ALICE, [LAB], 0o077)
        manager = GPUResourceManagerV01(pool)
        os.chown(pool, -1, LAB)
        pool.chmod(0o640)
        assert manager.allocate_resources("task", 2, 1)

    assert children.run(alice) == 0
    assert access(pool) == (ALICE, LAB, 0o640)


@pytest.mark.parametrize(("directory", "mode"), [(0o755, 0o600), (0o755, 0o640), (0o700, 0o644), (0o2770, 0o660)])
def test_root_that_rewrites_the_file_of_another_user_leaves_it_theirs(
    lab: Path, directory: int, mode: int, children: Children
) -> None:
    lab.chmod(directory)
    pool = lab / "resource_status.json"

    def alice() -> None:
        become(ALICE, [LAB], 0o022)
        GPUResourceManagerV01(pool)
        pool.chmod(mode)

    assert children.run(alice) == 0
    before = access(pool)
    assert before[0] == ALICE and before[2] == mode
    manager = GPUResourceManagerV01(pool)
    assert manager.allocate_resources("of-root", 2, 1)
    assert access(pool) == before
    pool.write_bytes(b"not JSON")
    assert manager.reset_resources()
    assert access(pool) == before

    def alice_again() -> None:
        become(ALICE, [LAB], 0o022)
        assert GPUResourceManagerV01(pool).allocate_resources("hers", 2, 1)

    assert children.run(alice_again) == 0


@pytest.mark.parametrize(
    ("directory", "mode", "expected"),
    [
        (0o2770, 0o600, 0o660),  # what is shared with the group is added,
        (0o2770, 0o664, 0o660),  # others get no more than the directory gives them,
        (0o2770, 0o606, 0o660),
        (0o2775, 0o664, 0o664),
        (0o2775, 0o604, 0o664),
        (0o2775, 0o666, 0o664),
        (0o2775, 0o660, 0o660),  # and what was taken from them stays taken
        (0o2771, 0o664, 0o660),
        (0o2777, 0o666, 0o666),
        (0o770, 0o600, 0o660),
    ],
)
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_rewrite_in_a_directory_that_the_group_may_write_shares_the_file_with_it(
    lab: Path, directory: int, mode: int, expected: int, umask: int, children: Children
) -> None:
    lab.chmod(directory)
    pool = lab / "resource_status.json"

    def alice() -> None:
        become(ALICE, [LAB], umask)
        manager = GPUResourceManagerV01(pool)
        pool.chmod(mode)
        assert manager.allocate_resources("task", 2, 1)

    assert children.run(alice) == 0
    assert access(pool) == (ALICE, LAB, expected)


def test_rewrite_by_another_user_of_the_group_keeps_the_bits_though_not_the_owner(
    lab: Path, children: Children
) -> None:
    lab.chmod(0o2775)
    pool = lab / "resource_status.json"

    def alice() -> None:
        become(ALICE, [LAB], 0o022)
        GPUResourceManagerV01(pool)
        pool.chmod(0o660)

    def bob() -> None:
        become(BOB, [LAB], 0o077)
        assert GPUResourceManagerV01(pool).allocate_resources("task", 2, 1)

    assert children.run(alice) == 0
    assert children.run(bob) == 0
    assert access(pool) == (BOB, LAB, 0o660), "a file can be given away by root only"
