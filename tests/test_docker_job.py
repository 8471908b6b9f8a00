"""A job in a container: what docker is told, and that the GPUs are held until the container has ended.

Each test that needs no GPU runs on a stand-in for docker and, where root has one installed, on a real engine. That has
no GPUs to give, so ``--gpus`` is taken out of what it is told.
"""

from __future__ import annotations

import contextlib
import csv
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import IO, Any
from unittest.mock import ANY

import pytest
from conftest import ALICE, GUARD_S, LAB, PROJECT, Children, become, running
from database_servers import is_alive, wait_until
from docker_stand_in import IMAGE
from screens import CLI, Result, cli, finish, start
from test_readme import JAPANESE, bash

from gpu_resource_extensions.docker_job import ContainerError, docker_arguments, main
from gpu_resource_extensions.leases import descendants

pytestmark = pytest.mark.usefixtures("made_pool")

JOB = [sys.executable, "-m", "gpu_resource_extensions.docker_job"]
UNTIL_END = "until [ -e end ]; do sleep 0.1; done"  # for a shell in a container, whose directory is that of the test
ALLOCATION = {"task_id": "my_training", "gpu_devices": "2,3", "cpu_count": 8}

#: notes what ``docker run`` is told, and leaves ``--gpus`` to it only if it is told so
WRAPPER = """#!/bin/sh
if [ "$1" = run ]; then
    printf '%s\\0' "$@" >"$DOCKER_CALL"
    shift
    left=$#
    while [ $left -gt 0 ]; do
        word=$1 left=$((left - 1))
        shift
        if [ "$word" = --gpus ] && [ -z "$KEEP_GPUS" ]; then
            shift
            left=$((left - 1))
        else
            set -- "$@" "$word"
        fi
    done
    set -- run OPTIONS "$@"
fi
exec PROGRAM "$@"
"""
# The daemon lives no longer than the pipe that is our standard input.
RUN = """
exec 3<&0
"$@" </dev/null 3<&- & daemon=$!
{ cat <&3; kill $daemon; } & watcher=$!
exec 3<&-
wait $daemon; kill $watcher
"""


class Docker:
    """A daemon in a directory of its own, and a ``bin`` whose ``docker`` asks it."""

    def __init__(self, directory: Path, daemon: list[str], program: str, options: str = "") -> None:
        self.directory, self.daemon = directory, daemon
        wrapper = directory / "bin" / "docker"
        wrapper.parent.mkdir()
        wrapper.write_text(WRAPPER.replace("PROGRAM", program).replace("OPTIONS", options))
        wrapper.chmod(0o755)
        self.environment = {
            "PATH": f"{directory / 'bin'}:{os.environ['PATH']}",
            "DOCKER_HOST": f"unix://{directory / 'socket'}",
            "DOCKER_CALL": str(directory / "call"),
            "GPU_RESOURCE_SERVER": "gpu-server-0",
            "PYTHONPATH": str(PROJECT),
        }
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", RUN, "sh", *self.daemon], env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        wait_until(lambda: self.process.poll() is not None or self("ps", "--filter", "label=x").code == 0, "a daemon")

    def end(self) -> None:
        self.process.communicate()
        for found in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                # A killed one leaves those that look after containers; a busy one may lose a container altogether.
                looks_after = f"{self.directory}/exec/" in (found / "cmdline").read_text("utf-8", "replace")
                if looks_after or f"{self.directory}/data/" in (found / "mountinfo").read_text("utf-8", "replace"):
                    os.kill(int(found.name), signal.SIGKILL)

    def __call__(self, *words: str, stdin: IO[bytes] | None = None) -> Result:
        environment = {**os.environ, **self.environment}
        done = subprocess.run(["docker", *words], env=environment, stdin=stdin, capture_output=True, encoding="utf-8")
        return Result(done.returncode, done.stdout, done.stderr)

    def told(self) -> list[str]:
        """Return the words of the last ``docker run``."""
        return (self.directory / "call").read_text("utf-8").split("\0")[:-1]

    def containers(self, task_id: str = "job") -> list[str]:
        """Return the containers of a task, as the page says that they are found."""
        return self("ps", "--all", "--quiet", "--filter", f"label=gpu-resource.task={task_id}").out.split()

    def start_job(self, *words: str, task_id: str = "job", **options: Any) -> subprocess.Popen[bytes]:
        asked = [str(CLI), "--run", task_id, "2", "1", "--", *JOB]
        return start(*asked, *words, env={**self.environment, **options.pop("env", {})}, **options)

    def job(self, *words: str, **options: Any) -> Result:
        return finish(self.start_job(*words, **options))

    @contextlib.contextmanager
    def running_job(self, *words: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        """Start a job; at the end of the block its container is killed, if it is there yet."""
        job = self.start_job(*words, **options)
        try:
            yield job
        finally:
            for container in self.containers(options.get("task_id", "job")):
                self("kill", container)
            if job.returncode is None:
                job.communicate(timeout=GUARD_S)


@contextlib.contextmanager
def stand_in() -> Iterator[Docker]:
    with tempfile.TemporaryDirectory(prefix="gpu-test-") as name:
        directory, source = Path(name), PROJECT / "tests" / "docker_stand_in.py"
        client = directory / "client" / "docker"
        client.parent.mkdir()
        client.write_text(f"#!{sys.executable} -IS\n{source.read_text('utf-8')}", "utf-8")
        client.chmod(0o755)
        docker = Docker(directory, [sys.executable, str(source), str(directory / "socket")], str(client))
        yield docker
        docker.end()


@contextlib.contextmanager
def engine() -> Iterator[Docker]:
    """A real engine, which has no network and one image, with nothing but a busybox in it."""
    if os.geteuid() != 0:
        pytest.skip("only root can start dockerd")
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    places = {name: shutil.which(name, path=path) for name in ("dockerd", "docker", "busybox", "unshare")}
    if missing := [name for name, place in places.items() if not place]:
        pytest.skip(f"no {', no '.join(missing)} to test with (Debian: docker.io, busybox-static)")
    with tempfile.TemporaryDirectory(prefix="gpu-test-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        # Of what it mounts, nothing is left when it is killed.
        daemon = ["unshare", "--mount", str(places["dockerd"]), f"--data-root={name}/data", f"--exec-root={name}/exec"]
        daemon += [f"--host=unix://{name}/socket", f"--pidfile={name}/pid", "--storage-driver=vfs"]
        daemon += ["--iptables=false", "--ip6tables=false", "--bridge=none"]
        docker = Docker(directory, daemon, str(places["docker"]), "--network=none")
        try:
            root = directory / "image"
            (root / "bin").mkdir(parents=True)
            shutil.copy(str(places["busybox"]), root / "bin" / "busybox")
            for applet in ("sh", "cat", "id", "sleep", "touch", "echo", "true"):
                (root / "bin" / applet).symlink_to("busybox")
            with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as tar:
                made = docker("import", "-", IMAGE, stdin=tar.stdout)
            tried = docker("run", "--rm", "--init", IMAGE, "true")
            if made.code or tried.code:
                log = (directory / "log").read_text("utf-8").splitlines()[-1:]
                pytest.skip(f"the engine here runs no container: {made.err} {tried.err} {log}")
            yield docker
        finally:
            docker.end()


ENGINE = pytest.param(engine, id="engine", marks=pytest.mark.services)


@pytest.fixture(scope="module", params=[pytest.param(stand_in, id="stand-in"), ENGINE])
def docker(request: pytest.FixtureRequest) -> Iterator[Docker]:
    with request.param() as made:
        yield made


on_engine = pytest.mark.parametrize("docker", [ENGINE], indirect=True)
on_stand_in = pytest.mark.parametrize("docker", [stand_in], ids=["stand-in"], indirect=True)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs start in the directory of the test; of what we run in they get neither GPUs nor ignored signals."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "OMP_NUM_THREADS",
        "GPU_TASK_THREADS",
        "GPU_TASK_CPUS",
        "GPU_TASK_ID",
        "CUDA_VISIBLE_DEVICES",
        "KEEP_GPUS",
    ):
        monkeypatch.delenv(name, raising=False)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGQUIT)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def valued(words: list[str], option: str) -> list[str]:
    """Return the values of an option that is given once or more."""
    return [value for name, value in pairwise(words) if name == option]


# --- What docker is told --------------------------------------------------------------------------


def test_options_of_an_allocation(tmp_path: Path) -> None:
    words = docker_arguments(ALLOCATION)
    place = f'type=bind,"source={tmp_path}","target={tmp_path}"'
    expected = [
        *("--init", "--gpus", '"device=2,3"', "--cpus", "8"),
        *("--env", "CUDA_VISIBLE_DEVICES=0,1", "--env", "CUDA_DEVICE_ORDER=PCI_BUS_ID", "--env", "OMP_NUM_THREADS=8"),
        *("--env", "GPU_TASK_ID=my_training", "--env", "GPU_TASK_CPUS=8", "--env", "GPU_TASK_THREADS=8"),
        *("--user", f"{os.getuid()}:{os.getgid()}"),
        *("--mount", place, "--workdir", str(tmp_path), "--label", "gpu-resource.task=my_training"),
    ]
    assert [word for word in words if word not in [*valued(words, "--group-add"), "--group-add"]] == expected


@pytest.mark.parametrize(("gpus", "inside"), [("5", "0"), ("2,3", "0,1"), ("0,1,2,3,4,5,6,7", "0,1,2,3,4,5,6,7")])
def test_granted_gpus_are_one_value_and_numbered_from_0_inside(gpus: str, inside: str) -> None:
    words = docker_arguments({**ALLOCATION, "gpu_devices": gpus})
    [value] = valued(words, "--gpus")
    assert [*csv.reader([value])] == [[f"device={gpus}"]], "docker reads it as CSV"
    assert f"CUDA_VISIBLE_DEVICES={inside}" in valued(words, "--env")


def test_number_of_threads_of_the_user_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    words = docker_arguments(ALLOCATION)
    assert "OMP_NUM_THREADS=4" in valued(words, "--env")
    assert valued(words, "--cpus") == ["8"]


def test_container_is_of_the_user_and_all_their_groups(lab: Path, children: Children) -> None:
    def work() -> None:
        become(ALICE, [LAB, LAB + 1, ALICE], 0o022)
        os.chdir("/")
        words = docker_arguments(ALLOCATION)
        assert valued(words, "--user") == [f"{ALICE}:{ALICE}"]
        assert sorted(valued(words, "--group-add")) == [str(LAB), str(LAB + 1)]

    assert children.run(work) == 0


@pytest.mark.parametrize("name", ["a b", 'a,b="c"', "a:b", "実験", "a'b$c"])
def test_directory_of_any_name_is_that_of_the_container(
    name: str, docker: Docker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    [value] = valued(docker_arguments(ALLOCATION), "--mount")
    assert [*csv.reader([value])] == [["type=bind", f"source={tmp_path / name}", f"target={tmp_path / name}"]]
    assert docker.job(IMAGE, "sh", "-c", "pwd; echo made >file").out == f"{tmp_path / name}\n"
    assert (tmp_path / name / "file").read_text() == "made\n"


def test_directory_that_has_been_removed_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ContainerError, match="今のディレクトリ"):
        docker_arguments(ALLOCATION)


# --- A job in a container -------------------------------------------------------------------------


def test_container_gets_what_was_granted_and_the_pool_gets_it_back(docker: Docker, pool: Path) -> None:
    assert cli("--allocate", "other", "2", "1").code == 0
    script = 'echo "$CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER $OMP_NUM_THREADS $GPU_TASK_ID"'
    assert docker.job(IMAGE, "sh", "-c", script) == (0, "0,1 PCI_BUS_ID 1 job\n", ANY)
    told = docker.told()
    assert told[:2] == ["run", "--init"]
    assert valued(told, "--gpus") == ['"device=2,3"']
    assert valued(told, "--cpus") == ["1"]
    assert (running(pool), docker.containers()) == (["other"], [])


def test_number_of_cpus_is_what_was_granted_whatever_the_threads(docker: Docker) -> None:
    assert docker.job(IMAGE, "true", env={"OMP_NUM_THREADS": "4"}).code == 0
    assert valued(docker.told(), "--cpus") == ["1"]
    assert "OMP_NUM_THREADS=4" in valued(docker.told(), "--env")


@on_engine
def test_files_in_the_container_are_those_of_the_user(docker: Docker, lab: Path, children: Children) -> None:
    os.chmod(docker.directory / "socket", 0o666)
    os.chmod(docker.directory, 0o777)  # what is noted

    def work() -> None:
        os.chdir(lab)
        become(ALICE, [LAB, ALICE], 0o022)
        os.environ.update(docker.environment, GPU_TASK_ID="job", CUDA_VISIBLE_DEVICES="0,1", GPU_TASK_CPUS="1")
        assert main([IMAGE, "sh", "-c", "(id -u; id -g; id -G) >file"]) == 0

    assert children.run(work) == 0
    assert (lab / "file").read_text() == f"{ALICE}\n{ALICE}\n{ALICE} {LAB}\n"
    assert (os.stat(lab / "file").st_uid, os.stat(lab / "file").st_gid) == (ALICE, ALICE)


def test_streams_are_those_of_the_job(docker: Docker) -> None:
    read, write = os.pipe()
    with docker.running_job(IMAGE, "sh", "-c", "cat; echo error >&2", stdin=read) as job:
        os.close(read)
        text = b"line\n" * 100_000
        with open(write, "wb") as file, ThreadPoolExecutor() as pool:
            answer = pool.submit(job.communicate)
            file.write(text)
            file.close()
            out, err = answer.result()
    assert (job.returncode, out) == (0, text)
    assert err.endswith(b"error\n")


@pytest.mark.parametrize("code", [0, 1, 125, 126, 127, 143])
def test_exit_code_is_that_of_the_container(code: int, docker: Docker, pool: Path) -> None:
    assert docker.job(IMAGE, "sh", "-c", f"exit {code}").code == code
    assert running(pool) == []


@pytest.mark.parametrize(("command", "code"), [("no-such-command", 127), ("/etc", 126), ("/tmp/..", 126)])
def test_command_that_cannot_be_run_has_the_code_of_docker(command: str, code: int, docker: Docker) -> None:
    result = docker.job(IMAGE, command)
    assert (result.code, command in result.err) == (code, True)


def test_command_that_a_signal_has_ended_has_the_code_of_a_shell(docker: Docker) -> None:
    assert docker.job(IMAGE, "sh", "-c", "kill -KILL $$").code == 128 + signal.SIGKILL


def test_options_of_docker_run_may_stand_ahead_of_the_image(docker: Docker, tmp_path: Path) -> None:
    words = ["--name", "my_own", "--shm-size", "64m", "--env", "A=b", "--workdir", "/"]
    result = docker.job(*words, IMAGE, "sh", "-c", 'echo "$A"; pwd')
    assert (result.code, result.out) == (0, "b\n/\n")


@pytest.mark.parametrize("task_id", ["_", "日本語 の タスク", "a=b/c,d", "-".join(["x"] * 64)])
def test_container_of_any_task_is_named_and_found_by_it(task_id: str, docker: Docker, tmp_path: Path) -> None:
    with docker.running_job(IMAGE, "sh", "-c", f"touch ready; {UNTIL_END}", task_id=task_id) as job:
        wait_until((tmp_path / "ready").exists, "a container that runs")
        assert len(docker.containers(task_id)) == 1
        [name] = valued(docker.told(), "--name")
        assert name.startswith("gpu-" + re.sub(r"[^\w.-]", "_", task_id, flags=re.ASCII))
        (tmp_path / "end").touch()
        assert job.wait(GUARD_S) == 0
    assert docker.containers(task_id) == []


def test_two_containers_of_one_task_do_not_get_in_each_others_way(docker: Docker) -> None:
    pipe = f"{shlex.join(JOB)} {IMAGE} echo hello | {shlex.join(JOB)} {IMAGE} cat"
    asked = [str(CLI), "--run", "job", "2", "1", "--", "sh", "-c", pipe]
    assert finish(start(*asked, env=docker.environment)) == (0, "hello\n", ANY)


@on_engine
def test_recipe_of_the_page(docker: Docker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [block.text for block in JAPANESE.blocks if block.language == "sh"]
    [run] = [text for text in blocks if "-- gpu-resource-docker IMAGE python train.py" in text]
    [find] = [text for text in blocks if text.startswith("docker ps ")]
    commands = {"gpu-resource": [sys.executable, str(CLI)], "gpu-resource-docker": JOB}
    (tmp_path / "bin").mkdir()
    for name, words in commands.items():
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    for name, value in docker.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    run = run.replace(" 2 8 ", " 2 1 ").replace("IMAGE python", f"{IMAGE} sh")  # there may be but one CPU
    (tmp_path / "train.py").write_text(f'echo "$CUDA_VISIBLE_DEVICES"; touch ready; {UNTIL_END}')
    with subprocess.Popen(["bash", "-c", run], stdout=subprocess.PIPE) as job:
        wait_until((tmp_path / "ready").exists, "a container that runs")
        found = bash(find.splitlines()[0], tmp_path).splitlines()[1].split()
        assert found[1] == IMAGE
        bash(find.replace("CONTAINER", found[0]), tmp_path)
        assert job.communicate(timeout=GUARD_S)[0] == b"0,1\n"
        assert job.returncode == 128 + signal.SIGKILL


# --- What docker refuses --------------------------------------------------------------------------


def test_image_that_is_nowhere(docker: Docker, pool: Path) -> None:
    result = docker.job("no-such-image", "true", env={"GPU_RESOURCE_LANG": "en"})
    assert result.code == 125
    assert "docker: Error response from daemon: " in result.err
    assert "What to do: " in result.err
    assert running(pool) == []


def test_daemon_that_cannot_be_reached(docker: Docker, tmp_path: Path) -> None:
    result = docker.job(IMAGE, "true", env={"DOCKER_HOST": f"unix://{tmp_path}/nobody"})
    assert result.code == 125
    assert "Cannot connect to the Docker daemon" in result.err
    assert "docker ps" in result.err


@on_engine
def test_engine_that_has_no_gpus_to_give(docker: Docker, pool: Path) -> None:
    if shutil.which("nvidia-container-runtime-hook") or shutil.which("nvidia-ctk"):
        pytest.skip("this engine may have GPUs to give")
    result = docker.job(IMAGE, "true", env={"KEEP_GPUS": "1"})
    assert result.code == 125
    assert 'could not select device driver "" with capabilities: [[gpu]]' in result.err
    assert "NVIDIA Container Toolkit" in result.err
    assert running(pool) == []


def test_docker_that_is_not_installed() -> None:
    asked = [str(CLI), "--run", "job", "2", "1", "--", *JOB, IMAGE, "true"]
    here = {"PATH": "/no/such/place", "GPU_RESOURCE_SERVER": "gpu-server-0", "PYTHONPATH": str(PROJECT)}
    result = finish(start(*asked, env=here))
    assert result.code == 127
    assert "docker: No such file" in result.err


@pytest.mark.parametrize("missing", ["GPU_TASK_ID", "GPU_TASK_CPUS", "CUDA_VISIBLE_DEVICES"])
def test_job_without_gpus_is_refused(missing: str) -> None:
    granted = {"GPU_TASK_ID": "job", "CUDA_VISIBLE_DEVICES": "0,1", "GPU_TASK_CPUS": "1", "PYTHONPATH": str(PROJECT)}
    result = finish(start(*JOB[1:], IMAGE, "true", env={**granted, missing: ""}))
    assert (result.code, result.out) == (125, "")
    assert result.err.startswith("✗ ") and "gpu-resource --run NAME GPUS CPUS -- gpu-resource-docker " in result.err


@pytest.mark.parametrize(("words", "code"), [([], 125), (["--help"], 0)])
def test_usage_is_shown(words: list[str], code: int) -> None:
    result = finish(start(*JOB[1:], *words, env={"PYTHONPATH": str(PROJECT)}))
    assert result.code == code
    assert "gpu-resource --run NAME GPUS CPUS -- gpu-resource-docker" in result.err


# --- Its end --------------------------------------------------------------------------------------


def client_of(run: int) -> int:
    """Return the docker client of a ``--run``."""
    [found] = [process.pid for process in descendants(run) if " --init " in process.command]
    return found


def kill_client_of(run: int) -> None:
    """Kill the docker client of a ``--run``, and wait until docker has been asked for the end of its container."""
    os.kill(client_of(run), signal.SIGKILL)
    wait_until(lambda: asks_for_the_end(run), "a docker wait")


def asks_for_the_end(run: int) -> bool:
    for process in descendants(run):
        if " wait " in process.command:
            with contextlib.suppress(OSError):  # it has ended
                return any(os.readlink(it).startswith("socket:") for it in Path(f"/proc/{process.pid}/fd").iterdir())
    return False


@contextlib.contextmanager
def a_job(docker: Docker, *options: str, ignored: bool = False) -> Iterator[subprocess.Popen[bytes]]:
    """Start a job whose container runs until there is a file ``end``; it then exits 3, and 5 on a signal."""
    trap = f"trap '{'' if ignored else 'exit 5'}' TERM INT HUP QUIT USR1 USR2"
    with docker.running_job(*options, IMAGE, "sh", "-c", f"{trap}; touch ready; {UNTIL_END}; exit 3") as run:
        wait_until(Path("ready").exists, "a container that runs")
        yield run


def is_held(pool: Path) -> bool:
    """Tell whether the GPUs of the job are held, after a command that takes back what is not."""
    assert cli("--reclaim").code == 0
    return running(pool) == ["job"]


@pytest.mark.parametrize("number", ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2"])
def test_signal_reaches_the_container(number: str, docker: Docker, pool: Path) -> None:
    with a_job(docker) as it:
        it.send_signal(signal.Signals[f"SIG{number}"])
        assert it.wait(GUARD_S) == 5
    assert running(pool) == []


def test_term_to_a_container_that_does_not_end_is_followed_by_kill(docker: Docker) -> None:
    with a_job(docker, "--stop-timeout", "1", ignored=True) as it:
        it.terminate()
        assert it.wait(GUARD_S) == 128 + signal.SIGKILL


def test_gpus_are_held_until_the_container_has_ended_though_its_client_is_killed(docker: Docker, pool: Path) -> None:
    with a_job(docker) as it:
        kill_client_of(it.pid)
        assert is_held(pool)
        Path("end").touch()
        _, err = it.communicate(timeout=GUARD_S)
        assert it.returncode == 3, "that of the container"
        assert "注意: docker のクライアントが終了しました" in err.decode()
    assert (running(pool), docker.containers()) == ([], [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_reaches_a_container_whose_client_was_killed(number: int, docker: Docker) -> None:
    with a_job(docker) as it:
        kill_client_of(it.pid)
        it.send_signal(number)
        assert it.wait(GUARD_S) == 5


def test_name_that_the_user_has_given_changes_nothing(docker: Docker, pool: Path) -> None:
    with a_job(docker, "--name", "my_own") as it:
        kill_client_of(it.pid)
        assert is_held(pool)
        it.terminate()
        assert it.wait(GUARD_S) == 5


def test_gpus_are_held_until_the_container_has_ended_though_the_job_is_killed(docker: Docker, pool: Path) -> None:
    with a_job(docker) as it:
        [job] = [process.pid for process in descendants(it.pid) if "docker_job" in process.command]
        os.kill(job, signal.SIGKILL)
        assert it.wait(GUARD_S) == 128 + signal.SIGKILL
        assert is_held(pool)
        Path("end").touch()
        wait_until(lambda: not is_held(pool), "the end of the task")
    assert docker.containers() == []


def test_stop_ends_the_container_and_leaves_none(docker: Docker, pool: Path) -> None:
    with a_job(docker) as it:
        assert cli("--stop", "job").code == 0
        assert (docker.containers(), running(pool)) == ([], [])
        assert it.wait(GUARD_S) == 5


@on_engine
@pytest.mark.parametrize("is_client_killed", [False, True])
def test_stop_ends_a_container_that_ignores_it_ahead_of_its_own_kill(
    is_client_killed: bool, docker: Docker, pool: Path
) -> None:
    with a_job(docker, ignored=True) as it:
        if is_client_killed:
            kill_client_of(it.pid)
        assert cli("--stop", "job").code == 0
        assert (docker.containers(), running(pool)) == ([], [])
        assert it.wait(GUARD_S) == 128 + signal.SIGKILL


def test_container_is_ended_though_stop_kills_all_of_ours_ahead_of_it(docker: Docker) -> None:
    with a_job(docker, "--stop-timeout", "4", ignored=True):
        assert cli("--stop", "job", "--grace", "3").code == 0
        wait_until(lambda: not docker.containers(), "the end of the container")


def test_container_that_is_left_when_all_of_ours_is_killed_is_found_and_removed(docker: Docker) -> None:
    with a_job(docker) as it:
        for pid in [it.pid, *(process.pid for process in descendants(it.pid))]:
            with contextlib.suppress(ProcessLookupError):  # it has ended with the one before
                os.kill(pid, signal.SIGKILL)
        [container] = docker.containers()
        assert docker("rm", "--force", container).code == 0
        assert docker.containers() == []


@on_stand_in
def test_gpus_are_held_by_a_container_whose_client_is_killed_while_it_starts(
    docker: Docker, pool: Path, tmp_path: Path
) -> None:
    (docker.directory / "slow").touch()
    with docker.running_job(IMAGE, "sh", "-c", f"touch ready; {UNTIL_END}; exit 3") as job:
        wait_until(docker.containers, "a container that starts")
        client = client_of(job.pid)
        os.kill(client, signal.SIGKILL)
        wait_until(lambda: not is_alive(client), "the end of the client")
        assert is_held(pool)
        (docker.directory / "slow").unlink()
        wait_until((tmp_path / "ready").exists, "a container that runs")
        wait_until(lambda: asks_for_the_end(job.pid), "a docker wait")
        assert is_held(pool)
        (tmp_path / "end").touch()
        job.communicate(timeout=GUARD_S)
        assert job.returncode == 3


@on_engine
@pytest.mark.parametrize("share", range(10))
def test_client_killed_at_any_moment_leaves_no_container(share: int, docker: Docker, pool: Path) -> None:
    with docker.running_job(IMAGE, "sh", "-c", "exit 3") as job:
        wait_until(lambda: [it for it in descendants(job.pid) if " --init " in it.command], "a client")
        [client] = [it.pid for it in descendants(job.pid) if " --init " in it.command]
        time.sleep(share / 20)  # a start takes about half a second
        with contextlib.suppress(ProcessLookupError):
            os.kill(client, signal.SIGKILL)
        job.communicate(timeout=GUARD_S)
    assert job.returncode in (3, 128 + signal.SIGKILL)
    assert (docker.containers(), running(pool)) == ([], [])


@pytest.mark.services
def test_gpus_are_held_until_a_daemon_that_was_killed_tells_that_the_container_has_ended(pool: Path) -> None:
    with engine() as docker, a_job(docker) as it:
        pids = [int((docker.directory / name).read_text()) for name in ("pid", "exec/containerd/containerd.pid")]
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "the end of the daemon")
        assert is_held(pool)
        assert it.poll() is None
        docker.start()  # which ends what ran
        assert it.wait(GUARD_S) != 0
        assert not is_held(pool)


# --- At a terminal --------------------------------------------------------------------------------


class Terminal:
    """A command at a terminal of its own, whose session it leads."""

    def __init__(self, docker: Docker, *words: str) -> None:
        environment = {**os.environ, **docker.environment}
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execve(words[0], [*words], environment)
        self.shown = b""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.terminal)

    def read_until(self, text: str) -> None:
        while text.encode() not in self.shown:
            assert select.select([self.terminal], [], [], GUARD_S)[0], self.shown
            self.shown += os.read(self.terminal, 4096)

    def type(self, keys: bytes) -> None:
        os.write(self.terminal, keys)

    def code(self) -> int:
        """Return the exit code, once all that is shown has been read."""
        with contextlib.suppress(OSError):  # nobody has the other end any more
            self.read_until("\0")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def at_terminal(docker: Docker, *words: str) -> Terminal:
    return Terminal(docker, sys.executable, str(CLI), "--run", "job", "2", "1", "--", *JOB, *words)


SHELL = "trap 'exit 5' INT; echo ready; until [ -e end ]; do sleep 0.1; done; exit 3"


def test_ctrl_c_at_a_terminal_reaches_the_container(docker: Docker, pool: Path) -> None:
    with at_terminal(docker, IMAGE, "sh", "-c", SHELL) as it:
        it.read_until("ready")
        it.type(b"\x03")
        assert it.code() == 5
    assert {"--interactive", "--tty"} <= {*docker.told()}
    assert running(pool) == []


def test_container_that_ignores_the_first_ctrl_c_gets_the_second(docker: Docker) -> None:
    script = f"trap 'echo once; trap \"exit 5\" INT' INT; {SHELL.partition(';')[2]}"
    with at_terminal(docker, IMAGE, "sh", "-c", script) as it:
        it.read_until("ready")
        it.type(b"\x03")
        it.read_until("once")
        it.type(b"\x03")
        assert it.code() == 5


def test_output_to_a_pipe_gets_no_terminal(docker: Docker) -> None:
    piped = f"{shlex.join([sys.executable, str(CLI), '--run', 'job', '2', '1', '--', *JOB])} {IMAGE} sh -c"
    with Terminal(docker, "/bin/sh", "-c", f"{piped} {shlex.quote(SHELL)} | cat; true") as it:
        it.read_until("ready")
        it.type(b"\x03")
        it.code()
    assert "--interactive" in docker.told()
    assert "--tty" not in docker.told()


def test_job_in_the_background_leaves_the_terminal_alone(docker: Docker) -> None:
    job = shlex.join([sys.executable, str(CLI), "--run", "job", "2", "1", "--", *JOB, IMAGE, "cat"])
    with Terminal(docker, "/bin/bash", "-c", f"set -m; {job} & wait $!") as it:
        assert it.code() == 0
    assert not {"--interactive", "--tty"} & {*docker.told()}


@on_engine
def test_terminal_is_as_it_was_when_the_client_is_killed(docker: Docker, tmp_path: Path) -> None:
    with at_terminal(docker, IMAGE, "sh", "-c", SHELL) as it:
        before = termios.tcgetattr(it.terminal)
        it.read_until("ready")
        assert termios.tcgetattr(it.terminal) != before, "raw, for the container has a terminal of its own"
        kill_client_of(it.pid)
        wait_until(lambda: termios.tcgetattr(it.terminal) == before, "the terminal as it was")
        it.type(b"\x03")
        assert it.code() == 5


@on_engine
def test_gpus_are_held_by_a_container_that_was_detached_from(docker: Docker, pool: Path, tmp_path: Path) -> None:
    with at_terminal(docker, IMAGE, "sh", "-c", SHELL) as it:
        it.read_until("ready")
        it.type(b"\x10\x11")
        it.read_until("コンテナが終わるまで")
        wait_until(lambda: asks_for_the_end(it.pid), "a docker wait")
        assert is_held(pool)
        (tmp_path / "end").touch()
        assert it.code() == 3
