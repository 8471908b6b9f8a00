#!/usr/bin/env python3
"""Write a made-up trace of jobs for ``replay.py``.

    python benchmarks/made_up_load.py TRACE.csv [--demand SHARE] [--mix GPUS:SHARE ...] [--jobs N] [--seed N]

Jobs arrive at random (Poisson); their durations are log-normal: most are short, a few run for days.
``--demand`` is the share of the pool's GPUs that they would use on average if nobody ever had to wait.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from pathlib import Path

from replay import Job

POOL_GPUS = 32
MEAN_DURATION_S = 1.1 * 3600
SIGMA = 1.5
MIX = {1: 0.94, 4: 0.03, 8: 0.03}


def made_up_load(demand: float, seed: int, jobs: int = 2500, mix: dict[int, float] = MIX) -> list[Job]:
    """Return ``jobs`` jobs in order of arrival; ``mix`` is the weight of each number of GPUs."""
    rng = random.Random(seed)  # noqa: S311 - a reproducible trace, not a secret
    mean_gpus = sum(gpus * share for gpus, share in mix.items()) / sum(mix.values())
    mean_gap_s = mean_gpus * MEAN_DURATION_S / (demand * POOL_GPUS)
    mu = math.log(MEAN_DURATION_S) - SIGMA**2 / 2  # so that the mean, not the median, is MEAN_DURATION_S
    load: list[Job] = []
    now_s = 0.0
    for _ in range(jobs):
        now_s += rng.expovariate(1 / mean_gap_s)
        (gpus,) = rng.choices(list(mix), list(mix.values()))
        load.append(Job(round(now_s, 1), gpus, round(rng.lognormvariate(mu, SIGMA), 1)))
    return load


def write_trace(path: Path, jobs: list[Job]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Job._fields)
        writer.writerows(jobs)


def part_of_mix(text: str) -> tuple[int, float]:
    gpus, _, share = text.partition(":")
    return int(gpus), float(share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, metavar="TRACE.csv")
    parser.add_argument("--demand", type=float, default=0.8, help="share of the pool's GPUs (0.8)")
    parser.add_argument("--jobs", type=int, default=2500, help="number of jobs (2500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--mix",
        type=part_of_mix,
        nargs="+",
        default=list(MIX.items()),
        metavar="GPUS:SHARE",
        help="share of the jobs of each number of GPUs (1:0.94 4:0.03 8:0.03)",
    )
    args = parser.parse_args()
    write_trace(args.trace, made_up_load(args.demand, args.seed, args.jobs, dict(args.mix)))


if __name__ == "__main__":
    main()
