"""Leases on Linux: whether the processes of a task live, what its lease says, who holds it, how to stop them.

A lease is a file that its maker keeps locked with ``flock``. Processes that inherit the descriptor, by ``fork``
and through ``exec``, hold the same lock, and the kernel frees it when the last of them is gone; so it tells
whether any process of a job lives, right in every pid namespace and after every kind of death. No heartbeat, no
pid. Its first line is one of the words below; the second is a ``Claim`` as JSON once that word is ``granted``.

Reads from the ground up: the lease of this process, the directory of all, the processes behind one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import re
import signal
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import NamedTuple, cast

from gpu_resource_manager_v01 import (
    Claim,
    Requester,
    boot_id,
    host_name,
    is_claim,
    new_in_place,
    printable,
    set_permissions,
)

ASKED, GRANTED, RELEASED = b"asked   \n", b"granted \n", b"released\n"  # of one length: each fits in another's place
LOWEST_DESCRIPTOR = 20  # out of the way of the numbers that shell scripts redirect
LEASE_NAME = re.compile(r"([0-9a-f]{32})(?: \(deleted\))?$")
# File systems that no other machine can have mounted: on one of these, another boot was an earlier one.
LOCAL_FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "tmpfs", "overlay")
STOP_POLL_S, KILL_LIMIT_S = 0.02, 5.0


class Lease:
    """A lease that this process has made and holds: its ``name``, and the ``descriptor`` that children inherit."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name, self.descriptor = name, descriptor

    def say_granted(self, claim: Claim) -> None:
        """Write what the lease stands for; called once the grant is committed, with the document locked."""
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


def _lock_at_once(descriptor: int, operation: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
        return True
    return False


class Leases:
    """All leases of one pool, in one directory."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def make_directory(self) -> None:
        """Make the directory, for all who may write where it lies; called with the document locked."""
        if not os.path.isdir(self.directory):
            with new_in_place(self.directory, is_directory=True):
                pass

    def make(self) -> Lease:
        """Make a lease, which says that something is asked for."""
        while True:
            name = os.urandom(16).hex()
            descriptor = os.open(os.path.join(self.directory, name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                set_permissions(descriptor, self.directory, 0o660)
                os.pwrite(descriptor, ASKED, 0)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.fstat(descriptor).st_nlink:  # else it was swept before we had locked it
                    return Lease(name, fcntl.fcntl(descriptor, fcntl.F_DUPFD, LOWEST_DESCRIPTOR))
            except OSError as error:
                self.delete(name)
                if error.errno == errno.EINVAL:  # so few descriptors are allowed that there is no such number
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE)) from error
                raise
            finally:
                os.close(descriptor)

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.directory, name))

    def is_ended(self, record: Requester) -> bool:
        """Tell whether ``record`` names a lease whose last holder is gone; if we cannot know, it is not.

        ``flock`` tells the truth about processes under the same kernel, whatever the host is called: a container
        has a name of its own. What was taken under another kernel is over if only this machine can have the pool.
        """
        name = record.get("lease")
        if not isinstance(name, str):
            return False
        if record.get("boot", boot_id()) != boot_id():
            return _is_local(self.directory)
        if "boot" not in record and record.get("host") != host_name():  # made by an earlier version
            return False
        # Shared, so that two who look at once do not take each other for the holder.
        return self._free(name, fcntl.LOCK_SH)

    def is_here(self, record: Requester) -> bool:
        """Tell whether the processes of ``record`` run under this kernel."""
        return record.get("boot") == boot_id() if "boot" in record else record.get("host") == host_name()

    def claims(self, named: Iterable[Requester]) -> list[Claim]:
        """Return what leases of living jobs of this machine say that was granted, the oldest first.

        Free leases that none of the records ``named`` names are deleted; called with the document locked.
        """
        return self._claims({str(record.get("lease")) for record in named}, self.delete)

    def seen_claims(self) -> list[Claim]:
        """Return the same without a lock, and delete nothing."""
        return self._claims(None, None)

    def _claims(self, named: set[str] | None, sweep: Callable[[str], None] | None) -> list[Claim]:
        claims = []
        with suppress(FileNotFoundError, NotADirectoryError):
            for name in os.listdir(self.directory):
                # Deleted while we hold it: its maker may have opened it, but not locked it, and then sees.
                unnamed = sweep is not None and named is not None and name not in named
                is_free = self._free(name, fcntl.LOCK_EX if unnamed else fcntl.LOCK_SH, sweep if unnamed else None)
                claim = None if is_free else self.claim(name)
                if claim and claim["task"].get("boot") == boot_id():
                    claims.append(claim)
        return sorted(claims, key=lambda claim: claim["task"]["start_time"])

    def claim(self, name: str) -> Claim | None:
        """Return what a lease says that was granted; ``None`` if nothing, if no longer, or if it makes no sense."""
        with suppress(OSError, ValueError):
            descriptor = self._open(name)
            try:
                text = os.read(descriptor, 1 << 20) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
            finally:
                os.close(descriptor)
            if text.startswith(GRANTED):
                claim = json.loads(text[len(GRANTED) :].decode("utf-8"))
                if is_claim(claim) and claim["task"].get("lease") == name:
                    return cast("Claim", claim)
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
        return os.open(os.path.join(self.directory, name), access | os.O_NOFOLLOW | os.O_NONBLOCK)

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

    def stop(self, record: Requester, grace_s: float) -> list[Process]:
        """End the job of a lease: TERM to its whole tree, KILL after ``grace_s``; return who could not be ended."""
        name, claim = str(record["lease"]), self.claim(str(record["lease"]))
        # ``--run`` and the keeper end by themselves, with the exit code and the lease, once the job has.
        ours = {claim["keeper"], record.get("pid")} if claim and claim["keeper"] != record.get("pid") else set()
        told: set[tuple[int, int]] = set()
        deadline_s = time.monotonic() + grace_s
        while not self._free(name, fcntl.LOCK_SH):
            tree = holders([name])[name]
            if not tree and not os.path.exists(os.path.join(self.directory, name)):
                break
            job = [process for process in tree if process.pid not in ours]
            if any(process.pid == os.getpid() for process in job):
                return tree
            late = time.monotonic() >= deadline_s
            for process in job or tree if late else job:
                if late or (process.pid, process.started) not in told:
                    told.add((process.pid, process.started))
                    for number in (signal.SIGKILL,) if late else (signal.SIGTERM, signal.SIGCONT):
                        with suppress(ProcessLookupError, PermissionError):
                            os.kill(process.pid, number)
            if time.monotonic() >= deadline_s + KILL_LIMIT_S:
                return tree
            time.sleep(STOP_POLL_S)
        return []


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
    parent: int
    started: int  # clock ticks after the boot: with the pid, it names one process
    user: str
    command: str


def holders(names: Sequence[str]) -> dict[str, list[Process]]:
    """Return the processes that have each of these leases open, and their descendants, as far as we may see them.

    Descendants, for workers that have closed the descriptor appear nowhere else.
    """
    found: dict[str, set[int]] = {name: set() for name in names}
    children: dict[int, list[int]] = {}
    for pid in [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]:
        process = _stat(pid)
        if process:
            children.setdefault(process[0], []).append(pid)
        # Of another user, or gone meanwhile.
        with suppress(PermissionError, FileNotFoundError, ProcessLookupError), os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with suppress(OSError):
                    match = LEASE_NAME.search(os.readlink(entry.path))
                    if match and match[1] in found:
                        found[match[1]].add(pid)
    trees = {}
    for name, pids in found.items():
        todo = list(pids)
        while todo:
            more = [child for child in children.get(todo.pop(), ()) if child not in pids]
            pids.update(more)
            todo += more
        trees[name] = described(sorted(pids))
    return trees


def descendants(pid: int) -> list[Process]:
    """Return all processes below ``pid``."""
    parents = {int(entry): _stat(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()}
    tree = {pid}
    while True:
        more = {child for child, found in parents.items() if found and found[0] in tree} - tree
        if not more:
            return described(sorted(tree - {pid}))
        tree |= more


def described(pids: Iterable[int]) -> list[Process]:
    """Return these processes, but for those that have ended."""
    processes = []
    for pid in pids:
        found = _stat(pid)
        with suppress(OSError):
            if found:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    words = file.read(400).replace(b"\0", b" ").decode("utf-8", "replace").strip()
                user = _user_name(os.stat(f"/proc/{pid}").st_uid)
                processes.append(Process(pid, *found, user, printable(words) or "?"))
    return processes


def _stat(pid: int) -> tuple[int, int] | None:
    """Return the parent and the start of a process, or ``None`` if it has ended."""
    with suppress(OSError):
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # a name may hold blanks and brackets
        if fields[0] not in (b"Z", b"X"):
            return int(fields[1]), int(fields[19])
    return None


@cache
def _user_name(uid: int) -> str:
    with suppress(KeyError):
        return printable(pwd.getpwuid(uid).pw_name)
    return str(uid)
