#!/usr/bin/env python3
"""Compare the speed of this checkout with that of another one, such as a ``git worktree`` of a release.

    python benchmarks/beside.py --other DIR [--rounds N] [--directory DIR]

Both do the same in turns, in one run, so what else loads the machine loads both. A ratio below 1 means
that this checkout is faster; *of the fastest* compares the quickest tenth of each, where a loaded machine
disturbs least. ``--directory`` is on the disk that will hold the state file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from run import pool, spread, timed

HERE = Path(__file__).resolve().parent.parent
BARE = "import argparse, json"
# Both libraries have one name, so each has a process of its own. It answers every line that it reads
# with the milliseconds that an allocation and its release took.
WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from gpu_resource_manager_v01 import GPUResourceManagerV01
manager = GPUResourceManagerV01(sys.argv[2])
for _ in sys.stdin:
    started_s = time.perf_counter()
    manager.allocate_resources("bench", 2, 1)
    allocated_s = time.perf_counter()
    manager.release_resources("bench")
    ended_s = time.perf_counter()
    print(1000 * (allocated_s - started_s), 1000 * (ended_s - allocated_s), flush=True)
"""


def show(what: str, ours: list[float], theirs: list[float]) -> None:
    (median, low, high), (other_median, other_low, other_high) = spread(ours), spread(theirs)
    ratios = f"{median / other_median:>7.2f}{low / other_low:>16.2f}"
    figures = f"{median:>10.2f}{low:>9.2f}{high:>9.2f}{other_median:>12.2f}{other_low:>9.2f}{other_high:>9.2f}"
    print(f"{what:<40}{ratios}{figures}", flush=True)


def changes(checkouts: list[Path], directory: Path, servers: int, rounds: int) -> None:
    """Measure durable changes of a pool that is 70 % full."""
    path = pool(directory / "pool.json", servers)
    workers: list[subprocess.Popen[str]] = []
    costs: list[tuple[list[float], list[float]]] = []
    for number, checkout in enumerate(checkouts):
        own = directory / f"{servers}-{number}"
        own.mkdir()
        shutil.copy(path, own / "state.json")
        words = [sys.executable, "-c", WORKER, str(checkout), str(own / "state.json")]
        worker = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        workers.append(worker)
        costs.append(([], []))
    for turn in range(rounds + 1):
        for worker, (allocations, releases) in zip(workers, costs, strict=True):
            assert worker.stdin and worker.stdout  # noqa: S101 - pipes, as told above
            for _ in range(5):  # so that not every change finds the processor's caches full of the other's
                worker.stdin.write("\n")
                worker.stdin.flush()
                allocate_ms, release_ms = map(float, worker.stdout.readline().split())
                if turn:  # the first warms up
                    allocations.append(allocate_ms)
                    releases.append(release_ms)
    for worker in workers:
        worker.communicate()
    for what, position in (("allocate", 0), ("release", 1)):
        show(f"{what}, {servers} servers", costs[0][position], costs[1][position])


def commands(checkouts: list[Path], directory: Path, rounds: int) -> None:
    """Measure whole commands on a pool of 4 servers, and what Python needs to start at all."""
    path = pool(directory / "commands.json", 4)
    environment = {**os.environ, "GPU_RESOURCE_FILE": str(path)}
    # In this order, every allocation is followed by its release.
    asked = [("--allocate", "bench", "2", "1"), ("--release", "bench"), ("--status",), ("--detail",)]
    costs: dict[str, tuple[list[float], list[float]]] = {words[0]: ([], []) for words in asked}
    bare: list[float] = []
    for turn in range(rounds + 1):
        for number in range(len(checkouts)):
            which = (number + turn) % 2  # nobody is always first
            for words in asked:
                command = [sys.executable, str(checkouts[which] / "cli_v01.py"), *words]
                work = partial(subprocess.run, command, env=environment, capture_output=True, check=True)
                costs[words[0]][which].append(timed(work))
        bare.append(timed(partial(subprocess.run, [sys.executable, "-c", BARE], check=True)))
    for name, (ours, theirs) in costs.items():
        show(name, ours[1:], theirs[1:])
    show(f"--detail, other: {BARE}", costs["--detail"][0][1:], bare[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, metavar="DIR", help="the other checkout")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--directory", type=Path, help="where to write; by default the temporary directory")
    args = parser.parse_args()
    checkouts = [HERE, args.other.resolve()]
    headings = f"{'ratio':>7}{'of the fastest':>16}{'ours, ms':>10}{'10 %':>9}{'90 %':>9}"
    print(f"{'':<40}{headings}{'other, ms':>12}{'10 %':>9}{'90 %':>9}")
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        for servers in (4, 100, 1000):
            changes(checkouts, Path(name), servers, args.rounds)
        commands(checkouts, Path(name), args.rounds)


if __name__ == "__main__":
    main()
