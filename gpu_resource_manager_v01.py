"""Share the GPUs of a few servers between several people, with one JSON file and no daemon.

Two guarantees:

* no GPU is given twice, however many processes, threads and users ask at once;
* the state file is never half-written: after a crash it holds the old document or the new one.

The module reads from the ground up: constants, errors, the document (the state file *is* the data
model), the decisions (pure functions on a private copy of it), the store (the only code that locks
and writes), and at last :class:`GPUResourceManagerV01`, a thin layer over the rooms below.

    >>> from gpu_resource_manager_v01 import GPUResourceManagerV01      # doctest: +SKIP
    >>> manager = GPUResourceManagerV01()                               # doctest: +SKIP
    >>> manager.allocate_resources("my_task", 4, 32)["gpu_devices"]     # doctest: +SKIP
    '0,1,2,3'
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypedDict, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)
# A library without a handler of its own would have its warnings printed to stderr by ``logging``.
logger.addHandler(logging.NullHandler())

# --- Constants ------------------------------------------------------------------------------------

#: the only value of the document's ``version`` that this module reads and writes
FORMAT_VERSION = "0.1"
MIN_GPUS_PER_TASK = 2
MIN_CPUS_PER_TASK = 1
MAX_TASK_ID_LENGTH = 128  # characters
#: environment variable that names another state file
RESOURCE_FILE_VARIABLE = "GPU_RESOURCE_FILE"
DEFAULT_LOCK_TIMEOUT_S = 60.0
#: seconds between two attempts to take a lock; an attempt costs a few microseconds
LOCK_POLL_S = 0.001

# Characters that could move a cursor, end a line or reverse the text of a screen (C0, C1, line and
# paragraph separators, bidirectional controls), and surrogates, which no valid text holds.
_UNSAFE_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


# --- Errors: asking, locking, storing -------------------------------------------------------------


class ResourceManagerError(Exception):
    """Base of every error that this module raises on purpose.

    The text says what happened and what to do next; the facts are attributes, named by each class,
    and survive pickling because they live in ``__dict__``.
    """

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.__dict__.update(facts)


class InvalidRequestError(ResourceManagerError, ValueError):
    """Asking: a parameter is out of range or of the wrong type; nothing was touched."""

    #: name of the parameter
    parameter: str
    #: the value that was refused
    value: object


class DuplicateTaskError(InvalidRequestError):
    """Asking: a task with this identifier already runs; nothing was touched."""


class LockTimeoutError(ResourceManagerError, TimeoutError):
    """Locking: another process held the lock for longer than we were told to wait."""

    #: the lock file, to find its holder with ``fuser`` or ``lslocks``
    lock_file: str
    #: how long we waited, in seconds
    timeout_s: float


class StateFileError(ResourceManagerError):
    """Storing: the state file could not be read or written."""

    path: str
    reason: str
    remedy: str


class UnusableStateFileError(StateFileError):
    """Storing: what stands in the place of the state file cannot be used until someone resets it."""


class _DeclinedError(Exception):
    """Raised by a change that has nothing to write; it never leaves this module."""


# --- The document ---------------------------------------------------------------------------------
# Keys that are not listed here are kept through every change, at every level of the document.


class Task(TypedDict):
    """What one task holds on one server."""

    task_id: str
    #: GPU indices on the server, ascending
    allocated_gpus: list[int]
    allocated_cpus: int
    #: local time, ISO 8601 to the second
    start_time: str


class Server(TypedDict):
    """One server with what is free on it and the tasks that hold the rest."""

    server_id: int
    server_name: str
    total_gpus: int
    #: GPU indices, ascending
    available_gpus: list[int]
    total_cpus: int
    available_cpus: int
    running_tasks: list[Task]


class State(TypedDict):
    """The whole document of the state file."""

    servers: list[Server]
    #: local time, ISO 8601 to the second; information only, no decision looks at it
    last_updated: str
    version: str


def new_state(servers: int = 4, gpus: int = 8, cpus: int = 64) -> State:
    """Return a pool of ``servers`` idle servers with ``gpus`` GPUs and ``cpus`` CPUs each."""
    return {
        "servers": [
            {
                "server_id": server_id,
                "server_name": f"gpu-server-{server_id}",
                "total_gpus": gpus,
                "available_gpus": list(range(gpus)),
                "total_cpus": cpus,
                "available_cpus": cpus,
                "running_tasks": [],
            }
            for server_id in range(servers)
        ],
        "last_updated": "",
        "version": FORMAT_VERSION,
    }


def decode_state(data: bytes) -> State:
    """Return the checked document that ``data`` (UTF-8 JSON without byte order mark) holds.

    :raises ValueError: it does not hold one; the text says why.
    """
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError(f"UTF-8 として読めません ({error.start} バイト目)") from error
    except RecursionError as error:
        raise ValueError("JSON の入れ子が深すぎます") from error
    except ValueError as error:
        raise ValueError(f"JSON として読めません ({error})") from error
    check_state(document)
    state: State = document
    return state


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # NaN, Infinity, 1e400: JSON could not hold it when we write again
        raise ValueError(f"{text} は有限の数ではありません")
    return number


def encode_state(state: State) -> bytes:
    """Return ``state`` as UTF-8 JSON with one line per server, which one screen line diffs well.

    :raises ValueError: a value of an unknown key has no JSON form (an infinite number).
    """
    # Dumping server by server keeps to the C encoder: ``indent=`` would fall back to the Python one.
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    lines = [
        '"servers": [\n    ' + ",\n    ".join(map(encode, value)) + "\n  ]"
        if key == "servers" and isinstance(value, list)
        else f"{encode(key)}: {encode(value)}"
        for key, value in state.items()
    ]
    text = "{\n  " + ",\n  ".join(lines) + "\n}\n"
    # A lone surrogate in an unknown key can only stand inside a JSON string, where the escape that
    # ``backslashreplace`` makes of it is the JSON escape it was read from.
    return text.encode("utf-8", "backslashreplace")


# The keys that every document has, with their exact types.
_DOCUMENT_KEYS = {"version": str, "last_updated": str, "servers": list}
_SERVER_KEYS = {
    "server_id": int,
    "server_name": str,
    "total_gpus": int,
    "available_gpus": list,
    "total_cpus": int,
    "available_cpus": int,
    "running_tasks": list,
}
_TASK_KEYS = {"task_id": str, "allocated_gpus": list, "allocated_cpus": int, "start_time": str}


def check_state(document: Any) -> None:
    """Check types, ranges and the invariant of a decoded document; O(size of the document).

    The invariant: on every server each GPU index from 0 to ``total_gpus`` - 1 is either available or
    held by exactly one task, both lists ascending; available CPUs and the tasks' CPUs add up to
    ``total_cpus``; a ``task_id`` and a ``server_id`` occur once.

    :raises ValueError: it does not hold; the text names the place and the reason.
    """
    if type(document) is dict and document.get("version") != FORMAT_VERSION:
        raise ValueError(f"version {document.get('version')!r} には対応していません ({FORMAT_VERSION!r} のみ)")
    _check_record(document, _DOCUMENT_KEYS, "最上位")
    if not document["servers"]:
        raise ValueError("servers が空です")
    server_ids: set[int] = set()
    task_ids: set[str] = set()
    for position, server in enumerate(document["servers"]):
        where = f"servers[{position}]"
        _check_record(server, _SERVER_KEYS, where)
        if server["server_id"] in server_ids:
            raise ValueError(f"{where}: server_id {server['server_id']} が重複しています")
        server_ids.add(server["server_id"])
        gpus = server["available_gpus"][:]
        cpus = server["available_cpus"]
        for task_position, task in enumerate(server["running_tasks"]):
            spot = f"{where}.running_tasks[{task_position}]"
            _check_record(task, _TASK_KEYS, spot)
            problem = task_id_problem(task["task_id"])
            if task["task_id"] in task_ids:
                problem = f"{task['task_id']!r} が重複しています"
            if problem:
                raise ValueError(f"{spot}: task_id {problem}")
            task_ids.add(task["task_id"])
            gpus += task["allocated_gpus"]
            cpus += task["allocated_cpus"]
        # The length first: a hand-written total of 10**12 must not make us build such a list.
        if len(gpus) != server["total_gpus"] or sorted(gpus) != list(range(server["total_gpus"])):
            raise ValueError(f"{where}: GPU 0 から total_gpus - 1 までが、空きと割り当て済みに一度ずつ現れていません")
        if cpus != server["total_cpus"]:
            raise ValueError(f"{where}: 空きと割り当て済みの CPU の合計が total_cpus と一致しません")


def _check_record(record: Any, keys: dict[str, Any], where: str) -> None:
    if type(record) is not dict:
        raise ValueError(f"{where}が JSON オブジェクトではありません")
    for key, kind in keys.items():
        if key not in record:
            raise ValueError(f"{where}: {key} がありません")
        value = record[key]
        if type(value) is not kind:  # exactly: ``True`` is an int to isinstance
            raise ValueError(f"{where}: {key} の型が {kind.__name__} ではありません")
        if kind is int and value < 0:
            raise ValueError(f"{where}: {key} が負の数です ({value})")
        if kind is str and _UNSAFE_TEXT.search(value):
            raise ValueError(f"{where}: {key} に制御文字が含まれています")
        if key.endswith("_gpus") and kind is list and not _is_ascending(value):
            raise ValueError(f"{where}: {key} が 0 以上の整数の昇順リストではありません")


def _is_ascending(indices: list[Any]) -> bool:
    return all(type(index) is int for index in indices) and all(
        low < high for low, high in zip([-1, *indices], indices, strict=False)
    )


def task_id_problem(task_id: str) -> str | None:
    """Say what is wrong with ``task_id``, or ``None``: what we store can be shown and released."""
    if not task_id.strip():
        return "が空です"
    if len(task_id) > MAX_TASK_ID_LENGTH:
        return f"が {MAX_TASK_ID_LENGTH} 文字を超えています"
    if task_id.startswith("-"):
        return "は - で始められません"
    if _UNSAFE_TEXT.search(task_id):
        return "に制御文字または不正な文字が含まれています"
    return None


# --- Decisions: pure functions, no file, clock, lock or process -----------------------------------


class Allocation(TypedDict):
    """What :meth:`GPUResourceManagerV01.allocate_resources` grants."""

    task_id: str
    server_id: int
    server_name: str
    #: GPU indices on that server, ascending
    gpu_ids: list[int]
    #: the same for ``CUDA_VISIBLE_DEVICES``, such as "0,1,2,3"
    gpu_devices: str
    cpu_count: int


class ServerSummary(TypedDict):
    """One server in counts; utilizations are text such as "50.0%"."""

    server_id: int
    server_name: str
    total_gpus: int
    available_gpus: int
    gpu_utilization: str
    total_cpus: int
    available_cpus: int
    cpu_utilization: str
    running_tasks: int


class Summary(TypedDict):
    """The pool in counts."""

    total_servers: int
    total_gpus: int
    total_available_gpus: int
    total_cpus: int
    total_available_cpus: int
    total_running_tasks: int
    servers: list[ServerSummary]


def first_fit(state: State, gpus: int, cpus: int, prefer_server_id: int | None = None) -> Server | None:
    """Return the first server with room for the request, or ``None``.

    A preferred server is tried first, then all servers in the order of the file. O(N) in the number
    of servers. First Fit is due to D. S. Johnson, "Near-optimal bin packing algorithms" (MIT, 1973).

    >>> first_fit(new_state(), gpus=4, cpus=32)["server_name"]
    'gpu-server-0'
    """
    servers = state["servers"]
    preferred = [server for server in servers if server["server_id"] == prefer_server_id]
    for server in preferred + servers:
        if len(server["available_gpus"]) >= gpus and server["available_cpus"] >= cpus:
            return server
    return None


def place(server: Server, task_id: str, gpus: int, cpus: int, start_time: str) -> Allocation:
    """Give the task the lowest free GPU indices of ``server``, which has room for it."""
    gpu_ids = server["available_gpus"][:gpus]
    del server["available_gpus"][:gpus]
    server["available_cpus"] -= cpus
    server["running_tasks"].append(
        {"task_id": task_id, "allocated_gpus": gpu_ids, "allocated_cpus": cpus, "start_time": start_time}
    )
    return {
        "task_id": task_id,
        "server_id": server["server_id"],
        "server_name": server["server_name"],
        "gpu_ids": gpu_ids[:],
        "gpu_devices": ",".join(map(str, gpu_ids)),
        "cpu_count": cpus,
    }


def find_task(state: State, task_id: str) -> tuple[Server, Task] | None:
    """Return the task with this identifier and its server, or ``None``."""
    for server in state["servers"]:
        for task in server["running_tasks"]:
            if task["task_id"] == task_id:
                return server, task
    return None


def remove_task(server: Server, task: Task) -> None:
    """Take ``task`` off ``server``; what it held is available again, GPU indices in ascending order."""
    server["running_tasks"].remove(task)
    server["available_gpus"] = sorted(server["available_gpus"] + task["allocated_gpus"])
    server["available_cpus"] += task["allocated_cpus"]


def remove_all_tasks(state: State) -> None:
    """Make every server idle; servers and unknown keys stay."""
    for server in state["servers"]:
        for task in server["running_tasks"][:]:
            remove_task(server, task)


def shortfall(state: State, gpus: int, cpus: int) -> str:
    """Explain why no server has room now: what is short on each, and whether it is only scattered."""
    lines = [f"GPU {gpus} 個と CPU {cpus} 個を同時に空けられるサーバーがありません"]
    for server in state["servers"]:
        short_gpus = max(0, gpus - len(server["available_gpus"]))
        short_cpus = max(0, cpus - server["available_cpus"])
        short = [f"{what} {count} 個" for what, count in (("GPU", short_gpus), ("CPU", short_cpus)) if count]
        lines.append(f"  {server['server_name']}: {'・'.join(short)} 不足")
    free_gpus = sum(len(server["available_gpus"]) for server in state["servers"])
    free_cpus = sum(server["available_cpus"] for server in state["servers"])
    if free_gpus >= gpus and free_cpus >= cpus:
        lines.append(
            f"  空きの合計 (GPU {free_gpus} 個・CPU {free_cpus} 個) は足りますが、複数のサーバーに分散しています"
        )
    return "\n".join(lines)


def summarize(state: State) -> Summary:
    """Count what the pool and each server have and have left."""
    servers: list[ServerSummary] = [
        {
            "server_id": server["server_id"],
            "server_name": server["server_name"],
            "total_gpus": server["total_gpus"],
            "available_gpus": len(server["available_gpus"]),
            "gpu_utilization": _utilization(len(server["available_gpus"]), server["total_gpus"]),
            "total_cpus": server["total_cpus"],
            "available_cpus": server["available_cpus"],
            "cpu_utilization": _utilization(server["available_cpus"], server["total_cpus"]),
            "running_tasks": len(server["running_tasks"]),
        }
        for server in state["servers"]
    ]
    return {
        "total_servers": len(servers),
        "total_gpus": sum(server["total_gpus"] for server in servers),
        "total_available_gpus": sum(server["available_gpus"] for server in servers),
        "total_cpus": sum(server["total_cpus"] for server in servers),
        "total_available_cpus": sum(server["available_cpus"] for server in servers),
        "total_running_tasks": sum(server["running_tasks"] for server in servers),
        "servers": servers,
    }


def _utilization(available: int, total: int) -> str:
    return f"{100 * (total - available) / total if total else 0:.1f}%"


# --- The store: the only code that locks, reads and writes ----------------------------------------


class JsonFileStore:
    """One document in one JSON file on a local file system.

    Readers take no lock: ``rename`` is atomic, so they see the old file or the new one. Writers hold
    two locks for the whole of a change, which the kernel frees the moment they die:

    * the *directory* of the state file. It excludes every other writer, and nobody can delete it.
      With the lock file alone, this would lose B's work: A locks the file and stops (SIGSTOP, a
      paused machine); somebody deletes the file; B makes a new one, locks that, commits; A continues
      and writes what it had read before B.
    * ``.resource.lock``, the name that the outside world knows: other programs may hold it to keep
      us out, and ``lslocks`` shows who holds it. Nothing is ever decided from its existence.
    """

    def __init__(self, path: str, lock_name: str, lock_timeout_s: float) -> None:
        self.path = path
        with self._failures_reported():
            self.path = os.path.abspath(path)  # fails where the current directory has been removed
        self.lock_name = lock_name
        self.lock_timeout_s = lock_timeout_s

    def exists(self) -> bool:
        """Tell whether anything at all, even a dangling link, stands at the path."""
        with self._failures_reported():
            try:
                os.lstat(self.path)
            except FileNotFoundError:
                return False
            return True

    def read(self) -> State:
        """Return a private copy of the stored state, without waiting for any lock.

        :raises UnusableStateFileError: there is no valid state file.
        :raises StateFileError: reading it failed.
        """
        with self._failures_reported():
            return self._load(self.path)

    def update(self, change: Callable[[State], T]) -> T:
        """Apply ``change`` to the stored state as one atomic, durable step and return what it returns.

        ``change`` gets a private copy and may be called more than once; it has no effect outside its
        argument. If it raises, nothing is written.

        :raises LockTimeoutError: the lock was not had within ``lock_timeout_s`` seconds.
        :raises UnusableStateFileError: there is no valid state file; it is left as it is.
        :raises StateFileError: reading or writing failed. Unless the text says otherwise, the old
            document stands.
        """
        with self._failures_reported():
            path = self._locate()
            with self._locked(os.path.dirname(path)) as directory:
                state = self._load(path)
                result = change(state)
                self._commit(path, state, directory)
                return result

    def create(self, state: State) -> bool:
        """Write ``state`` unless something stands at the path already; tell whether it was written.

        :raises LockTimeoutError, StateFileError: as :meth:`update`.
        """
        with self._failures_reported():
            path = self._locate()
            with self._locked(os.path.dirname(path)) as directory:
                missing = not self.exists()
                if missing:
                    self._commit(path, state, directory)
                return missing

    def replace_unusable(self, state: State) -> bool:
        """Set an unusable state file aside as ``NAME.corrupt-TIME`` and write ``state`` in its place.

        Returns ``False``, and does nothing, when the file is usable after all.

        :raises LockTimeoutError, StateFileError: as :meth:`update`.
        """
        with self._failures_reported():
            path = self._locate()
            with self._locked(os.path.dirname(path)) as directory:
                try:
                    self._load(path)
                except UnusableStateFileError as error:
                    logger.warning("状態ファイルを作り直します: %s", error.reason)
                else:
                    return False
                self._commit(path, state, directory, set_aside=True)
                return True

    def _locate(self) -> str:
        """Return where the document really lies, so that a link stays a link when it is replaced.

        Lock and temporary file lie there too: two links to one document must share one lock.
        ``strict``, because an ``lstat`` that fails must not make a link look like a plain file.
        """
        try:
            return os.path.realpath(self.path, strict=True)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
        # No file yet, or a link that leads nowhere, which is then itself what stands in the place.
        directory, name = os.path.split(self.path)
        return os.path.join(os.path.realpath(directory, strict=True), name)

    def _load(self, path: str) -> State:
        try:
            # Without O_NONBLOCK, a FIFO in the place of the file would make us wait for ever.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EACCES, errno.ELOOP, errno.ENXIO):
                raise self._unusable(_os_reason(error)) from error
            raise  # a disk or a limit that fails now says nothing about the file
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise self._unusable("通常のファイルではありません")
            parts = []
            while part := os.read(descriptor, 1 << 20):
                parts.append(part)
        finally:
            os.close(descriptor)
        try:
            return decode_state(b"".join(parts))
        except ValueError as error:
            raise self._unusable(str(error)) from error

    @contextmanager
    def _locked(self, directory: str) -> Iterator[int]:
        """Hold both locks on ``directory``, always in this order, and yield its descriptor.

        Every call opens descriptors of its own, so threads and forked children exclude each other
        like strangers.
        """
        # Imported here since a command that only reads has no use for it, and it is half its start.
        from filelock import lock_descriptor, unlock_descriptor

        deadline_s = time.monotonic() + self.lock_timeout_s
        lock_file = os.path.join(directory, self.lock_name)
        held: list[int] = []
        try:
            for open_descriptor in (_open_directory, self._open_lock_file):
                descriptor = open_descriptor(directory)
                held.append(descriptor)
                while not lock_descriptor(descriptor, blocking=False):
                    if time.monotonic() >= deadline_s:
                        raise LockTimeoutError(
                            f"ロック取得タイムアウト\n  {lock_file} を {self.lock_timeout_s:g} 秒待ちましたが、"
                            "別のプロセスが使用中です\n"
                            "  対処: しばらくして再実行するか、lslocks で保持しているプロセスを確認してください"
                            " (ロックファイルの削除は不要です)",
                            lock_file=lock_file,
                            timeout_s=self.lock_timeout_s,
                        )
                    time.sleep(LOCK_POLL_S)
            yield held[0]
        finally:
            for descriptor in reversed(held):
                # Unlocked by name, for a child forked meanwhile shares the lock through its copy of
                # the descriptor. Should that fail, closing frees the lock in any other case.
                with suppress(OSError):
                    unlock_descriptor(descriptor)
                with suppress(OSError):
                    os.close(descriptor)

    def _open_lock_file(self, directory: str) -> int:
        """Open the lock file; called with the directory locked, so only one of us ever makes it."""
        lock_file = os.path.join(directory, self.lock_name)
        try:
            return os.open(lock_file, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            # Made elsewhere and moved in, so that a kill cannot leave one that the group cannot open.
            temporary, descriptor = self._open_temporary(directory)
            try:
                _share_with_group(descriptor, directory)
                os.replace(temporary, lock_file)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor

    def _open_temporary(self, directory: str) -> tuple[str, int]:
        """Make the one temporary file anew, sweeping what a killed writer may have left."""
        temporary = os.path.join(directory, f".{os.path.basename(self.path)}.tmp")
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        return temporary, os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def _commit(self, path: str, state: State, directory: int, set_aside: bool = False) -> None:
        """Make ``state`` the document at ``path``, atomically and durably; both locks are held.

        A failed ``fsync`` is final: the kernel may have dropped the very pages it could not write,
        and a second call would then succeed without them ("fsyncgate", PostgreSQL 2018).
        """
        state["last_updated"] = timestamp()
        try:
            check_state(state)
            data = memoryview(encode_state(state))
        except ValueError as error:
            reason = f"書き込めない内容です ({error})"
            raise self._error(StateFileError, reason, "ファイルは変更していません。内容を確認してください") from error
        temporary, descriptor = self._open_temporary(os.path.dirname(path))
        try:
            try:
                _share_with_group(descriptor, os.path.dirname(path))
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if set_aside:
                with suppress(FileNotFoundError):
                    os.rename(path, _aside_name(path))
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # the failure itself is what counts; the next change sweeps
                os.unlink(temporary)
            raise
        try:
            os.fsync(directory)
        except OSError as error:
            raise self._error(
                StateFileError,
                f"変更は書き込まれましたが、ディスクへの保存を確認できません ({_os_reason(error)})",
                "ディスクを確認し、--detail で現在の状態を確かめてください",
            ) from error

    @contextmanager
    def _failures_reported(self) -> Iterator[None]:
        """Turn an ``OSError`` of the work inside into a :class:`StateFileError` that says what to do."""
        try:
            yield
        except ResourceManagerError:  # LockTimeoutError is an OSError too
            raise
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "ディスクとディレクトリの状態を確認してください")
            raise self._error(StateFileError, _os_reason(error), remedy) from error

    def _unusable(self, reason: str) -> StateFileError:
        remedy = "内容を直すか、python cli_v01.py --reset --yes で作り直してください (元のファイルは保存されます)"
        return self._error(UnusableStateFileError, reason, remedy)

    def _error(self, kind: type[StateFileError], reason: str, remedy: str) -> StateFileError:
        text = f"状態ファイルのエラー: {self.path}\n  原因: {reason}\n  対処: {remedy}"
        return kind(text, path=self.path, reason=reason, remedy=remedy)


_ASK_PERMISSIONS = "ディレクトリとファイルの権限を確認してください"
_ASK_DIRECTORY = "状態ファイルのディレクトリが存在するか確認してください"
_ASK_LOCAL_DISK = "ロックが使えるローカルディスク上のファイルを GPU_RESOURCE_FILE で指定してください"
_REMEDIES = {
    errno.ENOSPC: "ディスクの空き容量を増やしてから再実行してください",
    errno.EDQUOT: "ディスクの割り当て (quota) を確認してから再実行してください",
    errno.EFBIG: "ファイルサイズの制限 (ulimit -f) を確認してから再実行してください",
    errno.EMFILE: "開いているファイルを減らすか、ulimit -n を増やしてから再実行してください",
    errno.EACCES: _ASK_PERMISSIONS,
    errno.EPERM: _ASK_PERMISSIONS,
    errno.EROFS: _ASK_PERMISSIONS,
    errno.ENOENT: _ASK_DIRECTORY,
    errno.ENOTDIR: _ASK_DIRECTORY,
    errno.ENOLCK: _ASK_LOCAL_DISK,
    errno.EBADF: _ASK_LOCAL_DISK,  # what NFS answers to an exclusive lock on a directory
}


def _os_reason(error: OSError) -> str:
    place = f": {os.fsdecode(error.filename)}" if error.filename else ""
    return f"{error.strerror or error}{place}"


def _open_directory(directory: str) -> int:
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY)


def _share_with_group(descriptor: int, directory: str) -> None:
    """Let the group of a directory that it may write use this new file too, whatever the umask.

    Others may then read exactly if they may list the directory. Elsewhere the umask holds.
    """
    parent = os.stat(directory)
    if not parent.st_mode & stat.S_IWGRP:
        return
    if os.fstat(descriptor).st_gid != parent.st_gid:  # no set-group-ID bit on the directory
        try:
            os.fchown(descriptor, -1, parent.st_gid)
        except PermissionError:
            return  # we are not in that group, so it is not ours to share with
    os.fchmod(descriptor, 0o660 | (parent.st_mode & stat.S_IROTH))


def _aside_name(path: str) -> str:
    """Return a name that is not taken; called with the directory locked."""
    base = name = f"{path}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}"
    number = 1
    while os.path.lexists(name):
        number += 1
        name = f"{base}-{number}"
    return name


def timestamp() -> str:
    """Return the local time, ISO 8601 to the second. Information only: no decision depends on it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S")


# --- The manager ----------------------------------------------------------------------------------


class GPUResourceManagerV01:
    """First Fit allocation over the pool that one state file describes.

    Safe to use from many processes and threads at once, and after ``fork``. It holds no lock and no
    open file between two calls.

    :param resource_file: the state file; by default the one that the environment variable
        ``GPU_RESOURCE_FILE`` names, else ``resource_status.json`` beside this module. It is made when
        there is none, and never overwritten.
    :param lock_timeout_s: seconds to wait for the lock, at least 0.
    :raises InvalidRequestError: a parameter is of no use.
    :raises LockTimeoutError, StateFileError: the missing state file could not be made.
    """

    RESOURCE_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "resource_status.json")
    LOCK_FILE = ".resource.lock"  # in the directory of the state file
    TOTAL_SERVERS = 4
    GPUS_PER_SERVER = 8
    CPUS_PER_SERVER = 64

    def __init__(
        self,
        resource_file: str | os.PathLike[str] | None = None,
        lock_timeout_s: float = DEFAULT_LOCK_TIMEOUT_S,
    ) -> None:
        path = os.fspath(resource_file or os.environ.get(RESOURCE_FILE_VARIABLE) or self.RESOURCE_FILE)
        if not isinstance(path, str) or "\0" in path:
            raise _invalid("resource_file", path, "がファイルのパスではありません", "パスを文字列で指定してください")
        # ``not >=`` also catches NaN.
        if type(lock_timeout_s) not in (int, float) or not lock_timeout_s >= 0:
            raise _invalid("lock_timeout_s", lock_timeout_s, "が秒数ではありません", "0 以上の数を指定してください")
        self._store = JsonFileStore(path, self.LOCK_FILE, lock_timeout_s)
        self.resource_file = self._store.path
        if not self._store.exists():
            self._store.create(self._new_state())

    def allocate_resources(
        self,
        task_id: str,
        required_gpus: int,
        required_cpus: int,
        prefer_server_id: int | None = None,
    ) -> Allocation | None:
        """Give the task GPUs and CPUs on one server, or return ``None``: no room now, try later.

        Why there is no room is logged as a warning.

        :param task_id: unique among the running tasks; 1-128 characters, not blank, no control
            character, no leading ``-``.
        :param required_gpus: 2-8.
        :param required_cpus: 1-64.
        :param prefer_server_id: tried first; First Fit when it has no room.
        :raises InvalidRequestError: a parameter is out of range or of the wrong type.
        :raises DuplicateTaskError: a task with this identifier runs already.
        :raises LockTimeoutError, StateFileError: as :meth:`JsonFileStore.update`.
        """
        _check_task_id(task_id)
        _check_int("required_gpus", required_gpus, MIN_GPUS_PER_TASK, self.GPUS_PER_SERVER)
        _check_int("required_cpus", required_cpus, MIN_CPUS_PER_TASK, self.CPUS_PER_SERVER)
        if prefer_server_id is not None:
            _check_int("prefer_server_id", prefer_server_id, 0, None)

        def change(state: State) -> Allocation:
            servers = state["servers"]
            server_ids = [server["server_id"] for server in servers]
            if prefer_server_id is not None and prefer_server_id not in server_ids:
                remedy = f"{', '.join(map(str, server_ids))} のいずれかを指定してください"
                raise _invalid("prefer_server_id", prefer_server_id, "のサーバーはありません", remedy)
            if not any(s["total_gpus"] >= required_gpus and s["total_cpus"] >= required_cpus for s in servers):
                remedy = "--status で各サーバーの合計を確認し、その範囲で指定してください"
                raise _invalid("required_gpus", required_gpus, "個を持てるサーバーがありません", remedy)
            if find_task(state, task_id):
                raise DuplicateTaskError(
                    f"タスクID {task_id!r} は既に実行中です\n  対処: 別のタスクIDを使うか、先に解放してください",
                    parameter="task_id",
                    value=task_id,
                )
            server = first_fit(state, required_gpus, required_cpus, prefer_server_id)
            if server is None:
                raise _DeclinedError(shortfall(state, required_gpus, required_cpus))
            return place(server, task_id, required_gpus, required_cpus, timestamp())

        try:
            allocation = self._store.update(change)
        except _DeclinedError as refusal:
            logger.warning("リソース不足: %s", refusal)
            return None
        logger.info("リソース割り当て成功: %s", allocation)
        return allocation

    def release_resources(self, task_id: str) -> bool:
        """Take back what the task holds; ``True`` once that is on disk, ``False`` for an unknown task.

        :raises InvalidRequestError: ``task_id`` is none that a task can have.
        :raises LockTimeoutError, StateFileError: as :meth:`JsonFileStore.update`.
        """
        _check_task_id(task_id)

        def change(state: State) -> None:
            found = find_task(state, task_id)
            if found is None:
                raise _DeclinedError
            remove_task(*found)

        try:
            self._store.update(change)
        except _DeclinedError:
            logger.warning("タスクが見つかりません: %s", task_id)
            return False
        logger.info("リソース解放完了: %s", task_id)
        return True

    def get_resource_summary(self) -> Summary:
        """Return counts for the pool and each server, without waiting for a lock.

        :raises StateFileError: the state file cannot be read.
        """
        return summarize(self._store.read())

    def get_detailed_status(self) -> State:
        """Return the document of the state file, without waiting for a lock.

        :raises StateFileError: the state file cannot be read.
        """
        return self._store.read()

    def reset_resources(self) -> bool:
        """Forget every task and return ``True``.

        Servers and unknown keys stay. A state file that cannot be used is set aside as
        ``resource_status.json.corrupt-TIME`` and made anew.

        :raises LockTimeoutError, StateFileError: as :meth:`JsonFileStore.update`.
        """

        try:
            self._store.update(remove_all_tasks)
        except UnusableStateFileError:
            # Between the two steps somebody else may have reset it, and tasks may run again.
            if not self._store.replace_unusable(self._new_state()):
                self._store.update(remove_all_tasks)
        logger.info("すべてのリソースをリセットしました")
        return True

    def _new_state(self) -> State:
        return new_state(self.TOTAL_SERVERS, self.GPUS_PER_SERVER, self.CPUS_PER_SERVER)


def _check_task_id(task_id: object) -> None:
    problem = task_id_problem(task_id) if isinstance(task_id, str) else "が文字列ではありません"
    if problem:
        remedy = f"制御文字を含まず - で始まらない 1-{MAX_TASK_ID_LENGTH} 文字の文字列を指定してください"
        raise _invalid("task_id", task_id, problem, remedy)


def _check_int(parameter: str, value: object, least: int, most: int | None) -> None:
    # Exactly int: ``True`` is one to isinstance.
    if type(value) is not int or value < least or (most is not None and value > most):
        limits = f"{least} 以上" if most is None else f"{least}-{most} "
        raise _invalid(parameter, value, "が正しくありません", f"{limits}の整数を指定してください")


def _invalid(parameter: str, value: object, problem: str, remedy: str) -> InvalidRequestError:
    text = f"{parameter} {problem}: {value!r}\n  対処: {remedy}"
    return InvalidRequestError(text, parameter=parameter, value=value)
