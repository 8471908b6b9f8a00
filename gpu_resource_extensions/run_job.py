"""A command on its GPUs: its environment, its keeper, signals passed on, its exit code. Linux.

Three processes: ``--run``, the *keeper*, and the command, each the parent of the next. The first two are child
subreapers (prctl(2)): a process of the job whose parent has died comes back to one of them, whatever descriptors it
has closed. So one of them knows when the last process of the job has ended, and holds the lease until then. If the
keeper is killed, ``--run`` takes its place; if ``--run`` is killed, the keeper goes on alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from shutil import which
from typing import Any, Protocol

from gpu_resource_extensions.leases import LOWEST_DESCRIPTOR, descendants
from gpu_resource_manager_v01 import (
    Allocation,
    GPUResourceManagerV01,
    ResourceManagerError,
    named_processes,
    quoted,
    say,
    user_name,
)

_SI_KERNEL = 0x80  # <asm-generic/siginfo.h>: sent by the kernel, here the terminal
_PR_SET_CHILD_SUBREAPER, _PR_SET_NAME = 36, 15  # <linux/prctl.h>
_PASSED_ON = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
_WATCHED = _PASSED_ON | {signal.SIGCHLD}
_LEFT_S = 0.25  # after which processes that outlive the command are worth a word
Keeper = Callable[[int], AbstractContextManager[int]]  # as for :meth:`GPUResourceManagerV01.allocation`


def job_environment(allocation: Mapping[str, Any]) -> dict[str, str]:
    """Return what a job needs to keep to the GPUs and CPUs of an ``Allocation``.

    What an earlier allocation has set is replaced; a number of threads that the user has set stands.
    """
    threads, cpus = os.environ.get("OMP_NUM_THREADS"), str(allocation["cpu_count"])
    ours = threads is None or threads == os.environ.get("GPU_TASK_THREADS")
    return {
        "CUDA_VISIBLE_DEVICES": allocation["gpu_devices"],
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the numbering of NVML, and so of the pool
        "OMP_NUM_THREADS": cpus if ours else str(threads),
        "GPU_TASK_ID": allocation["task_id"],
        "GPU_TASK_CPUS": cpus,
        "GPU_TASK_THREADS": cpus if ours else "",  # tells the next allocation whose number that is
    }


def users_environment(tool: str) -> dict[str, str]:
    """Return our environment as it was before somebody entered the Python environment of the tool.

    That is the ``.venv`` beside it (``source .venv/bin/activate``) or the one that ``uv run`` makes for a script, never
    one that the tool was installed into: there a job wants just that ``python``.

    :param tool: the directory of the command line.
    """
    environment, entered = dict(os.environ), {os.path.realpath(os.path.join(tool, ".venv"))}
    if os.path.basename(os.path.dirname(sys.prefix)).startswith("environments-v"):  # below the cache of uv
        entered.add(os.path.realpath(sys.prefix))
    if os.path.realpath(environment.get("VIRTUAL_ENV", "")) in entered:
        for name in ("VIRTUAL_ENV", "VIRTUAL_ENV_PROMPT"):
            environment.pop(name, None)
    if "PATH" in environment:
        theirs, places = {os.path.join(entry, "bin") for entry in entered}, environment["PATH"].split(os.pathsep)
        left = [place for place in places if not place or os.path.realpath(place) not in theirs]
        environment["PATH"] = os.pathsep.join(left)
    return environment


class CommandError(ResourceManagerError):
    """The command cannot be started; nothing was run. Its own ``exit_code`` is the one that a shell would give."""

    code = "command_not_started"
    template = "コマンドを実行できません: {word}: {reason}\n  対処: コマンドの綴り、PATH、実行権限を確認してください"

    def __init__(self, word: str, error: OSError) -> None:
        self.word, self.reason = word, error.strerror
        self.exit_code = 127 if isinstance(error, FileNotFoundError) else 126


def check_command(word: str, environment: Mapping[str, str]) -> None:
    """:raises CommandError: no such command can be started."""
    path = environment.get("PATH")
    if which(word, path=path) is None:
        exists = os.path.exists(word) if "/" in word else which(word, os.F_OK, path) is not None
        code = errno.EACCES if exists else errno.ENOENT
        raise CommandError(word, OSError(code, os.strerror(code)))


class KeeperError(ResourceManagerError):
    """The keeper of a command cannot be started; nothing was run."""

    exit_code, code = 125, "not_started"
    template = "コマンドを始められません: {reason}\n  対処: ulimit -n と ulimit -u を確認してから再実行してください"

    def __init__(self, error: OSError) -> None:
        self.reason = error.strerror


class Told(Protocol):
    """Who is told how a wait goes on, and of its end by a text that takes its place."""

    def __call__(self, position: int, reason: str) -> None: ...

    def end(self, text: str) -> None: ...


def run_job(
    manager: GPUResourceManagerV01,
    asked: tuple[str, int, int],
    words: list[str],
    tool: str,
    command: str,
    wait_s: float,
    line: Told,
    tell: Callable[[str], None],
) -> tuple[int, Allocation]:
    """Run a command on GPUs of this machine; return its exit code, and what it was granted.

    :param asked: task, GPUs and CPUs; with ``-`` as the task it gets a name of its own, which is told.
    :param words: the command.
    :param tool: as for :func:`users_environment`.
    :param command: what is recorded of it.
    :param line: told how the wait goes on.
    :param tell: told of what happens otherwise.
    :raises CommandError: there is no such command; that is found out ahead of the wait.
    """
    check_command(words[0], users_environment(tool))
    task_id, gpus, cpus = named_task(asked, words, tell)

    def held(keeper: Keeper) -> AbstractContextManager[Allocation]:
        return manager.allocation(task_id, gpus, cpus, wait_s=wait_s, on_wait=line, command=command, keeper=keeper)

    return run_held(held, task_id, words, tool, line.end, tell)


def named_task(asked: tuple[str, int, int], words: Sequence[str], tell: Callable[[str], None]) -> tuple[str, int, int]:
    """Return what was asked for, with a name of its own, which is told, for a task that is called ``-``."""
    task_id, gpus, cpus = asked
    if task_id == "-":
        task_id = new_task_id(words)
        tell(say("タスクID: {}", task_id))
    return task_id, gpus, cpus


def run_held(
    held: Callable[[Keeper], AbstractContextManager[Allocation]],
    task_id: str,
    words: list[str],
    tool: str,
    tell_start: Callable[[str], None],
    tell: Callable[[str], None],
    is_far: bool = False,
) -> tuple[int, Allocation]:
    """Run a command while the block of ``held`` gives it its GPUs; all else is as in :func:`run_job`.

    :param is_far: it is hung up, with all of its group, when our connection is gone.
    """
    code = None

    def report_left(pid: int) -> None:
        who = named_processes([process._asdict() for process in descendants(pid)])
        text = (
            "注意: タスク {0} のプロセスがまだ動いています: {1}。"
            "終わるまで GPU は返りません (--stop {0} で終了できます)"
        )
        tell(say(text, quoted(task_id), who))

    job = Job(words, report_left, is_far)
    try:
        with held(job.kept) as granted:
            server, gpus = granted["server_name"], granted["gpu_devices"]
            tell_start(say("✓ {} の GPU {} で実行します: {}", server, gpus, task_id))
            try:
                code = job.run({**users_environment(tool), **job_environment(granted)})
            except OSError as error:  # it has vanished meanwhile, or is not on this machine
                gone = CommandError(words[0], error)
                tell(f"✗ {gone}")
                code = gone.exit_code
    except (ResourceManagerError, KeyboardInterrupt) as error:
        if code is None:
            raise
        # The job's exit code stands; what it held is taken back by the next change of anybody.
        tell(say("✗ 解放を記録できませんでした: {}\n  対処: 次のコマンドが自動で回収します", error))
    return code, granted


def new_task_id(words: Sequence[str]) -> str:
    """Return an identifier that nobody else has: who, the script or program of a command, when, and a random part."""
    program = next((word for word in words if word.endswith((".py", ".sh"))), words[0])
    what = "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in os.path.basename(program))
    return f"{user_name(os.getuid())[:40]}-{what[:40]}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(4).hex()}"


class Job:
    """A command that runs under a keeper, seen from ``--run``. For the main thread of a process of its own."""

    def __init__(self, words: list[str], report_left: Callable[[int], None], is_far: bool = False) -> None:
        """:param report_left: called with the pid below which processes of the job outlive the command.

        :param is_far: as for :func:`run_held`.
        """
        self.words, self.report_left, self.is_far = words, report_left, is_far
        self.keeper = self.pid = 0  # 0: not started, or ended and reaped
        self.takes_over = False  # the keeper has not ended by itself
        self.code: int | None = None  # of the command, once it has ended
        self.failure = 0  # errno, if it could not be started
        self._heard = b""

    @contextmanager
    def kept(self, lease: int) -> Iterator[int]:
        """Let a keeper hold the descriptor ``lease``; yield its pid. It ends at once unless :meth:`run` is called."""
        import ctypes  # a tenth of a start, and ``--export`` has no use for it

        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it was ignored, nobody would hear of an end
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        opened: list[int] = []
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the keeper never takes any
        try:
            for end in (end for _ in range(2) for end in os.pipe()):
                opened.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, LOWEST_DESCRIPTOR))
                os.close(end)
            self._from_keeper, to_run, from_run, self._to_keeper = opened
            parent = os.getpid()
            self.keeper = os.fork()
            if self.keeper == 0:
                code = 1
                try:
                    os.close(self._from_keeper)
                    os.close(self._to_keeper)
                    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
                    _keep(self.words, mask, libc, lease, from_run, to_run, parent)
                    code = 0
                finally:
                    os._exit(code)
            opened = [to_run, from_run]
        except OSError as error:
            raise KeeperError(error) from error
        finally:
            for end in opened:
                os.close(end)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.set_blocking(self._from_keeper, False)
        try:
            yield self.keeper
        finally:
            os.close(self._to_keeper)
            os.close(self._from_keeper)
            if self.keeper and self.code is None:  # nothing was started, so it ends now
                os.waitpid(self.keeper, 0)

    def run(self, environment: Mapping[str, str]) -> int:
        """Start the command as a shell would, and return its exit code: 128 + n if signal n has ended it.

        It stays in our process group: a Ctrl-C or Ctrl-Z in the terminal reaches it, and a job-controlling
        shell handles both of us as one. So what the terminal sends is not passed on, but what ``kill`` sends
        to us is.

        :param environment: the whole environment of the command.
        :raises OSError: the command cannot be started; ``FileNotFoundError`` if there is none of that name.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        try:
            self._tell(json.dumps(dict(environment)))
            received: list[int] = []
            while True:
                self._listen()
                if self.failure:
                    raise OSError(self.failure, os.strerror(self.failure))
                if self.code is not None:
                    self._leave_the_others()
                    return self.code
                if self.pid:
                    for number in received:
                        if number == signal.SIGHUP and self.is_far and os.getsid(0) == os.getpid():
                            # Our connection is gone, and the group is that of the job and ours alone.
                            os.killpg(0, signal.SIGHUP)
                            signal.sigtimedwait({signal.SIGHUP}, 0)  # our own
                        else:
                            os.kill(self.pid, number)
                    received = []
                found = signal.sigwaitinfo(_WATCHED)
                # A terminal that goes away tells only the leader of its session.
                ours_alone = found.si_signo == signal.SIGHUP and os.getsid(0) == os.getpid()
                if found.si_signo != signal.SIGCHLD and (found.si_code != _SI_KERNEL or ours_alone):
                    received.append(found.si_signo)
        finally:
            while signal.sigtimedwait(_WATCHED, 0):  # came too late for the job, and is not meant for us
                pass
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _listen(self) -> None:
        """Hear what the keeper has to say; should it have been killed, look after the command ourselves."""
        self._reap_keeper()  # ahead of its last words
        with suppress(BlockingIOError):
            self._heard += os.read(self._from_keeper, 4096)
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            word, number = line.split()
            if word == b"failed":
                self.failure = int(number)
            elif word == b"runs":
                self.pid = int(number)
            else:
                self.pid, self.code = 0, _exit_code(int(number))
                # Only now does the keeper reap the command, so that no signal of ours can meet a newer process.
                self._tell("")
        if self.takes_over and self.code is None and not self.failure:
            try:
                # Without the pid, the keeper was killed as it started the command: then the first to end is that.
                ended, status = os.waitpid(self.pid or -1, os.WNOHANG)
            except ChildProcessError:
                ended, status = 1, signal.SIGKILL  # the keeper was killed before it could start anything
            if ended:
                self.pid, self.code = 0, _exit_code(status)

    def _reap_keeper(self) -> None:
        if self.keeper:
            ended, status = os.waitpid(self.keeper, os.WNOHANG)
            if ended:
                self.keeper, self.takes_over = 0, status != 0

    def _leave_the_others(self) -> None:
        """Leave processes that outlive the command to the keeper; without one, stay until they have ended."""
        told = False
        while self.keeper or self._has_children():
            found = signal.sigtimedwait(_WATCHED, 3600 if told else _LEFT_S)
            self._reap_keeper()
            if not told and found is None and (self.keeper or self._has_children()):
                told = True
                self.report_left(self.keeper or os.getpid())
            if told and (self.keeper or (found and found.si_signo != signal.SIGCHLD)):
                break

    def _has_children(self) -> bool:
        """Reap who has ended, and tell whether others are left; asked only in place of the keeper."""
        try:
            while self.takes_over and os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return False
        return self.takes_over

    def _tell(self, text: str) -> None:
        data = memoryview(text.encode() + b"\n")
        with suppress(BrokenPipeError):  # it was killed, which a signal tells us
            while data:
                data = data[os.write(self._to_keeper, data) :]


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _keep(
    words: list[str], mask: set[int | signal.Signals], libc: Any, lease: int, from_run: int, to_run: int, parent: int
) -> None:
    """Be the keeper: start the command, hold the lease until the last process of the job has ended."""

    def tell(word: str, number: int) -> None:
        with suppress(BrokenPipeError):
            os.write(to_run, f"{word} {number}\n".encode())
        if os.getppid() == parent:  # else it was killed
            os.kill(parent, signal.SIGCHLD)  # it waits for signals, and looks then

    with open(from_run, "rb", closefd=False) as orders:
        order = orders.readline()
        if not order.endswith(b"\n"):  # nothing is to be started after all, or ``--run`` was killed
            return
        try:
            pid = spawn(words, json.loads(order), mask)
        except OSError as error:
            tell("failed", error.errno or errno.EINVAL)
            return
        _let_go_of_the_caller(libc, {0, 1, 2, lease, from_run, to_run})
        tell("runs", pid)
        with suppress(ChildProcessError):
            while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT):
                if ended.si_pid == pid:
                    exited = ended.si_code == os.CLD_EXITED
                    tell("ended", ended.si_status << 8 if exited else ended.si_status)
                    orders.readline()  # it sends no more signals now, or it is no longer there
                os.waitpid(ended.si_pid, 0)


def _let_go_of_the_caller(libc: Any, kept: set[int]) -> None:
    """Leave the session, the directory, the descriptors and the name of the one who called us.

    A session of its own, and only once the command has started: in that of the caller, ``timeout -s KILL`` would
    end us too, and in a group of our own there a stopped job could stay stopped for ever.
    """
    import ctypes

    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    for descriptor in {*map(int, os.listdir("/proc/self/fd"))} - kept:
        with suppress(OSError):  # the one that listed them
            os.close(descriptor)
    # Else ``pkill -f train.py`` would find the words of the job in ours. proc(5): fields 48 and 49.
    libc.prctl(_PR_SET_NAME, b"gpu-keeper", 0, 0, 0)
    with suppress(OSError, ValueError, IndexError), open("/proc/self/stat", "rb") as file:
        first, end = map(int, file.read().rpartition(b")")[2].split()[45:47])
        if 0 < first < end:
            ctypes.memmove(first, b"gpu-keeper".ljust(end - first, b"\0")[: end - first - 1] + b"\0", end - first)


def spawn(job: list[str], environment: Mapping[str, str], mask: set[int | signal.Signals]) -> int:
    """Start a command as a shell would, with this signal mask, and return its pid."""
    if "PATH" in environment:
        os.environ["PATH"] = environment["PATH"]  # by which it is searched
    # SIGPIPE and SIGXFSZ are ignored by Python, and what is ignored stays so through exec.
    restored = [signal.SIGPIPE, signal.SIGXFSZ]
    try:
        return os.posix_spawnp(job[0], job, environment, setsigmask=mask, setsigdef=restored)
    except OSError as error:
        script = which(job[0])
        if error.errno == errno.ENOEXEC and script is not None:  # without "#!", which every shell runs
            shell = ["sh", script, *job[1:]]
            return os.posix_spawn("/bin/sh", shell, environment, setsigmask=mask, setsigdef=restored)
        # A directory of PATH that we may not search makes the search end with EACCES as well.
        if "/" not in job[0] and which(job[0], os.F_OK) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
        raise
