"""A wait for a lock in the kernel's queue, imported by the first that has to wait.

Among those who poll for a lock, whoever has just released it gets it again, and they cost more than the work itself.
"""

from __future__ import annotations

import _thread
import fcntl
import os
import time
from contextlib import suppress

_abandoned: set[int] = set()  # descriptors of waits that were given up: a thread still stands in a queue with each


def lock_in_queue(descriptor: int, deadline_s: float) -> bool:
    """Wait for the lock of an open file; tell whether we have it by ``deadline_s`` of the monotonic clock.

    The kernel's queue knows no time limit, so a thread stands in it, with a descriptor of its own for the same lock.
    As long as one that was given up still stands there, the answer is ``False`` at once: who tries again and again
    behind a stopped process must not collect threads.
    """
    if _abandoned:
        return False
    own, failures = os.dup(descriptor), list[OSError]()
    decided, answered = _thread.allocate_lock(), _thread.allocate_lock()
    answered.acquire()

    def stand_in_queue() -> None:
        try:
            fcntl.flock(own, fcntl.LOCK_EX)
        except OSError as error:
            failures.append(error)
        if decided.acquire(blocking=False):  # before the wait was given up
            answered.release()
        else:
            _abandoned.discard(own)
            with suppress(OSError):  # by name, for a forked child shares the lock through its copy of the descriptor
                fcntl.flock(own, fcntl.LOCK_UN)
        os.close(own)

    try:
        _thread.start_new_thread(stand_in_queue, ())
    except RuntimeError:  # no thread for us
        os.close(own)
        return False
    try:
        # In slices, for a signal that comes just ahead of such a wait does not end it.
        while not answered.acquire(timeout=max(0, min(1, deadline_s - time.monotonic()))):
            if time.monotonic() >= deadline_s:
                break
    finally:
        _abandoned.add(own)  # ahead of the decision, after which the thread may discard it
        given_up = decided.acquire(blocking=False)
        if not given_up:
            _abandoned.discard(own)
    if failures:
        raise failures[0]
    return not given_up
