"""A job on whatever server of the pool has room, started there through the system's ``ssh``.

1. Here: claim room with a lease, and start ``ssh NAME 'exec gpu-resource --take CLAIM JOB'``.
2. There: a lease of its own takes the record over in one change, which is refused a second time; the job runs as with
   ``--run``. When our parent is gone, which is the session of sshd, so is the connection, and the job is hung up.
3. Here: give signs of life until ``ssh`` ends, and then ask the store, not ``ssh``, what has happened, for its 255
   may be the job's: a claim that is still there was never taken over, so the next server is tried.

The name of a server is its address for ``ssh``. One word of plain letters carries the job, for every shell quotes
otherwise.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from tempfile import TemporaryDirectory
from typing import Any

from gpu_resource_extensions.leases import SIGN_S
from gpu_resource_extensions.run_job import CommandError, Keeper, Told, named_task, run_held
from gpu_resource_extensions.servers import find_server
from gpu_resource_extensions.waiting import BoundRequest
from gpu_resource_manager_v01 import (
    LANGUAGE_VARIABLE,
    SERVER_VARIABLE,
    Allocation,
    DuplicateTaskError,
    GPUResourceManagerV01,
    InvalidRequestError,
    ResourceManagerError,
    host_name,
    is_url,
    quoted,
    say,
)

SSH_VARIABLE = "GPU_RESOURCE_SSH"  # the ssh command, with options if need be, as GIT_SSH_COMMAND for git
REMOTE_VARIABLE = "GPU_RESOURCE_REMOTE"  # our command on the other servers
MAX_WORD_BYTES = 131_071  # of one word of a command (execve(2), MAX_ARG_STRLEN), as which ssh hands ours over
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_CLAIM_LENGTH = 32

# For InvalidRequestError: the problem, and what to do.
_ONE_MACHINE = (
    "のプールは 1 台のもので、他のサーバーでは実行できません",
    "/etc/gpu-resource-file に postgresql:// か redis:// の場所を書くか、--any と --on を外してください",
)
_NO_JOB = "は --any や --on が渡すものではありません", "--run … --any か --run … --on NAME を使ってください"
_NO_COMMAND = "がコマンドとして読めません", "ssh のコマンドを、シェルに書くとおりに指定してください"
_TOO_LONG = (
    "が長すぎます (ssh で渡せるのは {most} バイトまで、これは {bytes} バイト)",
    "引数をファイルに書き、コマンドからそれを読んでください",
)


class UnreachableError(ResourceManagerError):
    """None of the servers that would do could be reached, or could start a job; nothing was run."""

    exit_code, code = 125, "unreachable"
    template = (
        "どのサーバーでも始められませんでした: {names}\n"
        "  対処: ssh {first} gpu-resource --status が同じプールを表示することを確認してください"
        " (ssh や接続先のメッセージは上にあります)"
    )

    def __init__(self, servers: list[str]) -> None:
        self.servers, self.names, self.first = servers, ", ".join(servers), quoted(servers[0])


class DirectoryError(ResourceManagerError):
    """The directory of the command is not on the server where there is room; nothing was run."""

    exit_code, code = 125, "no_directory"
    template = (
        "{server} で作業ディレクトリに入れません: {directory}: {reason}\n"
        "  対処: 全サーバーで共有しているディレクトリで実行してください"
    )

    def __init__(self, server: str, directory: str, error: OSError) -> None:
        self.server, self.directory, self.reason = server, directory, error.strerror


def packed(job: dict[str, Any]) -> str:
    """Return a job as one word that no shell changes."""
    return base64.urlsafe_b64encode(json.dumps(job).encode("ascii")).decode("ascii")


def unpacked(word: str) -> Any:
    """Return the job of such a word; :raises InvalidRequestError: it is none."""
    with suppress(ValueError):
        job = json.loads(base64.b64decode(word, altchars=b"-_", validate=True))
        if isinstance(job, dict) and {*job} == {"asked", "server", "directory", "words", "language"}:
            return job
    raise InvalidRequestError("--take", word[:40], *_NO_JOB)


def run_anywhere(
    manager: GPUResourceManagerV01,
    asked: tuple[str, int, int],
    words: list[str],
    tool: str,
    command: str,
    wait_s: float,
    line: Told,
    tell: Callable[[str], None],
    server: str | None,
) -> tuple[int, Allocation]:
    """Run a command where there is room; parameters and result are as in :func:`run_job`, and:

    :param server: no other one will do.
    :raises UnreachableError: it could be started nowhere.
    """
    if not is_url(manager.resource_file):
        raise InvalidRequestError("resource_file", manager.resource_file, *_ONE_MACHINE)
    if not words[0]:
        raise CommandError("''", FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    pool: Any = manager.get_resource_summary()
    if server is not None:
        find_server(pool, server)
    asked = task_id, gpus, cpus = named_task(asked, words, tell)
    ssh, far_command = ssh_words(), far_commands(asked, words, [row["server_name"] for row in pool["servers"]])
    deadline_s, put_stdin_back = time.monotonic() + wait_s, stdin_restorer()
    skipped: list[str] = []
    while True:
        left_s, code, is_claimed = max(0, deadline_s - time.monotonic()), None, False
        try:
            with manager.claim(
                task_id,
                gpus,
                cpus,
                wait_s=left_s,
                on_wait=line,
                command=command,
                server=server,
                excluded_servers=skipped,
            ) as claim:
                granted, is_claimed = claim.granted, True
                name = granted["server_name"]
                if claim.is_here:
                    code, _ = run_taken(manager, claim.lease.name, asked, words, tool, line.end, tell)
                    claim.is_taken = True
                    return code, granted
                line.end(say("✓ {} の GPU {} で実行します: {}", name, granted["gpu_devices"], task_id))
                code, has_connected = through_ssh(ssh, name, far_command(name, claim.lease.name), claim)
                fate = claim.fate()
        except ResourceManagerError as error:
            if code is not None:  # that of the job, for all we know
                tell(say("✗ {} で何が起きたか確認できません: {}", name, error))
                return code, granted
            is_other = is_claimed or not isinstance(error, InvalidRequestError) or isinstance(error, DuplicateTaskError)
            if not skipped or is_other:
                raise
            raise UnreachableError(skipped) from None
        if fate != "withdrawn":
            if fate == "running" and code in (255, 128 + signal.SIGKILL):
                text = "注意: {0} との接続が切れましたが、タスク {1} の記録は残っています (--detail で確認できます)"
                tell(say(text, name, task_id))
            if fate == "unknown":
                tell(say("注意: {} でタスク {} が始まったか確認できません。割り当ては失効しました", name, task_id))
            return code, granted
        tell(say("注意: {} では始められませんでした", name))
        skipped.append(name)
        if has_connected and not put_stdin_back():
            tell(say("注意: 標準入力の先頭が失われたかもしれないため、他のサーバーでは始めません"))
            raise UnreachableError(skipped)


def far_commands(asked: tuple[str, int, int], words: list[str], names: list[str]) -> Callable[[str, str], str]:
    """Return a function that makes our command on a server for a claim.

    :raises InvalidRequestError: it would be too long for one of the servers ``names``.
    :raises DirectoryError: the current directory has been removed.
    """
    try:
        directory = os.getcwd()
    except OSError as error:
        raise DirectoryError(host_name(), ".", error) from error
    tool = os.environ.get(REMOTE_VARIABLE, "").strip() or "gpu-resource"
    job = {"asked": asked, "words": words, "directory": directory, "language": os.environ.get(LANGUAGE_VARIABLE, "")}

    def far_command(name: str, claim: str) -> str:
        return f"exec {tool} --take {claim} {packed({**job, 'server': name})}"

    longest = max(len(os.fsencode(far_command(name, "-" * _CLAIM_LENGTH))) for name in names)
    if longest > MAX_WORD_BYTES:
        raise InvalidRequestError("command", words[0], *_TOO_LONG, most=MAX_WORD_BYTES, bytes=longest)
    return far_command


def stdin_restorer() -> Callable[[], bool]:
    """Return a function that undoes what ssh has read of stdin ahead of a job; ``False`` if that cannot be."""
    try:
        start = os.lseek(0, 0, os.SEEK_CUR) if stat.S_ISREG(os.fstat(0).st_mode) else None
        is_endless = os.isatty(0) or os.path.samestat(os.fstat(0), os.stat(os.devnull))
    except OSError:  # it is closed
        return lambda: True
    return lambda: is_endless or (start is not None and os.lseek(0, start, os.SEEK_SET) == start)


def ssh_words() -> list[str]:
    """Return the words of the ssh command, as the environment has it."""
    value = os.environ.get(SSH_VARIABLE, "").strip() or "ssh"
    with suppress(ValueError):
        words = shlex.split(value)
        if words[0]:
            return words
    raise InvalidRequestError(SSH_VARIABLE, value, *_NO_COMMAND)


def through_ssh(ssh: list[str], name: str, far_command: str, claim: BoundRequest) -> tuple[int, bool]:
    """Run a command on the server ``name``, with our terminal and streams.

    :returns: its exit code, or that of ssh, and whether there was a connection, over which ssh reads stdin at once.
    """
    has_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
    options = ["ConnectTimeout=10", "ServerAliveInterval=15", "LogLevel=ERROR"]
    options += ["RemoteCommand=none", "EscapeChar=none"]  # the command is ours, and a tilde is for the job
    options += ["ControlMaster=no", "ControlPath=none"]  # the end of a shared connection would not be that of the job
    options += [] if has_terminal else ["BatchMode=yes"]
    words = [*ssh, "-t" if has_terminal else "-T", *(word for option in options for word in ("-o", option))]
    try:
        temporary = TemporaryDirectory()
    except OSError as error:
        raise CommandError(ssh[0], error) from error
    with temporary as directory:
        mark = os.path.join(directory, "connected")
        words += ["-o", "PermitLocalCommand=yes", "-o", f"LocalCommand=: >{quoted(mark)}"]
        code = wait_for([*words, "--", name, far_command], claim)
        return code, code != 255 or os.path.exists(mark)


def wait_for(words: list[str], claim: BoundRequest) -> int:
    """Run ssh, with signs of life of ``claim`` until it is taken over; return its exit code."""
    try:
        process = subprocess.Popen(words)  # noqa: S603 - it is the user's own
    except OSError as error:
        raise CommandError(words[0], error) from error
    try:
        is_ours = True
        while is_ours and process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(SIGN_S / 5)
            with suppress(ResourceManagerError):  # if this lasts, the claim lapses, and what takes it over finds out
                is_ours = claim.sign()
        process.wait()
    except KeyboardInterrupt:  # the end of the connection hangs the job up
        process.terminate()
        process.wait()
        raise
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def run_taken(
    manager: GPUResourceManagerV01,
    claim: str,
    asked: tuple[str, int, int],
    words: list[str],
    tool: str,
    tell_start: Callable[[str], None],
    tell: Callable[[str], None],
    failure: ResourceManagerError | None = None,
    is_far: bool = False,
) -> tuple[int, Allocation]:
    """Take ``claim`` over and run the command on this machine; a ``failure`` is raised once it is taken over.

    :param is_far: it ends with our connection.
    """

    def held(keeper: Keeper) -> AbstractContextManager[Allocation]:
        return manager.allocation(*asked, claim=claim, keeper=keeper)

    if failure:
        with manager.allocation(*asked, claim=claim):
            raise failure
    return run_held(held, asked[0], words, tool, tell_start, tell, is_far)


def take(
    manager: GPUResourceManagerV01, claim: str, word: str, tool: str, tell: Callable[[str], None]
) -> tuple[int, Allocation]:
    """Be the other end of :func:`through_ssh`: run the job that ``word`` carries on this machine."""
    import ctypes

    job = unpacked(word)

    # The session of sshd is our parent, for its shell was replaced by us; with it the connection is gone.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGHUP, 0, 0, 0)
    if os.getppid() == 1:  # it was gone before that
        os.kill(os.getpid(), signal.SIGHUP)
    os.environ.setdefault(SERVER_VARIABLE, job["server"])
    if job["language"]:
        os.environ[LANGUAGE_VARIABLE] = job["language"]
    failure = None
    try:
        os.chdir(job["directory"])
    except OSError as error:
        failure = DirectoryError(job["server"], job["directory"], error)
    return run_taken(manager, claim, tuple(job["asked"]), job["words"], tool, lambda text: None, tell, failure, True)
