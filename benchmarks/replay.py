#!/usr/bin/env python3
"""Replay a trace of real jobs through the decisions of the library, with a virtual clock.

    python benchmarks/replay.py TRACE.csv

The trace has the columns ``submit_time_s``, ``num_gpu`` and ``duration_s``, one job per line, sorted by
the first. The pool is the default one (4 servers, 8 GPUs and 64 CPUs each) with tasks of 1 GPU and
more, and each GPU comes with 8 CPUs. Every decision is the library's own: ``admit`` serves the line,
``reclaim`` takes back what dead jobs held; only the clock and the deaths are made up here.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import random
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_resource_manager_v01 import (
    MAX_PASSED_OVER,
    WAIT_RECHECK_S,
    Request,
    Requester,
    admit,
    find_task,
    new_state,
    put,
    reclaim,
    remove_task,
    set_waiting,
)

CPUS_PER_GPU = 8
#: as good as no limit: later requests may always be placed ahead
UNLIMITED = 10**9


class Job(NamedTuple):
    submit_time_s: float
    num_gpu: int
    duration_s: float


class Outcome(NamedTuple):
    jobs: int
    refused: int
    mean_wait_s: float
    p95_wait_s: float
    longest_wait_s: float
    #: GPU-hours that jobs held after their end while others waited, up to the last submission
    lost_gpu_hours: float
    jobs_per_s: float


def read_trace(path: Path) -> list[Job]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return [Job(float(row["submit_time_s"]), int(row["num_gpu"]), float(row["duration_s"])) for row in rows]


def replay(
    jobs: list[Job],
    max_passed_over: int = MAX_PASSED_OVER,
    wait: bool = True,
    killed_share: float = 0.0,
    leases: bool = True,
    seed: int = 0,
) -> Outcome:
    """Run the trace. ``killed_share`` of the jobs end without a release; ``leases`` tell that they have.

    Without ``wait``, a job that does not fit when it is submitted is refused.
    """
    rng = random.Random(seed)  # noqa: S311 - a reproducible trace, not a secret
    killed = {number for number in range(len(jobs)) if rng.random() < killed_share}
    started_s = time.perf_counter()
    state = new_state()
    state["min_gpus_per_task"] = 1
    held: dict[str, int] = {}  # GPUs of the dead, from the moment that they die
    ends: list[tuple[float, str]] = []
    waits: list[float] = []
    lost_gpu_s = 0.0
    refused = 0
    now_s = 0.0
    last_submit_s = jobs[-1].submit_time_s
    running: set[str] = set()

    def is_ended(record: Requester) -> bool:
        return leases and record.get("lease") in held

    def serve() -> None:
        """Do what every change does, and note what it has placed."""
        for task_id in reclaim(state, is_ended):
            del held[task_id]
        if not admit(state, max_passed_over):
            return
        for server in state["servers"]:
            for task in server["running_tasks"]:
                task_id = task["task_id"]
                if task_id not in running:
                    running.add(task_id)
                    job = jobs[int(task_id)]
                    waits.append(now_s - job.submit_time_s)
                    heapq.heappush(ends, (now_s + job.duration_s, task_id))

    def advance(to_s: float) -> None:
        nonlocal now_s, lost_gpu_s
        if to_s <= last_submit_s and state.get("waiting"):
            lost_gpu_s += sum(held.values()) * (to_s - now_s)
        now_s = to_s

    def until(limit_s: float) -> None:
        """Let jobs end up to ``limit_s``; a waiter looks for the dead every WAIT_RECHECK_S."""
        while True:
            next_s = ends[0][0] if ends else limit_s
            if held and leases and state.get("waiting"):
                next_s = min(next_s, now_s + WAIT_RECHECK_S)
            if next_s > limit_s or (next_s == limit_s and not ends):
                break
            advance(next_s)
            if not ends or ends[0][0] > now_s:
                serve()  # the look of a waiter
                continue
            _, task_id = heapq.heappop(ends)
            if int(task_id) in killed:
                held[task_id] = jobs[int(task_id)].num_gpu  # and nobody is told
                continue
            found = find_task(state, task_id)
            assert found  # noqa: S101 - the trace is replayed wrongly otherwise
            put(state, remove_task(*found))
            serve()
        if limit_s != float("inf"):
            advance(limit_s)

    for number, job in enumerate(jobs):
        until(job.submit_time_s)
        request: Request = {
            "task_id": str(number),
            "required_gpus": job.num_gpu,
            "required_cpus": job.num_gpu * CPUS_PER_GPU,
            "prefer_server_id": None,
            "only_server_name": None,
            "passed_over": 0,
            "lease": str(number),
        }
        set_waiting(state, [*state.get("waiting", []), request])
        serve()
        if not wait and state.get("waiting"):
            set_waiting(state, [])
            refused += 1
    until(float("inf"))
    refused += len(state.get("waiting", []))  # for whom what the dead hold never came free
    waits.sort()
    return Outcome(
        jobs=len(jobs),
        refused=refused,
        mean_wait_s=sum(waits) / len(waits),
        p95_wait_s=waits[int(0.95 * (len(waits) - 1))],
        longest_wait_s=waits[-1],
        lost_gpu_hours=lost_gpu_s / 3600,
        jobs_per_s=len(jobs) / (time.perf_counter() - started_s),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, metavar="TRACE.csv")
    parser.add_argument("--killed", type=float, default=0.05, help="share of the jobs that end without a release")
    args = parser.parse_args()
    jobs = read_trace(args.trace)
    rows = [("no line", replay(jobs, wait=False)), ("strict FIFO", replay(jobs, 0))]
    rows += [(f"passed over {limit}", replay(jobs, limit)) for limit in (4, 8, 16, MAX_PASSED_OVER, 64)]
    rows += [("no limit", replay(jobs, UNLIMITED))]
    rows += [
        (f"{args.killed:.0%} killed, leases", replay(jobs, killed_share=args.killed)),
        (f"{args.killed:.0%} killed, none", replay(jobs, killed_share=args.killed, leases=False)),
    ]
    fifo = rows[1][1]
    headings = [
        ("refused", 8),
        ("mean wait", 12),
        ("p95", 10),
        ("longest", 10),
        ("vs FIFO", 16),
        ("lost", 10),
        ("jobs/s", 9),
    ]
    print("policy".ljust(24) + "".join(text.rjust(width) for text, width in headings))
    for name, result in rows:
        mean, longest = result.mean_wait_s / fifo.mean_wait_s, result.longest_wait_s / fifo.longest_wait_s
        print(
            f"{name:<24}{result.refused:>8}{result.mean_wait_s:>10,.0f} s{result.p95_wait_s:>8,.0f} s"
            f"{result.longest_wait_s:>8,.0f} s{mean:>8.0%}{longest:>8.0%}{result.lost_gpu_hours:>8,.2f} h"
            f"{result.jobs_per_s:>9,.0f}"
        )


if __name__ == "__main__":
    main()
