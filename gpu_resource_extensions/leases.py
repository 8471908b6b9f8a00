"""Leases on Linux: whether the processes of a task live, what its lease says, who holds it, how to stop them.

A lease is a file that its maker keeps locked with ``flock``. Processes that inherit the descriptor, by ``fork``
and through ``exec``, hold the same lock, and the kernel frees it when the last of them is gone; so it tells
whether any process of a job lives, right in every pid namespace and after every kind of death, without a pid.
Its first line is one of the words below; the second is a ``Claim`` as JSON once that word is ``granted``.

A job is judged only on the machine that it runs on. What nothing uses yet, for it waits or was granted and not
taken up, has ``seen`` in its record and lapses: its owner gives a sign of life every ``SIGN_S`` seconds, and who is
late loses it, wherever that is. On a file's pool the sign is the time stamp of the lease, which costs no write of the
document; in a database it is the ``clock`` of the store, written to ``seen``.

Reads from the ground up: what names this machine, the lease of this process, the directory of all, the processes
behind one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, TypedDict, cast

from gpu_resource_extensions.hosts import server_of_host
from gpu_resource_extensions.servers import append_server, unheld_gpus
from gpu_resource_manager_v01 import (
    MAX_TASK_ID_LENGTH,
    SERVER_VARIABLE,
    Requester,
    ResourceManagerError,
    Server,
    State,
    Task,
    check_record,
    hold,
    host_name,
    named_processes,
    new_in_place,
    parse_json,
    placed_tasks,
    printable,
    quoted,
    records,
    remove_task,
    say,
    set_permissions,
    set_waiting,
    user_name,
)

ASKED, GRANTED, RELEASED = b"asked   \n", b"granted \n", b"released\n"  # of one length: each fits in another's place
LOWEST_DESCRIPTOR = 20  # out of the way of the numbers that shell scripts redirect
LEASE_NAME = re.compile(r"([0-9a-f]{32})(?: \(deleted\))?$")
# File systems that no other machine can have mounted: on one of these, another boot was an earlier one.
LOCAL_FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "tmpfs", "overlay")
STOP_POLL_S, KILL_LIMIT_S = 0.02, 5.0
RELEASE_LIMIT_S = 2.5  # within which ``--run`` and its keeper release a job that was killed, and tell how it ended
SIGN_S, LAPSE_S = 15, 60  # between two signs of life, and without one before what nothing uses yet is taken back


class NotStoppableError(ResourceManagerError):
    """The processes of the task cannot be ended from here; its GPUs are still held."""

    exit_code, code = 1, "not_stoppable"
    template = "タスク {task_id!r} を終了できません。{reason}\n  対処: {remedy}"

    def __init__(self, task_id: str, reason: str, remedy: str, **facts: object) -> None:
        self.task_id = task_id
        self.reason, self.remedy = say(reason, **facts), say(remedy, name=quoted(task_id), **facts)


# For NotStoppableError: the reason, and what to do.
_NO_LEASE = "プロセスとの結び付きがありません", "プロセスは自分で終了させ、--release {name} で返してください"
_ANOTHER_MACHINE = "別の計算機 ({host}) で動いています", "{host} で --stop {name} を実行してください"
_LEASE_IS_LOST = (
    "プロセスとの結び付き (.leases/ のファイル) が失われています",
    "プロセスが残っていないことを確かめて、--release {name} --force で返してください",
)
_OWN_TREE = "このコマンド自身がその中で動いています", "別の端末で --stop {name} を実行してください"
_UNSEEN = "ここからは見えないプロセス"
_STILL_THERE = (
    "終了しないプロセスがあります: {who}",
    "その利用者か管理者として --stop {name} を実行してください (誰が持つかは --detail で分かります)",
)


class Claim(TypedDict):
    """What the lease of a job says that was granted to it."""

    task: Task  # as it was then
    server_name: str
    total_gpus: int
    total_cpus: int
    keeper: int  # pid of the process that holds the lease until the end


def is_claim(document: Any) -> bool:
    """Tell whether a decoded lease is a :class:`Claim`."""
    with suppress(ValueError):
        check_record(document, Claim)
        check_record(document["task"], Task)
        return True
    return False


# --- What follows for the document: a pure function, as the decisions of the library ---------------


def put_back(state: State, claims: Sequence[Claim]) -> dict[str, list[int]]:
    """Let each living job hold what its lease says, whatever became of the document.

    A document that was edited, restored from an old copy or made anew gets its task back, and its server. What
    another task holds meanwhile stays there until that ends, unless nothing uses it yet; the living job is granted the
    rest.

    :returns: of each task that lacks some of its GPUs their indices.
    """
    lost, lacking = [], {}
    for claim in claims:
        task, held = claim["task"], False
        for server, found in placed_tasks(state):
            is_same = found.get("lease") == task["lease"] or (
                "lease" not in found and all(found[key] == task[key] for key in ("task_id", "start_time"))
            )
            if is_same and (server["server_name"], found["allocated_gpus"], found.get("lease")) == (
                claim["server_name"],
                task["allocated_gpus"],
                task["lease"],
            ):
                held = True
            elif is_same:
                remove_task(server, found)
        if not held:
            lost.append(claim)
    for claim in lost:
        task = claim["task"]
        set_waiting(state, [request for request in state.get("waiting", ()) if request["lease"] != task["lease"]])
        server = next((one for one in state["servers"] if one["server_name"] == claim["server_name"]), None) or (
            append_server(state, (claim["server_name"], claim["total_gpus"], claim["total_cpus"]))
        )
        task_id = task["task_id"]
        if any(record["task_id"] == task_id for record in records(state)):  # somebody else's by now
            task_id = f"{task_id[: MAX_TASK_ID_LENGTH - 9]}+{task['lease'][:8]}"
        for other in [other for other in server["running_tasks"] if "seen" in other]:
            if not {*other["allocated_gpus"]}.isdisjoint(task["allocated_gpus"]):
                remove_task(server, other)
        free = unheld_gpus(server)
        gpus = [gpu for gpu in task["allocated_gpus"] if gpu in free]
        cpus = min(task["allocated_cpus"], server["available_cpus"])
        hold(server, {**task, "task_id": task_id, "allocated_gpus": gpus, "allocated_cpus": cpus})
        if gpus != task["allocated_gpus"]:
            lacking[task_id] = [gpu for gpu in task["allocated_gpus"] if gpu not in gpus]
    return lacking


# --- What names this machine -----------------------------------------------------------------------


@cache
def boot_id() -> str:
    """Return what names this kernel from its start to its end, in every container alike."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
    return host_name()


@cache
def machine_id() -> str:
    """Return what names this machine through all its starts, machine-id(5); empty if nothing does."""
    with suppress(OSError, UnicodeDecodeError), open("/etc/machine-id", encoding="ascii") as file:
        return file.read().strip().removeprefix("uninitialized")
    return ""


def server_here(state: State) -> Server:
    """Return the server of the pool that this machine is.

    :raises InvalidRequestError: there is none, or it would be two.
    """
    return server_of_host(state, host_name(), os.environ.get(SERVER_VARIABLE), boot_id())


def bind_to_machine(record: Requester, state: State) -> None:
    """Note in a record of the pool where alone its lease can be judged."""
    record["boot"] = boot_id()
    if "clock" in state and machine_id():
        record["machine"] = machine_id()


# --- Leases as files ------------------------------------------------------------------------------


class Lease:
    """A lease that this process has made and holds: its ``name``, and the ``descriptor`` that children inherit."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name, self.descriptor = name, descriptor

    def sign(self) -> None:
        """Give a sign of life: a time stamp by the clock of the kernel that nobody can set."""
        os.utime(self.descriptor, (now_s(), now_s()))

    def say_granted(self, server: Server, task: Task, keeper: int) -> None:
        """Write what the lease stands for, as part of the change by which it is taken up; twice is as good as once."""
        claim: Claim = {
            "task": task,
            "server_name": server["server_name"],
            "total_gpus": server["total_gpus"],
            "total_cpus": server["total_cpus"],
            "keeper": keeper,
        }
        os.pwrite(self.descriptor, json.dumps(claim, ensure_ascii=False).encode("utf-8", "backslashreplace"), 9)
        os.pwrite(self.descriptor, GRANTED, 0)  # last: what it says is complete whenever we are killed

    def give_up(self) -> bool:
        """Close the descriptor; tell whether no child holds the lease either, file or no file."""
        try:
            other = os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY)
        finally:
            os.close(self.descriptor)
        try:
            return _lock_at_once(other, fcntl.LOCK_SH)
        finally:
            os.close(other)


def now_s() -> float:
    """Return the seconds since this kernel was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _lock_at_once(descriptor: int, operation: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        return True
    return False


class Leases:
    """All leases of one pool on this machine, in one directory."""

    def __init__(self, directory: str, pool: str = "", clock_s: int | None = None) -> None:
        """:param pool: what begins the names of its leases in a directory that it shares with other pools.

        :param clock_s: the present time of a store that several machines share.
        """
        self.directory, self.clock_s = directory, clock_s
        self.prefix = f"gpu-lease-{pool}-" if pool else ""

    def make_directory(self) -> None:
        """Make the directory, for all who may write where it lies; called with the document locked."""
        if not os.path.isdir(self.directory):
            with new_in_place(self.directory, is_directory=True):
                pass

    def make(self) -> Lease:
        """Make a lease, which says that something is asked for."""
        while True:
            name = os.urandom(16).hex()
            descriptor = os.open(self._path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                if self.prefix:  # a directory of everybody, where ``--release --force`` is for everybody too
                    os.fchmod(descriptor, 0o666)
                else:
                    set_permissions(descriptor, self.directory, 0o660)
                os.pwrite(descriptor, ASKED, 0)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_nlink:  # else it was swept before we had locked it
                    lease = Lease(name, fcntl.fcntl(descriptor, fcntl.F_DUPFD, LOWEST_DESCRIPTOR))
                    lease.sign()
                    return lease
            except OSError as error:
                self.delete(name)
                if error.errno == errno.EINVAL:  # so few descriptors are allowed that there is no such number
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from error
                raise
            finally:
                os.close(descriptor)

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._path(name))

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, self.prefix + name)

    def is_ended(self, record: Requester) -> bool:
        """Tell whether ``record`` names a lease whose last holder is gone, or a claim that has lapsed.

        If we cannot know, it has not. ``flock`` tells the truth about processes under the same kernel, whatever the
        host is called: a container has a name of its own. What was taken under another kernel is over if that was an
        earlier start of this machine: it has its name and machine id, or only this machine can have the pool.
        """
        name = record.get("lease")
        if not isinstance(name, str):
            return False
        if self._has_lapsed(name, record):
            return True
        if self._is_here(record):
            # Shared, so that two who look at once do not take each other for the holder.
            return self._free(name, fcntl.LOCK_SH)
        if self.clock_s is None:
            return "boot" in record and _is_local(self.directory)
        return "machine" in record and (record["machine"], record.get("host")) == (machine_id(), host_name())

    def _has_lapsed(self, name: str, record: Requester) -> bool:
        """Tell whether nothing uses ``record`` yet and its owner gives no sign of life."""
        seen = record.get("seen")
        if not isinstance(seen, int):
            return False
        if self.clock_s is not None:
            return abs(self.clock_s - seen) > LAPSE_S  # a clock that steps back must not keep it either
        with suppress(OSError):
            return self._is_here(record) and now_s() - os.stat(self._path(name)).st_mtime > LAPSE_S
        return False

    def _is_here(self, record: Requester) -> bool:
        """Tell whether the processes of ``record`` run under this kernel; an earlier version noted only the host."""
        return record.get("boot") == boot_id() if "boot" in record else record.get("host") == host_name()

    def sweep(self, named: Iterable[Requester]) -> None:
        """Delete free leases that none of these records names; called with the document locked.

        In a directory of everybody only those of this user, and no young ones: the document of a database may have
        changed since it was read.
        """
        unnamed = {*self._names()}
        for name in unnamed.difference(str(record.get("lease")) for record in named) if unnamed else ():
            if not self.prefix or self._is_old(name):
                # Deleted while we hold it: its maker may have opened it, but not locked it, and then sees.
                self._free(name, fcntl.LOCK_EX, self.delete)

    def has_old(self) -> bool:
        """Tell whether there are leases that may be left over, in a directory of everybody."""
        return bool(self.prefix) and any(map(self._is_old, self._names()))

    def _is_old(self, name: str) -> bool:
        with suppress(OSError):
            found = os.lstat(self._path(name))
            is_ours = stat.S_ISREG(found.st_mode) and os.getuid() in (0, found.st_uid)
            return is_ours and time.time() - found.st_ctime > LAPSE_S
        return False

    def put_back(self, state: State) -> dict[str, list[int]]:
        """Do as :func:`put_back` for all living jobs of this machine, the oldest first; ``{}`` if none lacks a GPU."""
        claims = [self.claim(name) for name in self._names() if not self._free(name, fcntl.LOCK_SH)]
        living = [claim for claim in claims if claim and claim["task"].get("boot") == boot_id()]
        return put_back(state, sorted(living, key=lambda claim: claim["task"]["start_time"]))

    def _names(self) -> list[str]:
        with suppress(FileNotFoundError, NotADirectoryError):
            names = os.listdir(self.directory)
            return [name.removeprefix(self.prefix) for name in names if name.startswith(self.prefix)]
        return []

    def claim(self, name: str) -> Claim | None:
        """Return what a lease says that was granted; ``None`` if nothing, if no longer, or if it makes no sense."""
        with suppress(OSError, ValueError):
            descriptor = self._open(name)
            try:
                found = os.fstat(descriptor)
                text = os.read(descriptor, 1 << 20) if stat.S_ISREG(found.st_mode) else b""
            finally:
                os.close(descriptor)
            if text.startswith(GRANTED):
                claim = parse_json(text[len(GRANTED) :])
                if is_claim(claim) and claim["task"].get("lease") == name:
                    # In a directory of everybody, anybody may have written it, for a task of somebody else.
                    is_theirs = not self.prefix or found.st_uid in (0, claim["task"].get("uid"))
                    return cast("Claim", claim) if is_theirs else None
        return None

    def end_claim(self, name: str) -> None:
        """Let a lease say that it was released, so that nothing puts its task back."""
        with suppress(FileNotFoundError):
            descriptor = self._open(name, os.O_WRONLY)
            try:
                os.pwrite(descriptor, RELEASED, 0)
            finally:
                os.close(descriptor)

    def _open(self, name: str, access: int = os.O_RDONLY) -> int:
        if not re.fullmatch(LEASE_NAME, name) or len(name) != 32:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        # Somebody may have put a FIFO there.
        return os.open(self._path(name), access | os.O_NOFOLLOW | os.O_NONBLOCK)

    def _free(self, name: str, operation: int, then: Callable[[str], None] | None = None) -> bool:
        """Tell whether nobody holds a lease, and do ``then`` while it is locked; what is no lease counts as held."""
        try:
            descriptor = self._open(name)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP, errno.ENXIO):
                raise
            return False
        try:
            is_free = stat.S_ISREG(os.fstat(descriptor).st_mode) and _lock_at_once(descriptor, operation)
            if is_free and then:
                then(name)
            return is_free
        finally:
            os.close(descriptor)

    def describe(self, leased: Sequence[Any]) -> None:
        """Note in each record that it has ``ended``, or else its ``processes``."""
        living = []
        for record in leased:
            if self.is_ended(record):
                record["ended"] = True
            else:
                living.append(record)
        for record, processes in zip(living, self.processes(living) if living else [], strict=True):
            record["processes"] = processes

    def processes(self, held: Sequence[Any]) -> list[list[dict[str, Any]]]:
        """Return who holds the lease of each record: as far as we may see, else what the lease itself says."""
        seen, answers = holders([str(record["lease"]) for record in held]), []
        for record in held:
            claim, tree = self.claim(str(record["lease"])), seen[record["lease"]]
            ours = _ours(claim, record)
            found: list[dict[str, Any]] = [
                {"pid": process.pid, "user": process.user, "command": process.command}
                for process in [process for process in tree if process.pid not in ours] or tree
            ]
            user = f"{record.get('user')}@{record.get('host')}"
            unseen = {"pid": claim["keeper"] if claim else record.get("pid"), "user": user, "command": ""}
            answers.append(found or [unseen])
        return answers

    def stop(self, record: Any, grace_s: float) -> None:
        """End the job of a lease: TERM to its whole tree, KILL after ``grace_s`` to what is left.

        :raises NotStoppableError: it has no lease, is not on this machine, or has processes that do not end.
        """
        task_id, name, tree = record["task_id"], str(record.get("lease")), []
        if "lease" not in record:
            raise NotStoppableError(task_id, *_NO_LEASE)
        if self.is_ended(record):
            return
        if not self._is_here(record):
            raise NotStoppableError(task_id, *_ANOTHER_MACHINE, host=record.get("host"))
        was_lost, told = name not in self._names(), set()
        deadline_s = time.monotonic() + grace_s
        ours = _ours(self.claim(name), record)
        while not self._free(name, fcntl.LOCK_SH):
            tree = holders([name])[name]
            job = [process for process in tree if process.pid not in ours]
            late_s = time.monotonic() - deadline_s
            if any(process.pid == os.getpid() for process in job):
                raise NotStoppableError(task_id, *_OWN_TREE)
            if not tree and name not in self._names():
                break
            if late_s >= KILL_LIMIT_S:
                who = named_processes([process._asdict() for process in tree]) or say(_UNSEEN)
                raise NotStoppableError(task_id, *_STILL_THERE, who=who)
            for process in job or (tree if late_s >= RELEASE_LIMIT_S else []):
                if late_s >= 0 or (process.pid, process.started) not in told:
                    told.add((process.pid, process.started))
                    for number in (signal.SIGKILL,) if late_s >= 0 else (signal.SIGTERM, signal.SIGCONT):
                        with suppress(ProcessLookupError, PermissionError):
                            os.kill(process.pid, number)
            time.sleep(STOP_POLL_S)
        if was_lost:  # so nothing takes the task back
            raise NotStoppableError(task_id, *_LEASE_IS_LOST)


def _ours(claim: Claim | None, record: Any) -> set[Any]:
    """Return the pids of ``--run`` and of its keeper, which end by themselves once the job has."""
    pids = {claim["keeper"], record.get("pid")} if claim else set()
    return pids if len(pids) > 1 else set()  # of a ``with`` block, the one process is the job itself


def _is_local(path: str) -> bool:
    """Tell whether ``path`` lies on a file system that only this machine can have mounted."""
    path, kind, depth = os.path.realpath(path), "", -1
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(" - ")
            point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields.split(" ")[4]).rstrip("/")
            if (path + "/").startswith(point + "/") and len(point) >= depth:
                kind, depth = rest.split(" ")[0], len(point)
    return kind in LOCAL_FILE_SYSTEMS


# --- The processes behind a lease -------------------------------------------------------------------


class Process(NamedTuple):
    """One process as ``/proc`` shows it."""

    pid: int
    started: int  # clock ticks after the boot: with the pid, it names one process
    user: str
    command: str


def holders(names: Sequence[str]) -> dict[str, list[Process]]:
    """Return the processes that have each of these leases open, and their descendants, as far as we may see them.

    Descendants, for workers that have closed the descriptor appear nowhere else.
    """
    found: dict[str, set[int]] = {name: set() for name in names}
    for pid in _pids():
        # Of another user, or gone meanwhile.
        with suppress(PermissionError, FileNotFoundError, ProcessLookupError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with suppress(OSError):
                    match = LEASE_NAME.search(os.readlink(entry.path))
                    if match and match[1] in found:
                        found[match[1]].add(pid)
    return {name: described(_family(pids)) for name, pids in found.items()}


def descendants(pid: int) -> list[Process]:
    """Return all processes below ``pid``."""
    return described(_family({pid}) - {pid})


def _family(pids: set[int]) -> set[int]:
    """Return these processes and all below them."""
    parents = {pid: found[0] for pid in _pids() if (found := _stat(pid))} if pids else {}
    while more := {child for child, parent in parents.items() if parent in pids} - pids:
        pids = pids | more
    return pids


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def described(pids: Iterable[int]) -> list[Process]:
    """Return these processes, but for those that have ended."""
    processes = []
    for pid in sorted(pids):
        found = _stat(pid)
        with suppress(OSError):
            if found:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    words = file.read(400).replace(b"\0", b" ").decode("utf-8", "replace").strip()
                user = user_name(os.stat(f"/proc/{pid}").st_uid)
                processes.append(Process(pid, found[1], user, printable(words) or "?"))
    return processes


def _stat(pid: int) -> tuple[int, int] | None:
    """Return the parent and the start of a process, or ``None`` if it has ended."""
    with suppress(OSError):
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # a name may hold blanks and brackets
        if fields[0] not in (b"Z", b"X"):
            return int(fields[1]), int(fields[19])
    return None
