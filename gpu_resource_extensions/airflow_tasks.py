"""GPUs for tasks of Airflow 3.3 or later: :func:`gpu_allocation`, also around tasks; :func:`use_gpus` inside them.

A decorated function holds GPUs of the machine that it runs on by a lease, as ``--run`` does: they come back when the
last process of the task is gone, whatever ended it. What stands around tasks is a reservation, as ``--allocate`` makes
it: a setup task asks for it, and its teardown gives it back. If there is no room, the setup leaves the worker, and a
trigger stands in line for it.

The task of the pool has a name that follows from the dag, the run, the task and its map index. So an attempt finds what
an earlier one has left: a reservation, which it goes on with, or processes, which it ends.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import json
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from datetime import timedelta
from threading import Event, Thread
from typing import Any, TypeVar

from airflow.sdk import BaseOperator, Connection, Variable, get_current_context
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowNotFoundException
from airflow.triggers.base import BaseTrigger, TriggerEvent
from asgiref.sync import sync_to_async

from gpu_resource_extensions.airflow_keeper import end_tasks, kept
from gpu_resource_extensions.leases import described, server_here
from gpu_resource_extensions.run_job import job_environment
from gpu_resource_manager_v01 import (
    DEFAULT_LOCK_TIMEOUT_S,
    MAX_TASK_ID_LENGTH,
    Allocation,
    DuplicateTaskError,
    GPUResourceManagerV01,
    InvalidRequestError,
    MissingPackageError,
    NoCapacityError,
    NoPoolError,
    NotOwnerError,
    OnWait,
    ResourceManagerError,
    TaskRunningError,
    allocation_of,
    host_name,
    placed_tasks,
    printable,
    say,
)

T = TypeVar("T")
SETTINGS = "gpu_resource"  # the Variable, and the Connection with the same in its ``extra``, that we read
ANY_SERVER = "*"
_LOOK_AGAIN_S = 1.0  # while an earlier attempt of the same task leaves the line
_FINAL = InvalidRequestError, NotOwnerError, NoPoolError, MissingPackageError  # which another attempt would meet again
# For InvalidRequestError: the problem, and what to do.
_UNKNOWN_SETTING = "に使えない項目があります", "{known} だけを指定してください"
_NOT_INSIDE = (
    "はこの種類のタスクには付けられません",
    "with gpu_allocation(...) as gpus: の中に置き、環境変数に gpus['environment'] を渡してください",
)
_SERVER_OF_A_TASK = (
    "は、タスクの関数に付けるときは指定できません",
    "指定をやめてください (タスクが動く計算機の GPU を使います)",
)


class GPUAllocation:
    """GPUs and CPUs of one server: for a decorated function, or for the tasks of a block.

    ``@task`` over ``@gpu_allocation(2, 8)``: the function is called when GPUs of its machine have been granted, and
    sees them in its environment. ``with gpu_allocation(2, 8) as gpus:``: tasks that are made in the block run between
    a setup, whose XComs ``gpus`` are, and its teardown. These two are attributes, for those who prefer ``>>``.

    XComs: ``gpu_devices``, ``environment`` and ``server_name``; of a setup all of ``Allocation`` besides.

    :param gpus: on one server.
    :param cpus: on the same.
    :param task_id: of the setup; that of the teardown is the same with ``_release``.
    :param wait_s: seconds to stand in line for room; by default until there is room.
    :param server: of a block: the name of the only one that will do, or ``"*"`` for any. By default it is the one that
        the worker runs on, or any if that is no server of the pool.
    """

    def __init__(
        self, gpus: int, cpus: int, *, task_id: str = "gpus", wait_s: float | None = None, server: str | None = None
    ) -> None:
        self.gpus, self.cpus, self.task_id, self.wait_s, self.server = gpus, cpus, task_id, wait_s, server

    @functools.cached_property
    def setup(self) -> Any:
        """The setup task of a block."""
        return ObtainGPUs(
            task_id=self.task_id, gpus=self.gpus, cpus=self.cpus, wait_s=self.wait_s, server=self.server
        ).as_setup()

    @functools.cached_property
    def teardown(self) -> Any:
        """The teardown task of a block."""
        release = ReleaseGPUs(
            task_id=f"{self.task_id}_release",
            setup_id=self.setup.task_id,
            retries=5,
            retry_delay=timedelta(seconds=10),
            retry_exponential_backoff=True,
        )
        release.as_teardown(setups=self.setup)
        release.trigger_rule = "all_done"  # also after a setup that was killed once it had GPUs
        return release

    def __enter__(self) -> Any:
        self.teardown.__enter__()
        return self.setup.output

    def __exit__(self, *reason: Any) -> None:
        self.teardown.__exit__(*reason)

    def __call__(self, function: Callable[..., T]) -> Callable[..., T]:
        """Return ``function`` as one that holds the GPUs while it runs."""
        if self.server is not None:
            raise InvalidRequestError("server", self.server, *_SERVER_OF_A_TASK)
        if hasattr(function, "function"):  # the two decorators stand the other way round
            function.function = self(function.function)
            return function
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                with self._held():
                    return await function(*args, **kwargs)

            return run_async  # type: ignore[return-value]

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> T:
            with self._held():
                return function(*args, **kwargs)

        return run

    @contextmanager
    def _held(self) -> Iterator[None]:
        context = get_current_context()
        ti, kind = context["ti"], getattr(context["task"], "custom_operator_name", "@task")
        task_id = allocation_id(ti)
        with ExitStack() as stack:
            with failures_told():
                if kind != "@task":  # what such a function returns is yet to be run, elsewhere
                    raise InvalidRequestError("@gpu_allocation", kind, *_NOT_INSIDE)
                manager = manager_of(read_settings())
                end_what_is_left(task_id)
                manager.stop_task(task_id, grace_s=0)  # an earlier attempt, if its keeper was killed and it was not
                granted = stack.enter_context(
                    manager.allocation(
                        task_id,
                        self.gpus,
                        self.cpus,
                        wait_s=math.inf if self.wait_s is None else self.wait_s,
                        on_wait=functools.partial(_tell_wait, context["task"].log),
                        keeper=functools.partial(kept, task_id, _worker()),
                    )
                )
            xcoms = _xcoms(granted)
            for key in ("gpu_devices", "environment", "server_name"):
                ti.xcom_push(key=key, value=xcoms[key])
            with _environment(xcoms["environment"]):
                yield


gpu_allocation = GPUAllocation


@contextmanager
def use_gpus(gpus: Mapping[str, Any]) -> Iterator[None]:
    """Let this process, and what it starts, keep to the GPUs of a block of tasks while this block runs.

    They end with the worker: a process that went on would use GPUs that the teardown has given back.

    :param gpus: the XComs of the setup, as the task gets them by an argument.
    """
    with kept(gpus["task_id"], _worker()), _environment(job_environment(gpus)):
        yield


class ObtainGPUs(BaseOperator):
    """The setup: GPUs and CPUs that stay reserved until :class:`ReleaseGPUs`. For parameters see the allocation."""

    def __init__(self, *, gpus: int, cpus: int, wait_s: float | None, server: str | None, **kwargs: Any) -> None:
        super().__init__(multiple_outputs=True, **kwargs)
        self.gpus, self.cpus, self.wait_s, self.server = gpus, cpus, wait_s, server

    def execute(self, context: Any) -> dict[str, Any]:
        task_id = allocation_id(context["ti"])
        with failures_told():
            settings = read_settings()
            manager, server = manager_of(settings), self.server or settings.get("server")
            if server is None:
                with suppress(InvalidRequestError):
                    state = manager.get_detailed_status()
                    server = server_here(state)["server_name"]
            try:
                return _xcoms(obtain(manager, task_id, self.gpus, self.cpus, 0, server))
            except (NoCapacityError, DuplicateTaskError) as refusal:
                if self.wait_s == 0:
                    raise
                self.log.info("%s", refusal)
        until_s = None if self.wait_s is None else time.time() + self.wait_s
        trigger = RoomTrigger(task_id, self.gpus, self.cpus, until_s, server)
        return self.defer(trigger=trigger, method_name="resume")  # type: ignore[no-any-return]  # raises

    def resume(self, context: Any, event: Mapping[str, Any]) -> dict[str, Any]:
        """Go on once there is room: what was granted meanwhile is found by its name."""
        if event["error"]:
            raise (AirflowFailException if event["is_final"] else AirflowException)(event["error"])
        return self.execute(context)


class ReleaseGPUs(BaseOperator):
    """The teardown: ends what still runs with the GPUs of the setup ``setup_id`` on this machine; gives them back."""

    def __init__(self, *, setup_id: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.setup_id = setup_id

    def execute(self, context: Any) -> None:
        task_id = allocation_id(context["ti"], self.setup_id)
        with failures_told():
            end_what_is_left(task_id)
            manager_of(read_settings()).release_resources(task_id)


class RoomTrigger(BaseTrigger):
    """Stands in line in place of a setup; until ``until_s`` by the clock of the machine, or for ever."""

    def __init__(self, allocation: str, gpus: int, cpus: int, until_s: float | None, server: str | None) -> None:
        super().__init__()  # which knows a ``task_id`` of its own
        self.asked: dict[str, Any] = {
            "allocation": allocation,
            "gpus": gpus,
            "cpus": cpus,
            "until_s": until_s,
            "server": server,
        }

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return f"{__name__}.{type(self).__name__}", self.asked

    async def run(self) -> AsyncIterator[TriggerEvent]:
        manager = await sync_to_async(lambda: manager_of(read_settings()))()
        loop, cancelled = asyncio.get_running_loop(), Event()
        answer: asyncio.Future[dict[str, Any]] = loop.create_future()

        def wait() -> None:
            event = _event(manager, self.asked, on_wait)
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell, event)

        def tell(event: dict[str, Any]) -> None:
            if not answer.done():
                answer.set_result(event)

        def on_wait(position: int, reason: str) -> None:
            if cancelled.is_set():
                raise CancelledError
            _tell_wait(self.log, position, reason)

        # A thread of its own: those of the loop are few, and shared with everybody's triggers.
        Thread(target=copy_context().run, args=(wait,), daemon=True).start()
        try:
            event = await answer
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.to_thread(_leave_line, manager, self.asked["allocation"])
            raise
        yield TriggerEvent(event)


def _event(manager: GPUResourceManagerV01, asked: Mapping[str, Any], on_wait: OnWait) -> dict[str, Any]:
    """Stand in line; return what the setup is told."""
    wait_s = math.inf if asked["until_s"] is None else max(0.0, asked["until_s"] - time.time())
    try:
        obtain(manager, asked["allocation"], asked["gpus"], asked["cpus"], wait_s, asked["server"], on_wait)
    except ResourceManagerError as error:
        return {"error": str(error), "is_final": _is_final(error)}
    except CancelledError:
        return {"error": "cancelled", "is_final": False}  # nobody hears it
    return {"error": "", "is_final": False}


def _leave_line(manager: GPUResourceManagerV01, task_id: str) -> None:
    """Give up the place in line that this process holds for the task; what was granted stays with its setup."""
    for request in manager.get_detailed_status().get("waiting", ()):
        if (request["task_id"], request.get("pid"), request.get("host")) == (task_id, os.getpid(), host_name()):
            manager.release_resources(task_id)


def obtain(
    manager: GPUResourceManagerV01,
    task_id: str,
    gpus: int,
    cpus: int,
    wait_s: float,
    server: str | None,
    on_wait: OnWait | None = None,
) -> Allocation:
    """Return what an earlier attempt has reserved, or else what is granted now, until it is released.

    :raises DuplicateTaskError: an earlier attempt stood in line all the time.
    """
    only, deadline_s = None if server == ANY_SERVER else server, time.monotonic() + wait_s
    while True:
        left_s = max(0.0, deadline_s - time.monotonic())
        try:
            with manager.claim(task_id, gpus, cpus, wait_s=left_s, on_wait=on_wait, server=only) as bound:
                bound.unbind()
                return bound.granted
        except DuplicateTaskError:
            held = [
                allocation_of(server, task)
                for server, task in placed_tasks(manager.get_detailed_status())
                if task["task_id"] == task_id and "lease" not in task
            ]
            for found in held:
                asked = gpus, cpus, only or found["server_name"]
                if (len(found["gpu_ids"]), found["cpu_count"], found["server_name"]) == asked:
                    return found
                manager.release_resources(task_id)  # the dag asks for something else by now
            if not held and not left_s:
                raise
        time.sleep(min(_LOOK_AGAIN_S, left_s))


def end_what_is_left(task_id: str) -> None:
    """End what earlier attempts, or tasks of a block that Airflow takes for ended, have left on this machine.

    :raises TaskRunningError: they do not end.
    """
    left = described(end_tasks(task_id))
    if left:
        raise TaskRunningError(task_id, [process._asdict() for process in left])


def allocation_id(ti: Any, task_id: str | None = None) -> str:
    """Return the name that what a task instance holds has in the pool, the same for each attempt.

    :param task_id: of another task of the same run and map index.
    """
    words = ["airflow", ti.dag_id, ti.run_id, task_id or ti.task_id]
    words += [str(ti.map_index)] if ti.map_index >= 0 else []
    # A user's own: two people who try the same dag on one pool are not to meet each other's.
    digest = hashlib.sha256(json.dumps([os.getuid(), *words]).encode()).hexdigest()[:12]
    return f"{printable('/'.join(words))[: MAX_TASK_ID_LENGTH - 13]}-{digest}"


def read_settings() -> dict[str, Any]:
    """Return what the Variable and the Connection ``gpu_resource`` say; they are never written."""
    settings = dict(Variable.get(SETTINGS, default={}, deserialize_json=True))
    with suppress(AirflowNotFoundException):
        settings.update(Connection.get(SETTINGS).extra_dejson)
    known = "resource_file", "lock_timeout_s", "server"
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise InvalidRequestError(SETTINGS, ", ".join(unknown), *_UNKNOWN_SETTING, known=", ".join(known))
    return settings


def manager_of(settings: Mapping[str, Any]) -> GPUResourceManagerV01:
    """Return the manager of the pool that the settings name; none is made."""
    lock_timeout_s = settings.get("lock_timeout_s", DEFAULT_LOCK_TIMEOUT_S)
    return GPUResourceManagerV01(settings.get("resource_file"), lock_timeout_s, create=False)


@contextmanager
def failures_told() -> Iterator[None]:
    """Let a failure that a retry would meet again fail the task for good."""
    try:
        yield
    except ResourceManagerError as error:
        if _is_final(error):
            raise AirflowFailException(str(error)) from error
        raise


def _is_final(error: ResourceManagerError) -> bool:
    return isinstance(error, _FINAL) and not isinstance(error, DuplicateTaskError)


def _xcoms(granted: Allocation) -> dict[str, Any]:
    return {**granted, "environment": job_environment(granted)}


def _tell_wait(log: Any, position: int, reason: str) -> None:
    log.info(say("待機中 ({} 番目): {}", position, reason))


def _worker() -> int:
    """Return the pid of the worker that supervises this process; 0 where the task runs in ours, in a ``dag.test()``."""
    from airflow.sdk.execution_time import task_runner

    return 0 if hasattr(task_runner.SUPERVISOR_COMMS, "supervisor") else os.getppid()


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables while the block runs: in a ``dag.test()`` the next task runs in the same process."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
