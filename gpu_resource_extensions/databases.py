"""What the stores of databases have in common: the place as a URL, a change of the document, what went wrong."""

from __future__ import annotations

import copy
import errno
import os
import re
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from gpu_resource_manager_v01 import (
    MAKE_POOL,
    InvalidRequestError,
    LockTimeoutError,
    MissingPackageError,
    NoPoolError,
    State,
    StateFileError,
    Store,
    UnusableStateFileError,
    decode_state,
    encode_state,
    log,
    printable,
    say,
    timestamp,
)

T = TypeVar("T")
C = TypeVar("C", bound="Countdown")
TICK_S, SPARE_S, PAUSE_S = 0.1, 1.0, 0.2  # of a countdown; for the server's own word; between two connections
SILENT_S = 3.0  # after which people are told that there is no connection
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

NO_REDIS_URL = "が Redis の URL として読めません", "redis://USER:PASSWORD@HOST:PORT/NUMBER の形で指定してください"
UNSAFE_REDIS = "サーバーの設定では、行った変更が失われることがあります ({})"
FEW_REPLICAS = "{} 台の複製 (replica) による確認がありません"
REDIS_TLS = "CERTIFICATE|WRONG_VERSION|alert"
_REDIS_REMEDIES = {
    REDIS_TLS: "URL の redis:// か rediss:// か、証明書の指定 (ssl_ca_certs など) を確認してください",
    "DataError": (
        "appendonly yes、appendfsync always、no-appendfsync-on-rewrite no、maxmemory-policy noeviction と設定し、"
        "CONFIG GET を許可してください。失われてもよければ URL に ?unsafe=1 を付けてください"
    ),
    "Authentication|Authorization|NoPerm|NOPERM": "URL のユーザー名とパスワード、サーバーの ACL を確認してください",
    "ReadOnly|READONLY": "複製 (replica) ではなく、プライマリの URL を指定してください",
    "OutOfMemory|OOM|MISCONF": "サーバーのメモリーの上限 (maxmemory)、ディスクの空き、ログを確認してください",
    "NOREPLICAS|replica": "複製 (replica) が動いているか、サーバーの min-replicas-to-write が正しいか確認してください",
    "Moved|Ask|ClusterDown|CrossSlot": "Redis Cluster には対応していません。単独のサーバーの URL を指定してください",
    "": "Redis が動いているか、URL (rediss:// なら TLS) が正しいか確認してください",
}
SILENT = "サーバーの応答がありません"
_RETRYING = "データベースに接続できません。再試行しています: {}"

NO_POSTGRESQL_URL = "が PostgreSQL の URL として読めません", "postgresql://USER@HOST/DATABASE の形で指定してください"
# A connection that is refused has no code for us, only a text; for these it is not tried again.
POSTGRESQL_REFUSED = "authentication|password|pg_hba|(role|database) .* not |of service|support SSL|certificate"
POSTGRESQL_REMEDIES = {
    "authentication|password|pg_hba|role .* not ": (
        "URL のユーザー名、パスワード (~/.pgpass など)、サーバーの pg_hba.conf を確認してください"
    ),
    "of service|service file": "URL の service の名前と、service ファイルを読む権限を確認してください",
    "database .* not ": "URL のデータベース名を確認し、まだなければ createdb で作ってください",
    "support SSL|certificate": "URL の sslmode と sslrootcert、サーバーの TLS の設定を確認してください",
    "InsufficientPrivilege|permission denied": (
        "テーブルを読み書きする権限 (--init には CREATE も) を、管理者に頼んでください"
    ),
    "DiskFull": "データベースのサーバーのディスクの空き容量を増やしてから再実行してください",
    "Untranslatable": "ENCODING 'UTF8' のデータベースを使ってください",
    "ReadOnly|read-only": (
        "書き込めるサーバー (primary) を URL に加え、target_session_attrs=read-write を指定してください"
    ),
    "TooMany|too many|slots": "サーバーの max_connections を増やすか、しばらくしてから再実行してください",
    "": "データベースのサーバーが動いているか、URL のホスト名とポート番号が正しいか確認してください",
}


class DatabaseBusyError(LockTimeoutError):
    """Locking: other changes took longer than the ``timeout_s`` that we were told to wait."""

    template = (
        "ロック取得タイムアウト\n  {path} の変更を {timeout_s:g} 秒待ちましたが、別のプロセスが使用中です\n"
        "  対処: しばらくして再実行してください"
    )

    def __init__(self, path: str, timeout_s: float) -> None:
        self.path, self.timeout_s = path, timeout_s


class DriverNeededError(MissingPackageError):
    """Asking: the package that speaks to the database is missing or too old; nothing was touched."""

    template = (
        "データベースに必要なパッケージを読み込めません: {reason}\n"
        '  対処: この Python ({python}) に pip install "{package}" でインストールしてください'
    )

    def __init__(self, package: str, error: ImportError) -> None:
        super().__init__(error)
        self.package = package


class Countdown:
    """The time that a verb has while the block runs; none of it passes while this process is stopped.

    A thread counts it, and then shuts down the connection to a server that says nothing at all: to cancel what waits
    there could leave a change made where a standby should have confirmed it.
    """

    def __init__(self, limit_s: float) -> None:
        self.left_s, self._spent_s, self._has_told = limit_s, 0.0, False
        self._done = threading.Event()
        self._line: socket.socket | None = None

    def __enter__(self: C) -> C:
        try:
            threading.Thread(target=self._count, daemon=True).start()
        except RuntimeError as error:  # too many
            raise OSError(errno.EAGAIN, str(error)) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    @property
    def is_cut(self) -> bool:
        """Whether connections are shut down by now."""
        return self.left_s < -SPARE_S

    @contextmanager
    def watching(self, descriptor: int) -> Iterator[None]:
        """Shut down the connection with this descriptor should the time be over before the block is left."""
        with socket.socket(fileno=os.dup(descriptor)) as self._line:
            yield

    def pause(self, error: Exception) -> bool:
        """Wait a moment ahead of another connection, for one was lost; ``False`` if the time is over."""
        if self.left_s <= 0:
            return False
        if self._spent_s > SILENT_S and not self._has_told:
            log().warning(say(_RETRYING, reason(error)))
            self._has_told = True
        time.sleep(PAUSE_S)
        return True

    def _count(self) -> None:
        while not self._done.wait(TICK_S):
            self.left_s, self._spent_s = self.left_s - TICK_S, self._spent_s + TICK_S
            if self.is_cut and self._line:
                with suppress(OSError):  # it has just been closed
                    self._line.shutdown(socket.SHUT_RDWR)


@contextmanager
def needed(package: str) -> Iterator[None]:
    """Import in this block what ``pip`` knows as ``package``."""
    try:
        yield
    except ImportError as error:
        raise DriverNeededError(package, error) from error


def open_database(place: str, lock_timeout_s: float) -> Store:
    """Return the store of the pool in the database at ``place``, a URL."""
    scheme = place.partition("://")[0].lower()
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
    if "@" in parameters:  # a password with a question mark in it
        host = "…"
    name = user.partition(":")[0]
    return f"{scheme}://{name}{at if name else ''}{host}"


def lease_directory() -> str:
    """Return where the leases of this machine lie."""
    for directory in LEASE_DIRECTORIES[:-1]:
        if os.path.isdir(directory) and os.stat(directory).st_mode & 0o1777 == stat.S_ISVTX | 0o777:
            return directory
    return LEASE_DIRECTORIES[-1]


def no_pool(path: str) -> NoPoolError:
    """Return the error of a pool that is not there."""
    return NoPoolError(path, say(_NOTHING_THERE), say(MAKE_POOL))


def decoded(path: str, document: str | None) -> State:
    """Return the checked ``document`` of the pool at ``path``; ``None`` is a pool that is not there."""
    if document is None:
        raise no_pool(path)
    try:
        return decode_state(document.encode("utf-8", "surrogateescape"))
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
) -> tuple[T, str | None, bool]:
    """Apply ``change`` to the text of a document as ``Store.update`` says it.

    :returns: what ``change`` returns; the text of the new document, or ``None`` if there is nothing to write; and
        whether the old one was of no use and is to be kept aside.
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
        return result, None, False
    try:
        return result, encode_state(state, before).decode("utf-8"), before is None and document is not None
    except ValueError as error:
        raise StateFileError(path, say(_UNWRITABLE[0], error), say(_UNWRITABLE[1])) from error


def warn_of_aside(place: str) -> None:
    """Say where an unusable document was kept aside."""
    log().warning(say("使えない状態ファイルを %s に保存し、作り直しました"), place)


def reason(error: object) -> str:
    """Return the text of an error such that it does no harm to a screen.

    What Redis does not understand it repeats, and that may be a password.
    """
    return printable(" ".join(str(error).split()).partition(", with args")[0])


def failed(path: str, error: Exception, remedies: dict[str, str]) -> StateFileError:
    """Return our error for one of a driver; its class and text, on one line, choose the remedy."""
    text = reason(error)
    remedy = next(remedy for kind, remedy in remedies.items() if re.search(kind, f"{type(error).__name__} {text}"))
    return StateFileError(path, text, say(remedy))


def redis_failed(path: str, error: Exception) -> StateFileError:
    """Return our error for one of redis-py."""
    return failed(path, error, _REDIS_REMEDIES)


def unconfirmed(path: str, error: object) -> StateFileError:
    """Return the error of a change of which we cannot know whether it was made."""
    return StateFileError(path, say(_UNCONFIRMED[0], reason(error)), say(_UNCONFIRMED[1]))
