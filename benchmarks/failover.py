#!/usr/bin/env python3
"""Count what is lost when the PostgreSQL server of a pool dies and its standby takes over.

    python benchmarks/failover.py [--promotions N] [--clients N] [--changes N] [--json FILE]

Clients change one pool all the time. After some changes the primary is killed, its standby promoted, and the dead one
made anew as the next standby. Lost is a change that a client was told is made, and that is not in the document; made
twice is one that stands there twice. The servers are those of the tests, on this machine: another network has another
delay, and loses more without a synchronous standby.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from database_servers import PostgreSQLServer, free_port, wait_until

from gpu_resource_manager_v01 import Store, new_state, open_store

LOCK_TIMEOUT_S = 60


class Outcome(NamedTuple):
    standby: str
    promotions: int
    acknowledged: int
    lost: int
    made_twice: int
    longest_wait_s: float  # of a client for one change


def note(store: Store, entry: str) -> None:
    def change(state: Any) -> None:
        state.setdefault("entries", []).append(entry)

    store.update(change)


def client(url: str, number: int, journal: Path, done: Any) -> None:
    """Change the pool until told to stop; write down what was acknowledged, and how long it took."""
    store, made = open_store(url, LOCK_TIMEOUT_S), 0
    with open(journal, "a", buffering=1) as lines:
        while not done.is_set():
            entry, started_s = f"{number}-{made}", time.monotonic()
            note(store, entry)
            lines.write(f"{entry} {time.monotonic() - started_s}\n")
            made += 1


def measure(is_synchronous: bool, promotions: int, clients: int, changes: int) -> Outcome:
    ports = free_port(), free_port()
    url = f"postgresql://lab@127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}/lab"
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        journals = [Path(directory, str(number)) for number in range(clients)]

        def acknowledged() -> list[list[str]]:
            return [line.split() for journal in journals if journal.exists() for line in open(journal)]

        primary = PostgreSQLServer(port=ports[0])
        primary.sql("CREATE DATABASE lab OWNER lab")
        open_store(url, LOCK_TIMEOUT_S).create(new_state(2))
        names: dict[str, Any] = {"synchronous_standby_names": "*"} if is_synchronous else {}
        standby = PostgreSQLServer(primary, port=ports[1], **names)
        done = fork.Event()
        workers = [fork.Process(target=client, args=(url, n, journals[n], done), daemon=True) for n in range(clients)]
        try:
            primary.set(**names)
            for worker in workers:
                worker.start()
            for _ in range(promotions):
                known = len(acknowledged())
                wait_until(lambda known=known: len(acknowledged()) >= known + changes, "changes")
                primary.remove()
                standby.promote()
                primary, standby = standby, PostgreSQLServer(standby, port=primary.port, **names)
            known = len(acknowledged())
            wait_until(lambda: len(acknowledged()) >= known + changes, "changes")
            done.set()
            for worker in workers:
                worker.join()
            document: Any = open_store(url, LOCK_TIMEOUT_S).read()
        finally:
            for worker in workers:
                worker.kill()
            primary.remove()
            standby.remove()
        told, found = acknowledged(), document["entries"]
        return Outcome(
            "synchronous" if is_synchronous else "asynchronous",
            promotions,
            len(told),
            len({entry for entry, _ in told} - {*found}),
            len(found) - len({*found}),
            max(float(seconds) for _, seconds in told),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--promotions", type=int, default=20, metavar="N")
    parser.add_argument("--clients", type=int, default=8, metavar="N")
    parser.add_argument("--changes", type=int, default=200, metavar="N", help="between two promotions")
    parser.add_argument("--standby", choices=("synchronous", "asynchronous"), help="only one of the two")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    outcomes = []
    for kind in [args.standby] if args.standby else ["synchronous", "asynchronous"]:
        outcome = measure(kind == "synchronous", args.promotions, args.clients, args.changes)
        outcomes.append(outcome._asdict())
        told, wait = f"{outcome.acknowledged} changes acknowledged", f"longest wait {outcome.longest_wait_s:.1f} s"
        fate = f"{outcome.lost} of them lost, {outcome.made_twice} made twice"
        print(f"{kind} standby: {outcome.promotions} promotions, {told}, {fate}, {wait}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
