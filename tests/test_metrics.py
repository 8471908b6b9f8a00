"""Prometheus is told of a pool what its screens show, and a file of it is complete whenever somebody reads it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import ALICE, GUARD_S, LAB, PROJECT, Children, become, needed
from database_servers import free_port, wait_until
from prometheus_servers import edit, program, waiting
from screens import cli, start

from gpu_resource_manager_v01 import GPUResourceManagerV01, ResourceManagerError, user_name

pytestmark = pytest.mark.services
needed("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from gpu_resource_extensions.metrics import CONTENT_TYPE, METRICS, metrics_text, write_metrics  # noqa: E402

ME, HERE = user_name(os.getuid()), os.uname().nodename
#: a job that holds its GPUs until it is killed
JOB = """
import sys, time
from gpu_resource_manager_v01 import GPUResourceManagerV01
with GPUResourceManagerV01().allocation(sys.argv[1], int(sys.argv[2]), 1):
    print("started", flush=True)
    time.sleep(1000)
"""

Series = dict[frozenset[tuple[str, str]], float]


def told(text: bytes | None = None) -> dict[str, Series]:
    """Return the value of each series by the name of the metric and its labels, but for ``pool``, which is one."""
    metrics: dict[str, Series] = {}
    pools = set()
    for family in text_string_to_metric_families((metrics_text() if text is None else text).decode("utf-8")):
        for sample in family.samples:
            labels = dict(sample.labels)
            pools.add(labels.pop("pool"))
            series = metrics.setdefault(sample.name.removeprefix("gpu_resource_"), {})
            assert frozenset(labels.items()) not in series, f"twice: {sample}"
            series[frozenset(labels.items())] = sample.value
    assert len(pools) == 1
    return metrics


def value(metrics: dict[str, Series], name: str, **labels: str) -> float:
    return metrics[name][frozenset(labels.items())]


@contextmanager
def job(task_id: str, gpus: int, server: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a job on one of the servers; it is killed, and so not taken back, at the latest in the end."""
    environment = {"GPU_RESOURCE_SERVER": server, "PYTHONPATH": str(PROJECT)}
    process = start("-c", JOB, task_id, str(gpus), env=environment)
    assert process.stdout is not None and process.stdout.readline() == b"started\n"
    yield process
    kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate(timeout=GUARD_S)


def test_each_number_is_the_one_of_the_screens(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool, servers=[("gpu1", 8, 64), ("gpu 2", 4, 32)])
    assert manager.allocate_resources("kept", 3, 10)
    assert manager.allocate_resources("other", 2, 1, 1)
    manager.disable("gpu 2", [0, 3])
    with job("training", 2, "gpu1"), waiting("big", 8):
        metrics, summary = told(), manager.get_resource_summary()
        for row in summary["servers"]:
            name = row["server_name"]
            for what in ("gpus", "cpus"):
                assert value(metrics, what, server=name) == row[f"total_{what}"]
                assert value(metrics, f"{what}_free", server=name) == row[f"available_{what}"]
            assert value(metrics, "gpus_disabled", server=name) == len(row.get("disabled", ()))
        assert [value(metrics, "gpus_held", server=name) for name in ("gpu1", "gpu 2")] == [5, 2]
        assert [value(metrics, "cpus_held", server=name) for name in ("gpu1", "gpu 2")] == [11, 1]
        assert [value(metrics, "user_gpus_held", server=name, user=ME) for name in ("gpu1", "gpu 2")] == [5, 2]
        kinds = {kind: value(metrics, "tasks", kind=kind) for kind in ("job", "reservation", "waiting")}
        assert kinds == {"job": 1, "reservation": 2, "waiting": 1}
        assert kinds["waiting"] == summary["total_waiting"]
        assert [value(metrics, "ended_tasks", server=name) for name in ("gpu1", "gpu 2")] == [0, 0]
        assert value(metrics, "pool_readable") == 1

        tasks = {task["task_id"]: task for task in manager.get_overview()["tasks"]}
        asked = datetime.fromisoformat(tasks["big"]["asked_time"]).timestamp()
        assert value(metrics, "oldest_request_timestamp_seconds") == asked
        for task_id, name in (("kept", "gpu1"), ("other", "gpu 2")):
            started = datetime.fromisoformat(tasks[task_id]["start_time"]).timestamp()
            assert value(metrics, "oldest_reservation_timestamp_seconds", server=name) == started
        changed = datetime.fromisoformat(manager.get_overview()["last_updated"]).timestamp()
        assert value(metrics, "last_change_timestamp_seconds") == changed
        assert 0 <= time.time() - value(metrics, "collected_timestamp_seconds") < GUARD_S
    assert manager.release_resources("other")
    metrics = told()
    assert value(metrics, "oldest_request_timestamp_seconds") == 0  # nobody waits
    assert value(metrics, "oldest_reservation_timestamp_seconds", server="gpu 2") == 0


def test_what_has_ended_is_counted_as_in_the_summary_until_it_is_taken_back(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool, servers=[("gpu1", 8, 64), ("gpu2", 8, 64)])
    with job("training", 4, "gpu2") as process:  # which is this machine, then
        kill(process)
        metrics, summary = told(), manager.get_resource_summary()
        assert summary["ended_tasks"] == ["training"]
        assert [value(metrics, "ended_tasks", server=name) for name in ("gpu1", "gpu2")] == [0, 1]
        assert value(metrics, "gpus_free", server="gpu2") == 8 == summary["servers"][1]["available_gpus"]
        assert value(metrics, "gpus_held", server="gpu2") == 0
        assert value(metrics, "tasks", kind="job") == 0
        assert "user_gpus_held" not in metrics
        assert cli("--reclaim").code == 0
        assert value(told(), "ended_tasks", server="gpu2") == 0


def test_request_that_has_ended_waits_no_more(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool, servers=[("gpu1", 2, 64)])
    assert manager.allocate_resources("kept", 2, 1)
    with waiting("big", 2):
        request = json.loads(pool.read_text("utf-8"))["waiting"][0]
        os.kill(request["pid"], signal.SIGKILL)
        wait_until(lambda: value(told(), "tasks", kind="waiting") == 0, "it is seen to have ended")
        metrics = told()
        assert value(metrics, "oldest_request_timestamp_seconds") == 0
        assert value(metrics, "ended_tasks", server="") == 1


def test_oldest_of_several_is_told_and_a_time_that_nobody_can_read_breaks_nothing(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool, servers=[("gpu1", 8, 64)])
    for task_id in ("a", "b", "c"):
        assert manager.allocate_resources(task_id, 2, 1)

    def oldest_with(*times: str) -> float:
        def change(document: Any) -> None:
            for task, text in zip(document["servers"][0]["running_tasks"], times, strict=True):
                task["start_time"] = text

        edit(pool, change)
        metrics = told()
        assert value(metrics, "gpus_held", server="gpu1") == 6
        return value(metrics, "oldest_reservation_timestamp_seconds", server="gpu1")

    times = "2025-03-01T00:00:00", "2025-02-01T00:00:00", "2025-04-01T00:00:00"
    february = datetime(2025, 2, 1).timestamp()
    assert oldest_with(*times) == february
    assert oldest_with("", times[1], "yesterday") == february
    assert oldest_with("0001-01-01T00:00:00", times[1], "9999-12-31T23:59:59") <= february
    assert oldest_with("", "2025", "12:00") <= february
    assert oldest_with("2025-02-01T00:00:00+00:00", *times[:2]) in (february, 1738368000)
    assert oldest_with("?", "?", "?") == 0


@pytest.mark.parametrize("asked_time", [None, "", "soon"])
def test_request_without_a_time_waits_all_the_same(pool: Path, asked_time: str | None) -> None:
    manager = GPUResourceManagerV01(pool, servers=[("gpu1", 2, 64)])
    assert manager.allocate_resources("kept", 2, 1)
    with waiting("big", 2):
        edit(pool, lambda document: document["waiting"][0].update(asked_time=asked_time))
        metrics = told()
        assert value(metrics, "tasks", kind="waiting") == 1
        assert value(metrics, "oldest_request_timestamp_seconds") == 0


def test_labels_hold_any_name_as_it_is_and_no_series_occurs_twice(pool: Path) -> None:
    names = ['a"b', "a\\b", "サーバー 1", "{x=~'.*'}", "a\\nb", "same", "same"]
    manager = GPUResourceManagerV01(pool, servers=[(f"gpu{number}", 4, 8) for number in range(len(names))])
    users: list[Any] = ["al\nice\x1b[2J", 'a"b\\', None, 7, ["x"], "山田", "\ud800"]
    for number in range(len(names)):
        assert manager.allocate_resources(f"task{number}", 2, 1, number)

    def change(document: Any) -> None:
        for server, name, user in zip(document["servers"], names, users, strict=True):
            server["server_name"] = name
            server["running_tasks"][0]["user"] = user
        del document["servers"][2]["running_tasks"][0]["user"]

    edit(pool, change)
    metrics = told()
    assert {dict(labels)["server"] for labels in metrics["gpus"]} == {*names}
    assert value(metrics, "gpus", server="same") == 8
    assert value(metrics, "gpus_held", server="same") == 4
    assert {dict(labels)["user"] for labels in metrics["user_gpus_held"]} == {
        "al?ice?[2J", 'a"b\\', "?", "7", "['x']", "山田"
    }  # fmt: skip
    assert_promtool_is_content(metrics_text())


def test_tasks_are_counted_and_never_named(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool, servers=[("gpu1", 64, 64)])
    empty = len(metrics_text().splitlines())
    for number in range(20):
        assert manager.allocate_resources(f"task-{number}", 2, 1)
    text = metrics_text()
    assert b"task-" not in text
    assert len(text.splitlines()) == empty + 3  # whatever the number of tasks: one user on one server


def assert_promtool_is_content(text: bytes) -> None:
    checked = subprocess.run([program("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_promtool_has_nothing_to_say_about_any_metric(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool, servers=[("gpu1", 8, 64)])
    assert manager.allocate_resources("kept", 2, 1)
    with job("training", 2, "gpu1"), waiting("big", 8):
        text = metrics_text()
    assert {line.split()[2] for line in text.decode().splitlines() if line.startswith("# HELP")} == {
        f"gpu_resource_{name}" for name in METRICS
    }
    assert_promtool_is_content(text)
    pool.unlink()
    assert_promtool_is_content(metrics_text())


# --- A pool that cannot be read ---------------------------------------------------------------------


def assert_unreadable(text: bytes) -> None:
    metrics = told(text)
    assert value(metrics, "pool_readable") == 0
    assert metrics.keys() == {"pool_readable", "collected_timestamp_seconds"}


def test_pool_that_is_gone_is_said_to_be_and_is_the_same_one_when_it_is_back(made_pool: Path) -> None:
    label = f'pool="{HERE}:{made_pool}"'.encode()
    text = metrics_text()
    assert value(told(text), "pool_readable") == 1
    assert label in text
    aside = made_pool.rename(made_pool.with_suffix(".aside"))
    assert_unreadable(metrics_text())
    assert label in metrics_text()
    aside.rename(made_pool)
    assert value(told(), "pool_readable") == 1


@pytest.mark.parametrize("content", ["", "{", '{"version": "0.1", "servers": []}', "\udcff"])
def test_pool_of_no_use_is_not_readable(pool: Path, content: str) -> None:
    pool.write_text(content, "utf-8", "surrogateescape")
    assert_unreadable(metrics_text())


@pytest.mark.parametrize("place", ["relative.json", "mysql://host/db", "/", "postgresql://nobody:secret@127.0.0.1:1/x"])
def test_place_of_no_use_is_not_readable(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RESOURCE_FILE", place)
    text = metrics_text()
    assert_unreadable(text)
    assert b"secret" not in text


def test_database_without_its_package_is_not_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "gpu_resource_extensions.postgresql_store", raising=False)
    monkeypatch.setenv("GPU_RESOURCE_FILE", "postgresql://nobody@127.0.0.1:1/x")
    assert_unreadable(metrics_text())


def test_place_with_any_bytes_in_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = os.fsdecode(os.fsencode(tmp_path) + b'/a"\\\n\xff.json')
    monkeypatch.setenv("GPU_RESOURCE_FILE", place)
    label = f'pool="{HERE}:{tmp_path}/a\\"\\\\??.json"'.encode()
    assert_unreadable(metrics_text())
    assert label in metrics_text()
    GPUResourceManagerV01(place)
    assert value(told(), "pool_readable") == 1
    assert label in metrics_text()


# --- A file for node_exporter -------------------------------------------------------------------------


def test_file_is_what_the_page_says_and_everybody_may_read_it(made_pool: Path, tmp_path: Path) -> None:
    (tmp_path / "textfile").mkdir()
    file = tmp_path / "textfile" / "gpu_resource.prom"
    result = cli("--metrics", str(file), redirect="; umask 077")
    assert (result.code, result.err) == (0, "")
    assert str(file) in result.out
    assert told(file.read_bytes()).keys() == told().keys()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert os.listdir(file.parent) == [file.name]
    written = json.loads(cli("--metrics", str(file), "--json").out)
    assert written["result"] == {"metrics_file": str(file)}


def test_link_stays_a_link(made_pool: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "gpu.prom"
    link.symlink_to(tmp_path / "there" / "gpu.prom")
    write_metrics(str(link))
    assert link.is_symlink()
    assert value(told(link.read_bytes()), "pool_readable") == 1


def test_file_is_complete_whenever_it_is_read_and_whoever_writes_at_once(
    made_pool: Path, tmp_path: Path, children: Children
) -> None:
    (tmp_path / "textfile").mkdir()
    file = tmp_path / "textfile" / "gpu_resource.prom"
    write_metrics(str(file))
    lines = file.read_bytes().count(b"\n")

    def write_often() -> None:
        for _ in range(100):
            write_metrics(str(file))

    writers = [children.start(write_often) for _ in range(3)]
    for _ in range(300):
        assert file.read_bytes().count(b"\n") == lines
        assert [name for name in os.listdir(file.parent) if name.endswith(".prom")] == [file.name]
    assert [children.wait(writer) for writer in writers] == [0, 0, 0]
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(
    ("ends", "code"),
    [("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL), ("exec('raise OSError(28, os.strerror(28))')", 74)],
    ids=["killed", "disk-full"],
)
def test_file_stays_as_it_was_if_there_can_be_no_new_one(made_pool: Path, tmp_path: Path, ends: str, code: int) -> None:
    (tmp_path / "textfile").mkdir()
    file = tmp_path / "textfile" / "gpu_resource.prom"
    write_metrics(str(file))
    before = file.read_bytes()
    (tmp_path / "lib").mkdir()
    # Python runs this ahead of the command, which then ends so with all written and nothing in place.
    (tmp_path / "lib" / "sitecustomize.py").write_text(f"import os, signal\nos.replace = lambda *_: {ends}\n", "utf-8")
    assert cli("--metrics", str(file), env={"PYTHONPATH": str(tmp_path / "lib")}).code == code
    assert file.read_bytes() == before
    left = {*os.listdir(file.parent)} - {file.name}
    assert not any(name.endswith(".prom") for name in left)
    assert bool(left) == (code < 0)


def test_pool_that_cannot_be_read_is_in_the_file_and_the_command_ends_as_any_other(
    absent_pool: Path, tmp_path: Path
) -> None:
    file = tmp_path / "gpu_resource.prom"
    refused, status = cli("--metrics", str(file)), cli("--status")
    assert (refused.code, refused.err) == (status.code, status.err)
    assert refused.code == 74
    assert_unreadable(file.read_bytes())
    answer = json.loads(cli("--metrics", str(file), "--json").out)
    assert answer["error"]["code"] == "no_pool"


@pytest.mark.parametrize("language", ["ja", "en"])
def test_directory_that_is_missing_is_named_with_what_to_do(
    made_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    monkeypatch.setenv("GPU_RESOURCE_LANG", language)
    file = tmp_path / "nowhere" / "gpu_resource.prom"
    result = cli("--metrics", str(file))
    assert result.code == 74
    assert str(file) in result.err.splitlines()[0]
    remedy = {"ja": "対処: ディレクトリ {} を作るか", "en": "What to do: make the directory {}, or"}[language]
    assert remedy.format(file.parent) in result.err
    file.parent.mkdir()  # as it says
    assert cli("--metrics", str(file)).code == 0


def test_directory_of_somebody_else_is_named_with_what_to_do(
    lab: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.chmod(lab, 0o755)
    (lab / "textfile").mkdir(mode=0o755)  # of root
    file = lab / "textfile" / "gpu_resource.prom"
    GPUResourceManagerV01(lab / "pool.json")
    monkeypatch.setenv("GPU_RESOURCE_FILE", str(lab / "pool.json"))

    def write() -> None:
        become(ALICE, [LAB], 0o022)
        with pytest.raises(ResourceManagerError, match=f"ディレクトリ {file.parent} に書ける利用者として"):
            write_metrics(str(file))

    assert children.run(write) == 0
    write_metrics(str(file))  # we are somebody who may
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


@pytest.mark.parametrize("path", ["pipe", "link", "", ".", "a" * 300, "/proc/metrics"])
def test_what_is_no_place_for_a_file_stays_as_it_is(made_pool: Path, tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "pipe")  # as /dev/null, which is not put at risk here
    (tmp_path / "link").symlink_to("pipe")
    before = sorted(os.listdir(tmp_path))
    result = cli("--metrics", path, cwd=tmp_path)
    assert result.code == 74
    assert "対処" in result.err
    assert sorted(os.listdir(tmp_path)) == before
    assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode)


def test_missing_package_is_named_with_the_way_to_install_it(made_pool: Path, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "prometheus_client.py").write_text("raise ModuleNotFoundError('No such package')\n")
    file = tmp_path / "gpu_resource.prom"
    result = cli("--metrics", str(file), env={"PYTHONPATH": str(tmp_path / "lib")})
    assert result.code == 2
    assert f'対処: この Python ({sys.executable}) に pip install "prometheus-client"' in result.err
    assert not file.exists()
    assert cli("--status", env={"PYTHONPATH": str(tmp_path / "lib")}).code == 0


def test_node_exporter_passes_it_on(pool: Path, tmp_path: Path) -> None:
    exporter = program("prometheus-node-exporter")
    manager = GPUResourceManagerV01(pool, servers=[('gpu "1"', 8, 64)])
    assert manager.allocate_resources("kept", 2, 1)
    (tmp_path / "textfile").mkdir()
    write_metrics(str(tmp_path / "textfile" / "gpu_resource.prom"))
    (tmp_path / "textfile" / ".gpu_resource.prom.half.tmp").write_text("gpu_resource_gpus{", "utf-8")  # of one killed
    address = f"127.0.0.1:{free_port()}"
    options = [f"--web.listen-address={address}", f"--collector.textfile.directory={tmp_path / 'textfile'}"]
    process = subprocess.Popen(
        [exporter, "--collector.disable-defaults", "--collector.textfile", *options], stderr=subprocess.DEVNULL
    )
    try:
        text = b""

        def answers() -> bool:
            nonlocal text
            try:
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=GUARD_S) as answer:
                    text = answer.read()
            except OSError:
                return False
            return True

        wait_until(answers, "node_exporter answers")
    finally:
        process.kill()
        process.wait()
    lines = text.splitlines(keepends=True)
    passed_on = told(b"".join(line for line in lines if b"gpu_resource_" in line and b"node_textfile" not in line))
    assert value(passed_on, "user_gpus_held", server='gpu "1"', user=ME) == 2
    assert b"node_textfile_scrape_error 0\n" in lines


def test_type_of_the_text_is_one_that_every_prometheus_reads() -> None:
    assert re.fullmatch(r"text/plain; version=0\.0\.4; charset=utf-8", CONTENT_TYPE)


def test_database_that_says_nothing_is_not_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    needed("psycopg")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("GPU_RESOURCE_FILE", f"postgresql://nobody@127.0.0.1:{silent.getsockname()[1]}/pool")
        assert_unreadable(metrics_text())
