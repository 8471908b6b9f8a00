#!/usr/bin/env python3
"""Measure the tool against what this machine can do at all; print one table of ratios.

    python benchmarks/run.py [TRACE.csv] [--rounds N] [--seconds S] [--directory DIR] [--json FILE]

Each row is measured side by side with its own floor, in turns, in one run: only the ratios mean
anything elsewhere. Give ``--directory`` on the disk that will hold the state file. A ratio below 1 is
better than the floor; of changes per second, more is better.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import multiprocessing
import os
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_resource_extensions.leases import Leases
from gpu_resource_manager_v01 import (
    GPUResourceManagerV01,
    State,
    ask_once,
    decode_state,
    encode_state,
    end_task,
    new_request,
    new_state,
    place,
    reclaim,
    this_requester,
    timestamp,
)

CLI = str(Path(__file__).resolve().parent.parent / "cli_v01.py")
#: GPUs and CPUs of the tasks of even and of odd servers, none too small to be granted: 5.5 of 8 GPUs are held
FILL = (((2, 8), (3, 8)), ((2, 8), (4, 8)))


class Row(NamedTuple):
    section: str
    what: str
    floor: str
    unit: str
    median: float
    low: float
    high: float
    floor_median: float

    @property
    def ratio(self) -> float:
        return self.median / self.floor_median


def timed(work: Callable[[], object]) -> float:
    """Return how many milliseconds ``work`` takes."""
    started_s = time.perf_counter()
    work()
    return (time.perf_counter() - started_s) * 1000


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return the median and the 10th and 90th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]


def pool(path: Path, servers: int) -> Path:
    """Write a pool that is 70 % full, with tasks as the library records them."""
    state = new_state(servers)
    requester = this_requester("python train.py")
    for number, server in enumerate(state["servers"]):
        for position, (gpus, cpus) in enumerate(FILL[number % 2]):
            place(server, f"job-{number}-{position}", gpus, cpus, timestamp(), requester)
    path.write_bytes(encode_state(state))
    return path


# --- (a) start ------------------------------------------------------------------------------------


def starts(directory: Path, rounds: int) -> Iterator[Row]:
    small, large = pool(directory / "small.json", 4), pool(directory / "large.json", 1000)
    local, emptied = directory / "local.json", directory / "emptied.json"
    GPUResourceManagerV01(local, servers=[(os.uname().nodename, 8, 64)])
    read = f"import json; json.loads(open({str(small)!r}).read())"
    bare, locking, showing = (f"import argparse, json{more}" for more in ("", ", filelock", ", tabulate"))
    allocate, release = ("--allocate", "bench", "2", "1"), ("--release", "bench")
    run, plain = ("--run", "bench", "2", "1", "--", "true"), ("--help", "--unknown", "--version", "--init", "--detail")
    # In this order, every allocation is followed by its release.
    programs: dict[str, tuple[tuple[str, ...], Path]] = {
        **{script: (("-c", script), small) for script in (bare, locking, showing)},
        "import json; json.loads(…)": (("-c", read), small),
        **{word: ((CLI, word), small) for word in (*plain, "--status")},
        **{words[0]: ((CLI, *words), small) for words in (allocate, release)},
        **{f"{words[0]}, 1000 servers": ((CLI, *words), large) for words in (allocate, release)},
        "--run": ((CLI, *run), local),
        "--reset": ((CLI, "--reset", "--yes"), emptied),
    }
    costs: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, (words, path) in programs.items():
            environment = {**os.environ, "GPU_RESOURCE_FILE": str(path)}
            work = partial(subprocess.run, [sys.executable, *words], env=environment, capture_output=True)
            costs[name].append(timed(work))
    for what, floors in (
        *((word, (bare,)) for word in plain),
        ("--status", (bare, showing, "import json; json.loads(…)")),
        *((word, (bare, locking)) for word in ("--allocate", "--release", "--run", "--reset")),
        ("--allocate, 1000 servers", ("--allocate",)),
        ("--release, 1000 servers", ("--release",)),
    ):
        for floor in floors:
            yield Row("start", what, floor, "ms", *spread(costs[what]), statistics.median(costs[floor]))


# --- (b) a durable change -------------------------------------------------------------------------


def write_durably(path: str, data: bytes) -> None:
    """Do the least that makes ``data`` the content of a file for good."""
    temporary = f"{path}.tmp"
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(descriptor, data)
    os.fsync(descriptor)
    os.close(descriptor)
    os.replace(temporary, path)
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class SQLite:
    """The same job in SQLite, with a connection that stays open."""

    def __init__(self, path: Path, servers: int, journal: str, synchronous: str) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute(f"PRAGMA journal_mode={journal}")
        self.connection.execute(f"PRAGMA synchronous={synchronous}")
        self.connection.execute("CREATE TABLE servers (id INTEGER PRIMARY KEY, gpus TEXT, free INTEGER, cpus INTEGER)")
        self.connection.execute(
            "CREATE TABLE tasks (task_id TEXT PRIMARY KEY, server INTEGER, gpus TEXT, cpus INTEGER, start TEXT)"
        )
        with self.connection:
            self.connection.executemany(
                "INSERT INTO servers VALUES (?, '[5, 6, 7]', 3, 48)", [(number,) for number in range(servers)]
            )
            self.connection.executemany(
                "INSERT INTO tasks VALUES (?, ?, '[0, 1]', 8, ?)",
                [(f"job-{number}-{task}", number, timestamp()) for number in range(servers) for task in range(2)],
            )

    def allocate(self, task_id: str, gpus: int, cpus: int) -> None:
        run = self.connection.execute
        run("BEGIN IMMEDIATE")
        server, free = run(
            "SELECT id, gpus FROM servers WHERE free >= ? AND cpus >= ? ORDER BY id LIMIT 1", (gpus, cpus)
        ).fetchone()
        indices = json.loads(free)
        run(
            "UPDATE servers SET gpus = ?, free = free - ?, cpus = cpus - ? WHERE id = ?",
            (json.dumps(indices[gpus:]), gpus, cpus, server),
        )
        taken = json.dumps(indices[:gpus])
        run("INSERT INTO tasks VALUES (?, ?, ?, ?, ?)", (task_id, server, taken, cpus, timestamp()))
        run("COMMIT")

    def release(self, task_id: str) -> None:
        run = self.connection.execute
        run("BEGIN IMMEDIATE")
        server, held, cpus = run("SELECT server, gpus, cpus FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
        (free,) = run("SELECT gpus FROM servers WHERE id = ?", (server,)).fetchone()
        indices = sorted(json.loads(free) + json.loads(held))
        run(
            "UPDATE servers SET gpus = ?, free = ?, cpus = cpus + ? WHERE id = ?",
            (json.dumps(indices), len(indices), cpus, server),
        )
        run("DELETE FROM tasks WHERE task_id = ?", (task_id,))
        run("COMMIT")


def changes(directory: Path, rounds: int) -> Iterator[Row]:
    for servers in (4, 100, 1000):
        place_of = directory / f"change-{servers}"
        place_of.mkdir()
        path = pool(place_of / "state.json", servers)
        manager = GPUResourceManagerV01(path)
        rollback = SQLite(place_of / "rollback.db", servers, "DELETE", "EXTRA")
        log = SQLite(place_of / "wal.db", servers, "WAL", "FULL")
        costs: dict[str, list[float]] = {}

        def note(name: str, work: Callable[[], object], costs: dict[str, list[float]] = costs) -> None:
            costs.setdefault(name, []).append(timed(work))

        for number in range(rounds + 1):  # the first warms up
            if number == 1:
                costs.clear()
            # In turns of a few changes each, so that not every one finds the processor's caches full of another.
            for _ in range(5):
                note("write+fsync+rename+fsync", partial(write_durably, str(place_of / "floor"), path.read_bytes()))
                note("allocate", partial(manager.allocate_resources, "bench", 2, 1))
                note("release", partial(manager.release_resources, "bench"))
            for name, other in (("SQLite rollback, EXTRA", rollback), ("SQLite WAL, FULL", log)):
                for _ in range(5):
                    note(f"allocate {name}", partial(other.allocate, "bench", 2, 1))
                    note(f"release {name}", partial(other.release, "bench"))
        for change in ("allocate", "release"):
            for name in ("write+fsync+rename+fsync", "SQLite rollback, EXTRA", "SQLite WAL, FULL"):
                floor = statistics.median(costs.get(f"{change} {name}") or costs[name])
                yield Row("change", f"{change}, {servers} servers", name, "ms", *spread(costs[change]), floor)


# --- (c) contention -------------------------------------------------------------------------------


def change_under_bare_flock(path: str, change: Callable[[State], object]) -> None:
    """Make the floor of a change: the same checks and bytes, one blocking ``flock`` without a time limit."""
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        data = Path(path).read_bytes()
        before, state = decode_state(data), json.loads(data)
        state["last_updated"] = timestamp()
        change(state)
        write_durably(path, encode_state(state, before))
    finally:
        os.close(descriptor)


def change_by_floor(path: str, name: str, is_held: bool) -> None:
    """Allocate as the manager does, or release what ``is_held``."""
    if is_held:
        change_under_bare_flock(path, lambda state: end_task(state, name))
    else:
        request = new_request(name, 2, 1, **this_requester())
        change_under_bare_flock(path, lambda state: ask_once(state, request))


def change_by_manager(manager: GPUResourceManagerV01, name: str, is_held: bool) -> None:
    if is_held:
        manager.release_resources(name)
    else:
        manager.allocate_resources(name, 2, 1)


def contend(path: Path, bare: bool, seconds: float, name: str, barrier: Any, answers: Any) -> None:
    """Allocate and release in turns: once if ``seconds`` is 0, else for that long."""
    change: Callable[[str, bool], None]
    change = partial(change_by_floor, str(path)) if bare else partial(change_by_manager, GPUResourceManagerV01(path))
    for is_held in (False, True):  # what a process does once only, such as imports, is a matter of (a)
        change(name, is_held)
    barrier.wait()
    waits: list[float] = []
    before = resource.getrusage(resource.RUSAGE_SELF)
    started_s = now_s = time.monotonic()
    while not waits or now_s - started_s < seconds:
        change(name, len(waits) % 2 == 1)
        waits.append(time.monotonic() - now_s)
        now_s += waits[-1]
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    answers.put((started_s, now_s, waits, cpu_s))


def contention(directory: Path, processes: int, seconds: float, bare: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=directory) as place_of:
        path = Path(place_of) / "state.json"
        path.write_bytes(encode_state(new_state(max(4, processes // 4))))
        context = multiprocessing.get_context("fork")
        barrier, answers = context.Barrier(processes), context.Queue()
        workers = [
            context.Process(target=contend, args=(path, bare, seconds, f"task-{number}", barrier, answers), daemon=True)
            for number in range(processes)
        ]
        for worker in workers:
            worker.start()
        found = [answers.get(timeout=60 + seconds) for _ in workers]  # daemons, and not for ever: one may fail
        for worker in workers:
            worker.join()
    waits = sorted(wait for _, _, some, _ in found for wait in some)
    took_s = max(end for _, end, _, _ in found) - min(start for start, _, _, _ in found)
    counts = [len(some) for _, _, some, _ in found]
    return {
        "changes/s": len(waits) / took_s,
        "median wait, ms": 1000 * statistics.median(waits),
        "99th percentile, ms": 1000 * waits[int(0.99 * (len(waits) - 1))],
        "longest wait, ms": 1000 * waits[-1],
        "CPU per change, ms": 1000 * sum(cpu_s for _, _, _, cpu_s in found) / len(waits),
        "slowest/fastest process": min(counts) / max(counts),
    }


def contentions(directory: Path, rounds: int, seconds: float) -> Iterator[Row]:
    for processes in (2, 8, 32):
        for form, limit_s, repeats in (("at once", 0.0, rounds), ("closed loop", seconds, max(1, rounds // 10))):
            found: dict[bool, list[dict[str, float]]] = {False: [], True: []}
            for _ in range(repeats):
                for bare in (True, False):
                    found[bare].append(contention(directory, processes, limit_s, bare))
            for figure in found[False][0]:
                if form == "at once" and figure.startswith("slowest"):
                    continue  # everybody makes one change
                ours, floors = ([one[figure] for one in found[bare]] for bare in (False, True))
                what = f"{processes} processes {form}: {figure.partition(', ')[0]}"
                unit = figure.partition(", ")[2] or ("/s" if figure.endswith("/s") else "")
                yield Row("contention", what, "bare blocking flock", unit, *spread(ours), statistics.median(floors))


# --- (d) reads, (e) scaling -----------------------------------------------------------------------


def reads(directory: Path, rounds: int) -> Iterator[Row]:
    for servers in (4, 100, 1000):
        path = pool(directory / f"read-{servers}.json", servers)
        manager = GPUResourceManagerV01(path)
        data = path.read_bytes()
        ours, floors = [], []
        for _ in range(rounds):
            ours.append(timed(manager.get_resource_summary))
            floors.append(timed(partial(json.loads, data)))
        what = f"get_resource_summary, {servers} servers"
        yield Row("read", what, "json.loads", "ms", *spread(ours), statistics.median(floors))


SIZES = (125, 250, 500, 1000)


def growth(costs: list[float]) -> float:
    """Return the exponent of the power of the size that fits the costs best: 1 is linear."""
    return statistics.linear_regression([*map(math.log, SIZES)], [*map(math.log, costs)]).slope


def crowded(path: Path, tasks: int) -> Path:
    """Write a pool of two servers, the first of which runs this many tasks."""
    state = new_state(2, 1024, 65536)
    for number in range(tasks):
        place(state["servers"][0], f"job-{number}", 1, 1, timestamp())
    path.write_bytes(encode_state(state))
    return path


def scaling(directory: Path, rounds: int) -> Iterator[Row]:
    whole_change = 0.0
    for what, make in (("servers", pool), ("tasks of one server", crowded)):
        medians: list[float] = []
        for size in SIZES:
            manager = GPUResourceManagerV01(make(directory / f"{what}-{size}.json", size))
            costs = []
            for _ in range(rounds):
                costs.append(timed(partial(manager.allocate_resources, "bench", 2, 1)))
                manager.release_resources("bench")
            medians.append(statistics.median(costs))
            yield Row("scaling", f"allocate, {size} {what}", f"{SIZES[0]} {what}", "ms", *spread(costs), medians[0])
        exponent = growth(medians)
        yield Row("scaling", f"exponent of growth with {what}", "linear", "", exponent, exponent, exponent, 1.0)
        whole_change = whole_change or medians[-1]
    data = (directory / "servers-1000.json").read_bytes()
    never_free = Leases(str(directory / "none")).is_ended
    request = new_request("bench", 2, 1)
    costs = []
    for _ in range(rounds):
        state = decode_state(data)

        def decide(state: State = state) -> None:
            reclaim(state, never_free)
            ask_once(state, request)

        costs.append(timed(decide))
    yield Row("scaling", "decisions, 1000 servers", "the whole change", "ms", *spread(costs), whole_change)


# --- (f) replay, and the table --------------------------------------------------------------------


def replays(trace: Path, rounds: int) -> Iterator[Row]:
    from replay import Policy, read_trace, replay

    jobs = read_trace(trace)
    costs = [timed(lambda: replay(jobs, Policy("as it is"))) for _ in range(min(rounds, 5))]
    yield Row("replay", f"{len(jobs)} jobs (more by replay.py)", "1 second", "ms", *spread(costs), 1000.0)


def show(row: Row) -> None:
    name = f"{row.section:<11}{row.what:<53}{row.floor:<31}"
    spread_of = f"{row.median:>12.2f} {row.unit:<3}{row.low:>10.2f}{row.high:>10.2f}"
    print(f"{name}{row.ratio:>7.2f}{spread_of}{row.floor_median:>12.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, nargs="?", metavar="TRACE.csv")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a closed loop")
    parser.add_argument("--directory", type=Path, help="where to write; by default the temporary directory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON too")
    args = parser.parse_args()
    rows: list[Row] = []
    print(f"{'':<11}{'ours':<53}{'floor':<31}{'ratio':>7}{'median':>12}    {'10 %':>10}{'90 %':>10}{'floor':>12}")
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        directory = Path(name)
        for section in (
            starts(directory, args.rounds),
            changes(directory, args.rounds),
            contentions(directory, args.rounds, args.seconds),
            reads(directory, args.rounds),
            scaling(directory, args.rounds),
            replays(args.trace, args.rounds) if args.trace else (),
        ):
            for row in section:
                rows.append(row)
                show(row)
    if args.json:
        document = [{**row._asdict(), "ratio": row.ratio} for row in rows]
        args.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
