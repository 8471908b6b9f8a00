"""Prometheus and its Alertmanager for tests, from Debian, each on a port of its own; and somebody who waits or edits.

with Webhook() as hook, Alertmanager(tmp_path, hook.url) as alertmanager:
    with Prometheus(tmp_path, [monitor.port], rules, alertmanager.address) as prometheus:
        prometheus.ask("up")
"""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import GUARD_S
from database_servers import free_port, wait_until
from screens import CLI, finish, start

from gpu_resource_manager_v01 import GPUResourceManagerV01


def program(name: str) -> str:
    """Return where a program of Debian lies; without it the test is skipped."""
    __tracebackhide__ = True
    return shutil.which(name) or pytest.skip(f"{name} is not installed, see .ci/install-services")


class Server:
    """A program in a directory of its own, ready once it says so at ``/-/ready``."""

    def __init__(self, name: str, directory: Path, *options: str) -> None:
        self.address, self.directory = f"127.0.0.1:{free_port()}", directory
        words = [program(name), *options, f"--web.listen-address={self.address}"]
        with open(directory / f"{name}.log", "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(words, cwd=directory, stdout=log, stderr=log)
        wait_until(self._is_ready, f"{name} is ready")

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, "\n".join(log.read_text("utf-8") for log in self.directory.glob("*.log"))
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=GUARD_S):
                return True
        except OSError:
            return False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(GUARD_S)


class Prometheus(Server):
    """Collects from these ports of this machine once a second."""

    def __init__(
        self, directory: Path, ports: Sequence[int], rules: Path | None = None, alertmanager: str = ""
    ) -> None:
        config: dict[str, Any] = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "scrape_configs": [
                {"job_name": "gpu", "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
            ],
        }
        if rules:
            config["rule_files"] = [str(rules)]
        if alertmanager:
            config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]}
        (directory / "prometheus.yml").write_text(json.dumps(config), "utf-8")  # which is YAML too
        options = f"--config.file={directory / 'prometheus.yml'}", f"--storage.tsdb.path={directory / 'prometheus'}"
        super().__init__("prometheus", directory, *options)

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of the API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"http://{self.address}/api/v1/{path}?{query}", timeout=GUARD_S) as answer:
            document = json.load(answer)
        assert document["status"] == "success", document
        return document["data"]

    def ask(self, expression: str, **parameters: str) -> list[Any]:
        """Return the series that an expression has now, each with ``metric`` and ``value``."""
        series: list[Any] = self.get("query", query=expression, **parameters)["result"]
        return series

    def firing(self) -> dict[str, list[Any]]:
        """Return the alerts that fire, by name."""
        names: dict[str, list[Any]] = {}
        for alert in self.get("alerts")["alerts"]:
            if alert["state"] == "firing":
                names.setdefault(alert["labels"]["alertname"], []).append(alert)
        return names


class Alertmanager(Server):
    """Passes on at once what it gets."""

    def __init__(self, directory: Path, url: str) -> None:
        route = {"receiver": "hook", "group_by": ["..."], "group_wait": "0s", "group_interval": "1s"}
        config = {"route": route, "receivers": [{"name": "hook", "webhook_configs": [{"url": url}]}]}
        (directory / "alertmanager.yml").write_text(json.dumps(config), "utf-8")
        super().__init__(
            "prometheus-alertmanager",
            directory,
            f"--config.file={directory / 'alertmanager.yml'}",
            f"--storage.path={directory / 'alertmanager'}",
            "--cluster.listen-address=",
        )


class Webhook:
    """Somebody who is told of alerts; ``alerts`` are all that came, the oldest first."""

    def __init__(self) -> None:
        self.alerts: list[Any] = []
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                webhook.alerts += document["alerts"]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Webhook:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def told(self, status: str) -> set[str]:
        """Return the names of the alerts that came as ``firing`` or ``resolved``."""
        return {alert["labels"]["alertname"] for alert in self.alerts if alert["status"] == status}


@contextmanager
def waiting(task_id: str, gpus: int) -> Iterator[subprocess.Popen[bytes]]:
    """Let a request stand in the line until it is served, is given up, or the block is left."""
    process = start(str(CLI), "--allocate", task_id, str(gpus), "1", "--wait")
    manager = GPUResourceManagerV01()
    wait_until(lambda: task_id in [task["task_id"] for task in manager.get_overview()["tasks"]], "it waits")
    yield process
    process.terminate()
    finish(process)


def edit(pool: Path, change: Callable[[Any], object]) -> None:
    """Change the document as somebody does who has an editor that leaves no half of it."""
    document = json.loads(pool.read_text("utf-8"))
    change(document)
    edited = pool.with_suffix(".edited")
    edited.write_text(json.dumps(document), "utf-8")
    edited.rename(pool)
