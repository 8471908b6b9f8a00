"""Share the GPUs of a few servers between several people, with one JSON file and no daemon.

Three guarantees:

* no GPU is given twice, however many processes, threads and users ask at once;
* the state file is never half-written: after a crash it holds the old document or the new one;
* what a task bound to a lease holds is its own until its last process is gone, and comes back then, however it ended.

:class:`GPUResourceManagerV01` is what others use: ``allocate_resources`` (``None`` if there is no room),
``obtain_resources`` (raises instead), ``allocation`` (a ``with`` block), ``claim`` (the same on another machine),
``release_resources``, ``stop_task``, ``reclaim_ended``, ``get_resource_summary``, ``get_overview``,
``get_detailed_status``, ``reset_resources``, ``add_server``, ``remove_server``, ``disable``, ``enable``.

The module reads from top to bottom, one room after the other:

1. **Constants and errors.** Every text that an error shows is a template; :func:`say` finds its English counterpart.
2. **The document.** The state file *is* the data model: its types and its one check. A new key of a task or
   a server goes here.
3. **Decisions.** Pure functions on a private copy of the document: no file, clock, lock or process. Rules go
   here: which server, who is next, what has ended (a time limit, say), why not. Those that only some pools need
   stand beside: ``servers.py`` of ``gpu_resource_extensions/`` adds, removes and disables, ``hosts.py`` finds the
   server that a machine is.
4. **This machine.** Files, locks, who asks. Whether the processes of a task live, and what follows, stands in
   ``gpu_resource_extensions/leases.py``, and what a request does that waits in ``waiting.py``. What only this machine
   can know, such as who else uses its GPUs, goes there; what follows from it is a decision.
5. **The store.** :class:`Store` is the contract, :class:`JsonFileStore` keeps it. Another store is a module
   in ``gpu_resource_extensions/`` and a line in ``databases.py`` there.
6. **The manager.** Public methods, each a few lines over the rooms above.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - the first thing that an older one gets to read
    raise ImportError("Python 3.10 以降が必要です (Python 3.10 or later is needed): " + sys.version.split()[0])

import copyreg
import errno
import fcntl
import json
import math
import os
import pwd
import re
import stat
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar, get_args, get_origin, get_type_hints, is_typeddict

if TYPE_CHECKING:
    import logging

    from gpu_resource_extensions.leases import Leases
    from gpu_resource_extensions.waiting import BoundRequest

T = TypeVar("T")
OnWait = Callable[[int, str], None]  # position in line, from 1, and why there is no room yet
ServerDescription = tuple[str, int, int]  # name, number of GPUs, number of CPUs

# --- Constants ------------------------------------------------------------------------------------

FORMAT_VERSION = "0.1"  # the ``version`` of a document
DISABLED_VERSION = "0.1+disabled"  # of one with GPUs out of service, so that an earlier release refuses it
MIN_GPUS_PER_TASK = 2  # unless the pool was described with another least number
MAX_GPUS_PER_SERVER = 1024
MAX_CPUS_PER_SERVER = 65536
MAX_TASK_ID_LENGTH = 128  # characters
MAX_COMMAND_LENGTH = 200  # characters of a recorded command: every change reads and writes what everybody records
MAX_PASSED_OVER = 32  # a request that later ones have passed over this often is due; see :func:`admit`
PASSED_OVER_GROWTH = 30  # a due request gets one more server each time that count has grown so many times
RESOURCE_FILE_VARIABLE = "GPU_RESOURCE_FILE"  # names another state file
SERVER_VARIABLE = "GPU_RESOURCE_SERVER"  # names the server of the pool that this machine is
LANGUAGE_VARIABLE = "GPU_RESOURCE_LANG"  # "en" for English texts; "ja", as without it, for Japanese ones
DEFAULT_LOCK_TIMEOUT_S = 60.0
LOCK_POLL_S = 0.001  # between two attempts to take a lock where we cannot stand in the kernel's queue
WAIT_RECHECK_S = 3.0  # after which it looks for processes that have died, which changes no file
LOCK_FILE, LEASE_DIRECTORY = ".resource.lock", ".leases"  # beside the state file

# What could move the cursor, end the line or reverse the text of a screen, and surrogates.
_UNSAFE_TEXT = "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"


def is_unsafe(text: str) -> bool:
    """Tell whether ``text`` could do harm to the screen that shows it, or is no valid text."""
    # What can be printed is safe, and finding that out costs a tenth of a search.
    return not text.isprintable() and re.search(_UNSAFE_TEXT, text) is not None


def printable(text: str) -> str:
    """Return ``text`` with a question mark for each unsafe character."""
    return re.sub(_UNSAFE_TEXT, "?", text) if is_unsafe(text) else text


def quoted(word: str) -> str:
    """Quote ``word`` for a POSIX shell, but only if it needs it: Japanese letters do not."""
    plain = word and all(letter.isalnum() or letter in "_@%+=:,./-" for letter in word)
    return word if plain else "'" + word.replace("'", "'\"'\"'") + "'"


def say(template: str, /, *facts: object, **named: object) -> str:
    """Return ``template`` with its facts; it is Japanese here, and the key of its English counterpart."""
    if os.environ.get(LANGUAGE_VARIABLE) == "en":
        with suppress(ImportError):  # it is not beside us: then Japanese is better than nothing
            from gpu_resource_extensions.english import ENGLISH

            template = ENGLISH.get(template, template)
    return template.format(*facts, **named)


# --- Errors: asking, locking, storing -------------------------------------------------------------


class ResourceManagerError(Exception):
    """Base of our errors: facts as attributes, and a template that says what happened and what to do next."""

    template = ""

    def __str__(self) -> str:
        return say(self.template, **vars(self))

    def __reduce__(self) -> Any:  # copied and pickled by the facts, for the constructors differ
        return copyreg.__newobj__, (type(self),), vars(self)  # type: ignore[attr-defined]


class InvalidRequestError(ResourceManagerError, ValueError):
    """Asking: a parameter is out of range or of the wrong type; nothing was touched."""

    template = "{parameter} {problem}: {value!r}\n  対処: {remedy}"

    def __init__(self, parameter: str, value: object, problem: str, remedy: str, **facts: object) -> None:
        self.parameter, self.value = say(parameter), value
        self.problem, self.remedy = say(problem, **facts), say(remedy, **facts)


class DuplicateTaskError(InvalidRequestError):
    """Asking: a task with this identifier already runs or waits; nothing was touched."""

    template = "タスクID {value!r} {problem}\n  対処: {remedy}"

    def __init__(self, task_id: str) -> None:
        super().__init__("task_id", task_id, *_TASK_ID_TAKEN)


class NotOwnerError(ResourceManagerError):
    """Asking: the task belongs to another user; nothing was touched."""

    template = (
        "タスク {task_id!r} は {owner} のものです\n  対処: 本人に確認し、それでも解放するなら --force を付けてください"
    )

    def __init__(self, task_id: str, owner: str) -> None:
        self.task_id, self.owner = task_id, owner


class TaskRunningError(ResourceManagerError):
    """Asking: processes of the task still run, or may do so for all we know; nothing was touched.

    ``processes``: those that we may see, each with ``pid``, ``user`` and ``command``.
    """

    template = (
        "タスク {task_id!r} のプロセスが動いています: {who}\n"
        "  対処: 終わるのを待つか、--stop {name} で終了させてください"
        " (--release {name} --force は記録だけを消します。GPU は使われたまま、他のタスクに渡ります)"
    )

    def __init__(self, task_id: str, processes: Sequence[dict[str, Any]]) -> None:
        self.task_id, self.processes, self.who = task_id, processes, named_processes(processes)
        self.name = quoted(task_id)


class PoolConflictError(ResourceManagerError):
    """Asking: the pool has other servers than described, or runs tasks (``task_ids``); nothing was touched."""

    template = (
        "既存の状態ファイルの構成は指定と異なります: {resource_file}\n"
        "  対処: 変えるなら、--init の代わりに --reset で同じ構成を指定してください"
    )

    def __init__(self, resource_file: str, task_ids: Sequence[str] = (), living: bool = False) -> None:
        self.resource_file, self.task_ids, self.living = resource_file, task_ids, living

    def __str__(self) -> str:
        remedy = say("終わるのを待つか、記録を消してよければ --reset --yes を指定してください")
        if self.living:
            remedy = say("--stop TASK_ID で終了させるか、記録を消してよければ --reset --yes --force を指定してください")
        tasks_run = say("実行中のタスクがあります: {}\n  対処: {}", ", ".join(self.task_ids), remedy)
        return tasks_run if self.task_ids else super().__str__()


class Shortfall:
    """What a request lacks now, as facts."""

    def __init__(self, request: Request) -> None:
        self.required_gpus, self.required_cpus = request["required_gpus"], request["required_cpus"]
        #: of each server: ``server_name``, ``eligible`` (it would do if it were idle), what is ``short`` of "GPU"
        #: and "CPU" (nothing on an eligible one: it is reserved), its ``running_tasks``, and what is ``disabled``
        self.servers: list[dict[str, Any]] = []
        self.scattered: tuple[int, int] | None = None  # GPUs and CPUs free on eligible servers, if enough on one
        self.fewest_releases: list[str] = []  # the fewest tasks whose release would make room
        self.waiting = 0  # requests that arrived earlier
        self.own_task: str | None = None  # the task that we run in, if there can be no room before it has ended


class NoCapacityError(ResourceManagerError, Shortfall):
    """Asking: there is not enough room now, try later."""

    template = "GPU {required_gpus} 個と CPU {required_cpus} 個を同時に確保できるサーバーがありません"

    def __init__(self, shortfall: Shortfall) -> None:
        self.__dict__.update(vars(shortfall))

    def __str__(self) -> str:
        own = say("タスク {0} の中で動いているため、{0} が終わるまで空きません: ", self.own_task)
        lines = [(own if self.own_task else "") + super().__str__()]
        for server in self.servers:
            lacks = say("・").join(say("{} {} 個", what, count) for what, count in server["short"].items() if count)
            why = say("{}不足", lacks) if lacks else say("先に待っている要求のために確保中")
            lines.append(f"  {server['server_name']}: {why if server['eligible'] else say('対象外')}")
            if server.get("disabled"):
                lines[-1] += say(" (使用停止中: GPU {})", ", ".join(server["disabled"]))
            for task in server["running_tasks"] if server["eligible"] else ():
                held = len(task["allocated_gpus"]), task["allocated_cpus"], task["start_time"]
                by = f", {printable(str(task['user']))}" if "user" in task else ""
                lines.append(say("    {}: GPU {} 個・CPU {} 個 ({} から{})", task["task_id"], *held, by))
        if self.scattered:
            text = "  空きの合計 (GPU {} 個・CPU {} 個) は足りますが、複数のサーバーに分散しています"
            lines.append(say(text, *self.scattered))
        if self.fewest_releases:
            task_ids = ", ".join(self.fewest_releases)
            lines.append(say("  次の {} 件が解放されれば足ります: {}", len(self.fewest_releases), task_ids))
        if self.waiting:
            lines.append(say("  先に待っている要求: {} 件", self.waiting))
        return "\n".join(lines)


class WaitCancelledError(NoCapacityError):
    """Asking: somebody has released the request while it waited, or it gave no sign of life for a minute."""

    template = "タスク {task_id!r} の待機は取り消されました"

    def __init__(self, task_id: str, shortfall: Shortfall) -> None:
        super().__init__(shortfall)
        self.task_id = task_id

    __str__ = ResourceManagerError.__str__


class LockTimeoutError(ResourceManagerError, TimeoutError):
    """Locking: another process held ``lock_file`` for longer than the ``timeout_s`` that we were told to wait."""

    template = (
        "ロック取得タイムアウト\n  {lock_file} と {directory} のロックを {timeout_s:g} 秒待ちましたが、"
        "別のプロセスが使用中です\n  対処: しばらくして再実行するか、lslocks で保持しているプロセスを確認してください"
        " (ロックファイルの削除は不要です)"
    )

    def __init__(self, lock_file: str, timeout_s: float) -> None:
        self.lock_file, self.directory, self.timeout_s = lock_file, os.path.dirname(lock_file), timeout_s


class StateFileError(ResourceManagerError):
    """Storing: the state file could not be read or written."""

    template = "状態ファイルのエラー: {path}\n  原因: {reason}\n  対処: {remedy}"

    def __init__(self, path: str, reason: str, remedy: str) -> None:
        self.path, self.reason, self.remedy = path, reason, remedy


class UnusableStateFileError(StateFileError):
    """Storing: what stands in the place of the state file cannot be used until someone resets it."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason, say(_RESET))


class NoPoolError(UnusableStateFileError):
    """Storing: there is no pool at this place, and it is not to be made without a word."""

    template = "プールがありません: {path}\n  原因: {reason}\n  対処: {remedy}"

    def __init__(self, path: str, reason: str, remedy: str) -> None:
        StateFileError.__init__(self, path, reason, remedy)


class MissingPackageError(ResourceManagerError, ImportError):
    """Locking: ``filelock`` is missing or too old; nothing was touched."""

    template = (
        "必要なパッケージを読み込めません: {reason}\n"
        "  対処: filelock 3.30 以降を、この Python ({python}) に pip でインストールしてください"
    )

    def __init__(self, error: ImportError) -> None:
        self.reason, self.python = str(error), sys.executable


_FROM_MADE_UP = (
    "架空のサーバーから割り当てました: %s"
    " (実際の計算機は --reset --detect か --reset --server NAME:GPUS:CPUS で登録してください)"
)
_LACKING = "タスク %s の GPU %s は、記録では他のタスクのものです。どちらかを終了させてください"
UNKNOWN_TASK = "タスクが見つかりません: %s"
# For InvalidRequestError: the problem, and what to do.
_NO_PATH = "がファイルのパスではありません", "パスを文字列で指定してください"
_RELATIVE = (
    "が絶対パスではありません",
    "/ で始まる状態ファイルのパスか、postgresql:// か redis:// の場所を指定してください",
)
_NO_LANGUAGE = "の言語はありません", "ja か en を指定するか、指定をやめてください"
_NO_SECONDS = "が秒数ではありません", "0 以上 10 億以下の数か math.inf を指定してください"
_OUT_OF_RANGE = "が正しくありません", "{least}-{most} の整数を指定してください"
_NO_NAME = "{why}", "制御文字を含まず - で始まらない 1-{most} 文字の文字列を指定してください"
_TASK_ID_TAKEN = "は既に実行中または待機中です", "別のタスクIDを使うか、先に解放してください"
_NO_SERVERS = "が空か、同じ名前が重複しています", "異なる名前を指定してください"
_UNKNOWN_SERVER = "のサーバーはありません", "{known} のいずれかを指定してください"
_TOO_MUCH_AT_ONCE = (
    "の両方を備えたサーバーがありません",
    "--status で各サーバーの合計を確認し、1 台に収まる数を指定してください",
)
# For StateFileError.
_RESET = "内容を直すか、--reset --yes で作り直してください (元のファイルは保存されます)"
MAKE_POOL = (
    "GPU_RESOURCE_FILE と /etc/gpu-resource-file が正しいか確認し、新しく作るなら "
    "--init --detect か --init --server NAME:GPUS:CPUS を実行してください"
)
_MAKE_DIRECTORY = "GPU_RESOURCE_FILE と /etc/gpu-resource-file が正しいか確認し、正しければディレクトリを作ってください"
_NO_PLACE = (
    "インストールしたツールには、プールの場所の指定が要ります",
    "/etc/gpu-resource-file の 1 行目か GPU_RESOURCE_FILE に、状態ファイルの絶対パスを書いてください",
)
_EMPTY_MACHINE_FILE = "1 行目が空です", "1 行目に状態ファイルの絶対パスを書くか、このファイルを消してください"
_MACHINE_FILE_UNREADABLE = "このファイルを読めるようにするか、消してください"
_IS_DIRECTORY = (
    "ディレクトリです",
    "GPU_RESOURCE_FILE や /etc/gpu-resource-file には、ディレクトリではなく状態ファイルのパスを指定してください",
)
_NO_REGULAR_FILE, _MOVED = "通常のファイルではありません", "待っている間に移動されました"
_UNWRITABLE = "書き込めない内容です ({})", "ファイルは変更していません。内容を確認してください"
_UNCONFIRMED = (
    "変更は書き込まれましたが、ディスクへの保存を確認できません ({})",
    "ディスクを確認し、--detail で現在の状態を確かめてください",
)
_UNREADABLE = (
    "読む権限を持つ人に頼んでください。要らないものなら、--reset --yes で作り直せます (元のファイルは保存されます)"
)
_REMEDIES = {
    (errno.ENOSPC,): "ディスクの空き容量を増やしてから再実行してください",
    (errno.EDQUOT,): "ディスクの割り当て (quota) を確認してから再実行してください",
    (errno.EFBIG,): "ファイルサイズの制限 (ulimit -f) を確認してから再実行してください",
    (errno.EBUSY,): "状態ファイルだけをマウントせず、それを含むディレクトリをマウントしてください",
    (errno.EAGAIN,): "プロセス数の制限 (ulimit -u) を確認してから再実行してください",
    (errno.EMFILE, errno.ENFILE): "開いているファイルを減らすか、ulimit -n を増やしてから再実行してください",
    (errno.EACCES, errno.EPERM, errno.EROFS): "ディレクトリとファイルの権限を確認してください",
    (errno.ENOENT, errno.ENOTDIR): "状態ファイルのディレクトリが存在するか確認してください",
    # EBADF: an exclusive lock was refused on what is open for reading only.
    (errno.ENOLCK, errno.EBADF): "ロックが使えるローカルディスク上のファイルを GPU_RESOURCE_FILE で指定してください",
}
_OTHER_REMEDY = "ディスクとディレクトリの状態を確認してください"


def _os_reason(error: OSError) -> str:
    return f"{error.strerror or error}" + (f": {os.fsdecode(error.filename)}" if error.filename else "")


@contextmanager
def failures_reported(path: str) -> Iterator[None]:
    """Turn an ``OSError`` into a :class:`StateFileError` about the pool at ``path``."""
    try:
        yield
    except ResourceManagerError:  # LockTimeoutError is an OSError too
        raise
    except OSError as error:
        remedies = [remedy for codes, remedy in _REMEDIES.items() if error.errno in codes]
        raise StateFileError(path, _os_reason(error), say(*remedies or [_OTHER_REMEDY])) from error


@cache
def log() -> logging.Logger:
    """Return the logger of this module."""
    import logging  # reading a pool has no use for it

    logger = logging.getLogger(__name__)
    logger.addHandler(logging.NullHandler())  # without one, ``logging`` prints our warnings to stderr
    return logger


# --- The document ---------------------------------------------------------------------------------
# Keys that are not listed here are kept through every change, at every level of the document.


class Requester(TypedDict, total=False):
    """Who asked, as information, and what ties the request to a living process; any key may be missing."""

    user: str
    uid: int
    host: str  # name of the machine that it was asked on
    pid: int
    command: str
    inside: str  # the task that it was asked in
    local: bool  # it was told to use the GPUs of ``host`` itself
    boot: str  # of the kernel that it was asked under: there alone can its lease be judged
    machine: str  # id of that machine, in a pool that several share
    lease: str  # name of a file under ``.leases/``: the task ends when no process holds its lock
    claim: str  # the lease under which another machine had claimed it for this one
    seen: int  # nothing uses it yet: the last sign of life of its owner, by ``clock``
    # Only in what :meth:`GPUResourceManagerV01.get_detailed_status` returns:
    ended: bool  # the lease is free
    processes: list[dict[str, Any]]  # who holds it, as far as we may see: ``pid``, ``user``, ``command``


class Task(Requester):
    """What one task holds on one server."""

    task_id: str
    allocated_gpus: list[int]  # indices on the server, ascending
    allocated_cpus: int
    start_time: str  # local, ISO 8601 to the second


class _Known(TypedDict, total=False):
    boot: str  # of the machine that it was when its last local job was placed
    machine: str  # id of that machine, in a pool that several share
    disabled: dict[str, str]  # why, of each GPU index that gets nothing new; a task may hold it until it ends


class Server(_Known):
    """One server with what is free on it and the tasks that hold the rest."""

    server_id: int
    server_name: str
    total_gpus: int
    available_gpus: list[int]  # indices, ascending; no ``disabled`` ones
    total_cpus: int
    available_cpus: int
    running_tasks: list[Task]


class Request(Requester):
    """A request that stands in line; for that it needs a ``lease``."""

    task_id: str
    required_gpus: int
    required_cpus: int
    prefer_server_id: int | None
    only_server_name: str | None  # no other will do; by name, for a reset may number other servers
    excluded_server_names: list[str] | None  # they will not do
    passed_over: int  # how many later requests were placed on a server that would have done for this one
    asked_time: str | None  # as ``start_time``


class _Optional(TypedDict, total=False):
    waiting: list[Request]  # in order of arrival; missing when nobody waits
    min_gpus_per_task: int  # missing means MIN_GPUS_PER_TASK
    # Of a pool in a database:
    pool: str  # a random id, which names its leases on every host
    clock: int  # seconds of the store's own clock at the last change, the only clock that decides anything


class State(_Optional):
    """The whole document of the state file."""

    version: str
    last_updated: str  # when it was last changed, as ``start_time``; what a change places starts at its time
    servers: list[Server]


def new_state(servers: int = 4, gpus: int = 8, cpus: int = 64) -> State:
    """Return a pool of ``servers`` idle servers with ``gpus`` GPUs and ``cpus`` CPUs each."""
    idle = new_servers([(f"gpu-server-{number}", gpus, cpus) for number in range(servers)])
    return {"servers": idle, "last_updated": "", "version": FORMAT_VERSION}


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


def new_request(task_id: str, gpus: int, cpus: int, prefer_server_id: int | None = None, **who: Any) -> Request:
    """Return a request that nobody has passed over yet; ``who`` are keys of a :class:`Requester`."""
    return {
        "task_id": task_id,
        "required_gpus": gpus,
        "required_cpus": cpus,
        "prefer_server_id": prefer_server_id,
        "only_server_name": None,
        "passed_over": 0,
        "asked_time": None,
        **who,  # type: ignore[typeddict-item]
    }


def decode_state(data: bytes) -> State:
    """Return the checked document in ``data`` (UTF-8 JSON without byte order mark), or raise ``ValueError``."""
    state: State = parse_json(data)
    check_state(state)
    return state


def parse_json(data: bytes) -> Any:
    """Return the JSON in ``data``, every number in it finite, or raise ``ValueError``."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_finite, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise ValueError(say("UTF-8 として読めません ({} バイト目)", error.start)) from error
    except RecursionError as error:
        raise ValueError(say("JSON の入れ子が深すぎます")) from error
    except ValueError as error:
        raise ValueError(say("JSON として読めません ({})", error)) from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # NaN, Infinity, 1e400: JSON could not hold it when we write again
        raise ValueError(say("{} は有限の数ではありません", text))
    return number


def encode_state(state: State, before: State | None = None) -> bytes:
    """Return the checked ``state`` as UTF-8 JSON with one line per server, which ``diff`` shows well.

    :param before: as for :func:`check_state`.
    :raises ValueError: it is unsound, or a value of an unknown key has no JSON form.
    """
    check_state(state, before)
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False).encode
    servers = "[\n    " + ",\n    ".join(map(encode, state["servers"])) + "\n  ]"
    lines = [f"  {encode(key)}: {servers if key == 'servers' else encode(value)}" for key, value in state.items()]
    # A lone surrogate in an unknown key can only stand inside a JSON string, where the escape that
    # ``backslashreplace`` makes of it is the JSON escape it was read from.
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("utf-8", "backslashreplace")


def check_state(document: Any, before: State | None = None) -> None:
    """Check types, ranges and the invariant of a decoded document.

    The invariant: on every server each GPU index from 0 to ``total_gpus`` - 1 is either available, or held by
    exactly one task, or disabled and idle; all lists ascending; available CPUs and the tasks' CPUs add up to
    ``total_cpus``; a ``server_id`` occurs once, and so does a ``task_id``, be it running or waiting.

    :param before: a checked document; a server that is equal to the one in its place is not checked again.
    :raises ValueError: it does not hold; the text names the place and the reason.
    """
    place: tuple[Any, ...] = ("最上位",)  # named only when something is wrong there
    try:
        if isinstance(document, dict) and document.get("version") not in (FORMAT_VERSION, DISABLED_VERSION):
            text = "version {!r} には対応していません ({!r} のみ。新しい版のものなら、このツールを更新してください)"
            raise ValueError(say(text, document.get("version"), FORMAT_VERSION))
        check_record(document, State)
        if not document["servers"]:
            raise ValueError(say("servers が空です"))
        sound: Sequence[Server] = before["servers"] if before else ()
        seen: set[object] = set()
        for number, server in enumerate(document["servers"]):
            place = "servers[{}]", number
            changed = number >= len(sound) or server != sound[number]
            if changed:
                check_record(server, Server)
            _check_new(server, "server_id", seen)
            for task_number, task in enumerate(server["running_tasks"]):
                place = "servers[{}].running_tasks[{}]", number, task_number
                if changed:
                    check_record(task, Task)
                _check_new(task, "task_id", seen)
            if changed:
                place = "servers[{}]", number
                _check_sums(server)
        for number, request in enumerate(document.get("waiting", ())):
            place = "waiting[{}]", number
            check_record(request, Request)
            if type(request.get("lease")) is not str:
                raise ValueError(say("lease の型が str ではありません"))
            _check_new(request, "task_id", seen)
    except ValueError as error:
        raise ValueError(f"{say(*place)}: {error}") from None


@cache
def _kinds(record: Any) -> dict[str, tuple[tuple[type, ...], bool]]:
    """Return the exact types of each key of a class above, and whether the key must be there.

    A key that may be ``None`` may be missing; what a :class:`Requester` has is information, and not checked.
    """
    kinds = {}
    for key, hint in get_type_hints(record).items():
        if key not in Requester.__annotations__:
            may_be_none = type(None) in get_args(hint)
            kind = dict if is_typeddict(hint) else get_origin(hint) or hint
            types = tuple(get_origin(it) or it for it in get_args(hint)) if may_be_none else (kind,)
            kinds[key] = types, key in record.__required_keys__ and not may_be_none
    return kinds


def check_record(record: Any, declared: Any) -> None:
    """:raises ValueError: ``record`` is not of the type ``declared`` above; the text names the key."""
    if not isinstance(record, dict):
        raise ValueError(say("JSON オブジェクトではありません"))
    for key, (types, needed) in _kinds(declared).items():
        value: Any = record.get(key)
        kind, problem = type(value), None
        if key not in record:
            problem = say("がありません") if needed else None
        elif kind not in types:  # exactly: ``True`` is an int to isinstance
            problem = say("の型が {} ではありません", " | ".join(allowed.__name__ for allowed in types))
        elif kind is int and value < 0:
            problem = say("が負の数です ({})", value)
        elif kind is str:
            if key == "task_id":
                problem = task_id_problem(value)
            elif is_unsafe(value):
                problem = say("に制御文字が含まれています")
        elif kind is list and key.endswith("_gpus") and not _is_ascending(value):
            problem = say("が 0 以上の整数の昇順リストではありません")
        if problem:
            raise ValueError(f"{key} {problem}")


def _is_ascending(indices: list[Any]) -> bool:
    last = -1
    for index in indices:
        if type(index) is not int or index <= last:
            return False
        last = index
    return True


def _check_sums(server: Server) -> None:
    gpus, cpus = [*server["available_gpus"]], server["available_cpus"]
    disabled = _disabled_gpus(server) if "disabled" in server else set()
    for task in server["running_tasks"]:
        gpus += task["allocated_gpus"]
        cpus += task["allocated_cpus"]
    gpus += disabled.difference(gpus)
    # The length ahead of the range: a hand-written total of 10**12 must not make us build such a list.
    if len(gpus) != server["total_gpus"] or sorted(gpus) != list(range(len(gpus))):
        problem = (
            "GPU 0 から total_gpus - 1 までが、available_gpus と allocated_gpus (と disabled) に一度ずつ現れていません"
        )
        raise ValueError(say(problem))
    if cpus != server["total_cpus"]:
        raise ValueError(say("空きと割り当て済みの CPU の合計が total_cpus と一致しません"))


def _disabled_gpus(server: Server) -> set[int]:
    """Return the GPUs that are out of service, or raise ``ValueError``: one is available, or it is no such record."""
    sound = {index for index, why in server["disabled"].items() if type(why) is str and not is_unsafe(why)}
    gpus = gpu_set(server["disabled"])
    if sound != {*map(str, gpus)} or not gpus.isdisjoint(server["available_gpus"]):
        raise ValueError(say("disabled が、空いていない GPU の番号と理由の組ではありません"))
    return gpus


def gpu_set(disabled: Iterable[str]) -> set[int]:
    """Return the GPU indices among the keys of ``disabled``."""
    return {int(index) for index in disabled if index.isascii() and index.isdigit() and len(index) < 5}


def _check_new(record: Any, key: str, seen: set[object]) -> None:
    if record[key] in seen:  # numbers of servers and names of tasks: never equal
        raise ValueError(say("{} {!r} が重複しています", key, record[key]))
    seen.add(record[key])


def task_id_problem(value: object) -> str | None:
    """Say what is wrong with a ``task_id``, or return ``None``: what we store can be shown and released."""
    if not isinstance(value, str):
        return say("が文字列ではありません")
    if not value.strip():
        return say("が空です")
    if len(value) > MAX_TASK_ID_LENGTH:
        return say("が {} 文字を超えています", MAX_TASK_ID_LENGTH)
    if value.startswith("-"):
        return say("は - で始められません")
    return say("に制御文字または不正な文字が含まれています") if is_unsafe(value) else None


# --- Decisions: pure functions, no file, clock, lock or process -----------------------------------
# They alter the private copy of the document that they are given: placing, the line (:func:`admit`), asking
# (:func:`ask`), explaining (:func:`shortfall`).


def first_fit(
    state: State, gpus: int, cpus: int, prefer_server_id: int | None = None, closed: Container[int] = ()
) -> Server | None:
    """Return the first server with room for the request, or ``None``.

    A preferred server is tried first, then all servers in the order of the file, but none whose
    ``server_id`` is ``closed``. O(N) in the number of servers.

    >>> first_fit(new_state(), gpus=4, cpus=32)["server_name"]
    'gpu-server-0'
    """
    servers = state["servers"]
    if prefer_server_id is not None:
        servers = [server for server in servers if server["server_id"] == prefer_server_id] + servers
    for server in servers:
        has_room = len(server["available_gpus"]) >= gpus and server["available_cpus"] >= cpus
        if has_room and server["server_id"] not in closed:
            return server
    return None


def place(server: Server, task_id: str, gpus: int, cpus: int, start_time: str, requester: Any = None) -> Task:
    """Let the task hold the lowest available GPUs of ``server``, which has room for it."""
    task: Task = {
        "task_id": task_id,
        "allocated_gpus": server["available_gpus"][:gpus],
        "allocated_cpus": cpus,
        "start_time": start_time,
        **(requester or {}),  # type: ignore[typeddict-item]
    }
    hold(server, task)
    return task


def hold(server: Server, task: Task) -> None:
    """Let ``task`` hold the very GPUs that it names, which no task holds on ``server``."""
    held = {*task["allocated_gpus"]}
    server["available_gpus"] = [gpu for gpu in server["available_gpus"] if gpu not in held]
    server["available_cpus"] -= task["allocated_cpus"]
    server["running_tasks"].append(task)


def remove_task(server: Server, task: Task) -> None:
    """Take back what ``task`` held on ``server``; what is in service is available again, in ascending order."""
    freed = {*task["allocated_gpus"]} - gpu_set(server.get("disabled", ()))
    server["available_gpus"] = sorted({*server["available_gpus"]} | freed)
    server["available_cpus"] += task["allocated_cpus"]
    server["running_tasks"].remove(task)


def placed_tasks(state: State) -> list[tuple[Server, Task]]:
    """Return every running task with its server."""
    return [(server, task) for server in state["servers"] for task in server["running_tasks"]]


def records(state: State) -> list[Task | Request]:
    """Return all that bears a ``task_id``: running tasks and waiting requests."""
    return [*(task for _, task in placed_tasks(state)), *state.get("waiting", ())]


def find_task(state: State, task_id: str) -> tuple[Server, Task] | None:
    """Return the running task with this identifier and its server, or ``None``."""
    return next(((server, task) for server, task in placed_tasks(state) if task["task_id"] == task_id), None)


def end_task(state: State, task_id: str) -> None:
    """Let no task and no request of the line bear ``task_id`` any more."""
    found = find_task(state, task_id)
    if found:
        remove_task(*found)
    set_waiting(state, [request for request in state.get("waiting", ()) if request["task_id"] != task_id])


def set_waiting(state: State, waiting: list[Request]) -> None:
    """Let ``waiting`` be the line; without anybody in it, the document has no such key."""
    state["waiting"] = waiting
    if not waiting:
        del state["waiting"]


def reclaim(state: State, is_ended: Callable[[Requester], bool]) -> list[str]:
    """Take back what ended tasks hold, let ended requests leave the line; return their identifiers."""
    ended = [record["task_id"] for record in records(state) if "lease" in record and is_ended(record)]
    for task_id in ended:
        end_task(state, task_id)
    return ended


class Allocation(TypedDict):
    """What :meth:`GPUResourceManagerV01.allocate_resources` grants."""

    task_id: str
    server_id: int
    server_name: str
    gpu_ids: list[int]  # indices on that server, ascending
    gpu_devices: str  # the same for ``CUDA_VISIBLE_DEVICES``, such as "0,1,2,3"
    cpu_count: int


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


def admit(state: State, max_passed_over: int = MAX_PASSED_OVER) -> list[str]:
    """Place every waiting request that may be placed; return the identifiers of those that were.

    In order of arrival, each request is placed as soon as it fits, so a small job runs in the gaps that a
    big one cannot use. An earlier request for which the server would have done has then been *passed
    over*; after ``max_passed_over`` times it is *due*. A due request has one server reserved, the one where
    least is missing: nothing that arrived later is placed there, so that server empties.

    Only one server: with every server closed that would do, a job of 8 GPUs idles the whole pool. Only one
    request at a time: who could use a server that an earlier due request could use too waits for the turn
    of that one. Since a reserved server may never empty, for somebody may have forgotten a reservation
    there, a request gets one more each time its count has grown ``PASSED_OVER_GROWTH``-fold.

    Known as backfilling with a reservation for the first job (EASY: Lifka, "The ANL/IBM SP Scheduling
    System", 1995), here counted in requests, since nobody says how long a job will run.
    """
    placed: list[str] = []
    left: list[Request] = []
    reserved: set[int] = set()
    for request in state.get("waiting", ()):
        gpus, cpus = request["required_gpus"], request["required_cpus"]
        closed = reserved.union(server["server_id"] for server in state["servers"] if not could_hold(server, request))
        server = first_fit(state, gpus, cpus, request.get("prefer_server_id"), closed)
        if server:
            # Who asked, and keys that we do not know, go on into the task; what was asked does not.
            asked = {*Request.__annotations__, *Task.__annotations__} - {*Requester.__annotations__}
            requester = {key: value for key, value in request.items() if key not in asked}
            place(server, request["task_id"], gpus, cpus, state["last_updated"], requester)
            if request.get("local"):
                from gpu_resource_extensions.hosts import note_machine

                note_machine(state, server, request)
            placed.append(request["task_id"])
            for earlier in left:
                earlier["passed_over"] += could_hold(server, earlier)
        else:
            left.append(request)
        if server or request["passed_over"] >= max_passed_over:
            reserved = reserved_servers(state, left, max_passed_over)
    set_waiting(state, left)
    # What was placed may have made another request due, to which a reservation has passed: so look again.
    return placed + admit(state, max_passed_over) if placed and left else placed


def reserved_servers(state: State, waiting: Sequence[Request], max_passed_over: int = MAX_PASSED_OVER) -> set[int]:
    """Return the ``server_id`` of each server that is reserved for one of these; see :func:`admit`."""
    reserved: set[int] = set()
    in_turn: set[int] = set()  # what those could use that have a server reserved
    for request in waiting:
        count, threshold = 0, max_passed_over
        while request["passed_over"] >= threshold:
            count, threshold = count + 1, max(1, threshold) * PASSED_OVER_GROWTH
        if not count:
            continue
        usable = [server for server in state["servers"] if could_hold(server, request)]
        server_ids = {server["server_id"] for server in usable}
        count -= not server_ids.isdisjoint(in_turn)
        in_turn |= server_ids if count else set()
        usable = [server for server in usable if server["server_id"] not in reserved]
        usable.sort(key=lambda server: missing(server, request))
        reserved |= {server["server_id"] for server in usable[:count]}
    return reserved


def could_hold(server: Server, request: Request) -> bool:
    """Tell whether what is in service of ``server`` would do for ``request`` if it were idle."""
    return (
        server["total_gpus"] - len(server.get("disabled", ())) >= request["required_gpus"]
        and server["total_cpus"] >= request["required_cpus"]
        and request.get("only_server_name") in (None, server["server_name"])
        and server["server_name"] not in (request.get("excluded_server_names") or ())
    )


def could_ever_hold(server: Server, request: Request) -> bool:
    """Tell whether ``server`` would do for ``request`` if it were idle and all of it in service."""
    return could_hold({**server, "disabled": {}}, request)


def missing(server: Server, request: Request) -> tuple[int, int]:
    """Return how many GPUs and CPUs must come free on ``server`` for ``request``."""
    gpus = request["required_gpus"] - len(server["available_gpus"])
    return max(0, gpus), max(0, request["required_cpus"] - server["available_cpus"])


def check_seconds(parameter: str, value: object) -> None:
    """:raises InvalidRequestError: ``value`` is no number of seconds from 0 to 1e9, and not infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 <= value <= 1e9 or value == math.inf):
        raise InvalidRequestError(parameter, value, *_NO_SECONDS)


def check_name(parameter: str, value: object) -> None:
    """:raises InvalidRequestError: ``value`` is no text that a task or a server can be called."""
    why = task_id_problem(value)
    if why:
        raise InvalidRequestError(parameter, value, *_NO_NAME, why=why, most=MAX_TASK_ID_LENGTH)


def check_int(parameter: str, value: object, least: int, most: int) -> None:
    """:raises InvalidRequestError: ``value`` is no ``int`` from ``least`` to ``most``."""
    if type(value) is not int or not least <= value <= most:  # exactly int: ``True`` is one to isinstance
        raise InvalidRequestError(parameter, value, *_OUT_OF_RANGE, least=least, most=most)


def check_description(name: object, gpus: object, cpus: object) -> None:
    """:raises InvalidRequestError: no server can be called so, or have as much."""
    check_name("サーバー名", name)
    check_int("サーバーの GPU 数", gpus, 1, MAX_GPUS_PER_SERVER)
    check_int("サーバーの CPU 数", cpus, 1, MAX_CPUS_PER_SERVER)


def limits(state: State) -> tuple[int, int, int]:
    """Return the least and the most GPUs, and the most CPUs, that one task may ask for."""
    most_gpus = max(server["total_gpus"] for server in state["servers"])
    most_cpus = max(server["total_cpus"] for server in state["servers"])
    return state.get("min_gpus_per_task", MIN_GPUS_PER_TASK), most_gpus, most_cpus


def check_request(state: State, request: Request) -> None:
    """:raises InvalidRequestError: this pool could not grant ``request`` even if it were idle."""
    prefer, known = request["prefer_server_id"], [server["server_id"] for server in state["servers"]]
    if prefer is not None and (type(prefer) is not int or prefer not in known):
        raise InvalidRequestError("prefer_server_id", prefer, *_UNKNOWN_SERVER, known=", ".join(map(str, known)))
    least, most, most_cpus = limits(state)
    check_int("required_gpus", request["required_gpus"], least, most)
    check_int("required_cpus", request["required_cpus"], 1, most_cpus)
    if not any(could_ever_hold(server, request) for server in state["servers"]):
        amounts = request["required_gpus"], request["required_cpus"]
        raise InvalidRequestError("(required_gpus, required_cpus)", amounts, *_TOO_MUCH_AT_ONCE)


def ask(state: State, request: Request) -> Allocation | Shortfall:
    """Let ``request`` arrive at the end of the line, and return what it is granted or what it lacks.

    :raises InvalidRequestError: it can never be placed, or would make one machine two servers.
    :raises DuplicateTaskError: a task with this identifier runs or waits already.
    """
    check_request(state, request)
    if request.get("local"):
        from gpu_resource_extensions.hosts import check_one_machine

        check_one_machine(state, request)
    if any(record["task_id"] == request["task_id"] for record in records(state)):
        raise DuplicateTaskError(request["task_id"])
    set_waiting(state, [*state.get("waiting", ()), {**request, "asked_time": state["last_updated"]}])
    admit(state)
    return answer_to(state, request)


def answer_to(state: State, request: Request) -> Allocation | Shortfall:
    """Return what ``request``, which is placed or in line, is granted by now, or what it lacks."""
    found = find_task(state, request["task_id"])
    return allocation_of(*found) if found else shortfall(state, request)


def ask_once(state: State, request: Request) -> Allocation | Shortfall:
    """Do as :func:`ask`, but let a request that is not placed leave the line."""
    return leave_unless_granted(state, request, ask(state, request))


def leave_unless_granted(state: State, request: Request, answer: Allocation | Shortfall) -> Allocation | Shortfall:
    """Let ``request`` leave the line if ``answer`` does not grant it anything; return that answer."""
    if isinstance(answer, Shortfall):
        end_task(state, request["task_id"])
    return answer


def shortfall(state: State, request: Request) -> Shortfall:
    """Return why ``request`` is not placed now: what is short, who holds it, and what would help."""
    facts = Shortfall(request)
    usable = [server for server in state["servers"] if could_hold(server, request)]
    for server in state["servers"]:
        short = dict(zip(("GPU", "CPU"), missing(server, request), strict=True))
        row = {"server_name": server["server_name"], "eligible": could_ever_hold(server, request), "short": short}
        disabled = {"disabled": server["disabled"]} if server.get("disabled") else {}
        facts.servers.append({**row, "running_tasks": server["running_tasks"], **disabled})
    fewest = min((fewest_releases(server, *missing(server, request)) for server in usable), key=len, default=[])
    facts.fewest_releases = [task["task_id"] for task in fewest]  # none where there is room, kept for others
    free = sum(len(server["available_gpus"]) for server in usable), sum(server["available_cpus"] for server in usable)
    if fewest and free[0] >= request["required_gpus"] and free[1] >= request["required_cpus"]:
        facts.scattered = free
    line = [waiting["task_id"] for waiting in state.get("waiting", ())]
    inside = find_task(state, str(request.get("inside")))
    if inside and fewest:
        server, own = inside
        lost = gpu_set(server.get("disabled", ())).union(own["allocated_gpus"])
        rest = server["total_gpus"] - len(lost), server["total_cpus"] - own["allocated_cpus"]
        enough = rest[0] >= request["required_gpus"] and rest[1] >= request["required_cpus"]
        facts.own_task = own["task_id"] if usable == [server] and not enough else None
    facts.waiting = line.index(request["task_id"]) if request["task_id"] in line else len(line)
    return facts


def fewest_releases(server: Server, gpus: int, cpus: int) -> list[Task]:
    """Return the fewest tasks that together hold ``gpus`` GPUs and ``cpus`` CPUs of ``server``.

    Of all sets of n tasks with the same GPUs only the one with the most CPUs can matter: O(tasks² · gpus).
    """
    disabled = gpu_set(server.get("disabled", ()))
    best: dict[tuple[int, int], tuple[int, list[Task]]] = {(0, 0): (0, [])}
    for task in server["running_tasks"]:
        for (count, held_gpus), (held_cpus, tasks) in list(best.items()):
            key = (count + 1, min(gpus, held_gpus + len({*task["allocated_gpus"]} - disabled)))
            more = held_cpus + task["allocated_cpus"]
            if key not in best or more > best[key][0]:
                best[key] = (more, [*tasks, task])
    enough = [tasks for (_, held_gpus), (held_cpus, tasks) in best.items() if held_gpus >= gpus and held_cpus >= cpus]
    return min(enough, key=len)


def summarize(state: State) -> dict[str, Any]:
    """Count what the pool and each server have and have left, as ``get_resource_summary`` returns it."""

    def used(total: int, held: int) -> str:
        return f"{100 * held / total if total else 0:.1f}%"

    rows: list[dict[str, Any]] = []
    for server in state["servers"]:
        disabled, tasks = server.get("disabled", {}), server["running_tasks"]
        held_gpus = sum(len(task["allocated_gpus"]) for task in tasks)
        row = {
            "server_id": server["server_id"],
            "server_name": server["server_name"],
            "total_gpus": server["total_gpus"],
            "available_gpus": len(server["available_gpus"]),
            "gpu_utilization": used(server["total_gpus"], held_gpus),
            "total_cpus": server["total_cpus"],
            "available_cpus": usable_cpus(server),
            "cpu_utilization": used(server["total_cpus"], server["total_cpus"] - server["available_cpus"]),
            "running_tasks": len(tasks),
        }
        rows.append({**row, "disabled": disabled} if disabled else row)
    counted = ("total_gpus", "available_gpus", "total_cpus", "available_cpus", "running_tasks")
    totals = {f"total_{key.removeprefix('total_')}": sum(row[key] for row in rows) for key in counted}
    waiting = {"total_waiting": len(state["waiting"])} if state.get("waiting") else {}
    return {"total_servers": len(rows), **totals, "servers": rows, **waiting}


def usable_cpus(server: Server) -> int:
    """Return the available CPUs, but none where every GPU is out of service: nothing can be placed there."""
    disabled = len(server.get("disabled", ()))
    return 0 if disabled and disabled == server["total_gpus"] else server["available_cpus"]


def overview(state: State) -> dict[str, Any]:
    """Say what the pool is, count it, and list who holds or waits for what, as ``get_overview`` returns it."""
    tasks: list[dict[str, Any]] = []
    for server, task in placed_tasks(state):
        kind = "job" if "lease" in task else "reservation"
        tasks.append({**task, "server_name": server["server_name"], "kind": kind})
    line = state.get("waiting", [])
    tasks += [{**request, "server_name": request.get("only_server_name"), "kind": "waiting"} for request in line]
    return {
        **summarize(state),
        "min_gpus_per_task": limits(state)[0],
        "last_updated": state["last_updated"],
        "made_up": is_made_up(state),
        "tasks": tasks,
    }


def descriptions(servers: Sequence[Any]) -> list[ServerDescription]:
    """Return name, GPUs and CPUs of each server of a document or of a summary."""
    return [(server["server_name"], server["total_gpus"], server["total_cpus"]) for server in servers]


_MADE_UP = {*descriptions(new_state()["servers"])}


def is_made_up(state: State) -> bool:
    """Tell whether the servers that nobody has described are there, or some are left in a pool never described."""
    found = _MADE_UP.intersection(descriptions(state["servers"]))
    return found == _MADE_UP or bool(found and "min_gpus_per_task" not in state)  # which every description sets


# --- This machine: files, locks, who asks ---------------------------------------------------------


@contextmanager
def new_in_place(path: str, is_directory: bool = False) -> Iterator[int]:
    """Make a file or a directory; yield its descriptor, and move it to ``path``, complete, after the block.

    Called under the lock: what a killed process left is swept.
    """
    parent, name = os.path.split(path)
    temporary = os.path.join(parent, f".{name.lstrip('.')}.tmp")
    remove = os.rmdir if is_directory else os.unlink
    if os.path.lexists(temporary):
        remove(temporary)
    if is_directory:
        os.mkdir(temporary)
    flags = os.O_DIRECTORY if is_directory else os.O_RDWR | os.O_CREAT | os.O_EXCL
    descriptor = os.open(temporary, flags, 0o666)
    try:
        try:
            old = os.lstat(path) if os.path.isfile(path) else None
            set_permissions(descriptor, parent, 0o2770 if is_directory else 0o660, old)
            yield descriptor
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the failure itself is what counts; the next change sweeps
            remove(temporary)
        raise


def set_permissions(new: int, parent: str, shared: int, old: os.stat_result | None = None) -> None:
    """Give a new file the owner, group and permission bits of the ``old`` one that it replaces, if we may.

    In a directory that its group may write, add what is ``shared`` with that group; others get no more than
    they have in the directory, and no right to write a file that replaces none.
    """
    found, directory = os.fstat(new), os.stat(parent)
    kept = old or found
    mode, group = stat.S_IMODE(kept.st_mode), kept.st_gid
    if directory.st_mode & stat.S_IWGRP:
        mode = mode & 0o770 | shared | (mode if old else shared >> 3 & 0o5) & directory.st_mode & 0o7
        group = directory.st_gid
    if kept.st_uid != found.st_uid:
        with suppress(PermissionError):
            os.fchown(new, kept.st_uid, -1)
    try:
        if group != found.st_gid:
            os.fchown(new, -1, group)
    except PermissionError:  # not in that group, so the file is not ours to share with it
        mode = stat.S_IMODE(kept.st_mode)
    if mode != stat.S_IMODE(found.st_mode):
        os.fchmod(new, mode)


def _keep_aside(path: str) -> str:
    """Give what stands at ``path`` a second name, and return that; a crash leaves it in its place too."""
    aside = f"{path}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}"
    while os.path.lexists(aside):
        aside += "+"
    try:
        os.link(path, aside, follow_symlinks=False)
    except FileNotFoundError:
        return ""
    except OSError:  # a directory, or a file system without hard links
        os.rename(path, aside)
    return aside


def timestamp() -> str:
    """Return the local time, ISO 8601 to the second. Information only: no decision depends on it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def lock_in_time(descriptor: int, deadline_s: float) -> bool:
    """Lock an open file for us alone; tell whether we have it by ``deadline_s`` of the monotonic clock.

    Unless it returns ``True``, the descriptor is closed. Who has to wait stands in the kernel's queue, and polls where
    it cannot.
    """
    had = False
    try:
        from filelock import lock_descriptor  # half of a start, and reading a pool has no use for it

        had = lock_descriptor(descriptor, blocking=False)
        if not had and time.monotonic() < deadline_s:
            with suppress(ModuleNotFoundError):  # two files alone poll
                from gpu_resource_extensions.lock_queue import lock_in_queue

                had = lock_in_queue(descriptor, deadline_s)
        while not had and time.monotonic() < deadline_s:
            time.sleep(LOCK_POLL_S)
            had = lock_descriptor(descriptor, blocking=False)
        return had
    except ImportError as error:
        raise MissingPackageError(error) from error
    finally:
        if not had:
            _unlock_and_close(descriptor)


def _unlock_and_close(descriptor: int) -> None:
    # Unlocked by name, for a forked child shares the lock through its copy of the descriptor.
    with suppress(OSError):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


@cache  # a process stays on its machine, and its records with the name that it began with
def host_name() -> str:
    """Return the name of this machine as the kernel knows it."""
    return os.uname().nodename


def this_requester(command: str | None = None) -> Requester:
    """Describe this process; ``command`` stands for its own command line."""
    uid, command = os.getuid(), printable(" ".join(sys.argv) if command is None else command)
    if len(command) > MAX_COMMAND_LENGTH:
        command = command[: MAX_COMMAND_LENGTH - 1] + "…"
    who: Requester = {"user": user_name(uid), "uid": uid, "host": host_name(), "pid": os.getpid(), "command": command}
    inside = os.environ.get("GPU_TASK_ID")
    return {**who, "inside": inside} if inside and task_id_problem(inside) is None else who


def named_place(machine_file: str) -> str | None:
    """Return the place of the pool that the environment names, else the first line of ``machine_file``.

    :returns: ``None`` if the variable is unset or empty and there is no such file.
    :raises StateFileError: the file is of no use; it is never skipped, for then there would be two pools.
    :raises InvalidRequestError: the place depends on the current directory.
    """
    named_by, place = RESOURCE_FILE_VARIABLE, os.environ.get(RESOURCE_FILE_VARIABLE, "")
    if not place:
        try:
            with open(machine_file, encoding="utf-8", errors="surrogateescape") as file:
                named_by, place = machine_file, file.readline().strip()
        except OSError as error:
            if not os.path.lexists(machine_file):
                return None
            raise StateFileError(machine_file, _os_reason(error), say(_MACHINE_FILE_UNREADABLE)) from error
        if not place:
            raise StateFileError(machine_file, *map(say, _EMPTY_MACHINE_FILE))
    if not os.path.isabs(place) and not is_url(place):
        shown = "…" if re.search("@|password", place) else place  # a URL with a slip in it may hold a password
        raise InvalidRequestError(named_by, shown, *_RELATIVE)
    return place


def named_processes(processes: Sequence[dict[str, Any]]) -> str:
    """Return a line that names these processes, and how many more there are."""
    words = [
        f"PID {process['pid']} ({process['user']}) {process['command'][:60]}".rstrip() for process in processes[:3]
    ]
    return ", ".join(words) + (say(" 他 {} 件", len(processes) - 3) if len(processes) > 3 else "")


@cache  # it may have to be asked of a directory service
def user_name(uid: int) -> str:
    """Return the name of a user, or the number of one without a name."""
    with suppress(KeyError):  # a container may run as a user without a name
        return printable(pwd.getpwuid(uid).pw_name)
    return str(uid)


# --- The store: the only code that locks, reads and writes the document ---------------------------


class Store(Protocol):
    """What the manager needs of the place where a pool is kept; it knows nothing of placement.

    Each verb raises :class:`StateFileError` if it failed; unless the text says otherwise, the old document stands.
    """

    path: str  # of the pool, or its address, as screens and errors show it
    lease_directory: str  # where on this machine the leases of its tasks lie, once there are some
    poll_s: float = 0.25  # between two looks of a waiter at the document

    def create(self, state: State) -> None:
        """Make ``state`` the document, unless there is something in its place, good or bad."""

    def read(self) -> State:
        """Return a private copy of the document as some change left it, without waiting for one."""

    def update(self, change: Callable[[State], T], instead_of_unusable: State | None = None) -> T:
        """Apply ``change`` to the document as one atomic, durable step, and return what it returns.

        ``change`` gets a private copy, whose ``last_updated`` is the present time, and alters it. It may be called
        more than once, so it has no effect outside its argument that a second call could see. What it leaves
        equal is not written. If it raises, nothing is written.

        :param instead_of_unusable: what to change if there is no valid document, whose place is then kept aside
        :raises LockTimeoutError: other changes took longer than we were told to wait.
        :raises NoPoolError: there is nothing in the place of the document.
        :raises UnusableStateFileError: what is there is no valid document; it is left as it is.
        """

    def version_mark(self) -> object:
        """Return what is another one after every change; much cheaper than to read.

        :raises NoPoolError: there is nothing in the place of the document.
        """


def open_store(place: str, lock_timeout_s: float, lock_name: str = LOCK_FILE) -> Store:
    """Return the store of the pool at ``place``, a path or a URL; ``lock_name`` is for those that have a lock file."""
    if is_url(place):
        from gpu_resource_extensions.databases import open_database

        return open_database(place, lock_timeout_s)
    return JsonFileStore(place, lock_timeout_s, lock_name)


def is_url(place: str) -> bool:
    """Tell whether a place is that of a database; every path may be made absolute."""
    return re.match(r"\w[\w+.-]*://", place) is not None


class JsonFileStore(Store):
    """One JSON file on a local file system.

    Readers take no lock: ``rename`` is atomic, so they see the old file or the new one. Writers hold two locks
    for the whole of a change, which the kernel frees the moment they die:

    * the *directory* of the state file. It excludes every other writer, and nobody can delete it. With the lock
      file alone, this would lose B's work: A locks the file and stops (SIGSTOP, a paused machine); somebody
      deletes the file; B makes a new one, locks that, commits; A continues and writes what it had read before B.
    * ``.resource.lock``, the name that the outside world knows: other programs may hold it to keep us out, and
      ``lslocks`` shows who holds it. Nothing is ever decided from its existence.
    """

    def __init__(self, path: str, lock_timeout_s: float, lock_name: str) -> None:
        self.path, self.lock_timeout_s, self.lock_name = path, lock_timeout_s, lock_name
        with failures_reported(path):
            self.path = os.path.abspath(path)  # fails where the current directory has been removed
            self.lease_directory = os.path.join(os.path.dirname(self._real_path()), LEASE_DIRECTORY)

    def create(self, state: State) -> None:
        if os.path.lexists(self.path):
            return
        with self._locked() as (path, directory):
            try:
                os.lstat(path)
            except FileNotFoundError:
                self._commit(path, directory, {**state, "last_updated": timestamp()}, None)

    def read(self) -> State:
        with failures_reported(self.path):
            return self._read(self.path)[0]

    def update(self, change: Callable[[State], T], instead_of_unusable: State | None = None) -> T:
        with self._locked() as (path, directory):
            before: State | None = None
            try:
                before, data = self._read(path)
                state: State = parse_json(data)
            except UnusableStateFileError:
                if instead_of_unusable is None:
                    raise
                state = parse_json(encode_state(instead_of_unusable))
            state["last_updated"] = timestamp()
            result = change(state)
            if before is None or state != {**before, "last_updated": state["last_updated"]}:
                self._commit(path, directory, state, before)
        return result

    def version_mark(self) -> object:
        with failures_reported(self.path):
            try:
                found = os.lstat(self.path)
            except FileNotFoundError as error:
                raise self._unusable(self.path, error) from error
            with suppress(OSError):  # a link that leads nowhere; reading says so
                found = os.stat(self.path)
            return found.st_ino, found.st_mtime_ns

    def _unusable(self, path: str, error: OSError) -> StateFileError:
        if os.path.lexists(path):
            unusable = UnusableStateFileError(self.path, _os_reason(error))
            if error.errno == errno.EACCES:  # it may be sound, and somebody's
                unusable.remedy = say(_UNREADABLE)
            return unusable
        remedy = MAKE_POOL if os.path.isdir(os.path.dirname(path)) else _MAKE_DIRECTORY
        return NoPoolError(self.path, _os_reason(error), say(remedy))

    def _real_path(self) -> str:
        """Return where the document really lies, for a link stays a link, and two links share one lock.

        No link is left in it, for one that is moved during a change would lead to a pool that we have not locked.
        A link to the document that leads nowhere is itself what stands in the place.
        """
        try:
            return os.path.realpath(self.path, strict=True)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            parent, name = os.path.split(self.path)
            return os.path.join(os.path.realpath(parent), name)

    def _read(self, path: str) -> tuple[State, bytes]:
        try:
            # Without O_NONBLOCK, a FIFO in the place of the file would make us wait for ever.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EACCES, errno.ELOOP, errno.ENXIO):
                raise self._unusable(path, error) from error
            raise  # a disk or a limit that fails now says nothing about the file
        try:
            found, data = os.fstat(descriptor), b""
            if stat.S_ISDIR(found.st_mode):  # never moved, not even by a reset
                raise StateFileError(self.path, *map(say, _IS_DIRECTORY))
            if not stat.S_ISREG(found.st_mode):
                raise UnusableStateFileError(self.path, say(_NO_REGULAR_FILE))
            while len(data) < found.st_size and (part := os.read(descriptor, found.st_size - len(data))):
                data += part
        finally:
            os.close(descriptor)
        try:
            return decode_state(data), data
        except ValueError as error:
            raise UnusableStateFileError(self.path, str(error)) from error

    @contextmanager
    def _locked(self) -> Iterator[tuple[str, int]]:
        """Hold both locks; yield the real path of the document and the descriptor of its directory."""
        deadline_s = time.monotonic() + self.lock_timeout_s
        with failures_reported(self.path):
            path = self._real_path()
            parent = os.path.dirname(path)
            lock_file = os.path.join(parent, self.lock_name)
            # Opened anew, so that threads and forked children exclude each other like strangers.
            directory = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
            held = self._held(directory, lock_file, deadline_s)
            with held, self._held(self._open_lock_file(lock_file), lock_file, deadline_s):
                if not os.path.samestat(os.fstat(directory), os.stat(parent)):
                    raise OSError(errno.ESTALE, say(_MOVED), parent)
                yield path, directory

    @staticmethod
    def _open_lock_file(path: str) -> int:
        while True:
            with suppress(FileNotFoundError):
                return os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            with new_in_place(path):  # with the directory locked, so only one of us ever makes it
                pass

    @contextmanager
    def _held(self, descriptor: int, lock_file: str, deadline_s: float) -> Iterator[None]:
        if not lock_in_time(descriptor, deadline_s):
            raise LockTimeoutError(os.path.realpath(lock_file), self.lock_timeout_s)
        try:
            yield
        finally:
            _unlock_and_close(descriptor)

    def _commit(self, path: str, directory: int, state: State, before: State | None) -> None:
        """Make ``state`` the document in place of ``before``, or of what is no document; both locks are held.

        A failed ``fsync`` is final: the kernel may have dropped the very pages it could not write, and a second
        call would then succeed without them ("fsyncgate", PostgreSQL 2018).
        """
        try:
            data = memoryview(encode_state(state, before))
        except ValueError as error:
            raise StateFileError(self.path, say(_UNWRITABLE[0], error), say(_UNWRITABLE[1])) from error
        with new_in_place(path) as descriptor:
            while data:
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
            aside = "" if before else _keep_aside(path)
        if aside:
            log().warning(say("使えない状態ファイルを %s に保存し、作り直しました"), aside)
        try:
            os.fsync(directory)
        except OSError as error:
            raise StateFileError(self.path, say(_UNCONFIRMED[0], _os_reason(error)), say(_UNCONFIRMED[1])) from error


# --- The manager ----------------------------------------------------------------------------------


class GPUResourceManagerV01:
    """First Fit allocation over the pool that one state file describes.

    Safe to use from many processes and threads at once, and after ``fork``. Between two calls it holds no lock
    and no open file. Every method may raise :class:`StateFileError`, and those that change something
    :class:`LockTimeoutError`: see :class:`Store`.

    :param resource_file: the state file. By default the one that the environment variable ``GPU_RESOURCE_FILE``
        names, else the first line of ``/etc/gpu-resource-file``, else ``resource_status.json`` beside this module.
    :param lock_timeout_s: seconds to wait for the lock, 0-1e9, or ``math.inf``.
    :param servers: name, GPUs (1-1024) and CPUs (1-65536) of each server of a pool that is made; by default
        ``TOTAL_SERVERS`` made-up ones.
    :param min_gpus: the least number of GPUs that a task of a pool that is made may ask for; by default 1, and 2 on
        the made-up servers.
    :param create: make the pool where there is none; ``False``: look at what would be made. By default it is made,
        but where the environment or this machine names the place only if it is described. Never overwritten.
    :raises InvalidRequestError: a parameter is of no use.
    :raises NoPoolError: there is no pool at the place that the environment or this machine names.
    :raises PoolConflictError: there is a pool already, and it is not as described.
    """

    RESOURCE_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "resource_status.json")
    MACHINE_FILE = "/etc/gpu-resource-file"  # its first line names the pool of this machine
    LOCK_FILE = LOCK_FILE  # in the directory of the state file
    TOTAL_SERVERS, GPUS_PER_SERVER, CPUS_PER_SERVER = 4, 8, 64  # of a pool that nobody has described

    def __init__(
        self,
        resource_file: str | os.PathLike[str] | None = None,
        lock_timeout_s: float = DEFAULT_LOCK_TIMEOUT_S,
        *,
        servers: Sequence[ServerDescription] | None = None,
        min_gpus: int | None = None,
        create: bool | None = None,
    ) -> None:
        language = os.environ.get(LANGUAGE_VARIABLE)
        if language not in (None, "", "ja", "en"):
            raise InvalidRequestError(LANGUAGE_VARIABLE, language, *_NO_LANGUAGE)
        named = named_place(self.MACHINE_FILE) if resource_file is None else None
        path = named or self.RESOURCE_FILE if resource_file is None else resource_file
        path = os.fspath(path) if isinstance(path, os.PathLike) else path
        if not isinstance(path, str) or not path or "\0" in path:
            raise InvalidRequestError("resource_file", path, *_NO_PATH)
        if resource_file is named is None and {"site-packages", "dist-packages"} & {*path.split(os.sep)}:
            raise NoPoolError(path, *map(say, _NO_PLACE))
        check_seconds("lock_timeout_s", lock_timeout_s)
        described = self._described(servers, min_gpus)
        self._store, self._is_made_up = open_store(path, lock_timeout_s, self.LOCK_FILE), False
        self._reclaimed: list[str] = []  # by the last change
        self.resource_file = self._store.path
        is_described = servers is not None or min_gpus is not None
        self._is_named, self._shows_what_would_be = named is not None, create is False and named is None
        if min_gpus is not None:
            of_pool = described
            if servers is None:
                with suppress(NoPoolError):
                    of_pool = self._store.read()
            check_int("min_gpus", min_gpus, 1, limits(of_pool)[1])
        if create or is_described or (create is None and named is None):
            self._store.create(described)
        elif named is not None:
            self._store.version_mark()  # or there is none
        if is_described:
            state = self._store.read()
            found = descriptions(state["servers"])
            if (servers is not None and [*map(tuple, servers)] != found) or min_gpus not in (None, limits(state)[0]):
                raise PoolConflictError(self.resource_file)

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

        Why there is no room is logged as a warning. All else is as in :meth:`obtain_resources`.
        """
        try:
            return self.obtain_resources(
                task_id, required_gpus, required_cpus, prefer_server_id, wait_s=wait_s, on_wait=on_wait, local=local
            )
        except NoCapacityError as refusal:
            log().warning(say("リソース不足: %s"), refusal)
            return None

    def obtain_resources(
        self,
        task_id: str,
        required_gpus: int,
        required_cpus: int,
        prefer_server_id: int | None = None,
        *,
        wait_s: float = 0,
        on_wait: OnWait | None = None,
        local: bool = False,
    ) -> Allocation:
        """Give the task GPUs and CPUs on one server until it is released, whatever becomes of this process.

        :param task_id: unique; 1-128 characters, not blank, no control character, no leading ``-``.
        :param required_gpus: 2-8 on the default pool; see :func:`limits`.
        :param required_cpus: 1-64 on the default pool.
        :param prefer_server_id: tried first; First Fit when it has no room.
        :param wait_s: seconds to stand in line for room (see :func:`admit`), 0-1e9; ``math.inf`` for ever.
        :param on_wait: called with the position in line, from 1, and why there is no room yet, at each change.
        :param local: only on the server that is this machine; see :func:`server_of_host`.
        :raises InvalidRequestError: a parameter is out of range or of the wrong type.
        :raises DuplicateTaskError: a task with this identifier runs or waits already.
        :raises NoCapacityError: there is no room, or was none for ``wait_s`` seconds.
        """
        check_seconds("wait_s", wait_s)
        request = self._request(task_id, required_gpus, required_cpus, prefer_server_id, local)
        try:
            return self._granted(self._change(lambda state: ask_once(state, request)))
        except NoCapacityError:
            if not wait_s:
                raise
        with self._bound(request) as bound:
            granted = self._granted(bound.ask(wait_s, on_wait))
            bound.unbind()
            return granted

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
        keeper: Callable[[int], AbstractContextManager[int]] | None = None,
        claim: str | None = None,
    ) -> Iterator[Allocation]:
        """Hold GPUs and CPUs of this machine while the block runs, and no longer than its processes live.

        The task is bound to a lease: should this process be killed, the next change of anybody takes back what it
        held, once every child that has inherited the lease is gone too. ``fork`` and ``os.system`` hand it down;
        ``subprocess`` does with ``close_fds=False``. Parameters and errors as :meth:`obtain_resources`, and:

        :param command: recorded as information, cut after 200 characters; by default that of this process.
        :param keeper: called with the descriptor of the lease once the task is placed: lets a process hold that
            and gives its pid; by default this process is its own keeper.
        :param claim: the lease under which it was claimed for this machine; see :meth:`claim`.
        :raises ClaimGoneError: there is no such claim, or no more.
        """
        check_seconds("wait_s", wait_s)
        request = self._request(task_id, required_gpus, required_cpus, None, True, command)
        with self._bound(request) as bound:
            granted = self._granted(bound.take_over(claim) if claim else bound.ask(wait_s, on_wait))
            with keeper(bound.lease.descriptor) if keeper else nullcontext(os.getpid()) as pid:
                bound.take_up(pid)
                yield granted

    @contextmanager
    def claim(
        self,
        task_id: str,
        required_gpus: int,
        required_cpus: int,
        *,
        wait_s: float = 0,
        on_wait: OnWait | None = None,
        command: str | None = None,
        server: str | None = None,
        excluded_servers: Sequence[str] = (),
    ) -> Iterator[BoundRequest]:
        """Hold GPUs and CPUs of any server while the block runs, for a process there to take over.

        That calls :meth:`allocation` with the name of the ``lease`` of what this yields; ``granted`` says where. Until
        then ``sign`` must be called every few seconds, for a claim without a sign of life lapses. This machine is tried
        first, then First Fit. Parameters and errors as :meth:`obtain_resources`, and:

        :param server: no other one will do.
        :param excluded_servers: names of those that will not do.
        """
        check_seconds("wait_s", wait_s)
        request = self._request(task_id, required_gpus, required_cpus, None, False, command)
        request["only_server_name"], request["excluded_server_names"] = server, [*excluded_servers]
        with self._bound(request) as bound:
            bound.prefer_this_machine()
            self._granted(bound.ask(wait_s, on_wait, is_claim=True))
            yield bound

    def release_resources(self, task_id: str, force: bool = False) -> bool:
        """Take back what the task holds, or its place in line; ``True`` once that is on disk, ``False`` if unknown.

        :param force: even if its processes run, which then share its GPUs with others, or it belongs to another
            user: a guard against mistakes, no security boundary, for who may write the file may do anything.
        :raises InvalidRequestError: ``task_id`` is none that a task can have.
        :raises NotOwnerError: it belongs to another user.
        :raises TaskRunningError: processes of it run; see :meth:`stop_task`.
        """
        check_name("task_id", task_id)

        def change(state: State) -> tuple[bool, list[dict[str, Any]]]:
            found, processes = [record for record in records(state) if record["task_id"] == task_id], []
            for record in found:
                self._check_owner(record, force)
                if "lease" in record and "allocated_gpus" in record:  # what has ended is taken back by now
                    processes = self._leases(state).processes([record])[0]
                    if not force:
                        raise TaskRunningError(task_id, processes)
                    self._leases(state).end_claim(record["lease"])
            end_task(state, task_id)
            return bool(found), processes

        released, processes = self._change(change)
        if processes:
            text = say("タスク %s の記録を消しましたが、プロセスが動いています: %s")
            log().warning(text, task_id, named_processes(processes))
        if not released:
            log().warning(say(UNKNOWN_TASK), task_id)
        return released

    def stop_task(self, task_id: str, grace_s: float = 10.0, force: bool = False) -> bool:
        """End all processes of a task that has a lease; ``True`` once its GPUs are free, ``False`` if it is unknown.

        :param grace_s: seconds (0-1e9) between TERM, to the whole tree of the job, and KILL to what is left of it.
        :param force: even if it belongs to another user.
        :raises NotOwnerError: it belongs to another user.
        :raises NotStoppableError: it has no lease, runs on another machine, or has processes that do not end.
        """
        check_name("task_id", task_id)
        check_seconds("grace_s", grace_s)
        state = self._look()
        found = [record for record in records(state) if record["task_id"] == task_id]
        for record in found:
            self._check_owner(record, force)
            self._leases(state).stop(record, grace_s)
        self._change(lambda state: None)  # takes it back
        return bool(found)

    def reclaim_ended(self) -> list[str]:
        """Take back what has ended, as every change does; return the identifiers of those tasks and requests."""
        self._change(lambda state: None)
        return self._reclaimed

    def _check_owner(self, record: Any, force: bool) -> None:
        owner = record.get("uid")
        if not force and isinstance(owner, int) and os.getuid() not in (0, owner):
            raise NotOwnerError(record["task_id"], printable(str(record.get("user", owner))))

    def get_resource_summary(self) -> dict[str, Any]:
        """Return counts for the pool and each server, without waiting for a lock.

        ``total_servers``, ``total_gpus``, ``total_available_gpus``, ``total_cpus``, ``total_available_cpus``,
        ``total_running_tasks``; ``total_waiting`` if anybody waits; and ``servers``, for each of which
        ``server_id``, ``server_name``, ``total_gpus``, ``available_gpus`` (a count), ``gpu_utilization`` (a
        text such as "50.0%"), the same three of CPUs, ``running_tasks`` (a count), and, where GPUs are out of
        service, ``disabled``: why, of each index. These count in the totals, not in what is available.

        What a task holds whose processes are gone counts as free, for the next change takes it back; such
        tasks and requests are in ``ended_tasks``, if there are any.
        """
        return self._seen(summarize)

    def get_overview(self) -> dict[str, Any]:
        """Return the same and, for people, what the pool is and who has what.

        ``min_gpus_per_task``; ``last_updated``, empty where there is no pool yet; ``made_up``: whether nobody has
        described the servers; ``tasks``: as the document has them, with ``server_name`` and ``kind``, which is "job"
        (its processes hold it), "reservation" or "waiting".
        """
        return self._seen(overview)

    def _seen(self, described: Callable[[State], dict[str, Any]]) -> dict[str, Any]:
        state = self._look()
        with failures_reported(self.resource_file):
            ended = self._reclaim(state)
        return {**described(state), "ended_tasks": ended} if ended else described(state)

    def get_detailed_status(self) -> State:
        """Return the document, without waiting for a lock, with what we see of each lease.

        Where the last holder of the lease is gone, the record has ``"ended": True``; else ``processes`` are those that
        hold it, each with ``pid``, ``user`` and ``command``.
        """
        state = self._look()
        leased = [record for record in records(state) if "lease" in record]
        if leased:
            with failures_reported(self.resource_file):
                self._leases(state).describe(leased)
        return state

    def reset_resources(
        self,
        servers: Sequence[ServerDescription] | None = None,
        min_gpus: int | None = None,
        force: bool | None = None,
    ) -> bool:
        """Forget every task but those whose processes run, and every waiting request; return ``True``.

        Unknown keys stay. A state file that cannot be used is set aside as ``resource_status.json.corrupt-TIME``
        and made anew.

        :param servers: as for construction, and so ``min_gpus``; by default what there is stays, out of service too.
        :param force: ``True``: also tasks whose processes run, which then share their GPUs with others;
            ``False``: nothing, if there are tasks.
        :raises InvalidRequestError: a description is of no use.
        :raises PoolConflictError: there are tasks, and ``force`` is ``False``, or the servers described have no
            place for a task whose processes run.
        """
        described = self._described(servers, min_gpus)
        if self._is_named:
            self._store.version_mark()  # or there is none, and none is to be made without a word

        def change(state: State) -> list[str]:
            tasks = placed_tasks(state)
            if tasks and force is False:
                raise PoolConflictError(self.resource_file, [task["task_id"] for _, task in tasks])
            kept = []
            for server, task in tasks:
                if "lease" in task and not force:  # what has ended is taken back by now
                    kept.append((server, task))
                else:
                    if "lease" in task:
                        self._leases(state).end_claim(task["lease"])
                    remove_task(server, task)
            set_waiting(state, [])
            if servers is not None:
                from gpu_resource_extensions.servers import keep_tasks

                homeless = keep_tasks(state, new_servers(servers), kept)
                if homeless:
                    raise PoolConflictError(self.resource_file, homeless, living=True)
            if min_gpus is not None:
                check_int("min_gpus", min_gpus, 1, limits(state)[1])
            if "min_gpus_per_task" in described:
                state["min_gpus_per_task"] = described["min_gpus_per_task"]
            return [task["task_id"] for _, task in kept]

        kept = self._change(change, described)
        if kept:
            log().warning(say("プロセスが動いているタスクは残しました (--stop で終了できます): %s"), ", ".join(kept))
        return True

    def add_server(self, name: str, gpus: int, cpus: int) -> int:
        """Add an idle server; return its ``server_id``, the highest one plus 1.

        :raises InvalidRequestError: there is one of that name, or it is no description of a server.
        """
        from gpu_resource_extensions.servers import add_server

        return self._change(lambda state: add_server(state, (name, gpus, cpus)))["server_id"]

    def remove_server(self, name: str) -> None:
        """Remove an idle server; the others keep their ``server_id``.

        :raises InvalidRequestError: there is none of that name.
        :raises ServerNeededError: a task runs or waits there, or it is the last one.
        """
        from gpu_resource_extensions.servers import remove_server

        self._change(lambda state: remove_server(state, name))

    def disable(self, name: str, gpus: Sequence[int] | None = None, reason: str = "") -> dict[str, str]:
        """Take GPUs of a server, by default all, out of service: what runs there goes on, nothing new is placed there.

        Return why each one that is now out of service there is so.

        :param reason: for people; at most 200 characters, no control character.
        :raises InvalidRequestError: there is no such server or GPU.
        """
        from gpu_resource_extensions.servers import disable

        return self._change(lambda state: disable(state, name, gpus, reason))

    def enable(self, name: str, gpus: Sequence[int] | None = None) -> dict[str, str]:
        """Put GPUs of a server, by default all, back in service; result and errors as :meth:`disable`."""
        from gpu_resource_extensions.servers import enable

        return self._change(lambda state: enable(state, name, gpus))

    def _described(self, servers: Sequence[ServerDescription] | None, min_gpus: int | None) -> State:
        """Return an idle pool as described, by default the one of the constants above."""
        state = new_state(self.TOTAL_SERVERS, self.GPUS_PER_SERVER, self.CPUS_PER_SERVER)
        if servers is not None:
            for description in servers:
                check_description(*description)
            if not servers or len({name.casefold() for name, _, _ in servers}) < len(servers):
                raise InvalidRequestError("servers", servers, *_NO_SERVERS)
            state["servers"], state["min_gpus_per_task"] = new_servers(servers), 1
        if min_gpus is not None:  # checked by those who know what pool it is for
            state["min_gpus_per_task"] = min_gpus
        return state

    def _request(
        self, task_id: str, gpus: int, cpus: int, prefer: int | None, local: bool, command: str | None = None
    ) -> Request:
        """Return a request of this process; what can never be granted is refused here, ahead of lock and lease."""
        check_name("task_id", task_id)
        request = new_request(task_id, gpus, cpus, prefer, **this_requester(command))
        is_usual = type(gpus) is type(cpus) is int and MIN_GPUS_PER_TASK <= gpus <= self.GPUS_PER_SERVER
        is_usual = is_usual and 1 <= cpus <= self.CPUS_PER_SERVER
        if is_usual and not local and prefer is None:
            return request  # not worth another look at the pool
        state = self._store.read()
        if local:
            from gpu_resource_extensions.leases import bind_to_machine, server_here

            request["only_server_name"], request["local"] = server_here(state)["server_name"], True
            bind_to_machine(request, state)
        check_request(state, request)
        return request

    def _leases(self, state: State) -> Leases:
        from gpu_resource_extensions.leases import Leases  # only some pools have any

        return Leases(self._store.lease_directory, state.get("pool", ""), state.get("clock"))

    def _reclaim(self, state: State) -> list[str]:
        leased = any("lease" in record for record in records(state))
        return reclaim(state, self._leases(state).is_ended) if leased else []

    def _bound(self, request: Request) -> BoundRequest:
        from gpu_resource_extensions.waiting import BoundRequest  # with what follows from a lease

        return BoundRequest(request, self._store, self._leases, self._look, self._change)

    def _granted(self, answer: Allocation | Shortfall) -> Allocation:
        if isinstance(answer, Shortfall):
            raise NoCapacityError(answer)
        if self._is_made_up and answer["server_name"] in [name for name, _, _ in _MADE_UP]:
            log().warning(say(_FROM_MADE_UP), self.resource_file)
        return answer

    def _look(self) -> State:
        """Read the document, with what it has lost of the living jobs."""
        try:
            state = self._store.read()
        except NoPoolError:
            if not self._shows_what_would_be:
                raise
            state = self._described(None, None)
        if os.path.isdir(self._store.lease_directory):
            with failures_reported(self.resource_file):
                self._leases(state).put_back(state)
        return state

    def _change(self, change: Callable[[State], T], instead_of_unusable: State | None = None) -> T:
        """Apply ``change``, with the living and the dead set right ahead of it, and the line served after it."""

        leases: Leases | None = None

        def whole_change(state: State) -> T:
            nonlocal leases
            leases = self._leases(state) if os.path.isdir(self._store.lease_directory) else None
            if leases and "clock" not in state:
                # Deleting what no document names has no effect that a second call could see. Ahead of the reclaim:
                # what that takes back is still named by the document on the disk.
                leases.sweep(records(state))
            ended = self._reclaimed = self._reclaim(state)
            if ended:
                log().info(say("終了したタスクを回収しました: %s"), ended)
            for task_id, gpus in leases.put_back(state).items() if leases else ():
                log().warning(say(_LACKING), task_id, gpus)
            admit(state)
            result = change(state)
            if leases:  # what the change has freed may be theirs
                leases.put_back(state)
            admit(state)
            has_disabled = any("disabled" in server for server in state["servers"])
            state["version"] = DISABLED_VERSION if has_disabled else FORMAT_VERSION
            self._is_made_up = is_made_up(state)
            return result

        result = self._store.update(whole_change, instead_of_unusable)
        if leases and leases.clock_s is not None and leases.has_old():
            # A database may have been changed since our change has read it: what is not named now either may go.
            with failures_reported(self.resource_file):
                leases.sweep(records(self._store.read()))
        return result
