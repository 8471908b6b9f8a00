"""Which server of a pool a machine is: pure functions on the document, for requests of GPUs of this very machine."""

from __future__ import annotations

from typing import Any

from gpu_resource_manager_v01 import InvalidRequestError, Request, Requester, Server, State, placed_tasks, quoted, say

# For InvalidRequestError: the problem, and what to do.
_NOT_THIS_MACHINE = (
    "が正しくありません。{why} (登録済み: {known})",
    "GPU_RESOURCE_SERVER でサーバー名を指定するか、--add-server NAME:GPUS:CPUS でこの計算機を登録してください",
)
_NO_SERVER, _ANOTHER_SERVER = "この計算機 ({}) にあたるサーバーがありません", "この計算機はサーバー {} です"
_SEVERAL_SERVERS = "この計算機にあたるサーバーが複数あります"
_TWO_SERVERS = (
    "は使えません。この計算機は既にサーバー {name} として使われています",
    "GPU_RESOURCE_SERVER に {name} を指定してください",
)
_TWO_MACHINES = (
    "は使えません。別の計算機がサーバー {name} として使われています",
    "この計算機に別の名前を付けて --add-server で登録するか、計算機を取り替えたなら --remove-server {name} の後で "
    "--add-server をやり直してください",
)


def server_of_host(state: State, host: str, named: str | None, boot: str = "") -> Server:
    """Return the server that the machine ``host`` is: the one of that name, short or full, or the one ``named``.

    In a container, whose name is a random one, it is the server whose last job ran under the same ``boot``.

    :raises InvalidRequestError: there is none, or it would be two: tasks on one physical GPU.
    """
    servers = state["servers"]
    by_host = [server for server in servers if _same_host(server["server_name"], host)]
    by_boot = [server for server in servers if boot and server.get("boot") == boot]
    found = [server for server in servers if server["server_name"] == named] if named else by_host or by_boot
    why = ""
    if len(found) != 1:
        why = say(_SEVERAL_SERVERS) if found else say(_NO_SERVER, host)
    elif by_host and found[0] not in by_host:
        why = say(_ANOTHER_SERVER, by_host[0]["server_name"])
    if why:
        known = ", ".join(server["server_name"] for server in servers)
        raise InvalidRequestError("server", named or host, *_NOT_THIS_MACHINE, why=why, known=known)
    return found[0]


def _same_host(name: str, host: str) -> bool:
    name, host = name.casefold(), host.casefold()
    return name == host or (name.split(".")[0] == host.split(".")[0] and not ("." in name and "." in host))


def check_one_machine(state: State, request: Request) -> None:
    """:raises InvalidRequestError: another server of the pool is the machine that this local request was asked on,

    or another machine is the server of its name.
    """
    named = request["only_server_name"]
    for server in state["servers"]:
        is_known = "machine" in server and "machine" in request and server["server_name"] == named
        if is_known and server["machine"] != request["machine"] and server.get("boot") != request.get("boot"):
            raise InvalidRequestError("server", named, *_TWO_MACHINES, name=quoted(str(named)))
    found: list[tuple[Any, Requester]] = [(server["server_name"], task) for server, task in placed_tasks(state)]
    found += [(other.get("only_server_name"), other) for other in state.get("waiting", ())]
    for name, record in found:
        key = "boot" if "boot" in record and "boot" in request else "host"
        same_machine = record.get("local") is True and record.get(key) == request.get(key)
        if same_machine and name != request["only_server_name"]:
            raise InvalidRequestError("server", request["only_server_name"], *_TWO_SERVERS, name=name)


def note_machine(state: State, server: Server, record: Requester) -> None:
    """Let ``server`` bear what tells the machine that it is, which the local ``record`` was asked on."""
    if "boot" in record:
        for other in state["servers"]:
            if other.get("boot") == record["boot"]:
                del other["boot"]
        server["boot"] = record["boot"]
        if "machine" in record:
            server["machine"] = record["machine"]
