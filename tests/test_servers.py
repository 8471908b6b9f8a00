"""Servers that come and go, and GPUs out of service: any sequence, each rule, and sixteen processes at once."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import random
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pytest
from conftest import Children, running
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from screens import CLI, cli, finish, start
from test_processes import Claims

from gpu_resource_extensions.servers import ServerNeededError, add_server, disable, enable, remove_server
from gpu_resource_manager_v01 import (
    MAX_PASSED_OVER,
    GPUResourceManagerV01,
    InvalidRequestError,
    NoCapacityError,
    Request,
    Shortfall,
    State,
    admit,
    ask,
    ask_once,
    check_state,
    decode_state,
    encode_state,
    end_task,
    first_fit,
    new_request,
    new_servers,
    place,
    reserved_servers,
    shortfall,
    summarize,
)

WHEN = "2026-01-31T09:30:00"
TWO = [("a", 4, 32), ("b", 4, 32)]


def state_of(*servers: tuple[str, int, int]) -> State:
    return {"servers": new_servers(servers), "last_updated": WHEN, "version": "0.1", "min_gpus_per_task": 1}


def request(task_id: str, gpus: int, cpus: int = 1, prefer: int | None = None, **more: Any) -> Request:
    return new_request(task_id, gpus, cpus, prefer, **{"lease": "0" * 32, **more})


def by_name(document: Any) -> dict[str, Any]:
    return {server["server_name"]: server for server in document["servers"]}


def held_gpus(document: Any) -> dict[str, tuple[int, list[int]]]:
    """Return of each running task the ``server_id`` and the GPUs."""
    return {
        task["task_id"]: (server["server_id"], task["allocated_gpus"])
        for server in document["servers"]
        for task in server["running_tasks"]
    }


def waiting(document: Any) -> list[str]:
    return [request["task_id"] for request in document.get("waiting", ())]


def assert_sound(document: Any) -> None:
    """The invariant in words of its own: each GPU is available, or held once, or out of service and idle."""
    for server in document["servers"]:
        out = {int(gpu) for gpu in server.get("disabled", {})}
        held = [gpu for task in server["running_tasks"] for gpu in task["allocated_gpus"]]
        assert len(held) == len(set(held)), "a GPU has two tasks"
        idle = set(range(server["total_gpus"])) - set(held)
        assert server["available_gpus"] == sorted(idle - out), "what is idle and in service is available"
        assert set(held) | out <= set(range(server["total_gpus"]))
        taken = sum(task["allocated_cpus"] for task in server["running_tasks"])
        assert server["available_cpus"] + taken == server["total_cpus"]
    ids = [server["server_id"] for server in document["servers"]]
    assert len(ids) == len(set(ids))
    names = [*held_gpus(document), *waiting(document)]
    assert len(names) == len(set(names)), "a task is there twice"


# --- Any sequence ---------------------------------------------------------------------------------

OUT, HELD_AND_OUT = "out of service", "held, and out of service"


@st.composite
def pools(draw: st.DrawFn) -> State:
    """Valid pools: unlike servers, scattered tasks, GPUs out of service that are idle or still held."""
    servers: list[Any] = []
    for server_id in draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)):
        count = draw(st.integers(0, 2))
        owners = draw(st.lists(st.integers(0, count), min_size=1, max_size=6))  # of each GPU; 0: nobody
        cpus = draw(st.lists(st.integers(0, 16), min_size=count + 1, max_size=count + 1))
        out = draw(st.dictionaries(st.integers(0, len(owners) - 1), st.sampled_from(["", "故障", "fan"]), max_size=3))
        tasks = [
            {
                "task_id": f"old-{server_id}-{task}",
                "allocated_gpus": [gpu for gpu, owner in enumerate(owners) if owner == task],
                "allocated_cpus": cpus[task],
                "start_time": WHEN,
            }
            for task in range(1, count + 1)
        ]
        server = {
            "server_id": server_id,
            "server_name": f"サーバー-{server_id}",
            "total_gpus": len(owners),
            "available_gpus": [gpu for gpu, owner in enumerate(owners) if owner == 0 and gpu not in out],
            "total_cpus": sum(cpus),
            "available_cpus": cpus[0],
            "running_tasks": tasks,
        }
        disabled = {str(gpu): why for gpu, why in sorted(out.items())}
        servers.append({**server, "disabled": disabled} if disabled else server)
    version = "0.1+disabled" if any("disabled" in server for server in servers) else "0.1"
    return {"servers": servers, "last_updated": WHEN, "version": version, "min_gpus_per_task": 1}


@settings(deadline=None, max_examples=100)
@given(pools())
def test_generated_pools_are_valid(state: State) -> None:
    check_state(state)
    assert_sound(state)


class ServersMachine(RuleBasedStateMachine):
    """Whatever is asked, released, added, removed, taken out and put back, in any order."""

    @initialize(state=pools())
    def begin(self, state: State) -> None:
        self.state, self.before, self.numbered = state, copy.deepcopy(state), 0
        self.released: set[str] = set()

    def new_name(self) -> str:
        self.numbered += 1
        return f"新-{self.numbered}"

    def a_server(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from([server["server_name"] for server in self.state["servers"]]))

    def some_gpus(self, data: st.DataObject, name: str) -> list[int] | None:
        indices = st.integers(0, by_name(self.state)[name]["total_gpus"] - 1)
        return data.draw(st.none() | st.lists(indices, min_size=1, max_size=3))

    @rule(gpus=st.integers(1, 6), cpus=st.integers(0, 16), prefer=st.none() | st.integers(0, 9))
    def place_where_it_fits(self, gpus: int, cpus: int, prefer: int | None) -> None:
        server = first_fit(self.state, gpus, cpus, prefer)
        if server:
            place(server, self.new_name(), gpus, cpus, WHEN)

    @rule(data=st.data(), gpus=st.integers(1, 6), cpus=st.integers(1, 16), stays=st.booleans())
    def ask_for(self, data: st.DataObject, gpus: int, cpus: int, stays: bool) -> None:
        name = data.draw(st.none() | st.sampled_from([server["server_name"] for server in self.state["servers"]]))
        wanted = request(self.new_name(), gpus, cpus, only_server_name=name)
        unchanged = copy.deepcopy(self.state)
        try:
            (ask if stays else ask_once)(self.state, wanted)
        except InvalidRequestError:
            assert self.state == unchanged

    @precondition(lambda self: bool(held_gpus(self.state) or waiting(self.state)))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        task_id = data.draw(st.sampled_from([*held_gpus(self.state), *waiting(self.state)]))
        self.released.add(task_id)
        end_task(self.state, task_id)

    @rule()
    def let_in(self) -> None:
        admit(self.state)

    @rule(gpus=st.integers(1, 6), cpus=st.integers(1, 16))
    def add(self, gpus: int, cpus: int) -> None:
        highest = max(server["server_id"] for server in self.state["servers"])
        assert add_server(self.state, (self.new_name(), gpus, cpus))["server_id"] == highest + 1

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = self.a_server(data)
        gone, count = by_name(self.state)[name], len(self.state["servers"])
        here = [task["task_id"] for task in gone["running_tasks"]]
        unchanged = copy.deepcopy(self.state)
        try:
            remove_server(self.state, name)
        except ServerNeededError as error:
            assert self.state == unchanged
            assert error.task_ids or count == 1
            assert {*here} <= {*error.task_ids}
        else:
            assert not here
            assert name not in by_name(self.state)

    @rule(data=st.data(), reason=st.sampled_from(["", "故障", "fan"]))
    def take_out(self, data: st.DataObject, reason: str) -> None:
        name = self.a_server(data)
        gpus = self.some_gpus(data, name)
        known = dict(by_name(self.state)[name].get("disabled", {}))
        disable(self.state, name, gpus, reason)
        server = by_name(self.state)[name]
        for gpu in range(server["total_gpus"]) if gpus is None else gpus:
            assert server["disabled"][str(gpu)] == (reason or known.get(str(gpu), "")), "a known reason stays"
            assert gpu not in server["available_gpus"]

    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        name = self.a_server(data)
        gpus = self.some_gpus(data, name)
        enable(self.state, name, gpus)
        server = by_name(self.state)[name]
        held = {gpu for task in server["running_tasks"] for gpu in task["allocated_gpus"]}
        for gpu in range(server["total_gpus"]) if gpus is None else gpus:
            assert str(gpu) not in server.get("disabled", {})
            assert gpu in held or gpu in server["available_gpus"], "an enabled idle GPU is available again"

    @rule()
    def reload(self) -> None:
        self.state = decode_state(encode_state(self.state))

    @invariant()
    def document_is_valid_and_nothing_moved(self) -> None:
        check_state(self.state)
        assert_sound(self.state)
        old, new = held_gpus(self.before), held_gpus(self.state)
        for task_id, held in old.items():
            assert new.get(task_id) == held or task_id in self.released, "who runs keeps what it has"
        out = {
            (server["server_id"], int(gpu)) for server in self.state["servers"] for gpu in server.get("disabled", {})
        }
        for task_id in new.keys() - old:
            server_id, gpus = new[task_id]
            assert not {(server_id, gpu) for gpu in gpus} & out, "nothing new on what is out of service"
        lost = {*waiting(self.before)} - {*waiting(self.state), *new, *self.released}
        assert not lost, "nobody in line is forgotten"
        was, now = by_name(self.before), by_name(self.state)
        for name in was.keys() & now:
            assert was[name]["server_id"] == now[name]["server_id"], "ids never change"
        totals = summarize(self.state)
        assert totals["total_gpus"] == sum(server["total_gpus"] for server in self.state["servers"])
        assert totals["total_available_gpus"] == sum(len(server["available_gpus"]) for server in self.state["servers"])
        self.before = copy.deepcopy(self.state)


TestServersMachine = ServersMachine.TestCase
TestServersMachine.settings = settings(deadline=None, max_examples=150, stateful_step_count=30)


def fewest_by_trying(state: State, gpus: int, cpus: int) -> int | None:
    """Return how many tasks must end before the request fits somewhere, by trying all sets; ``None`` if none helps."""
    tasks = [task["task_id"] for server in state["servers"] for task in server["running_tasks"]]
    for count in range(len(tasks) + 1):
        for ended in itertools.combinations(tasks, count):
            after = copy.deepcopy(state)
            for task_id in ended:
                end_task(after, task_id)
            if first_fit(after, gpus, cpus):
                return count
    return None


@settings(deadline=None, max_examples=200)
@given(pools(), st.integers(1, 6), st.integers(1, 16))
def test_releases_that_are_named_make_room_and_are_the_fewest_whatever_is_out_of_service(
    state: State, gpus: int, cpus: int
) -> None:
    named = shortfall(state, request("late", gpus, cpus)).fewest_releases
    assert len(named) == (fewest_by_trying(state, gpus, cpus) or 0)
    for task_id in named:
        end_task(state, task_id)
    assert not named or first_fit(state, gpus, cpus)


# --- What is out of service -----------------------------------------------------------------------


@pytest.fixture
def two(pool: Path) -> GPUResourceManagerV01:
    """A pool of two servers with 4 GPUs and 32 CPUs each."""
    return GPUResourceManagerV01(pool, servers=TWO)


def test_what_is_disabled_finishes_what_runs_and_gets_nothing_new(two: GPUResourceManagerV01) -> None:
    assert two.allocate_resources("x", 2, 1)
    assert two.disable("a", [1, 2]) == {"1": "", "2": ""}
    assert by_name(two.get_detailed_status())["a"]["running_tasks"][0]["allocated_gpus"] == [0, 1]
    assert two.obtain_resources("y", 2, 1)["server_name"] == "b", "one GPU is left on a"
    assert two.release_resources("x")
    granted = two.allocate_resources("z", 2, 1)
    assert granted and (granted["server_name"], granted["gpu_ids"]) == ("a", [0, 3])
    assert two.enable("a", [2]) == {"1": ""}
    assert two.obtain_resources("w", 1, 1)["gpu_ids"] == [2]
    assert two.enable("a") == {}
    assert two.obtain_resources("v", 1, 1)["gpu_ids"] == [1]


def test_what_is_disabled_counts_in_totals_and_not_in_what_is_available(two: GPUResourceManagerV01) -> None:
    assert two.allocate_resources("x", 2, 8)
    two.disable("a", [1, 3])
    summary = two.get_resource_summary()
    assert (summary["total_gpus"], summary["total_available_gpus"]) == (8, 5)
    assert (summary["total_cpus"], summary["total_available_cpus"]) == (64, 56)
    two.disable("a")
    summary = two.get_resource_summary()
    assert (summary["total_gpus"], summary["total_available_gpus"]) == (8, 4)
    assert (summary["total_cpus"], summary["total_available_cpus"]) == (64, 32), "CPUs without a GPU are of no use"
    [a, b] = summary["servers"]
    assert (a["total_cpus"], a["available_cpus"], a["gpu_utilization"], a["running_tasks"]) == (32, 0, "50.0%", 1)
    assert (b["available_gpus"], b["available_cpus"]) == (4, 32)
    assert a["disabled"] == {str(gpu): "" for gpu in range(4)} and "disabled" not in b


def test_request_that_would_fit_but_for_that_waits_and_is_served_when_it_is_enabled(two: GPUResourceManagerV01) -> None:
    two.disable("a", [3])
    two.disable("b")
    process = start(str(CLI), "--allocate", "late", "4", "1", "--wait")
    assert process.stderr and process.stderr.readline().decode().startswith("待機中 (1 番目): ")
    assert two.enable("a") == {}
    assert finish(process).code == 0
    assert held_gpus(two.get_detailed_status()) == {"late": (0, [0, 1, 2, 3])}


def test_without_a_wait_it_is_refused_as_no_room_and_the_line_of_the_server_says_why(
    two: GPUResourceManagerV01, pool: Path
) -> None:
    two.disable("a", [1, 3], "fan")
    two.disable("b", reason="move")
    before = pool.read_bytes()
    refused = cli("--allocate", "late", "4", "1")
    assert refused.code == 1
    assert "\n  a: GPU 2 個不足 (使用停止中: GPU 1, 3)\n" in refused.err
    assert "\n  b: GPU 4 個不足 (使用停止中: GPU 0, 1, 2, 3)\n" in refused.err
    error = json.loads(cli("--allocate", "late", "4", "1", "--json").out)["error"]
    assert (error["code"], error["fewest_releases"], error["scattered"]) == ("no_capacity", [], None)
    assert [server["disabled"] for server in error["servers"]] == [
        {"1": "fan", "3": "fan"},
        dict.fromkeys("0123", "move"),
    ]
    assert all(server["eligible"] for server in error["servers"])
    assert cli("--allocate", "late", "5", "1").code == 2, "more than any server has is wrong all the same"
    assert pool.read_bytes() == before


def test_due_request_reserves_no_server_that_cannot_serve_it_while_gpus_are_out_of_service() -> None:
    state = state_of(("a", 4, 32), ("b", 4, 32))
    place(state["servers"][1], "x", 2, 1, WHEN)
    due = request("due", 4, passed_over=MAX_PASSED_OVER)
    state["waiting"] = [due]
    assert reserved_servers(state, [due]) == {0}, "where least is missing"
    disable(state, "a", [0], "")
    assert reserved_servers(state, [due]) == {1}
    assert not isinstance(ask(state, request("small", 2, lease="1" * 32)), Shortfall), "a is free for others"
    assert held_gpus(state)["small"] == (0, [1, 2])
    disable(state, "b", [3], "")
    assert reserved_servers(state, [due]) == set(), "nothing could serve it, so nothing is kept idle"
    enable(state, "b", None)
    assert reserved_servers(state, [due]) == {1}


def test_releases_are_not_advised_of_tasks_whose_gpus_would_not_come_back() -> None:
    state = state_of(("a", 6, 32))
    for task_id in ("x", "y", "z"):
        place(state["servers"][0], task_id, 2, 1, WHEN)
    disable(state, "a", [0, 1], "")
    assert shortfall(state, request("late", 2)).fewest_releases == ["y"]
    assert shortfall(state, request("late", 4)).fewest_releases == ["y", "z"]
    assert shortfall(state, request("late", 6)).fewest_releases == []


@pytest.mark.parametrize("command", ["disable", "enable"])
@pytest.mark.parametrize("place", ["c", "A", "c:0", "a:4", "a:0,9", "a:999999999", "a:", ":0", "a:0,x", ""])
def test_unknown_server_or_gpu_is_refused_and_changes_nothing(
    two: GPUResourceManagerV01, pool: Path, command: str, place: str
) -> None:
    two.disable("a", [1], "fan")
    before = pool.read_bytes()
    assert cli(f"--{command}", place).code == 2
    error = json.loads(cli(f"--{command}", place, "--json").out)["error"]
    assert error["code"] == "invalid_request"
    assert pool.read_bytes() == before


@pytest.mark.parametrize("gpus", [[], [4], [-1], [True], [1.0], ["1"], [None]])
def test_library_refuses_what_is_no_gpu_of_the_server(two: GPUResourceManagerV01, pool: Path, gpus: Any) -> None:
    before = pool.read_bytes()
    for change in (two.disable, two.enable):
        with pytest.raises(InvalidRequestError):
            change("a", gpus)
    assert pool.read_bytes() == before


@pytest.mark.parametrize("reason", ["a\nb", "\x1b[2J", "x" * 201, None, 3])
def test_reason_that_no_screen_could_show_is_refused(two: GPUResourceManagerV01, pool: Path, reason: Any) -> None:
    before = pool.read_bytes()
    with pytest.raises(InvalidRequestError):
        two.disable("a", reason=reason)
    assert pool.read_bytes() == before


def test_different_reasons_are_shown_for_different_gpus(two: GPUResourceManagerV01) -> None:
    shown = "✓ 使用停止: a の GPU 1 (ファン故障)\n  そこで動いているタスクは、終わるまでそのまま続きます\n"
    assert cli("--disable", "a:1", "--reason", "ファン故障") == (0, shown, "")
    assert cli("--disable", "a:3,2", "--reason", "ECC").code == 0
    assert cli("--disable", "b").code == 0
    lines = ["  使用停止: a の GPU 1 (ファン故障)", "  使用停止: a の GPU 2-3 (ECC)", "  使用停止: b の GPU 0-3"]
    status, detail = cli("--status").out, cli("--detail").out
    assert [line for line in status.splitlines() if "使用停止" in line] == lines
    assert [line for line in detail.splitlines() if "使用停止" in line] == lines
    reasons = {"1": "ファン故障", "2": "ECC", "3": "ECC"}
    for command in ("--status", "--detail"):
        servers = by_name(json.loads(cli(command, "--json").out)["result"])
        assert servers["a"]["disabled"] == reasons
    result = json.loads(cli("--enable", "a:1", "--json").out)["result"]
    assert result == {"server_name": "a", "disabled": {"2": "ECC", "3": "ECC"}}
    assert cli("--enable", "a") == (0, "✓ 使用を再開しました: a\n", "")
    assert "使用停止: a" not in cli("--status").out


def test_enabling_or_disabling_twice_is_no_mistake(two: GPUResourceManagerV01) -> None:
    assert two.enable("a") == {}
    assert two.disable("a", [1, 1], "one") == {"1": "one"}
    assert two.disable("a", [1], "another") == {"1": "another"}
    assert two.enable("a", [1, 2]) == {}


def test_reset_keeps_what_is_out_of_service(two: GPUResourceManagerV01) -> None:
    assert two.allocate_resources("x", 2, 1)
    two.disable("a", [1, 3], "fan")
    assert cli("--reset", "--yes").code == 0
    [a, _] = two.get_detailed_status()["servers"]
    assert (a["available_gpus"], a.get("disabled")) == ([0, 2], {"1": "fan", "3": "fan"})
    assert cli("--reset", "--yes", "--server", "a:4:32").code == 0
    [a] = two.get_detailed_status()["servers"]
    assert "disabled" not in a, "servers that are described anew are in service"


# --- The document ---------------------------------------------------------------------------------

#: as the first release wrote it, with a task, a request in line and a key of somebody's own
KEPT = """\
{
  "servers": [
    {"server_id": 0, "server_name": "a", "total_gpus": 2, "available_gpus": [], "total_cpus": 8, \
"available_cpus": 0, "running_tasks": [{"task_id": "x", "allocated_gpus": [0, 1], "allocated_cpus": 8, \
"start_time": "2026-01-31T09:30:00"}], "rack": 7},
    {"server_id": 3, "server_name": "b", "total_gpus": 3, "available_gpus": [0, 1, 2], "total_cpus": 8, \
"available_cpus": 8, "running_tasks": []}
  ],
  "last_updated": "2026-01-31T09:30:00",
  "version": "0.1"
}
"""


def without_time(pool: Path) -> str:
    text = pool.read_text("utf-8")
    updated: str = json.loads(text)["last_updated"]
    return text.replace(f'"last_updated": "{updated}"', f'"last_updated": "{WHEN}"')


@pytest.mark.parametrize(
    "change_and_undo",
    [
        lambda manager: manager.allocate_resources("y", 2, 1) and manager.release_resources("y"),
        lambda manager: (manager.disable("b"), manager.enable("b")),
        lambda manager: (manager.disable("a", [1], "fan"), manager.enable("a", [1])),
        lambda manager: (manager.add_server("c", 1, 1), manager.remove_server("c")),
    ],
    ids=["allocate", "a server out and in", "a held GPU out and in", "a server more"],
)
def test_file_without_such_keys_is_written_as_before(
    pool: Path, change_and_undo: Callable[[GPUResourceManagerV01], object]
) -> None:
    pool.write_text(KEPT, "utf-8")
    change_and_undo(GPUResourceManagerV01(pool))
    assert without_time(pool) == KEPT


def test_version_tells_older_programs_of_what_is_out_of_service_until_nothing_is(
    two: GPUResourceManagerV01, pool: Path
) -> None:
    def version() -> Any:
        return json.loads(pool.read_text("utf-8"))["version"]

    two.disable("a", [1])
    two.disable("b", [1])
    assert version() == "0.1+disabled"
    two.enable("a")
    assert two.allocate_resources("x", 2, 1)
    assert version() == "0.1+disabled"
    two.enable("b", [1])
    assert version() == "0.1"


def with_disabled(disabled: Any, version: str = "0.1+disabled") -> Any:
    """Return a document whose second server has one task on GPU 1, GPU 2 idle and out, and this ``disabled``."""
    state: Any = state_of(("a", 2, 8), ("b", 4, 8))
    place(state["servers"][1], "x", 2, 1, WHEN)
    state["servers"][1].update(available_gpus=[3], disabled=disabled)
    return {**state, "version": version}


@pytest.mark.parametrize("version", ["0.1", "0.1+disabled"])
@pytest.mark.parametrize("disabled", [{"2": ""}, {"2": "故障"}, {"1": "held", "2": ""}])
def test_document_with_a_right_disabled_is_accepted_and_kept(pool: Path, version: str, disabled: Any) -> None:
    pool.write_text(json.dumps(with_disabled(disabled, version)), "utf-8")
    manager = GPUResourceManagerV01(pool)
    assert manager.allocate_resources("y", 1, 1, prefer_server_id=1)
    state = manager.get_detailed_status()
    assert held_gpus(state)["y"] == (1, [3])
    assert state["servers"][1]["disabled"] == disabled
    assert state["version"] == "0.1+disabled", "so that an older program refuses it"


@pytest.mark.parametrize("version", ["0.1", "0.1+disabled"])
@pytest.mark.parametrize(
    "disabled",
    [
        ["2"],
        [2],
        2,
        "2",
        True,
        None,
        {},  # GPU 2 is nowhere
        {"3": ""},  # available, and GPU 2 is nowhere
        {"2": "", "3": ""},  # one of them available
        {"2": "", "4": ""},  # out of range
        {"2": "", "-1": ""},
        {"2": "", "9999999999": ""},
        {"02": ""},
        {"2": "", "03": ""},
        {"2": "", "٣": ""},
        {"2": "", "": ""},
        {"2": "", "x": ""},
        {"2 ": ""},
        {"2": None},
        {"2": 3},
        {"2": ["fan"]},
        {"2": "a\nb"},
        {"2": "\x1b[2J"},
        {"2": "\ud800"},
    ],
    ids=ascii,
)
def test_document_with_a_wrong_disabled_is_refused_by_the_name_of_the_place(disabled: Any, version: str) -> None:
    with pytest.raises(ValueError, match=r"servers\[1\]"):
        decode_state(json.dumps(with_disabled(disabled, version)).encode())


@pytest.mark.parametrize("version", ["0.1+", "0.1+other", "0.1 +disabled", "0.1+disabled+x", "0.2"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(ValueError, match="version"):
        decode_state(json.dumps(with_disabled({"2": ""}, version)).encode())


# --- Servers that come and go ---------------------------------------------------------------------


def test_new_server_gets_the_highest_id_plus_one_and_the_others_keep_theirs(two: GPUResourceManagerV01) -> None:
    assert two.add_server("c", 8, 64) == 2
    two.remove_server("b")
    assert cli("--add-server", "d:1:2") == (0, "✓ サーバーを追加しました: d (ID: 3)\n", "")
    two.remove_server("d")
    result = json.loads(cli("--add-server", "学習 機:16:128", "--json").out)["result"]
    assert result == {"server_id": 3, "server_name": "学習 機"}
    found = {server["server_name"]: server["server_id"] for server in two.get_resource_summary()["servers"]}
    assert found == {"a": 0, "c": 2, "学習 機": 3}
    assert two.allocate_resources("big", 16, 128), "what it has can be used at once"


def test_server_that_is_added_serves_who_waits(two: GPUResourceManagerV01) -> None:
    state = state_of(*TWO)
    for server in state["servers"]:
        place(server, f"on-{server['server_name']}", 4, 1, WHEN)
    assert isinstance(ask(state, request("late", 4)), Shortfall)
    add_server(state, ("c", 4, 32))
    assert admit(state) == ["late"]
    assert held_gpus(state)["late"] == (2, [0, 1, 2, 3])


@pytest.mark.parametrize("name", ["a", "A", "B"])
def test_name_that_exists_is_refused(two: GPUResourceManagerV01, pool: Path, name: str) -> None:
    before = pool.read_bytes()
    assert cli("--add-server", f"{name}:1:1").code == 2
    assert json.loads(cli("--add-server", f"{name}:1:1", "--json").out)["error"]["code"] == "invalid_request"
    assert pool.read_bytes() == before


@pytest.mark.parametrize("description", ["c", "c:1", "c:x:1", "c:0:1", "c:1:0", "c:9999:1", ":1:1", "-c:1:1", " :1:1"])
def test_description_of_no_server_is_refused(two: GPUResourceManagerV01, pool: Path, description: str) -> None:
    before = pool.read_bytes()
    result = cli(f"--add-server={description}")
    assert (result.code, result.out) == (2, "")
    assert pool.read_bytes() == before


def test_last_server_and_unknown_ones_cannot_be_removed(two: GPUResourceManagerV01, pool: Path) -> None:
    assert cli("--remove-server", "c").code == 2
    assert cli("--remove-server", "a") == (0, "✓ サーバーを外しました: a\n", "")
    before = pool.read_bytes()
    refused = cli("--remove-server", "b")
    assert (refused.code, "--add-server" in refused.err) == (1, True)
    error = json.loads(cli("--remove-server", "b", "--json").out)["error"]
    assert (error["code"], error["task_ids"]) == ("server_needed", [])
    assert pool.read_bytes() == before


def test_server_where_a_task_runs_cannot_be_removed_and_the_task_is_named(
    two: GPUResourceManagerV01, pool: Path
) -> None:
    assert two.allocate_resources("x", 2, 1) and two.allocate_resources("y", 2, 1)
    two.disable("a")
    before = pool.read_bytes()
    refused = cli("--remove-server", "a")
    assert (refused.code, "(x, y)" in refused.err, "--disable a" in refused.err) == (1, True, True)
    error = json.loads(cli("--remove-server", "a", "--json").out)["error"]
    assert (error["code"], error["task_ids"]) == ("server_needed", ["x", "y"])
    assert pool.read_bytes() == before
    assert cli("--release", "x").code == cli("--release", "y").code == 0
    assert cli("--remove-server", "a").code == 0, "though it is out of service"


#: what waits for which of the servers a (4 GPUs, id 0) and b (2 GPUs, id 1), and whether a is needed for it
WAITS: dict[str, tuple[dict[str, Any], bool]] = {
    "of this machine": ({"gpus": 1, "only_server_name": "a", "local": True}, True),
    "of another machine": ({"gpus": 1, "only_server_name": "b", "local": True}, False),
    "preferred": ({"gpus": 1, "prefer": 0}, True),
    "preferred elsewhere": ({"gpus": 1, "prefer": 1}, False),
    "too big for others": ({"gpus": 3}, True),
    "too many CPUs for others": ({"gpus": 1, "cpus": 17}, True),
    "fits elsewhere": ({"gpus": 2}, False),
}


@pytest.mark.parametrize("what", WAITS)
def test_server_that_somebody_waits_for_cannot_be_removed(what: str) -> None:
    wanted, is_needed = WAITS[what]
    state = state_of(("a", 4, 32), ("b", 2, 16))
    disable(state, "a", None, "")
    disable(state, "b", None, "")
    assert isinstance(ask(state, request("w", **wanted)), Shortfall)
    if is_needed:
        with pytest.raises(ServerNeededError) as refused:
            remove_server(state, "a")
        assert (refused.value.task_ids, "(w)" in str(refused.value)) == (["w"], True)
        assert [*by_name(state)] == ["a", "b"]
    else:
        remove_server(state, "a")
        assert ([*by_name(state)], waiting(state)) == (["b"], ["w"])


def test_server_that_a_process_waits_for_is_refused_to_be_removed(two: GPUResourceManagerV01) -> None:
    two.disable("a")
    process = start(str(CLI), "--run", "w", "1", "1", "--wait", "--", "true", env={"GPU_RESOURCE_SERVER": "a"})
    assert process.stderr and process.stderr.readline().decode().startswith("待機中 (1 番目): ")
    refused = cli("--remove-server", "a")
    assert (refused.code, "(w)" in refused.err) == (1, True)
    two.enable("a")
    assert finish(process).code == 0
    assert cli("--remove-server", "a").code == 0


def test_pool_never_ends_with_limits_that_no_request_can_keep(pool: Path) -> None:
    """Either the server stays, or the least number of GPUs follows: "2-1 GPUs" would be nobody's."""
    manager = GPUResourceManagerV01(pool)  # made up, so with 2 GPUs at least
    for server_id in range(4):
        cli("--add-server", f"node{server_id}:1:8")
    for server_id in range(4):
        cli("--remove-server", f"gpu-server-{server_id}")
    overview = manager.get_overview()
    assert overview["min_gpus_per_task"] <= max(server["total_gpus"] for server in overview["servers"])


# --- Living jobs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["nothing", "the record", "the server", "the file"])
def test_living_job_keeps_a_gpu_that_is_out_of_service_and_gets_it_back(
    two: GPUResourceManagerV01, pool: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "a")
    with two.allocation("t", 3, 8) as granted:
        assert granted["gpu_ids"] == [0, 1, 2]
        two.disable("a", [1, 3], "fan")
        document = json.loads(pool.read_text("utf-8"))
        if lost == "the record":
            document["servers"][0].update(running_tasks=[], available_gpus=[0, 2], available_cpus=32)
        elif lost == "the server":
            document.update(servers=document["servers"][1:], version="0.1")
        if lost == "the file":
            pool.unlink()
            GPUResourceManagerV01(pool, servers=TWO)
        else:
            pool.write_text(json.dumps(document), "utf-8")
        assert two.release_resources("no such task") is False
        a = by_name(two.get_detailed_status())["a"]
        assert [task["allocated_gpus"] for task in a["running_tasks"]] == [[0, 1, 2]]
        assert_sound(json.loads(pool.read_text("utf-8")))
        if lost in ("nothing", "the record"):
            assert (a["disabled"], a["available_gpus"]) == ({"1": "fan", "3": "fan"}, [])
            with pytest.raises(NoCapacityError):
                two.obtain_resources("u", 1, 1, local=True)
    a = by_name(two.get_detailed_status())["a"]
    assert a["running_tasks"] == []
    if lost in ("nothing", "the record"):
        assert a["available_gpus"] == [0, 2], "and what is out of service stays so"


# --- Sixteen processes ----------------------------------------------------------------------------

ROUNDS = 40
CLI_ROUNDS = 3
STAYING = [("a", 4, 64), ("b", 4, 64), ("c", 4, 64), ("here", 8, 64)]
ADDERS, SWITCHERS, USERS, JOBS, CLI_USERS = 3, 3, 6, 2, 2
KEEPERS = USERS + CLI_USERS


def checked(pool: Path) -> Any:
    """Return the document as it is now, which must keep the invariant."""
    document = json.loads(pool.read_bytes())
    assert_sound(document)
    staying = {server["server_name"]: server["server_id"] for server in document["servers"]}
    assert [staying[name] for name, _, _ in STAYING] == [0, 1, 2, 3], "ids never change"
    return document


class Workers:
    """What each of the processes does; ``done`` is where they meet when all is put back and given back."""

    def __init__(self, pool: Path, claims: Claims, done: Barrier) -> None:
        self.pool, self.claims, self.done = pool, claims, done

    def use(self, worker: int) -> None:
        """Allocate and release through the library, now and then with a wait; keep one at the end."""
        manager, rng = GPUResourceManagerV01(self.pool), random.Random(worker)
        for number in range(ROUNDS):
            task_id = f"api-{worker}-{number}"
            wait_s = 0.5 if number % 8 == 0 else 0
            held = manager.allocate_resources(task_id, rng.randint(1, 4), rng.randint(1, 8), wait_s=wait_s)
            if held:
                self.claims.take(held["server_name"], held["gpu_ids"])
                self.claims.give_back(held["server_name"], held["gpu_ids"])
                assert manager.release_resources(task_id)
        self.done.wait()
        assert manager.allocate_resources(f"kept-{worker}", 2, 1)

    def run_jobs(self, worker: int) -> None:
        """Hold GPUs of this machine while a block runs."""
        manager = GPUResourceManagerV01(self.pool)
        for number in range(ROUNDS // 2):
            with contextlib.suppress(NoCapacityError), manager.allocation(f"job-{worker}-{number}", 2, 1) as held:
                self.claims.take("here", held["gpu_ids"])
                self.claims.give_back("here", held["gpu_ids"])
        self.done.wait()

    def type_commands(self, worker: int) -> None:
        """The same through the command line, which also changes the servers."""
        for number in range(CLI_ROUNDS):
            task_id, extra = f"cli-{worker}-{number}", f"typed-{worker}-{number}"
            assert cli("--add-server", f"{extra}:2:8").code == 0
            result = cli("--allocate", task_id, "2", "1", "--json")
            assert result.code in (0, 1), result
            if result.code == 0:
                held = json.loads(result.out)["result"]
                self.claims.take(held["server_name"], held["gpu_ids"])
                self.claims.give_back(held["server_name"], held["gpu_ids"])
                assert cli("--release", task_id).code == 0
            assert cli("--disable", extra, "--reason", "going").code == 0
            while (code := cli("--remove-server", extra).code) != 0:  # as soon as others have finished there
                assert code == 1
        self.done.wait()
        assert cli("--allocate", f"kept-cli-{worker}", "2", "1").code == 0

    def add_and_remove(self, worker: int) -> None:
        manager, name = GPUResourceManagerV01(self.pool), f"extra-{worker}"
        for _ in range(ROUNDS):
            server_id = manager.add_server(name, 2, 8)
            assert server_id > 3
            with pytest.raises(InvalidRequestError):
                manager.add_server(name.upper(), 2, 8)
            while name in by_name(checked(self.pool)):
                with contextlib.suppress(ServerNeededError):  # until others have finished there
                    manager.remove_server(name)
        self.done.wait()

    def switch(self, worker: int) -> None:
        """Take GPUs of a server of one's own out and put them back; nothing new may be there in between."""
        manager, rng = GPUResourceManagerV01(self.pool), random.Random(100 + worker)
        name = STAYING[worker][0]
        for number in range(ROUNDS):
            gpus = None if number % 3 == 0 else sorted(rng.sample(range(4), 2))
            out = {*map(int, manager.disable(name, gpus, f"round {number}"))}
            assert out == ({0, 1, 2, 3} if gpus is None else {*gpus})
            finishing = None
            for _ in range(5):
                server = by_name(checked(self.pool))[name]
                assert {*map(int, server["disabled"])} == out, "only its own process changes that"
                there = {task["task_id"] for task in server["running_tasks"] if out & {*task["allocated_gpus"]}}
                assert finishing is None or there <= finishing, "something new on what is out of service"
                finishing = there
            assert manager.enable(name) == {}
        self.done.wait()


def test_sixteen_processes_change_servers_while_they_are_used_and_no_gpu_is_given_twice(
    pool: Path, tmp_path: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    GPUResourceManagerV01(pool, servers=STAYING)
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "here")
    context = get_context("fork")
    ready, done = (context.Barrier(16) for _ in range(2))
    all_ended: Event = context.Event()
    workers = Workers(pool, Claims(tmp_path / "claims"), done)
    works: Iterator[tuple[Callable[[int], None], int]] = (
        (work, number)
        for work, count in (
            (workers.add_and_remove, ADDERS),
            (workers.switch, SWITCHERS),
            (workers.use, USERS),
            (workers.run_jobs, JOBS),
            (workers.type_commands, CLI_USERS),
        )
        for number in range(count)
    )

    def starting(work: Callable[[int], None], number: int) -> int:
        def wait_and_work() -> None:
            ready.wait()
            work(number)

        return children.start(wait_and_work)

    def read_all_the_time() -> None:
        while not all_ended.is_set():
            checked(pool)

    reader = children.start(read_all_the_time)
    pids = [starting(work, number) for work, number in works]
    assert len(pids) == 16
    codes = [children.wait(pid) for pid in pids]
    all_ended.set()
    assert children.wait(reader) == 0
    assert codes == [0] * 16

    state = checked(pool)
    assert decode_state(pool.read_bytes())["version"] == "0.1"
    assert {*running(pool)} == {f"kept-{n}" for n in range(USERS)} | {f"kept-cli-{n}" for n in range(CLI_USERS)}
    assert [server["server_name"] for server in state["servers"]] == [name for name, _, _ in STAYING]
    assert sum(len(server["available_gpus"]) for server in state["servers"]) == 20 - 2 * KEEPERS
    assert [path.name for path in (tmp_path / "claims").iterdir()] == []


def test_number_that_is_no_index_is_not_shortened_to_one(made_pool: Path) -> None:
    before = made_pool.read_bytes()
    assert cli("--disable", "gpu-server-0:0000000003").code == 2
    assert made_pool.read_bytes() == before
