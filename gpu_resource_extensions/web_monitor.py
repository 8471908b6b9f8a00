"""``gpu-resource-monitor``: a page about the pool that somebody leaves open on a wall, and the same facts for programs.

It only reads. One look at the pool, by one thread, serves everybody who asks meanwhile, so neither many viewers nor a
database that says nothing hold up the page; and a connection on which nothing moves is dropped. Needs ``starlette``,
``uvicorn`` and ``prometheus-client``.

Reads from the ground up: looking, what all viewers see, HTTP, the command.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import os
import re
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, NoReturn

import cli_v01
from gpu_resource_extensions import web_page
from gpu_resource_extensions.metrics import pool_label
from gpu_resource_extensions.web_page import LANGUAGES, SLOT_S, SLOTS, Seen
from gpu_resource_manager_v01 import (
    LANGUAGE_VARIABLE,
    GPUResourceManagerV01,
    MissingPackageError,
    ResourceManagerError,
    placed_tasks,
    printable,
    say,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    Scope = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
    Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
    App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOK_S = 0.5  # between two looks while somebody views the page
SAMPLE_S = 60.0  # between two values for the curve, and two looks while nobody does
LATE_S = 2.0  # after which a look takes long, and viewers are told
LOOK_LIMIT_S, SECOND_LIMIT_S = 10.0, 1.0  # for a look, as for ``--status``; to hear in another language why it failed
ALIVE_S = 10.0  # between two words to a viewer, who takes longer silence for a lost connection
PROMETHEUS_LIMIT_S, PROMETHEUS_MOST = 5.0, 1 << 20  # seconds for an answer, and its bytes
PATIENCE_S = 15.0  # how long a connection may take to ask, or to read
MOST_CONNECTIONS, MOST_AT_ONCE = 256, 128  # at once: that are taken ahead of dropping any; below the usual 1024 files
LOCAL_NAMES = "127.0.0.1", "localhost", "[::1]"
HEADERS = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src 'self'; script-src 'self';"
    " style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}

HELP = """\
使い方: {} [オプション]

プールの様子を表示するページ (読み取り専用)。/metrics、/api/status、/api/detail もある

オプション:
  --host ADDRESS                   待ち受けるアドレス (指定しなければ 127.0.0.1)
  --port PORT                      待ち受けるポート (指定しなければ 8765)
  --allowed-host NAME              ほかに許すホスト名。リバースプロキシの名前など (繰り返し可)
  --prometheus URL                 使用率の履歴を Prometheus から得る (なければ起動後のもの)
  -h, --help                       これを表示する
"""


class PackagesNeededError(MissingPackageError):
    """Asking: packages that only the page needs are missing."""

    template = (
        "ページに必要なパッケージを読み込めません: {reason}\n"
        "  対処: この Python ({python}) に pip install starlette uvicorn prometheus-client でインストールしてください"
    )


class AddressError(ResourceManagerError):
    """Asking: nobody can listen at this address."""

    template = (
        "{host} のポート {port} で待ち受けられません: {reason}\n"
        "  対処: --host と --port を確認し、使用中なら別のポートを指定してください"
    )

    def __init__(self, host: str, port: int, error: OSError) -> None:
        self.host, self.port = host, port
        # ``socket`` adds the address to the text; what it cannot resolve has negative numbers.
        self.reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)


class UsageError(ResourceManagerError):
    """Asking: a word of the command is of no use."""

    template = "引数が正しくありません: {problem}\n  対処: {remedy}"

    def __init__(self, problem: str) -> None:
        self.problem, self.remedy = problem, say("{} --help で使い方を確認してください", command())


# --- Looking --------------------------------------------------------------------------------------


class Turns:
    """Work that one thread does, a turn at a time; who asks for some while it waits shares that turn.

    So what is asked for begins after it is asked for, and however many ask, of each work at most one turn waits.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._turns: dict[str, Future[Any]] = {}

    def next(self, name: str, work: Callable[[], Any]) -> asyncio.Future[Any]:
        turn = self._turns.get(name)
        if turn is None or turn.running() or turn.done():
            turn = self._turns[name] = self._thread.submit(work)
        # Shielded, for it belongs to others too.
        return asyncio.shield(asyncio.wrap_future(turn))


def look() -> Seen:
    """Look at the pool; why it cannot be read is said in every language, for each viewer has one."""
    own, failure = own_language(), {}
    for language in sorted(LANGUAGES, key=lambda one: one != own):
        limit_s = LOOK_LIMIT_S if language == own else SECOND_LIMIT_S
        with speaking(language):
            try:
                manager = GPUResourceManagerV01(create=False, lock_timeout_s=limit_s)
                overview = cli_v01.status_facts(manager)
                return Seen(overview, ended_tasks(manager) if "ended_tasks" in overview else [], time.time())
            except ResourceManagerError as error:
                failure[language] = str(error)
            except Exception as error:  # whatever it is, the page stays
                failure[language] = f"{type(error).__name__}: {error}"
    return Seen(failure=failure)


def ended_tasks(manager: GPUResourceManagerV01) -> list[dict[str, Any]]:
    """Return the tasks that have ended and are not taken back, which an overview only names."""
    state = manager.get_detailed_status()
    return [
        {**task, "server_name": server["server_name"], "kind": "ended"}
        for server, task in placed_tasks(state)
        if task.get("ended") is True
    ]


def own_language() -> str:
    """Return the language of whoever started us."""
    return "en" if os.environ.get(LANGUAGE_VARIABLE) == "en" else "ja"


@contextmanager
def speaking(language: str) -> Iterator[None]:
    """Let the errors of the library be in this language, which they are from the moment that they are raised."""
    before = os.environ.get(LANGUAGE_VARIABLE)
    os.environ[LANGUAGE_VARIABLE] = language
    try:
        yield
    finally:
        if before is None:
            del os.environ[LANGUAGE_VARIABLE]
        else:
            os.environ[LANGUAGE_VARIABLE] = before


def past_of(prometheus: str, resource_file: str) -> list[float | None]:
    """Return the curve of the last day as Prometheus knows it from our metrics.

    :raises OSError: it does not answer.
    :raises ValueError: what it answers is no such curve.
    """
    pool = json.dumps(pool_label(resource_file))
    share = f"sum(gpu_resource_gpus_held{{pool={pool}}}) / sum(gpu_resource_gpus{{pool={pool}}})"
    first = int(time.time() // SLOT_S) - SLOTS + 1
    parameters = {
        "query": f"avg_over_time(({share})[{SLOT_S}s:15s])",
        "start": (first + 1) * SLOT_S,  # each value is that of the slot that ends then
        "end": (first + SLOTS) * SLOT_S,
        "step": SLOT_S,
    }
    address = f"{prometheus.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(address, timeout=PROMETHEUS_LIMIT_S) as answer:  # noqa: S310 - http, as was checked
            document = json.loads(answer.read(PROMETHEUS_MOST))
        curve: list[float | None] = [None] * SLOTS
        for at_s, value in [pair for series in document["data"]["result"] for pair in series["values"]]:
            if math.isfinite(float(value)):
                curve[int(at_s) // SLOT_S - 1 - first] = float(value)
        return curve
    except (HTTPException, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


# --- What all viewers see ------------------------------------------------------------------------


class Board:
    """The pool as all viewers see it, and its day."""

    def __init__(self, prometheus: str | None = None) -> None:
        self.seen, self.viewers, self.turns = Seen(), 0, Turns()
        self._prometheus, self._prometheus_turns, self._trouble = prometheus, Turns(), ""
        #: number of a slot, sum and count of its values
        self._slots: deque[tuple[int, float, int]] = deque(maxlen=SLOTS)
        self._curve: list[float | None] = [None] * SLOTS
        self._version, self._changed = 0, asyncio.Event()
        self._made: dict[str, tuple[object, str, bytes]] = {}  # by language: of what, ``main``, the event for viewers

    async def look(self) -> None:
        """Look anew; return when that is done, or takes long, which the page then says."""
        turn = self.turns.next("look", look)
        turn.add_done_callback(lambda done: self._note(done.result()))
        await asyncio.wait({turn}, timeout=LATE_S)
        if not turn.done():
            self._note(self.seen._replace(is_late=True))

    def _note(self, seen: Seen) -> None:
        if seen.overview is None:  # what could last be read stays
            seen = self.seen._replace(failure=seen.failure, is_late=False)
        if seen._replace(read_s=0) != self.seen._replace(read_s=0):
            self._change()
        self.seen = seen

    def _change(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def keep_looking(self) -> NoReturn:
        """Look as often as somebody wants to see it, and for the curve."""
        sample_s = 0.0
        while True:
            is_due = time.monotonic() >= sample_s
            if self.viewers or is_due:
                await self.look()
            if is_due:
                sample_s = time.monotonic() + SAMPLE_S
                self._sample()
            await asyncio.sleep(LOOK_S)

    def _sample(self) -> None:
        slot, overview = int(time.time() // SLOT_S), self.seen.overview
        if overview is not None and not self.seen.failure and not self.seen.is_late:
            total, count = self._slots.pop()[1:] if self._slots and self._slots[-1][0] == slot else (0.0, 0)
            self._slots.append((slot, total + web_page.share_in_use(overview), count + 1))
        known = {number: total / count for number, total, count in self._slots}
        own = [known.get(number) for number in range(slot - SLOTS + 1, slot + 1)]
        if self._prometheus and overview is not None:
            work = partial(past_of, self._prometheus, overview["resource_file"])
            self._prometheus_turns.next("past", work).add_done_callback(partial(self._draw_past, own))
        else:
            self._draw(own)

    def _draw_past(self, own: list[float | None], turn: asyncio.Future[list[float | None]]) -> None:
        try:
            curve, self._trouble = turn.result(), ""
        except (OSError, ValueError) as error:  # what we have seen ourselves is better than nothing
            curve, self._trouble = own, str(error)
        self._draw(curve)

    def _draw(self, curve: list[float | None]) -> None:
        self._curve = curve
        self._change()

    def page(self, language: str) -> str:
        return web_page.render_page(language, self._make(language)[1])

    def _make(self, language: str) -> tuple[object, str, bytes]:
        now_s = time.time()
        of = self._version, now_s // ALIVE_S  # for ages go on without a change
        if language not in self._made or self._made[language][0] != of:
            main = web_page.render_main(language, self.seen, self._curve, self._trouble, now_s)
            lines = "".join(f"data: {line}\n" for line in main.splitlines())
            self._made[language] = of, main, f"{lines}\n".encode("utf-8", "replace")
        return self._made[language]

    async def events(self, language: str) -> AsyncIterator[bytes]:
        """Yield each new version as an event, and signs of life between; a slow viewer misses some."""
        self.viewers += 1
        try:
            sent = b""
            while True:
                changed, event = self._changed, self._make(language)[2]
                yield event if event != sent else b"event: alive\ndata: -\n\n"
                sent = event
                try:
                    await asyncio.wait_for(changed.wait(), ALIVE_S)
                except asyncio.TimeoutError:
                    continue
        finally:
            self.viewers -= 1


# --- HTTP -----------------------------------------------------------------------------------------


def application(board: Board, allowed_hosts: Sequence[str] = ()) -> App:
    """Return the page and its documents as an ASGI application."""
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route

    from gpu_resource_extensions import metrics

    own, metrics_turns = own_language(), Turns()
    refused = say("このホスト名では見られません (起動時に --allowed-host で指定します)")

    def language(request: Request) -> str:
        accepted = request.headers.get("accept-language", "")
        return web_page.language_of(request.query_params.get("lang"), accepted, own)

    async def page(request: Request) -> Response:
        await board.look()
        return Response(board.page(language(request)), media_type="text/html", headers={"vary": "accept-language"})

    async def events(request: Request) -> Response:
        # For nginx, which would else keep an event until it has more.
        kind: Any = {"media_type": "text/event-stream", "headers": {"x-accel-buffering": "no"}}
        if request.method == "HEAD":
            return Response(**kind)
        await board.look()
        return StreamingResponse(board.events(language(request)), **kind)

    def constant(content: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return Response(content, media_type=media_type)

        return answer

    def document(command: str) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            code, text = await board.turns.next(command, lambda: cli_v01.answer([command, "--json"], None))
            return Response(f"{text}\n", 200 if code == cli_v01.EXIT_OK else 503, media_type="application/json")

        return answer

    async def show_metrics(request: Request) -> Response:
        return Response(
            await metrics_turns.next("metrics", metrics.metrics_text), headers={"content-type": metrics.CONTENT_TYPE}
        )

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(board.keep_looking())
        yield
        task.cancel()

    routes = {
        "/": page,
        "/events": events,
        "/page.css": constant(web_page.STYLE, "text/css"),
        "/page.js": constant(web_page.SCRIPT, "text/javascript"),
        "/icon.svg": constant(web_page.ICON, "image/svg+xml"),
        "/api/status": document("--status"),
        "/api/detail": document("--detail"),
        "/metrics": show_metrics,
    }
    inner = Starlette(routes=[Route(path, endpoint) for path, endpoint in routes.items()], lifespan=lifespan)
    inner.router.redirect_slashes = False
    hosts = {*LOCAL_NAMES, *allowed_hosts}

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse what writes and what comes under a foreign name; say in each answer what a browser may do with it."""
        if scope["type"] != "http":
            await inner(scope, receive, send)
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        names = [
            re.sub(r":\d*$", "", value.decode("latin-1")).lower() for key, value in scope["headers"] if key == b"host"
        ]
        app: App = inner
        if len(names) != 1 or names[0] not in hosts:  # a page from elsewhere may have had our address given to its name
            app = PlainTextResponse(refused, 400)
        elif scope["method"] not in ("GET", "HEAD"):
            app = PlainTextResponse("read-only", 405, headers={"allow": "GET, HEAD"})
        await app(scope, receive, send_with_headers)

    return guarded


def serve(app: App, listener: socket.socket) -> NoReturn:
    """Answer at this socket until a signal ends us."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Connection(H11Protocol):
        """A connection that is dropped when nothing moves on it: its request, or what it is to read."""

        every: dict[Connection, None] = {}  # noqa: RUF012 - of the class: all there are, the oldest first

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._cycle_before: object = None
            self._unread_since_s = math.inf
            self._check = self.loop.call_later(PATIENCE_S, self._drop_if_stuck)
            if len(self.every) >= MOST_CONNECTIONS:
                dropped = next((other for other in self.every if other.is_idle()), next(iter(self.every)))
                del self.every[dropped]  # now, for it is told only after others that have come at the same time
                dropped.transport.abort()
            self.every[self] = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._check.cancel()
            self.every.pop(self, None)
            super().connection_lost(exc)

        def is_idle(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def pause_writing(self) -> None:
            self._unread_since_s = self.loop.time()
            super().pause_writing()

        def resume_writing(self) -> None:
            self._unread_since_s = math.inf
            super().resume_writing()

        def _drop_if_stuck(self) -> None:
            has_not_asked = self.is_idle() and self.cycle is self._cycle_before
            if has_not_asked or self.loop.time() - self._unread_since_s > PATIENCE_S:
                self.transport.abort()
            self._cycle_before = self.cycle
            self._check = self.loop.call_later(PATIENCE_S, self._drop_if_stuck)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: object) -> None:
            # At once, whoever is connected and whatever a look waits for: there is nothing to save.
            os._exit(cli_v01.EXIT_OK)

    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        backlog=MOST_AT_ONCE,
        proxy_headers=False,
        server_header=False,
    )
    Server(config).run(sockets=[listener])
    raise SystemExit(cli_v01.EXIT_IO)


# --- The command ----------------------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """:raises AddressError: nobody can listen there."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        raise AddressError(host, port, error if isinstance(error, OSError) else OSError(str(error))) from error


def command() -> str:
    name = os.path.basename(sys.argv[0])
    return "python -m gpu_resource_extensions.web_monitor" if name.endswith(".py") else name


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """:raises UsageError: they are of no use."""

    def refuse(message: str) -> NoReturn:
        raise UsageError(printable(message))

    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.error = refuse  # type: ignore[method-assign]
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", default="8765")
    parser.add_argument("--allowed-host", action="append", default=[])
    parser.add_argument("--prometheus")
    args = parser.parse_args(words)
    if not cli_v01.is_number(args.port) or int(args.port) > 65535:
        refuse(say("--port が 0-65535 の整数ではありません: {!r}", args.port))
    args.allowed_host = [name.lower() for name in args.allowed_host]
    for name in args.allowed_host:
        if not re.fullmatch(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]", name):
            refuse(say("--allowed-host がホスト名ではありません (ポート番号は付けません): {!r}", name))
    if args.prometheus is not None and not re.match(r"https?://[^/]", args.prometheus):
        refuse(say("--prometheus が http:// か https:// で始まる URL ではありません: {!r}", args.prometheus))
    language = os.environ.get(LANGUAGE_VARIABLE)
    if language not in (None, "", *LANGUAGES):
        refuse(say("GPU_RESOURCE_LANG の言語はありません: {!r}", language))
    return args


def main(words: Sequence[str]) -> int:
    """Serve the page until a signal ends us, or return the exit code of what went wrong."""
    try:
        args = parsed(words)
        if args.help:
            cli_v01.show(say(HELP, command()).rstrip())
            return cli_v01.EXIT_OK
        try:
            import prometheus_client  # noqa: F401 - known ahead of the first request
            import starlette  # noqa: F401
            import uvicorn  # noqa: F401
        except ImportError as error:
            raise PackagesNeededError(error) from error
        listener = listen(args.host, int(args.port))
        host, port = listener.getsockname()[:2]
        cli_v01.show(say("ページ: {} (Ctrl-C で終了)", f"http://{f'[{host}]' if ':' in host else host}:{port}/"))
        serve(application(Board(args.prometheus), args.allowed_host), listener)
    except ResourceManagerError as error:
        cli_v01.show_error(f"✗ {error}")
        return cli_v01.EXIT_IO if isinstance(error, AddressError) else cli_v01.EXIT_USAGE


def run() -> NoReturn:
    """Be the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a legacy encoding may lack ✗
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # ahead of the server
        sys.exit(cli_v01.EXIT_INTERRUPTED)


if __name__ == "__main__":
    run()
