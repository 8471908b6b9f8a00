"""What Prometheus is told of a pool (package ``prometheus-client``): a text for a page, or a file for node_exporter.

All numbers come from one look at the document, so they fit together. Times are told, not ages: an age would stand still
with a collector that has stopped. Labels name servers and users, never tasks, so that the series stay few.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from gpu_resource_extensions.screens import unix_time_s
from gpu_resource_manager_v01 import (
    GPUResourceManagerV01,
    MissingPackageError,
    ResourceManagerError,
    State,
    StateFileError,
    host_name,
    is_url,
    overview,
    printable,
    reclaim,
    say,
)

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # of the text, which every Prometheus reads
LOCK_TIMEOUT_S = 4.0  # so that even of a silent database all is said within the 10 s that Prometheus waits by default
Counts = dict[tuple[str, ...], float]
NOBODY = "?"  # as user of what names none

#: of each metric what it says, and its labels besides ``pool``
METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pool_readable": ("Whether the pool could be read (1) or not (0)", ()),
    "collected_timestamp_seconds": ("When these metrics were collected", ()),
    "last_change_timestamp_seconds": ("When the pool was last changed, 0 if that is not known", ()),
    "gpus": ("GPUs that the server has", ("server",)),
    "gpus_free": ("GPUs that a task could be given now", ("server",)),
    "gpus_held": ("GPUs that tasks hold, without those of tasks that have ended", ("server",)),
    "gpus_disabled": ("GPUs out of service, held or not", ("server",)),
    "cpus": ("CPUs that the server has", ("server",)),
    "cpus_free": ("CPUs that a task could be given now", ("server",)),
    "cpus_held": ("CPUs that tasks hold, without those of tasks that have ended", ("server",)),
    "user_gpus_held": ("GPUs that the tasks of a user hold now", ("server", "user")),
    "tasks": ("Tasks by kind: job (its processes hold it), reservation (until it is released), waiting", ("kind",)),
    "ended_tasks": ("Tasks that have ended, as seen from here, and are not taken back yet", ("server",)),
    "oldest_request_timestamp_seconds": ("When the oldest waiting request arrived, 0 if nobody waits", ()),
    "oldest_reservation_timestamp_seconds": ("Start of the oldest reservation, 0 if there is none", ("server",)),
}


class PackageNeededError(MissingPackageError):
    """Asking: a package that only this part needs is missing or too old; nothing was touched."""

    template = (
        "メトリクスに必要なパッケージを読み込めません: {reason}\n"
        '  対処: この Python ({python}) に pip install "{package}" でインストールしてください'
    )

    def __init__(self, error: ImportError) -> None:
        super().__init__(error)
        self.package = "prometheus-client"


class MetricsFileError(StateFileError):
    """Storing: the file of the metrics could not be written; an older one stands."""

    template = "メトリクスをファイルに書けません: {path}\n  原因: {reason}\n  対処: {remedy}"


# For MetricsFileError: what to do.
_NO_FILE = "通常のファイルではありません", "通常のファイルか、まだないファイルを指定してください"
_REMEDIES = {
    errno.ENOENT: "ディレクトリ {} を作るか、node_exporter が読むディレクトリのファイルを指定してください",
    errno.EACCES: "ディレクトリ {} に書ける利用者として実行してください",
}
_OTHER_REMEDY = "ディレクトリとディスクの状態を確認してください: {}"


def metrics_text() -> bytes:
    """Return the metrics of the pool of this process; of one that cannot be read, that it cannot."""
    return _look()[0]


def write_metrics(path: str) -> None:
    """Write the metrics to a file that everybody may read, and which is complete at every moment.

    :raises MetricsFileError: it cannot be written.
    :raises ResourceManagerError: the pool cannot be read, as the file says by then.
    """
    text, failure = _look()
    _replace(path, text)
    if failure:
        raise failure


def _replace(path: str, text: bytes) -> None:
    directory = ""
    try:
        real = os.path.realpath(path)  # fails where the current directory has been removed
        directory, name = os.path.split(real)
        if os.path.exists(real) and not os.path.isfile(real):  # such as /dev/null, which root could replace
            raise MetricsFileError(path, *map(say, _NO_FILE))
        # node_exporter reads what ends in ".prom". A name of its own, for two may write at once.
        descriptor, temporary = tempfile.mkstemp(".tmp", f".{name}.", directory)
        try:
            with open(descriptor, "wb") as file:
                file.write(text)
                os.fchmod(descriptor, 0o644)  # for node_exporter is another user
            os.replace(temporary, real)
        except BaseException:
            with suppress(OSError):  # the failure itself is what counts
                os.unlink(temporary)
            raise
    except OSError as error:
        remedy = say(_REMEDIES.get(error.errno or 0, _OTHER_REMEDY), directory)
        raise MetricsFileError(path, error.strerror or str(error), remedy) from error


def _look() -> tuple[bytes, ResourceManagerError | None]:
    """Return the text and, if the pool cannot be read, why."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.core import GaugeMetricFamily
        from prometheus_client.registry import Collector
    except ImportError as error:
        raise PackageNeededError(error) from error

    counts: Counts = {}
    failure = None
    try:
        manager = GPUResourceManagerV01(create=False, lock_timeout_s=LOCK_TIMEOUT_S)
        place, counts = manager.resource_file, counted(manager.get_detailed_status())
    except ResourceManagerError as error:
        place, failure = getattr(error, "path", None) or "", error
    pool = pool_label(place)
    counts["pool_readable",] = not failure
    counts["collected_timestamp_seconds",] = time.time()

    class Pool(Collector):
        def collect(self) -> Iterator[GaugeMetricFamily]:
            for name, (text, labels) in METRICS.items():
                family = GaugeMetricFamily(f"gpu_resource_{name}", text, labels=("pool", *labels))
                for (metric, *values), count in counts.items():
                    if metric == name:
                        family.add_metric((pool, *values), count)
                if family.samples:
                    yield family

    registry = CollectorRegistry()  # of its own: it says nothing about this process
    registry.register(Pool())
    return generate_latest(registry), failure


def pool_label(place: str) -> str:
    """Return what names a pool: the same path on two machines is two, the same address of a database is one."""
    return printable(place if is_url(place) else f"{host_name()}:{place}")


def counted(state: State) -> Counts:
    """Count what a document holds in which ended records are marked; keys are a metric and the values of its labels.

    Added up by name: a document edited by hand may have two servers of one name, and a series must occur once.
    """
    counts: Counts = defaultdict(float)
    counts["last_change_timestamp_seconds",] = unix_time_s(state["last_updated"]) or 0
    counts["oldest_request_timestamp_seconds",] = 0
    for kind in ("job", "reservation", "waiting"):
        counts["tasks", kind] = 0
    for server in state["servers"]:
        for metric in ("gpus_held", "cpus_held", "ended_tasks", "oldest_reservation_timestamp_seconds"):
            counts[metric, server["server_name"]] = 0
    servers = {task["task_id"]: task["server_name"] or "" for task in overview(state)["tasks"]}
    for task_id in reclaim(state, lambda record: record.get("ended") is True):
        counts["ended_tasks", servers[task_id]] += 1
    seen = overview(state)  # as it will be with the next change
    for server in seen["servers"]:
        name = server["server_name"]
        for what in ("gpus", "cpus"):
            counts[what, name] += server[f"total_{what}"]
            counts[f"{what}_free", name] += server[f"available_{what}"]
        counts["gpus_disabled", name] += len(server.get("disabled", ()))
    for task in seen["tasks"]:
        kind, name = task["kind"], task["server_name"]
        counts["tasks", kind] += 1
        if kind == "waiting":
            note_time(counts, ("oldest_request_timestamp_seconds",), task.get("asked_time"))
            continue
        user = printable(str(task.get("user") or NOBODY))
        counts["gpus_held", name] += len(task["allocated_gpus"])
        counts["user_gpus_held", name, user] += len(task["allocated_gpus"])
        counts["cpus_held", name] += task["allocated_cpus"]
        if kind == "reservation":
            note_time(counts, ("oldest_reservation_timestamp_seconds", name), task["start_time"])
    return counts


def note_time(counts: Counts, key: tuple[str, ...], text: object) -> None:
    """Let the count be the earliest of the times that it is given."""
    time_s = unix_time_s(text) or 0
    counts[key] = min(counts[key] or time_s, time_s or counts[key])
