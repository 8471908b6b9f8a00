#!/usr/bin/env python3
"""Count what is lost when the Redis server of a pool dies and its replica takes over.

    python benchmarks/failover_redis.py [--promotions N] [--clients N] [--changes N] [--behind CHANGES] [--json FILE]

As ``failover.py`` for PostgreSQL. With ``min-replicas-to-write 1`` a change is acknowledged once the replica has it.
``--behind``: the network between the two hangs that many acknowledged changes ahead of the primary's death; where the
replica has to confirm each change, there are none. What a client could not find out is unconfirmed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from database_servers import wait_until
from failover import LOCK_TIMEOUT_S, note
from redis_servers import Link, Proxy, RedisServer

from gpu_resource_manager_v01 import StateFileError, new_state, open_store


class Outcome(NamedTuple):
    replicas_to_write: int
    behind: int
    promotions: int
    acknowledged: int
    unconfirmed: int
    lost: int
    made_twice: int


def client(url: str, number: int, journal: Path, done: Any) -> None:
    """Change the pool until told to stop; write down what was acknowledged, and what was not."""
    store, tried = open_store(url, LOCK_TIMEOUT_S), 0
    with open(journal, "a", buffering=1) as lines:
        while not done.is_set():
            fate = "unconfirmed"
            with contextlib.suppress(StateFileError):
                note(store, f"{number}-{tried}")
                fate = "acknowledged"
            lines.write(f"{number}-{tried} {fate}\n")
            tried += 1


def measure(replicas: int, promotions: int, clients: int, changes: int, behind: int) -> Outcome:
    fork = multiprocessing.get_context("fork")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        journals = [Path(directory, str(number)) for number in range(clients)]

        def known(fate: str) -> list[str]:
            text = "".join(journal.read_text() for journal in journals if journal.exists())
            lines = [line.split() for line in text.splitlines()]
            return [line[0] for line in lines if line[1:] == [fate]]

        def more(count: int) -> None:
            end = len(known("acknowledged")) + count
            wait_until(lambda: len(known("acknowledged")) >= end, "changes")

        def replica_of(server: RedisServer) -> tuple[RedisServer, Link, RedisServer]:
            link = Link(server)
            return server, link, stack.enter_context(RedisServer(link, min_replicas_to_write=replicas))

        primary, link, replica = replica_of(stack.enter_context(RedisServer(min_replicas_to_write=replicas)))
        open_store(primary.url(), LOCK_TIMEOUT_S).create(new_state(2))
        done, address = fork.Event(), stack.enter_context(Proxy(primary.url()))
        workers = [fork.Process(target=client, args=(address.url, n, journals[n], done)) for n in range(clients)]
        for worker in workers:
            worker.start()
            stack.callback(worker.kill)
        for _ in range(promotions):
            more(changes)
            if behind:
                link.hold()
                if replicas:
                    wait_until(lambda server=primary: server.ask("INFO", "clients")["blocked_clients"], "a wait")
                else:
                    more(behind)
            primary.kill()
            link.cut()
            replica.promote()
            address.target = ("127.0.0.1", replica.port)
            primary, link, replica = replica_of(replica)
        more(changes)
        done.set()
        for worker in workers:
            worker.join()
        document: Any = open_store(primary.url(), LOCK_TIMEOUT_S).read()
        told, found = known("acknowledged"), document["entries"]
        lost, twice = len({*told} - {*found}), len(found) - len({*found})
        return Outcome(replicas, behind, promotions, len(told), len(known("unconfirmed")), lost, twice)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--promotions", type=int, default=20, metavar="N")
    parser.add_argument("--clients", type=int, default=8, metavar="N")
    parser.add_argument("--changes", type=int, default=200, metavar="N", help="between two promotions")
    parser.add_argument("--behind", type=int, default=0, metavar="CHANGES")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    outcomes = []
    for replicas in 1, 0:
        outcome = measure(replicas, args.promotions, args.clients, args.changes, args.behind)
        outcomes.append(outcome._asdict())
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in outcomes[-1].items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
