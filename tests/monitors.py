"""The page of ``gpu-resource-monitor`` for tests and measurements: a real process, and pools that it can show.

with Monitor(pool) as monitor:
    assert monitor.get("/").status == 200
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from conftest import GUARD_S, PROJECT, needed

from gpu_resource_extensions.leases import boot_id
from gpu_resource_manager_v01 import (
    State,
    encode_state,
    first_fit,
    new_request,
    new_servers,
    new_state,
    place,
    records,
)

COMMAND = sys.executable, "-m", "gpu_resource_extensions.web_monitor"


def skip_without_packages() -> None:
    for name in ("starlette", "uvicorn", "prometheus_client"):
        needed(name)


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    text: str


class Monitor:
    """A monitor of ``pool``, a path or a URL, on a port of its own."""

    def __init__(self, pool: Path | str, *options: str, port: int = 0, setting: str = "", language: str = "") -> None:
        """:param setting: lines of Python that are run ahead of the monitor in its process."""
        command = COMMAND
        if setting:
            lines = f"from gpu_resource_extensions import web_monitor\n{setting}\nweb_monitor.run()"
            command = sys.executable, "-c", lines
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *options],
            cwd=PROJECT,
            env={
                **os.environ,
                "GPU_RESOURCE_FILE": str(pool),
                "GPU_RESOURCE_LANG": language,
                "PYTHONIOENCODING": "utf-8",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert "http://" in line, line + self.stop()
        self.url = "http://" + line.partition("http://")[2].split()[0]
        self.port = int(self.url.rstrip("/").rpartition(":")[2])

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, number: int = signal.SIGTERM) -> str:
        """End it; return what it has written to stderr."""
        self.process.send_signal(number)
        try:
            return self.process.communicate(timeout=GUARD_S)[1]
        finally:
            self.process.kill()

    def get(self, path: str, method: str = "GET", body: str | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=GUARD_S)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read().decode())
        finally:
            connection.close()

    def connect(self, text: str = "", receive_bytes: int | None = None) -> socket.socket:
        """Return a bare connection on which ``text`` was sent."""
        connection = socket.socket()
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(GUARD_S)
        connection.connect(("127.0.0.1", self.port))
        connection.sendall(text.replace("\n", "\r\n").encode())
        return connection

    @contextmanager
    def events(self, path: str = "/events") -> Iterator[Iterator[tuple[str, str]]]:
        """Yield kind and data of each server-sent event as it comes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=GUARD_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.headers.get_content_type() == "text/event-stream"

            def read() -> Iterator[tuple[str, str]]:
                kind, data = "message", []
                for line in iter(answer.readline, b""):
                    name, _, value = line.decode().rstrip("\n").partition(": ")
                    if name == "event":
                        kind = value
                    elif name == "data":
                        data.append(value)
                    elif not name:
                        yield kind, "\n".join(data)
                        kind, data = "message", []

            yield read()
        finally:
            connection.close()


# --- Pools to show --------------------------------------------------------------------------------

HOSTILE = [
    "<script>document.title = 'run'</script>",
    "<img src=x onerror=document.title='run'>",
    "</main><h1>&lt;",
    "\u05e7\u05d5\u05d3-\u05dc\u05d0\u05d9\u05de\u05d5\u05df",  # Hebrew letters, written from right to left
    "\u0645\u0631\u062d\u0628\u0627-7",  # Arabic ones, with a digit
    "漢" * 128,
    "w" * 128,
    "Z\u0351\u034b\u0301a\u0321\u034a\u0328l\u031b\u0334g\u034f\u0335o\u0353",  # marks above and below the letters
    "\"';&amp;`{}%s",
]
USERS = "alice", "bob", "chen", "kobayashi-t", "山田"


def ago(**how_long: float) -> str:
    return (datetime.now() - timedelta(**how_long)).isoformat(timespec="seconds")


def made_state(servers: int = 4, tasks: Iterable[str] = (), waiting: Iterable[str] = (), gpus: int = 8) -> State:
    """Return a pool in which these tasks hold 2 GPUs each, one of three a reservation, and others wait for all GPUs."""
    state = new_state(servers, gpus)
    state["servers"] = new_servers([(f"node{number:03d}", gpus, 64) for number in range(servers)])
    state["min_gpus_per_task"], state["last_updated"] = 1, ago()
    for number, task_id in enumerate(tasks):
        server = first_fit(state, 2, 4)
        assert server, "there is no room"
        who = {"user": USERS[number % len(USERS)]}
        if number % 3:  # no such lease is there, so nobody can tell that it has ended
            who |= {"lease": f"{number:032x}", "boot": boot_id()}
        place(server, task_id, 2, 4, ago(minutes=7 * number), who)
    line = [
        new_request(task_id, gpus, 64, user="dora", lease=f"{number:031x}f", boot=boot_id())
        for number, task_id in enumerate(waiting)
    ]
    for request in line:
        request["asked_time"] = ago(hours=2)
    if line:
        state["waiting"] = line
    return state


def end(state: State, task_id: str) -> None:
    """Let a task have ended with an earlier start of this machine."""
    for record in records(state):
        if record["task_id"] == task_id:
            record.update({"lease": "e" * 32, "boot": "an earlier one"})


def disable(state: State, number: int, gpus: Iterable[int], reason: str) -> None:
    server = state["servers"][number]
    server["disabled"] = {str(gpu): reason for gpu in gpus}
    server["available_gpus"] = [gpu for gpu in server["available_gpus"] if gpu not in [*gpus]]
    state["version"] = "0.1+disabled"


def write(pool: Path, state: State) -> None:
    """Put a document in the place of the pool in one step."""
    new = pool.with_suffix(".new")
    new.write_bytes(encode_state(state))
    new.replace(pool)
