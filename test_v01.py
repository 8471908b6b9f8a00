#!/usr/bin/env python3
"""The fifteen tests of the specification: ``python test_v01.py``.

Every test has a pool in a temporary directory of its own. Everything deeper is under ``tests/``.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import sys
import tempfile
import unittest
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from gpu_resource_manager_v01 import (
    DuplicateTaskError,
    GPUResourceManagerV01,
    InvalidRequestError,
    UnusableStateFileError,
)

os.environ.pop("GPU_RESOURCE_LANG", None)  # the texts looked at are the Japanese ones

PROCESSES = 4
#: seconds after which processes that wait for each other give up; nothing is ever measured against it
GUARD_S = 60.0


def allocate_small_tasks(resource_file: str, prefix: str, count: int) -> list[tuple[int, int]]:
    """Ask for ``count`` tasks of two GPUs each and return every ``(server_id, gpu_id)`` that was granted."""
    manager = GPUResourceManagerV01(resource_file)
    asked = [manager.allocate_resources(f"{prefix}-{number}", 2, 1) for number in range(count)]
    return [(granted["server_id"], gpu_id) for granted in asked if granted for gpu_id in granted["gpu_ids"]]


class TestGPUResourceManagerV01(unittest.TestCase):
    """What the class promises to someone who uses it for the first time."""

    def __str__(self) -> str:
        """Name a test as the specification's screen does, whatever the Python version."""
        return f"{self._testMethodName} ({type(self).__module__}.{type(self).__qualname__})"

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.resource_file = os.path.join(directory.name, "resource_status.json")
        self.manager = GPUResourceManagerV01(resource_file=self.resource_file)

    def stored(self) -> Any:
        """Return the document as another program would read it."""
        with open(self.resource_file, encoding="utf-8") as file:
            return json.load(file)

    def allocate(
        self, task_id: str, gpus: int, cpus: int, prefer_server_id: int | None = None
    ) -> tuple[int, list[int]]:
        """Allocate what must be granted and return the server and the GPUs."""
        allocation = self.manager.allocate_resources(task_id, gpus, cpus, prefer_server_id)
        if allocation is None:
            self.fail(f"no room for {task_id}")
        return allocation["server_id"], allocation["gpu_ids"]

    def test_01_init(self) -> None:
        """Construction makes an idle pool of four servers, and never overwrites one that exists."""
        document = self.stored()
        self.assertEqual(document["version"], "0.1")
        self.assertEqual(
            [server["server_name"] for server in document["servers"]], [f"gpu-server-{i}" for i in range(4)]
        )
        for server_id, server in enumerate(document["servers"]):
            self.assertEqual(server["server_id"], server_id)
            self.assertEqual((server["total_gpus"], server["available_gpus"]), (8, [0, 1, 2, 3, 4, 5, 6, 7]))
            self.assertEqual((server["total_cpus"], server["available_cpus"]), (64, 64))
            self.assertEqual(server["running_tasks"], [])
        self.allocate("kept", 2, 1)
        before = self.stored()
        GPUResourceManagerV01(resource_file=self.resource_file)
        self.assertEqual(self.stored(), before)

    def test_02_allocate_success(self) -> None:
        """A task gets what it asked for, and that is on disk when the call returns."""
        allocation = self.manager.allocate_resources("my_task_001", 4, 32)
        self.assertEqual(
            allocation,
            {
                "task_id": "my_task_001",
                "server_id": 0,
                "server_name": "gpu-server-0",
                "gpu_ids": [0, 1, 2, 3],
                "gpu_devices": "0,1,2,3",
                "cpu_count": 32,
            },
        )
        server = self.stored()["servers"][0]
        self.assertEqual((server["available_gpus"], server["available_cpus"]), ([4, 5, 6, 7], 32))
        (task,) = server["running_tasks"]
        self.assertRegex(task.pop("start_time"), r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d$")
        self.assertEqual((task["task_id"], task["allocated_gpus"]), ("my_task_001", [0, 1, 2, 3]))
        self.assertEqual((task["allocated_cpus"], task["uid"]), (32, os.getuid()))

    def assert_refused(self, parameter: str, task_id: Any, gpus: Any, cpus: Any, prefer: Any = None) -> None:
        """The request raises, the error knows what was wrong, and the state file stays as it is."""
        before = self.stored()
        with self.assertRaises(InvalidRequestError, msg=repr((task_id, gpus, cpus, prefer))) as refusal:
            self.manager.allocate_resources(task_id, gpus, cpus, prefer)
        self.assertIsInstance(refusal.exception, ValueError)
        self.assertEqual(refusal.exception.parameter, parameter)
        self.assertEqual(self.stored(), before)

    def test_03_allocate_invalid_gpus(self) -> None:
        """2 to 8 GPUs can be asked for, and only as an ``int``."""
        for gpus in (-1, 0, 1, 9, 10**30, True, 4.0, "4", None, [4]):
            self.assert_refused("required_gpus", "task", gpus, 8)
        self.assertEqual(self.allocate("least", 2, 8), (0, [0, 1]))
        self.assertEqual(self.allocate("most", 8, 8), (1, [0, 1, 2, 3, 4, 5, 6, 7]))

    def test_04_allocate_invalid_cpus(self) -> None:
        """1 to 64 CPUs can be asked for, and only as an ``int``; likewise the other parameters."""
        for cpus in (-1, 0, 65, 10**30, True, 8.0, "8", None, [8]):
            self.assert_refused("required_cpus", "task", 2, cpus)
        for task_id in ("", " ", "x" * 129, "a\nb", "-task", "\ud800", None, 1, b"task"):
            self.assert_refused("task_id", task_id, 2, 8)
        for server_id in (-1, 4, True, 1.0, "1"):
            self.assert_refused("prefer_server_id", "task", 2, 8, server_id)
        self.assertEqual(self.allocate("least", 2, 1), (0, [0, 1]))
        self.assertEqual(self.allocate("most", 2, 64), (1, [0, 1]))

    def test_05_allocate_multiple(self) -> None:
        """Tasks fill the servers in their order, the lowest free GPUs first, one task per identifier."""
        self.assertEqual(self.allocate("a", 4, 16), (0, [0, 1, 2, 3]))
        self.assertEqual(self.allocate("b", 2, 16), (0, [4, 5]))
        self.assertEqual(self.allocate("c", 4, 16), (1, [0, 1, 2, 3]))
        self.assertEqual(self.allocate("d", 2, 32), (0, [6, 7]))
        self.assertEqual(self.allocate("e", 2, 1), (1, [4, 5]))
        self.assert_refused("task_id", "c", 2, 1)
        with self.assertRaises(DuplicateTaskError):
            self.manager.allocate_resources("c", 2, 1)

    def test_06_allocate_insufficient_resources(self) -> None:
        """No room now is ``None``, the reason is logged, and the state file stays as it is."""
        for server_id in range(4):
            self.allocate(f"half-{server_id}", 4, 63, prefer_server_id=server_id)
        before = self.stored()
        for gpus, cpus, short in ((5, 1, "GPU 1 個"), (4, 2, "CPU 1 個"), (8, 64, "GPU 4 個・CPU 63 個")):
            with self.assertLogs("gpu_resource_manager_v01", "WARNING") as logs:
                self.assertIsNone(self.manager.allocate_resources("late", gpus, cpus))
            self.assertIn(f"gpu-server-3: {short}不足", logs.output[0])
        self.assertEqual(self.stored(), before)
        self.assertEqual(self.allocate("fits", 4, 1), (0, [4, 5, 6, 7]))

    def test_07_release_success(self) -> None:
        """A released task leaves no trace, and its identifier can be used again."""
        before = self.stored()["servers"]
        self.allocate("task", 4, 32)
        self.assertIs(self.manager.release_resources("task"), True)
        self.assertEqual(self.stored()["servers"], before)
        self.assertEqual(self.allocate("task", 4, 32), (0, [0, 1, 2, 3]))

    def test_08_release_nonexistent(self) -> None:
        """An unknown task, or one released already, is ``False`` and changes nothing."""
        self.allocate("task", 2, 1)
        self.allocate("other", 2, 1)
        self.manager.release_resources("task")
        before = self.stored()
        for task_id in ("task", "Other", "nobody"):
            with self.assertLogs("gpu_resource_manager_v01", "WARNING") as logs:
                self.assertIs(self.manager.release_resources(task_id), False)
            self.assertIn(task_id, logs.output[0])
        self.assertEqual(self.stored(), before)

    def test_09_release_order(self) -> None:
        """Released in any order, GPUs are available in ascending order and given out from the lowest."""
        for task_id in "abcd":
            self.allocate(task_id, 2, 8)
        for task_id, available in (("c", [4, 5]), ("a", [0, 1, 4, 5]), ("d", [0, 1, 4, 5, 6, 7])):
            self.manager.release_resources(task_id)
            self.assertEqual(self.stored()["servers"][0]["available_gpus"], available)
        self.assertEqual(self.allocate("e", 3, 8), (0, [0, 1, 4]))

    def test_10_resource_summary(self) -> None:
        """The summary counts the pool and every server."""
        self.allocate("a", 4, 32)
        self.allocate("b", 3, 8)
        self.allocate("c", 8, 64, prefer_server_id=2)
        summary = self.manager.get_resource_summary()
        servers = summary["servers"]
        self.assertEqual(
            {key: value for key, value in summary.items() if key != "servers"},
            {
                "total_servers": 4,
                "total_gpus": 32,
                "total_available_gpus": 17,
                "total_cpus": 256,
                "total_available_cpus": 152,
                "total_running_tasks": 3,
            },
        )
        self.assertEqual(
            servers[0],
            {
                "server_id": 0,
                "server_name": "gpu-server-0",
                "total_gpus": 8,
                "available_gpus": 1,
                "gpu_utilization": "87.5%",
                "total_cpus": 64,
                "available_cpus": 24,
                "cpu_utilization": "62.5%",
                "running_tasks": 2,
            },
        )
        self.assertEqual([server["gpu_utilization"] for server in servers], ["87.5%", "0.0%", "100.0%", "0.0%"])

    def test_11_detailed_status(self) -> None:
        """The detailed status is the document of the state file, and a private copy of it."""
        self.allocate("task", 2, 8, prefer_server_id=3)
        status = self.manager.get_detailed_status()
        self.assertEqual(status, self.stored())
        self.assertEqual([len(server["running_tasks"]) for server in status["servers"]], [0, 0, 0, 1])
        status["servers"].clear()
        self.assertEqual(self.manager.get_detailed_status(), self.stored())

    def test_12_reset(self) -> None:
        """A reset forgets every task, and makes a damaged file anew without losing the old one."""
        idle = self.stored()["servers"]
        for number in range(6):
            self.allocate(f"task-{number}", 4, 16)
        self.assertIs(self.manager.reset_resources(), True)
        self.assertEqual(self.stored()["servers"], idle)
        with open(self.resource_file, "w", encoding="utf-8") as file:
            file.write('{"servers": [')
        with self.assertRaises(UnusableStateFileError):
            self.manager.get_resource_summary()
        with self.assertLogs("gpu_resource_manager_v01", "WARNING"):
            self.assertIs(self.manager.reset_resources(), True)
        self.assertEqual(self.stored()["servers"], idle)
        directory, name = os.path.split(self.resource_file)
        (aside,) = [entry for entry in os.listdir(directory) if entry.startswith(f"{name}.corrupt-")]
        with open(os.path.join(directory, aside), encoding="utf-8") as file:
            self.assertEqual(file.read(), '{"servers": [')

    def test_13_concurrent_simulation(self) -> None:
        """Processes that start at once and ask for twice the pool share it: every GPU is given once."""
        context = multiprocessing.get_context("spawn")
        start = context.Barrier(PROCESSES)
        with ProcessPoolExecutor(PROCESSES, context, initializer=start.wait, initargs=(GUARD_S,)) as executor:
            work = [executor.submit(allocate_small_tasks, self.resource_file, f"p{n}", 8) for n in range(PROCESSES)]
            granted = [gpu for future in work for gpu in future.result(GUARD_S)]
        self.assertEqual(sorted(granted), [(server_id, gpu_id) for server_id in range(4) for gpu_id in range(8)])
        summary = self.manager.get_resource_summary()
        self.assertEqual((summary["total_available_gpus"], summary["total_running_tasks"]), (0, 16))

    def test_14_prefer_server(self) -> None:
        """A preferred server is tried first; one without room falls back to First Fit."""
        self.assertEqual(self.allocate("a", 4, 8, prefer_server_id=2), (2, [0, 1, 2, 3]))
        self.assertEqual(self.allocate("b", 6, 8, prefer_server_id=2), (0, [0, 1, 2, 3, 4, 5]))
        self.assertEqual(self.allocate("c", 2, 57, prefer_server_id=2), (1, [0, 1]))
        self.assertEqual(self.allocate("d", 4, 56, prefer_server_id=2), (2, [4, 5, 6, 7]))
        self.assertEqual(self.allocate("e", 2, 8), (0, [6, 7]))

    def test_15_gpu_devices_format(self) -> None:
        """``gpu_devices`` can be given to ``CUDA_VISIBLE_DEVICES`` as it is."""
        for task_id, gpus, devices in (
            ("a", 2, "0,1"),
            ("b", 3, "2,3,4"),
            ("c", 3, "5,6,7"),
            ("d", 8, "0,1,2,3,4,5,6,7"),
        ):
            allocation = self.manager.allocate_resources(task_id, gpus, 1)
            self.assertEqual(allocation and allocation["gpu_devices"], devices)
        self.manager.release_resources("b")
        self.manager.release_resources("a")
        self.allocate("e", 2, 1)
        self.manager.release_resources("c")
        allocation = self.manager.allocate_resources("f", 4, 1)
        self.assertEqual(allocation and allocation["gpu_devices"], "2,3,4,5")


def main() -> int:
    """Run the tests, show the specification's summary, and return the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a legacy encoding may lack ✓
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(TestGPUResourceManagerV01)
    # On stdout, where the summary goes: two streams could come out in another order.
    result = unittest.TextTestRunner(sys.stdout, descriptions=False, verbosity=2).run(tests)
    # A test can be in both lists, when its cleanup fails as well.
    passed = result.testsRun - len({test.id() for test, _ in result.failures + result.errors})
    verdict = "✓ すべてのテストに合格！" if result.wasSuccessful() else "✗ 合格しなかったテストがあります"
    line = "=" * 72
    print(
        f"\n{line}\nテストサマリー\n{line}\n総テスト数: {result.testsRun}\n成功: {passed}\n"
        f"失敗: {len(result.failures)}\nエラー: {len(result.errors)}\n\n{verdict}",
        flush=True,
    )
    return 0 if result.wasSuccessful() else 1


if __name__ == "__main__":
    sys.exit(main())
