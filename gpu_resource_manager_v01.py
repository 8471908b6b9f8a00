"""Share the GPUs of a few servers between several people, with one JSON file and no daemon.

Three guarantees:

* no GPU is given twice, however many processes, threads and users ask at once;
* the state file is never half-written: after a crash it holds the old document or the new one;
* what a task bound to a lease holds comes back when its last process is gone, however it ended.

The module reads from the ground up: constants, errors, the document (the state file *is* the data
model), the decisions (pure functions on a private copy of it), files, this machine (whether the
processes of a task live), the store (the only code that locks and writes the document), and at last
:class:`GPUResourceManagerV01`, a layer over the rooms below.

    >>> from gpu_resource_manager_v01 import GPUResourceManagerV01      # doctest: +SKIP
    >>> manager = GPUResourceManagerV01()                               # doctest: +SKIP
    >>> manager.allocate_resources("my_task", 4, 32)["gpu_devices"]     # doctest: +SKIP
    '0,1,2,3'
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import pwd
import re
import stat
import sys
import time
from _thread import TIMEOUT_MAX, RLock, allocate_lock, start_new_thread
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

if TYPE_CHECKING:
    from typing_extensions import ReadOnly

A = TypeVar("A")
T = TypeVar("T")
#: position in line, from 1, and why there is no room yet
OnWait = Callable[[int, str], None]

logger = logging.getLogger(__name__)
# A library without a handler of its own would have its warnings printed to stderr by ``logging``.
logger.addHandler(logging.NullHandler())

# --- Constants ------------------------------------------------------------------------------------

#: the only value of the document's ``version`` that this module reads and writes
FORMAT_VERSION = "0.1"
MIN_GPUS_PER_TASK = 2  # unless the pool was described with another least number
MAX_GPUS_PER_SERVER = 1024
MAX_CPUS_PER_SERVER = 65536
MAX_TASK_ID_LENGTH = 128  # characters
#: how often later requests may be placed ahead of a waiting one; see :func:`admit`
MAX_PASSED_OVER = 32
#: environment variable that names another state file
RESOURCE_FILE_VARIABLE = "GPU_RESOURCE_FILE"
#: environment variable that names the server of the pool that this machine is
SERVER_VARIABLE = "GPU_RESOURCE_SERVER"
DEFAULT_LOCK_TIMEOUT_S = 60.0
#: seconds between two attempts to take a lock that no queue is kept for
LOCK_POLL_S = 0.001
#: seconds between two looks of a waiter at the state file: at first, and at most when nothing changes
WAIT_POLL_S = (0.1, 2.0)
#: seconds after which a waiter looks for processes that have died, which changes no file
WAIT_RECHECK_S = 3.0

# Characters that could move a cursor, end a line or reverse the text of a screen (C0, C1, line and
# paragraph separators, bidirectional controls), and surrogates, which no valid text holds.
_UNSAFE_TEXT = "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"


def _is_unsafe(text: str) -> bool:
    # What can be printed is safe, and to know that costs a tenth of a search, let alone of a first one.
    return not text.isprintable() and re.search(_UNSAFE_TEXT, text) is not None


def _printable(text: str) -> str:
    return re.sub(_UNSAFE_TEXT, "?", text) if _is_unsafe(text) else text


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
    """Asking: a task with this identifier already runs or waits; nothing was touched."""


class NotOwnerError(ResourceManagerError):
    """Asking: the task belongs to another user; nothing was touched."""

    task_id: str
    #: name of the user it belongs to
    owner: str


class PoolConflictError(ResourceManagerError):
    """Asking: the pool has other servers than described, or still runs tasks; nothing was touched."""


class NoCapacityError(ResourceManagerError):
    """Asking: there is not enough room now, try later; the text says what is short and who holds it."""

    required_gpus: int
    required_cpus: int
    #: identifiers of the fewest tasks whose release would make room
    fewest_releases: list[str]
    #: requests that wait already
    waiting: int


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


# --- The document ---------------------------------------------------------------------------------
# Keys that are not listed here are kept through every change, at every level of the document.


class Requester(TypedDict, total=False):
    """Who asked, as information, and what ties the request to a living process; any key may be missing."""

    user: str
    uid: int
    #: host name of the machine that it was asked on
    host: str
    pid: int
    command: str
    #: it was told to use the GPUs of ``host`` itself
    local: bool
    #: name of a file under ``.leases/``: the task ends when no process on ``host`` holds its lock
    lease: str
    #: only in what :meth:`GPUResourceManagerV01.get_detailed_status` returns: the lease is free
    ended: bool


class Task(Requester):
    """What one task holds on one server."""

    task_id: ReadOnly[str]
    #: GPU indices on the server, ascending
    allocated_gpus: ReadOnly[Sequence[int]]
    allocated_cpus: ReadOnly[int]
    #: local time, ISO 8601 to the second
    start_time: ReadOnly[str]


class Server(TypedDict):
    """One server with what is free on it and the tasks that hold the rest.

    Never altered where it may be written: a decision puts an altered copy in its place (:func:`put`), so
    that what it has not touched need neither be checked nor encoded again.
    """

    server_id: ReadOnly[int]
    server_name: ReadOnly[str]
    total_gpus: ReadOnly[int]
    #: GPU indices, ascending
    available_gpus: ReadOnly[Sequence[int]]
    total_cpus: ReadOnly[int]
    available_cpus: ReadOnly[int]
    running_tasks: ReadOnly[Sequence[Task]]


class Request(Requester):
    """A request that stands in line."""

    task_id: str
    required_gpus: int
    required_cpus: int
    prefer_server_id: int | None
    #: the one server that will do, or ``None``; by name, for a reset may number other servers
    only_server_name: str | None
    #: how many later requests were placed on a server that would have done for this one
    passed_over: int


class _Optional(TypedDict, total=False):
    #: in order of arrival; missing when nobody waits
    waiting: list[Request]
    #: missing means MIN_GPUS_PER_TASK
    min_gpus_per_task: int


class State(_Optional):
    """The whole document of the state file."""

    servers: list[Server]
    #: time of the last change: local, ISO 8601 to the second; what a change places starts at its time
    last_updated: str
    version: str


#: name, number of GPUs, number of CPUs
ServerDescription = tuple[str, int, int]


def new_state(servers: int = 4, gpus: int = 8, cpus: int = 64) -> State:
    """Return a pool of ``servers`` idle servers with ``gpus`` GPUs and ``cpus`` CPUs each."""
    return {
        "servers": new_servers([(f"gpu-server-{number}", gpus, cpus) for number in range(servers)]),
        "last_updated": "",
        "version": FORMAT_VERSION,
    }


def new_servers(descriptions: Sequence[ServerDescription]) -> list[Server]:
    """Return idle servers, numbered in the order given."""
    return [
        {
            "server_id": server_id,
            "server_name": name,
            "total_gpus": gpus,
            "available_gpus": list(range(gpus)),
            "total_cpus": cpus,
            "available_cpus": cpus,
            "running_tasks": [],
        }
        for server_id, (name, gpus, cpus) in enumerate(descriptions)
    ]


def decode_state(data: bytes) -> State:
    """Return the checked document that ``data`` (UTF-8 JSON without byte order mark) holds.

    :raises ValueError: it does not hold one; the text says why.
    """
    return decode_with_lines(data)[0]


#: servers in the order of the document, and the line of each; both empty if it is laid out in another way
ServerLines = tuple[Sequence[Server], Sequence[str]]
NO_LINES: ServerLines = ((), ())


def decode_with_lines(data: bytes) -> tuple[State, ServerLines]:
    """Return what :func:`decode_state` does, and the lines of the servers as they were read."""
    try:
        text = data.decode("utf-8")
        document, lines = _scan(text) or (json.loads(text, **_FINITE), NO_LINES)
    except UnicodeDecodeError as error:
        raise ValueError(f"UTF-8 として読めません ({error.start} バイト目)") from error
    except RecursionError as error:
        raise ValueError("JSON の入れ子が深すぎます") from error
    except ValueError as error:
        raise ValueError(f"JSON として読めません ({error})") from error
    check_state(document)
    return document, lines


# What a document of ours has before, between and after its servers, each of which has a line.
_OPENING, _BETWEEN_SERVERS, _CLOSING = '{\n  "servers": [\n    ', ",\n    ", "\n  ]"
_MARK = str(1 - 2**61)  # no server, and no ``float`` is equal to it


def _scan(text: str) -> tuple[Any, ServerLines] | None:
    """Decode a text that is laid out as we do it; ``None`` if it is another one, or no JSON at all."""
    lines = text.split(_BETWEEN_SERVERS)
    lines[-1], closing, rest = lines[-1].rpartition(_CLOSING)
    if not text.startswith(_OPENING) or not closing or _MARK in text:
        return None
    lines[0] = lines[0].removeprefix(_OPENING)
    # A hand may have put line breaks anywhere. But if marks put around every line turn out to stand
    # around every server, then each line is one server, whatever is in it.
    try:
        document = _DECODER.decode(f",{_MARK},".join([_OPENING + _MARK, *lines, _MARK + closing + rest]))
    except json.JSONDecodeError:  # the whole of it will tell where it is wrong, if it is
        return None
    marked = document["servers"]
    if type(marked) is not list or len(marked) != 2 * len(lines) + 3:  # a second key "servers" may be anything
        return None
    if [marked[0], *marked[1::2], marked[-1]] != [int(_MARK)] * (len(lines) + 3):
        return None
    document["servers"] = servers = marked[2:-1:2]
    return document, (tuple(servers), lines)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # NaN, Infinity, 1e400: JSON could not hold it when we write again
        raise ValueError(f"{text} は有限の数ではありません")
    return number


_FINITE: Any = {"parse_constant": _finite, "parse_float": _finite}
_DECODER = json.JSONDecoder(**_FINITE)
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False).encode


def encode_state(state: State, before: ServerLines = NO_LINES) -> bytes:
    """Return the checked ``state`` as UTF-8 JSON with one line per server, which one screen line diffs well.

    :param before: the checked servers that it was made from. Those that still stand in their places are
        neither checked nor encoded again: that is most of the work of a change.
    :raises ValueError: it is unsound, or a value of an unknown key has no JSON form (an infinite number).
    """
    check_state(state, before[0])
    servers: Iterable[str] = map(_encode, state["servers"])
    if len(before[0]) == len(state["servers"]):
        old = zip(state["servers"], *before, strict=True)
        servers = [line if server is known else _encode(server) for server, known, line in old]
    # Joined once, for of a large document every copy counts.
    parts: list[str] = []
    for key, value in state.items():
        parts += [",\n  ", _encode(key), ": "]
        parts += ["[\n    ", _BETWEEN_SERVERS.join(servers), "\n  ]"] if key == "servers" else [_encode(value)]
    parts[0] = "{\n  "
    text = "".join([*parts, "\n}\n"])
    # A lone surrogate in an unknown key can only stand inside a JSON string, where the escape that
    # ``backslashreplace`` makes of it is the JSON escape it was read from.
    return text.encode("utf-8", "backslashreplace")


# The keys that every document has besides its version, with their exact types.
_DOCUMENT_KEYS: dict[str, Any] = {"last_updated": str, "servers": list}
_SERVER_KEYS: dict[str, Any] = {
    "server_id": int,
    "server_name": str,
    "total_gpus": int,
    "available_gpus": list,
    "total_cpus": int,
    "available_cpus": int,
    "running_tasks": list,
}
_TASK_KEYS: dict[str, Any] = {"task_id": str, "allocated_gpus": list, "allocated_cpus": int, "start_time": str}
_OPTIONAL_KEYS: dict[str, Any] = {"waiting": list, "min_gpus_per_task": int}
_REQUEST_KEYS: dict[str, Any] = {
    "task_id": str,
    "required_gpus": int,
    "required_cpus": int,
    "passed_over": int,
    "lease": str,
}
#: what a placed task does not take over from its request
_ASKED_KEYS = {*_REQUEST_KEYS, *_TASK_KEYS, "prefer_server_id", "only_server_name"} - {"lease"}


def check_state(document: Any, sound: Sequence[Server] = ()) -> None:
    """Check types, ranges and the invariant of a decoded document; O(size of the document).

    The invariant: on every server each GPU index from 0 to ``total_gpus`` - 1 is either available or
    held by exactly one task, both lists ascending; available CPUs and the tasks' CPUs add up to
    ``total_cpus``; a ``server_id`` occurs once, and so does a ``task_id``, be it running or waiting.

    :param sound: servers that have been checked already and not been altered since.
    :raises ValueError: it does not hold; the text names the place and the reason.
    """
    if type(document) is dict and document.get("version") != FORMAT_VERSION:
        raise ValueError(f"version {document.get('version')!r} には対応していません ({FORMAT_VERSION!r} のみ)")
    _check_record(document, _DOCUMENT_KEYS, "最上位")
    for key, kind in _OPTIONAL_KEYS.items():
        if key in document:
            _check_record(document, {key: kind}, "最上位")
    servers, waiting = document["servers"], document.get("waiting", [])
    if not servers:
        raise ValueError("servers が空です")
    known = {*map(id, sound)}
    for position, server in enumerate(servers):
        if id(server) not in known and not _is_plainly_sound(server):
            _check_server(server, f"servers[{position}]")
    for position, request in enumerate(waiting):
        _check_record(request, _REQUEST_KEYS, f"waiting[{position}]")
        for key, kind in (("prefer_server_id", int), ("only_server_name", str)):
            if type(request.get(key)) not in (kind, type(None)):
                raise ValueError(f"waiting[{position}]: {key} の型が {kind.__name__} ではありません")
    _check_distinct(document)


def _is_plainly_sound(server: Any) -> bool:
    """Tell whether :func:`_check_server` would find nothing, at a third of the cost; may miss it, never errs."""
    try:
        server_id, total_gpus, total_cpus = server["server_id"], server["total_gpus"], server["total_cpus"]
        gpus, cpus, tasks = server["available_gpus"], server["available_cpus"], server["running_tasks"]
        if not (type(server_id) is type(total_gpus) is type(total_cpus) is type(cpus) is int and type(tasks) is list):
            return False
        # What ``sorted`` returns is a list, and what has ``isprintable`` is a text.
        if server_id < 0 or cpus < 0 or gpus != sorted(gpus) or not server["server_name"].isprintable():
            return False
        for task in tasks:
            task_id, task_gpus, task_cpus = task["task_id"], task["allocated_gpus"], task["allocated_cpus"]
            if not (task_id.isprintable() and task["start_time"].isprintable()) or task_gpus != sorted(task_gpus):
                return False
            if type(task_cpus) is not int or task_cpus < 0 or len(task_id) > MAX_TASK_ID_LENGTH:
                return False
            if not task_id or task_id[0] in "- ":
                return False
            gpus = gpus + task_gpus
            cpus += task_cpus
        # The length ahead of the range: a hand-written total of 10**12 must not make us build such a list.
        whole = len(gpus) == total_gpus and sorted(gpus) == list(range(total_gpus))
        return whole and [*map(type, gpus)].count(int) == total_gpus and cpus == total_cpus
    except (AttributeError, KeyError, TypeError):  # a key is missing, or something is of another type
        return False


def _check_server(server: Any, where: str) -> None:
    _check_record(server, _SERVER_KEYS, where)
    gpus, cpus = server["available_gpus"], server["available_cpus"]
    for position, task in enumerate(server["running_tasks"]):
        _check_record(task, _TASK_KEYS, f"{where}.running_tasks[{position}]")
        gpus = gpus + task["allocated_gpus"]
        cpus += task["allocated_cpus"]
    if len(gpus) != server["total_gpus"] or sorted(gpus) != list(range(len(gpus))):
        problem = "GPU 0 から total_gpus - 1 までが、available_gpus と allocated_gpus に一度ずつ現れていません"
        raise ValueError(f"{where}: {problem}")
    if cpus != server["total_cpus"]:
        raise ValueError(f"{where}: 空きと割り当て済みの CPU の合計が total_cpus と一致しません")


def _check_record(record: Any, keys: dict[str, Any], where: str) -> None:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: JSON オブジェクトではありません")
    for key, kind in keys.items():
        if key not in record:
            raise ValueError(f"{where}: {key} がありません")
        value = record[key]
        if type(value) is not kind:  # exactly: ``True`` is an int to isinstance
            raise ValueError(f"{where}: {key} の型が {kind.__name__} ではありません")
        if kind is int and value < 0:
            raise ValueError(f"{where}: {key} が負の数です ({value})")
        if key == "task_id" and (problem := task_id_problem(value)):
            raise ValueError(f"{where}: {key} {problem}")
        if kind is str and _is_unsafe(value):
            raise ValueError(f"{where}: {key} に制御文字が含まれています")
        if kind is list and key.endswith("_gpus") and not _is_ascending(value):
            raise ValueError(f"{where}: {key} が 0 以上の整数の昇順リストではありません")


def _is_ascending(indices: list[Any]) -> bool:
    return all(type(index) is int and index >= 0 for index in indices) and indices == sorted({*indices})


def _check_distinct(document: State) -> None:
    server_ids = [*map(itemgetter("server_id"), document["servers"])]
    task_ids = [*map(itemgetter("task_id"), records(document))]
    if len({*server_ids}) == len(server_ids) and len({*task_ids}) == len(task_ids):
        return
    servers = [f"servers[{position}]" for position in range(len(server_ids))]
    tasks = [
        f"{where}.running_tasks[{position}]"
        for where, server in zip(servers, document["servers"], strict=True)
        for position in range(len(server["running_tasks"]))
    ]
    tasks += [f"waiting[{position}]" for position in range(len(document.get("waiting", [])))]
    for key, values, places in (("server_id", server_ids, servers), ("task_id", task_ids, tasks)):
        found: set[object] = set()
        for where, value in zip(places, values, strict=True):
            if value in found:
                raise ValueError(f"{where}: {key} {value!r} が重複しています")
            found.add(value)


def task_id_problem(task_id: str) -> str | None:
    """Say what is wrong with ``task_id``, or ``None``: what we store can be shown and released."""
    if not task_id.strip():
        return "が空です"
    if len(task_id) > MAX_TASK_ID_LENGTH:
        return f"が {MAX_TASK_ID_LENGTH} 文字を超えています"
    if task_id.startswith("-"):
        return "は - で始められません"
    if _is_unsafe(task_id):
        return "に制御文字または不正な文字が含まれています"
    return None


# --- Decisions: pure functions, no file, clock, lock or process -----------------------------------


def _check_seconds(parameter: str, value: object) -> None:
    # ``<=`` is also false for NaN; a clock counts in floats.
    if not (
        isinstance(value, (int, float)) and not isinstance(value, bool) and (0 <= value <= 1e9 or value == math.inf)
    ):
        raise _invalid(parameter, value, "が秒数ではありません", "0 以上 10 億以下の数か math.inf を指定してください")


def _check_name(parameter: str, value: object) -> None:
    problem = task_id_problem(value) if isinstance(value, str) else "が文字列ではありません"
    if problem:
        remedy = f"制御文字を含まず - で始まらない 1-{MAX_TASK_ID_LENGTH} 文字の文字列を指定してください"
        raise _invalid(parameter, value, problem, remedy)


def _check_int(parameter: str, value: object, least: int, most: int | None) -> None:
    # Exactly int: ``True`` is one to isinstance.
    if type(value) is not int or value < least or (most is not None and value > most):
        limits = f"{least} 以上" if most is None else f"{least}-{most} "
        raise _invalid(parameter, value, "が正しくありません", f"{limits}の整数を指定してください")


def _invalid(parameter: str, value: object, problem: str, remedy: str) -> InvalidRequestError:
    text = f"{parameter} {problem}: {value!r}\n  対処: {remedy}"
    return InvalidRequestError(text, parameter=parameter, value=value)


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


class _SummaryExtras(TypedDict, total=False):
    #: requests in line; missing when there is none
    total_waiting: int
    #: tasks and requests whose processes are gone, already counted as free; missing when there is none
    ended_tasks: list[str]


class Summary(_SummaryExtras):
    """The pool in counts."""

    total_servers: int
    total_gpus: int
    total_available_gpus: int
    total_cpus: int
    total_available_cpus: int
    total_running_tasks: int
    servers: list[ServerSummary]


def first_fit(
    state: State,
    gpus: int,
    cpus: int,
    prefer_server_id: int | None = None,
    only_server_name: str | None = None,
    closed: Container[int] = (),
) -> Server | None:
    """Return the first server with room for the request, or ``None``.

    A preferred server is tried first, then all servers in the order of the file, but only the one of a
    given name, and none whose ``server_id`` is ``closed``. O(N) in the number of servers.

    >>> first_fit(new_state(), gpus=4, cpus=32)["server_name"]
    'gpu-server-0'
    """
    servers = state["servers"]
    if prefer_server_id is not None:
        servers = [server for server in servers if server["server_id"] == prefer_server_id] + servers
    for server in servers:
        if server["available_cpus"] < cpus or len(server["available_gpus"]) < gpus or server["server_id"] in closed:
            continue
        if only_server_name is None or server["server_name"] == only_server_name:
            return server
    return None


def place(
    server: Server, task_id: str, gpus: int, cpus: int, start_time: str, requester: Requester | None = None
) -> Server:
    """Return ``server``, which has room for it, with the task on its lowest free GPU indices."""
    task: Task = {
        "task_id": task_id,
        "allocated_gpus": server["available_gpus"][:gpus],
        "allocated_cpus": cpus,
        "start_time": start_time,
        **(requester or {}),
    }
    return {
        **server,
        "available_gpus": server["available_gpus"][gpus:],
        "available_cpus": server["available_cpus"] - cpus,
        "running_tasks": [*server["running_tasks"], task],
    }


def put(state: State, server: Server) -> None:
    """Let ``server`` stand in the place of the one with its ``server_id``."""
    server_id = server["server_id"]
    state["servers"] = [server if other["server_id"] == server_id else other for other in state["servers"]]


def allocation_of(server: Server, task: Task) -> Allocation:
    """Return what ``task`` holds on ``server`` as the answer to the one who asked."""
    return {
        "task_id": task["task_id"],
        "server_id": server["server_id"],
        "server_name": server["server_name"],
        "gpu_ids": list(task["allocated_gpus"]),
        "gpu_devices": ",".join(map(str, task["allocated_gpus"])),
        "cpu_count": task["allocated_cpus"],
    }


def eligible_servers(state: State, request: Request) -> Iterator[Server]:
    """Yield the servers that could hold ``request`` if they were idle."""
    gpus, cpus, only = request["required_gpus"], request["required_cpus"], request.get("only_server_name")
    for server in state["servers"]:
        if server["total_gpus"] >= gpus and server["total_cpus"] >= cpus and only in (None, server["server_name"]):
            yield server


def admit(state: State, max_passed_over: int = MAX_PASSED_OVER) -> bool:
    """Place every waiting request that may be placed; tell whether there was one.

    The rule: in order of arrival, each request is placed as soon as it fits, so a small job runs in
    the gaps that a big one cannot use. Every time a later request is placed on a server that would
    have done for an earlier one, the earlier has been *passed over*. Once that has happened
    ``max_passed_over`` times, nothing later is placed on a server that would do for it: those servers
    empty, and it is placed. So no request waits for more than ``max_passed_over`` later ones, and a
    job of 8 GPUs does not starve under a stream of small ones. Known as backfilling with bounded
    bypass; a smaller bound comes closer to strict FIFO, where a big job leaves free GPUs idle.
    """
    waiting = state.get("waiting")
    if not waiting:
        return False
    left: list[tuple[Request, set[int]]] = []
    closed: set[int] = set()
    for request in waiting:
        gpus, cpus, only = request["required_gpus"], request["required_cpus"], request.get("only_server_name")
        server = first_fit(state, gpus, cpus, request.get("prefer_server_id"), only, closed)
        if server is None:
            eligible = {server["server_id"] for server in eligible_servers(state, request)}
            left.append((request, eligible))
            if request["passed_over"] >= max_passed_over:
                closed |= eligible
            continue
        put(state, place(server, request["task_id"], gpus, cpus, state["last_updated"], _requester_of(request)))
        for earlier, passed in left:
            if server["server_id"] in passed:
                earlier["passed_over"] += 1
                if earlier["passed_over"] >= max_passed_over:
                    closed |= passed
    set_waiting(state, [request for request, _ in left])
    return len(left) < len(waiting)


def set_waiting(state: State, waiting: list[Request]) -> None:
    """Let ``waiting`` be the line; without anybody in it, the document has no such key."""
    if waiting:
        state["waiting"] = waiting
    else:
        state.pop("waiting", None)


def _requester_of(request: Request) -> Requester:
    """Return all of the request but what is asked: who asked it, and keys that we do not know."""
    requester: Any = {key: value for key, value in request.items() if key not in _ASKED_KEYS}
    found: Requester = requester
    return found


def reclaim(state: State, is_ended: Callable[[Requester], bool]) -> list[str]:
    """Take back what ended tasks hold, strike ended requests from the line; return their identifiers."""
    ended = [record["task_id"] for record in records(state) if "lease" in record and is_ended(record)]
    for task_id in ended:
        strike(state, task_id)
    return ended


def placed_tasks(state: State) -> Iterator[tuple[Server, Task]]:
    """Yield every running task with its server."""
    return ((server, task) for server in state["servers"] for task in server["running_tasks"])


def records(state: State) -> Iterator[Task | Request]:
    """Yield all that bears a ``task_id``: running tasks and waiting requests."""
    running = chain.from_iterable(map(itemgetter("running_tasks"), state["servers"]))
    return chain(running, state.get("waiting", ()))


def check_request(state: State, request: Request) -> None:
    """:raises InvalidRequestError: this pool could not grant ``request`` even if it were idle."""
    if request["prefer_server_id"] is not None:
        server_ids = [server["server_id"] for server in state["servers"]]
        if request["prefer_server_id"] not in server_ids:
            remedy = f"{', '.join(map(str, server_ids))} のいずれかを指定してください"
            raise _invalid("prefer_server_id", request["prefer_server_id"], "のサーバーはありません", remedy)
    if request["required_gpus"] >= least_gpus(state) and any(eligible_servers(state, request)):
        return
    least, most, most_cpus = limits(state)
    _check_int("required_gpus", request["required_gpus"], least, most)
    _check_int("required_cpus", request["required_cpus"], 1, most_cpus)
    amounts = (request["required_gpus"], request["required_cpus"])
    remedy = "--status で各サーバーの合計を確認し、1 台に収まる数を指定してください"
    raise _invalid("(required_gpus, required_cpus)", amounts, "の両方を備えたサーバーがありません", remedy)


def check_one_machine(state: State, request: Request) -> None:
    """Check that no other server of the pool is the machine that a local ``request`` was asked on.

    Once ended tasks are reclaimed and under the lock, for two may ask at once.

    :raises InvalidRequestError: two tasks could be told to use one physical GPU.
    """
    if not request.get("local"):
        return
    local: list[tuple[str, Requester]] = [(server["server_name"], task) for server, task in placed_tasks(state)]
    local += [(str(other.get("only_server_name")), other) for other in state.get("waiting", [])]
    for name, record in local:
        same_host = record.get("local") is True and record.get("host") == request.get("host")
        if same_host and name != request["only_server_name"]:
            problem = f"は使えません。この計算機は既にサーバー {name} として使われています"
            remedy = f"{SERVER_VARIABLE} に {name} を指定してください"
            raise _invalid("server", request["only_server_name"], problem, remedy)


def ask(state: State, request: Request, stay: bool, keep_lease: bool) -> tuple[bool, Allocation | NoCapacityError]:
    """Let ``request`` arrive at the end of the line, unless it stands there, and see whether it is placed.

    Returns whether ``state`` was changed, and what was granted or why nothing was. ``stay`` leaves the
    request in line; without ``keep_lease`` a placed task is no longer bound to its lease.

    :raises InvalidRequestError: it can never be placed, or would make one machine two servers.
    :raises DuplicateTaskError: a task with this identifier runs or waits already.
    """
    task_id, lease = request["task_id"], request.get("lease")
    same = [record for record in records(state) if record["task_id"] == task_id]
    arrived = not same
    check_request(state, request)
    check_one_machine(state, request)
    if arrived:
        set_waiting(state, [*state.get("waiting", []), request.copy()])
        admit(state)
    elif lease is None or same[0].get("lease") != lease:
        raise DuplicateTaskError(
            f"タスクID {task_id!r} は既に実行中または待機中です\n  対処: 別のタスクIDを使うか、先に解放してください",
            parameter="task_id",
            value=task_id,
        )
    found = find_task(state, task_id)
    if found:
        server, task = found
        if not keep_lease:
            unbound: Any = {key: value for key, value in task.items() if key != "lease"}
            tasks = [unbound if other is task else other for other in server["running_tasks"]]
            put(state, {**server, "running_tasks": tasks})
        return arrived or not keep_lease, allocation_of(server, task)
    waiting = state["waiting"]
    [mine] = [record for record in waiting if record["task_id"] == task_id]
    refusal = shortfall(state, mine)
    if not stay:
        set_waiting(state, [record for record in waiting if record is not mine])
    return arrived == stay, refusal


def descriptions(state: State) -> list[ServerDescription]:
    """Return what servers the pool has, whatever runs on them."""
    return [(server["server_name"], server["total_gpus"], server["total_cpus"]) for server in state["servers"]]


def least_gpus(state: State) -> int:
    """Return the least number of GPUs that one task may ask for."""
    return state.get("min_gpus_per_task", MIN_GPUS_PER_TASK)


def limits(state: State) -> tuple[int, int, int]:
    """Return the least and the most GPUs, and the most CPUs, that one task may ask for."""
    servers = state["servers"]
    most_gpus = max(map(itemgetter("total_gpus"), servers))
    most_cpus = max(map(itemgetter("total_cpus"), servers))
    return least_gpus(state), most_gpus, most_cpus


def server_of_host(state: State, host: str, named: str | None) -> Server:
    """Return the server of the pool that the machine ``host`` is, for GPU numbers mean nothing elsewhere.

    It is the one of that name, short or full, or the one that ``named`` says.

    :raises InvalidRequestError: there is none, or it would be two: tasks on one physical GPU.
    """
    servers = state["servers"]
    by_host = [server for server in servers if _same_host(server["server_name"], host)]
    found = [server for server in servers if server["server_name"] == named] if named else by_host
    remedy = (
        f"{SERVER_VARIABLE} でサーバー名を指定するか、--init --detect または "
        "--init --server NAME:GPUS:CPUS で実際の計算機を登録してください"
    )
    if len(found) != 1:
        names = ", ".join(server["server_name"] for server in servers)
        problem = (
            f"この計算機 ({host}) にあたるサーバーがありません"
            if not found
            else "この計算機にあたるサーバーが複数あります"
        )
        raise _invalid("server", named or host, f"が正しくありません。{problem} (登録済み: {names})", remedy)
    if by_host and found != by_host:
        problem = f"が正しくありません。この計算機はサーバー {by_host[0]['server_name']} です"
        raise _invalid("server", named, problem, remedy)
    return found[0]


def _same_host(name: str, host: str) -> bool:
    name, host = name.casefold(), host.casefold()
    short = name.split(".")[0] == host.split(".")[0]
    return name == host or (short and ("." not in name or "." not in host))


def find_task(state: State, task_id: str) -> tuple[Server, Task] | None:
    """Return the task with this identifier and its server, or ``None``."""
    for server, task in placed_tasks(state):
        if task["task_id"] == task_id:
            return server, task
    return None


def remove_task(server: Server, task: Task) -> Server:
    """Return ``server`` without ``task``; what it held is available again, GPU indices in ascending order."""
    return {
        **server,
        "available_gpus": sorted([*server["available_gpus"], *task["allocated_gpus"]]),
        "available_cpus": server["available_cpus"] + task["allocated_cpus"],
        "running_tasks": [other for other in server["running_tasks"] if other is not task],
    }


def strike(state: State, task_id: str) -> None:
    """Let no task and no request of the line bear ``task_id`` any more."""
    found = find_task(state, task_id)
    if found:
        put(state, remove_task(*found))
    set_waiting(state, [request for request in state.get("waiting", []) if request["task_id"] != task_id])


def remove_all_tasks(state: State) -> None:
    """Make every server idle; servers and unknown keys stay."""
    state["servers"] = [
        {
            **server,
            "available_gpus": list(range(server["total_gpus"])),
            "available_cpus": server["total_cpus"],
            "running_tasks": [],
        }
        for server in state["servers"]
    ]


def shortfall(state: State, request: Request) -> NoCapacityError:
    """Explain why ``request`` is not placed now: what is short, who holds it, and what would help."""
    gpus, cpus = request["required_gpus"], request["required_cpus"]
    usable = [*eligible_servers(state, request)]
    eligible = {server["server_id"] for server in usable}
    waiting = state.get("waiting", [])
    ahead = waiting.index(request) if request in waiting else len(waiting)
    lines = [f"GPU {gpus} 個と CPU {cpus} 個を同時に確保できるサーバーがありません"]
    fewest: list[Task] | None = None
    for server in state["servers"]:
        short_gpus = max(0, gpus - len(server["available_gpus"]))
        short_cpus = max(0, cpus - server["available_cpus"])
        short = [f"{what} {count} 個" for what, count in (("GPU", short_gpus), ("CPU", short_cpus)) if count]
        if server["server_id"] not in eligible:
            lines.append(f"  {server['server_name']}: 対象外")
            continue
        lines.append(
            f"  {server['server_name']}: "
            + (f"{'・'.join(short)}不足" if short else "先に待っている要求のために確保中")
        )
        lines += [
            f"    {task['task_id']}: GPU {len(task['allocated_gpus'])} 個・CPU {task['allocated_cpus']} 個"
            f" ({task['start_time']} から{', ' + _printable(str(task['user'])) if 'user' in task else ''})"
            for task in server["running_tasks"]
        ]
        releases = fewest_releases(server, short_gpus, short_cpus)
        if fewest is None or len(releases) < len(fewest):
            fewest = releases
    free_gpus = sum(len(server["available_gpus"]) for server in usable)
    free_cpus = sum(server["available_cpus"] for server in usable)
    if free_gpus >= gpus and free_cpus >= cpus and fewest:
        lines.append(
            f"  空きの合計 (GPU {free_gpus} 個・CPU {free_cpus} 個) は足りますが、複数のサーバーに分散しています"
        )
    helpful = [task["task_id"] for task in fewest or []]  # none where there is room, kept for others
    if helpful:
        lines.append(f"  次の {len(helpful)} 件が解放されれば足ります: {', '.join(helpful)}")
    if ahead:
        lines.append(f"  先に待っている要求: {ahead} 件")
    return NoCapacityError(
        "\n".join(lines), required_gpus=gpus, required_cpus=cpus, fewest_releases=helpful, waiting=ahead
    )


def fewest_releases(server: Server, gpus: int, cpus: int) -> list[Task]:
    """Return the fewest tasks that together hold ``gpus`` GPUs and ``cpus`` CPUs of ``server``.

    Of all sets of n tasks with the same GPUs only the one with the most CPUs can matter, so this is
    O(tasks² · gpus).
    """
    best: dict[tuple[int, int], tuple[int, list[Task]]] = {(0, 0): (0, [])}
    for task in server["running_tasks"]:
        for (count, held_gpus), (held_cpus, tasks) in list(best.items()):
            key = (count + 1, min(gpus, held_gpus + len(task["allocated_gpus"])))
            more = held_cpus + task["allocated_cpus"]
            if key not in best or more > best[key][0]:
                best[key] = (more, [*tasks, task])
    enough = [tasks for (_, held_gpus), (held_cpus, tasks) in best.items() if held_gpus >= gpus and held_cpus >= cpus]
    return min(enough, key=len)


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
    summary: Summary = {
        "total_servers": len(servers),
        "total_gpus": sum(server["total_gpus"] for server in servers),
        "total_available_gpus": sum(server["available_gpus"] for server in servers),
        "total_cpus": sum(server["total_cpus"] for server in servers),
        "total_available_cpus": sum(server["available_cpus"] for server in servers),
        "total_running_tasks": sum(server["running_tasks"] for server in servers),
        "servers": servers,
    }
    if state.get("waiting"):
        summary["total_waiting"] = len(state["waiting"])
    return summary


def _utilization(available: int, total: int) -> str:
    return f"{100 * (total - available) / total if total else 0:.1f}%"


# --- Files: what leases and the store have in common ----------------------------------------------

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
    errno.EBADF: _ASK_LOCAL_DISK,  # an exclusive lock refused on what is open for reading only
}


def _os_reason(error: OSError) -> str:
    place = f": {os.fsdecode(error.filename)}" if error.filename else ""
    return f"{error.strerror or error}{place}"


# ``directory`` is the descriptor of an open one: whatever becomes of its name meanwhile, a change reads
# and writes the document in the directory that it has locked.


def _open_directory(path: str, directory: int | None = None) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)


def _open_temporary(directory: int, target: str) -> tuple[str, int]:
    """Make the one temporary file for ``target`` anew, sweeping what a killed writer may have left."""
    name = f".{target.lstrip('.')}.tmp"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
    try:
        return name, os.open(name, flags, 0o666, dir_fd=directory)
    except FileExistsError:
        os.unlink(name, dir_fd=directory)
        return name, os.open(name, flags, 0o666, dir_fd=directory)


def _share_with_group(descriptor: int, parent: os.stat_result, mode: int = 0o660) -> None:
    """Let the group of a directory that it may write use this new file too, whatever the umask.

    Others may then read exactly if they may list the directory. Elsewhere the umask holds.
    """
    if not parent.st_mode & stat.S_IWGRP:
        return
    if os.fstat(descriptor).st_gid != parent.st_gid:  # no set-group-ID bit on the directory
        try:
            os.fchown(descriptor, -1, parent.st_gid)
        except PermissionError:
            return  # we are not in that group, so it is not ours to share with
    # Others get what the directory gives them, but never the right to write.
    os.fchmod(descriptor, mode | (parent.st_mode & (mode >> 3) & (stat.S_IROTH | stat.S_IXOTH)))


def _keep_aside(directory: int, name: str, aside: str) -> None:
    both = {"src_dir_fd": directory, "dst_dir_fd": directory}
    try:
        # A second name, so that a crash ahead of the replacement leaves the file in its place too.
        os.link(name, aside, **both, follow_symlinks=False)
    except FileNotFoundError:  # it vanished: nothing is to be kept
        pass
    except OSError:  # a directory, or a file system without hard links
        os.rename(name, aside, **both)


def _aside_name(directory: int, name: str) -> str:
    """Return a name that is not taken; called with the directory locked."""
    base = aside = f"{name}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}"
    number = 1
    with suppress(FileNotFoundError):
        while True:
            os.lstat(aside, dir_fd=directory)
            number += 1
            aside = f"{base}-{number}"
    return aside


def _is_path(text: str) -> bool:
    try:
        return bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def timestamp() -> str:
    """Return the local time, ISO 8601 to the second. Information only: no decision depends on it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S")


# --- This machine and its processes ---------------------------------------------------------------


class Leases:
    """Locks on the files of one directory, which the kernel frees when their last holder is gone.

    A lease is a file that its maker keeps locked with ``flock``. Processes that inherit the
    descriptor, by ``fork`` and through ``exec``, hold the same lock; so it tells whether any process
    of a job lives, right in every pid namespace and after every kind of death. No heartbeat, no pid.
    """

    _LEAST_DESCRIPTOR = 20

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def make(self) -> tuple[str, int]:
        """Make a lease; return its name and the descriptor that holds it, which children inherit."""
        while True:
            name = os.urandom(16).hex()
            descriptor = os.open(os.path.join(self.directory, name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _share_with_group(descriptor, os.stat(self.directory))
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_nlink:  # else it was swept before we had locked it
                    # Inheritable, and out of the way of the numbers that shell scripts redirect.
                    return name, fcntl.fcntl(descriptor, fcntl.F_DUPFD, self._LEAST_DESCRIPTOR)
            finally:
                os.close(descriptor)

    @staticmethod
    def give_up(descriptor: int) -> bool:
        """Close the descriptor of a lease; tell whether no child holds it either, file or no file."""
        try:
            other = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
        finally:
            os.close(descriptor)
        try:
            return _flock(other, fcntl.LOCK_SH)
        finally:
            os.close(other)

    def is_free(self, name: str) -> bool:
        """Tell whether nobody holds the lease; what cannot be looked at counts as held."""
        # Shared, so that two who look at once do not take each other for the holder.
        with self._locked(name, fcntl.LOCK_SH) as locked:
            return locked

    def sweep(self, named: Iterable[Requester]) -> None:
        """Delete free leases that none of these records names; called with the state file locked."""
        if not os.access(self.directory, os.F_OK):  # as long as nobody has used a lease; quicker than an exception
            return
        try:
            names = os.listdir(self.directory)
        except (FileNotFoundError, NotADirectoryError):
            return
        in_use = {str(record["lease"]) for record in named if "lease" in record} if names else ()
        for name in names:
            if name not in in_use and self._is_name(name):
                # Deleted while we hold it: its maker may have opened it, but not locked it, and then sees.
                with self._locked(name, fcntl.LOCK_EX) as locked:
                    if locked:
                        self.delete(name)

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.directory, name))

    @contextmanager
    def _locked(self, name: str, operation: int) -> Iterator[bool]:
        """Lock the file of a lease, if that can be done at once; yield whether it was."""
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # somebody may have put a FIFO there
            descriptor = os.open(os.path.join(self.directory, name), flags)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENXIO):
                raise
            yield False
            return
        try:
            yield stat.S_ISREG(os.fstat(descriptor).st_mode) and _flock(descriptor, operation)
        finally:
            os.close(descriptor)

    def is_ended(self, record: Requester) -> bool:
        """Tell whether ``record`` names a lease that is free; the lease of another host is never judged."""
        name = record.get("lease")
        if not isinstance(name, str) or record.get("host") != host_name() or not self._is_name(name):
            return False
        return self.is_free(name)

    @staticmethod
    def _is_name(name: str) -> bool:
        return len(name) == 32 and {*name} <= {*"0123456789abcdef"}


def _flock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_in_time(descriptor: int, deadline_s: float) -> bool:
    """Lock an open file for us alone, trying until ``deadline_s``; tell whether it was had."""
    # Imported here since a command that only reads has no use for it, and it is half of a start.
    import filelock

    while not filelock.lock_descriptor(descriptor, blocking=False):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(LOCK_POLL_S, left_s))
    return True


#: descriptors with which this process waits for locks or holds them
_lock_descriptors: set[int] = set()
#: held while one is opened or closed, and at a fork
_descriptors_change = RLock()


def _leave_locks_to_parent() -> None:
    """Close what a forked child has of our locks, or it would hold them as long as it lives."""
    for descriptor in _lock_descriptors:
        with suppress(OSError):
            os.close(descriptor)
    _lock_descriptors.clear()
    _waits.clear()
    _descriptors_change.release()


os.register_at_fork(
    before=_descriptors_change.acquire,
    after_in_parent=_descriptors_change.release,
    after_in_child=_leave_locks_to_parent,
)


def _opened(open_descriptor: Callable[[A], int], argument: A) -> int:
    with _descriptors_change:
        descriptor = open_descriptor(argument)
        _lock_descriptors.add(descriptor)
    return descriptor


def _unlock_and_close(descriptor: int) -> None:
    # Unlocked by name, for a child that was forked without Python's knowledge shares the lock through its
    # copy of the descriptor. Should that fail, closing frees the lock in any other case.
    with _descriptors_change:
        if descriptor in _lock_descriptors:  # else not opened, or a fork within the change has made us the child
            _lock_descriptors.discard(descriptor)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
                finally:
                    os.close(descriptor)
            except OSError:
                pass


class _Wait:
    """A wait for a lock in the kernel's own queue, in which a thread stands."""

    def __init__(self, descriptor: int) -> None:
        self.had = self.given_up = False
        self.failure: BaseException | None = None
        self.done = allocate_lock()
        self.done.acquire()
        # The same lock, under a number that nobody else closes and reuses.
        self._own = _opened(os.dup, descriptor)
        _waits.append(self)

    def stand_in_queue(self) -> None:
        try:
            fcntl.flock(self._own, fcntl.LOCK_EX)  # what ``lock_descriptor`` takes, which would poll for it
            self.had = True
        except BaseException as error:  # it is raised again where the lock is waited for
            self.failure = error
        finally:
            self.end()

    def end(self) -> None:
        with suppress(OSError), _descriptors_change:
            own, self._own = self._own, -1
            if own in _lock_descriptors:
                _lock_descriptors.discard(own)
                os.close(own)
        if self in _waits:
            _waits.remove(self)
            self.done.release()

    def give_up(self) -> None:
        """Let the kernel take back what it grants from now on: the thread may not run for long, or never again.

        With our descriptor gone, the last one to hold the open file is the call that waits for the lock.
        """
        self.given_up = True
        with suppress(OSError), _descriptors_change:
            if self._own in _lock_descriptors:
                nothing = os.open(os.devnull, os.O_RDONLY)
                os.dup2(nothing, self._own, inheritable=False)
                os.close(nothing)


_waits: list[_Wait] = []


def _lock_in_turn(descriptor: int, deadline_s: float) -> bool:
    """Do the same as :func:`_lock_in_time`, but let those who wait have it in turn, without polling.

    Among those who poll, whoever has just released the lock gets it again, and they cost more than the
    work itself. The kernel keeps a queue, but knows no time limit, so a thread stands in it. It outlives
    a wait that was given up. Until it is gone, further waits of this process poll, lest one who tries
    again and again behind a stopped process collects threads.
    """
    while any(wait.given_up for wait in [*_waits]) and time.monotonic() < deadline_s:
        if _lock_in_time(descriptor, min(deadline_s, time.monotonic() + LOCK_POLL_S)):
            return True
    if time.monotonic() >= deadline_s:
        return False
    wait, done = _Wait(descriptor), False
    try:
        try:
            start_new_thread(wait.stand_in_queue, ())
        except RuntimeError:  # no more threads for us, or the interpreter shuts down
            wait.end()
            return _lock_in_time(descriptor, deadline_s)
        done = wait.done.acquire(timeout=min(max(0, deadline_s - time.monotonic()), TIMEOUT_MAX))
    finally:
        if not done:
            wait.give_up()
    if wait.failure:
        raise wait.failure
    return done and wait.had


@cache  # a process stays on its machine, and its records with the name that it began with
def host_name() -> str:
    """Return the name of this machine as the kernel knows it."""
    return os.uname().nodename


def this_requester(command: str | None = None) -> Requester:
    """Describe this process; ``command`` stands for its own command line."""
    uid = os.getuid()
    return {
        "user": _user_name(uid),
        "uid": uid,
        "host": host_name(),
        "pid": os.getpid(),
        "command": _printable(" ".join(sys.argv) if command is None else command),
    }


@cache  # it may have to be asked of a directory service
def _user_name(uid: int) -> str:
    try:
        return _printable(pwd.getpwuid(uid).pw_name)
    except KeyError:  # a container may run as a user without a name
        return str(uid)


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
        with self.failures_reported():
            self.path = os.path.abspath(path)  # fails where the current directory has been removed
        self._split_path = os.path.split(self.path)
        self.lock_name = lock_name
        self.lock_timeout_s = lock_timeout_s

    def directory(self) -> str:
        """Return the directory in which the document really lies."""
        with self.failures_reported():
            return self._locate()[0]

    def stamp(self) -> object:
        """Return what is another one once somebody has changed the document; costs one ``stat``."""
        with self.failures_reported():
            found = os.stat(self.path)
            return found.st_ino, found.st_mtime_ns

    def read(self) -> State:
        """Return a private copy of the stored state, without waiting for any lock.

        :raises UnusableStateFileError: there is no valid state file.
        :raises StateFileError: reading it failed.
        """
        with self.failures_reported():
            return self._load(self.path)[0]

    def update(self, change: Callable[[State], tuple[bool, T]], instead_of_unusable: State | None = None) -> T:
        """Apply ``change`` to the stored state as one atomic, durable step and return its result.

        ``change`` gets a private copy and may be called more than once; it has no effect outside its
        argument, whose servers it replaces rather than alters. It tells whether it has changed
        anything, and its result. Otherwise, or if it raises, nothing is written.

        :param instead_of_unusable: what to change if there is no valid state file; what stands in its
            place is kept as ``NAME.corrupt-TIME``. By default that is an error.
        :raises LockTimeoutError: the lock was not had within ``lock_timeout_s`` seconds.
        :raises UnusableStateFileError: there is no valid state file; it is left as it is.
        :raises StateFileError: reading or writing failed. Unless the text says otherwise, the old
            document stands.
        """

        def step(directory: int, name: str) -> T:
            aside = None
            try:
                state, before = self._load(name, directory)
            except UnusableStateFileError:
                if instead_of_unusable is None:
                    raise
                state, before, aside = instead_of_unusable, NO_LINES, _aside_name(directory, name)
            state["last_updated"] = timestamp()
            changed, result = change(state)
            if changed or aside:
                self._commit(directory, name, state, before, aside)
            return result

        return self._locked(step)

    def create(self, state: State) -> None:
        """Write ``state`` unless something, even a dangling link, stands at the path already.

        :raises LockTimeoutError, StateFileError: as :meth:`update`.
        """
        if os.path.lexists(self.path):
            return

        def step(directory: int, name: str) -> None:
            try:
                os.lstat(name, dir_fd=directory)
            except FileNotFoundError:
                self._commit(directory, name, {**state, "last_updated": timestamp()})

        self._locked(step)

    def make_directory(self, name: str) -> None:
        """Make a directory beside the document, for all who may write there, unless there is one."""

        def step(parent: int, _: str) -> None:
            with suppress(FileNotFoundError):
                if stat.S_ISDIR(os.stat(name, dir_fd=parent).st_mode):
                    return
            # Moved in when it is ready, as the lock file is.
            temporary = f"{name}.tmp"
            with suppress(FileNotFoundError):
                os.rmdir(temporary, dir_fd=parent)
            os.mkdir(temporary, dir_fd=parent)
            descriptor = _open_directory(temporary, parent)
            try:
                _share_with_group(descriptor, os.fstat(parent), 0o2770)
            finally:
                os.close(descriptor)
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)

        self._locked(step)

    def _locate(self) -> tuple[str, str]:
        """Return directory and name of where the document really lies: when it is replaced, a link stays a link.

        Lock and temporary file lie there too: two links to one document must share one lock.
        """
        try:
            if not stat.S_ISLNK(os.lstat(self.path).st_mode):
                return self._split_path
        except FileNotFoundError:  # not made yet; what else fails must not make a link look like a plain file
            return self._split_path
        try:
            return os.path.split(os.path.realpath(self.path, strict=True))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP):
                raise
            return self._split_path  # the link leads nowhere, and is itself what stands in the place

    def _load(self, path: str, directory: int | None = None) -> tuple[State, ServerLines]:
        try:
            # Without O_NONBLOCK, a FIFO in the place of the file would make us wait for ever.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EACCES, errno.ELOOP, errno.ENXIO):
                raise self._unusable(_os_reason(error)) from error
            raise  # a disk or a limit that fails now says nothing about the file
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise self._unusable("通常のファイルではありません")
            data = b""
            while len(data) < found.st_size and (part := os.read(descriptor, found.st_size - len(data))):
                data += part
        finally:
            os.close(descriptor)
        try:
            return decode_with_lines(data)
        except ValueError as error:
            raise self._unusable(str(error)) from error

    def _locked(self, step: Callable[[int, str], T]) -> T:
        """Hold both locks while ``step`` runs; it gets the document's directory, and its name in there.

        Every call opens descriptors of its own, so threads and forked children exclude each other
        like strangers. An ``OSError`` of the work inside is reported with the whole path of its file.
        """
        deadline_s = time.monotonic() + self.lock_timeout_s
        path, directory, lock_file = "", -1, -1
        try:
            path, name = located = self._locate()
            directory = _opened(_open_directory, path)
            at_once = _lock_in_time(directory, 0)
            if not at_once and not _lock_in_turn(directory, deadline_s):
                raise self._timed_out(path)
            lock_file = _opened(self._open_lock_file, directory)
            at_once = _lock_in_time(lock_file, 0) and at_once
            if not at_once and not _lock_in_time(lock_file, deadline_s):
                raise self._timed_out(path)
            if not at_once and (self._locate() != located or not os.path.samestat(os.fstat(directory), os.stat(path))):
                raise OSError(errno.ESTALE, "待っている間に移動されました", os.path.join(*located))
            return step(directory, name)
        except ResourceManagerError:  # LockTimeoutError is an OSError too
            raise
        except OSError as error:
            if isinstance(error.filename, str):
                error.filename = os.path.join(path, error.filename)
            raise self._failure(error) from error
        finally:
            try:
                _unlock_and_close(lock_file)
            finally:  # even if Ctrl-C has interrupted that
                _unlock_and_close(directory)

    def _timed_out(self, directory: str) -> LockTimeoutError:
        directory = os.path.realpath(directory)
        lock_file = os.path.join(directory, self.lock_name)
        return LockTimeoutError(
            f"ロック取得タイムアウト\n  {lock_file} と {directory} のロックを"
            f" {self.lock_timeout_s:g} 秒待ちましたが、別のプロセスが使用中です\n"
            "  対処: しばらくして再実行するか、lslocks で保持しているプロセスを確認してください"
            " (ロックファイルの削除は不要です)",
            lock_file=lock_file,
            timeout_s=self.lock_timeout_s,
        )

    def _open_lock_file(self, directory: int) -> int:
        """Open the lock file; called with the directory locked, so only one of us ever makes it."""
        try:
            return os.open(self.lock_name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=directory)
        except FileNotFoundError:
            # Made elsewhere and moved in, so that a kill cannot leave one that the group cannot open.
            temporary, descriptor = _open_temporary(directory, self.lock_name)
            try:
                _share_with_group(descriptor, os.fstat(directory))
                os.replace(temporary, self.lock_name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor

    def _commit(
        self,
        directory: int,
        name: str,
        state: State,
        before: ServerLines = NO_LINES,
        aside: str | None = None,
    ) -> None:
        """Make ``state`` the document, atomically and durably; both locks are held.

        :param before: the servers as they were read; see :func:`encode_state`.
        :param aside: a name under which what it replaces is kept.

        A failed ``fsync`` is final: the kernel may have dropped the very pages it could not write,
        and a second call would then succeed without them ("fsyncgate", PostgreSQL 2018).
        """
        try:
            data = memoryview(encode_state(state, before))
        except ValueError as error:
            reason = f"書き込めない内容です ({error})"
            raise self._error(StateFileError, reason, "ファイルは変更していません。内容を確認してください") from error
        temporary, descriptor = _open_temporary(directory, name)
        try:
            try:
                _share_with_group(descriptor, os.fstat(directory))
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if aside:
                _keep_aside(directory, name, aside)
            os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):  # the failure itself is what counts; the next change sweeps
                os.unlink(temporary, dir_fd=directory)
            raise
        if aside:
            kept = os.path.join(os.path.dirname(os.path.realpath(self.path)), aside)
            logger.warning("使えない状態ファイルを %s に保存し、作り直しました", kept)
        try:
            os.fsync(directory)
        except OSError as error:
            raise self._error(
                StateFileError,
                f"変更は書き込まれましたが、ディスクへの保存を確認できません ({_os_reason(error)})",
                "ディスクを確認し、--detail で現在の状態を確かめてください",
            ) from error

    @contextmanager
    def failures_reported(self) -> Iterator[None]:
        """Turn an ``OSError`` of the work inside into a :class:`StateFileError` that says what to do."""
        try:
            yield
        except ResourceManagerError:  # LockTimeoutError is an OSError too
            raise
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> StateFileError:
        remedy = _REMEDIES.get(error.errno or 0, "ディスクとディレクトリの状態を確認してください")
        return self._error(StateFileError, _os_reason(error), remedy)

    def _unusable(self, reason: str) -> StateFileError:
        remedy = "内容を直すか、python cli_v01.py --reset --yes で作り直してください (元のファイルは保存されます)"
        return self._error(UnusableStateFileError, reason, remedy)

    def _error(self, kind: type[StateFileError], reason: str, remedy: str) -> StateFileError:
        text = f"状態ファイルのエラー: {self.path}\n  原因: {reason}\n  対処: {remedy}"
        return kind(text, path=self.path, reason=reason, remedy=remedy)


# --- The manager ----------------------------------------------------------------------------------


class GPUResourceManagerV01:
    """First Fit allocation over the pool that one state file describes.

    Safe to use from many processes and threads at once, and after ``fork``. Between two calls it
    holds no lock and no open file.

    :param resource_file: the state file; by default the one that the environment variable
        ``GPU_RESOURCE_FILE`` names, else ``resource_status.json`` beside this module. It is made when
        there is none, and never overwritten.
    :param lock_timeout_s: seconds to wait for the lock, 0-1e9, or ``math.inf``.
    :param servers: name, GPUs (1-1024) and CPUs (1-65536) of each server of a pool that is made; by
        default ``TOTAL_SERVERS`` made-up ones.
    :param min_gpus: the least number of GPUs that a task of a pool that is made may ask for.
    :raises InvalidRequestError: a parameter is of no use.
    :raises PoolConflictError: there is a pool already, and it is not as described.
    :raises LockTimeoutError, StateFileError: the missing state file could not be made.
    """

    RESOURCE_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "resource_status.json")
    LOCK_FILE = ".resource.lock"  # in the directory of the state file
    LEASE_DIRECTORY = ".leases"  # likewise
    TOTAL_SERVERS = 4
    GPUS_PER_SERVER = 8
    CPUS_PER_SERVER = 64

    def __init__(
        self,
        resource_file: str | os.PathLike[str] | None = None,
        lock_timeout_s: float = DEFAULT_LOCK_TIMEOUT_S,
        *,
        servers: Sequence[ServerDescription] | None = None,
        min_gpus: int | None = None,
    ) -> None:
        path = os.environ.get(RESOURCE_FILE_VARIABLE) or self.RESOURCE_FILE if resource_file is None else resource_file
        if isinstance(path, os.PathLike):
            path = os.fspath(path)
        if not isinstance(path, str) or not _is_path(path):
            raise _invalid("resource_file", path, "がファイルのパスではありません", "パスを文字列で指定してください")
        _check_seconds("lock_timeout_s", lock_timeout_s)
        described = self._described(servers, min_gpus)
        self._store = JsonFileStore(path, self.LOCK_FILE, lock_timeout_s)
        self.resource_file = self._store.path
        self._store.create(described)
        self._check_same_pool(servers, min_gpus)
        self._leases = Leases(os.path.join(self._store.directory(), self.LEASE_DIRECTORY))

    def allocate_resources(
        self,
        task_id: str,
        required_gpus: int,
        required_cpus: int,
        prefer_server_id: int | None = None,
        *,
        wait_s: float = 0,
        on_wait: OnWait | None = None,
        local: bool = False,
    ) -> Allocation | None:
        """Give the task GPUs and CPUs on one server, or return ``None``: no room now, try later.

        Why there is no room is logged as a warning. The task runs until it is released, whatever
        becomes of this process.

        :param task_id: unique among the running and waiting tasks; 1-128 characters, not blank, no
            control character, no leading ``-``.
        :param required_gpus: 2-8 on the default pool; see :func:`limits`.
        :param required_cpus: 1-64 on the default pool.
        :param prefer_server_id: tried first; First Fit when it has no room.
        :param wait_s: seconds to stand in line for room, 0-1e9; ``math.inf`` for ever. The line is kept by
            :func:`admit`, and a waiter that dies leaves it.
        :param on_wait: called with the position in line, from 1, and why there is no room yet,
            whenever one of them has changed.
        :param local: only on the server that is this machine; see :func:`server_of_host`.
        :raises InvalidRequestError: a parameter is out of range or of the wrong type.
        :raises DuplicateTaskError: a task with this identifier runs or waits already.
        :raises LockTimeoutError, StateFileError: as :meth:`JsonFileStore.update`.
        """
        request = self._request(task_id, required_gpus, required_cpus, prefer_server_id, local, None)
        _check_seconds("wait_s", wait_s)
        try:
            if not wait_s:
                return self._obtain(request)
            with self._lease(request):
                return self._obtain(request, wait_s, on_wait, keep_lease=False)
        except NoCapacityError as refusal:
            logger.warning("リソース不足: %s", refusal)
            return None

    @contextmanager
    def allocation(
        self,
        task_id: str,
        required_gpus: int,
        required_cpus: int,
        *,
        wait_s: float = 0,
        on_wait: OnWait | None = None,
        command: str | None = None,
    ) -> Iterator[Allocation]:
        """Hold GPUs and CPUs of this machine while the block runs, and no longer than its processes live.

        The task is bound to a lease: should this process be killed, the next change of anybody takes
        back what it held, once every child that has inherited the lease is gone too. ``fork`` and
        ``os.system`` hand it down; ``subprocess`` does with ``close_fds=False``.

        Parameters and errors as :meth:`allocate_resources`, and:

        :param command: recorded as information; by default the command line of this process.
        :raises NoCapacityError: there is no room, or was none for ``wait_s`` seconds.
        """
        request = self._request(task_id, required_gpus, required_cpus, None, True, command)
        _check_seconds("wait_s", wait_s)
        with self._lease(request):
            yield self._obtain(request, wait_s, on_wait)

    def release_resources(self, task_id: str, force: bool = False) -> bool:
        """Take back what the task holds; ``True`` once that is on disk, ``False`` for an unknown task.

        A request that waits is struck from the line.

        :param force: even if the task belongs to another user. A guard against mistakes, no security
            boundary: who may write the file may do anything.
        :raises InvalidRequestError: ``task_id`` is none that a task can have.
        :raises NotOwnerError: it belongs to another user.
        :raises LockTimeoutError, StateFileError: as :meth:`JsonFileStore.update`.
        """
        _check_name("task_id", task_id)
        uid = os.getuid()

        def change(state: State) -> tuple[bool, bool]:
            found = [record for record in records(state) if record["task_id"] == task_id]
            if not found:
                return False, False
            owner = found[0].get("uid")
            if not force and isinstance(owner, int) and uid not in (0, owner):
                name = _printable(str(found[0].get("user", owner)))
                raise NotOwnerError(
                    f"タスク {task_id!r} は {name} のものです\n"
                    "  対処: 本人に確認し、それでも解放するなら --force を付けてください",
                    task_id=task_id,
                    owner=name,
                )
            strike(state, task_id)
            return True, True

        released = self._change(change)
        if released:
            logger.info("リソース解放完了: %s", task_id)
        else:
            logger.warning("タスクが見つかりません: %s", task_id)
        return released

    def get_resource_summary(self) -> Summary:
        """Return counts for the pool and each server, without waiting for a lock.

        What a task holds whose processes are gone counts as free: the next change takes it back.

        :raises StateFileError: the state file cannot be read.
        """
        state = self._store.read()
        with self._store.failures_reported():
            ended = reclaim(state, self._leases.is_ended)
        summary = summarize(state)
        if ended:
            summary["ended_tasks"] = ended
        return summary

    def get_detailed_status(self) -> State:
        """Return the document of the state file, without waiting for a lock.

        A task or waiting request whose processes are gone has one more key, ``"ended": True``.

        :raises StateFileError: the state file cannot be read.
        """
        state = self._store.read()
        with self._store.failures_reported():
            for record in records(state):
                if self._leases.is_ended(record):
                    record["ended"] = True
        return state

    def reset_resources(
        self, servers: Sequence[ServerDescription] | None = None, min_gpus: int | None = None, force: bool = True
    ) -> bool:
        """Forget every task and every waiting request, and return ``True``.

        Servers and unknown keys stay, unless other servers are described. A state file that cannot be
        used is set aside as ``resource_status.json.corrupt-TIME`` and made anew.

        :param servers: as for construction; also ``min_gpus``.
        :param force: even if tasks run.
        :raises InvalidRequestError: a description is of no use.
        :raises PoolConflictError: tasks run, and not ``force``.
        :raises LockTimeoutError, StateFileError: as :meth:`JsonFileStore.update`.
        """
        described = self._described(servers, min_gpus)

        def change(state: State) -> tuple[bool, None]:
            running = [task["task_id"] for _, task in placed_tasks(state)]
            if running and not force:
                raise PoolConflictError(
                    f"実行中のタスクがあります: {', '.join(running)}\n"
                    "  対処: 終わるのを待つか、記録を消してよければ --reset --yes を指定してください"
                )
            remove_all_tasks(state)
            set_waiting(state, [])
            if servers is not None:
                state["servers"] = described["servers"]
            if min_gpus is not None:
                state["min_gpus_per_task"] = min_gpus
            return True, None

        self._change(change, described)
        logger.info("すべてのリソースをリセットしました")
        return True

    def _described(self, servers: Sequence[ServerDescription] | None, min_gpus: int | None) -> State:
        """Return an idle pool as described; without a description, the default one."""
        state = new_state(self.TOTAL_SERVERS, self.GPUS_PER_SERVER, self.CPUS_PER_SERVER)
        if servers is not None:
            for name, gpus, cpus in servers:
                _check_name("サーバー名", name)
                _check_int("サーバーの GPU 数", gpus, 1, MAX_GPUS_PER_SERVER)
                _check_int("サーバーの CPU 数", cpus, 1, MAX_CPUS_PER_SERVER)
            names = [name.casefold() for name, _, _ in servers]
            if not names or len({*names}) < len(names):
                raise _invalid("servers", servers, "が空か、同じ名前が重複しています", "異なる名前を指定してください")
            state["servers"] = new_servers(servers)
        if min_gpus is not None:
            _check_int("min_gpus", min_gpus, 1, limits(state)[1])
            state["min_gpus_per_task"] = min_gpus
        return state

    def _check_same_pool(self, servers: Sequence[ServerDescription] | None, min_gpus: int | None) -> None:
        if servers is None and min_gpus is None:
            return
        state = self._store.read()
        if servers not in (None, descriptions(state)) or min_gpus not in (None, least_gpus(state)):
            raise PoolConflictError(
                f"既存の状態ファイルの構成は指定と異なります: {self.resource_file}\n"
                "  対処: 変えるなら、--init の代わりに --reset で同じ構成を指定してください"
            )

    def _request(
        self, task_id: str, gpus: int, cpus: int, prefer_server_id: int | None, local: bool, command: str | None
    ) -> Request:
        """Check the parameters and return them as a request of this process."""
        _check_name("task_id", task_id)
        _check_int("required_gpus", gpus, 1, MAX_GPUS_PER_SERVER)
        _check_int("required_cpus", cpus, 1, MAX_CPUS_PER_SERVER)
        if prefer_server_id is not None:
            _check_int("prefer_server_id", prefer_server_id, 0, None)
        request: Request = {
            "task_id": task_id,
            "required_gpus": gpus,
            "required_cpus": cpus,
            "prefer_server_id": prefer_server_id,
            "only_server_name": None,
            "passed_over": 0,
        }
        request.update(this_requester(command))  # type: ignore[typeddict-item]
        if local:
            state = self._store.read()
            server = server_of_host(state, host_name(), os.environ.get(SERVER_VARIABLE))
            request["only_server_name"] = server["server_name"]
            request["local"] = True
        if not MIN_GPUS_PER_TASK <= gpus <= self.GPUS_PER_SERVER or cpus > self.CPUS_PER_SERVER:
            check_request(self._store.read(), request)  # no lock for what can never be granted
        return request

    @contextmanager
    def _lease(self, request: Request) -> Iterator[None]:
        """Bind ``request`` to a lease while the block runs, or for as long as a child holds it."""
        if not os.path.isdir(self._leases.directory):
            self._store.make_directory(self.LEASE_DIRECTORY)
        with self._store.failures_reported():
            request["lease"], descriptor = self._leases.make()
        try:
            yield
        finally:
            with self._store.failures_reported():
                free = Leases.give_up(descriptor)
            if free:
                self._forget(request["lease"])

    def _forget(self, lease: str) -> None:
        """Take back what a lease held, be it a task or a place in the line.

        By the lease, not by the name, which a newer task may bear by now.
        """

        def change(state: State) -> tuple[bool, None]:
            mine = [record["task_id"] for record in records(state) if record.get("lease") == lease]
            for task_id in mine:
                strike(state, task_id)
            return bool(mine), None

        self._change(change)
        with self._store.failures_reported():
            self._leases.delete(lease)

    def _obtain(
        self, request: Request, wait_s: float = 0, on_wait: OnWait | None = None, keep_lease: bool = True
    ) -> Allocation:
        """Ask for ``request``, standing in line for ``wait_s`` seconds, for which it needs a lease.

        :raises NoCapacityError: there is no room, or was none in time.
        """
        if wait_s:
            answer = self._stand_in_line(request, wait_s, on_wait, keep_lease)
        else:
            answer = self._ask(request, False, keep_lease)
        if isinstance(answer, NoCapacityError):
            raise answer
        logger.info("リソース割り当て成功: %s", answer)
        return answer

    def _ask(self, request: Request, stay: bool, keep_lease: bool) -> Allocation | NoCapacityError:
        return self._change(lambda state: ask(state, request, stay, keep_lease))

    def _stand_in_line(
        self, request: Request, wait_s: float, on_wait: OnWait | None, keep_lease: bool
    ) -> Allocation | NoCapacityError:
        """Arrive in line and stay there until ``request`` is placed or time is up."""
        deadline_s = time.monotonic() + wait_s
        answer = self._ask(request, True, keep_lease)
        told: NoCapacityError | None = None
        seen: object = None
        looked_s, pause_s = time.monotonic(), WAIT_POLL_S[0]
        while isinstance(answer, NoCapacityError) and time.monotonic() < deadline_s:
            if on_wait and (told is None or str(told) != str(answer)):
                told = answer
                on_wait(answer.waiting + 1, str(answer))
            time.sleep(max(0, min(pause_s, deadline_s - time.monotonic())))
            stamp = self._store.stamp()
            if stamp == seen and time.monotonic() - looked_s < WAIT_RECHECK_S:
                pause_s = min(1.5 * pause_s, WAIT_POLL_S[1])
                continue
            if stamp != seen:
                pause_s = WAIT_POLL_S[0]
            seen, looked_s = stamp, time.monotonic()
            # On a copy, without a lock: only who would be served goes on to change the file.
            state = self._store.read()
            if all(record.get("lease") != request["lease"] for record in records(state)):
                raise NoCapacityError(f"タスク {request['task_id']!r} の待機は取り消されました", **vars(answer))
            with self._store.failures_reported():
                self._serve(state)
            _, answer = ask(state, request, True, keep_lease)
            if not isinstance(answer, NoCapacityError):
                answer = self._ask(request, True, keep_lease)
        return self._ask(request, False, keep_lease) if isinstance(answer, NoCapacityError) else answer

    def _change(self, change: Callable[[State], tuple[bool, T]], instead_of_unusable: State | None = None) -> T:
        """Reclaim what has ended, apply ``change``, and serve the line before and after it, as one step."""

        def serve_and_change(state: State) -> tuple[bool, T]:
            # Deleting what no document names has no effect that a second call could see.
            self._leases.sweep(records(state))
            served = self._serve(state)
            changed, result = change(state)
            if changed:
                admit(state)
            return changed or served, result

        return self._store.update(serve_and_change, instead_of_unusable)

    def _serve(self, state: State) -> bool:
        ended = reclaim(state, self._leases.is_ended)
        if ended:
            logger.info("終了したタスクを回収しました: %s", ended)
        return admit(state) or bool(ended)
