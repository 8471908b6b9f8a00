"""A pool in Redis or Valkey: a hash with the ``document`` and the id of its last ``change``, for compare-and-set."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Sized
from importlib import import_module
from typing import Any

from gpu_resource_extensions import databases
from gpu_resource_manager_v01 import InvalidRequestError, State, Store, T, failures_reported, say

redis: Any = None  # the package, once there is a store; its types differ from one release to the next
URL = r"^\w+://[^/?#]+/?[0-9]*(?:\?[^@#]*)?$"  # so that no / or # of a password makes another server of it
FIXED = {"protocol": 2, "decode_responses": True, "encoding_errors": "surrogateescape", "socket_connect_timeout": None}
POOL, KEPT_S = "gpu_resource:pool", 3600  # how long the server knows the id of a change; no verb takes half of that
LEAST_S, WAIT_MS, PAUSE_S = 1.0, 500, 0.05  # for an answer; for replicas, which is less; when others were quicker
TEMPORARY = rf"(?!.*({databases.REDIS_TLS}))(Connection|Timeout|BusyLoading|TryAgain|MasterDown)Error |.*NOREPLICAS"
#: what a server needs to lose neither a change that was made nor its id
SAFE = ["appendonly yes", "appendfsync always", "no-appendfsync-on-rewrite no", "maxmemory-policy noeviction"]
#: KEYS: the pool, the id of the change, and a name for the old pool if it is kept. ARGV: the id of the change before,
#: that of this one, the document, ``KEPT_S``. Returns whether the change is made, by this call or an earlier one.
SCRIPT = """
if redis.call('EXISTS', KEYS[2]) == 1 then return redis.call('EXPIRE', KEYS[2], ARGV[4]) end
local found = redis.pcall('HGET', KEYS[1], 'change')
if (type(found) == 'table' and 'no hash' or found or '') ~= ARGV[1] then return 0 end
if KEYS[3] then redis.call('RENAME', KEYS[1], KEYS[3]) end
redis.call('HSET', KEYS[1], 'document', ARGV[3], 'change', ARGV[2])
return redis.call('SET', KEYS[2], '', 'EX', ARGV[4])"""


class RedisStore(Store):
    def __init__(self, place: str, lock_timeout_s: float) -> None:
        global redis
        with databases.needed("redis>=6.0"):  # the first that checks the name in a certificate
            redis = import_module("redis")
            if redis.VERSION < (6,):
                raise ImportError(f"redis {redis.__version__}")
        self.path, self.lease_directory = databases.shown(place), databases.lease_directory()
        self.poll_s, self._limit_s = databases.POLL_S, min(max(lock_timeout_s, LEAST_S), KEPT_S / 2)
        try:
            found = redis.connection.parse_url(*re.findall(URL, place)) | FIXED
            self._is_unsafe = found.pop("unsafe", "") == "1"
            self._kind, self._settings = found.pop("connection_class", redis.Connection), found
            self._kind(**found).host.encode("idna")
        except (ValueError, TypeError, redis.RedisError):  # its text may hold the password
            raise InvalidRequestError("resource_file", self.path, *databases.NO_REDIS_URL) from None

    def create(self, state: State) -> None:
        self._change(lambda old, now: (None, databases.new_document(state, now) if old is None else None, False))

    def read(self) -> State:
        return databases.decoded(self.path, self._run(lambda ask: seen(ask, "document")[0]))

    def update(self, change: Callable[[State], T], instead_of_unusable: State | None = None) -> T:
        new = instead_of_unusable
        return self._change(lambda old, now: databases.changed(self.path, old, now, change, new))

    def version_mark(self) -> object:
        mark = self._run(lambda ask: seen(ask, "change")[0] or seen(ask, "document")[0])
        return mark or databases.decoded(self.path, None)

    def _change(self, work: Callable[[str | None, int], tuple[T, str | None, bool]]) -> T:
        """Return the first of what ``work`` makes of the document and the clock, once the second is stored."""
        sent: list[Any] = []  # a script, while we do not know whether it was carried out
        made: dict[str, T] = {}

        def attempt(ask: Callable[..., Any]) -> T:
            replicas, is_first = self._replicas(ask), not sent
            if is_first:
                now, (old, before) = ask("TIME"), seen(ask, "document", "change")
                made["result"], document, is_aside = work(old, int(now[0]))
                if document is not None:
                    id_, aside = os.urandom(16).hex(), [f"gpu_resource:corrupt-{'.'.join(now)}"] * is_aside
                    keys = [POOL, f"gpu_resource:change:{id_}", *aside]
                    sent[:] = SCRIPT, len(keys), *keys, before or "", id_, document, KEPT_S
            try:
                is_made = not sent or ask("EVAL", *sent)
            except redis.ResponseError:  # refused
                sent[:] = [] if is_first else sent
                raise
            if not is_made:  # nor can it be any more: the change that it was to follow is no longer the last one
                sent.clear()
                raise redis.WatchError
            # WAIT is for what this connection has written, and a result may tell what no replica knows yet.
            if replicas and (ask("SET", f"{POOL}:seen", ""), ask("WAIT", replicas, WAIT_MS))[1] < replicas:
                raise redis.TimeoutError(say(databases.FEW_REPLICAS, replicas))
            for aside in sent[4:-4]:
                databases.warn_of_aside(aside)
            return made["result"]

        return self._run(attempt, sent)

    def _run(self, attempt: Callable[[Callable[..., Any]], T], sent: Sized = ()) -> T:
        """Return what ``attempt`` returns, on a new connection whenever it fails, until the time is over."""
        with failures_reported(self.path), databases.Countdown(self._limit_s) as time_left:
            while True:
                # No client, which would send a command again whose answer was lost, and find refused what it had made.
                connection = self._kind(**{**self._settings, "socket_timeout": max(time_left.left_s, LEAST_S)})
                try:
                    return attempt(lambda *words, it=connection: [it.send_command(*words), it.read_response()][1])
                except redis.WatchError:
                    if time_left.left_s <= 0:
                        raise databases.DatabaseBusyError(self.path, self._limit_s) from None
                    time.sleep(random.uniform(0, PAUSE_S))  # noqa: S311
                except redis.RedisError as error:
                    is_open = sent or re.match(TEMPORARY, f"{type(error).__name__} {error}")
                    if not is_open or not time_left.pause(error):
                        raise (databases.unconfirmed if sent else databases.redis_failed)(self.path, error) from None
                finally:
                    connection.disconnect()

    def _replicas(self, ask: Callable[..., Any]) -> int:
        """Return how many replicas must have a change; refuse a server that may lose one."""
        try:
            found = [" ".join(ask("CONFIG", "GET", line.split()[0])) for line in (*SAFE, "min-replicas-to-write")]
            risks = ", ".join(line or "?" for line, safe in zip(found, SAFE, strict=False) if line != safe)
        except redis.ResponseError as error:
            found, risks = [""], str(error)
        if risks and not self._is_unsafe:
            raise redis.DataError(say(databases.UNSAFE_REDIS, risks))
        return int(found[-1].rpartition(" ")[2] or 0)


def seen(ask: Callable[..., Any], *fields: str) -> Any:
    return ask("HMGET", POOL, *fields) if ask("TYPE", POOL) in ("hash", "none") else ["no hash"] * len(fields)
