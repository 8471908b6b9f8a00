#!/usr/bin/env python3
"""Kill tasks of a real Airflow, and their workers, while its runs share 32 GPUs; tell what became of the GPUs.

    python benchmarks/airflow_kills.py AIRFLOW_PYTHON [--runs N] [--decorated N] [--kills N] [--seed N] [--json FILE]

AIRFLOW_PYTHON is the ``python`` of an environment with Airflow and this project, as ``.ci/install-airflow DIR`` makes
it. ``airflow standalone`` runs with its LocalExecutor, an SQLite database and ports of its own. Each run wants 8 of the
32 GPUs of four servers: N runs with a block of tasks, on any server, and N with a decorated task, on this machine's.
What uses a GPU locks a file for it, as do the processes that it starts, so that the kernel tells what is in use, by
whatever is alive: of two on one GPU, the second finds it locked. A failed attempt is made again by Airflow.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from database_servers import free_port

from gpu_resource_manager_v01 import GPUResourceManagerV01, host_name, placed_tasks

GPUS, CPUS, SERVERS = 8, 64, (host_name(), "node2", "node3", "node4")
LIMIT_S = 540
DAGS = '''
import datetime, fcntl, os, subprocess, sys, time
from pathlib import Path

from airflow.sdk import dag, task

from gpu_resource_extensions.airflow_tasks import gpu_allocation, use_gpus

PLACE, FIRST, DAY = Path({place!r}), datetime.datetime(2026, 1, 1), datetime.timedelta(days=1)
TRIES = dict(retries=20, retry_delay=datetime.timedelta(seconds=1))
COMMON = dict(schedule="@daily", start_date=FIRST, catchup=True, max_active_runs=99, default_args=TRIES)


def work(server):
    """Use the GPUs, and let a process in a session of its own use them too."""
    files = []
    for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(","):
        files.append(open(PLACE / "gpus" / f"{{server}}-{{gpu}}", "a"))
        try:
            fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            (PLACE / "twice" / f"{{server}}-{{gpu}}-{{os.getpid()}}").touch()
    (PLACE / "tasks" / f"{{os.getpid()}}-{{os.getppid()}}").touch()
    quiet = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.DEVNULL)  # else Airflow waits for its output
    used = [file.fileno() for file in files]
    subprocess.run(["sleep", {seconds!r}], check=True, start_new_session=True, pass_fds=used, **quiet)


@dag(end_date=FIRST + DAY * ({runs} - 1), **COMMON)
def block():
    @task
    def train(gpus):
        with use_gpus(gpus):
            work(gpus["server_name"])

    with gpu_allocation(8, 8, server="*") as gpus:
        train(gpus)


@dag(end_date=FIRST + DAY * ({decorated} - 1), **COMMON)
def decorated():
    @task
    @gpu_allocation(8, 8)
    def train():
        work({host!r})

    train()


if {runs}:
    block()
if {decorated}:
    decorated()
'''


class Outcome(NamedTuple):
    runs: int
    succeeded: int
    attempts_of_tasks: int
    tasks_killed: int
    workers_killed: int
    most_servers_used_at_once: int
    most_tasks_in_the_pool_at_once: int
    gpus_used_twice: int
    gpus_not_released: int
    requests_left_in_line: int
    processes_left: int
    gpus_still_in_use: int
    took_s: float


@contextmanager
def airflow(python: str, place: Path) -> Iterator[Path]:
    """Run an Airflow of its own; yield its database. Its log is ``standalone.log``."""
    port = free_port()
    settings = {
        "core__dags_folder": place / "dags",
        "core__load_examples": False,
        "core__parallelism": 16,
        "core__max_active_tasks_per_dag": 99,
        "core__dags_are_paused_at_creation": False,
        "core__execution_api_server_url": f"http://127.0.0.1:{port}/execution/",
        "core__simple_auth_manager_all_admins": True,
        "api__host": "127.0.0.1",
        "api__port": port,
        "api__base_url": f"http://127.0.0.1:{port}",
        "api__workers": 1,
        "logging__worker_log_server_port": free_port(),
        "logging__trigger_log_server_port": free_port(),
        "scheduler__task_instance_heartbeat_timeout": 15,
        "scheduler__task_instance_heartbeat_timeout_detection_interval": 5,
        "scheduler__task_instance_heartbeat_sec": 2,
        "workers__min_heartbeat_interval": 2,
    }
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "GPU_"))},
        **{f"AIRFLOW__{key.upper()}": str(value) for key, value in settings.items()},
        "AIRFLOW_HOME": str(place / "home"),
        "AIRFLOW_VAR_GPU_RESOURCE": json.dumps({"resource_file": str(place / "pool" / "resource_status.json")}),
        "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with open(place / "standalone.log", "wb") as log:
        words = [python, "-m", "airflow", "standalone"]
        standalone = subprocess.Popen(  # noqa: S603 - our own
            words, env=environment, cwd=place, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield place / "home" / "airflow.db"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(standalone.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                standalone.wait(15)
            for pid in of_session(standalone.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            standalone.wait()


def bearing(variable: str) -> list[int]:
    """Return the processes whose environment has a variable that begins so."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if f"\0{variable}".encode() in b"\0" + Path("/proc", entry, "environ").read_bytes():
                found.append(int(entry))
    return found


def rows(database: Path, statement: str) -> list[tuple[Any, ...]]:
    try:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=1)) as connection:
            return connection.execute(statement).fetchall()
    except sqlite3.OperationalError:  # it is being made, or written
        return []


def is_used(file: Path) -> bool:
    with open(file) as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def living(place: Path) -> list[tuple[int, int]]:
    """Return each task at work, and its worker."""
    found = [file.name.split("-") for file in (place / "tasks").iterdir()]
    return [(int(task), int(worker)) for task, worker in found if stat_of(task)[1:2] == [worker]]


def of_session(session: int) -> list[int]:
    return [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and stat_of(pid)[3:4] == [str(session)]]


def stat_of(pid: str) -> list[str]:
    """Return state, parent, group and session of a process, and more; nothing if it has ended."""
    with suppress(OSError):
        fields = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
        return fields if fields[0] not in "ZX" else []
    return []


def measure(python: str, place: Path, runs: int, decorated: int, kills: int, chance: random.Random) -> Outcome:
    for name in ("dags", "gpus", "twice", "tasks", "pool"):
        (place / name).mkdir()
    for server in SERVERS:
        for gpu in range(GPUS):
            (place / "gpus" / f"{server}-{gpu}").touch()
    facts = {"place": str(place), "seconds": "6", "runs": runs, "decorated": decorated, "host": SERVERS[0]}
    (place / "dags" / "runs.py").write_text(DAGS.format(**facts))
    pool = place / "pool" / "resource_status.json"
    manager = GPUResourceManagerV01(pool, servers=[(server, GPUS, CPUS) for server in SERVERS])
    started_s, most_used, most_held, killed = time.monotonic(), 0, 0, Counter[str]()
    next_kill_s = 0.0
    with airflow(python, place) as database:
        while True:
            if time.monotonic() > started_s + LIMIT_S:
                raise SystemExit(f"not within {LIMIT_S} s; see {place}")
            used = {file.name.rpartition("-")[0] for file in (place / "gpus").iterdir() if is_used(file)}
            most_used = max(most_used, len(used))
            most_held = max(most_held, len(placed_tasks(manager.get_detailed_status())))
            states = Counter(dict(rows(database, "SELECT state, count(*) FROM dag_run GROUP BY state")))
            if states["success"] + states["failed"] == runs + decorated:
                break
            at_work = living(place)
            if at_work and killed.total() < kills and time.monotonic() > next_kill_s:
                next_kill_s = time.monotonic() + chance.uniform(1, 4)
                what = chance.choice(["task", "worker"])
                task, worker = chance.choice(at_work)
                with suppress(ProcessLookupError):
                    os.kill(task if what == "task" else worker, signal.SIGKILL)
                    killed[what] += 1
            time.sleep(0.05)
        took_s = time.monotonic() - started_s
        attempts = rows(database, "SELECT sum(try_number) FROM task_instance WHERE task_id = 'train'")
        left = bearing("GPU_TASK_ID=airflow/")
    manager.reclaim_ended()
    state = manager.get_detailed_status()
    held = [task["task_id"] for _, task in placed_tasks(state)]
    in_use = [file for file in (place / "gpus").iterdir() if is_used(file)]
    return Outcome(
        runs=runs + decorated,
        succeeded=states["success"],
        attempts_of_tasks=attempts[0][0] if attempts else 0,
        tasks_killed=killed["task"],
        workers_killed=killed["worker"],
        most_servers_used_at_once=most_used,
        most_tasks_in_the_pool_at_once=most_held,
        gpus_used_twice=len([*(place / "twice").iterdir()]),
        gpus_not_released=len(held) * GPUS,
        requests_left_in_line=len(state.get("waiting", ())),
        processes_left=len(left),
        gpus_still_in_use=len(in_use),
        took_s=round(took_s, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("python", metavar="AIRFLOW_PYTHON")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--decorated", type=int, default=6)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="gpu-airflow-"))
    found = measure(
        os.path.abspath(args.python),
        place,
        args.runs,
        args.decorated,
        args.kills,
        random.Random(args.seed),  # noqa: S311 - no secret
    )
    for name, value in found._asdict().items():
        print(f"{name.replace('_', ' ')}: {value}")
    if args.json:
        args.json.write_text(json.dumps(found._asdict()), encoding="utf-8")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
