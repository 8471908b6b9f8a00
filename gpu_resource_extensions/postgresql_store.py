"""A pool in a PostgreSQL database; each attempt has its own connection, so that nothing of it outlives a call."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from gpu_resource_extensions import databases
from gpu_resource_manager_v01 import InvalidRequestError, NoPoolError, State, Store, T, failures_reported, say

if TYPE_CHECKING:
    import psycopg

#: unless the URL says otherwise; a dead network is noticed in time to reach the server that has taken over
PARAMETERS = """target_session_attrs=read-write client_encoding=UTF8 fallback_application_name=gpu-resource
    keepalives_idle=5 keepalives_interval=5 tcp_user_timeout=10000"""
TABLES = """DO $$ BEGIN PERFORM pg_advisory_xact_lock(hashtext('gpu_resource_pool'));
    IF to_regclass('gpu_resource_pool') IS NULL THEN
        CREATE TABLE gpu_resource_pool (one boolean PRIMARY KEY DEFAULT true CHECK (one), document text, change text);
        CREATE TABLE gpu_resource_change (id text PRIMARY KEY, made timestamptz DEFAULT now(), UNIQUE (made, id));
        CREATE TABLE gpu_resource_aside (document text, made timestamptz DEFAULT now()); END IF; END $$"""
BEGIN = """BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = {0:.0f};
    SET LOCAL idle_in_transaction_session_timeout = {1:.0f}; SET LOCAL tcp_user_timeout = {1:.0f};
    SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off';
    SELECT pg_advisory_xact_lock(hashtext('gpu_resource_pool'));
    SELECT (SELECT document FROM gpu_resource_pool FOR UPDATE), extract(epoch FROM clock_timestamp())::bigint"""
WRITE = """WITH named AS (INSERT INTO gpu_resource_change (id) VALUES (%(id)s)),
        forgotten AS (DELETE FROM gpu_resource_change WHERE id = ANY (ARRAY(SELECT id FROM gpu_resource_change
            WHERE made < now() - interval '1 day' ORDER BY made LIMIT 9)))
    INSERT INTO gpu_resource_pool (document, change) VALUES (%(document)s, %(id)s)
    ON CONFLICT (one) DO UPDATE SET document = excluded.document, change = excluded.change"""
CONFIRM = "UPDATE gpu_resource_change SET made = now() WHERE id = %s"
BUSY = "LockNotAvailable", "QueryCanceled", "DeadlockDetected"
LOST = "$|08|25P|57P|53300"  # a connection, by SQLSTATE; one that was refused has none, but a text that says why


class PostgreSQLStore(Store):
    """Changes take turns by an advisory lock, and each commits its id together with the document.

    After a lost answer that lock comes first, for an old backend holds it until it has committed or not; then the id
    is looked up, and by a write, for what a read finds may be on no standby yet.
    """

    def __init__(self, place: str, lock_timeout_s: float) -> None:
        global psycopg
        with databases.needed("psycopg[binary]>=3.2"):
            import psycopg
        self.path, self.lease_directory = databases.shown(place), databases.lease_directory()
        self.poll_s, self._lock_timeout_s, url = databases.POLL_S, lock_timeout_s, None
        with suppress(psycopg.Error, UnicodeError):  # its text may hold the password
            hosts = str((found := psycopg.conninfo.conninfo_to_dict(place)).get("host", "/"))
            url = found if "/" in hosts or hosts.replace(",", ".").encode("idna") else None
        if url is None or any("@" in str(url.get(part)) for part in ("host", "port", "dbname")):
            raise InvalidRequestError("resource_file", self.path, *databases.NO_POSTGRESQL_URL)
        defaults = psycopg.conninfo.conninfo_to_dict(PARAMETERS, connect_timeout=int(max(2, min(5, lock_timeout_s))))
        self._parameters: Any = {**defaults, **url, "autocommit": True}

    def create(self, state: State) -> None:
        try:
            self.version_mark()
        except NoPoolError:
            self._run(lambda connection, _: connection.execute(TABLES))
            self._change(lambda old, s: (None, databases.new_document(state, s) if old is None else None, False))

    def read(self) -> State:
        return databases.decoded(self.path, self._seen("document"))

    def update(self, change: Callable[[State], T], instead_of_unusable: State | None = None) -> T:
        if instead_of_unusable is not None:
            self.create(instead_of_unusable)  # where there is nothing
        return self._change(lambda old, s: databases.changed(self.path, old, s, change, instead_of_unusable))

    def version_mark(self) -> object:
        return self._seen("change")

    def _seen(self, column: str) -> Any:
        row = self._run(lambda it, _: it.execute(f"SELECT {column} FROM gpu_resource_pool").fetchone())  # noqa: S608
        if not row:
            raise databases.no_pool(self.path)
        return row[0]

    def _change(self, work: Callable[[str | None, int], tuple[T, str | None, bool]]) -> T:
        """Return the first of what ``work`` makes of the document and the clock, once the second is committed."""
        sent: dict[str, T] = {}  # the id of a change whose COMMIT was not answered, and its result

        def attempt(connection: Any, left_s: float) -> T:
            idle_s = max(0.5, min(5, self._lock_timeout_s / 2))  # a process that was stopped holds nobody up for longer
            cursor = connection.execute(BEGIN.format(max(1, left_s * 1000) if left_s < 2e6 else 0, idle_s * 1000))
            while cursor.nextset():
                pass
            document, clock_s = cursor.fetchone()
            if not any(connection.execute(CONFIRM, [id_]).rowcount for id_ in sent):
                sent.clear()  # it was not committed, and will not be
                result, text, is_aside = work(document, clock_s)
                if text is None:
                    connection.execute("ROLLBACK")
                    return result
                if is_aside:
                    connection.execute("INSERT INTO gpu_resource_aside SELECT document FROM gpu_resource_pool")
                    databases.warn_of_aside("gpu_resource_aside")
                id_ = os.urandom(16).hex()
                connection.execute(WRITE, {"id": id_, "document": text})
                sent[id_] = result
            connection.execute("COMMIT")
            return next(iter(sent.values()))

        return self._run(attempt, sent)

    def _run(self, attempt: Callable[[Any, float], T], sent: Container[str] = ()) -> T:
        """Return what ``attempt`` returns, on another connection whenever one is lost, until the time is over."""
        with failures_reported(self.path), databases.Countdown(self._lock_timeout_s) as time_left:
            while True:
                try:
                    with closing(psycopg.connect(**self._parameters)) as it, time_left.watching(it.fileno()):
                        return attempt(it, time_left.left_s)
                except psycopg.Error as error:
                    failure = TimeoutError(say(databases.SILENT)) if time_left.is_cut else error
                is_lost = re.match(LOST, getattr(failure, "sqlstate", None) or "")
                if is_lost and not re.search(databases.POSTGRESQL_REFUSED, str(failure)) and time_left.pause(failure):
                    continue
                if sent:
                    raise databases.unconfirmed(self.path, failure)
                if isinstance(failure, psycopg.errors.UndefinedTable):
                    raise databases.no_pool(self.path)
                if type(failure).__name__ in BUSY:
                    raise databases.DatabaseBusyError(self.path, self._lock_timeout_s)
                raise databases.failed(self.path, failure, databases.POSTGRESQL_REMEDIES)
