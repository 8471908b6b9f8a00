"""The servers of a pool, changed while people use it: added, removed, put out of service and back.

Pure functions on the private copy of the document, like the decisions of the library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpu_resource_manager_v01 import (
    InvalidRequestError,
    ResourceManagerError,
    Server,
    ServerDescription,
    State,
    Task,
    check_description,
    could_ever_hold,
    gpu_set,
    hold,
    is_unsafe,
    limits,
    new_servers,
    quoted,
    say,
)

MAX_REASON_LENGTH = 200  # characters; every change reads and writes it

# For InvalidRequestError: the problem, and what to do.
_NAME_TAKEN = "のサーバーは既にあります", "別の名前を指定してください"
_NO_SUCH_SERVER = "がプールにありません", "{known} のいずれかを指定してください"
_NO_SUCH_GPU = "がサーバー {name} の GPU の番号ではありません", "0-{last} の番号を , で区切って指定してください"
_NO_REASON = "が正しくありません", "制御文字を含まない {most} 文字以内の文字列を指定してください"
# For ServerNeededError.
_IN_USE = (
    "タスクが動いているか待っています ({tasks})",
    "終わるのを待つか --release で取り消してから、再実行してください (--disable {name} は新しいタスクを入れません)",
)
_LAST = "最後のサーバーです", "別のサーバーを --add-server で登録してから再実行してください"


class ServerNeededError(ResourceManagerError):
    """The server cannot be removed: of the ``task_ids`` each runs or waits there; without any, it is the last one."""

    exit_code, code = 1, "server_needed"
    template = "サーバー {name} を外せません。{reason}\n  対処: {remedy}"

    def __init__(self, name: str, task_ids: Sequence[str]) -> None:
        self.name, self.task_ids = name, task_ids
        reason, remedy = _IN_USE if task_ids else _LAST
        self.reason, self.remedy = say(reason, tasks=", ".join(task_ids)), say(remedy, name=quoted(name))


def find_server(state: State, name: str) -> Server:
    """Return the server of that name, or raise :class:`InvalidRequestError`."""
    for server in state["servers"]:
        if server["server_name"] == name:
            return server
    known = ", ".join(server["server_name"] for server in state["servers"])
    raise InvalidRequestError("サーバー名", name, *_NO_SUCH_SERVER, known=known)


def unheld_gpus(server: Server) -> set[int]:
    """Return the GPUs of ``server`` that no task holds, in service or not."""
    held = {gpu for task in server["running_tasks"] for gpu in task["allocated_gpus"]}
    return {*range(server["total_gpus"])} - held


def server_id_of(text: str, servers: Sequence[Mapping[str, Any]]) -> int:
    """Return the server that ``text`` names: by its id, else by its name.

    :raises InvalidRequestError: there is no such server.
    """
    ids: dict[str, int] = {server["server_name"]: server["server_id"] for server in servers}
    ids.update((str(server_id), server_id) for server_id in list(ids.values()))
    if text not in ids:
        raise InvalidRequestError("--prefer-server", text, *_NO_SUCH_SERVER, known=", ".join(ids))
    return ids[text]


def append_server(state: State, description: ServerDescription) -> Server:
    """Add a server, whose ``server_id`` is the highest one plus 1, and return it."""
    [server] = new_servers([description])
    server["server_id"] = 1 + max(other["server_id"] for other in state["servers"])
    state["servers"].append(server)
    return server


def add_server(state: State, description: ServerDescription) -> Server:
    """Do as :func:`append_server` with what somebody has typed."""
    check_description(*description)
    if description[0].casefold() in [server["server_name"].casefold() for server in state["servers"]]:
        raise InvalidRequestError("サーバー名", description[0], *_NAME_TAKEN)
    return append_server(state, description)


def remove_server(state: State, name: str) -> None:
    """Remove a server that nobody needs."""
    gone = find_server(state, name)
    others = [server for server in state["servers"] if server is not gone]
    needed_by = [task["task_id"] for task in gone["running_tasks"]]
    needed_by += [
        request["task_id"]
        for request in state.get("waiting", ())
        if request.get("prefer_server_id") == gone["server_id"]
        or not any(could_ever_hold(server, request) for server in others)
    ]
    if needed_by or not others:
        raise ServerNeededError(name, needed_by)
    state["servers"] = others
    least, most_gpus, _ = limits(state)
    if least > most_gpus:  # else nobody could ask for anything
        state["min_gpus_per_task"] = most_gpus


def disable(state: State, name: str, gpus: Sequence[int] | None, reason: str) -> dict[str, str]:
    """Take GPUs, by default all, out of service; who holds one keeps it until it ends. Return all that now are."""
    server = find_server(state, name)
    if not isinstance(reason, str) or len(reason) > MAX_REASON_LENGTH or is_unsafe(reason):
        raise InvalidRequestError("理由", reason, *_NO_REASON, most=MAX_REASON_LENGTH)
    before = server.get("disabled", {})
    chosen = {gpu: reason or before.get(gpu, "") for gpu in map(str, _chosen(server, gpus))}
    return _set_disabled(server, {**before, **chosen})


def enable(state: State, name: str, gpus: Sequence[int] | None) -> dict[str, str]:
    """Put GPUs, by default all, back in service. Return all that are still out of it."""
    server = find_server(state, name)
    chosen = {*map(str, _chosen(server, gpus))}
    return _set_disabled(server, {gpu: why for gpu, why in server.get("disabled", {}).items() if gpu not in chosen})


def _chosen(server: Server, gpus: Sequence[int] | None) -> list[int]:
    """Return the GPUs asked for, or raise :class:`InvalidRequestError`."""
    every = list(range(server["total_gpus"]))
    chosen = every if gpus is None else list(gpus) if isinstance(gpus, Iterable) else [gpus]
    if not chosen or any(type(gpu) is not int or gpu not in every for gpu in chosen):
        raise InvalidRequestError("GPU", chosen, *_NO_SUCH_GPU, name=server["server_name"], last=len(every) - 1)
    return chosen


def _set_disabled(server: Server, disabled: dict[str, str]) -> dict[str, str]:
    server["disabled"] = dict(sorted(disabled.items(), key=lambda item: int(item[0])))
    server["available_gpus"] = sorted(unheld_gpus(server) - gpu_set(disabled))
    if not disabled:
        del server["disabled"]
    return disabled


def keep_tasks(state: State, servers: list[Server], kept: Sequence[tuple[Server, Task]]) -> list[str]:
    """Replace the servers of the pool; return the tasks of ``kept`` that would find no place on the new ones."""
    homeless = []
    for old, task in kept:
        server = next((one for one in servers if one["server_name"] == old["server_name"]), None)
        has_room = server and server["available_cpus"] >= task["allocated_cpus"]
        if server and has_room and {*task["allocated_gpus"]} <= {*server["available_gpus"]}:
            hold(server, task)
        else:
            homeless.append(task["task_id"])
    state["servers"] = servers
    return homeless
