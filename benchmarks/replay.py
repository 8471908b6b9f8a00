#!/usr/bin/env python3
"""Replay a trace of jobs through the decisions of the library, with a virtual clock.

    python benchmarks/replay.py TRACE.csv [--killed SHARE] [--json FILE]

The trace has the columns ``submit_time_s``, ``num_gpu`` (1 to 8) and ``duration_s``, one job per line,
sorted by the first; ``made_up_load.py`` makes one. The pool is the default one (4 servers, 8 GPUs and 64
CPUs each) with tasks of 1 GPU and more, and each GPU comes with 8 CPUs. Every decision is the library's
own: ``admit`` serves the line, ``reclaim`` takes back what dead jobs held; only the clock and the deaths
are made up here.

The table says for each policy how many jobs were refused, how long the others waited, the mean and the
longest wait as shares of strict FIFO's, the GPU-hours that dead jobs held while others waited, the share
of the pool's GPUs in use, how many jobs per second were decided, and for each number of GPUs the mean and
the longest wait. *In use* is GPU-seconds that jobs ran, over the GPUs of the pool times the seconds from the
first submission to the last: afterwards the pool only drains.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_resource_manager_v01 import (
    MAX_PASSED_OVER,
    WAIT_RECHECK_S,
    State,
    admit,
    end_task,
    new_request,
    new_state,
    reclaim,
    set_waiting,
)

CPUS_PER_GPU = 8
MOST_GPUS = 8
#: as good as no limit: later requests may always be placed ahead
UNLIMITED = 10**9


class Job(NamedTuple):
    submit_time_s: float
    num_gpu: int
    duration_s: float


class Policy(NamedTuple):
    """Who is placed when."""

    name: str
    max_passed_over: int = MAX_PASSED_OVER
    #: only the request that has waited longest may be placed
    is_strict: bool = False
    #: a job that does not fit at once stands in line; otherwise it is refused
    has_line: bool = True
    #: share of the jobs that end without a release
    killed_share: float = 0.0
    #: a job without a release is noticed, for it held a lease
    has_leases: bool = True


class Waits(NamedTuple):
    """How long the jobs of one number of GPUs waited."""

    jobs: int
    mean_wait_s: float
    longest_wait_s: float


class Outcome(NamedTuple):
    policy: str
    refused: int
    mean_wait_s: float
    p95_wait_s: float
    longest_wait_s: float
    #: share of the pool's GPUs, from the first submission to the last
    gpu_use: float
    #: by the number of GPUs, as text: the keys of a JSON object
    by_gpus: dict[str, Waits]
    #: GPU-hours that jobs held after their end while others waited, up to the last submission
    lost_gpu_hours: float
    jobs_per_s: float

    def as_json(self) -> dict[str, Any]:
        """Return what does not depend on the speed of this machine, nor on made-up deaths."""
        document = self._asdict()
        del document["lost_gpu_hours"], document["jobs_per_s"]
        return {**document, "by_gpus": {gpus: waits._asdict() for gpus, waits in self.by_gpus.items()}}


def read_trace(path: Path) -> list[Job]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        jobs = [Job(float(row["submit_time_s"]), int(row["num_gpu"]), float(row["duration_s"])) for row in rows]
    if jobs != sorted(jobs, key=lambda job: job.submit_time_s):
        raise ValueError(f"{path}: not sorted by submit_time_s")
    if not all(1 <= job.num_gpu <= MOST_GPUS for job in jobs):
        raise ValueError(f"{path}: a job of the default pool has 1 to {MOST_GPUS} GPUs")
    return jobs


def admit_head(state: State) -> list[str]:
    """Serve the line strictly in order: show the library nobody but the one who has waited longest."""
    line = state.get("waiting", [])
    placed: list[str] = []
    while len(placed) < len(line):
        set_waiting(state, [line[len(placed)]])
        if not admit(state):
            break
        placed.append(line[len(placed)]["task_id"])
    set_waiting(state, line[len(placed) :])
    return placed


class Replay:
    """One run of a trace; ``task_id`` and ``lease`` of a job are its number."""

    def __init__(self, jobs: list[Job], policy: Policy, seed: int = 0) -> None:
        self.jobs = jobs
        self.policy = policy
        self.state = new_state(gpus=MOST_GPUS)
        self.now_s = 0.0
        #: a job ends, or (``None``) whoever waits looks for dead ones
        self.events: list[tuple[float, int | None]] = []
        self.started_s: dict[int, float] = {}
        self.refused = 0
        rng = random.Random(seed)  # noqa: S311 - a reproducible trace, not a secret
        self.killed = {number for number in range(len(jobs)) if rng.random() < policy.killed_share}
        #: jobs that have ended and still hold their GPUs
        self.dead: set[str] = set()
        self.lost_gpu_s = 0.0

    def run(self) -> None:
        for number, job in enumerate(self.jobs):
            self.advance(job.submit_time_s)
            request = new_request(str(number), job.num_gpu, job.num_gpu * CPUS_PER_GPU, lease=str(number))
            set_waiting(self.state, [*self.state.get("waiting", []), request])
            self.serve()
            if not self.policy.has_line and self.state.get("waiting"):
                set_waiting(self.state, [])
                self.refused += 1
        self.advance(math.inf)
        self.refused += len(self.state.get("waiting", []))  # what the dead hold never came free for them

    def advance(self, to_s: float) -> None:
        """Let all happen that happens up to ``to_s``."""
        while self.events and self.events[0][0] <= to_s:
            time_s, number = heapq.heappop(self.events)
            self.set_clock(time_s)
            if number in self.killed:
                self.dead.add(str(number))  # and nobody is told
                heapq.heappush(self.events, (time_s + WAIT_RECHECK_S, None))
                continue
            if number is not None:
                end_task(self.state, str(number))
            if number is not None or self.state.get("waiting"):
                self.serve()
        if to_s < math.inf:
            self.set_clock(to_s)

    def set_clock(self, to_s: float) -> None:
        if self.dead and self.state.get("waiting"):
            until_s = min(to_s, self.jobs[-1].submit_time_s)
            lost_gpus = sum(self.jobs[int(number)].num_gpu for number in self.dead)
            self.lost_gpu_s += lost_gpus * max(0.0, until_s - self.now_s)
        self.now_s = to_s

    def serve(self) -> None:
        """Do what every change does: take back what the dead hold, and serve the line."""
        if self.dead and self.policy.has_leases:
            self.dead.difference_update(reclaim(self.state, lambda record: record["lease"] in self.dead))
        strict = self.policy.is_strict
        for task_id in admit_head(self.state) if strict else admit(self.state, self.policy.max_passed_over):
            number = int(task_id)
            self.started_s[number] = self.now_s
            heapq.heappush(self.events, (self.now_s + self.jobs[number].duration_s, number))


def replay(jobs: list[Job], policy: Policy, seed: int = 0) -> Outcome:
    """Run the trace under ``policy``; ``seed`` chooses who is killed."""
    one = Replay(jobs, policy, seed)
    began_s = time.perf_counter()
    one.run()
    took_s = time.perf_counter() - began_s
    first_s, last_s = jobs[0].submit_time_s, jobs[-1].submit_time_s
    gpu_s = 0.0
    by_gpus: dict[int, list[float]] = {}
    for number, started_s in one.started_s.items():
        job = jobs[number]
        gpu_s += job.num_gpu * max(0.0, min(started_s + job.duration_s, last_s) - started_s)
        by_gpus.setdefault(job.num_gpu, []).append(started_s - job.submit_time_s)
    waits = sorted(wait for some in by_gpus.values() for wait in some)
    pool_gpus = sum(server["total_gpus"] for server in one.state["servers"])
    return Outcome(
        policy=policy.name,
        refused=one.refused,
        mean_wait_s=sum(waits) / len(waits),
        p95_wait_s=waits[int(0.95 * (len(waits) - 1))],
        longest_wait_s=waits[-1],
        gpu_use=gpu_s / (pool_gpus * (last_s - first_s)) if last_s > first_s else math.nan,
        by_gpus={
            str(gpus): Waits(len(some), sum(some) / len(some), max(some)) for gpus, some in sorted(by_gpus.items())
        },
        lost_gpu_hours=one.lost_gpu_s / 3600,
        jobs_per_s=len(jobs) / took_s,
    )


def policies(killed_share: float) -> list[Policy]:
    return [
        Policy("no line", has_line=False),
        Policy("strict FIFO", is_strict=True),
        *(Policy(f"passed over {limit}", limit) for limit in (4, 8, 16, MAX_PASSED_OVER, 64)),
        Policy("no limit", UNLIMITED),
        Policy(f"{killed_share:.0%} killed, leases", killed_share=killed_share),
        Policy(f"{killed_share:.0%} killed, none", killed_share=killed_share, has_leases=False),
    ]


def ratio(value: float, floor: float) -> float:
    return value / floor if floor else math.nan


def show(outcomes: list[Outcome]) -> None:
    """Print one line per policy."""
    fifo = next(outcome for outcome in outcomes if outcome.policy == "strict FIFO")
    kinds = sorted({gpus for outcome in outcomes for gpus in outcome.by_gpus}, key=int)
    headings = "policy".ljust(24) + f"{'refused':>8}{'mean wait':>12}{'p95':>12}{'longest':>12}{'vs FIFO':>14}"
    print(headings + f"{'lost':>12}{'in use':>8}{'jobs/s':>9}" + "".join(f"{gpus + ' GPU':>19}" for gpus in kinds))
    for one in outcomes:
        mean, longest = ratio(one.mean_wait_s, fifo.mean_wait_s), ratio(one.longest_wait_s, fifo.longest_wait_s)
        line = f"{one.policy:<24}{one.refused:>8}{one.mean_wait_s:>10,.0f} s{one.p95_wait_s:>10,.0f} s"
        line += f"{one.longest_wait_s:>10,.0f} s{mean:>7.0%}{longest:>7.0%}{one.lost_gpu_hours:>10,.2f} h"
        line += f"{one.gpu_use:>8.2f}{one.jobs_per_s:>9,.0f}"
        for gpus in kinds:
            waits = one.by_gpus.get(gpus)
            text = f"{waits.mean_wait_s / 3600:.1f} / {waits.longest_wait_s / 3600:.1f} h" if waits else "-"
            line += f"{text:>19}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, metavar="TRACE.csv")
    parser.add_argument("--killed", type=float, default=0.05, help="share of the jobs that end without a release")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcomes as JSON too")
    args = parser.parse_args()
    jobs = read_trace(args.trace)
    outcomes = [replay(jobs, policy) for policy in policies(args.killed)]
    show(outcomes)
    if args.json:
        text = json.dumps([outcome.as_json() for outcome in outcomes], indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
