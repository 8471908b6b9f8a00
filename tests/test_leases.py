"""Tasks that end with their processes: real jobs, real SIGKILL, real namespaces."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
from conftest import ALICE, BOB, GUARD_S, LAB, PROJECT, Children, become, running
from screens import CLI, cli

import gpu_resource_manager_v01 as library
from gpu_resource_extensions.leases import Leases
from gpu_resource_manager_v01 import Allocation, GPUResourceManagerV01, NoCapacityError, NotOwnerError

HERE = "gpu-server-1"

pytestmark = pytest.mark.usefixtures("made_pool")


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RESOURCE_SERVER", HERE)


def free_here(pool: Path) -> int:
    """Return how many GPUs of this machine the state file calls free, once one further command has run."""
    manager = GPUResourceManagerV01(pool)
    manager.release_resources("no such task")
    available: int = manager.get_resource_summary()["servers"][1]["available_gpus"]
    return available


def leases(pool: Path) -> list[str]:
    return os.listdir(pool.parent / ".leases")


def wait_for_leases() -> None:
    """A dying process closes its descriptors one after the other: after its pipe, wait for its lease."""
    directory = Path(os.environ["GPU_RESOURCE_FILE"]).parent / ".leases"
    for lease in directory.iterdir() if directory.exists() else []:
        with contextlib.suppress(FileNotFoundError), lease.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)


class Job:
    """``--run`` of a job that says that it is there and then waits; every pipe end tells who lives."""

    def __init__(self, script: str, task_id: str = "job", gpus: int = 2) -> None:
        self.reader, writer = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, str(CLI), "--run", task_id, str(gpus), "4", "--", "sh", "-c", script, "job", str(writer)],
            pass_fds=[writer],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        os.close(writer)

    def line(self) -> str:
        """Wait for a line of the job."""
        text = b""
        while not text.endswith(b"\n"):
            assert select.select([self.reader], [], [], GUARD_S)[0], "the job never spoke"
            part = os.read(self.reader, 1)
            assert part, self.process.communicate()
            text += part
        return text.decode().strip()

    def wait_until_all_are_gone(self) -> None:
        while True:
            assert select.select([self.reader], [], [], GUARD_S)[0], "a process of the job lives on"
            if not os.read(self.reader, 4096):
                break
        wait_for_leases()

    def close(self) -> None:
        os.close(self.reader)
        self.process.communicate()


@contextlib.contextmanager
def job(script: str, task_id: str = "job", gpus: int = 2) -> Iterator[Job]:
    started = Job(script, task_id, gpus)
    try:
        yield started
    finally:
        started.process.kill()
        started.close()


WAITS = "echo $$ >/dev/fd/$1; read x"


def test_job_holds_its_gpus_until_it_ends(pool: Path) -> None:
    with job(WAITS) as here:
        here.line()
        assert free_here(pool) == 6
        here.process.communicate(b"\n")
        assert here.process.returncode == 0
    assert running(pool) == []
    assert free_here(pool) == 8
    assert leases(pool) == []


def test_killed_parent_leaves_the_gpus_to_the_job_until_it_ends(pool: Path) -> None:
    with job(WAITS) as here:
        pid = int(here.line())
        here.process.kill()
        here.process.wait()
        assert free_here(pool) == 6
        os.kill(pid, signal.SIGKILL)
        here.wait_until_all_are_gone()
        status = GPUResourceManagerV01(pool).get_detailed_status()["servers"][1]
        assert [task.get("ended") for task in status["running_tasks"]] == [True], "shown before anybody reclaims"
        assert "job (終了済み" in cli("--detail").out
        assert "終了済み (次の変更で回収): job" in cli("--status").out
        assert running(pool) == ["job"]
        assert free_here(pool) == 8


def test_job_that_forks_and_exits_its_first_process_keeps_its_gpus(pool: Path) -> None:
    with job("(sh -c 'echo $$ >/dev/fd/'$1'; exec sleep 1000') & exit 0") as here:
        pid = int(here.line())
        assert here.process.wait() == 0
        assert free_here(pool) == 6
        os.kill(pid, signal.SIGKILL)
        here.wait_until_all_are_gone()
        assert free_here(pool) == 8


def test_job_that_closes_all_descriptors_is_no_longer_known(pool: Path) -> None:
    script = (
        f"exec {sys.executable} -c '"
        'import os, sys; os.write(int(sys.argv[1]), b"x\\n"); sys.stdin.read(1);'
        'os.closerange(3, 1000); os.write(1, b"closed\\n"); sys.stdin.read(1)'
        "' $1"
    )
    with job(script) as here:
        here.line()
        # The parent, too, holds the lease while it waits for the job.
        assert free_here(pool) == 6


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a pid namespace")
def test_job_in_another_pid_namespace_keeps_its_gpus(pool: Path) -> None:
    with job("exec unshare --pid --fork sh -c 'echo $$ >/dev/fd/'$1'; read x'") as here:
        assert here.line() == "1"
        here.process.kill()
        here.process.wait()
        assert free_here(pool) == 6
        here.process.communicate(b"\n")
        here.wait_until_all_are_gone()
        assert free_here(pool) == 8


@pytest.mark.parametrize("seed", range(3))
def test_random_kills_of_parents_and_jobs_leave_no_gpu_held_or_shared(pool: Path, tmp_path: Path, seed: int) -> None:
    """Each job locks a file per GPU with flock of its own: a second live holder would see it."""
    rng = random.Random(seed)
    claims = tmp_path / "claims"
    claims.mkdir()
    script = tmp_path / "train.py"
    script.write_text(
        "import fcntl, os, sys\n"
        "for gpu in os.environ['CUDA_VISIBLE_DEVICES'].split(','):\n"
        f"    fd = os.open({str(claims)!r} + '/' + gpu, os.O_RDWR | os.O_CREAT)\n"
        "    try:\n"
        "        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "    except BlockingIOError:\n"
        f"        open({str(tmp_path / 'shared')!r}, 'w').close()\n"
        "os.write(int(sys.argv[1]), b'%d\\n' % os.getpid())\n"
        "sys.stdin.read(1)\n"
    )
    alive: list[tuple[Job, int]] = []
    for number in range(20):
        started = Job(f"exec {sys.executable} {script} $1", f"job-{number}")
        moment = rng.choice(["while it starts", "later", "later"])
        if moment == "while it starts":
            select.select([], [], [], rng.random() * 0.2)
            started.process.kill()
            started.process.wait()
            started.close()
        else:
            alive.append((started, int(started.line())))
        if len(alive) == 4 or number == 19:
            for victim, pid in alive:
                targets = rng.choice(
                    [[victim.process.pid], [pid], [victim.process.pid, pid], [pid, victim.process.pid]]
                )
                for target in targets:
                    os.kill(target, signal.SIGKILL)
                if pid not in targets:
                    victim.process.stdin.close()  # type: ignore[union-attr]
            for victim, _ in alive:
                victim.wait_until_all_are_gone()
                victim.process.wait()
                os.close(victim.reader)
                victim.process.stderr.close()  # type: ignore[union-attr]
            alive = []
            assert free_here(pool) == 8
            assert running(pool) == []
    free_here(pool)
    assert leases(pool) == []
    assert not (tmp_path / "shared").exists()


def test_lease_that_somebody_deletes_is_held_until_its_own_end(pool: Path) -> None:
    with job(WAITS) as here:
        here.line()
        shutil.rmtree(pool.parent / ".leases")
        assert free_here(pool) == 6
        here.process.communicate(b"\n")
    assert running(pool) == []


def test_lease_is_out_of_the_way_of_what_a_script_redirects(pool: Path) -> None:
    with job("exec 3>&1 4>&1 5>&1 6>&1; " + WAITS) as here:
        pid = int(here.line())
        here.process.kill()
        here.process.wait()
        assert free_here(pool) == 6
        os.kill(pid, signal.SIGKILL)
    low = "import os, sys; sys.exit(any(os.path.exists(f'/proc/self/fd/{fd}') for fd in (0, *range(3, 20))))"
    assert cli("--run", "closed", "2", "1", "--", sys.executable, "-c", low, redirect="<&-").code == 0


def test_sweep_never_deletes_a_lease_that_is_held(pool: Path, children: Children) -> None:
    directory = pool.parent / ".leases"
    directory.mkdir()

    def sweep_all_the_time() -> None:
        while True:
            Leases(str(directory)).sweep([])

    children.start(sweep_all_the_time)
    made = Leases(str(directory))
    for _ in range(3000):
        lease = made.make()
        assert os.fstat(lease.descriptor).st_nlink == 1
        os.close(lease.descriptor)
        assert len(lease.name) == 32


def test_strange_things_among_the_leases_are_left_alone(pool: Path) -> None:
    directory = pool.parent / ".leases"
    directory.mkdir()
    os.mkfifo(directory / ("0" * 32))
    (directory / ("1" * 32)).mkdir()
    (directory / ("2" * 32)).symlink_to("nowhere")
    (directory / "notes").touch()
    (directory / ("3" * 32)).touch()
    with GPUResourceManagerV01(pool).allocation("task", 2, 1):
        pass
    assert sorted(leases(pool)) == ["0" * 32, "1" * 32, "2" * 32, "notes"]


@pytest.mark.parametrize("gpus", [1, 2])
def test_ended_task_no_longer_says_which_server_this_machine_is(
    pool: Path, gpus: int, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    GPUResourceManagerV01(pool).reset_resources(min_gpus=1)

    def killed_at_work() -> None:
        with GPUResourceManagerV01(pool).allocation("dead", 2, 1):
            os.kill(os.getpid(), signal.SIGKILL)

    assert children.run(killed_at_work) == -signal.SIGKILL
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "gpu-server-2")
    with GPUResourceManagerV01(pool).allocation("task", gpus, 1) as held:
        assert held["server_name"] == "gpu-server-2"


def test_one_machine_is_one_server_even_if_two_ask_at_once(pool: Path, children: Children) -> None:
    GPUResourceManagerV01(pool)
    barrier = get_context("fork").Barrier(4)
    shared = get_context("fork").Value("i", 0)

    def work(number: int) -> None:
        os.environ["GPU_RESOURCE_SERVER"] = f"gpu-server-{number}"
        barrier.wait()
        with contextlib.suppress(library.InvalidRequestError):
            with GPUResourceManagerV01(pool).allocation(f"t{number}", 8, 1):
                with shared.get_lock():
                    shared.value += 1
                barrier.wait()
                return
        barrier.wait()

    pids = [children.start(lambda n=n: work(n)) for n in range(4)]  # type: ignore[misc]
    assert [children.wait(pid) for pid in pids] == [0] * 4
    assert shared.value == 1


def test_lease_of_another_host_is_never_judged(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = GPUResourceManagerV01(pool)
    with manager.allocation("mine", 2, 1):
        text = pool.read_text("utf-8")
    pool.write_text(text.replace(f'"host": "{os.uname().nodename}"', '"host": "elsewhere"'), "utf-8")
    assert running(pool) == ["mine"]
    assert free_here(pool) == 6
    assert "ended" not in manager.get_detailed_status()["servers"][1]["running_tasks"][0]


def test_plain_allocation_outlives_its_process(pool: Path) -> None:
    assert cli("--allocate", "plain", "2", "1").code == 0
    assert cli("--allocate", "waited", "2", "1", "--wait").code == 0
    free_here(pool)
    assert running(pool) == ["plain", "waited"]


# --- The context manager --------------------------------------------------------------------------


def test_block_holds_gpus_and_returns_them(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    with manager.allocation("block", 2, 4) as held:
        assert (held["server_name"], held["gpu_devices"]) == (HERE, "0,1")
        assert running(pool) == ["block"]
    assert running(pool) == []
    with pytest.raises(KeyError), manager.allocation("block", 2, 4):
        raise KeyError
    assert running(pool) == []


def test_block_without_room_says_why(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    with manager.allocation("all", 8, 4), pytest.raises(NoCapacityError, match="all: GPU 8") as raised:
        with manager.allocation("late", 2, 4):
            pass
    assert raised.value.fewest_releases == ["all"]
    assert leases(pool) == []


def test_late_release_cannot_free_a_newer_task_of_the_same_name(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    with manager.allocation("same", 2, 1):
        assert manager.release_resources("same", force=True)
        assert manager.allocate_resources("same", 4, 1)
    assert running(pool) == ["same"]


def test_killed_process_and_its_children_hold_until_the_last_is_gone(pool: Path, children: Children) -> None:
    reader, writer = os.pipe()
    ready, said = os.pipe()

    def work() -> None:
        os.close(writer)
        with GPUResourceManagerV01(pool).allocation("forked", 2, 1):
            if os.fork() == 0:
                os.write(said, b"x")
                os.read(reader, 1)  # until the test closes its end
                os._exit(0)
            os.read(reader, 1)

    pid = children.start(work)
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    assert children.wait(pid) == -signal.SIGKILL
    assert free_here(pool) == 6
    os.close(said)
    os.close(writer)
    os.read(ready, 1)  # the end of the child
    wait_for_leases()
    assert free_here(pool) == 8


def test_no_descriptor_of_a_lease_is_left_open(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    before = os.listdir("/proc/self/fd")
    for number in range(3):
        with manager.allocation(f"t{number}", 2, 1):
            pass
        assert manager.allocate_resources(f"w{number}", 2, 1, wait_s=1)
    assert len(os.listdir("/proc/self/fd")) == len(before)


# --- Whose is it ------------------------------------------------------------------------------------


def test_task_records_who_asked(pool: Path) -> None:
    cli("--allocate", "mine", "2", "1")
    [task] = GPUResourceManagerV01(pool).get_detailed_status()["servers"][0]["running_tasks"]
    assert task["uid"] == os.getuid()
    assert task["host"] == os.uname().nodename
    assert task["command"].endswith("cli_v01.py --allocate mine 2 1")


def test_state_file_of_the_first_version_is_read_as_it_is(pool: Path) -> None:
    shutil.copy(PROJECT / "tests" / "resource_status_v0.1.json", pool)
    manager = GPUResourceManagerV01(pool)
    assert manager.get_resource_summary()["total_running_tasks"] == 2
    assert manager.release_resources("task_001")
    assert running(pool) == ["task_002"]


@pytest.fixture
def shared(lab: Path) -> Path:
    """The path of a state file in a directory that two users share."""
    lab.chmod(0o2770)
    return lab / "resource_status.json"


def test_bob_cannot_release_the_task_of_alice_by_mistake(shared: Path, children: Children) -> None:
    def alice() -> None:
        become(ALICE, [LAB], 0o077)
        assert GPUResourceManagerV01(shared).allocate_resources("hers", 2, 1)

    def bob() -> None:
        become(BOB, [LAB], 0o077)
        manager = GPUResourceManagerV01(shared)
        before = shared.read_bytes()
        with pytest.raises(NotOwnerError, match=str(ALICE)):
            manager.release_resources("hers")
        assert shared.read_bytes() == before
        assert manager.release_resources("hers", force=True)

    assert children.run(alice) == 0
    assert children.run(bob) == 0


def test_bob_reclaims_the_dead_task_of_alice(shared: Path, children: Children) -> None:
    ready, said = os.pipe()

    def alice() -> None:
        become(ALICE, [LAB], 0o077)
        with GPUResourceManagerV01(shared).allocation("hers", 8, 1):
            os.write(said, b"x")
            signal.pause()

    def bob() -> None:
        become(BOB, [LAB], 0o077)
        with GPUResourceManagerV01(shared).allocation("his", 8, 1):
            assert running(shared) == ["his"]
        assert leases(shared) == []

    pid = children.start(alice)
    os.read(ready, 1)
    os.kill(pid, signal.SIGKILL)
    children.wait(pid)
    assert children.run(bob) == 0


# --- Waiting ----------------------------------------------------------------------------------------


def test_sixteen_waiters_on_eight_gpus_are_all_served_and_none_twice(pool: Path, children: Children) -> None:
    GPUResourceManagerV01(pool)

    def waiter(number: int) -> None:
        manager = GPUResourceManagerV01(pool)
        with manager.allocation(f"w{number}", 2, 1, wait_s=GUARD_S) as held, contextlib.ExitStack() as stack:
            for gpu in held["gpu_ids"]:
                claim = pool.parent / f"claim-{gpu}"
                os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
                stack.callback(claim.unlink)

    pids = [children.start(lambda n=n: waiter(n)) for n in range(16)]  # type: ignore[misc]
    assert [children.wait(pid) for pid in pids] == [0] * 16
    assert running(pool) == []
    assert "waiting" not in GPUResourceManagerV01(pool).get_detailed_status()


def test_killed_waiters_block_nobody(pool: Path, children: Children) -> None:
    manager = GPUResourceManagerV01(pool)
    joined, said = os.pipe()

    def waiter(number: int) -> None:
        with GPUResourceManagerV01(pool).allocation(
            f"w{number}", 8, 1, wait_s=GUARD_S, on_wait=lambda position, reason: (os.write(said, b"x"), None)[1]
        ):
            pass

    assert manager.allocate_resources("all", 8, 1, local=True)
    pids = []
    for number in range(4):
        pids.append(children.start(lambda n=number: waiter(n)))  # type: ignore[misc]
        os.read(joined, 1)
    for victim in (0, 2):
        os.kill(pids[victim], signal.SIGKILL)
        assert children.wait(pids[victim]) == -signal.SIGKILL
    assert manager.release_resources("all")
    assert [children.wait(pids[survivor]) for survivor in (1, 3)] == [0, 0]
    assert running(pool) == []
    assert leases(pool) == []


def test_released_waiter_leaves_the_line_and_ends(pool: Path, children: Children) -> None:
    manager = GPUResourceManagerV01(pool)
    assert manager.allocate_resources("all", 8, 1, local=True)
    joined, said = os.pipe()

    def waiter() -> None:
        with pytest.raises(NoCapacityError, match="取り消されました"):
            with GPUResourceManagerV01(pool).allocation(
                "w", 8, 1, wait_s=GUARD_S, on_wait=lambda *news: (os.write(said, b"x"), None)[1]
            ):
                pass

    pid = children.start(waiter)
    os.read(joined, 1)
    assert manager.release_resources("w")
    assert children.wait(pid) == 0
    assert "waiting" not in manager.get_detailed_status()
    assert running(pool) == ["all"]


def test_dead_waiter_whose_lease_was_deleted_can_be_released(pool: Path, children: Children) -> None:
    manager = GPUResourceManagerV01(pool)
    assert manager.allocate_resources("all", 8, 1, local=True)
    joined, said = os.pipe()
    pid = children.start(
        lambda: GPUResourceManagerV01(pool).allocate_resources(
            "w", 8, 1, local=True, wait_s=GUARD_S, on_wait=lambda *news: (os.write(said, b"x"), None)[1]
        )
    )
    os.read(joined, 1)
    shutil.rmtree(pool.parent / ".leases")
    os.kill(pid, signal.SIGKILL)
    children.wait(pid)
    assert "待機中 1: w" in cli("--detail").out
    assert cli("--release", "w").code == 0
    assert "waiting" not in manager.get_detailed_status()


def test_waiter_that_gives_up_leaves_the_line(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    told: list[tuple[int, str]] = []
    with manager.allocation("all", 8, 1):
        before = pool.read_bytes()
        with (
            pytest.raises(NoCapacityError),
            manager.allocation("late", 2, 1, wait_s=0.2, on_wait=lambda *news: told.append(news)),
        ):
            pass
        assert pool.read_bytes().splitlines()[:-3] == before.splitlines()[:-3]
        assert manager.allocate_resources("late", 8, 1, prefer_server_id=1, wait_s=0.1, local=True) is None
    assert [position for position, _ in told] == [1]
    assert leases(pool) == []


def test_waiter_that_gives_up_leaves_the_line_though_a_child_has_inherited_its_lease(
    pool: Path, children: Children
) -> None:
    manager = GPUResourceManagerV01(pool)
    reader, writer = os.pipe()

    def child() -> None:
        os.close(writer)
        os.read(reader, 1)  # until the test closes its end

    with manager.allocation("all", 8, 1):
        refused = manager.allocate_resources(
            "late", 2, 1, local=True, wait_s=0.1, on_wait=lambda *news: (children.start(child), None)[1]
        )
        assert refused is None
        [pid] = children.pids
        assert len(leases(pool)) == 2, "the child holds the lease still"
        assert "waiting" not in manager.get_detailed_status()
    os.close(writer)
    assert children.wait(pid) == 0


def test_who_waits_is_served_by_the_one_who_releases(pool: Path, children: Children) -> None:
    manager = GPUResourceManagerV01(pool)
    assert manager.allocate_resources("all", 8, 1, prefer_server_id=1)
    joined, said = os.pipe()

    def waiter() -> None:
        held: Allocation | None = GPUResourceManagerV01(pool).allocate_resources(
            "waits", 8, 1, local=True, wait_s=GUARD_S, on_wait=lambda *news: (os.write(said, b"x"), None)[1]
        )
        assert held
        assert held["gpu_ids"] == list(range(8))

    pid = children.start(waiter)
    os.read(joined, 1)
    manager.release_resources("all")
    assert running(pool) == ["waits"], "placed in the same change that freed the GPUs"
    assert children.wait(pid) == 0
    [task] = manager.get_detailed_status()["servers"][1]["running_tasks"]
    assert "lease" not in task


def test_no_placement_on_a_pool_of_made_up_names(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPU_RESOURCE_SERVER")
    with pytest.raises(library.InvalidRequestError, match="--add-server NAME:GPUS:CPUS"):
        with GPUResourceManagerV01(pool).allocation("t", 2, 1):
            pass
