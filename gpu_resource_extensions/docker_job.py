"""A job in a Docker container: the options for its GPUs, and a program that lives as long as the container does.

gpu-resource --run NAME 2 8 -- gpu-resource-docker [OPTION of docker run …] IMAGE [COMMAND …]

Processes of a container are children of the Docker daemon, not of the job. So this program, which is the job, stays
until the container has ended, whatever becomes of the docker client, and the lease with it. The same program is
``python -m gpu_resource_extensions.docker_job``.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from subprocess import DEVNULL, PIPE
from typing import Any

from gpu_resource_extensions.run_job import check_command, job_environment
from gpu_resource_manager_v01 import ResourceManagerError, say

TASK_LABEL = "gpu-resource.task"  # of each container, with its task: what is left over is found by it
NAME_LABEL = "gpu-resource.name"  # one container of ours, whatever name the user gives it
STOP_S = 7  # from TERM to KILL by docker, shorter than that of ``--stop``; an option of the user may change it
TOLD_S = 0.3  # after which ``--stop`` has told all that it has found
RETRY_S = 1.0  # between two attempts to reach a daemon that is away
EXIT_DOCKER = 125  # as ``docker run`` has it: docker itself failed

_SI_KERNEL = 0x80  # <asm-generic/siginfo.h>: sent by the kernel, here the terminal, to our whole group
_PASSED_ON = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
_WATCHED = _PASSED_ON | {signal.SIGCHLD}
_FIND = ["ps", "--all", "--quiet", "--no-trunc", "--filter"]
# Lets docker stop the container, and tells which, once it is given a line; "$@" finds it. ``--stop`` sends TERM to each
# process of a job when it first sees it, by which a docker client gives up: so these two are there from the start, and
# become docker clients when they have been told.
_STOPPER = '{ read -r _ && exec docker "$@"; } | { read -r found && echo "$found" && exec docker stop "$found" >&2; }'

_USAGE = (
    "使い方: gpu-resource --run NAME GPUS CPUS -- gpu-resource-docker [docker run のオプション] IMAGE [COMMAND …]\n"
    "借りた GPU だけが見えるコンテナで COMMAND を実行します"
)
# For ContainerError: the reason, and what to do.
_NOT_GRANTED = (
    "GPU を借りていません (GPU_TASK_ID、GPU_TASK_CPUS、CUDA_VISIBLE_DEVICES が揃っていません)",
    "gpu-resource --run NAME GPUS CPUS -- gpu-resource-docker IMAGE COMMAND のように実行してください",
)
_NO_DIRECTORY = "今のディレクトリに入れません: {}", "存在するディレクトリに移ってから実行してください"


class ContainerError(ResourceManagerError):
    """No container can be started; nothing was run."""

    template = "コンテナを始められません: {reason}\n  対処: {remedy}"

    def __init__(self, reason: str, remedy: str) -> None:
        self.reason, self.remedy = reason, remedy


def docker_arguments(allocation: Mapping[str, Any]) -> list[str]:
    """Return the options of ``docker run`` that keep a container to what an ``Allocation`` grants.

    It sees the granted GPUs alone, which are numbered from 0 in it. It runs as the caller, in the current directory,
    so its files are the caller's. Options that follow may replace these.

    :raises ContainerError: the current directory has been removed.
    """
    try:
        directory = os.getcwd()
    except OSError as error:
        problem, remedy = _NO_DIRECTORY
        raise ContainerError(say(problem, error.strerror), say(remedy)) from error
    gpus, group = str(allocation["gpu_devices"]), os.getgid()
    inside = ",".join(map(str, range(len(gpus.split(",")))))
    environment = {**job_environment(allocation), "CUDA_VISIBLE_DEVICES": inside}
    return [
        "--init",
        *("--gpus", _field(f"device={gpus}")),
        *("--cpus", str(allocation["cpu_count"])),
        *(word for name, value in environment.items() for word in ("--env", f"{name}={value}")),
        *("--user", f"{os.getuid()}:{group}"),
        *(word for other in os.getgroups() if other != group for word in ("--group-add", str(other))),
        *("--mount", f"type=bind,{_field(f'source={directory}')},{_field(f'target={directory}')}"),
        *("--workdir", directory),
        *("--label", f"{TASK_LABEL}={allocation['task_id']}"),
    ]


def _field(text: str) -> str:
    """Return ``text`` as one field for docker, which reads such values as CSV: the commas in it are its own."""
    return '"' + text.replace('"', '""') + '"'


def granted_here(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what ``--run`` has granted to the job that we are, as far as :func:`docker_arguments` needs it.

    :raises ContainerError: nothing was granted.
    """
    task_id, gpus = environment.get("GPU_TASK_ID"), environment.get("CUDA_VISIBLE_DEVICES")
    cpus = environment.get("GPU_TASK_CPUS")
    if not (task_id and gpus and cpus):
        raise ContainerError(*map(say, _NOT_GRANTED))
    return {"task_id": task_id, "gpu_devices": gpus, "cpu_count": cpus}


class Container:
    """One container and its end. For the main thread of a process of its own, which then handles no signals itself."""

    def __init__(self, task_id: str, tell: Callable[[str], None]) -> None:
        """:param tell: told of what happens."""
        self.name = f"gpu-{re.sub('[^a-zA-Z0-9_.-]', '_', task_id)}-{os.urandom(4).hex()}"
        self._tell = tell
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])  # of all that we start

    def run(self, arguments: list[str], words: list[str]) -> int:
        """Start a container, stay until it has ended, and return its exit code, or that of docker if it failed.

        What the terminal sends reaches the docker client too, and what it is sent it passes on.

        :param arguments: options of ``docker run``.
        :param words: more of them, the image, its command.
        """
        was_there = self._find() is not None
        terminal = termios.tcgetattr(0) if os.isatty(0) else None
        find = [*_FIND, f"label={NAME_LABEL}={self.name}"]
        self._stopper = self._beside(["sh", "-c", _STOPPER, "sh", *find], PIPE)
        signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
        own = ["--rm", "--name", self.name, "--label", f"{NAME_LABEL}={self.name}", "--stop-timeout", str(STOP_S)]
        # With the descriptor of the lease: should we be killed, the client is as good a holder.
        command = ["docker", "run", *arguments, *own, *_streams(), *words]
        unblock = lambda: signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)  # noqa: E731
        self._client = subprocess.Popen(command, text=True, close_fds=False, preexec_fn=unblock)  # noqa: S603
        code = self._end_of(self._client)
        if code < 0:
            code = 128 - code
            if terminal:  # which it has left in raw mode
                termios.tcsetattr(0, termios.TCSANOW, terminal)
            if self._find() == "":
                time.sleep(RETRY_S)  # the daemon may be about to make the container that it was asked for
        return self._end_without_client(code, was_there)

    def _end_without_client(self, code: int, was_there: bool) -> int:
        """Stay until the container has ended, should it have outlived its client, whose exit code was ``code``.

        :param was_there: whether the daemon was, at the start.
        """
        told = False
        while (container := self._find()) != "":
            state = self._docker("inspect", "--format={{.State.Status}}", container or self.name)
            if state == "created":  # the client was killed ahead of the start
                self._docker("rm", container or self.name)
                return code
            if not told and (state == "running" or (state is None and was_there)):
                told = True
                text = "注意: docker のクライアントが終了しました。コンテナが終わるまで GPU を返しません: {}"
                self._tell(say(text, container or self.name))
            end = self._beside(["docker", "wait", container or self.name])
            self._end_of(end)
            answer = end.communicate()[0].strip()
            if answer.isdecimal():
                return int(answer)
            if container is None and not was_there:
                break
            time.sleep(RETRY_S)
        if code == EXIT_DOCKER:
            self._tell(
                say(
                    "注意: docker が終了コード 125 で終わりました。docker 自身の失敗なら、理由は上にあります\n"
                    "  対処: デーモンに接続できないなら docker ps が動くか、could not select device driver なら "
                    "NVIDIA Container Toolkit があるか、それ以外はイメージの名前とオプションを確認してください"
                )
            )
        return code

    def _end_of(self, process: subprocess.Popen[str]) -> int:
        """Pass signals on until a process of ours has ended; return its exit code as ``subprocess`` has it."""
        while process.poll() is None:
            found = signal.sigwaitinfo(_WATCHED)
            if found.si_signo != signal.SIGCHLD:
                self._pass_on(found.si_signo, found.si_code == _SI_KERNEL)
        return process.returncode

    def _pass_on(self, number: int, is_of_terminal: bool) -> None:
        has_client = self._client.poll() is None
        if has_client and is_of_terminal:
            return
        if number == signal.SIGTERM and self._stops():
            return
        if has_client:
            self._client.send_signal(number)
        else:
            self._docker("kill", f"--signal={number}", self._find() or self.name)

    def _stops(self) -> bool:
        """Let docker stop the container, with KILL if need be; ``False`` if there is none, or docker is about to."""
        to, answers = self._stopper.stdin, self._stopper.stdout
        if not to or not answers or to.closed:
            return False
        time.sleep(TOLD_S)
        with suppress(BrokenPipeError), to:
            to.write("\n")
        return answers.readline() != ""

    def _find(self) -> str | None:
        """Return the id of the container, nothing if there is none, ``None`` if the daemon does not tell."""
        return self._docker(*_FIND, f"label={NAME_LABEL}={self.name}")

    def _docker(self, *words: str) -> str | None:
        """Return what a command of docker answers, ``None`` if it fails."""
        for _ in range(20):
            process = self._beside(["docker", *words])
            answer = process.communicate()[0].strip()
            if process.returncode in (0, 1):
                break  # else ``--stop`` has ended it, which does so once to each process
        return answer if process.returncode == 0 else None

    def _beside(self, words: list[str], stdin: int = DEVNULL) -> subprocess.Popen[str]:
        """Start what tells us something, out of reach of the terminal and, until it handles it, of TERM."""

        def prepare() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

        return subprocess.Popen(  # noqa: S603 - the docker of the user
            words, text=True, stdin=stdin, stdout=PIPE, stderr=DEVNULL, start_new_session=True, preexec_fn=prepare
        )


def _streams() -> list[str]:
    """Return the options for stdin and the terminal; a job in the background must not touch that."""
    if not os.isatty(0):
        return ["--interactive"]
    if os.tcgetpgrp(0) != os.getpgrp():
        return []
    return ["--interactive", "--tty"] if os.isatty(1) else ["--interactive"]


def main(words: list[str]) -> int:
    """Run a container on the GPUs of the job that we are; return the exit code."""

    def tell(text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    if words in ([], ["-h"], ["--help"]):
        tell(say(_USAGE))
        return 0 if words else EXIT_DOCKER
    try:
        granted = granted_here(os.environ)
        arguments = docker_arguments(granted)
        check_command("docker", os.environ)
    except ResourceManagerError as error:
        tell(f"✗ {error}")
        return getattr(error, "exit_code", EXIT_DOCKER)
    return Container(granted["task_id"], tell).run(arguments, words)


def run() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else we are to ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
