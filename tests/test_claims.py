"""What nothing uses yet: it lapses without a sign of life, and can be taken over once, on its own server."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import GUARD_S, Children
from memory_store import MemoryStore

import gpu_resource_manager_v01
from gpu_resource_extensions.leases import LAPSE_S, Leases, boot_id, machine_id
from gpu_resource_extensions.waiting import BoundRequest, ClaimGoneError
from gpu_resource_manager_v01 import (
    GPUResourceManagerV01,
    InvalidRequestError,
    State,
    WaitCancelledError,
    host_name,
)


def waiting(state: Any) -> list[str]:
    return [request["task_id"] for request in state.get("waiting", ())]


def running(state: Any) -> list[str]:
    return [task["task_id"] for server in state["servers"] for task in server["running_tasks"]]


def lapse(directory: Path) -> None:
    """Let every lease in ``directory`` be one whose owner gave its last sign of life too long ago."""
    for lease in directory.iterdir():
        os.utime(lease, (0, 0))


# --- On a file's pool -----------------------------------------------------------------------------


@pytest.fixture
def busy(pool: Path) -> GPUResourceManagerV01:
    """A pool of one server that a reservation holds."""
    manager = GPUResourceManagerV01(pool, servers=[("here", 4, 8)])
    manager.obtain_resources("reservation", 4, 8)
    return manager


def start_waiter(busy: GPUResourceManagerV01, children: Children, result: Path) -> int:
    """Start a process that waits; it stops itself once it stands in line, and notes how its wait ends."""

    def wait() -> None:
        def stop_once(position: int, reason: str) -> None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSTOP)

        try:
            busy.obtain_resources("waiter", 4, 8, wait_s=GUARD_S, on_wait=stop_once)
            result.write_text("granted")
        except WaitCancelledError:
            result.write_text("cancelled")

    pid = children.start(wait)
    os.waitpid(pid, os.WUNTRACED)
    return pid


def test_stopped_waiter_loses_its_place_and_is_told_when_it_goes_on(
    busy: GPUResourceManagerV01, pool: Path, tmp_path: Path, children: Children
) -> None:
    pid = start_waiter(busy, children, tmp_path / "result")
    assert waiting(busy.get_detailed_status()) == ["waiter"]
    busy.release_resources("reservation")
    assert running(busy.get_detailed_status()) == ["waiter"], "granted, for it may go on any moment"
    lapse(pool.parent / ".leases")
    assert busy.obtain_resources("next", 4, 8)["task_id"] == "next"
    os.kill(pid, signal.SIGCONT)
    assert children.wait(pid) == 0
    assert (tmp_path / "result").read_text() == "cancelled"
    assert running(busy.get_detailed_status()) == ["next"]


def test_waiter_that_goes_on_in_time_gets_what_it_was_granted(
    busy: GPUResourceManagerV01, tmp_path: Path, children: Children
) -> None:
    pid = start_waiter(busy, children, tmp_path / "result")
    busy.release_resources("reservation")
    os.kill(pid, signal.SIGCONT)
    assert children.wait(pid) == 0
    assert (tmp_path / "result").read_text() == "granted"
    record: Any = busy.get_detailed_status()["servers"][0]["running_tasks"][0]
    assert "lease" not in record and "seen" not in record, "from now on it is a reservation like any other"


def test_job_that_has_begun_never_lapses(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "here")
    manager = GPUResourceManagerV01(pool, servers=[("here", 4, 8)])
    for wait_s in (0, GUARD_S):
        with manager.allocation("job", 4, 8, wait_s=wait_s):
            lapse(pool.parent / ".leases")
            assert manager.reclaim_ended() == []
            assert running(manager.get_detailed_status()) == ["job"]


def test_sign_of_life_costs_no_write_of_the_document(
    busy: GPUResourceManagerV01, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_resource_extensions.waiting.SIGN_S", 0)
    signs: list[int] = []
    stood = threading.Event()
    made: list[float] = []

    def on_wait(position: int, reason: str) -> None:
        lapse(pool.parent / ".leases")
        made.append(pool.stat().st_mtime_ns)
        stood.set()

    def wait() -> None:
        try:
            busy.obtain_resources("waiter", 4, 8, wait_s=GUARD_S, on_wait=on_wait)
        except WaitCancelledError:
            signs.append(-1)

    thread = threading.Thread(target=wait)
    thread.start()
    assert stood.wait(GUARD_S)
    lease = next((pool.parent / ".leases").iterdir())
    while not lease.stat().st_mtime:  # until it has given one
        pass
    assert pool.stat().st_mtime_ns == made[0]
    assert busy.reclaim_ended() == []
    busy.release_resources("reservation")
    thread.join()
    assert (signs, running(busy.get_detailed_status())) == ([], ["waiter"])


# --- In a pool that several machines share --------------------------------------------------------


class SharedStore(MemoryStore):
    """A store as those of databases are: the document has an id, and a clock that only the store sets."""

    def __init__(self, directory: Path) -> None:
        super().__init__(str(directory))
        self.clock_s = 1000

    def update(self, change: Any, instead_of_unusable: State | None = None) -> Any:
        def clocked(state: State) -> Any:
            state["pool"], state["clock"] = "0" * 32, self.clock_s
            return change(state)

        return super().update(clocked, instead_of_unusable)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SharedStore:
    (tmp_path / "leases").mkdir()
    store = SharedStore(tmp_path / "leases")
    monkeypatch.setattr(gpu_resource_manager_v01, "open_store", lambda *_: store)
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "here")
    return store


@pytest.fixture
def lab(shared: SharedStore, pool: Path) -> GPUResourceManagerV01:
    """A pool of two servers, of which this machine is the second."""
    manager = GPUResourceManagerV01(pool, servers=[("there", 8, 8), ("here", 4, 8)])
    shared.update(lambda state: None)
    return manager


def test_claim_prefers_this_machine_and_then_takes_the_first_that_fits(lab: GPUResourceManagerV01) -> None:
    with lab.claim("small", 4, 1) as claim:
        assert (claim.granted["server_name"], claim.is_here) == ("here", True)
    with lab.claim("big", 8, 1) as claim:
        assert (claim.granted["server_name"], claim.is_here) == ("there", False)
    with lab.claim("told", 4, 1, server="there") as claim:
        assert claim.granted["server_name"] == "there"
    with lab.claim("else", 4, 1, excluded_servers=["here"]) as claim:
        assert claim.granted["server_name"] == "there"
    with pytest.raises(InvalidRequestError), lab.claim("none", 8, 1, excluded_servers=["there"]):
        pass
    assert running(lab.get_detailed_status()) == []


def test_claim_is_taken_over_once(lab: GPUResourceManagerV01) -> None:
    with lab.claim("task", 4, 1) as claim:
        with lab.allocation("task", 4, 1, claim=claim.lease.name) as granted:
            assert granted == claim.granted
            record: Any = lab.get_detailed_status()["servers"][1]["running_tasks"][0]
            assert record["lease"] != claim.lease.name and record["claim"] == claim.lease.name
            assert "seen" not in record and record["local"] is True
            with pytest.raises(ClaimGoneError), lab.allocation("task", 4, 1, claim=claim.lease.name):
                pass
            assert claim.fate() == "running"
        assert claim.fate() == "ended"
    assert running(lab.get_detailed_status()) == []


def test_claim_of_another_server_is_refused_here(lab: GPUResourceManagerV01) -> None:
    with lab.claim("task", 4, 1, server="there") as claim:
        with pytest.raises(ClaimGoneError), lab.allocation("task", 4, 1, claim=claim.lease.name):
            pass
        assert claim.fate() == "withdrawn"


def test_claim_that_was_withdrawn_can_no_longer_be_taken_over(lab: GPUResourceManagerV01) -> None:
    with lab.claim("task", 4, 1) as claim:
        assert claim.fate() == "withdrawn"
        with pytest.raises(ClaimGoneError), lab.allocation("task", 4, 1, claim=claim.lease.name):
            pass


def test_claim_lapses_by_the_clock_of_the_store_alone(
    lab: GPUResourceManagerV01, shared: SharedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lab.claim("task", 4, 1) as claim:
        shared.clock_s += LAPSE_S
        lab.reclaim_ended()
        assert running(lab.get_detailed_status()) == ["task"], "not yet"
        shared.clock_s += 1
        lab.reclaim_ended()
        assert running(lab.get_detailed_status()) == []
        with pytest.raises(ClaimGoneError), lab.allocation("task", 4, 1, claim=claim.lease.name):
            pass
        monkeypatch.setattr("gpu_resource_extensions.waiting.LAPSE_S", -1)  # that long ago
        assert claim.fate() == "unknown", "for all we know, somebody has taken it over meanwhile"


def test_sign_of_life_keeps_a_claim(
    lab: GPUResourceManagerV01, shared: SharedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_resource_extensions.waiting.SIGN_S", 0)
    with lab.claim("task", 4, 1) as claim:
        for _ in range(5):
            shared.clock_s += LAPSE_S
            assert claim.sign()
        with lab.allocation("task", 4, 1, claim=claim.lease.name):
            assert not claim.sign(), "once it is taken over, it needs none"
            shared.clock_s += 10 * LAPSE_S
            lab.reclaim_ended()
            assert running(lab.get_detailed_status()) == ["task"]


def of_machine(state: Any, **who: object) -> None:
    """Let the one running task be a job of another machine, or of another start of one."""
    state["servers"][1]["running_tasks"][0].update(lease="f" * 32, **who)


@pytest.mark.parametrize(
    ("who", "is_ended"),
    [
        ({"boot": "another", "machine": "another", "host": "there"}, False),
        ({"boot": "another", "machine": machine_id(), "host": host_name()}, True),
        ({"boot": "another", "machine": machine_id(), "host": "a-clone"}, False),
        ({"boot": "another", "machine": "another", "host": host_name()}, False),
        ({"boot": boot_id(), "machine": machine_id(), "host": host_name()}, False),
    ],
    ids=["another machine", "an earlier start", "clone of the image", "the same name", "lease is lost"],
)
def test_job_is_judged_by_its_own_machine_only(
    lab: GPUResourceManagerV01, shared: SharedStore, who: dict[str, str], is_ended: bool
) -> None:
    lab.obtain_resources("job", 4, 1, prefer_server_id=1)
    shared.update(lambda state: of_machine(state, **who))
    lab.reclaim_ended()
    assert running(lab.get_detailed_status()) == ([] if is_ended else ["job"])


def test_second_machine_of_one_name_is_refused(lab: GPUResourceManagerV01, shared: SharedStore) -> None:
    with lab.allocation("job", 4, 1):
        pass

    def replaced(state: Any) -> None:
        state["servers"][1].update(boot="another", machine="another")

    shared.update(replaced)
    with pytest.raises(InvalidRequestError, match="別の計算機"), lab.allocation("job", 4, 1):
        pass
    with lab.claim("task", 4, 1) as claim:
        with pytest.raises(InvalidRequestError), lab.allocation("task", 4, 1, claim=claim.lease.name):
            pass
    lab.remove_server("here")
    lab.add_server("here", 4, 8)
    with lab.allocation("job", 4, 1) as granted:
        assert granted["server_name"] == "here"


def test_leases_of_a_shared_directory_are_told_apart_by_their_pool(tmp_path: Path) -> None:
    one, other = Leases(str(tmp_path), "1" * 32, 0), Leases(str(tmp_path), "2" * 32, 0)
    lease = one.make()
    assert lease.give_up()
    assert [name.startswith(f"gpu-lease-{'1' * 32}-") for name in os.listdir(tmp_path)] == [True]
    record: Any = {"lease": lease.name, "boot": boot_id()}
    assert one.is_ended(record) and not other.is_ended(record)


# --- Whoever is late ------------------------------------------------------------------------------


def test_late_reservation_is_not_told_that_it_has_the_gpus_of_another(
    pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = GPUResourceManagerV01(pool, servers=[("here", 4, 8)])
    manager.obtain_resources("first", 4, 8)
    unbind = BoundRequest.unbind

    def late(bound: BoundRequest) -> None:
        lapse(pool.parent / ".leases")
        manager.obtain_resources("other", 4, 8)
        unbind(bound)

    monkeypatch.setattr(BoundRequest, "unbind", late)

    def release(position: int, reason: str) -> None:
        manager.release_resources("first")

    with pytest.raises(WaitCancelledError):
        manager.obtain_resources("late", 4, 8, wait_s=GUARD_S, on_wait=release)
    assert running(manager.get_detailed_status()) == ["other"]


def test_task_that_is_released_by_force_while_it_is_taken_up_does_not_start(
    pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "here")
    manager = GPUResourceManagerV01(pool, servers=[("here", 4, 8)])
    take_up = BoundRequest.take_up

    def late(bound: BoundRequest, keeper: int) -> None:
        manager.release_resources("job", force=True)
        take_up(bound, keeper)

    monkeypatch.setattr(BoundRequest, "take_up", late)
    with pytest.raises(WaitCancelledError), manager.allocation("job", 4, 8):
        pass
    assert running(manager.get_detailed_status()) == []


def test_clock_that_steps_back_keeps_no_claim_of_the_dead(lab: GPUResourceManagerV01, shared: SharedStore) -> None:
    with lab.claim("task", 4, 1):
        shared.clock_s -= 10 * LAPSE_S
        assert lab.reclaim_ended() == ["task"]


def test_only_leases_of_this_user_that_are_not_young_are_swept(tmp_path: Path) -> None:
    leases = Leases(str(tmp_path), "1" * 32, 0)
    assert leases.make().give_up()
    assert not leases.has_old()
    leases.sweep([])
    assert len(os.listdir(tmp_path)) == 1, "for a document that has changed meanwhile may name it"
