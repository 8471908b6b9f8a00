#!/usr/bin/env python3
"""Measure what the page of ``gpu-resource-monitor`` costs its server, and how soon a change is shown.

    python benchmarks/monitor_load.py [--viewers N] [--servers N] [--tasks N] [--seconds S] [--every S] [--json FILE]

Viewers keep the page open as a browser does, half of them in each language, while the pool is changed all the time.
Counted are the processor time of the monitor, as a share of one core, and the most memory that it ever had; its
start is in neither the time nor the changes. Of each change, how long it took until the last viewer had it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from monitors import Monitor, made_state, write

from gpu_resource_manager_v01 import GPUResourceManagerV01


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def measure(viewers: int, servers: int, tasks: int, seconds: float, every_s: float) -> dict[str, float]:
    delays_s: list[float] = []
    with tempfile.TemporaryDirectory() as directory, ExitStack() as opened:
        pool = Path(directory, "resource_status.json")
        write(pool, made_state(servers, [f"task-{number}" for number in range(tasks)], ["waits"]))
        manager = GPUResourceManagerV01(pool)
        monitor = opened.enter_context(Monitor(pool))
        ready = opened.enter_context(selectors.DefaultSelector())
        received = 0
        for number in range(viewers):
            path = f"/events?lang={('ja', 'en')[number % 2]}"
            connection = opened.enter_context(monitor.connect(f"GET {path} HTTP/1.1\nHost: localhost\n\n"))
            connection.setblocking(False)
            ready.register(connection, selectors.EVENT_READ, {"seen": -1, "rest": b""})

        def read(end_s: float, change: int) -> bool:
            """Read what comes until every viewer has this change; ``False`` if the time is over."""
            nonlocal received
            while any(key.data["seen"] < change for key in ready.get_map().values()):
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    return False
                for key, _ in ready.select(left_s):
                    data = os.read(key.fd, 1 << 20)
                    if not data:
                        sys.exit("a viewer was dropped")
                    received += len(data)
                    found = re.findall(rb"change-(\d+)\D", key.data["rest"] + data)
                    key.data["rest"] = data[-20:]
                    key.data["seen"] = max([key.data["seen"], *map(int, found)])
            return True

        def show(change: int) -> float:
            """Make a change, and return how long it took until every viewer had it."""
            manager.release_resources(f"change-{change - 1}")
            manager.allocate_resources(f"change-{change}", 8, 8)
            changed_s = time.monotonic()
            if not read(changed_s + 60, change):
                sys.exit("a change was not shown within a minute")
            return time.monotonic() - changed_s

        show(0)
        started_s, processor_before_s, change = time.monotonic(), processor_s(monitor.process.pid), 0
        received = 0
        while time.monotonic() < started_s + seconds:
            due_s = time.monotonic() + every_s * (0.5 + 0.618 * change % 1)  # not in step with its looks
            change += 1
            delays_s.append(show(change))
            read(due_s, change + 1)
        passed_s = time.monotonic() - started_s
        used_s = processor_s(monitor.process.pid) - processor_before_s
        return {
            "viewers": viewers,
            "servers": servers,
            "tasks": tasks,
            "seconds": passed_s,
            "changes": change,
            "core_share": used_s / passed_s,
            "peak_mb": peak_mb(monitor.process.pid),
            "median_delay_s": statistics.median(delays_s),
            "longest_delay_s": max(delays_s),
            "sent_mb": received / 1e6,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--servers", type=int, default=100)
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--every", type=float, default=2, help="seconds between two changes, on average")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measure(args.viewers, args.servers, args.tasks, args.seconds, args.every)
    for name, value in found.items():
        print(f"{name:>16} {value:.3f}" if isinstance(value, float) else f"{name:>16} {value}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
