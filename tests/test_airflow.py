"""GPUs for the tasks of Airflow: each dag runs as somebody who tries it out runs it, by ``airflow dags test``."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import PROJECT
from database_servers import is_alive, wait_until
from test_readme import ENGLISH, JAPANESE, Page

from gpu_resource_extensions.airflow_keeper import end_tasks
from gpu_resource_extensions.airflow_provider import get_provider_info
from gpu_resource_manager_v01 import GPUResourceManagerV01, host_name, placed_tasks

PYTHON_VARIABLE = "GPU_TEST_AIRFLOW_PYTHON"
GPUS, CPUS = 8, 64
LIMIT_S = 300
DAGS_TEST = "-m", "airflow", "dags", "test"


@pytest.fixture
def manager(tmp_path: Path) -> GPUResourceManagerV01:
    """Of a pool with this machine and another server."""
    return new_pool(tmp_path)


def new_pool(directory: Path) -> GPUResourceManagerV01:
    servers = [("another", GPUS, CPUS), (host_name(), GPUS, CPUS)]
    return GPUResourceManagerV01(directory / "pool.json", servers=servers)


def held(manager: GPUResourceManagerV01) -> list[str]:
    return [task["task_id"] for _, task in placed_tasks(manager.get_detailed_status())]


def waiting(manager: GPUResourceManagerV01) -> list[str]:
    return [request["task_id"] for request in manager.get_detailed_status().get("waiting", ())]


# --- The keeper, with a task and a worker of our own -------------------------------------------------------------

# A worker starts a task and waits. The task says who is who: itself, a process in a session of its own, a forked one.
WORKER = f"""
import os, signal, subprocess, sys
sys.path.insert(0, {str(PROJECT)!r})
from gpu_resource_extensions.airflow_keeper import kept
from gpu_resource_manager_v01 import GPUResourceManagerV01

worker, manager = os.getpid(), GPUResourceManagerV01(sys.argv[1])
if os.fork():
    os.wait()
    sys.exit()
os.setpgid(0, 0)
with manager.allocation("my_task", 2, 8, keeper=lambda lease: kept("my_task", worker, lease)):
    started = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
    forked = 0 if sys.argv[2] == "ends" else os.fork()
    if forked or sys.argv[2] == "ends":
        print(os.getpid(), started.pid, forked, flush=True)
        sys.stdin.readline()
    else:
        os.close(1)
        signal.pause()
"""


class Processes(NamedTuple):
    worker: subprocess.Popen[str]
    task: int
    started: int
    forked: int


@pytest.fixture
def at_work(manager: GPUResourceManagerV01) -> Iterator[Callable[[str], Processes]]:
    """Start a worker with a task, which ends by itself when it reads a line if it ``ends``, or waits to be killed."""
    found: list[Processes] = []

    def start(how: str) -> Processes:
        words = [sys.executable, "-c", WORKER, str(manager.resource_file), how]
        worker = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert worker.stdout
        found.append(Processes(worker, *map(int, worker.stdout.readline().split())))
        assert held(manager) == ["my_task"]
        return found[-1]

    yield start
    for processes in found:
        for pid in processes[1:]:
            if pid and is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        processes.worker.kill()
        processes.worker.communicate()


@pytest.mark.parametrize("killed", ["task", "worker", "by its name"])
def test_what_a_killed_task_or_a_task_of_a_killed_worker_has_started_ends_and_its_gpus_come_back(
    killed: str, at_work: Callable[[str], Processes], manager: GPUResourceManagerV01
) -> None:
    processes = at_work("waits")
    if killed == "by its name":  # by a teardown or the next attempt, where Airflow takes it for ended
        assert end_tasks("my_task") == []
        assert not any(map(is_alive, processes[1:]))
    else:
        os.kill(processes.task if killed == "task" else processes.worker.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, processes[1:])), "the end of the task and of what it has started")
    wait_until(lambda: manager.reclaim_ended() == ["my_task"] or not held(manager), "its GPUs")


def test_what_outlives_a_task_ends_with_it_and_the_gpus_are_given_back(
    at_work: Callable[[str], Processes], manager: GPUResourceManagerV01
) -> None:
    processes = at_work("ends")
    processes.worker.communicate("end\n")
    assert processes.worker.returncode == 0
    assert not is_alive(processes.started)
    assert "my_task" not in Path(manager.resource_file).read_text()


# --- Airflow -----------------------------------------------------------------------------------------------------


def test_airflow_is_told_of_the_distribution_by_its_own_name() -> None:
    project = (PROJECT / "pyproject.toml").read_text("utf-8")
    assert f'name = "{get_provider_info()["package-name"]}"' in project
    assert f'provider_info = "{get_provider_info.__module__}:{get_provider_info.__name__}"' in project


class Run(NamedTuple):
    state: str
    tasks: dict[str, tuple[str, int]]  # state and attempts of each, mapped ones as ``name[0]``
    xcoms: dict[str, dict[str, Any]]  # of each, by key
    log: str


class Outcome(NamedTuple):
    run: Run
    manager: GPUResourceManagerV01
    left: int  # the process that one of the tasks has left behind


class Airflow:
    """An Airflow with a home of its own."""

    def __init__(self, python: str, directory: Path) -> None:
        self.python, self.directory = python, directory
        self.home, self.dags = directory / "home", directory / "dags"
        self.dags.mkdir()
        self.call(directory, "-m", "airflow", "db", "migrate")

    def call(self, pool: Path, *words: str, codes: Container[int] = (0,), **variables: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "GPU_"))}
        environment |= {
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(self.dags),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "GPU_RESOURCE_FILE": str(pool),
            "GPU_RESOURCE_LANG": "en",
            "PYTHONPATH": f"{PROJECT}{os.pathsep}{self.dags}",
            **variables,
        }
        done = subprocess.run(
            [self.python, *words], env=environment, cwd=self.directory, capture_output=True, text=True, timeout=LIMIT_S
        )
        assert done.returncode in codes, done.stdout + done.stderr
        return done.stdout + done.stderr

    def run(
        self, pool: GPUResourceManagerV01 | Path, text: str, command: Sequence[str] = DAGS_TEST, **variables: str
    ) -> Run:
        """Run the one dag of a file; return what became of the last run."""
        pool = Path(pool.resource_file) if isinstance(pool, GPUResourceManagerV01) else pool
        for old in self.dags.glob("*.py"):
            old.unlink()
        name = re.findall(r"^def (\w+)\(", text, re.MULTILINE)[0]
        (self.dags / f"{name}.py").write_text(text, "utf-8")
        log = self.call(pool, *command, name, codes=(0, 1), **variables)
        with closing(sqlite3.connect(self.home / "airflow.db")) as database:
            select = "SELECT run_id, state FROM dag_run WHERE dag_id = ? ORDER BY id DESC LIMIT 1"
            run_id, state = database.execute(select, [name]).fetchone()
            select = "SELECT task_id, map_index, state, try_number FROM task_instance WHERE run_id = ? AND dag_id = ?"
            tasks = {
                _named(task, index): (state, tries)
                for task, index, state, tries in database.execute(select, [run_id, name])
            }
            xcoms: dict[str, dict[str, Any]] = {task: {} for task in tasks}
            select = "SELECT task_id, map_index, key, value FROM xcom WHERE run_id = ? AND dag_id = ?"
            for task, index, key, value in database.execute(select, [run_id, name]):
                xcoms[_named(task, index)][key] = _decoded(value)
        return Run(state, tasks, xcoms, log)


def _named(task: str, index: int) -> str:
    return task if index < 0 else f"{task}[{index}]"


def _decoded(value: Any) -> Any:
    """Return an XCom as it was: Airflow has made it JSON, and its database once more."""
    for _ in range(2):
        value = json.loads(value) if isinstance(value, str) and value.startswith(("{", "[", '"')) else value
    return value


@pytest.fixture(scope="session")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Airflow:
    python = os.environ.get(PYTHON_VARIABLE)
    if not python:
        pytest.skip(f"{PYTHON_VARIABLE} names no python with Airflow, as .ci/install-airflow makes one")
    return Airflow(python, tmp_path_factory.mktemp("airflow"))


def dag(body: str, **arguments: object) -> str:
    """Return the file of a dag of these lines."""
    given = "".join(f", {name}={value!r}" for name, value in arguments.items())
    head = f"""\
        import os, subprocess, time
        from datetime import timedelta
        from functools import cached_property
        from airflow.providers.standard.operators.bash import BashOperator
        from airflow.sdk import dag, task, task_group
        from gpu_resource_extensions.airflow_tasks import ObtainGPUs, gpu_allocation, use_gpus

        SEEN = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "OMP_NUM_THREADS", "GPU_TASK_ID"

        @dag(schedule=None{given})
        def of_test():
        """
    return textwrap.dedent(head) + textwrap.indent(textwrap.dedent(body), "    ") + "\n\nfound = of_test()\n"


def outcome(airflow: Airflow, text: str, directory: Path) -> Outcome:
    """Run a dag, one task of which writes to ``LEFT`` what it leaves behind."""
    manager = new_pool(directory)
    run = airflow.run(manager, text, LEFT=str(directory / "left"))
    return Outcome(run, manager, int((directory / "left").read_text()))


DECORATED = dag("""
    @task
    @gpu_allocation(2, 8)
    def sees(seed):
        return {name: os.environ[name] for name in SEEN}

    @task
    def after():
        return [name for name in SEEN if name in os.environ]

    @gpu_allocation(2, 8)
    @task
    def the_other_way_round():
        return os.environ["CUDA_VISIBLE_DEVICES"]

    @task
    @gpu_allocation(2, 8)
    async def asynchronous():
        return os.environ["CUDA_VISIBLE_DEVICES"]

    @task(retries=1, retry_delay=timedelta(0))
    @gpu_allocation(8, 8)
    def fails_once(ti=None):
        if ti.try_number == 1:
            quiet = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.DEVNULL)
            left = subprocess.Popen(["sleep", "600"], start_new_session=True, **quiet)
            open(os.environ["LEFT"], "w").write(str(left.pid))
            raise ValueError("on purpose")
        return os.environ["CUDA_VISIBLE_DEVICES"]

    @task(retries=3)
    @gpu_allocation(9, 8)
    def impossible():
        pass

    @task.bash
    @gpu_allocation(2, 8)
    def of_another_kind():
        return "true"

    sees.expand(seed=[1, 2]) >> after()
    the_other_way_round(), asynchronous(), fails_once(), impossible(), of_another_kind()
""")


@pytest.fixture(scope="session")
def decorated(airflow: Airflow, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What became of the dag above."""
    return outcome(airflow, DECORATED, tmp_path_factory.mktemp("decorated"))


@pytest.mark.services
class TestDecorated:
    def test_a_task_sees_gpus_of_its_machine_and_tells_them_by_xcom(self, decorated: Outcome) -> None:
        for task in ("sees[0]", "sees[1]"):
            xcoms = decorated.run.xcoms[task]
            seen, environment = xcoms["return_value"], xcoms["environment"]
            assert seen.items() <= environment.items()
            assert (seen["CUDA_VISIBLE_DEVICES"], seen["CUDA_DEVICE_ORDER"]) == ("0,1", "PCI_BUS_ID")
            assert seen["OMP_NUM_THREADS"] == "8"
            assert (xcoms["gpu_devices"], xcoms["server_name"]) == ("0,1", host_name())

    def test_mapped_tasks_have_a_name_each(self, decorated: Outcome) -> None:
        names = {decorated.run.xcoms[task]["return_value"]["GPU_TASK_ID"] for task in ("sees[0]", "sees[1]")}
        assert len(names) == 2
        assert all(name.startswith("airflow/of_test/manual__") for name in names)

    def test_the_next_task_in_the_same_process_does_not_see_them(self, decorated: Outcome) -> None:
        assert decorated.run.xcoms["after"]["return_value"] == []

    def test_the_decorators_may_stand_either_way_round_and_the_function_may_be_asynchronous(
        self, decorated: Outcome
    ) -> None:
        for task in ("the_other_way_round", "asynchronous"):
            assert decorated.run.xcoms[task]["return_value"] == "0,1"

    def test_what_a_failed_attempt_has_left_ends_with_it_and_the_next_one_has_all_gpus(
        self, decorated: Outcome
    ) -> None:
        assert decorated.run.tasks["fails_once"] == ("success", 2)
        assert decorated.run.xcoms["fails_once"]["return_value"] == "0,1,2,3,4,5,6,7"
        assert not is_alive(decorated.left)

    def test_what_can_never_be_granted_fails_without_a_retry_and_says_why(self, decorated: Outcome) -> None:
        assert decorated.run.tasks["impossible"] == ("failed", 1)
        assert "What to do: give a whole number from 1 to 8" in decorated.run.log

    def test_a_task_that_runs_elsewhere_than_its_function_is_refused(self, decorated: Outcome) -> None:
        assert decorated.run.tasks["of_another_kind"] == ("failed", 1)
        assert "@gpu_allocation cannot be put on tasks of this kind: '@task.bash'" in decorated.run.log

    def test_all_is_given_back(self, decorated: Outcome) -> None:
        assert held(decorated.manager) == []


BLOCKS = dag("""
    class Dies(ObtainGPUs):
        def execute(self, context):
            granted = super().execute(context)
            if context["ti"].try_number == 1:
                raise ValueError("on purpose")
            return granted

    class DyingSetup(gpu_allocation):
        retries = 0

        @cached_property
        def setup(self):
            facts = dict(gpus=2, cpus=8, wait_s=0, server=None, retries=self.retries, retry_delay=timedelta(0))
            return Dies(task_id=self.task_id, **facts).as_setup()

    class DyingOnce(DyingSetup):
        retries = 1

    @task
    def sees(gpus):
        with use_gpus(gpus):
            return {name: os.environ[name] for name in SEEN}

    @task
    def fails(gpus):
        quiet = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.DEVNULL)
        left = subprocess.Popen(
            ["sleep", "600"], start_new_session=True, env={**os.environ, **gpus["environment"]}, **quiet
        )
        open(os.environ["LEFT"], "w").write(str(left.pid))
        raise ValueError("on purpose")

    with gpu_allocation(2, 8) as gpus:
        command = "echo $CUDA_VISIBLE_DEVICES on $GPU_TASK_ID"
        sees(gpus) >> BashOperator(task_id="report", bash_command=command, env=gpus["environment"], append_env=True)

    with gpu_allocation(2, 8, task_id="of_failing", server="another") as gpus:
        fails(gpus)

    with DyingOnce(2, 8, task_id="dies_once") as gpus:
        sees.override(task_id="after_death")(gpus)

    with DyingSetup(2, 8, task_id="dies_for_good") as gpus:
        sees.override(task_id="never")(gpus)

    @task_group
    def sweep(seed):
        with gpu_allocation(2, 8, server="another") as gpus:
            sees.override(task_id="of_sweep")(gpus)

    sweep.expand(seed=[1, 2])
""")


@pytest.fixture(scope="session")
def blocks(airflow: Airflow, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What became of the dag above."""
    return outcome(airflow, BLOCKS, tmp_path_factory.mktemp("blocks"))


@pytest.mark.services
class TestBlocks:
    def test_tasks_of_a_block_have_the_gpus_of_its_setup(self, blocks: Outcome) -> None:
        granted, seen = blocks.run.xcoms["gpus"], blocks.run.xcoms["sees"]["return_value"]
        assert seen.items() <= granted["environment"].items()
        devices = ",".join(map(str, granted["gpu_ids"]))
        assert (granted["server_name"], len(granted["gpu_ids"]), granted["cpu_count"]) == (host_name(), 2, 8)
        assert granted["gpu_devices"] == seen["CUDA_VISIBLE_DEVICES"] == devices
        assert blocks.run.xcoms["report"]["return_value"] == f"{devices} on {granted['task_id']}"

    def test_a_block_may_name_the_server(self, blocks: Outcome) -> None:
        assert blocks.run.xcoms["of_failing"]["server_name"] == "another"

    def test_a_failed_task_fails_the_run_and_what_it_has_left_ends_with_the_block(self, blocks: Outcome) -> None:
        assert blocks.run.state == "failed"
        assert (blocks.run.tasks["fails"][0], blocks.run.tasks["of_failing_release"][0]) == ("failed", "success")
        assert not is_alive(blocks.left)

    def test_a_retry_of_a_setup_meets_its_own_reservation(self, blocks: Outcome) -> None:
        assert blocks.run.tasks["dies_once"] == ("success", 2)
        assert blocks.run.tasks["after_death"] == ("success", 1)

    def test_what_a_setup_has_reserved_is_given_back_though_it_failed(self, blocks: Outcome) -> None:
        states = [blocks.run.tasks[task][0] for task in ("dies_for_good", "never", "dies_for_good_release")]
        assert states == ["failed", "upstream_failed", "success"]

    def test_mapped_blocks_have_a_reservation_each(self, blocks: Outcome) -> None:
        found = [blocks.run.xcoms[f"sweep.of_sweep[{index}]"]["return_value"]["GPU_TASK_ID"] for index in (0, 1)]
        assert found == [blocks.run.xcoms[f"sweep.gpus[{index}]"]["task_id"] for index in (0, 1)]
        assert found[0] != found[1]

    def test_all_is_given_back(self, blocks: Outcome) -> None:
        assert held(blocks.manager) == []


FULL_POOL = dag("""
    @task
    def sees(gpus):
        return gpus["gpu_devices"]

    with gpu_allocation(2, 8, wait_s=WAIT_S) as gpus:
        sees(gpus)
""")


@pytest.mark.services
def test_a_setup_that_finds_no_room_stands_in_line_as_a_trigger(
    airflow: Airflow, manager: GPUResourceManagerV01
) -> None:
    manager.obtain_resources("somebody", GPUS, CPUS, local=True)

    def release() -> None:
        wait_until(lambda: waiting(manager), "a request in line")
        manager.release_resources("somebody")

    releases = threading.Thread(target=release)
    releases.start()
    run = airflow.run(manager, FULL_POOL.replace("WAIT_S", "None"))
    releases.join()
    assert (run.state, run.xcoms["sees"]["return_value"]) == ("success", "0,1")
    assert "RoomTrigger" in run.log
    assert held(manager) == []


@pytest.mark.services
def test_a_setup_whose_wait_is_over_fails_and_says_what_is_short(
    airflow: Airflow, manager: GPUResourceManagerV01
) -> None:
    manager.obtain_resources("somebody", GPUS, CPUS, local=True)
    run = airflow.run(manager, FULL_POOL.replace("WAIT_S", "0.1"))
    assert (run.state, run.tasks["gpus"], run.tasks["gpus_release"][0]) == ("failed", ("failed", 1), "success")
    assert "no server has 2 GPUs and 8 CPUs free at once" in run.log
    assert (held(manager), waiting(manager)) == (["somebody"], [])


@pytest.mark.services
def test_a_run_that_is_made_again_begins_anew(airflow: Airflow, manager: GPUResourceManagerV01) -> None:
    at = "datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)"
    again = (
        f"import datetime; run = lambda: found.test(run_after={at}, logical_date={at}); first, second = run(), run()"
    )
    same = "print('SAME', first.run_id == second.run_id, first.state, second.state)"
    text = FULL_POOL.replace("WAIT_S", "0") + f"if __name__ == '__main__':\n    {again}\n    {same}\n"
    assert "SAME True success success" in airflow.run(manager, text, ["-m"]).log
    assert held(manager) == []


# --- Settings ----------------------------------------------------------------------------------------------------


@pytest.mark.services
def test_settings_are_those_of_the_variable_and_of_the_connection(
    airflow: Airflow, manager: GPUResourceManagerV01, tmp_path: Path
) -> None:
    given = {"conn_type": "generic", "extra": {"resource_file": manager.resource_file}}
    run = airflow.run(
        tmp_path / "no-pool.json",
        FULL_POOL.replace("WAIT_S", "0"),
        AIRFLOW_CONN_GPU_RESOURCE=json.dumps(given),
        AIRFLOW_VAR_GPU_RESOURCE=json.dumps({"server": "another", "lock_timeout_s": 5}),
    )
    assert (run.state, run.xcoms["gpus"]["server_name"]) == ("success", "another")
    assert not (tmp_path / "no-pool.json").exists()


@pytest.mark.services
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"resource_fiel": "x"}, "gpu_resource has an entry that there is no use for: 'resource_fiel'"),
        ({"lock_timeout_s": "soon"}, "lock_timeout_s is no number of seconds: 'soon'"),
        ({"resource_file": "/no-pool.json"}, "There is no pool: /no-pool.json"),
    ],
)
def test_settings_that_cannot_be_used_fail_the_task_with_the_reason(
    airflow: Airflow, tmp_path: Path, settings: dict[str, str], reason: str
) -> None:
    text = FULL_POOL.replace("WAIT_S", "0")
    run = airflow.run(tmp_path / "no-pool.json", text, AIRFLOW_VAR_GPU_RESOURCE=json.dumps(settings))
    assert run.tasks["gpus"][0] == "failed"
    assert reason in run.log


@pytest.mark.services
def test_no_variable_is_ever_written(airflow: Airflow, decorated: Outcome, blocks: Outcome) -> None:
    with closing(sqlite3.connect(airflow.home / "airflow.db")) as database:
        for table in ("variable", "connection"):
            assert database.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


# --- The trigger, and what Airflow is told of us -----------------------------------------------------------------

TRIGGERS = """
import asyncio, sys
from gpu_resource_extensions.airflow_tasks import RoomTrigger
from gpu_resource_manager_v01 import GPUResourceManagerV01, placed_tasks

manager = GPUResourceManagerV01()

def in_line():
    return [request["task_id"] for request in manager.get_detailed_status().get("waiting", ())]

def trigger():
    path, arguments = RoomTrigger("airflow/mine", 2, 8, None, "*").serialize()
    assert path == "gpu_resource_extensions.airflow_tasks.RoomTrigger"
    return asyncio.create_task(anext(RoomTrigger(**arguments).run()))

async def until(is_so):
    while not is_so():
        await asyncio.sleep(0.02)

async def cancelled(task):
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return in_line()

async def main():
    for name in ("a", "b"):
        manager.obtain_resources(name, 8, 64)
    first = trigger()
    await until(in_line)
    print(in_line(), await cancelled(first))

    first = trigger()
    await until(in_line)
    second = trigger()  # of the next attempt, before the first has left
    await asyncio.sleep(0.1)
    print(await cancelled(first))
    await until(in_line)
    manager.release_resources("a")
    print((await second).payload, in_line())
    print((await trigger()).payload, [task["task_id"] for _, task in placed_tasks(manager.get_detailed_status())])

asyncio.run(asyncio.wait_for(main(), 60))
"""


@pytest.mark.services
def test_a_trigger_keeps_a_place_in_line_until_it_is_cancelled_or_granted(
    airflow: Airflow, manager: GPUResourceManagerV01
) -> None:
    granted = {"error": "", "is_final": False}
    lines = airflow.call(Path(manager.resource_file), "-c", TRIGGERS).splitlines()
    assert [line for line in lines if line.startswith(("[", "{"))][-4:] == [
        "['airflow/mine'] []",
        "[]",
        f"{granted} []",
        f"{granted} ['airflow/mine', 'b']",
    ]


@pytest.mark.services
def test_airflow_lists_us_as_a_provider(airflow: Airflow, tmp_path: Path) -> None:
    assert "gpu-resource-manager" in airflow.call(tmp_path, "-m", "airflow", "providers", "list")


@pytest.mark.services
@pytest.mark.parametrize("page", [JAPANESE, ENGLISH], ids=["ja", "en"])
def test_dag_of_the_readme_runs_as_it_is_copied(airflow: Airflow, page: Page, tmp_path: Path) -> None:
    [block] = page.marked("airflow")
    assert (PROJECT / "gpu_resource_extensions" / "airflow_example_dag.py").read_text("utf-8").endswith(f"\n\n{block}")
    manager = new_pool(tmp_path)
    run = airflow.run(manager, block)
    assert run.state == "success", run.log
    assert run.xcoms["evaluate"]["return_value"] == "evaluated on GPUs 0,1"
    assert held(manager) == []
