"""The document and the decisions: tables for what must come out, Hypothesis for what must always hold."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_resource_manager_v01 import (
    DuplicateTaskError,
    InvalidRequestError,
    LockTimeoutError,
    NoCapacityError,
    NotOwnerError,
    PoolConflictError,
    ResourceManagerError,
    Server,
    Shortfall,
    State,
    StateFileError,
    Task,
    UnusableStateFileError,
    WaitCancelledError,
    allocation_of,
    check_state,
    decode_state,
    encode_state,
    end_task,
    find_task,
    first_fit,
    new_request,
    new_state,
    place,
    remove_task,
    shortfall,
    summarize,
    task_id_problem,
)

WHEN = "2025-01-31T09:30:00"
# No deadline, for a slow machine is no defect.
PROPERTY = settings(deadline=None, max_examples=150)


# --- Generated pools ------------------------------------------------------------------------------


@st.composite
def states(draw: st.DrawFn) -> State:
    """Valid pools of unlike servers, in any order of ``server_id``, with tasks on scattered GPUs."""
    servers: list[Server] = []
    for server_id in draw(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True)):
        count = draw(st.integers(0, 3))
        # Owner 0 is nobody. Totals follow from the parts, so every state is valid as it is drawn.
        owners = draw(
            st.lists(st.sampled_from([0, 0, *range(count + 1)]), min_size=draw(st.integers(0, 8)), max_size=10)
        )
        cpus = draw(st.lists(st.integers(0, 64), min_size=count + 1, max_size=count + 1))
        held = [[gpu for gpu, owner in enumerate(owners) if owner == task] for task in range(count + 1)]
        servers.append(
            {
                "server_id": server_id,
                "server_name": f"サーバー-{server_id}",
                "total_gpus": len(owners),
                "available_gpus": held[0],
                "total_cpus": sum(cpus),
                "available_cpus": cpus[0],
                "running_tasks": [
                    {
                        "task_id": f"old-{server_id}-{task}",
                        "allocated_gpus": held[task],
                        "allocated_cpus": cpus[task],
                        "start_time": WHEN,
                    }
                    for task in range(1, count + 1)
                ],
            }
        )
    return {"servers": servers, "last_updated": WHEN, "version": "0.1"}


def requests(server_ids: list[int]) -> st.SearchStrategy[tuple[int | None, int, int]]:
    """Preferred server (half of them one that exists, some one that does not), GPUs, CPUs."""
    preferred = st.sampled_from(server_ids) | st.sampled_from([None, 9])
    return st.tuples(preferred, st.integers(2, 8), st.integers(1, 64))


@st.composite
def cases(draw: st.DrawFn) -> tuple[State, tuple[int | None, int, int]]:
    state = draw(states())
    return state, draw(requests([server["server_id"] for server in state["servers"]]))


class Model:
    """The same pool without cleverness: one set per server and one entry per task."""

    def __init__(self, state: State) -> None:
        self.free_gpus: dict[int, set[int]] = {}
        self.free_cpus: dict[int, int] = {}
        self.tasks: dict[str, tuple[int, set[int], int]] = {}
        for server in state["servers"]:
            server_id = server["server_id"]
            self.free_gpus[server_id] = set(range(server["total_gpus"]))
            self.free_cpus[server_id] = server["total_cpus"]
            for task in server["running_tasks"]:
                self.take(task["task_id"], server_id, set(task["allocated_gpus"]), task["allocated_cpus"])

    def take(self, task_id: str, server_id: int, gpus: set[int], cpus: int) -> None:
        assert gpus <= self.free_gpus[server_id], "a GPU was given twice"
        self.free_gpus[server_id] -= gpus
        self.free_cpus[server_id] -= cpus
        self.tasks[task_id] = (server_id, gpus, cpus)

    def give_back(self, task_id: str) -> None:
        server_id, gpus, cpus = self.tasks.pop(task_id)
        self.free_gpus[server_id] |= gpus
        self.free_cpus[server_id] += cpus

    def fits(self, server_id: int | None, gpus: int, cpus: int) -> bool:
        return (
            server_id in self.free_gpus and len(self.free_gpus[server_id]) >= gpus and self.free_cpus[server_id] >= cpus
        )

    def choice(self, preferred: int | None, gpus: int, cpus: int) -> int | None:
        """First Fit, the naive way: everything that fits, then the preferred one or the first."""
        fitting = [server_id for server_id in self.free_gpus if self.fits(server_id, gpus, cpus)]
        if preferred in fitting:
            return preferred
        return fitting[0] if fitting else None


def chosen(state: State, preferred: int | None, gpus: int, cpus: int) -> int | None:
    server = first_fit(state, gpus, cpus, preferred)
    return None if server is None else server["server_id"]


# --- First Fit ------------------------------------------------------------------------------------


@PROPERTY
@given(cases())
def test_first_fit_agrees_with_a_naive_one(case: tuple[State, tuple[int | None, int, int]]) -> None:
    state, request = case
    before = copy.deepcopy(state)
    assert chosen(state, *request) == Model(state).choice(*request)
    assert state == before, "looking for room changes nothing"


@pytest.mark.parametrize(
    "outcome",
    [
        lambda got, preferred, order: got is None and preferred in order,
        lambda got, preferred, order: got is not None and got == preferred and order.index(got) > 0,
        lambda got, preferred, order: got is not None and preferred in order and got != preferred,
        lambda got, preferred, order: got is not None and preferred is None and order.index(got) > 0,
        lambda got, preferred, order: got is not None and preferred not in (None, *order),
    ],
    ids=["no room", "preferred", "preferred has no room", "first has no room", "preferred is unknown"],
)
def test_generated_pools_reach_every_outcome(outcome: Callable[[int | None, int | None, list[int]], bool]) -> None:
    def reached(case: tuple[State, tuple[int | None, int, int]]) -> bool:
        state, request = case
        order = [server["server_id"] for server in state["servers"]]
        return outcome(Model(state).choice(*request), request[0], order)

    search = settings(deadline=None, database=None, max_examples=5000, phases=[Phase.generate])
    find(cases(), reached, settings=search)  # raises if there is none


@pytest.mark.parametrize(
    ("preferred", "gpus", "cpus", "server_id"),
    [
        (None, 2, 1, 5),  # the first in the order of the file, not the lowest server_id
        (None, 4, 1, 5),  # an exact fit is a fit
        (None, 5, 1, 0),
        (None, 2, 17, 0),  # GPUs alone are not enough
        (None, 8, 64, 0),
        (0, 2, 1, 0),
        (3, 2, 1, 5),  # the preferred one is too small: from the start of the file
        (3, 2, 17, 0),
        (9, 2, 1, 5),
        (None, 9, 1, None),
        (None, 2, 65, None),
    ],
)
def test_first_fit_picks(preferred: int | None, gpus: int, cpus: int, server_id: int | None) -> None:
    state = new_state(3)
    for server, (number, free_gpus, free_cpus) in zip(
        state["servers"], [(5, 4, 16), (3, 1, 64), (0, 8, 64)], strict=True
    ):
        server["server_id"] = number
        place(server, f"task-{number}", 8 - free_gpus, 64 - free_cpus, WHEN)
    assert chosen(state, preferred, gpus, cpus) == server_id


# --- Placing and removing -------------------------------------------------------------------------


def test_place_gives_the_lowest_available_gpus_and_says_what_it_gave() -> None:
    (server,) = new_state(1)["servers"]
    for task_id in ("a", "b", "c"):
        place(server, task_id, 2, 8, WHEN)
    remove_task(server, server["running_tasks"][0])
    placed = place(server, "タスク", 3, 16, WHEN)
    allocation = allocation_of(server, placed)
    assert allocation == {
        "task_id": "タスク",
        "server_id": 0,
        "server_name": "gpu-server-0",
        "gpu_ids": [0, 1, 6],
        "gpu_devices": "0,1,6",
        "cpu_count": 16,
    }
    assert (server["available_gpus"], server["available_cpus"]) == ([7], 32)
    task: Task = {"task_id": "タスク", "allocated_gpus": [0, 1, 6], "allocated_cpus": 16, "start_time": WHEN}
    assert server["running_tasks"][-1] == placed == task
    allocation["gpu_ids"].clear()
    assert server["running_tasks"][-1] == task, "the answer is the caller's to change"


def test_removed_gpus_are_available_in_ascending_order() -> None:
    state = new_state(1)
    for task_id in ("a", "b", "c", "d"):
        place(state["servers"][0], task_id, 2, 16, WHEN)
    for task_id, available in (("c", [4, 5]), ("a", [0, 1, 4, 5]), ("d", [0, 1, 4, 5, 6, 7])):
        found = find_task(state, task_id)
        assert found is not None
        server = found[0]
        remove_task(*found)
        assert server["available_gpus"] == available
        assert server["available_cpus"] == 8 * len(available)
    assert [task["task_id"] for task in server["running_tasks"]] == ["b"]


def test_find_task_finds_exactly_this_identifier() -> None:
    state = new_state(3)
    for server, task_id in zip(state["servers"], ("task", "task-1", "Task"), strict=True):
        place(server, task_id, 2, 1, WHEN)
    server = state["servers"][1]
    assert find_task(state, "task-1") == (server, server["running_tasks"][0])
    assert find_task(state, "task-") is None
    assert find_task(state, "") is None


def test_ending_all_tasks_keeps_servers_and_unknown_keys() -> None:
    state: Any = new_state(2, 4, 16)
    state["site"] = "東京"
    state["servers"][1]["rack"] = {"row": 7}
    idle = copy.deepcopy(state)
    for number in range(4):
        place(state["servers"][number // 2], f"task-{number}", 2, 8, WHEN)
    for number in (2, 0, 3, 1):
        end_task(state, f"task-{number}")
    assert state == idle


class PoolMachine(RuleBasedStateMachine):
    """Any order of placements, removals, resets and reloads, beside the model."""

    @initialize(state=states())
    def begin(self, state: State) -> None:
        self.state = state
        self.model = Model(state)
        self.placed = 0

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        preferred, gpus, cpus = data.draw(requests(list(self.model.free_gpus)))
        server = first_fit(self.state, gpus, cpus, preferred)
        server_id = self.model.choice(preferred, gpus, cpus)
        if server is None or server_id is None:
            assert (server, server_id) == (None, None)
            return
        self.placed += 1
        task_id = f"新-{self.placed}"
        allocation = allocation_of(server, place(server, task_id, gpus, cpus, WHEN))
        lowest = sorted(self.model.free_gpus[server_id])[:gpus]
        assert (allocation["server_id"], allocation["gpu_ids"]) == (server_id, lowest)
        self.model.take(task_id, server_id, set(lowest), cpus)

    @precondition(lambda self: bool(self.model.tasks))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        task_id = data.draw(st.sampled_from(sorted(self.model.tasks)))
        found = find_task(self.state, task_id)
        assert found is not None
        remove_task(*found)
        assert find_task(self.state, task_id) is None
        self.model.give_back(task_id)

    @rule()
    def reset(self) -> None:
        for task_id in list(self.model.tasks):
            end_task(self.state, task_id)
            self.model.give_back(task_id)

    @rule()
    def reload(self) -> None:
        self.state = decode_state(encode_state(self.state))

    @invariant()
    def state_is_valid_and_as_in_the_model(self) -> None:
        check_state(self.state)
        model = Model(self.state)
        assert vars(model) == vars(self.model)
        for server in self.state["servers"]:
            server_id = server["server_id"]
            assert server["available_gpus"] == sorted(self.model.free_gpus[server_id])
            assert server["available_cpus"] == self.model.free_cpus[server_id]
        summary = summarize(self.state)
        assert summary["total_available_gpus"] == sum(map(len, self.model.free_gpus.values()))
        assert summary["total_available_cpus"] == sum(self.model.free_cpus.values())
        assert summary["total_running_tasks"] == len(self.model.tasks)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(deadline=None, max_examples=120, stateful_step_count=30)


# --- Shortfall and summary ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpus", "cpus", "servers", "scattered"),
    [
        (5, 1, ["GPU 1 個", "GPU 3 個"], "GPU 6 個・CPU 24 個"),
        (7, 1, ["GPU 3 個", "GPU 5 個"], None),
        (2, 17, ["CPU 1 個", "CPU 9 個"], "GPU 6 個・CPU 24 個"),
        (2, 25, ["CPU 9 個", "CPU 17 個"], None),
        (8, 64, ["GPU 4 個・CPU 48 個", "GPU 6 個・CPU 56 個"], None),
        (6, 24, ["GPU 2 個・CPU 8 個", "GPU 4 個・CPU 16 個"], "GPU 6 個・CPU 24 個"),
    ],
)
def test_shortfall_says_what_is_short_and_whether_it_is_scattered(
    gpus: int, cpus: int, servers: list[str], scattered: str | None
) -> None:
    state = new_state(2)
    place(state["servers"][0], "a", 4, 48, WHEN)
    place(state["servers"][1], "b", 6, 56, WHEN)
    lines = [f"GPU {gpus} 個と CPU {cpus} 個を同時に確保できるサーバーがありません"]
    for server_id, (short, holder) in enumerate(
        zip(servers, ("a: GPU 4 個・CPU 48 個", "b: GPU 6 個・CPU 56 個"), strict=True)
    ):
        lines += [f"  gpu-server-{server_id}: {short}不足", f"    {holder} ({WHEN} から)"]
    if scattered:
        lines.append(f"  空きの合計 ({scattered}) は足りますが、複数のサーバーに分散しています")
    lines.append("  次の 1 件が解放されれば足ります: a")
    assert str(NoCapacityError(shortfall(state, new_request("late", gpus, cpus)))).split("\n") == lines


def test_summary_counts_the_pool_and_every_server() -> None:
    state = new_state(2, 3, 64)
    state["servers"].append({**new_state(1, 0, 0)["servers"][0], "server_id": 7, "server_name": "何もない"})
    place(state["servers"][1], "a", 2, 24, WHEN)
    columns = ["server_id", "server_name", "total_gpus", "available_gpus", "gpu_utilization"]
    columns += ["total_cpus", "available_cpus", "cpu_utilization", "running_tasks"]
    rows = [
        (0, "gpu-server-0", 3, 3, "0.0%", 64, 64, "0.0%", 0),
        (1, "gpu-server-1", 3, 1, "66.7%", 64, 40, "37.5%", 1),
        (7, "何もない", 0, 0, "0.0%", 0, 0, "0.0%", 0),
    ]
    assert summarize(state) == {
        "total_servers": 3,
        "total_gpus": 6,
        "total_available_gpus": 4,
        "total_cpus": 128,
        "total_available_cpus": 104,
        "total_running_tasks": 1,
        "servers": [dict(zip(columns, row, strict=True)) for row in rows],
    }


# --- Task identifiers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task_id", ["a", " a", "1e5", "a-b", "'; rm *", "学習タスク", "🚀", "あ" * 128, "a\\b", "a/../b"]
)
def test_task_id_is_accepted(task_id: str) -> None:
    assert task_id_problem(task_id) is None


@pytest.mark.parametrize(
    ("task_id", "problem"),
    [
        ("", "空"),
        (" \u3000", "空"),
        ("あ" * 129, "128"),
        ("-", "-"),
        ("--reset", "-"),
        *((f"a{character}b", "文字") for character in "\0\t\n\r\x1b\x7f\x85\x9b\u2028\u2029\u202e\u2066\ud800\udfff"),
    ],
    ids=ascii,
)
def test_task_id_is_refused(task_id: str, problem: str) -> None:
    assert problem in (task_id_problem(task_id) or "no problem")


# Surrogates too, which ``st.text()`` alone leaves out.
any_text = st.text(st.characters(exclude_categories=()), max_size=20)


@PROPERTY
@given(any_text)
def test_task_id_is_accepted_exactly_if_it_can_be_stored(task_id: str) -> None:
    state = new_state(1)
    place(state["servers"][0], task_id, 2, 1, WHEN)
    if task_id_problem(task_id) is None:
        assert find_task(decode_state(encode_state(state)), task_id) is not None
    else:
        with pytest.raises(ValueError, match="task_id"):
            decode_state(encode_state(state))


# --- Encoding and decoding ------------------------------------------------------------------------


def test_new_state_is_encoded_with_one_line_per_server() -> None:
    idle = '"available_gpus": [0, 1, 2], "total_cpus": 16, "available_cpus": 16, "running_tasks": []'
    assert encode_state(new_state(2, 3, 16)).decode() == (
        "{\n"
        '  "servers": [\n'
        f'    {{"server_id": 0, "server_name": "gpu-server-0", "total_gpus": 3, {idle}}},\n'
        f'    {{"server_id": 1, "server_name": "gpu-server-1", "total_gpus": 3, {idle}}}\n'
        "  ],\n"
        '  "last_updated": "",\n'
        '  "version": "0.1"\n'
        "}\n"
    )


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | any_text
# The prefix keeps them apart from the keys that we know.
unknown_keys = st.dictionaries(
    any_text.map("x-{}".format),
    st.recursive(scalars, lambda value: st.lists(value) | st.dictionaries(any_text, value), max_leaves=4),
    max_size=2,
)


@PROPERTY
@given(states(), unknown_keys, unknown_keys, unknown_keys)
def test_unknown_keys_at_every_level_survive_the_round_trip(
    state: State, above: dict[str, Any], beside: dict[str, Any], below: dict[str, Any]
) -> None:
    document: Any = state
    document.update(above)
    for server in document["servers"]:
        server.update(beside)
        for task in server["running_tasks"]:
            task.update(below)
    text = json.dumps(document)  # in ASCII, with lone surrogates as escapes
    decoded = decode_state(text.encode())
    # Compared as text, since 1 == 1.0 == True; this holds the order of the keys as well.
    assert json.dumps(decoded) == json.dumps(json.loads(text))
    assert json.dumps(decode_state(encode_state(decoded))) == json.dumps(decoded)


def test_text_is_written_as_it_is_and_lone_surrogates_as_escapes() -> None:
    data = json.dumps({**new_state(1), "メモ\ud800": "東京🚀 \\ud800 \\\udfff"}).encode()
    encoded = encode_state(decode_state(data))
    assert '"メモ\\ud800": "東京🚀 \\\\ud800 \\\\\\udfff"'.encode() in encoded
    assert decode_state(encoded) == decode_state(data)


def test_infinite_number_is_never_written() -> None:
    state: Any = {**new_state(1), "x": float("inf")}
    with pytest.raises(ValueError, match="JSON"):
        encode_state(state)


@pytest.mark.parametrize("key", ['"servers"', '"\\u0073ervers"'])
@pytest.mark.parametrize("value", ["5", "[]", "{}", "null", "[\n    {},\n    {}\n  ]"])
def test_second_key_for_the_servers_counts_as_it_does_in_json(key: str, value: str) -> None:
    text = encode_state(new_state(2)).decode().replace('"version"', f'{key}: {value},\n  "version"')
    with pytest.raises(ValueError, match=r"servers"):
        decode_state(text.encode())


# --- Refusing what is no valid document -----------------------------------------------------------


def valid_document() -> Any:
    """Two unlike servers: two tasks on scattered GPUs of the second, none on the first."""
    state = new_state(2, 6, 16)
    second = state["servers"][1]
    for task_id, gpus, cpus in (("removed", 1, 2), ("タスク", 2, 4), ("b", 2, 8)):
        place(second, task_id, gpus, cpus, WHEN)
    remove_task(second, second["running_tasks"][0])
    second["server_id"] = 7
    return state


SERVER = ("servers", 1)
TASK = (*SERVER, "running_tasks", 0)
#: where, the path to it, and the exact types of the keys that must be there
RECORDS: list[tuple[str, tuple[str | int, ...], dict[str, type]]] = [
    ("最上位", (), {"version": str, "last_updated": str, "servers": list}),
    (
        "servers[1]",
        SERVER,
        {
            "server_id": int,
            "server_name": str,
            "total_gpus": int,
            "available_gpus": list,
            "total_cpus": int,
            "available_cpus": int,
            "running_tasks": list,
        },
    ),
    (
        "servers[1].running_tasks[0]",
        TASK,
        {"task_id": str, "allocated_gpus": list, "allocated_cpus": int, "start_time": str},
    ),
]
KEYS = [(where, path, key, kind) for where, path, kinds in RECORDS for key, kind in kinds.items()]
WRONG_VALUES: dict[type, list[object]] = {
    int: [-1, -(10**12), True, False, 1.0, "1", None, [], {}],
    str: ["a\nb", "\x1b[2J", "\u202e", "\ud800", 1, True, None, [], {}],
    list: [{}, "[]", 0, None, True],
}
WRONG_GPU_LISTS: list[object] = [[1, 0], [True], [0.0], ["0"], [None], [[0]], [{}]]


def at(document: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        document = document[step]
    return document


def refusal(document: Any) -> str:
    """Return why the document is refused, which it must be."""
    with pytest.raises(ValueError) as caught:
        decode_state(json.dumps(document).encode())
    return str(caught.value)


def test_valid_document_is_accepted() -> None:
    assert decode_state(json.dumps(valid_document()).encode()) == valid_document()


@pytest.mark.parametrize(("where", "path", "key", "kind"), KEYS, ids=[f"{where} {key}" for where, _, key, _ in KEYS])
def test_missing_or_wrong_value_is_refused_by_place_and_key(
    where: str, path: tuple[str | int, ...], key: str, kind: type
) -> None:
    wrong = WRONG_VALUES[kind] + (WRONG_GPU_LISTS if key.endswith("_gpus") and kind is list else [])
    for value in wrong:
        document = valid_document()
        at(document, path)[key] = value
        reason = refusal(document)
        assert key in reason and (where in reason or key == "version"), (value, reason)
    document = valid_document()
    del at(document, path)[key]
    reason = refusal(document)
    assert key in reason and (where in reason or key == "version"), reason


@pytest.mark.parametrize(
    ("path", "value", "fragments"),
    [
        (("version",), "0.2", ["version", "'0.2'"]),
        (("version",), "0.1 ", ["version"]),
        (("servers",), [], ["servers", "空"]),
        (("servers", 0), [], ["servers[0]", "オブジェクト"]),
        (("servers", 0), None, ["servers[0]", "オブジェクト"]),
        (("servers", 0, "server_id"), 7, ["servers[1]", "server_id 7"]),
        ((*SERVER, "total_gpus"), 5, ["servers[1]", "GPU"]),
        ((*SERVER, "total_gpus"), 7, ["servers[1]", "GPU"]),
        ((*SERVER, "total_gpus"), 10**12, ["servers[1]", "GPU"]),
        ((*SERVER, "available_gpus"), [5], ["servers[1]", "GPU"]),  # GPU 0 is missing
        ((*SERVER, "available_gpus"), [0, 1, 5], ["servers[1]", "GPU"]),  # GPU 1 is held as well
        ((*SERVER, "available_gpus"), [0, 6], ["servers[1]", "GPU"]),  # the number is right, the index is not
        ((*SERVER, "available_gpus"), [5, 0], ["servers[1]", "available_gpus", "昇順"]),
        ((*SERVER, "available_gpus"), [0, 0], ["servers[1]", "available_gpus"]),
        ((*SERVER, "available_gpus"), [False, 5], ["servers[1]", "available_gpus"]),  # equal to what is right
        ((*TASK, "allocated_gpus"), [1, 2.0], ["servers[1].running_tasks[0]", "allocated_gpus"]),
        ((*SERVER, "available_gpus"), [-1, 0], ["servers[1]", "available_gpus"]),
        ((*TASK, "allocated_gpus"), [1, 1], ["servers[1]", "allocated_gpus"]),
        ((*TASK, "allocated_gpus"), [-1, 1], ["servers[1]", "allocated_gpus"]),
        ((*SERVER, "total_cpus"), 10**12, ["servers[1]", "CPU"]),
        ((*SERVER, "available_cpus"), 3, ["servers[1]", "CPU"]),
        ((*SERVER, "available_cpus"), 5, ["servers[1]", "CPU"]),
        ((*TASK, "allocated_cpus"), 5, ["servers[1]", "CPU"]),
        ((*TASK, "allocated_gpus"), [2, 3], ["servers[1]", "GPU"]),  # GPU 3 is in two tasks
        ((*TASK, "allocated_gpus"), [2, 1], ["servers[1].running_tasks[0]", "allocated_gpus", "昇順"]),
        ((*TASK, "task_id"), "b", ["servers[1].running_tasks[1]", "task_id 'b'"]),
        ((*TASK, "task_id"), "-b", ["servers[1].running_tasks[0]", "task_id"]),
        ((*TASK, "task_id"), "", ["servers[1].running_tasks[0]", "task_id"]),
        (TASK, ["b"], ["servers[1].running_tasks[0]", "オブジェクト"]),
    ],
    ids=ascii,
)
def test_document_that_breaks_the_invariant_is_refused_by_place(
    path: tuple[str | int, ...], value: object, fragments: list[str]
) -> None:
    document = valid_document()
    at(document, path[:-1])[path[-1]] = value
    reason = refusal(document)
    assert [fragment for fragment in fragments if fragment not in reason] == [], reason


def test_negative_number_that_the_sum_makes_up_for_is_refused() -> None:
    document = valid_document()
    first, second = document["servers"][1]["running_tasks"]
    first["allocated_cpus"], second["allocated_cpus"] = -1, second["allocated_cpus"] + first["allocated_cpus"] + 1
    assert "servers[1].running_tasks[0]: allocated_cpus" in refusal(document)


def test_task_on_two_servers_is_refused_by_place() -> None:
    document = valid_document()
    place(document["servers"][0], "b", 2, 1, WHEN)
    assert "servers[1].running_tasks[1]: task_id 'b'" in refusal(document)


VALID = encode_state(valid_document())


@pytest.mark.parametrize(
    ("data", "fragment"),
    [
        (b"", "JSON"),
        (b"null", "最上位"),
        (b"[]", "最上位"),
        (b'"0.1"', "最上位"),
        (b"{}", "version"),
        (b"\xef\xbb\xbf" + VALID, "JSON"),
        (VALID.decode().encode("utf-16"), "UTF-8"),
        (VALID.decode().encode("cp932"), "UTF-8"),
        (VALID.replace(b"2025", b"\xed\xa0\x80"), "UTF-8"),  # a surrogate as CESU-8 would write it
        (bytes(range(256)), "UTF-8"),
        (b"\0" * 4096, "JSON"),
        (VALID + VALID, "JSON"),
        (VALID.replace(b'"', b"'"), "JSON"),
        (VALID.replace(b'"total_cpus": 16', b'"total_cpus": NaN'), "NaN"),
        (VALID.replace(b'"total_cpus": 16', b'"total_cpus": -Infinity'), "-Infinity"),
        (VALID.replace(b'"total_cpus": 16', b'"total_cpus": 1e999'), "1e999"),
        (VALID.replace(b'"total_cpus": 16', b'"total_cpus": ' + b"9" * 10_000), ""),
        (VALID.replace(b'"version"', b'"x": NaN, "version"'), "NaN"),
        (b"[" * 200_000, "入れ子"),
        (b'{"a": ' * 200_000, "入れ子"),
    ],
    ids=lambda value: ascii(value[:16]),
)
def test_bytes_that_are_no_document_are_refused(data: bytes, fragment: str) -> None:
    with pytest.raises(ValueError) as caught:
        decode_state(data)
    assert fragment in str(caught.value)


def test_document_cut_off_anywhere_is_refused() -> None:
    assert decode_state(VALID.rstrip()) == valid_document()
    for length in range(len(VALID.rstrip())):
        with pytest.raises(ValueError):
            decode_state(VALID[:length])


@PROPERTY
@given(st.integers(0, len(VALID) - 1), st.binary(max_size=3))
def test_damaged_document_is_refused_or_still_valid(position: int, damage: bytes) -> None:
    try:
        state = decode_state(VALID[:position] + damage + VALID[position + 1 :])
    except ValueError:
        return
    check_state(state)
    assert decode_state(encode_state(state)) == state


# --- Errors ---------------------------------------------------------------------------------------

LACKING = Shortfall(new_request("遅い", 4, 8))
#: of each error: the arguments, the facts that they become, and the first line of the text
ERRORS: dict[type[ResourceManagerError], tuple[list[Any], dict[str, object], str]] = {
    ResourceManagerError: ([], {}, ""),
    InvalidRequestError: (
        ["required_gpus", 9, "が正しくありません", "{least}-{most} を指定してください"],
        {
            "parameter": "required_gpus",
            "value": 9,
            "problem": "が正しくありません",
            "remedy": "{least}-{most} を指定してください",
        },
        "required_gpus が正しくありません: 9",
    ),
    DuplicateTaskError: (
        ["タスク"],
        {"parameter": "task_id", "value": "タスク"},
        "タスクID 'タスク' は既に実行中または待機中です",
    ),
    NotOwnerError: (
        ["タスク", "alice"],
        {"task_id": "タスク", "owner": "alice"},
        "タスク 'タスク' は alice のものです",
    ),
    PoolConflictError: (
        ["resource_status.json", ["a", "b"]],
        {"resource_file": "resource_status.json"},
        "実行中のタスクがあります: a, b",
    ),
    NoCapacityError: (
        [LACKING],
        {**vars(LACKING)},
        "GPU 4 個と CPU 8 個を同時に確保できるサーバーがありません",
    ),
    WaitCancelledError: (
        ["遅い", LACKING],
        {"task_id": "遅い", **vars(LACKING)},
        "タスク '遅い' の待機は取り消されました",
    ),
    LockTimeoutError: (
        ["/pool/.resource.lock", 0.5],
        {"lock_file": "/pool/.resource.lock", "timeout_s": 0.5},
        "ロック取得タイムアウト",
    ),
    StateFileError: (
        ["resource_status.json", "容量", "増やす"],
        {"path": "resource_status.json", "reason": "容量", "remedy": "増やす"},
        "状態ファイルのエラー: resource_status.json",
    ),
    UnusableStateFileError: (
        ["resource_status.json", "破損"],
        {"path": "resource_status.json", "reason": "破損"},
        "状態ファイルのエラー: resource_status.json",
    ),
}


def an_error(kind: type[ResourceManagerError]) -> ResourceManagerError:
    arguments, _, _ = ERRORS[kind]
    facts = {"least": 2, "most": 8} if kind is InvalidRequestError else {}
    return kind(*arguments, **facts)


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (ResourceManagerError, set()),
        (InvalidRequestError, {ResourceManagerError, ValueError}),
        (DuplicateTaskError, {InvalidRequestError, ResourceManagerError, ValueError}),
        (NotOwnerError, {ResourceManagerError}),
        (PoolConflictError, {ResourceManagerError}),
        (NoCapacityError, {ResourceManagerError}),
        (WaitCancelledError, {NoCapacityError, ResourceManagerError}),
        (LockTimeoutError, {ResourceManagerError, TimeoutError, OSError}),
        (StateFileError, {ResourceManagerError}),
        (UnusableStateFileError, {StateFileError, ResourceManagerError}),
    ],
)
def test_error_is_caught_as_exactly_these(error: type[Exception], bases: set[type[Exception]]) -> None:
    assert {base for base in {*ERRORS, ValueError, OSError, TimeoutError} if issubclass(error, base)} == bases | {error}


@pytest.mark.parametrize("kind", ERRORS)
def test_error_states_its_facts_and_says_them(kind: type[ResourceManagerError]) -> None:
    error = an_error(kind)
    _, facts, first_line = ERRORS[kind]
    if kind is InvalidRequestError:
        facts = {**facts, "remedy": "2-8 を指定してください"}
    assert {key: vars(error)[key] for key in facts} == facts
    lines = str(error).split("\n")
    assert lines[0] == first_line
    # What to do next follows wherever there is something to do.
    assert any(line.startswith("  対処: ") for line in lines) == (len(lines) > 1)
    for key in ("reason", "remedy"):
        assert str(vars(error).get(key, "")) in str(error)


@pytest.mark.parametrize("kind", [kind for kind, (arguments, _, _) in ERRORS.items() if arguments])
def test_error_cannot_be_made_without_one_of_its_facts(kind: type[ResourceManagerError]) -> None:
    arguments = ERRORS[kind][0]
    needed = 1 if kind is PoolConflictError else len(arguments)  # that one has a second text, for running tasks
    for count in range(needed):
        with pytest.raises(TypeError):
            kind(*arguments[:count])


@pytest.mark.parametrize("kind", ERRORS)
def test_error_survives_copying_and_pickling_with_its_facts(kind: type[ResourceManagerError]) -> None:
    error = an_error(kind)
    same = [error, copy.copy(error), copy.deepcopy(error)]
    same += [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for one in same:
        assert (type(one), str(one), vars(one)) == (kind, str(error), vars(error))
