"""A living job keeps its GPUs, whatever happens to the records and to its own processes.

Each job marks its GPUs by a lock of its own; a mark that is met twice is a GPU with two living jobs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import GUARD_S, Children, running
from screens import CLI, cli, finish, start
from syscalls import at_call, intercepted, recorded

from gpu_resource_extensions.leases import Leases, NotStoppableError, Process, holders
from gpu_resource_extensions.run_job import Job as RunJob
from gpu_resource_manager_v01 import GPUResourceManagerV01, PoolConflictError, TaskRunningError

HERE = os.uname().nodename

#: what a job does: mark its GPUs, say its pid, and then live as its shape tells
JOB = """
import fcntl, os, subprocess, sys, time
marks, shape, writer = sys.argv[1], sys.argv[2], int(sys.argv[3])
def mark():
    for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(","):
        fd = os.open(os.path.join(marks, gpu), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            open(os.path.join(marks, "shared"), "a").write(f"{shape} {gpu} ")
def say(last):
    os.write(writer, b"%s%d\\n" % (b"last " if last else b"", os.getpid()))
def rest():
    time.sleep(1000)
if shape == "worker":
    mark()
    say(True)
    rest()
if shape in ("launcher", "waits"):
    worker = subprocess.Popen([sys.executable, __file__, marks, "worker", str(writer)], pass_fds=[writer])
    say(False)
    worker.wait() if shape == "waits" else rest()
elif shape == "daemon":
    if os.fork() == 0:
        os.setsid()
        mark()
        keep = {int(fd) for fd in os.listdir("/proc/self/fd") if "/marks/" in os.path.realpath(f"/proc/self/fd/{fd}")}
        for fd in set(range(1000)) - keep - {writer}:
            try:
                os.close(fd)
            except OSError:
                pass
        say(True)
        rest()
    say(False)
    rest()
elif shape == "fork":
    if os.fork() == 0:
        mark()
        say(True)
        rest()
    say(False)
    rest()
else:
    mark()
    say(True)
    rest()
"""
SHAPES = ["one", "fork", "launcher", "waits", "daemon"]


@pytest.fixture(autouse=True)
def real_pool(pool: Path) -> None:
    GPUResourceManagerV01(pool, servers=[(HERE, 8, 64)], min_gpus=1)
    (pool.parent / "marks").mkdir()
    (pool.parent / "job.py").write_text(JOB, "utf-8")


class Job:
    """``--run`` of a job; ``pids`` are its own processes, ``last`` the one that marks its GPUs."""

    def __init__(self, pool: Path, task_id: str, shape: str = "one", gpus: int = 2) -> None:
        self.task_id = task_id
        self.reader, writer = os.pipe()
        command = [sys.executable, str(pool.parent / "job.py"), str(pool.parent / "marks"), shape, str(writer)]
        self.run = subprocess.Popen(
            [sys.executable, str(CLI), "--run", task_id, str(gpus), "1", "--wait", "--", *command],
            pass_fds=[writer],
            stderr=subprocess.PIPE,
        )
        os.close(writer)
        self.pids, said = [], b""
        while self.run.poll() is None or said:
            assert select.select([self.reader], [], [], GUARD_S)[0], "the job never spoke"
            said += os.read(self.reader, 4096)
            self.pids = [int(line.split()[-1]) for line in said.splitlines()]
            if said.count(b"\n") >= (1 if shape == "one" else 2):
                break
        self.last = next(int(line.split()[-1]) for line in said.splitlines() if line.startswith(b"last"))

    def keeper(self, pool: Path) -> int:
        [name] = [task["lease"] for task in tasks(pool) if task["task_id"] == self.task_id]
        claim = Leases(str(pool.parent / ".leases")).claim(str(name))
        assert claim
        return claim["keeper"]

    def end(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.run.communicate(timeout=GUARD_S)
        os.close(self.reader)


def tasks(pool: Path) -> list[dict[str, object]]:
    document = json.loads(pool.read_text("utf-8"))
    return [task for server in document["servers"] for task in server["running_tasks"]]


def change(pool: Path) -> None:
    """Let one further command run that changes nothing by itself."""
    GPUResourceManagerV01(pool).release_resources("no such task")


def wait_until_ended(pids: list[int]) -> None:
    """Wait on the processes themselves, which are not ours."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            assert select.select([descriptor], [], [], GUARD_S)[0]
            os.close(descriptor)


@pytest.fixture
def jobs(pool: Path) -> Iterator[list[Job]]:
    started: list[Job] = []
    yield started
    for job in started:
        job.end()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("victims", ["command", "keeper", "run", "keeper and command", "run and command"])
def test_gpus_stay_held_until_the_last_process_of_the_job_has_ended(
    pool: Path, shape: str, victims: str, jobs: list[Job]
) -> None:
    job = Job(pool, "t", shape)
    jobs.append(job)
    keeper = job.keeper(pool)
    first = next(pid for pid in job.pids if pid != job.last or shape == "one")
    for word in victims.split(" and "):
        os.kill({"command": first, "keeper": keeper, "run": job.run.pid}[word], signal.SIGKILL)
    change(pool)
    if first != job.last or "command" not in victims:
        assert running(pool) == ["t"]
    os.kill(job.last, signal.SIGKILL) if first != job.last or "command" not in victims else None
    if "run" not in victims:
        for pid in job.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert job.run.wait(GUARD_S) in ({137} if shape != "waits" else {137, 0})
    else:
        for pid in job.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until_ended([*job.pids, keeper])
    change(pool)
    assert running(pool) == []
    change(pool)
    assert os.listdir(pool.parent / ".leases") == []


def test_storm_of_random_kills_never_lets_two_jobs_meet_on_a_gpu(pool: Path) -> None:
    rng = random.Random(12)
    alive: list[Job] = []
    keepers = []
    for number in range(40):
        job = Job(pool, f"t{number}", rng.choice(SHAPES))
        keepers.append(job.keeper(pool))
        alive.append(job)
        os.kill(rng.choice([job.run.pid, keepers[-1], *job.pids]), signal.SIGKILL)
        if rng.random() < 0.5:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(job.pids), signal.SIGKILL)
        while len(alive) >= 4:
            alive.pop(rng.randrange(4)).end()
    while alive:
        alive.pop().end()
    wait_until_ended(keepers)
    assert not (pool.parent / "marks" / "shared").exists()
    change(pool)
    assert GPUResourceManagerV01(pool).get_resource_summary()["total_available_gpus"] == 8
    change(pool)
    assert os.listdir(pool.parent / ".leases") == []


def test_kill_of_run_or_keeper_ahead_of_any_call_leaves_what_the_next_change_sets_right(
    pool: Path, children: Children
) -> None:
    """Who is killed when, and what that leaves.

    killed                              left behind                     the next change
    ahead of the lease                  nothing                         -
    after the lease                     a free lease, in no record      deletes it
    after the grant                     a record with a free lease      takes it back
    after ``granted``                   the same                        takes it back
    after the keeper                    the same; the keeper ends       takes it back
    after the start, ``--run`` alone    keeper and command live         takes it back once they have ended
    after the start, keeper alone       ``--run`` waits in its place    finds it released
    at the end, ahead of the release    a record with a free lease      takes it back
    at the end, ahead of the deletion   a free lease, in no record      deletes it
    """
    manager = GPUResourceManagerV01(pool)

    def work() -> None:
        job = RunJob(["true"], lambda pid: None)
        with manager.allocation("t", 2, 1, keeper=job.kept):
            assert job.run(dict(os.environ)) in (0, 137)

    reader, writer = os.pipe()
    children.run(lambda: os.write(writer, b"%d" % len(recorded(work))))
    calls = int(os.read(reader, 100))
    codes = set()
    for number in range(calls):

        def killed(number: int = number) -> None:
            with intercepted(at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL))):
                work()

        codes.add(children.run(killed))  # 0, or 1 if it was told, where the keeper met its call first
        for lease in (pool.parent / ".leases").iterdir() if (pool.parent / ".leases").exists() else ():
            with contextlib.suppress(FileNotFoundError), lease.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # until the keeper has ended
        change(pool)
        assert running(pool) == [], number
        change(pool)
        assert not (pool.parent / ".leases").exists() or os.listdir(pool.parent / ".leases") == []
    assert -signal.SIGKILL in codes


@pytest.mark.parametrize("harm", ["an old copy", "deleted", "another", "moved GPUs", "no lease", "reset", "damaged"])
def test_document_that_has_lost_living_jobs_gets_them_back(pool: Path, harm: str, jobs: list[Job]) -> None:
    old = pool.read_bytes()
    jobs += [Job(pool, f"t{number}") for number in range(4)]
    document = json.loads(pool.read_text("utf-8"))
    [server] = document["servers"]
    if harm == "an old copy":
        pool.write_bytes(old)
    elif harm == "deleted":
        pool.unlink()
        assert cli("--allocate", "u", "2", "1").code == 74, "nobody makes another pool by accident"
        assert cli("--init").code == 0
    elif harm == "another":
        pool.unlink()
        GPUResourceManagerV01(pool, servers=[("other", 8, 64)], min_gpus=1)
    elif harm == "moved GPUs":
        server["available_gpus"], server["running_tasks"][0]["allocated_gpus"] = [0, 1], []
        pool.write_text(json.dumps(document), "utf-8")
    elif harm == "no lease":
        for task in server["running_tasks"]:
            del task["lease"]
        pool.write_text(json.dumps(document), "utf-8")
    elif harm == "reset":
        assert cli("--reset", "--yes").code == 0
    else:
        pool.write_text("{", "utf-8")
        assert cli("--reset", "--yes").code == 0
    assert cli("--allocate", "u", "2", "1").code in (0, 1)
    here = [task for task in tasks(pool) if task["task_id"] != "u"]
    assert sorted(str(task["task_id"]) for task in here) == ["t0", "t1", "t2", "t3"]
    assert sorted(gpu for task in here for gpu in task["allocated_gpus"]) == [*range(8)]  # type: ignore[attr-defined]
    assert cli("--run", "v", "2", "1", "--", "true").code in (75, 125), "there is no room on this machine"


def test_what_others_got_meanwhile_stays_theirs_and_is_given_to_nobody_else(
    pool: Path, jobs: list[Job], caplog: pytest.LogCaptureFixture
) -> None:
    jobs.append(Job(pool, "t", gpus=4))
    document = json.loads(pool.read_text("utf-8"))
    [server] = document["servers"]
    by_hand = {"task_id": "u", "allocated_gpus": [2, 3], "allocated_cpus": 1, "start_time": "2026-01-01T00:00:00"}
    server.update(running_tasks=[by_hand], available_gpus=[0, 1, 4, 5, 6, 7], available_cpus=63)
    pool.write_text(json.dumps(document), "utf-8")
    manager = GPUResourceManagerV01(pool)
    assert manager.allocate_resources("w", 5, 1) is None
    assert "[2, 3]" in caplog.text
    assert {task["task_id"]: task["allocated_gpus"] for task in tasks(pool)} == {"u": [2, 3], "t": [0, 1]}
    assert manager.release_resources("u")
    assert manager.allocate_resources("w", 4, 1)
    assert {task["task_id"]: task["allocated_gpus"] for task in tasks(pool)} == {"t": [0, 1, 2, 3], "w": [4, 5, 6, 7]}


def test_release_and_reset_leave_a_living_job_alone_unless_they_are_forced(pool: Path, jobs: list[Job]) -> None:
    jobs.append(Job(pool, "t", "launcher"))
    refused = cli("--release", "t")
    assert refused.code == 1
    assert f"PID {jobs[0].last} " in refused.err
    assert "--stop t" in refused.err
    with pytest.raises(TaskRunningError) as raised:
        GPUResourceManagerV01(pool).release_resources("t")
    assert {process["pid"] for process in raised.value.processes} == set(jobs[0].pids)
    assert f"プロセス: {jobs[0].last} " in cli("--detail").out
    reset = cli("--reset", "--yes")
    assert (reset.code, running(pool)) == (0, ["t"])
    assert "注意: プロセスが動いているタスクは残しました (--stop で終了できます): t\n" in reset.err
    with pytest.raises(PoolConflictError, match="--stop"):
        GPUResourceManagerV01(pool).reset_resources([("other", 8, 64)])
    assert cli("--reset", "--yes", "--server", f"{HERE}:4:8").code == 0, "a server of that name can still hold it"
    assert running(pool) == ["t"]
    forced = cli("--release", "t", "--force")
    assert forced.code == 0
    assert f"PID {jobs[0].last} " in forced.err
    change(pool)
    assert running(pool) == [], "and nothing puts it back"


def test_forced_reset_clears_living_jobs_too(pool: Path, jobs: list[Job]) -> None:
    jobs.append(Job(pool, "t"))
    assert cli("--reset", "--yes", "--force").code == 0
    change(pool)
    assert running(pool) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_stop_ends_the_whole_tree_and_frees_the_gpus(pool: Path, shape: str, jobs: list[Job]) -> None:
    jobs.append(Job(pool, "t", shape))
    assert cli("--stop", "t").code == 0
    assert running(pool) == []
    assert jobs[0].run.wait(GUARD_S) == 128 + signal.SIGTERM
    wait_until_ended(jobs[0].pids)


IGNORES_TERM = "trap '' TERM; echo; while :; do sleep 1; done"


def test_stop_kills_what_does_not_listen(pool: Path) -> None:
    with subprocess.Popen(
        [
            sys.executable,
            str(CLI),
            "--run",
            "t",
            "2",
            "1",
            "--",
            "sh",
            "-c",
            IGNORES_TERM,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as run:
        assert run.stdout and run.stdout.readline() == b"\n"
        assert cli("--stop", "t", "--grace", "0.1").code == 0
        assert run.wait(GUARD_S) == 128 + signal.SIGKILL


def test_stop_gives_run_the_time_to_tell_how_its_job_has_ended(pool: Path) -> None:
    words = ["--run", "t", "2", "1", "--", "sh", "-c", IGNORES_TERM.replace("echo;", "echo $$;")]
    with subprocess.Popen(
        [sys.executable, str(CLI), *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stdout
        job = int(run.stdout.readline())
        run.send_signal(signal.SIGSTOP)  # as on a machine that has no time for it
        stop = start(str(CLI), "--stop", "t", "--grace", "0")
        wait_until_ended([job])
        rests = times_rested(stop.pid)
        while times_rested(stop.pid) < rests + 4:  # it looks again a few times
            assert stop.poll() is None
        run.send_signal(signal.SIGCONT)
        assert finish(stop).code == 0
        assert run.wait(GUARD_S) == 128 + signal.SIGKILL


def times_rested(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text("utf-8")
    return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def test_what_cannot_be_stopped_is_said(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    assert cli("--stop", "nobody").code == 1
    assert manager.allocate_resources("reserved", 2, 1)
    result = cli("--stop", "reserved")
    assert (result.code, "--release reserved" in result.err) == (1, True)
    with manager.allocation("here", 2, 1), pytest.raises(NotStoppableError):
        text = pool.read_text("utf-8")
        pool.write_text(text.replace('"boot": "', '"boot": "0'), "utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gpu_resource_extensions.leases.LOCAL_FILE_SYSTEMS", ())
            manager.stop_task("here")


def test_command_that_leaves_processes_says_which_and_keeps_its_gpus(pool: Path) -> None:
    result = cli("--run", "t", "4", "1", "--", "bash", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!; exit 3")
    pid = int(result.out)
    assert result.code == 3
    assert f"注意: タスク t のプロセスがまだ動いています: PID {pid} " in result.err
    change(pool)
    assert running(pool) == ["t"]
    assert cli("--stop", "t").code == 0
    assert running(pool) == []


def test_keeper_holds_nothing_of_the_caller_and_has_a_name_of_its_own(pool: Path, jobs: list[Job]) -> None:
    jobs.append(Job(pool, "t"))
    keeper = jobs[0].keeper(pool)
    assert Path(f"/proc/{keeper}/cmdline").read_bytes().rstrip(b"\0") == b"gpu-keeper"
    assert os.getsid(keeper) == keeper
    assert os.readlink(f"/proc/{keeper}/cwd") == "/"
    opened = {os.readlink(entry.path) for entry in os.scandir(f"/proc/{keeper}/fd")}
    assert len(opened) == 4, opened  # /dev/null, the lease, and two pipes to ``--run``
    script = "setsid sleep 1000 >/dev/null 2>&1 & echo hi"
    substitution = f"x=$({sys.executable} {CLI} --run u 2 1 -- sh -c '{script}'); echo \"$x\""
    output = subprocess.run(["bash", "-c", substitution], capture_output=True, timeout=GUARD_S, check=True)
    assert output.stdout == b"hi\n"
    assert cli("--stop", "u").code == 0


def test_json_document_begins_on_a_line_of_its_own(pool: Path) -> None:
    job, document = cli("--run", "t", "2", "1", "--json", "--", "printf", "loss=0.1").out.splitlines()
    assert job == "loss=0.1"
    assert json.loads(document)["result"]["exit_code"] == 0


def test_later_grant_replaces_what_an_earlier_one_set_and_keeps_what_the_user_set(pool: Path) -> None:
    inner = f'{sys.executable} {CLI} --run inner 2 3 -- sh -c "echo \\$OMP_NUM_THREADS \\$GPU_TASK_ID"'
    assert cli("--run", "outer", "2", "5", "--", "sh", "-c", inner).out == "3 inner\n"
    assert cli("--run", "outer", "2", "5", "--", "sh", "-c", f"OMP_NUM_THREADS=7 {inner}").out == "7 inner\n"


def test_wait_for_ones_own_task_is_said(pool: Path) -> None:
    command = (sys.executable, str(CLI), "--run", "inner", "2", "2", "--wait", "0.1", "--", "true")
    result = cli("--run", "outer", "8", "8", "--", *command)
    assert result.code == 75
    assert "タスク outer の中で動いているため、outer が終わるまで空きません" in result.err


def test_recorded_command_is_bounded_and_that_of_the_job_is_not(pool: Path) -> None:
    words = "x" * 5000
    script = f"grep -q {'x' * 300} {pool} || echo ${{#1}}"
    assert cli("--run", "t", "2", "1", "--", "sh", "-c", script, "sh", words).out == "5000\n"


@pytest.mark.parametrize("encoding", ["ascii", "euc_jp", "cp932"])
def test_texts_for_programs_are_exact_in_every_encoding(pool: Path, encoding: str) -> None:
    env = {"PYTHONIOENCODING": encoding}
    task_id = "学習-é-😀"
    result = cli("--allocate", task_id, "2", "1", "--json", env=env, encoding=encoding)
    assert json.loads(result.out)["result"]["task_id"] == task_id
    refused = cli("--allocate", task_id + "2", "2", "1", "--export", env=env, encoding=encoding)
    assert refused.code == 2
    assert running(pool) == [task_id], "nothing was granted"


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="only root can make namespaces")
def test_job_in_a_container_of_another_name_that_was_killed_is_taken_back(
    pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'hostname random 2>/dev/null || echo random >/proc/sys/kernel/hostname; exec "$@"'
    command = [sys.executable, str(CLI), "--run", "t", "2", "1", "--", "sh", "-c", "kill -9 $PPID; kill -9 $$"]
    environment = {**os.environ, "GPU_RESOURCE_SERVER": HERE}
    killed = subprocess.run(
        ["unshare", "--uts", "sh", "-c", script, "sh", *command], env=environment, capture_output=True, check=False
    )
    assert killed.returncode == 137, killed
    change(pool)
    assert running(pool) == []
    # The next one there needs no variable: the server's last job ran under the same kernel.
    again = [*command[:-3], "true"]
    assert subprocess.run(["unshare", "--uts", "sh", "-c", script, "sh", *again], check=False).returncode == 0


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="only root can make namespaces")
def test_lease_of_an_earlier_boot_is_over(pool: Path, tmp_path: Path) -> None:
    fake = tmp_path / "boot_id"
    fake.write_text("00000000-0000-0000-0000-000000000000\n")
    script = f'mount --bind {fake} /proc/sys/kernel/random/boot_id && exec "$@"'
    code = "import os, signal; from gpu_resource_manager_v01 import GPUResourceManagerV01"
    hold = f"{code}; held = GPUResourceManagerV01().allocation('t', 2, 1); held.__enter__(); os.kill(os.getpid(), 9)"
    environment = {**os.environ, "PYTHONPATH": str(CLI.parent)}
    subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", hold], env=environment, check=False
    )
    assert running(pool) == ["t"]
    shutil.rmtree(pool.parent / ".leases")
    change(pool)
    assert running(pool) == []


def test_holders_are_those_that_have_the_lease_open_and_their_descendants(pool: Path, jobs: list[Job]) -> None:
    jobs.append(Job(pool, "t", "launcher"))
    [name] = os.listdir(pool.parent / ".leases")
    found = holders([name])[name]
    assert all(isinstance(process, Process) for process in found)
    assert {*jobs[0].pids, jobs[0].run.pid, jobs[0].keeper(pool)} == {process.pid for process in found}


@pytest.mark.parametrize("limit", [20, 21, 23])
def test_too_few_descriptors_are_named_as_such(pool: Path, limit: int) -> None:
    result = subprocess.run(
        ["bash", "-c", f"ulimit -n {limit}; {sys.executable} {CLI} --run t 2 1 -- true"],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode in (125, 126), result
    assert "ulimit -n" in result.stderr, result.stderr
    assert running(pool) == []


def test_keeper_that_breaks_does_not_let_run_wait_for_ever(pool: Path, children: Children) -> None:
    def work() -> None:
        job = RunJob(["no\0command"], lambda pid: None)  # a word that no system call takes
        with GPUResourceManagerV01(pool).allocation("t", 2, 1, keeper=job.kept):
            assert job.run({}) == 128 + signal.SIGKILL

    assert children.run(work) == 0
    change(pool)
    assert running(pool) == []
