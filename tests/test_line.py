"""The line of waiting requests, limits and hosts: pure decisions."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_resource_manager_v01 import (
    MAX_PASSED_OVER,
    Allocation,
    DuplicateTaskError,
    InvalidRequestError,
    NoCapacityError,
    Request,
    State,
    Task,
    admit,
    ask,
    check_state,
    decode_state,
    encode_state,
    fewest_releases,
    find_task,
    limits,
    new_servers,
    new_state,
    place,
    put,
    reclaim,
    records,
    remove_task,
    server_of_host,
    set_waiting,
)

NOW = "2026-01-01T00:00:00"


def request(task_id: str, gpus: int, cpus: int = 1, **more: Any) -> Request:
    wanted: Any = {
        "task_id": task_id,
        "required_gpus": gpus,
        "required_cpus": cpus,
        "prefer_server_id": None,
        "only_server_name": None,
        "passed_over": 0,
        "lease": f"{abs(hash(task_id)):032x}"[:32],
        **more,
    }
    result: Request = wanted
    return result


def one_server(gpus: int = 8) -> State:
    return {**new_state(servers=1, gpus=gpus), "last_updated": NOW}


def arrive(state: State, wanted: Request, stay: bool = True) -> Allocation | NoCapacityError:
    _, answer = ask(state, wanted, stay, keep_lease=True)
    check_state(state)
    return answer


def release(state: State, task_id: str) -> None:
    found = find_task(state, task_id)
    assert found
    put(state, remove_task(*found))
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
    refusal = arrive(state, request("late", 2), stay=False)
    assert isinstance(refusal, NoCapacityError)
    assert encode_state(state) == before


def test_request_that_does_not_wait_stands_behind_those_who_do() -> None:
    state = one_server()
    arrive(state, request("all", 8))
    arrive(state, request("waits", 8, passed_over=MAX_PASSED_OVER))
    state["waiting"][0]["passed_over"] = MAX_PASSED_OVER
    found = find_task(state, "all")
    assert found
    smaller: Task = {**found[1], "allocated_gpus": [0, 1]}
    put(state, {**found[0], "available_gpus": [2, 3, 4, 5, 6, 7], "running_tasks": [smaller]})
    refusal = arrive(state, request("late", 2), stay=False)
    assert isinstance(refusal, NoCapacityError)
    assert "先に待っている要求のために確保中" in str(refusal)
    assert refusal.waiting == 1


def test_big_request_under_a_constant_stream_of_small_ones_is_placed_within_the_bound() -> None:
    state = one_server()
    for number in range(4):
        arrive(state, request(f"s{number}", 2))
    arrive(state, request("big", 8))
    placed_after_big = 0
    for number in range(4, 1000):
        arrive(state, request(f"s{number}", 2))
        release(state, running(state)[0])
        placed_after_big += number < 1000 and f"s{number}" in running(state)
        if "big" in running(state):
            break
    assert "big" in running(state)
    assert placed_after_big <= MAX_PASSED_OVER


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
        ask(state, request("waits", 2, lease="0" * 32), True, True)
    with pytest.raises(DuplicateTaskError):
        ask(state, request("all", 2, lease="0" * 32), True, True)


def test_asking_again_keeps_the_place_and_finds_the_grant() -> None:
    state = one_server()
    arrive(state, request("all", 8))
    mine = request("mine", 4)
    arrive(state, mine)
    arrive(state, request("other", 4))
    changed, answer = ask(state, mine, True, True)
    assert not changed
    assert isinstance(answer, NoCapacityError)
    assert answer.waiting == 0
    assert waiting(state) == ["mine", "other"]
    release(state, "all")
    changed, answer = ask(state, mine, True, True)
    assert not changed
    assert not isinstance(answer, NoCapacityError)
    assert answer["gpu_ids"] == [0, 1, 2, 3]
    changed, answer = ask(state, mine, True, keep_lease=False)
    assert changed
    assert "lease" not in find_task(state, "mine")[1]  # type: ignore[index]


def test_who_ended_is_struck_from_tasks_and_line() -> None:
    state = one_server()
    dead = request("dead", 8)
    arrive(state, dead)
    arrive(state, request("gone", 8))
    arrive(state, request("alive", 8))
    ended = {dead["lease"], state["waiting"][0]["lease"]}
    assert reclaim(state, lambda record: record.get("lease") in ended) == ["dead", "gone"]
    admit(state)
    assert (running(state), waiting(state)) == (["alive"], [])


@settings(deadline=None)
@given(st.data())
def test_no_request_waits_while_it_could_run_and_none_is_passed_over_too_often(data: st.DataObject) -> None:
    state = new_state(servers=2, gpus=8)
    state["min_gpus_per_task"] = 1
    anything: st.SearchStrategy[Any] = st.booleans()
    limit = data.draw(st.integers(0, 4))
    for number in range(data.draw(st.integers(1, 40))):
        if running(state) and data.draw(anything):
            found = find_task(state, data.draw(st.sampled_from(running(state))))
            assert found
            put(state, remove_task(*found))
        else:
            only = data.draw(st.sampled_from([None, None, "gpu-server-0", "gpu-server-1"]))
            wanted = request(f"t{number}", data.draw(st.integers(1, 8)), only_server_name=only)
            set_waiting(state, [*state.get("waiting", []), wanted])
        before = encode_state(state)
        servers = [(server, copy.deepcopy(server)) for server in state["servers"]]
        admit(state, limit)
        assert all(server == copied for server, copied in servers), "none was altered, only replaced"
        assert not admit(state, limit), "all that may be placed was placed at once"
        check_state(state)
        assert {record["task_id"] for record in records(state)} == {
            record["task_id"] for record in records(decode_state(before))
        }
        assert all(entry["passed_over"] <= limit for entry in state.get("waiting", []))
        if state.get("waiting"):
            first = state["waiting"][0]
            for server in state["servers"]:
                fits = len(server["available_gpus"]) >= first["required_gpus"]
                assert not fits or first["only_server_name"] not in (None, server["server_name"])


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
    assert not isinstance(arrive(state, request("t", 16, 8)), NoCapacityError)


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
        with pytest.raises(InvalidRequestError, match="--init --server"):
            server_of_host(state, host, named)
    else:
        assert server_of_host(state, host, named)["server_name"] == found


def test_machine_cannot_be_two_servers_at_once() -> None:
    state = pool_of("a", "b")
    put(state, place(state["servers"][0], "t", 2, 1, NOW, {"host": "node", "local": True}))
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
        server = place(server, name, gpus, cpus, NOW)

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
        server = place(server, f"t{number}", held_gpus, held_cpus, NOW)
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
    put(state, place(state["servers"][0], "x", 8, 60, NOW, {"user": "alice"}))
    put(state, place(state["servers"][1], "y", 5, 1, NOW))
    put(state, place(state["servers"][1], "z", 2, 1, NOW))
    arrive(state, request("waits", 8))
    refusal = arrive(state, request("late", 4, 8), stay=False)
    assert isinstance(refusal, NoCapacityError)
    assert str(refusal).splitlines() == [
        "GPU 4 個と CPU 8 個を同時に確保できるサーバーがありません",
        "  gpu-server-0: GPU 4 個・CPU 4 個不足",
        f"    x: GPU 8 個・CPU 60 個 ({NOW} から, alice)",
        "  gpu-server-1: GPU 3 個不足",
        f"    y: GPU 5 個・CPU 1 個 ({NOW} から)",
        f"    z: GPU 2 個・CPU 1 個 ({NOW} から)",
        "  次の 1 件が解放されれば足ります: x",
        "  先に待っている要求: 1 件",
    ]
    assert refusal.fewest_releases == ["x"]


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
