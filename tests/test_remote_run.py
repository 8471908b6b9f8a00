"""``--run --any`` and ``--on``: a job on whatever machine has room, through a real ssh to a real sshd."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from conftest import GUARD_S, needed
from database_servers import PostgreSQLServer
from hosts_of_tests import Host, Lab, Process, lab_of_hosts, terminal
from screens import Result

from gpu_resource_extensions.leases import LAPSE_S
from gpu_resource_extensions.remote_run import MAX_WORD_BYTES, packed
from gpu_resource_manager_v01 import State, Store, open_store

pytestmark = pytest.mark.services
needed("psycopg")

SERVERS = "--server", "node1:4:8", "--server", "node2:4:8"
READY = "echo ready; exec sleep 1000"
ON_NODE = ("--on", "node1")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A host to log in to and two servers, each with four GPUs."""
    with lab_of_hosts("login", "node1", "node2") as made, PostgreSQLServer(addresses="*") as server:
        place = server.url("postgres", "postgres").replace("127.0.0.1", made.gateway)
        for host in made.hosts.values():
            host.pool_is(place)
        assert command(made.hosts["login"], "--init", *SERVERS).code == 0
        yield made


@pytest.fixture
def store(lab: Lab) -> Iterator[Store]:
    """The store of the pool, which is idle, seen from outside of the lab."""
    assert command(lab.hosts["login"], "--reset", "--yes", "--force", *SERVERS).code == 0
    yield store_of(lab)
    for host in lab.hosts.values():
        if not host.pid:
            host.switch_on()
        host.join_network()
        for pid, words in host.processes().items():  # of jobs that a test has left
            if words[:1] == ["sleep"] or "--take" in words or "--run" in words:
                os.kill(pid, signal.SIGKILL)


def store_of(lab: Lab) -> Store:
    place = (lab.directory / "machines/login/etc/gpu-resource-file").read_text().strip()
    return open_store(place, GUARD_S)


@pytest.fixture
def login(lab: Lab, store: Store) -> Host:
    return lab.hosts["login"]


@pytest.fixture
def node1(lab: Lab, store: Store) -> Host:
    return lab.hosts["node1"]


@pytest.fixture
def node2(lab: Lab, store: Store) -> Host:
    return lab.hosts["node2"]


def command(host: Host, *words: str, **settings: Any) -> Result:
    return host.run(["gpu-resource", *words], **settings)


def run_any(host: Host, *job: str, how: Sequence[str] = ("--any",), **settings: Any) -> Result:
    return command(host, "--run", "task", "2", "2", *how, "--", *job, **settings)


def started(host: Host, *job: str, how: Sequence[str] = ("--any",)) -> Process:
    """Start a job, and return once it runs."""
    process = host.start(["gpu-resource", "--run", "task", "2", "2", *how, "--", *(job or ("sh", "-c", READY))])
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n", process.communicate()[1].decode()
    return process


def tasks(state: State) -> list[str]:
    placed = [task["task_id"] for server in state["servers"] for task in server["running_tasks"]]
    return placed + [request["task_id"] for request in state.get("waiting", ())]


def becomes(what: Callable[[], object]) -> None:
    """Wait until ``what`` is so."""
    end = time.monotonic() + GUARD_S
    while not what():
        assert time.monotonic() < end, "it never became so"
        time.sleep(0.02)


def pids(host: Host, word: str) -> list[int]:
    """Return the processes of a host with ``word`` in their command, the oldest first."""
    return sorted(pid for pid, words in host.processes().items() if word in words)


# --- A job as if it ran here ----------------------------------------------------------------------


def test_job_runs_where_there_is_room_in_the_same_directory(login: Host, lab: Lab, store: Store) -> None:
    directory = lab.directory / "homes/alice/実験 1"
    directory.mkdir(exist_ok=True)
    directory.chmod(0o777)
    script = "hostname; pwd; echo $CUDA_VISIBLE_DEVICES $GPU_TASK_ID; echo to stderr >&2"
    ran = run_any(login, "sh", "-c", script, cwd=directory)
    assert ran.out == f"node1\n{directory}\n0,1 task\n"
    assert ran.err == "✓ node1 の GPU 0,1 で実行します: task\nto stderr\n"
    assert (ran.code, tasks(store.read())) == (0, [])


def test_second_job_goes_to_the_server_that_has_room(login: Host, store: Store) -> None:
    first = started(login, how=ON_NODE)
    assert command(login, "--run", "big", "4", "2", "--any", "--", "hostname").out == "node2\n"
    assert command(login, "--run", "small", "2", "2", "--any", "--", "hostname").out == "node1\n"
    assert "既に実行中" in run_any(login, "hostname").err, "and a name that runs is refused, as without --any"
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 143


def test_this_machine_comes_first_and_needs_no_ssh(node2: Host) -> None:
    no_ssh = {"GPU_RESOURCE_SSH": "/bin/false"}
    assert run_any(node2, "hostname", env=no_ssh).out == "node2\n"
    assert run_any(node2, "hostname", how=("--on", "node2"), env=no_ssh).out == "node2\n"
    assert run_any(node2, "hostname", how=ON_NODE).out == "node1\n"


@pytest.mark.parametrize("script", ["exit 0", "exit 1", "exit 126", "exit 127", "exit 255", "kill -9 $$", "kill $$"])
def test_exit_code_is_that_of_the_job(login: Host, store: Store, script: str) -> None:
    here = subprocess.run(["sh", "-c", script], check=False).returncode
    ran = run_any(login, "sh", "-c", script)
    assert ran.code == (here if here >= 0 else 128 - here)
    assert (ran.err.count("\n"), tasks(store.read())) == (1, [])


@pytest.mark.parametrize("user", ["alice", "dashy", "fishy", "tcshy"])
def test_every_shell_hands_the_words_over_as_they_are(login: Host, user: str) -> None:
    words = ["a b", "two\nlines", "'\"$x`!1 \\", "日本語", "", "-n", "*", "~", "{a,b}", "a\\\nb", "\x01"]
    ran = command(login, "--run", "日本 '\"語", "2", "2", "--any", "--", "printf", "%s|", *words, user=user)
    assert (ran.out, ran.code) == ("".join(f"{word}|" for word in words), 0)


def test_hundred_megabytes_come_through_stdin(login: Host) -> None:
    data = os.urandom(1 << 20) * 100
    assert run_any(login, "sha256sum", input=data).out.split()[0] == hashlib.sha256(data).hexdigest()


def test_command_that_is_not_there_is_a_127_as_here(login: Host, store: Store) -> None:
    ran = run_any(login, "no-such-command")
    assert (ran.code, "no-such-command" in ran.err, tasks(store.read())) == (127, True, [])


def test_directory_that_is_not_there_is_said(login: Host, lab: Lab, store: Store) -> None:
    ran = run_any(login, "true", cwd="/run/lock/..")
    assert ran.code == 0
    login.run(["mkdir", "/run/lock/only-here"])
    ran = run_any(login, "true", cwd="/run/lock/only-here")
    assert (ran.code, tasks(store.read())) == (125, [])
    assert "node1 で作業ディレクトリに入れません: /run/lock/only-here" in ran.err


def test_language_goes_along(login: Host) -> None:
    ran = run_any(login, "no-such-command", env={"GPU_RESOURCE_LANG": "en"})
    assert "The command cannot be run: no-such-command" in ran.err and "実行" not in ran.err


def test_result_is_one_document_with_json(login: Host) -> None:
    ran = command(login, "--run", "task", "2", "2", "--any", "--json", "--", "sh", "-c", "exit 3")
    result = json.loads(ran.out)["result"]
    assert (ran.code, result["exit_code"], result["server_name"]) == (3, 3, "node1")


def test_command_that_ssh_cannot_carry_is_refused_ahead_of_the_claim(login: Host, store: Store) -> None:
    before = store.version_mark()
    ran = run_any(login, "echo", "x" * MAX_WORD_BYTES)
    assert (ran.code, "131071" in ran.err, store.version_mark()) == (125, True, before)
    assert run_any(login, "sh", "-c", "echo ${#1}", "sh", "x" * 90_000).out == "90000\n"


# --- A terminal -----------------------------------------------------------------------------------


def test_ctrl_c_in_a_terminal_is_for_the_job(login: Host, store: Store) -> None:
    script = "trap 'echo caught; exit 7' INT; tty >/dev/null && echo ready; while :; do sleep 0.1; done"
    with terminal(login, ["gpu-resource", "--run", "task", "2", "2", "--any", "--", "sh", "-c", script]) as screen:
        screen.read_until(b"ready")
        screen.type(b"\x03")
        screen.read_until(b"caught")
        assert screen.end() == 7
    assert tasks(store.read()) == []


def test_job_is_hung_up_when_the_terminal_goes_away(login: Host, node1: Host, store: Store) -> None:
    with terminal(login, ["gpu-resource", "--run", "task", "2", "2", "--any", "--", "sh", "-c", READY]) as screen:
        screen.read_until(b"ready")
        screen.hang_up()
        becomes(lambda: tasks(store.read()) == [])
    assert pids(node1, "sleep") == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_to_the_command_ends_the_job_and_its_children(
    login: Host, node1: Host, store: Store, number: int, code: int
) -> None:
    process = started(login, "sh", "-c", "sleep 1000 & sleep 1000 & echo ready; wait")
    process.send_signal(number)
    assert process.wait() == code
    becomes(lambda: tasks(store.read()) == [])
    assert pids(node1, "sleep") == []


# --- What cannot be reached -----------------------------------------------------------------------


def test_server_that_cannot_be_reached_is_skipped(login: Host, node1: Host, store: Store) -> None:
    node1.switch_off()
    ran = run_any(login, "hostname")
    assert (ran.code, ran.out, tasks(store.read())) == (0, "node2\n", [])
    assert "注意: node1 では始められませんでした" in ran.err
    ran = run_any(login, "hostname", how=ON_NODE)
    assert (ran.code, tasks(store.read())) == (125, [])
    assert "どのサーバーでも始められませんでした: node1\n  対処: ssh node1 " in ran.err


ONLY_ON_NODE2 = "sh -c 'test $(hostname) = node2 && exec gpu-resource \"$@\"' sh"


def test_server_without_the_command_is_skipped(login: Host, lab: Lab, store: Store) -> None:
    env, data = {"GPU_RESOURCE_REMOTE": ONLY_ON_NODE2}, lab.directory / "data"
    data.write_text("line\n" * 100_000)
    with open(data, "rb") as file:
        process = login.start(
            ["gpu-resource", "--run", "task", "2", "2", "--any", "--", "wc", "-l"], env=env, stdin=file
        )
        assert process.communicate()[0] == b"100000\n", "what the first ssh has read is put back"
    process = login.start(
        ["gpu-resource", "--run", "task", "2", "2", "--any", "--", "hostname"],
        env={"GPU_RESOURCE_REMOTE": "no-such-tool"},
    )
    err = process.communicate()[1].decode()
    assert (process.returncode, tasks(store.read())) == (125, [])
    assert "どのサーバーでも始められませんでした: node1, node2" in err


def test_job_is_not_started_with_half_of_its_input(login: Host, store: Store) -> None:
    ran = run_any(login, "wc", "-l", env={"GPU_RESOURCE_REMOTE": ONLY_ON_NODE2}, input=b"line\n" * 100_000)
    assert (ran.code, ran.out, tasks(store.read())) == (125, "", [])
    assert "標準入力の先頭が失われたかもしれない" in ran.err


def test_directory_that_was_removed_is_said(login: Host, store: Store) -> None:
    script = "mkdir gone && cd gone && rmdir ../gone && exec gpu-resource --run task 2 2 --any -- true"
    ran = login.run(["sh", "-c", script])
    assert (ran.code, "作業ディレクトリに入れません" in ran.err, tasks(store.read())) == (125, True, [])


def test_reservation_by_this_machine_after_a_reboot(node1: Host, store: Store) -> None:
    assert command(node1, "--run", "task", "2", "2", "--", "true").code == 0
    node1.reboot()
    assert command(node1, "--allocate", "task", "2", "2", "--export").code == 0


def test_living_job_that_the_document_has_lost_outranks_a_claim(login: Host, node1: Host, store: Store) -> None:
    lost = login.start(["gpu-resource", "--run", "lost", "4", "2", *ON_NODE, "--", "sh", "-c", READY])
    assert lost.stdout is not None and lost.stdout.readline() == b"ready\n"

    def forget(state: Any) -> None:
        state["servers"][0].update(running_tasks=[], available_gpus=[0, 1, 2, 3], available_cpus=8)

    store.update(forget)
    ran = run_any(login, "echo", "a second job on these GPUs", how=ON_NODE)
    assert (ran.code, ran.out, tasks(store.read())) == (125, "", ["lost"])
    lost.send_signal(signal.SIGTERM)


def test_stray_file_of_another_user_stops_nobody(login: Host, store: Store) -> None:
    assert run_any(login, "true").code == 0
    state: Any = store.read()
    stray = f"/run/lock/gpu-lease-{state['pool']}-"
    script = f"ln -s loop {stray}a; ln -s {stray}b {stray}b; mkdir {stray}c; mkfifo {stray}{'d' * 32}"
    assert login.run(["sh", "-c", script], user="dashy").code == 0
    deep = f"(printf 'granted \\n'; head -c 200000 /dev/zero | tr '\\0' '[') > {stray}{'e' * 32}"
    login.start(["sh", "-c", f"{deep}; exec flock {stray}{'e' * 32} sleep 1000"], user="dashy")
    becomes(lambda: pids(login, "sleep"))
    for words in (["--status"], ["--reclaim"], ["--allocate", "task", "2", "2"], ["--release", "task"]):
        ran = command(login, *words)
        assert (ran.code, ran.err) == (0, ""), words


def test_missing_ssh_is_said(login: Host, store: Store) -> None:
    ran = run_any(login, "hostname", env={"GPU_RESOURCE_SSH": "/no/ssh -v"})
    assert (ran.code, tasks(store.read())) == (127, [])
    assert "/no/ssh" in ran.err


def test_ssh_command_may_have_options(login: Host) -> None:
    assert "debug1:" in run_any(login, "true", env={"GPU_RESOURCE_SSH": "ssh -v -o LogLevel=DEBUG"}).err


def test_unknown_server_is_refused(login: Host) -> None:
    ran = run_any(login, "true", how=("--on", "node9"))
    assert (ran.code, "node1, node2" in ran.err) == (125, True)


# --- The protocol ---------------------------------------------------------------------------------


def taken(host: Host, claim: str, server: str = "node1") -> Result:
    job = {"asked": ["unused", 2, 2], "server": server, "directory": "/", "words": ["echo", "twice"], "language": ""}
    return command(host, "--take", claim, packed(job))


def test_claim_is_taken_once_and_on_its_machine_only(login: Host, node1: Host, node2: Host, store: Store) -> None:
    first = started(login)
    record: Any = store.read()["servers"][0]["running_tasks"][0]
    for host in (node1, node2):
        again = taken(host, record["claim"])
        assert (again.code, again.out) == (125, "")
    claim = unused_claim(login, store)
    assert (taken(node2, claim, "node2").code, len(tasks(store.read()))) == (125, 2)
    wrong = taken(node2, claim)  # which it is not
    assert (wrong.code, wrong.out) == (125, "")
    assert taken(node1, claim).out == "twice\n"
    first.send_signal(signal.SIGTERM)


def unused_claim(login: Host, store: Store) -> str:
    """Claim the first server for a job that an ssh which connects to nothing never starts."""
    env = {"GPU_RESOURCE_SSH": "sh -c 'exec sleep 1000'"}
    login.start(["gpu-resource", "--run", "unused", "2", "2", *ON_NODE, "--", "true"], env=env)
    becomes(lambda: "unused" in tasks(store.read()))
    return next(task["lease"] for task in store.read()["servers"][0]["running_tasks"] if task["task_id"] == "unused")


def test_two_machines_of_one_name_are_refused(login: Host, node1: Host, node2: Host, store: Store) -> None:
    assert command(node1, "--run", "task", "2", "2", "--", "true").code == 0

    def another(state: Any) -> None:
        state["servers"][0].update(machine="another", boot="another")

    store.update(another)
    ran = command(node1, "--run", "task", "2", "2", "--", "true")
    assert (ran.code, "別の計算機がサーバー node1" in ran.err) == (125, True)
    assert run_any(login, "true", how=ON_NODE).code == 125
    assert command(node1, "--remove-server", "node1").code == 0
    assert command(node1, "--add-server", "node1:4:8").code == 0
    assert command(node1, "--run", "task", "2", "2", "--", "true").code == 0


# --- Whatever dies --------------------------------------------------------------------------------


def test_job_is_hung_up_when_ssh_is_killed(login: Host, node1: Host, store: Store) -> None:
    process = started(login, "sh", "-c", "sleep 1000 & echo ready; wait")
    os.kill(pids(login, "ServerAliveInterval=15")[0], signal.SIGKILL)
    process.wait()
    becomes(lambda: tasks(store.read()) == [])
    assert pids(node1, "sleep") == []


def test_job_is_hung_up_when_the_session_of_sshd_is_killed(login: Host, node1: Host, store: Store) -> None:
    process = started(login)
    for pid in node1.sshd_sessions():
        os.kill(pid, signal.SIGKILL)
    assert process.wait() == 255
    becomes(lambda: tasks(store.read()) == [])
    assert pids(node1, "sleep") == []


def test_job_outlives_the_command_that_started_it_only_with_its_gpus(login: Host, node1: Host, store: Store) -> None:
    process = started(login)
    process.kill()  # what ssh it has started goes on, as a job here would
    process.wait()
    assert tasks(store.read()) == ["task"]
    for pid in pids(login, "ServerAliveInterval=15"):
        os.kill(pid, signal.SIGKILL)
    becomes(lambda: tasks(store.read()) == [])


def test_one_command_there_takes_back_what_died_there(login: Host, node1: Host, node2: Host, store: Store) -> None:
    process = started(login)
    for word in ("--take", "gpu-keeper", "sleep"):
        for pid in pids(node1, word):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    command(login, "--reclaim")
    command(node2, "--reclaim")
    assert tasks(store.read()) == ["task"], "only that machine can know"
    assert "回収完了: task" in command(node1, "--reclaim").out
    assert tasks(store.read()) == []
    assert "回収完了: なし" in command(node1, "--reclaim").out


def test_reboot_ends_the_jobs_of_that_machine_only(login: Host, node1: Host, node2: Host, store: Store) -> None:
    first = started(login)
    other = login.start(["gpu-resource", "--run", "other", "2", "2", "--on", "node2", "--", "sh", "-c", READY])
    assert other.stdout is not None and other.stdout.readline() == b"ready\n"
    node1.reboot()
    assert first.wait() == 255
    assert sorted(tasks(store.read())) == ["other", "task"]
    command(node1, "--reclaim")
    assert tasks(store.read()) == ["other"]
    node1.switch_off()
    other.send_signal(signal.SIGTERM)
    other.wait()


def test_cut_network_is_noticed_there_and_nothing_is_held(login: Host, node1: Host, store: Store) -> None:
    process = started(login)
    node1.cut_network()
    becomes(lambda: pids(node1, "sleep") == [])
    node1.join_network()
    process.send_signal(signal.SIGTERM)
    process.wait()
    command(node1, "--reclaim")
    assert tasks(store.read()) == []


def test_nobody_waits_for_a_login_host_that_has_died(login: Host, node1: Host, node2: Host, store: Store) -> None:
    held = command(node1, "--allocate", "held", "4", "8", "--prefer-server", "node1")
    assert held.code == 0
    login.start(["gpu-resource", "--run", "waiter", "4", "8", *ON_NODE, "--wait", "--", "true"])
    becomes(lambda: "waiter" in tasks(store.read()))
    login.kill()

    def a_minute_later(state: Any) -> None:
        for record in [*state["waiting"], *state["servers"][0]["running_tasks"]]:
            if "seen" in record:
                record["seen"] -= LAPSE_S + 1

    store.update(a_minute_later)
    command(node1, "--release", "held")
    assert command(node1, "--run", "next", "4", "8", "--", "hostname").out == "node1\n"
    assert tasks(store.read()) == []


def test_server_that_died_for_good_blocks_its_own_gpus_only(login: Host, node1: Host, store: Store) -> None:
    process = started(login)
    node1.kill()
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert command(login, "--disable", "node1", "--reason", "dead").code == 0
    assert run_any(login, "hostname", how=("--any",)).code != 0, "its task is still there"
    assert command(login, "--release", "task", "--force").code == 0
    assert run_any(login, "hostname").out == "node2\n"
    assert command(login, "--enable", "node1").code == 0


def is_ours(words: Sequence[str]) -> bool:
    """Tell whether a process is of a command of ours, of ssh, or of a session of sshd."""
    at = " ".join(words[:3])
    return "gpu-" in at or at.startswith("ssh ") or (at.startswith("sshd") and "[listener]" not in " ".join(words))


def test_random_kills_leave_nothing_behind_and_share_no_gpu(login: Host, node1: Host, node2: Host, lab: Lab) -> None:
    """Whatever is killed at whatever step: no GPU has two living jobs, and one command on each machine frees all."""
    chance = random.Random(14)
    marks = lab.directory / "marks"
    marks.mkdir(exist_ok=True)
    marks.chmod(0o1777)
    # Each GPU of a host is a file that a job locks while it lives, with all its processes.
    script = (
        f'h=$(hostname); for g in $(echo $CUDA_VISIBLE_DEVICES | tr , " "); do d={marks}/$h-$g; '
        f"exec 7>>$d; flock -n 7 || echo $d >>{marks}/shared; "
        f'eval "exec 1$g>&7"; done; echo >>{marks}/ran; sleep $1'
    )
    running: list[Process] = []
    for number in range(60):
        how = ["--any"] if number % 3 else ["--on", chance.choice(["node1", "node2"])]
        words = ["gpu-resource", "--run", f"job-{number}", "2", "1", *how, "--wait", "60", "--"]
        running.append(login.start([*words, "bash", "-c", script, "bash", str(chance.uniform(0.5, 2))]))
        time.sleep(chance.random() / 5)
        victims = [pid for host in (login, node1, node2) for pid, found in host.processes().items() if is_ours(found)]
        if victims and number % 2:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(victims), signal.SIGKILL)
    while any(process.poll() is None for process in running):  # what the timer does, for some wait for the dead
        for host in (node1, node2):
            command(host, "--reclaim")
    store = store_of(lab)

    def all_free() -> bool:
        for host in (login, node1, node2):
            command(host, "--reclaim")
        return tasks(store.read()) == []

    becomes(all_free)
    assert not (marks / "shared").exists(), (marks / "shared").read_text()
    assert (marks / "ran").read_text().count("\n") > 20
