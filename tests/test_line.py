"""The line of waiting requests, limits and hosts: pure decisions."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_resource_extensions.hosts import server_of_host
from gpu_resource_extensions.waiting import conclude, outcome, unbind
from gpu_resource_manager_v01 import (
    MAX_PASSED_OVER,
    PASSED_OVER_GROWTH,
    Allocation,
    DuplicateTaskError,
    InvalidRequestError,
    NoCapacityError,
    Request,
    Shortfall,
    State,
    WaitCancelledError,
    admit,
    ask,
    ask_once,
    check_state,
    could_hold,
    decode_state,
    encode_state,
    end_task,
    fewest_releases,
    find_task,
    limits,
    missing,
    new_request,
    new_servers,
    new_state,
    place,
    reclaim,
    records,
    remove_task,
    reserved_servers,
    set_waiting,
)

NOW = "2026-01-01T00:00:00"


def request(task_id: str, gpus: int, cpus: int = 1, **more: Any) -> Request:
    return new_request(task_id, gpus, cpus, **{"lease": f"{abs(hash(task_id)):032x}"[:32], **more})


def one_server(gpus: int = 8) -> State:
    return {**new_state(servers=1, gpus=gpus), "last_updated": NOW}


def arrive(state: State, wanted: Request, stay: bool = True) -> Allocation | Shortfall:
    answer = ask(state, wanted) if stay else ask_once(state, wanted)
    check_state(state)
    return answer


def release(state: State, task_id: str) -> None:
    found = find_task(state, task_id)
    assert found
    remove_task(*found)
    admit(state)
    check_state(state)


def waiting(state: State) -> list[str]:
    return [entry["task_id"] for entry in state.get("waiting", [])]


def running(state: State) -> list[str]:
    return [task["task_id"] for server in state["servers"] for task in server["running_tasks"]]


# --- The line -------------------------------------------------------------------------------------


def test_request_that_fits_is_placed_at_once_though_a_bigger_one_waits() -> None:
    state = one_server()
    arrive(state, request("first", 6))
    arrive(state, request("big", 8))
    arrive(state, request("small", 2))
    assert (running(state), waiting(state)) == (["first", "small"], ["big"])
    assert state["waiting"][0]["passed_over"] == 1


def test_keys_of_a_task_in_a_request_edited_by_hand_do_not_end_up_in_the_task() -> None:
    state = one_server()
    arrive(state, request("all", 8))
    edited: Any = {**request("edited", 4), "start_time": 5, "allocated_gpus": [9], "allocated_cpus": -1, "note": "kept"}
    arrive(state, edited)
    release(state, "all")
    [task] = state["servers"][0]["running_tasks"]
    assert (task["start_time"], task["allocated_gpus"], task["allocated_cpus"]) == (NOW, [0, 1, 2, 3], 1)
    assert {**task}["note"] == "kept"


def test_those_who_wait_are_placed_in_order_of_arrival() -> None:
    state = one_server()
    arrive(state, request("all", 8))
    for name in ("a", "b", "c"):
        arrive(state, request(name, 4))
    release(state, "all")
    assert (running(state), waiting(state)) == (["a", "b"], ["c"])


def test_request_that_does_not_stay_leaves_no_trace() -> None:
    state = one_server()
    arrive(state, request("all", 8))
    before = encode_state(state)
    refused = arrive(state, request("late", 2), stay=False)
    assert isinstance(refused, Shortfall)
    assert encode_state(state) == before


def test_request_that_does_not_wait_stands_behind_those_who_do() -> None:
    state = one_server()
    arrive(state, request("all", 8))
    arrive(state, request("waits", 8, passed_over=MAX_PASSED_OVER))
    state["waiting"][0]["passed_over"] = MAX_PASSED_OVER
    found = find_task(state, "all")
    assert found
    server, task = found
    task["allocated_gpus"], server["available_gpus"] = [0, 1], [2, 3, 4, 5, 6, 7]
    refused = arrive(state, request("late", 2), stay=False)
    assert isinstance(refused, Shortfall)
    assert "先に待っている要求のために確保中" in str(NoCapacityError(refused))
    assert refused.waiting == 1


def test_request_for_another_machine_passes_nobody_over() -> None:
    state = new_state(servers=2)
    for name in ("a", "b"):
        arrive(state, request(name, 8))
    arrive(state, request("here", 8, only_server_name="gpu-server-0"))
    release(state, "b")
    arrive(state, request("there", 8, only_server_name="gpu-server-1"))
    assert "there" in running(state)
    assert state["waiting"][0]["passed_over"] == 0


def test_server_closed_for_one_request_is_open_to_those_before_it() -> None:
    state = one_server()
    arrive(state, request("x", 6))
    arrive(state, request("first", 4))
    arrive(state, request("second", 8))
    state["waiting"][1]["passed_over"] = MAX_PASSED_OVER
    release(state, "x")
    assert (running(state), waiting(state)) == (["first"], ["second"])


def test_line_is_kept_with_unknown_keys_and_ends_without_a_trace() -> None:
    state = one_server()
    arrive(state, request("all", 8))
    arrive(state, request("waits", 2, note="kept"))
    again = decode_state(encode_state(state))
    assert again["waiting"][0]["note"] == "kept"  # type: ignore[typeddict-item]
    release(again, "all")
    assert "waiting" not in again
    [task] = again["servers"][0]["running_tasks"]
    assert task["note"] == "kept"  # type: ignore[typeddict-item]
    assert "passed_over" not in task


def test_identifier_of_a_waiting_request_is_taken() -> None:
    state = one_server()
    arrive(state, request("all", 8))
    arrive(state, request("waits", 2))
    with pytest.raises(DuplicateTaskError):
        ask(state, request("waits", 2, lease="0" * 32))
    with pytest.raises(DuplicateTaskError):
        ask(state, request("all", 2, lease="0" * 32))


def test_looking_again_keeps_the_place_and_finds_the_grant() -> None:
    state = one_server()
    arrive(state, request("all", 8))
    mine = request("mine", 4)
    arrive(state, mine)
    arrive(state, request("other", 4))
    before = encode_state(state)
    answer = outcome(state, mine)
    assert encode_state(state) == before
    assert isinstance(answer, Shortfall)
    assert answer.waiting == 0
    assert waiting(state) == ["mine", "other"]
    release(state, "all")
    before = encode_state(state)
    answer = outcome(state, mine)
    assert encode_state(state) == before
    assert not isinstance(answer, Shortfall)
    assert answer["gpu_ids"] == [0, 1, 2, 3]
    unbind(state, mine)
    assert encode_state(state) != before
    assert "lease" not in find_task(state, "mine")[1]  # type: ignore[index]


def test_who_gives_up_leaves_the_line_unless_it_has_been_placed() -> None:
    state = one_server()
    arrive(state, request("all", 8))
    late, lucky = request("late", 4), request("lucky", 4)
    arrive(state, late)
    arrive(state, lucky)
    refused = conclude(state, late)
    assert isinstance(refused, Shortfall) and refused.fewest_releases == ["all"]
    assert waiting(state) == ["lucky"]
    release(state, "all")
    granted = conclude(state, lucky)
    assert not isinstance(granted, Shortfall)
    assert granted["gpu_ids"] == [0, 1, 2, 3]
    assert running(state) == ["lucky"]


def test_who_waits_learns_that_somebody_has_released_its_request() -> None:
    state = one_server()
    arrive(state, request("all", 8))
    mine = request("mine", 4)
    arrive(state, mine)
    end_task(state, "mine")
    with pytest.raises(WaitCancelledError, match="'mine' の待機は取り消されました"):
        outcome(state, mine)
    arrive(state, request("mine", 2, lease="0" * 32))  # another one of that name
    with pytest.raises(WaitCancelledError) as caught:
        conclude(state, mine)
    assert (caught.value.task_id, caught.value.fewest_releases) == ("mine", ["all"])
    assert waiting(state) == ["mine"], "the other one stays"


def test_who_ended_leaves_tasks_and_line() -> None:
    state = one_server()
    dead = request("dead", 8)
    arrive(state, dead)
    arrive(state, request("gone", 8))
    arrive(state, request("alive", 8))
    ended = {dead["lease"], state["waiting"][0]["lease"]}
    assert reclaim(state, lambda record: record.get("lease") in ended) == ["dead", "gone"]
    admit(state)
    assert (running(state), waiting(state)) == (["alive"], [])


# --- What the line promises -------------------------------------------------------------------------


def line(state: State) -> list[Request]:
    return state.get("waiting", [])


def pool_with_line(servers: int, *waiting: Request) -> State:
    """Return idle servers of 8 GPUs each, and a line in front of them."""
    state: State = {**new_state(servers=servers), "last_updated": NOW, "min_gpus_per_task": 1}
    set_waiting(state, [*waiting])
    return state


def fill(state: State, server_id: int, *gpus: int) -> None:
    """Let tasks hold so many GPUs each of one server."""
    for number, count in enumerate(gpus):
        place(state["servers"][server_id], f"held-{server_id}-{number}", count, 1, NOW)


def least_missing(state: State, wanted: Request) -> tuple[int, int]:
    """Return what is missing on the server that is closest to holding ``wanted``."""
    return min(missing(server, wanted) for server in state["servers"] if could_hold(server, wanted))


def has_room(state: State, server_id: int, wanted: Request) -> bool:
    server = state["servers"][server_id]
    return could_hold(server, wanted) and missing(server, wanted) == (0, 0)


@settings(deadline=None)
@given(st.data())
def test_nobody_waits_who_could_run_on_a_server_that_is_not_reserved_for_an_earlier_one(data: st.DataObject) -> None:
    state = pool_with_line(data.draw(st.integers(1, 3)))
    names = [server["server_name"] for server in state["servers"]]
    limit = data.draw(st.integers(0, 4))
    anything: st.SearchStrategy[Any] = st.booleans()
    for number in range(data.draw(st.integers(1, 40))):
        if running(state) and data.draw(anything):
            found = find_task(state, data.draw(st.sampled_from(running(state))))
            assert found
            remove_task(*found)
        else:
            only = data.draw(st.sampled_from([None, None, *names]))
            wanted = request(f"t{number}", data.draw(st.integers(1, 8)), only_server_name=only)
            set_waiting(state, [*line(state), wanted])
        before = decode_state(encode_state(state))
        placed = admit(state, limit)
        check_state(state)
        # None is lost: who has left the line runs, and nobody who ran has stopped.
        assert {record["task_id"] for record in records(state)} == {record["task_id"] for record in records(before)}
        assert set(running(state)) == {*running(before), *placed}
        assert waiting(state) == [task_id for task_id in waiting(before) if task_id not in placed]
        assert not admit(state, limit), "all that may be placed was placed at once"
        for position, entry in enumerate(line(state)):
            reserved = reserved_servers(state, line(state)[:position], limit)
            for server_id in range(len(names)):
                assert server_id in reserved or not has_room(state, server_id, entry)
        if line(state):
            first = line(state)[0]
            assert not any(has_room(state, server_id, first) for server_id in range(len(names)))


def test_nobody_waits_for_a_server_whose_turn_has_passed_to_another() -> None:
    first = request("first", 8, only_server_name="gpu-server-0", passed_over=MAX_PASSED_OVER - 1)
    second = request("second", 8, passed_over=MAX_PASSED_OVER)
    small = [request(f"small-{number}", 2, only_server_name=f"gpu-server-{number}") for number in (1, 0)]
    state = pool_with_line(2, first, second, *small)
    fill(state, 0, 4)
    fill(state, 1, 2)
    # The second has the other server reserved, until the small one placed on this one makes the first due.
    assert reserved_servers(state, line(state)) == {1}
    assert sorted(admit(state)) == ["small-0", "small-1"]
    assert reserved_servers(state, line(state)) == {0}


@settings(deadline=None)
@given(
    gpus=st.integers(3, 8),
    held=st.lists(st.sampled_from([(1,) * 8, (2,) * 4, (1, 2, 1, 2, 1, 1)]), min_size=1, max_size=3),
    small=st.sampled_from([(1,), (2,), (1, 2)]),
    rng=st.randoms(use_true_random=False),
)
def test_big_request_that_is_due_is_placed_after_finitely_many_releases_under_an_endless_stream(
    gpus: int, held: list[tuple[int, ...]], small: tuple[int, ...], rng: random.Random
) -> None:
    """Small ones stand ready for every GPU that comes free, and whatever runs ends some time.

    A big request that is due and first in line has a server kept for it, so what it lacks on the server
    that is closest never grows, and shrinks whenever a task there ends.
    """
    big = request("big", gpus, passed_over=MAX_PASSED_OVER)
    state = pool_with_line(len(held), big)
    for server_id, counts in enumerate(held):
        fill(state, server_id, *counts)
    lacking = least_missing(state, big)
    releases = 0
    while "big" in waiting(state):
        assert releases < 1000, "it starves"
        keep_small_ones_waiting(state, *small)
        assert least_missing(state, big) <= lacking
        kept = reserved_servers(state, line(state))
        assert [missing(state["servers"][server_id], big) for server_id in kept] == [least_missing(state, big)]
        lacking = least_missing(state, big)
        # Any task may end next, but each ends some time: every other time it is the oldest.
        release(state, rng.choice(running(state)) if releases % 2 else oldest(state)[0])
        releases += 1
    assert "big" in running(state)


def keep_small_ones_waiting(state: State, *gpus: int) -> None:
    """Let more small requests arrive, until some are left that find no room."""
    while sum(task_id.startswith("small") for task_id in waiting(state)) < 6:
        number = state.setdefault("arrived", 0)  # type: ignore[typeddict-item]
        state["arrived"] = number + 1  # type: ignore[typeddict-unknown-key]
        arrive(state, request(f"small-{number}", gpus[number % len(gpus)]))


def oldest(state: State) -> list[str]:
    """Return what runs, in the order of its arrival; what was there at the beginning comes first."""
    return sorted(running(state), key=lambda task_id: int(task_id[6:]) if task_id.startswith("small-") else -1)


THIRTYFOLD = MAX_PASSED_OVER * PASSED_OVER_GROWTH


@pytest.mark.parametrize(
    ("passed_over", "kept"),
    [
        (0, 0),
        (MAX_PASSED_OVER - 1, 0),
        (MAX_PASSED_OVER, 1),
        (THIRTYFOLD - 1, 1),
        (THIRTYFOLD, 2),
        (THIRTYFOLD * PASSED_OVER_GROWTH - 1, 2),
        (THIRTYFOLD * PASSED_OVER_GROWTH, 3),
    ],
)
def test_one_server_is_kept_for_a_big_request_until_its_count_has_grown_thirtyfold(passed_over: int, kept: int) -> None:
    assert (MAX_PASSED_OVER, PASSED_OVER_GROWTH) == (32, 30)
    state = pool_with_line(4, request("big", 8, passed_over=passed_over))
    for server_id in range(4):
        fill(state, server_id, 1)
    assert len(reserved_servers(state, line(state))) == kept


@pytest.mark.parametrize(("passed_over", "kept"), [(0, 0), (MAX_PASSED_OVER, 1), (THIRTYFOLD, 2)])
def test_every_server_that_is_not_kept_stays_open_to_small_requests(passed_over: int, kept: int) -> None:
    state = pool_with_line(4, request("big", 8, passed_over=passed_over))
    for server_id in range(4):
        fill(state, server_id, 1)
    for number in range(28):
        arrive(state, request(f"s{number}", 1))
    assert [len(server["available_gpus"]) for server in state["servers"]] == [7] * kept + [0] * (4 - kept)
    assert len(line(state)) == 1 + 7 * kept
    refused = ask_once(state, request("late", 1))
    assert isinstance(refused, Shortfall)
    assert str(NoCapacityError(refused)).count("先に待っている要求のために確保中") == kept


def test_reserved_server_is_the_one_where_least_is_missing() -> None:
    state = pool_with_line(3, request("big", 8, 60, passed_over=MAX_PASSED_OVER))
    fill(state, 0, 2, 2)
    fill(state, 1, 3)
    fill(state, 2, 3)
    state["servers"][1]["running_tasks"][0]["allocated_cpus"] += 8  # the same GPUs, so the CPUs decide
    state["servers"][1]["available_cpus"] -= 8
    assert reserved_servers(state, line(state)) == {2}
    release(state, "held-0-0")
    assert reserved_servers(state, line(state)) == {0}


@pytest.mark.parametrize("pinned", [None, "before", "behind"])
def test_forgotten_reservation_on_one_server_starves_nobody(pinned: str | None) -> None:
    """A task of 2 GPUs on the first server never ends, which keeps the rest of that server reserved in vain.

    All others end, the oldest first, and small ones stand ready for every GPU that comes free.
    """
    big = request("big", 8, passed_over=MAX_PASSED_OVER)
    to_the_first = request("pinned", 8, passed_over=MAX_PASSED_OVER, only_server_name="gpu-server-0")
    state = pool_with_line(2, *{"before": [to_the_first, big], "behind": [big, to_the_first]}.get(pinned or "", [big]))
    fill(state, 0, 2)
    fill(state, 1, 2, 2, 2, 2)
    assert reserved_servers(state, line(state)) == {0}
    releases = 0
    while "big" in waiting(state):
        assert releases < 2 * THIRTYFOLD, "it starves"
        keep_small_ones_waiting(state, 2)
        release(state, next(task_id for task_id in oldest(state) if task_id != "held-0-0"))
        releases += 1
    assert THIRTYFOLD - MAX_PASSED_OVER <= releases <= THIRTYFOLD
    assert "big" in running(state)
    assert find_task(state, "held-0-0"), "and what somebody has forgotten is theirs still"


def test_requests_that_can_only_use_different_servers_never_wait_for_each_others_turn() -> None:
    names = [f"gpu-server-{number}" for number in range(3)]
    pinned = [request(f"for-{name}", 8, only_server_name=name, passed_over=MAX_PASSED_OVER) for name in names]
    state = pool_with_line(3, *pinned)
    for server_id in range(3):
        fill(state, server_id, 4, 4)
    assert reserved_servers(state, line(state)) == {0, 1, 2}
    for number in range(12):
        arrive(state, request(f"s{number}", 2))
    # The last one is served first, for its server empties first; no small one came in between.
    for server_id in (2, 0, 1):
        release(state, f"held-{server_id}-0")
        release(state, f"held-{server_id}-1")
        assert f"for-gpu-server-{server_id}" in running(state)
    assert [task_id for task_id in waiting(state) if task_id.startswith("for")] == []


def test_who_could_use_a_server_of_an_earlier_due_one_waits_for_its_turn() -> None:
    due = MAX_PASSED_OVER
    state = pool_with_line(3, request("first", 8, passed_over=due), request("second", 8, passed_over=due))
    for server_id in range(3):
        fill(state, server_id, 4)
    assert reserved_servers(state, line(state)) == {0}
    release(state, "held-0-0")
    assert (running(state)[0], waiting(state)) == ("first", ["second"])
    assert reserved_servers(state, line(state)) == {1}, "now it is the turn of the second"


def test_request_that_does_not_wait_is_refused_if_only_the_reserved_server_has_room() -> None:
    state = pool_with_line(2, request("big", 8, passed_over=MAX_PASSED_OVER))
    fill(state, 0, 2)
    fill(state, 1, 8)
    before = encode_state(state)
    refused = arrive(state, request("late", 2), stay=False)
    assert isinstance(refused, Shortfall)
    assert str(NoCapacityError(refused)).splitlines()[:3] == [
        "GPU 2 個と CPU 1 個を同時に確保できるサーバーがありません",
        "  gpu-server-0: 先に待っている要求のために確保中",
        f"    held-0-0: GPU 2 個・CPU 1 個 ({NOW} から)",
    ]
    assert refused.waiting == 1
    assert encode_state(state) == before


def test_request_that_does_not_wait_is_placed_on_a_server_that_is_not_reserved() -> None:
    state = pool_with_line(2, request("big", 8, passed_over=MAX_PASSED_OVER))
    fill(state, 0, 2)
    fill(state, 1, 4)
    for preferred in (None, 0):
        granted = arrive(state, new_request(f"late-{preferred}", 2, 1, preferred), stay=False)
        assert not isinstance(granted, Shortfall)
        assert granted["server_name"] == "gpu-server-1"
    assert waiting(state) == ["big"]
    assert line(state)[0]["passed_over"] == MAX_PASSED_OVER + 2


# --- What may be asked for, and where it may run ----------------------------------------------------


def test_limits_follow_the_largest_server_and_the_described_minimum() -> None:
    state = new_state()
    assert limits(state) == (2, 8, 64)
    state["servers"] = new_servers([("a", 4, 128), ("b", 16, 8)])
    state["min_gpus_per_task"] = 1
    assert limits(state) == (1, 16, 128)
    for gpus, cpus in ((16, 9), (17, 1), (0, 1), (1, 129)):
        with pytest.raises(InvalidRequestError):
            arrive(state, request("t", gpus, cpus))
    assert not isinstance(arrive(state, request("t", 16, 8)), Shortfall)


def pool_of(*names: str) -> State:
    state = new_state()
    state["servers"] = new_servers([(name, 8, 64) for name in names])
    return state


@pytest.mark.parametrize(
    ("servers", "host", "named", "found"),
    [
        (["a", "b"], "b", None, "b"),
        (["a", "b.lab.example"], "b", None, "b.lab.example"),
        (["a", "b"], "b.lab.example", None, "b"),
        (["a", "B"], "b", None, "B"),
        (["a", "b"], "c", "b", "b"),
        (["a", "b"], "c", None, None),
        (["a", "b"], "c", "d", None),
        (["b.x", "b.y"], "b", None, None),
        (["b.x", "b.y"], "b.y", None, "b.y"),
        (["a", "b"], "b", "a", None),
    ],
)
def test_machine_is_the_server_that_bears_its_name(
    servers: list[str], host: str, named: str | None, found: str | None
) -> None:
    state = pool_of(*servers)
    if found is None:
        with pytest.raises(InvalidRequestError, match="--add-server NAME:GPUS:CPUS"):
            server_of_host(state, host, named)
    else:
        assert server_of_host(state, host, named)["server_name"] == found


def test_machine_cannot_be_two_servers_at_once() -> None:
    state = pool_of("a", "b")
    place(state["servers"][0], "t", 2, 1, NOW, {"host": "node", "local": True})
    arrive(state, request("same", 2, host="node", local=True, only_server_name="a"))
    with pytest.raises(InvalidRequestError, match="既にサーバー a として"):
        arrive(state, request("other", 2, host="node", local=True, only_server_name="b"))
    arrive(state, request("elsewhere", 2, host="other", local=True, only_server_name="b"))
    state = pool_of("a", "b")
    arrive(state, request("x", 8))
    arrive(state, request("waits", 8, host="node", local=True, only_server_name="a"))
    with pytest.raises(InvalidRequestError, match="既にサーバー a として"):
        arrive(state, request("other", 2, host="node", local=True, only_server_name="b"))


def test_fewest_releases_are_the_fewest() -> None:
    state = new_state(servers=1, gpus=16, cpus=64)
    server = state["servers"][0]
    for name, gpus, cpus in (("a", 2, 30), ("b", 2, 1), ("c", 6, 1), ("d", 4, 20)):
        place(server, name, gpus, cpus, NOW)

    def names(gpus: int, cpus: int) -> list[str]:
        return [task["task_id"] for task in fewest_releases(server, gpus, cpus)]

    assert names(0, 0) == []
    assert names(6, 1) == ["c"]
    assert names(6, 20) == ["a", "d"]
    assert names(7, 2) == ["a", "c"]
    assert len(names(14, 52)) == 4


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 8)), max_size=6),
    st.integers(0, 24),
    st.integers(0, 48),
)
def test_fewest_releases_agree_with_trying_them_all(tasks: list[tuple[int, int]], gpus: int, cpus: int) -> None:
    from itertools import combinations

    server = new_state(servers=1, gpus=24, cpus=48)["servers"][0]
    for number, (held_gpus, held_cpus) in enumerate(tasks):
        place(server, f"t{number}", held_gpus, held_cpus, NOW)
    if sum(task[0] for task in tasks) < gpus or sum(task[1] for task in tasks) < cpus:
        return
    sizes = [
        len(chosen)
        for size in range(len(tasks) + 1)
        for chosen in combinations(tasks, size)
        if sum(task[0] for task in chosen) >= gpus and sum(task[1] for task in chosen) >= cpus
    ]
    found = fewest_releases(server, gpus, cpus)
    assert len(found) == min(sizes)
    assert sum(len(task["allocated_gpus"]) for task in found) >= gpus
    assert sum(task["allocated_cpus"] for task in found) >= cpus


def test_refusal_names_the_holders_and_who_waits() -> None:
    state = new_state(servers=2)
    place(state["servers"][0], "x", 8, 60, NOW, {"user": "alice"})
    place(state["servers"][1], "y", 5, 1, NOW)
    place(state["servers"][1], "z", 2, 1, NOW)
    arrive(state, request("waits", 8))
    refused = arrive(state, request("late", 4, 8), stay=False)
    assert isinstance(refused, Shortfall)
    assert str(NoCapacityError(refused)).splitlines() == [
        "GPU 4 個と CPU 8 個を同時に確保できるサーバーがありません",
        "  gpu-server-0: GPU 4 個・CPU 4 個不足",
        f"    x: GPU 8 個・CPU 60 個 ({NOW} から, alice)",
        "  gpu-server-1: GPU 3 個不足",
        f"    y: GPU 5 個・CPU 1 個 ({NOW} から)",
        f"    z: GPU 2 個・CPU 1 個 ({NOW} から)",
        "  次の 1 件が解放されれば足ります: x",
        "  先に待っている要求: 1 件",
    ]
    assert refused.fewest_releases == ["x"]


# --- A whole trace ----------------------------------------------------------------------------------


def test_replay_of_a_trace_refuses_nobody_who_waits_and_beats_strict_fifo(tmp_path: Path) -> None:
    rng = random.Random(7)
    rows = [(second * 60, rng.choice([1, 1, 1, 2, 4, 8]), rng.randint(60, 6000)) for second in range(300)]
    trace = tmp_path / "trace.csv"
    trace.write_text("submit_time_s,num_gpu,duration_s\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    command = [sys.executable, str(PROJECT / "benchmarks" / "replay.py"), str(trace)]
    table = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    cells = {line[:24].strip(): line[24:].split() for line in table.splitlines()[1:]}
    assert int(cells["no line"][0]) > 0
    assert {int(row[0]) for name, row in cells.items() if name != "no line" and "none" not in name} == {0}
    mean = {name: int(row[1].replace(",", "")) for name, row in cells.items()}
    assert mean[f"passed over {MAX_PASSED_OVER}"] < mean["strict FIFO"]
    assert int(cells["5% killed, none"][0]) > 0, "without leases the pool fills with the dead"
