"""Shared by all tests: the path of the project, a pool in a directory of its own, forked children."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

#: seconds after which a test that hangs is ended; nothing is ever measured against it
GUARD_S = 60


#: what lies in the directory of a pool while nobody is changing it
BOTH_FILES = [".resource.lock", "resource_status.json"]


def needed(package: str) -> Any:
    """Return a package of requirements_services.txt; where it is not installed, the test or its file is skipped."""
    __tracebackhide__ = True  # who asks is reported as the place
    return pytest.importorskip(package, reason=f"{package} is not installed, see requirements_services.txt")


def names(pool: Path) -> list[str]:
    """Return what lies in the directory of the state file ``pool``."""
    return sorted(os.listdir(pool.parent))


def running(pool: Path) -> list[str]:
    """Return the tasks of the state file ``pool``, which must be valid."""
    from gpu_resource_manager_v01 import decode_state

    state = decode_state(pool.read_bytes())
    return [task["task_id"] for server in state["servers"] for task in server["running_tasks"]]


@pytest.fixture(autouse=True)
def no_real_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let even a forgotten ``resource_file=`` end up in the directory of the test, where a pool may be made."""
    from gpu_resource_manager_v01 import GPUResourceManagerV01

    monkeypatch.setattr(GPUResourceManagerV01, "MACHINE_FILE", str(tmp_path / "no-machine-file"))
    monkeypatch.setenv("GPU_RESOURCE_FILE", str(tmp_path / "resource_status.json"))
    monkeypatch.delenv("GPU_RESOURCE_LANG", raising=False)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """The path of a state file, which exists only with the fixture ``made_pool``."""
    return tmp_path / "resource_status.json"


@pytest.fixture
def made_pool(pool: Path) -> Path:
    """The same with the made-up servers in it: at a place that the environment names, only ``--init`` makes one."""
    from gpu_resource_manager_v01 import GPUResourceManagerV01

    GPUResourceManagerV01(pool)
    return pool


@pytest.fixture
def absent_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a state file that the environment names and nobody has made, alone in its directory."""
    (tmp_path / "absent").mkdir()
    path = tmp_path / "absent" / "resource_status.json"
    monkeypatch.setenv("GPU_RESOURCE_FILE", str(path))
    return path


class Children:
    """Real processes, forked from the test; a child that raises prints its traceback and exits 1."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def start(self, work: Callable[[], object]) -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(GUARD_S)
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        self.pids.append(pid)
        return pid

    def wait(self, pid: int) -> int:
        """Return the exit code, or minus the signal, as ``subprocess`` does."""
        _, status = os.waitpid(pid, 0)
        self.pids.remove(pid)
        return os.waitstatus_to_exitcode(status)

    def run(self, work: Callable[[], object]) -> int:
        return self.wait(self.start(work))


@pytest.fixture
def children() -> Iterator[Children]:
    family = Children()
    yield family
    for pid in family.pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


#: users, and the group of the first two
ALICE, BOB, STRANGER, LAB = 61001, 61002, 61003, 61100


@pytest.fixture
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory that every user can reach; the fixture ``tmp_path`` is for its owner only."""
    if os.geteuid() != 0:
        pytest.skip("only root can become other users")
    from gpu_resource_manager_v01 import GPUResourceManagerV01

    # Now, for another user may not be able to look where it lies: what a change imports.
    GPUResourceManagerV01(tmp_path_factory.mktemp("first") / "pool").allocate_resources("task", 2, 1)
    directory = tempfile.mkdtemp()
    os.chown(directory, ALICE, LAB)
    yield Path(directory)
    shutil.rmtree(directory)


def become(uid: int, groups: list[int], umask: int) -> None:
    os.setgroups(groups)
    os.setgid(uid)  # a primary group of one's own, as Debian gives it
    os.setuid(uid)
    os.umask(umask)
