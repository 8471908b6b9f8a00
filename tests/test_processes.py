"""Many processes at once, API and CLI mixed: no GPU is given twice and no update is lost."""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from conftest import Children, names, running
from screens import cli

from gpu_resource_manager_v01 import Allocation, GPUResourceManagerV01

API_PROCESSES = 12
API_ROUNDS = 150
CLI_PROCESSES = 4
CLI_ROUNDS = 4


class Claims:
    """A second, independent witness: one file per GPU that somebody believes to hold.

    ``O_EXCL`` makes the kernel object to the second holder of a GPU, whatever the state file says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()

    def take(self, server: str, gpu_ids: list[int]) -> None:
        for gpu in gpu_ids:
            os.close(os.open(self.directory / f"{server}-{gpu}", os.O_CREAT | os.O_EXCL))

    def give_back(self, server: str, gpu_ids: list[int]) -> None:
        for gpu in gpu_ids:
            (self.directory / f"{server}-{gpu}").unlink()


def through_api(pool: Path, claims: Claims, all_released: Barrier, worker: int) -> None:
    manager = GPUResourceManagerV01(pool)
    rng = random.Random(worker)
    for number in range(API_ROUNDS):
        task_id = f"api-{worker}-{number}"
        held: Allocation | None = manager.allocate_resources(task_id, rng.randint(2, 4), rng.randint(1, 16))
        if held is None:
            continue
        claims.take(held["server_name"], held["gpu_ids"])
        claims.give_back(held["server_name"], held["gpu_ids"])
        assert manager.release_resources(task_id)
    all_released.wait()
    assert manager.allocate_resources(f"kept-{worker}", 2, 1), "16 processes with 2 GPUs each just fill the pool"


def through_cli(claims: Claims, all_released: Barrier, worker: int) -> None:
    for number in range(CLI_ROUNDS):
        task_id = f"cli-{worker}-{number}"
        result = cli("--allocate", task_id, "2", "1")
        if result.code == 1:
            continue
        assert result.code == 0, result
        detail = json.loads(Path(os.environ["GPU_RESOURCE_FILE"]).read_text("utf-8"))
        [(server, gpu_ids)] = [
            (server["server_name"], task["allocated_gpus"])
            for server in detail["servers"]
            for task in server["running_tasks"]
            if task["task_id"] == task_id
        ]
        claims.take(server, gpu_ids)
        claims.give_back(server, gpu_ids)
        assert cli("--release", task_id).code == 0
    all_released.wait()
    assert cli("--allocate", f"kept-cli-{worker}", "2", "1").code == 0


@pytest.mark.parametrize("lock_file_is_deleted_all_the_time", [False, True])
def test_sixteen_processes_never_share_a_gpu_and_lose_no_update(
    pool: Path, tmp_path: Path, children: Children, lock_file_is_deleted_all_the_time: bool
) -> None:
    claims = Claims(tmp_path / "claims")
    barrier, all_released = (get_context("fork").Barrier(API_PROCESSES + CLI_PROCESSES) for _ in range(2))

    def starting(work: Callable[[], None]) -> int:
        def wait_and_work() -> None:
            barrier.wait()
            work()

        return children.start(wait_and_work)

    pids = [starting(lambda n=n: through_api(pool, claims, all_released, n)) for n in range(API_PROCESSES)]  # type: ignore[misc]
    pids += [starting(lambda n=n: through_cli(claims, all_released, n)) for n in range(CLI_PROCESSES)]  # type: ignore[misc]
    done = threading.Event()

    def delete_lock_file() -> None:
        while not done.wait(0.001):
            with contextlib.suppress(FileNotFoundError):
                (tmp_path / ".resource.lock").unlink()

    deleter = threading.Thread(target=delete_lock_file)
    if lock_file_is_deleted_all_the_time:
        deleter.start()
    try:
        assert [children.wait(pid) for pid in pids] == [0] * len(pids)
    finally:
        done.set()
        if deleter.ident:
            deleter.join()

    kept = {f"kept-{n}" for n in range(API_PROCESSES)} | {f"kept-cli-{n}" for n in range(CLI_PROCESSES)}
    assert set(running(pool)) == kept, "every allocation that was not released, and nothing else"
    assert GPUResourceManagerV01(pool).get_resource_summary()["total_available_gpus"] == 0
    assert os.listdir(tmp_path / "claims") == []


def test_sixteen_processes_that_make_the_pool_end_with_one(pool: Path, children: Children) -> None:
    barrier = get_context("fork").Barrier(16)

    def work(number: int) -> None:
        barrier.wait()
        assert GPUResourceManagerV01(pool).allocate_resources(f"task-{number}", 2, 1)

    pids = [children.start(lambda n=n: work(n)) for n in range(16)]  # type: ignore[misc]
    assert [children.wait(pid) for pid in pids] == [0] * 16
    assert len(running(pool)) == 16
    assert names(pool) == [".resource.lock", "resource_status.json"]
