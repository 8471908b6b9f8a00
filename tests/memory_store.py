"""A store in memory: the least that keeps the contract of ``Store``, for its tests and as a pattern."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import TypeVar

from gpu_resource_manager_v01 import (
    NoPoolError,
    State,
    StateFileError,
    Store,
    UnusableStateFileError,
    decode_state,
    encode_state,
    timestamp,
)

T = TypeVar("T")


class MemoryStore(Store):
    """One document as bytes, so that whoever reads it gets a copy; gone with the process."""

    def __init__(self, lease_directory: str) -> None:
        self.path, self.lease_directory = "memory", lease_directory
        self.document: bytes | None = None
        self.kept_aside: list[bytes] = []
        self._changes, self._lock = 0, threading.Lock()

    def create(self, state: State) -> None:
        with self._lock:
            if self.document is None:
                self._write({**state, "last_updated": timestamp()})

    def read(self) -> State:
        try:
            return decode_state(self._found())
        except ValueError as error:
            raise UnusableStateFileError(self.path, str(error)) from error

    def update(self, change: Callable[[State], T], instead_of_unusable: State | None = None) -> T:
        with self._lock:
            before: State | None = None
            try:
                before, state = self.read(), self.read()
            except UnusableStateFileError:
                if instead_of_unusable is None:
                    raise
                state = copy.deepcopy(instead_of_unusable)
            state["last_updated"] = timestamp()
            result = change(state)
            if before is None and self.document is not None:
                self.kept_aside.append(self.document)
            if before is None or state != {**before, "last_updated": state["last_updated"]}:
                self._write(state)
            return result

    def version_mark(self) -> object:
        self._found()
        return self._changes

    def _found(self) -> bytes:
        if self.document is None:
            raise NoPoolError(self.path, "there is no document", "see create")
        return self.document

    def _write(self, state: State) -> None:
        try:
            self.document = encode_state(state)
        except ValueError as error:
            raise StateFileError(self.path, str(error), "see encode_state") from error
        self._changes += 1
