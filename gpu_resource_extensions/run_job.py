"""A command on its GPUs: its environment, started as a shell would, signals passed on, its exit code."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping
from shutil import which
from typing import Any

_SI_KERNEL = 0x80  # <asm-generic/siginfo.h>: sent by the kernel, here the terminal


def job_environment(allocation: Mapping[str, Any]) -> dict[str, str]:
    """Return what a job needs to keep to the GPUs and CPUs of an ``Allocation``."""
    return {
        "CUDA_VISIBLE_DEVICES": allocation["gpu_devices"],
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the numbering of NVML, and so of the pool
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(allocation["cpu_count"])),
        "GPU_TASK_ID": allocation["task_id"],
    }


def run_job(job: list[str], environment: Mapping[str, str]) -> int:
    """Run a command as a shell would, and return its exit code: 128 + n if signal n has ended it.

    It stays in our process group: a Ctrl-C or Ctrl-Z in the terminal reaches it, and a job-controlling
    shell handles both of us as one. So what the terminal sends is not passed on, but what ``kill`` sends
    to us is.

    :param job: the command and its arguments.
    :param environment: the whole environment of the command.
    :raises OSError: the command cannot be started; ``FileNotFoundError`` if there is none of that name.
    """
    passed_on = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
    watched = passed_on | {signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it was ignored, nobody would hear of the end
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        pid = spawn(job, environment, mask)
        while True:
            received = signal.sigwaitinfo(watched)
            if received.si_signo != signal.SIGCHLD:
                # A terminal that goes away tells only the leader of its session.
                ours_alone = received.si_signo == signal.SIGHUP and os.getsid(0) == os.getpid()
                if received.si_code != _SI_KERNEL or ours_alone:
                    os.kill(pid, received.si_signo)
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
    finally:
        while signal.sigtimedwait(watched, 0):  # came too late for the job, and is not meant for us
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def spawn(job: list[str], environment: Mapping[str, str], mask: set[int | signal.Signals]) -> int:
    """Start a command as a shell would, with this signal mask, and return its pid."""
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
