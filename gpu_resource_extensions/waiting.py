"""A request bound to a lease: it stands in line, gives its signs of life, and is taken up, or over, once granted.

Whoever is late must commit before anything may start, and that commit fails: taking up finds that the record has
lapsed. So a clock that is wrong, or a process that was stopped, can only cost a request its place.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gpu_resource_extensions.hosts import check_one_machine, note_machine
from gpu_resource_extensions.leases import LAPSE_S, SIGN_S, Lease, Leases, bind_to_machine, now_s, server_here
from gpu_resource_manager_v01 import (
    WAIT_RECHECK_S,
    Allocation,
    InvalidRequestError,
    NoCapacityError,
    OnWait,
    Request,
    Requester,
    ResourceManagerError,
    Server,
    Shortfall,
    State,
    Store,
    Task,
    WaitCancelledError,
    admit,
    allocation_of,
    answer_to,
    ask,
    ask_once,
    failures_reported,
    leave_unless_granted,
    placed_tasks,
    reclaim,
    records,
    shortfall,
)


class ClaimGoneError(ResourceManagerError):
    """The claim was taken over already, has lapsed, or is of another server or pool; nothing was started."""

    exit_code, code = 125, "claim_gone"
    template = (
        "タスク {task_id!r} の割り当てを引き継げません: {server} の {path} に、この割り当てはもうありません\n"
        "  対処: 両方の計算機の /etc/gpu-resource-file が同じプールを指すことを確かめ、もう一度実行してください"
    )

    def __init__(self, task_id: str, server: str, path: str) -> None:
        self.task_id, self.server, self.path = task_id, server, path


# --- What follows for the document: pure functions ------------------------------------------------


def outcome(state: State, request: Request) -> Allocation | Shortfall:
    """Return what ``request``, which has arrived, is granted by now, or what it lacks.

    :raises WaitCancelledError: it is neither placed nor in line any more.
    """
    mine = [record for record in records(state) if record["task_id"] == request["task_id"]]
    if not mine or mine[0].get("lease") != request.get("lease"):
        raise WaitCancelledError(request["task_id"], shortfall(state, request))
    return answer_to(state, request)


def conclude(state: State, request: Request) -> Allocation | Shortfall:
    """Do as :func:`outcome`, but let a request that is not placed leave the line."""
    return leave_unless_granted(state, request, outcome(state, request))


def renew(state: State, lease: str) -> bool:
    """Note a sign of life of what ``lease`` has claimed; ``False`` if nothing bears it unused any more."""
    found = [record for record in records(state) if record.get("lease") == lease and "seen" in record]
    for record in found:
        record["seen"] = state.get("clock", 0)
    return bool(found)


def take_up(state: State, request: Request, granted: Allocation) -> tuple[Server, Task]:
    """Return what ``request`` was granted, from now on in use, if it still has all of that."""
    for server, task in placed_tasks(state):
        if task.get("lease") == request["lease"] and allocation_of(server, task)["gpu_ids"] == granted["gpu_ids"]:
            task.pop("seen", None)
            return server, task
    raise WaitCancelledError(request["task_id"], shortfall(state, request))


def take_over(state: State, claim: str, request: Request) -> Allocation | None:
    """Let ``request``, of the machine that was claimed, have what the lease ``claim`` was granted and nobody uses."""
    for server, task in placed_tasks(state):
        if task.get("lease") == claim and "seen" in task and server["server_name"] == request["only_server_name"]:
            check_one_machine(state, request)
            who = {
                key: value for key, value in request.items() if key in Requester.__annotations__ and key != "command"
            }
            taken: Any = task
            taken.update({**who, "claim": claim})
            del task["seen"]
            note_machine(state, server, request)
            return allocation_of(server, task)
    return None


def unbind(state: State, request: Request) -> None:
    """Let the task that ``request`` has become live until it is released, whatever becomes of its lease."""
    for _, task in placed_tasks(state):
        if task.get("lease") == request["lease"]:
            task.pop("seen", None)
            del task["lease"]


# --- One request ----------------------------------------------------------------------------------


#: who applies a change to the document, with the living and the dead set right ahead of it
Change = Callable[[Callable[[State], Any]], Any]


class BoundRequest:
    """``request``, bound to a lease while the block runs, or for as long as a child holds it.

    In each step a crash leaves what the next change understands: a free lease that no record names is deleted, a
    record with a free lease is taken back, and only what stands in the document is ever called granted. So a lease is
    deleted only once no record names it any more.
    """

    lease: Lease
    granted: Allocation

    def __init__(
        self,
        request: Request,
        store: Store,
        leases: Callable[[State], Leases],
        look: Callable[[], State],
        change: Change,
    ) -> None:
        self.request, self._store, self._leases_of, self._look, self._change = request, store, leases, look, change
        state = store.read()
        self._leases, self._is_shared = leases(state), "clock" in state
        bind_to_machine(request, state)
        self._signed_s, self.is_taken = now_s(), False  # over, by another lease

    def __enter__(self) -> BoundRequest:
        if not os.path.isdir(self._leases.directory):
            self._store.update(lambda _: self._leases.make_directory())  # under the lock, for two may come at once
        with failures_reported(self._store.path):
            self.lease = self._leases.make()
        self.request["lease"] = self.lease.name
        return self

    def __exit__(self, *_: object) -> None:
        with failures_reported(self._store.path):
            if self.lease.give_up():
                if not self.is_taken:
                    # By the lease, not by the name, which a newer task may bear by now.
                    self._change(lambda state: reclaim(state, lambda record: record.get("lease") == self.lease.name))
                self._leases.delete(self.lease.name)

    def ask(self, wait_s: float, on_wait: OnWait | None, is_claim: bool = False) -> Allocation | Shortfall:
        """Return what is granted within ``wait_s`` seconds, or what it lacks.

        :param is_claim: somebody else will use it; what waits is always a claim until it is taken up.
        :raises WaitCancelledError: somebody released it.
        """

        def asked(state: State) -> Request:
            return {**self.request, "seen": state.get("clock", 0)} if wait_s or is_claim else self.request

        if not wait_s:
            return self._answer(self._change(lambda state: ask_once(state, asked(state))))
        deadline_s = time.monotonic() + wait_s
        answer: Allocation | Shortfall = self._change(lambda state: ask(state, asked(state)))
        told, seen, look_again_s = "", None, 0.0
        while isinstance(answer, Shortfall) and time.monotonic() < deadline_s:
            reason = str(NoCapacityError(answer))
            if on_wait and told != reason:
                told = reason
                on_wait(answer.waiting + 1, reason)
            time.sleep(max(0, min(self._store.poll_s, deadline_s - time.monotonic())))
            self.sign()
            mark = self._store.version_mark()
            if mark == seen and time.monotonic() < look_again_s:
                continue
            seen, look_again_s = mark, time.monotonic() + WAIT_RECHECK_S
            # On a copy, without a lock: only who would be served goes on to change the file.
            state = self._look()
            with failures_reported(self._store.path):
                reclaim(state, self._leases_of(state).is_ended)
            admit(state)
            answer = outcome(state, self.request)
            if not isinstance(answer, Shortfall):
                answer = self._change(lambda state: outcome(state, self.request))
        if isinstance(answer, Shortfall):
            answer = self._change(lambda state: conclude(state, self.request))
        return self._answer(answer)

    def _answer(self, answer: Allocation | Shortfall) -> Allocation | Shortfall:
        if not isinstance(answer, Shortfall):
            self.granted = answer
        return answer

    def prefer_this_machine(self) -> None:
        """Let the server that this machine is be tried first, if it is one of them: it needs no ssh."""
        with suppress(InvalidRequestError):
            self.request["prefer_server_id"] = server_here(self._store.read())["server_id"]

    @property
    def is_here(self) -> bool:
        """Tell whether what was granted is on this machine."""
        return self.granted["server_id"] == self.request["prefer_server_id"]

    def sign(self) -> bool:
        """Give a sign of life if it is time for one; ``False`` once nothing unused bears our lease any more."""
        if now_s() - self._signed_s < SIGN_S:
            return True
        is_there = True
        if self._is_shared:
            is_there = self._change(lambda state: renew(state, self.lease.name))
        else:
            with failures_reported(self._store.path):
                self.lease.sign()
        if is_there:
            self._signed_s = now_s()
        else:  # in time, it has not lapsed: somebody has it
            self.is_taken = now_s() - self._signed_s <= LAPSE_S
        return is_there

    def take_up(self, keeper: int) -> None:
        """Let what was granted be in use, and the lease say so, if it still stands; ahead of anything that uses it.

        The lease says so as a part of the change: whoever releases the task by force then comes before or after it. A
        change that is not committed does no harm, for the lease is given up then.
        """
        self._change(lambda state: self.lease.say_granted(*take_up(state, self.request, self.granted), keeper))

    def take_over(self, claim: str) -> Allocation:
        """Have what another machine has claimed for this one, once.

        :raises ClaimGoneError: there is no such claim, or no more, or for another server.
        """
        granted: Allocation | None = self._change(lambda state: take_over(state, claim, self.request))
        if granted is None:
            server = str(self.request["only_server_name"])
            raise ClaimGoneError(self.request["task_id"], server, self._store.path)
        self.granted = granted
        return granted

    def unbind(self) -> None:
        """Let what was granted, if it still stands, live until it is released."""

        def unbound(state: State) -> None:
            take_up(state, self.request, self.granted)
            unbind(state, self.request)

        self._change(unbound)

    def fate(self) -> str:
        """Withdraw the claim if nobody has taken it over; return what has become of it.

        That is "withdrawn", "running", "ended", or "unknown" if it has lapsed or has ended.
        """

        def withdrawn(state: State) -> str:
            if reclaim(state, lambda record: record.get("lease") == self.lease.name and "seen" in record):
                return "withdrawn"
            if any(record.get("claim") == self.lease.name for record in records(state)):
                return "running"
            return "ended" if self.is_taken or now_s() - self._signed_s <= LAPSE_S else "unknown"

        found: str = self._change(withdrawn)
        self.is_taken = found in ("running", "ended")
        return found
