"""The keeper of an Airflow task: a process of its own, which ends what the task leaves behind, however it ended. Linux.

Airflow's worker is the parent of the task. If one of the two is killed, Airflow takes the task for dead, but
processes that it has started, or the task itself, may run on. The keeper kills them, and holds the lease of the task
until the last one is gone. It is a script that needs nothing but Python.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

END_LIMIT_S = 10.0  # after which nobody waits any longer for a process that does not end when it is killed
_POLL_S = 0.05
_VARIABLE = "GPU_TASK_KEEPER"  # ties what a task starts to its keeper: others may have the same ``GPU_TASK_ID``
_KEPT = "GPU_TASK_KEPT"  # of a keeper: the ``GPU_TASK_ID`` of its task
_ENDED = b"e"  # told to the keeper: the task has ended by itself
_END_ORDER = signal.SIGURG  # to end the task; a keeper that does not listen yet is not harmed by it


@contextmanager
def kept(task_id: str, worker: int = 0, lease: int | None = None) -> Iterator[int]:
    """Let a keeper watch this process while the block runs; yield its pid. What is started in the block ends with it.

    :param task_id: of the GPUs that this process uses; by it :func:`end_tasks` finds the keeper.
    :param worker: pid of the parent that this process is not to outlive; 0: none.
    :param lease: a descriptor that the keeper is to hold too.
    """
    import subprocess

    mark, before = os.urandom(8).hex(), os.environ.get(_VARIABLE)
    # Of Airflow 3.3 and later: then those are known whose environment says nothing, too.
    group = os.getpid() if worker and os.getpgrp() == os.getpid() else 0
    keeper = subprocess.Popen(  # noqa: S603 - our own
        [sys.executable, "-I", __file__, mark, str(os.getpid()), str(worker), str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=() if lease is None else (lease,),
        start_new_session=True,  # what ends the group of the task does not end its keeper
        cwd="/",
        env={name: value for name, value in os.environ.items() if name != _VARIABLE} | {_KEPT: task_id},
    )
    os.environ[_VARIABLE] = mark
    try:
        yield keeper.pid
    finally:
        os.environ.pop(_VARIABLE)
        if before is not None:
            os.environ[_VARIABLE] = before
        with suppress(BrokenPipeError), keeper.stdin as orders:  # type: ignore[union-attr]
            orders.write(_ENDED)
        with suppress(subprocess.TimeoutExpired):
            keeper.wait(END_LIMIT_S)


def end_tasks(task_id: str) -> list[int]:
    """End the tasks that use the GPUs of ``task_id`` on this machine, and what they have started.

    Those of other users cannot be seen. Return the processes that are left when they should have ended.
    """
    deadline_s = time.monotonic() + END_LIMIT_S
    while True:
        keepers = _processes(f"{_KEPT}={task_id}".encode())
        found = keepers + _processes(f"GPU_TASK_ID={task_id}".encode())
        if not found or time.monotonic() > deadline_s:
            return found
        for pid in found:
            _kill(pid, _END_ORDER if pid in keepers else signal.SIGKILL)
        time.sleep(_POLL_S)


def _processes(variable: bytes, group: int = 0, but: int = 0) -> list[int]:
    """Return the other processes that have ``NAME=VALUE`` in their environment, or are of this process group."""
    found = []
    for pid in {int(entry) for entry in os.listdir("/proc") if entry.isdigit()} - {os.getpid(), but}:
        with suppress(OSError):
            with open(f"/proc/{pid}/stat", "rb") as file:
                state, _, its_group = file.read().rpartition(b")")[2].split()[:3]
            if state in (b"Z", b"X"):
                continue
            with open(f"/proc/{pid}/environ", "rb") as file:
                if int(its_group) == group or variable in file.read().split(b"\0"):
                    found.append(pid)
    return found


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _interrupt(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # the order is repeated
    raise KeyboardInterrupt


def _keep(mark: str, task: int, worker: int, group: int) -> None:
    """Wait for the end of the task or of its worker, or for an interrupt; end the task and what it has started."""
    its_own = None
    with suppress(ProcessLookupError, KeyboardInterrupt):  # the first: one of them has ended already
        signal.signal(_END_ORDER, _interrupt)
        its_own = os.pidfd_open(task)
        workers = [os.pidfd_open(worker)] if worker else []
        select.select([0, its_own, *workers], [], [])
    signal.signal(_END_ORDER, signal.SIG_IGN)
    os.set_blocking(0, False)
    order = b""
    with suppress(BlockingIOError):
        order = os.read(0, 1)
    if order != _ENDED and its_own is not None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(its_own, signal.SIGKILL)
    while found := _processes(f"{_VARIABLE}={mark}".encode(), group, but=task):
        for pid in found:
            _kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


if __name__ == "__main__":
    _keep(sys.argv[1], *map(int, sys.argv[2:]))
