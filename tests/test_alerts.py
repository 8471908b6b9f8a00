"""The alerts come when they should, say what to do, and end by it; the dashboard shows what Prometheus knows."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from conftest import PROJECT, needed
from database_servers import free_port, wait_until
from monitors import Monitor, skip_without_packages
from prometheus_servers import Alertmanager, Prometheus, Webhook, edit, program, waiting
from screens import CLI, Result, cli, finish, start

from gpu_resource_extensions.metrics import METRICS
from gpu_resource_manager_v01 import GPUResourceManagerV01

pytestmark = pytest.mark.services

ALERTS = PROJECT / "gpu_resource_extensions" / "prometheus_alerts.yml"
DASHBOARD = PROJECT / "gpu_resource_extensions" / "grafana_dashboard.json"
JAPANESE = re.compile("[\u3040-\u30ff]")

#: a job that is killed at once, and so not taken back
KILLED = """
import os, signal
from gpu_resource_manager_v01 import GPUResourceManagerV01
with GPUResourceManagerV01().allocation("killed", 2, 1):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(*words: str) -> Result:
    result = cli(*words)
    assert (result.code, result.err) == (0, ""), result
    return result


def backdate(pool: Path, **ago: float) -> None:
    """Let all that stands in the document have begun that long ago."""
    begun = (datetime.now() - timedelta(**ago)).isoformat(timespec="seconds")

    def change(document: Any) -> None:
        for server in document["servers"]:
            for task in server["running_tasks"]:
                task["start_time"] = begun
        for request in document.get("waiting", ()):
            request["asked_time"] = begun

    edit(pool, change)


@pytest.fixture
def lab_pool(pool: Path) -> Path:
    GPUResourceManagerV01(pool, servers=[("gpu1", 8, 64), ("gpu2", 4, 32)])
    return pool


# --- By promtool ------------------------------------------------------------------------------------


def test_promtool_accepts_the_rules() -> None:
    subprocess.run([program("promtool"), "check", "rules", str(ALERTS)], check=True)


def test_series_that_must_fire_do_and_those_just_below_do_not() -> None:
    subprocess.run(
        [program("promtool"), "test", "rules", "prometheus_alerts_test.yml"], cwd=PROJECT / "tests", check=True
    )


# --- With all of it running ---------------------------------------------------------------------------


def assert_is_helpful(alert: Any) -> None:
    """Check what people are shown: complete, in both languages, with a command to type."""
    texts = alert["annotations"]
    assert texts.keys() == {"summary", "description", "summary_ja", "description_ja"}
    assert "What to do: " in texts["description"] and "対処: " in texts["description_ja"]
    for name, text in texts.items():
        assert bool(JAPANESE.search(text)) == name.endswith("_ja")
        assert text.strip() == text and "<no value>" not in text and "error" not in text.lower(), text
        if "description" in name:
            assert "gpu-resource" in text


def test_alert_arrives_where_people_are_told_and_resolves_by_what_it_says(lab_pool: Path, tmp_path: Path) -> None:
    skip_without_packages()
    run("--allocate", "forgotten", "6", "1")
    with waiting("big", 8) as waiter:
        backdate(lab_pool, days=3, minutes=1)
        # Two collect the same pool, as the machines of a lab do that share a database.
        with Monitor(lab_pool) as monitor, Monitor(lab_pool) as other, Webhook() as hook:
            with Alertmanager(tmp_path, hook.url) as alertmanager:
                ports = [monitor.port, other.port]
                with Prometheus(tmp_path, ports, ALERTS, alertmanager.address) as prometheus:
                    names = {"GpuReservationOld", "GpuWaitLong"}
                    wait_until(lambda: hook.told("firing") == names, "the alerts arrive")
                    assert {name: len(alerts) for name, alerts in prometheus.firing().items()} == dict.fromkeys(
                        names, 1
                    )
                    labels = {alert["labels"]["alertname"]: alert["labels"] for alert in hook.alerts}
                    pool = f"{os.uname().nodename}:{lab_pool}"
                    assert labels["GpuReservationOld"].items() >= {"pool": pool, "server": "gpu1"}.items()
                    assert labels["GpuWaitLong"]["pool"] == pool
                    for alert in hook.alerts:
                        assert_is_helpful(alert)
                    assert "forgotten" in run("--detail").out
                    run("--release", "forgotten")
                    assert waiter.wait() == 0  # it has its GPUs, as a reservation of its own
                    wait_until(lambda: hook.told("resolved") == names, "the alerts are resolved")
                    assert prometheus.firing() == {}


def test_each_alert_says_what_ends_it(lab_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing to wait for: the rules as they are, but for how long something must have been so."""
    skip_without_packages()
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "gpu1")
    rules, text = tmp_path / "rules.yml", ALERTS.read_text("utf-8")
    at_once, replaced = re.subn(r"for: \d+[mw]|> 600", lambda found: "> 4" if ">" in found[0] else "for: 0s", text)
    assert replaced == 4
    rules.write_text(at_once, "utf-8")
    port = free_port()
    monitor = Monitor(lab_pool, port=port)
    with Prometheus(tmp_path, [port], rules) as prometheus:

        def comes_and_goes(name: str, what_ends_it: Any) -> None:
            wait_until(lambda: name in prometheus.firing(), f"{name} fires")
            [alert] = prometheus.firing()[name]
            assert_is_helpful(alert)
            what_ends_it(alert["annotations"]["description"])
            wait_until(lambda: name not in prometheus.firing(), f"{name} is resolved")

        def reclaim(text: str) -> None:
            assert '"gpu-resource --reclaim"' in text
            run("--reclaim")

        assert finish(start("-c", KILLED, env={"PYTHONPATH": str(PROJECT)})).code < 0
        comes_and_goes("GpuTaskEndedNotReclaimed", reclaim)

        def enable(text: str) -> None:
            assert "broken fan" in run("--status").out
            assert '"gpu-resource --enable gpu2"' in text and '"gpu-resource --remove-server gpu2"' in text
            run("--enable", "gpu2")

        run("--disable", "gpu2", "--reason", "broken fan")
        comes_and_goes("GpuDisabledLong", enable)

        def release(text: str) -> None:
            assert '"gpu-resource --release TASK_ID --force"' in text
            assert "forgotten" in run("--detail").out
            run("--release", "forgotten", "--force")

        run("--allocate", "forgotten", "6", "1")
        backdate(lab_pool, days=4)
        comes_and_goes("GpuReservationOld", release)

        def give_up(text: str) -> None:
            assert '"gpu-resource --release TASK_ID"' in text
            assert "big" in run("--detail").out
            run("--release", "big")

        run("--allocate", "young", "6", "1")
        with waiting("big", 8):
            backdate(lab_pool, hours=13)
            comes_and_goes("GpuWaitLong", give_up)
        run("--release", "young")

        def put_back(text: str) -> None:
            assert f"127.0.0.1:{port}" in text
            assert '"gpu-resource --status"' in text
            assert str(lab_pool) in cli("--status").err
            aside.rename(lab_pool)

        aside = lab_pool.rename(tmp_path / "aside")
        comes_and_goes("GpuPoolUnreadable", put_back)

        def start_again(text: str) -> None:
            nonlocal monitor
            assert "gpu-resource-monitor" in text
            monitor = Monitor(lab_pool, port=port)

        monitor.stop()
        comes_and_goes("GpuMetricsMissing", start_again)
        monitor.stop()
    run("--remove-server", "gpu2")


# --- The page -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README_v01.md", "README_en.md"])
def test_page_sets_up_what_it_says(name: str, lab_pool: Path, tmp_path: Path) -> None:
    for command in ("promtool", "amtool"):
        program(command)
    needed("prometheus_client")
    page = (PROJECT / name).read_text("utf-8")
    on_each, on_one = re.findall(r"^<!-- prometheus -->\n```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    places = {
        "/etc/cron.d": tmp_path / "cron.d",
        "/etc/prometheus": tmp_path / "prometheus",
        "/var/lib/prometheus/node-exporter": tmp_path / "textfile",
        "/usr/local/bin/gpu-resource": f"{sys.executable} {CLI}",
    }
    for place in ("cron.d", "prometheus", "textfile", "bin"):
        (tmp_path / place).mkdir()
    for command in ("apt-get", "pipx", "systemctl"):  # they install and restart
        (tmp_path / "bin" / command).write_text("#!/bin/sh\n", "utf-8")
        (tmp_path / "bin" / command).chmod(0o755)

    def paste(text: str) -> None:
        for place, ours in places.items():
            text = text.replace(place, str(ours))
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], cwd=PROJECT, env={**os.environ, "PATH": path}, check=True
        )

    paste(on_each)
    for line in (tmp_path / "cron.d" / "gpu-resource").read_text("utf-8").splitlines():
        paste(line.removeprefix("* * * * * root "))
    assert b"gpu_resource_pool_readable" in (tmp_path / "textfile" / "gpu_resource.prom").read_bytes()
    paste(on_one)
    assert (tmp_path / "prometheus" / "gpu_resource_alerts.yml").read_bytes() == ALERTS.read_bytes()
    # What is to be added where the page of the pool runs.
    [line] = re.findall(r"`(- \{job_name: gpu-resource.*)`", page)
    with open(tmp_path / "prometheus" / "prometheus.yml", "a", encoding="utf-8") as config:
        config.write(f"  {line}\n")
    paste("promtool check config /etc/prometheus/prometheus.yml")
    for name in [*METRICS, *re.findall(r"alert: (\w+)", ALERTS.read_text("utf-8"))]:
        assert f"`{name}`" in page


# --- The dashboard ------------------------------------------------------------------------------------


def test_dashboard_is_one_by_the_schema_of_grafana() -> None:
    schema = needed("grafana_foundation_sdk.models.dashboard").Dashboard
    needed("grafana_foundation_sdk.cog.plugins").register_default_plugins()  # with options of panels, and queries
    encode = needed("grafana_foundation_sdk.cog.encoder").JSONEncoder().encode
    document = json.loads(DASHBOARD.read_text("utf-8"))
    typed = schema.from_json(document)
    assert [*wrong(typed, schema, "dashboard")] == []
    assert [*lost(document, json.loads(encode(typed)), "dashboard")] == []
    ids = [panel["id"] for panel in document["panels"]]
    assert len({*ids}) == len(ids)


def wrong(value: Any, hint: Any, place: str) -> Iterator[str]:
    """Yield each place at or below ``value`` whose type is not the one that the schema has."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        found = [[*wrong(value, arg, place)] for arg in args]
        yield from [] if [] in found else min(found, key=len)
    elif origin is Literal:
        if value not in args:
            yield f"{place}: {value!r} is none of {args}"
    elif origin is list:
        for number, item in enumerate(value if isinstance(value, list) else [None]):
            yield from wrong(item, args[0], f"{place}[{number}]")
    elif origin is dict:
        for key, item in value.items() if isinstance(value, dict) else [("?", None)]:
            yield from wrong(item, args[1], f"{place}.{key}")
    elif isinstance(hint, type) and issubclass(hint, Enum):
        if value not in [*hint, *(member.value for member in hint)]:
            yield f"{place}: {value!r} is no {hint.__name__}"
    elif hint is float or isinstance(hint, type):
        kind = (int, float) if hint is float else hint
        if not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool):
            yield f"{place}: {value!r} is no {hint.__name__}"
    if hasattr(value, "__dict__"):
        for key, kind in get_type_hints(type(value)).items():
            yield from wrong(getattr(value, key), kind, f"{place}.{key}")


def lost(given: Any, kept: Any, place: str) -> Iterator[str]:
    """Yield each place of ``given`` that ``kept`` lacks: the schema does not know it."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept.get(key), f"{place}.{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{place}[{number}]")
    elif given != kept:
        yield f"{place}: {given!r}"


def test_each_query_of_the_dashboard_finds_series_and_counts_what_two_collect_once(
    lab_pool: Path, tmp_path: Path
) -> None:
    skip_without_packages()
    document = json.loads(DASHBOARD.read_text("utf-8"))
    run("--allocate", "kept", "6", "1")
    run("--allocate", "other", "2", "1", "--prefer-server", "gpu2")
    with waiting("big", 8), Monitor(lab_pool) as monitor, Monitor(lab_pool) as other:
        with Prometheus(tmp_path, [monitor.port, other.port]) as prometheus:
            wait_until(lambda: len(prometheus.ask("gpu_resource_pool_readable")) == 2, "both are collected")
            [variable] = [it for it in document["templating"]["list"] if it["type"] == "query"]
            match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
            assert match
            [pool] = prometheus.get(f"label/{match[2]}/values", **{"match[]": match[1]})
            assert pool.endswith(str(lab_pool))
            # The steps of five minutes that a query has are those of the clock: look at the next one.
            seen = prometheus.ask("max(timestamp(gpu_resource_pool_readable))")[0]["value"][1]
            end = math.ceil(float(seen) / 300) * 300
            answers: dict[str, list[Any]] = {}
            for panel in document["panels"]:
                for target in panel["targets"]:
                    for chosen in (re.escape(pool), variable["allValue"]):
                        query = target["expr"].replace("$__range", "1h").replace("$pool", json.dumps(chosen)[1:-1])
                        assert "$" not in query
                        if target["range"]:
                            times = {"start": str(end - 3600), "end": str(end), "step": "60"}
                            answers[panel["title"]] = prometheus.get("query_range", query=query, **times)["result"]
                        else:
                            answers[panel["title"]] = prometheus.ask(query, time=str(end))
                        assert answers[panel["title"]], query
                        names = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
                        assert all(name in series["metric"] for name in names for series in answers[panel["title"]])

    def shown(title: str) -> list[str]:
        return [series["value"][1] for series in next(it for name, it in answers.items() if title in name)]

    assert shown("GPUs held") == ["8"]
    assert shown("GPUs free") == ["4"]
    assert shown("Waiting requests") == ["1"]
    assert shown("Who holds most now") == ["8"]
    assert shown("Pool") == ["1"]
