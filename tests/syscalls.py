"""Watch, fail or stop at the calls through which the library reaches the operating system.

Only functions of the standard library are wrapped, never our own. The wrappers stay within one
process: a test that kills or stops at a call does so in a forked child.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

#: everything that the store does to the state directory goes through these
NAMES = ["open", "close", "read", "write", "fsync", "fstat", "stat", "lstat", "readlink"]
NAMES += ["replace", "rename", "link", "unlink", "fchmod", "fchown", "listdir", "mkdir", "rmdir"]
NAMES += ["pwrite", "fork", "kill", "waitpid", "waitid", "setsid", "chdir", "dup2"]


@contextmanager
def intercepted(before: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call ``before(name, arguments)`` ahead of every such call; what it raises, the call raises."""

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            before(name, args)
            return call(*args, **kwargs)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setattr(os, name, wrap(name, getattr(os, name)))
        patch.setattr(fcntl, "flock", wrap("flock", fcntl.flock))
        yield


def recorded(work: Callable[[], object]) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the calls that ``work`` makes, in order."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    with intercepted(lambda name, args: calls.append((name, args))):
        work()
    return calls


@contextmanager
def failing(number: int, code: int, for_good: bool = False) -> Iterator[list[str]]:
    """Make call ``number`` (from 0), and if ``for_good`` all later ones too, fail with errno ``code``.

    Yields the names of the calls that failed. Closing frees the descriptor even if it fails, as
    Linux does.
    """
    failed: list[str] = []
    count = -1
    really_close = os.close

    def before(name: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        count += 1
        if count == number or (for_good and count > number):
            failed.append(name)
            if name == "close":
                really_close(args[0])
            raise OSError(code, os.strerror(code))

    with intercepted(before):
        yield failed


def at_call(number: int, action: Callable[[], None]) -> Callable[[str, tuple[Any, ...]], None]:
    """Return a ``before`` that performs ``action`` ahead of call ``number`` (from 0)."""
    count = -1

    def before(name: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        count += 1
        if count == number:
            action()

    return before
