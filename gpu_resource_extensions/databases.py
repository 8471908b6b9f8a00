"""What the stores of databases have in common: the place as a URL, a change of the document, what went wrong."""

from __future__ import annotations

import copy
import os
import re
import stat
from collections.abc import Callable
from typing import Any, TypeVar

from gpu_resource_manager_v01 import (
    MAKE_POOL,
    InvalidRequestError,
    LockTimeoutError,
    NoPoolError,
    State,
    StateFileError,
    Store,
    UnusableStateFileError,
    decode_state,
    encode_state,
    say,
    timestamp,
)

T = TypeVar("T")
POLL_S = 1.0  # between two looks of a waiter: each is a connection
#: where the leases of this machine lie: the first that is there, sticky, and open to everybody
LEASE_DIRECTORIES = "/run/gpu-leases", "/run/lock", "/var/tmp"  # noqa: S108 - users cannot delete each other's files

# For InvalidRequestError: the problem, and what to do.
_NO_DATABASE = (
    "のデータベースには対応していません",
    "postgresql://、redis://、rediss:// のいずれかで始まる場所を指定してください",
)
# For StateFileError.
_UNWRITABLE = "書き込めない内容です ({})", "プールは変更していません。内容を確認してください"
_UNCONFIRMED = (
    "変更が保存されたか確認できません ({})",
    "データベースの状態を確認し、--detail で現在の状態を確かめてください",
)
_NOTHING_THERE = "データベースにプールの文書がありません"


class DatabaseBusyError(LockTimeoutError):
    """Locking: other changes took longer than the ``timeout_s`` that we were told to wait."""

    template = (
        "ロック取得タイムアウト\n  {path} の変更を {timeout_s:g} 秒待ちましたが、別のプロセスが使用中です\n"
        "  対処: しばらくして再実行してください"
    )

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path, self.timeout_s = path, timeout_s


def open_database(place: str, lock_timeout_s: float) -> Store:
    """Return the store of the pool in the database at ``place``, a URL."""
    scheme = place.partition("://")[0]
    if scheme in ("postgresql", "postgres"):
        from gpu_resource_extensions.postgresql_store import PostgreSQLStore

        return PostgreSQLStore(place, lock_timeout_s)
    if scheme in ("redis", "rediss"):
        from gpu_resource_extensions.redis_store import RedisStore

        return RedisStore(place, lock_timeout_s)
    raise InvalidRequestError("resource_file", shown(place), *_NO_DATABASE)


def shown(place: str) -> str:
    """Return a URL as screens and errors may show it: without password and parameters."""
    scheme, _, rest = place.partition("://")
    address, _, parameters = rest.partition("?")
    user, at, host = address.rpartition("@")
    if not at and "@" in parameters:  # a password with a question mark in it
        host = "…"
    return f"{scheme}://{user.partition(':')[0]}{at}{host}"


def lease_directory() -> str:
    """Return where the leases of this machine lie."""
    for directory in LEASE_DIRECTORIES[:-1]:
        if os.path.isdir(directory) and os.stat(directory).st_mode & 0o1777 == stat.S_ISVTX | 0o777:
            return directory
    return LEASE_DIRECTORIES[-1]


def decoded(path: str, document: str | None) -> State:
    """Return the checked ``document`` of the pool at ``path``; ``None`` is a pool that is not there."""
    if document is None:
        raise NoPoolError(path, say(_NOTHING_THERE), say(MAKE_POOL))
    try:
        return decode_state(document.encode("utf-8"))
    except ValueError as error:
        raise UnusableStateFileError(path, str(error)) from error


def new_document(state: State, clock_s: int) -> str:
    """Return the text of a pool that is made at the time ``clock_s`` of the store."""
    made: State = {**state, "last_updated": timestamp(), "pool": os.urandom(16).hex(), "clock": clock_s}
    return encode_state(made).decode("utf-8")


def changed(
    path: str,
    document: str | None,
    clock_s: int,
    change: Callable[[State], T],
    instead_of_unusable: State | None,
) -> tuple[T, str | None]:
    """Apply ``change`` to the text of a document as ``Store.update`` says it.

    :returns: what ``change`` returns, and the text of the new document, or ``None`` if there is nothing to write.
    """
    before: State | None = None
    try:
        before = decoded(path, document)
        state = copy.deepcopy(before)
    except UnusableStateFileError:
        if instead_of_unusable is None:
            raise
        state = copy.deepcopy(instead_of_unusable)
    known = re.search(r'"pool": "([0-9a-f]{32})"', document or "")  # in what is unusable too: its jobs live on
    state.setdefault("pool", known[1] if known else os.urandom(16).hex())
    now: Any = {"last_updated": timestamp(), "clock": clock_s}
    state.update(now)
    result = change(state)
    if before is not None and state == {**before, **now}:
        return result, None
    try:
        return result, encode_state(state, before).decode("utf-8")
    except ValueError as error:
        raise StateFileError(path, say(_UNWRITABLE[0], error), say(_UNWRITABLE[1])) from error


def unconfirmed(path: str, reason: object) -> StateFileError:
    """Return the error of a change of which we cannot know whether it was made."""
    return StateFileError(path, say(_UNCONFIRMED[0], reason), say(_UNCONFIRMED[1]))
