"""``gpu-resource-monitor`` without a browser: what it answers, what it refuses, and that nobody holds it up."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import GUARD_S, PROJECT, needed
from database_servers import free_port, fresh_database, wait_until
from monitors import COMMAND, HOSTILE, Monitor, disable, end, made_state, skip_without_packages, write
from prometheus_servers import Prometheus
from screens import cli
from test_readme import ENGLISH, JAPANESE, Page

from gpu_resource_extensions.web_page import language_of
from gpu_resource_manager_v01 import GPUResourceManagerV01

skip_without_packages()
pytestmark = pytest.mark.services

GET = "GET {} HTTP/1.1\nHost: localhost\n\n"
REFUSED_METHODS = "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "get"
PATHS = "/", "/events", "/page.css", "/page.js", "/icon.svg", "/api/status", "/api/detail", "/metrics"


@pytest.fixture
def monitor(pool: Path) -> Iterator[Monitor]:
    write(pool, made_state(tasks=["first", "second"], waiting=["patient"]))
    with Monitor(pool) as monitor:
        yield monitor
        assert monitor.process.poll() is None
    assert monitor.stop() == ""  # it complains about nothing


def rows(page: str, part: str) -> list[list[str]]:
    """Return the cells of each row of a table of the page, as text without marks."""
    section = re.search(f'<section id="{part}".*?</section>', page, re.DOTALL)
    assert section, page
    found = re.findall("<tr.*?</tr>", section[0], re.DOTALL)
    return [[re.sub("<.*?>", " ", cell).strip() for cell in re.findall("<t[hd].*?</t[hd]>", row)] for row in found[1:]]


def cells(page: str) -> list[tuple[str, str]]:
    """Return state and text of each GPU of the page."""
    found = re.findall(r'<li class="([a-z ]+)"[^>]*><b>(\d+)</b>(.*?)</li>', page)
    return [(state, re.sub("<.*?>", " ", f"{gpu} {rest}").strip()) for state, gpu, rest in found]


def banner(page: str) -> str:
    found = re.search('<div id="banner".*?>(.*?)</div>', page, re.DOTALL)
    assert found
    return re.sub("<.*?>", "\n", found[1])


# --- The documents for programs -------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "detail"])
def test_documents_are_those_of_the_command(pool: Path, monitor: Monitor, command: str) -> None:
    answer = monitor.get(f"/api/{command}")
    assert (answer.status, answer.headers.get_content_type()) == (200, "application/json")
    expected = cli(f"--{command}", "--json", env={"GPU_RESOURCE_FILE": str(pool)})
    assert answer.text == expected.out and json.loads(answer.text)["ok"] is True


@pytest.mark.parametrize("command", ["status", "detail"])
@pytest.mark.parametrize("language", ["ja", "en"])
def test_of_a_pool_that_cannot_be_read_the_documents_are_those_of_the_command(
    pool: Path, command: str, language: str
) -> None:
    variables = {"GPU_RESOURCE_FILE": str(pool), "GPU_RESOURCE_LANG": language}
    with Monitor(pool, language=language) as monitor:
        for damage in (lambda: None, lambda: pool.write_text('{"version": "0.1"}')):
            damage()
            answer = monitor.get(f"/api/{command}")
            expected = cli(f"--{command}", "--json", env=variables)
            assert (answer.status, answer.text) == (503, expected.out)
            assert json.loads(answer.text)["error"]["code"] in ("no_pool", "state_file")


def test_metrics_are_of_the_pool_as_it_is_now(pool: Path, monitor: Monitor) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    def held() -> float:
        answer = monitor.get("/metrics")
        assert (answer.status, answer.headers.get_content_type()) == (200, "text/plain")
        samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
        return sum(sample.value for sample in samples if sample.name == "gpu_resource_gpus_held")

    assert held() == 4
    write(pool, made_state(tasks=["first"]))
    assert held() == 2
    pool.unlink()
    answer = monitor.get("/metrics")
    assert answer.status == 200 and re.search(r"^gpu_resource_pool_readable\{.*\} 0", answer.text, re.MULTILINE)


# --- The page -------------------------------------------------------------------------------------


def test_page_without_scripts_is_tables_of_servers_line_and_tasks(pool: Path, monitor: Monitor) -> None:
    page = monitor.get("/?lang=en").text
    assert [row[0] for row in rows(page, "servers")] == ["node000", "node001", "node002", "node003"]
    assert rows(page, "line") == [["1", "patient", "dora", "8", "64", "2 h"]]
    assert rows(page, "tasks") == [
        ["first", "alice", "node000", "0-1", "4", "&lt; 1 min", "reservation"],
        ["second", "bob", "node000", "2-3", "4", "7 min", "job"],
    ]
    assert f'content="{30}"' in page and "http-equiv" in page  # it is loaded anew by itself


def test_each_gpu_is_a_cell_with_who_holds_it(pool: Path, monitor: Monitor) -> None:
    state = made_state(1, tasks=["lives", "is-over"])
    end(state, "is-over")
    disable(state, 0, [0, 5, 6], "fan <broken>")
    write(pool, state)
    page = monitor.get("/?lang=en").text
    assert cells(page) == [
        ("held off", "0  alice  off"),
        ("held", "1  alice"),
        ("ended", "2  bob  ended"),
        ("ended", "3  bob  ended"),
        ("free", "4  free"),
        ("off", "5  off"),
        ("off", "6  off"),
        ("free", "7  free"),
    ]
    assert "Out of service: GPU 0,5-6 ( fan &lt;broken&gt; )" in rows(page, "servers")[0][-1]
    assert [row[0] for row in rows(page, "tasks")] == ["lives", "is-over"]
    assert rows(page, "tasks")[1][-1] == "ended"


def test_texts_of_others_are_text(pool: Path, monitor: Monitor) -> None:
    state = made_state(tasks=HOSTILE, waiting=[f"{name[:100]}-waits" for name in HOSTILE])
    for server in state["servers"]:
        for task in server["running_tasks"]:
            task["user"] = "<b>\u202e\nuser"
            task["host"] = ["no", "text"]  # type: ignore[typeddict-item]
    write(pool, state)
    page = monitor.get("/").text
    body = page.partition("<main")[2]
    for mark in ("<script", "<img", "<h1", "<b>\u202e", "\u202e", "</main><"):
        assert mark not in body
    assert page.count("</main>") == 1
    with monitor.events() as events:
        kind, data = next(events)
    assert kind == "message" and data == re.search("<main.*</main>", page, re.DOTALL)[0]  # type: ignore[index]


def test_language_is_that_of_the_viewer(monitor: Monitor) -> None:
    for accepted, language in (("en-GB,ja;q=0.5", "en"), ("en;q=0.4, ja;q=0.8", "ja"), ("fr", "ja"), ("", "ja")):
        page = monitor.get("/", Accept_Language=accepted).text
        assert f'<html lang="{language}">' in page, accepted
        assert ("GPUs free" if language == "en" else "空き GPU") in page
    assert '<html lang="ja">' in monitor.get("/?lang=ja", Accept_Language="en").text
    assert '<html lang="en">' in monitor.get("/?lang=xx", Accept_Language="en").text


@pytest.mark.parametrize("accepted", ["en;q=nan", ";q=1", "en;q=-1", "en;q=0", ",,", "*", "en;q=1;q=1", "é"])
def test_what_a_browser_says_of_languages_may_be_nonsense(accepted: str) -> None:
    assert language_of(None, accepted, "ja") == "ja"


@pytest.mark.parametrize("language", ["ja", "en"])
def test_pool_that_cannot_be_read_is_a_banner_and_recovers(pool: Path, monitor: Monitor, language: str) -> None:
    sound = pool.read_bytes()
    aside, shown = pool.with_suffix(".aside"), f"/?lang={language}"
    reason, stood = ("原因: ", "表示しているのは") if language == "ja" else ("Reason: ", "This is how things stood at")

    def damage() -> None:
        pool.write_bytes(sound[:100])

    def turn_into_directory() -> None:
        pool.unlink()
        pool.mkdir()

    assert banner(monitor.get(shown).text) == ""
    for trouble in (lambda: pool.rename(aside), damage, turn_into_directory):
        trouble()
        answer = monitor.get(shown)
        assert answer.status == 200
        assert reason in banner(answer.text) and str(pool) in banner(answer.text)
        assert stood in banner(answer.text)
        assert [row[1] for row in rows(answer.text, "line")] == ["patient"]  # as it was
        if pool.is_dir():
            pool.rmdir()
        pool.write_bytes(sound)
        assert banner(monitor.get(shown).text) == ""


def test_pool_may_be_made_after_the_monitor_was_started(pool: Path) -> None:
    with Monitor(pool) as monitor:
        assert "--init" in banner(monitor.get("/?lang=ja").text)
        GPUResourceManagerV01(pool, servers=[("late", 2, 8)])
        assert [row[0] for row in rows(monitor.get("/").text, "servers")] == ["late"]


def test_changes_come_by_themselves_in_the_language_of_the_viewer(pool: Path, monitor: Monitor) -> None:
    with monitor.events("/events?lang=en") as english, monitor.events("/events?lang=ja") as japanese:
        assert "first" in next(english)[1] and "first" in next(japanese)[1]
        GPUResourceManagerV01(pool).allocate_resources("newcomer", 2, 8)
        for events, word in ((english, "GPUs free"), (japanese, "空き GPU")):
            assert any("newcomer" in data and word in data for _, data in events)
        pool.unlink()
        for events, word in ((english, "There is no pool"), (japanese, "プールがありません")):
            assert any(word in data for _, data in events)


def test_viewers_hear_from_it_while_nothing_changes(pool: Path) -> None:
    write(pool, made_state())
    with Monitor(pool, setting="web_monitor.ALIVE_S = 0.2") as monitor, monitor.events() as events:
        assert next(kind for kind, _ in events if kind != "message") == "alive"


def test_a_job_that_ends_is_seen_without_a_change_of_the_pool(made_pool: Path) -> None:
    script = "import sys; from gpu_resource_manager_v01 import GPUResourceManagerV01\n"
    script += "with GPUResourceManagerV01().allocation('mortal', 2, 8):\n print(flush=True); sys.stdin.read()"
    job = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=PROJECT,
        env={**os.environ, "GPU_RESOURCE_SERVER": "gpu-server-2"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with job, Monitor(made_pool) as monitor, monitor.events("/events?lang=en") as events:
        assert job.stdout and job.stdin
        job.stdout.readline()
        assert any((state, text[:1]) == ("held", "0") for _, data in events for state, text in cells(data))
        document = made_pool.read_bytes()
        job.kill()
        assert any(state == "ended" for _, data in events for state, _ in cells(data))
        assert made_pool.read_bytes() == document


# --- What it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PATHS, "/nothing", "/api", "//"])
def test_everything_that_could_write_is_refused(pool: Path, monitor: Monitor, path: str) -> None:
    before = pool.read_bytes()
    for method in REFUSED_METHODS:
        answer = monitor.get(path, method, "task_id=first")
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD"), method
    with monitor.connect(f"CONNECT {path} HTTP/1.1\nHost: localhost\n\n") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 405")
    assert pool.read_bytes() == before and os.listdir(pool.parent) == [pool.name]


@pytest.mark.parametrize("path", PATHS)
def test_head_is_get_without_the_content(monitor: Monitor, path: str) -> None:
    answer = monitor.get(path, "HEAD")
    assert (answer.status, answer.text) == (200, "")


@pytest.mark.parametrize("path", [*PATHS, "/nothing"])
def test_foreign_host_is_refused_and_local_ones_are_not(monitor: Monitor, path: str) -> None:
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "127.0.0.2",
        "0.0.0.0",
        "localhost:x",
    ):
        answer = monitor.get(path, "HEAD", Host=host)
        assert answer.status == 400, host
    for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1", f"127.0.0.1:{monitor.port}", "[::1]", "[::1]:8765"):
        assert monitor.get(path, "HEAD", Host=host).status == (404 if path == "/nothing" else 200), host


def test_answer_needs_one_host(monitor: Monitor) -> None:
    for text in (
        "GET / HTTP/1.0\n\n",
        "GET / HTTP/1.1\nHost: localhost\nHost: evil.example\n\n",
        "GET / HTTP/1.1\nHost:\n\n",
    ):
        with monitor.connect(text) as connection:
            assert connection.recv(1000).startswith(b"HTTP/1.1 400"), text


def test_further_hosts_are_those_that_were_named(made_pool: Path) -> None:
    with Monitor(made_pool, "--allowed-host", "Wall.Example", "--allowed-host", "[2001:db8::1]") as monitor:
        for host, status in (
            ("wall.example", 200),
            ("WALL.example:443", 200),
            ("[2001:db8::1]:80", 200),
            ("example", 400),
        ):
            assert monitor.get("/", Host=host).status == status, host
        assert monitor.get("/").status == 200


@pytest.mark.parametrize(
    ("path", "method", "host"),
    [
        *((path, "HEAD", "localhost") for path in [*PATHS, "/nothing"]),
        ("/", "GET", "localhost"),
        ("/", "POST", "localhost"),
        ("/", "GET", "evil.example"),
    ],
)
def test_every_answer_says_what_a_browser_may_do_with_it(monitor: Monitor, path: str, method: str, host: str) -> None:
    headers = monitor.get(path, method, Host=host).headers
    policy = dict(part.split(maxsplit=1) for part in headers["content-security-policy"].split("; "))
    assert policy.pop("default-src") == policy.pop("frame-ancestors") == "'none'"
    assert policy.pop("base-uri") == policy.pop("form-action") == "'none'"
    assert {*policy.values()} == {"'self'"}
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store" and "server" not in headers


def test_page_brings_all_it_needs_and_nothing_inline(monitor: Monitor) -> None:
    page = monitor.get("/").text
    assert not re.search(r"<style|<script[^>]*>[^<]|\son\w+=|\sstyle=|javascript:", page)
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(links) == 4
    for link in links:
        assert not urllib.parse.urlsplit(link).netloc and not link.startswith("/")  # whatever path a proxy gives it
        assert monitor.get(f"/{link}").status == 200


# --- Nobody holds it up ---------------------------------------------------------------------------


def test_it_answers_while_many_are_slow_to_ask(pool: Path) -> None:
    write(pool, made_state())
    few_files = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (700, 700))"
    with Monitor(pool, setting=few_files) as monitor, ExitStack() as slow:
        for number in range(1000):
            connection = slow.enter_context(monitor.connect("GET / HTTP/1.1\nHost: localhost\n"))
            if number % 2:
                connection.sendall(b"X-Slow: ")
        assert monitor.get("/").status == 200
        viewer = slow.enter_context(monitor.events())
        assert next(viewer)[0] == "message"
        assert monitor.stop() == ""


def test_it_answers_while_many_view_and_never_read(pool: Path) -> None:
    with Monitor(pool) as monitor, ExitStack() as slow:
        write(pool, made_state(100))
        for _ in range(300):
            slow.enter_context(monitor.connect(GET.format("/events"), receive_bytes=2048))
        with monitor.events() as viewer:
            for number in range(10):
                write(pool, made_state(100, tasks=[f"task-{number}"]))
                assert any(f"task-{number}" in data for _, data in viewer)
                assert monitor.get("/api/status").status == 200
        assert peak_bytes(monitor.process.pid) < 200 << 20


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10  # type: ignore[index]


def ends(connection: socket.socket) -> bool:
    """Read until the other end has closed or broken the connection."""
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


def test_who_is_too_slow_is_dropped_and_who_is_not_stays(pool: Path) -> None:
    write(pool, made_state(100))
    body = "Content-Length: 1000000\n\nbody that never "
    with Monitor(pool, setting="web_monitor.PATIENCE_S = 0.5") as monitor, monitor.events() as viewer:
        next(viewer)
        for slow in (
            "",
            "GET / HT",
            "GET / HTTP/1.1\nHost: localhost\nX-Slow: ",
            f"POST / HTTP/1.1\nHost: localhost\n{body}",
        ):
            with monitor.connect(slow) as connection:
                assert ends(connection), slow
        with monitor.connect(GET.format("/") * 400, receive_bytes=2048) as connection:
            # Nothing is read until the other end has gone, with most of the answers never sent.
            wait_until(lambda: is_open_at_other_end(monitor, connection), "it takes the connection")
            wait_until(lambda: not is_open_at_other_end(monitor, connection), "it drops who reads nothing")
        write(pool, made_state(100, tasks=["news"]))
        assert any("news" in data for _, data in viewer)


def is_open_at_other_end(monitor: Monitor, connection: socket.socket) -> bool:
    """Tell whether the monitor still has its socket of this connection."""
    port = connection.getsockname()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, remote, state = line.split()[1:4]
        if int(local[-4:], 16) == monitor.port and int(remote[-4:], 16) == port:
            return state == "01" and line.split()[9] != "0"
    return False


@contextmanager
def silent_database() -> Iterator[tuple[str, socket.socket]]:
    """Yield the URL of a database that lets itself be connected to, and then says nothing; and its socket."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        yield f"redis://127.0.0.1:{silent.getsockname()[1]}/0", silent


def test_it_answers_while_a_database_says_nothing(pool: Path) -> None:
    needed("redis")
    setting = "web_monitor.LOOK_LIMIT_S = 3"
    with silent_database() as (url, _), Monitor(url, setting=setting) as monitor, ExitStack() as viewers:
        assert "応答を待っています" in banner(monitor.get("/?lang=ja").text)
        threads = len(os.listdir(f"/proc/{monitor.process.pid}/task"))
        events = [viewers.enter_context(monitor.events("/events?lang=en")) for _ in range(5)]
        for _ in range(2):
            assert monitor.get("/page.css").status == monitor.get("/").status == 200
        asked = [viewers.enter_context(monitor.connect(GET.format("/api/status"))) for _ in range(10)]
        assert len(os.listdir(f"/proc/{monitor.process.pid}/task")) <= threads + 2  # of a look, of its time limit
        for viewer in events:
            assert any("Error of the state file" in data for _, data in viewer)
        for connection in asked:
            assert connection.recv(1000).startswith(b"HTTP/1.1 503")


def test_it_shows_a_pool_in_a_database_and_that_it_is_gone(pool: Path) -> None:
    with fresh_database() as url:
        GPUResourceManagerV01(url, servers=[("far", 4, 16)]).allocate_resources("remote", 1, 1)
        with Monitor(url) as monitor:
            assert [row[0] for row in rows(monitor.get("/").text, "tasks")] == ["remote"]


# --- Its end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_viewers_and_slow_ones_connected(pool: Path, number: int) -> None:
    write(pool, made_state(100))
    with ExitStack() as connected:
        monitor = Monitor(pool)
        for _ in range(20):
            next(connected.enter_context(monitor.events()))
            connected.enter_context(monitor.connect("GET / HT"))
            connected.enter_context(monitor.connect(GET.format("/events"), receive_bytes=2048))
        assert monitor.stop(number) == ""
        assert monitor.process.returncode == 0


def test_it_ends_while_a_look_waits_for_a_database() -> None:
    needed("redis")
    with silent_database() as (url, silent):
        monitor = Monitor(url)
        silent.accept()[0].close()
        assert monitor.stop() == "" and monitor.process.returncode == 0


# --- The command ----------------------------------------------------------------------------------


def refused(*options: str, **environment: str) -> tuple[int, str]:
    """Return exit code and stderr of a command that is to end by itself."""
    result = subprocess.run(
        [*COMMAND, *options],
        cwd=PROJECT,
        env={**os.environ, "GPU_RESOURCE_LANG": "en", **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=GUARD_S,
        check=False,
    )
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--port", "many"],
        ["--port", "65536"],
        ["--port", "-1"],
        ["--port"],
        ["--allowed-host", "wall.example:443"],
        ["--allowed-host", "https://wall.example"],
        ["--allowed-host", "*"],
        ["--prometheus", "localhost:9090"],
        ["--prometheus", "file:///etc/passwd"],
        ["--prom", "http://localhost"],
        ["--nothing\x1b[2J"],
        ["word"],
    ],
)
def test_wrong_usage_is_said_with_what_to_do(words: list[str]) -> None:
    code, text = refused(*words)
    assert code == 2 and re.fullmatch(r"✗ Wrong usage: .+\n  What to do: see .+ --help\n", text), text
    assert "\x1b" not in text


def test_language_that_there_is_not_is_wrong_usage() -> None:
    code, text = refused(GPU_RESOURCE_LANG="fr")
    assert code == 2 and "GPU_RESOURCE_LANG" in text and len(text.splitlines()) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid", "192.0.2.1", ""])
def test_address_that_cannot_be_had_is_said(made_pool: Path, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, text = refused("--host", host or "x" * 80, "--port", str(taken.getsockname()[1]))
    assert code == 74 and text.startswith("✗ Nobody can listen on port") and len(text.splitlines()) == 2, text


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "prometheus_client"])
def test_missing_package_is_said_with_how_to_install_it(package: str) -> None:
    lines = f"import sys; sys.modules[{package!r}] = None\n"
    lines += "from gpu_resource_extensions import web_monitor; web_monitor.run()"
    result = subprocess.run(
        [sys.executable, "-c", lines], cwd=PROJECT, capture_output=True, encoding="utf-8", timeout=GUARD_S, check=False
    )
    assert result.returncode == 2 and package in result.stderr
    assert "pip install starlette uvicorn prometheus-client" in result.stderr and "Traceback" not in result.stderr


def test_help_names_every_option() -> None:
    result = subprocess.run([*COMMAND, "--help"], cwd=PROJECT, capture_output=True, encoding="utf-8", check=True)
    for option in ("--host", "--port", "--allowed-host", "--prometheus"):
        assert option in result.stdout


def test_it_listens_where_it_is_told(made_pool: Path) -> None:
    for host, shown in (("::1", "[::1]"), ("localhost", None), ("0.0.0.0", "0.0.0.0")):
        with Monitor(made_pool, "--host", host) as monitor:
            assert shown is None or f"//{shown}:" in monitor.url
            with urllib.request.urlopen(monitor.url.replace("0.0.0.0", "127.0.0.1"), timeout=GUARD_S) as answer:
                assert answer.status == 200


# --- The day --------------------------------------------------------------------------------------


def day(page: str) -> str:
    found = re.search("<figcaption>.*?</figcaption>", page, re.DOTALL)
    assert found
    return re.sub("<.*?>", "", found[0])


def test_curve_holds_what_was_seen_since_the_start(pool: Path) -> None:
    write(pool, made_state(1, tasks=["a", "b", "c", "d"]))
    with Monitor(pool, setting="web_monitor.SAMPLE_S = 0.1") as monitor:
        wait_until(lambda: "<polyline" in monitor.get("/").text, "there is a curve")
        assert "100% now, 100% mean" in day(monitor.get("/?lang=en").text)
        write(pool, made_state(1))
        wait_until(lambda: "0% now, 100%" not in day(monitor.get("/?lang=en").text), "the mean sinks")
        assert "0% now" in day(monitor.get("/?lang=en").text)


def test_prometheus_that_is_not_there_is_said_below_the_own_curve(pool: Path) -> None:
    write(pool, made_state(1, tasks=["a", "b"]))
    with Monitor(pool, "--prometheus", f"http://127.0.0.1:{free_port()}") as monitor:
        wait_until(lambda: "not to be had from Prometheus" in day(monitor.get("/?lang=en").text), "it says so")
        assert "50% now, 50% mean" in day(monitor.get("/?lang=en").text)


def test_prometheus_knows_what_was_ahead_of_the_start(pool: Path, tmp_path: Path) -> None:
    write(pool, made_state(1, tasks=["a", "b"]))
    with Monitor(pool) as scraped, Prometheus(tmp_path, [scraped.port]) as prometheus:
        options = "--prometheus", f"http://{prometheus.address}"
        with Monitor(pool, *options, setting="web_monitor.SAMPLE_S = 0.2") as monitor:
            wait_until(lambda: "<polyline" in monitor.get("/").text, "Prometheus knows a part of the day")
            scraped.stop()
            write(pool, made_state(1))
        # A monitor that has never seen a task, and whose Prometheus has.
        with Monitor(pool, *options, setting="web_monitor.SAMPLE_S = 0.2") as later:
            wait_until(lambda: day(later.get("/?lang=en").text).endswith("0% now, 50% mean"), "the past is shown")


# --- The recipes of the README --------------------------------------------------------------------


@pytest.fixture(params=[JAPANESE, ENGLISH], ids=["ja", "en"])
def recipe(request: pytest.FixtureRequest) -> Page:
    chosen: Page = request.param
    return chosen


def run_recipe(text: str, directory: Path, places: dict[str, str], stand_ins: Iterable[str]) -> None:
    """Run a block with other places, and with commands that do nothing in place of some."""
    for place, ours in places.items():
        text = text.replace(place, ours)
    (directory / "bin").mkdir()
    for name in stand_ins:
        (directory / "bin" / name).write_text("#!/bin/sh\n")
        (directory / "bin" / name).chmod(0o755)
    path = f"{directory}/bin:{os.environ['PATH']}:/usr/sbin"
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], check=True, env={**os.environ, "PATH": path}, capture_output=True
    )


def test_nginx_of_the_readme_wants_tls_and_a_login_and_lets_events_through(
    pool: Path, tmp_path: Path, recipe: Page
) -> None:
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if not nginx or os.geteuid() != 0:
        pytest.skip("nginx is not installed, or we are not root")
    (block,) = recipe.marked("monitor_nginx")
    (below_a_path,) = re.findall("`(location .*})`", recipe.text)
    block = block.replace("    location / {", f"    {below_a_path}\n    location / {{")
    etc, port = tmp_path / "etc", free_port()
    (etc / "conf.d").mkdir(parents=True)
    write(pool, made_state(tasks=["old"]))
    with Monitor(pool) as monitor:
        places = {"/etc/nginx": str(etc), "listen 443": f"listen 127.0.0.1:{port}", ":8765": f":{monitor.port}"}
        run_recipe(block, tmp_path, places, ["apt-get", "systemctl", "nginx"])
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; user root; pid {tmp_path}/pid; error_log {tmp_path}/error;\nevents {{}}\n"
            f"http {{ access_log off; include {etc}/conf.d/*.conf; }}\n"
        )
        server = subprocess.Popen(
            [nginx, "-p", str(tmp_path), "-e", f"{tmp_path}/error", "-c", f"{tmp_path}/nginx.conf"]
        )
        try:
            wait_until(lambda: listens(port), "nginx listens")
            tls = ssl.create_default_context(cafile=etc / "gpu-monitor.crt")
            login = "Basic " + b64encode(b"lab:choose-one").decode()

            def ask(path: str, **headers: str) -> http.client.HTTPResponse:
                connection = http.client.HTTPSConnection("gpu.example.org", port, context=tls, timeout=GUARD_S)
                plain = socket.create_connection(("127.0.0.1", port), GUARD_S)
                connection.sock = tls.wrap_socket(plain, server_hostname="gpu.example.org")
                connection.request("GET", path, headers=headers)
                return connection.getresponse()

            assert ask("/").status == ask("/api/status").status == 401
            assert ask("/", Authorization="Basic bGFiOm5v").status == 401
            page = ask("/", Authorization=login)
            assert page.status == 200 and "old" in page.read().decode()
            assert page.headers["content-security-policy"]
            for link in re.findall(r'(?:src|href)="([^"]*)"', ask("/gpu/", Authorization=login).read().decode()):
                assert ask(f"/gpu/{link}", Authorization=login).status == 200
            events = ask("/gpu/events", Authorization=login)
            assert events.status == 200
            assert any(b"old" in line for line in iter(events.readline, b""))
            GPUResourceManagerV01(pool).allocate_resources("newcomer", 2, 8)
            assert any(b"newcomer" in line for line in iter(events.readline, b""))
        finally:
            server.terminate()
            server.wait(GUARD_S)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_unit_of_the_readme_is_one_that_systemd_takes(tmp_path: Path, recipe: Page) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    (block,) = recipe.marked("monitor_install")
    units = tmp_path / "units"
    units.mkdir()
    (tmp_path / "gpu-resource-monitor").write_text("#!/bin/sh\n")
    (tmp_path / "gpu-resource-monitor").chmod(0o755)
    places = {"/etc/systemd/system": str(units), "/usr/local/bin/gpu": f"{tmp_path}/gpu", "gpu-users": "users"}
    run_recipe(block, tmp_path, places, ["pipx", "systemctl"])
    words = ["systemd-analyze", "verify", str(units / "gpu-resource-monitor.service")]
    checked = subprocess.run(words, capture_output=True, encoding="utf-8", check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
