"""Commands that two files can do without: jobs, servers, metrics, and the question ahead of a reset.

``args`` are the words of the command, and what the command line has for all: ``tell`` shows people a text,
``unknown_task`` makes a refusal, ``our_directory`` says where it lies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from gpu_resource_manager_v01 import (
    GPUResourceManagerV01,
    NoPoolError,
    ResourceManagerError,
    StateFileError,
    quoted,
    say,
)

Answer = tuple[int, Mapping[str, Any], Callable[[Any], str]]  # as in the command line


class NotConfirmedError(ResourceManagerError):
    """Asking: nobody has said yes; nothing was touched."""

    code = "not_confirmed"
    template = "{problem}\n  対処: {remedy}"

    def __init__(self, exit_code: int, problem: str, remedy: str) -> None:
        self.exit_code, self.problem, self.remedy = exit_code, say(problem), say(remedy)


def ask_before_reset(manager: GPUResourceManagerV01, force: bool, tell: Callable[[str], None]) -> None:
    """Ask the person at the terminal whether the pool may be reset; ``force``: with the records of living jobs.

    :raises NotConfirmedError: there is no terminal (2), or the answer is no (1).
    """
    if sys.stdin is None or not sys.stdin.isatty():
        remedy = "確認を省くには --reset --yes を指定してください"
        raise NotConfirmedError(2, "確認するための端末がないため、リセットしません", remedy)
    try:
        tasks = manager.get_overview()["tasks"]
    except NoPoolError:
        raise
    except StateFileError:  # which is what a reset is for
        tasks = []
    cleared = ", ".join(task["task_id"] for task in tasks if task["kind"] != "job" or force)
    # Told on stderr, for stdout may be a file.
    tell(say("警告：すべての実行中タスクの記録がクリアされます！"))
    tell(say("  ファイル: {}\n  消える記録: {}", manager.resource_file, cleared or say("なし")))
    tell(say("続行しますか？ [y/N]:"))
    if sys.stdin.readline().strip().lower() not in ("y", "yes", "はい"):
        raise NotConfirmedError(1, "リセットを中止しました", "消してよければ y と答えてください")


def cmd_stop(manager: GPUResourceManagerV01, args: Any) -> Answer:
    args.output.progress(say("タスクのプロセスを終了中: {}", args.stop))
    if not manager.stop_task(args.stop, 10.0 if args.grace is None else args.grace, force=args.force):
        raise args.unknown_task(args.stop)
    text = "✓ プロセスは終了し、GPU は空きました: {task_id}"
    return (0, {"task_id": args.stop}, lambda facts: say(text, **facts))


def cmd_add_server(manager: GPUResourceManagerV01, args: Any) -> Answer:
    name, server_id = args.add_server[0], manager.add_server(*args.add_server)
    result = {"server_id": server_id, "server_name": name}
    return (0, result, lambda facts: say("✓ サーバーを追加しました: {server_name} (ID: {server_id})", **facts))


def cmd_remove_server(manager: GPUResourceManagerV01, args: Any) -> Answer:
    manager.remove_server(args.remove_server)
    return (0, {"server_name": args.remove_server}, lambda facts: say("✓ サーバーを外しました: {server_name}", **facts))


def gpus_of_server(text: str, manager: GPUResourceManagerV01) -> tuple[str, list[int] | None]:
    """Return a server and GPUs on it; ``None``: all of them."""
    names = [server["server_name"] for server in manager.get_resource_summary()["servers"]]
    name, _, gpus = text.rpartition(":")
    indices = gpus.split(",")
    are_numbers = all(index.isascii() and index.isdigit() and len(index) <= 9 for index in indices)
    return (name, list(map(int, indices))) if name and are_numbers and text not in names else (text, None)


def cmd_disable(manager: GPUResourceManagerV01, args: Any) -> Answer:
    from gpu_resource_extensions.screens import render_disabled

    name, gpus = gpus_of_server(args.disable, manager)
    result = {"server_name": name, "disabled": manager.disable(name, gpus, args.reason or "")}
    end = say("  そこで動いているタスクは、終わるまでそのまま続きます")
    return (0, result, lambda facts: "\n".join([f"✓{line[1:]}" for line in render_disabled([facts])] + [end]))


def cmd_enable(manager: GPUResourceManagerV01, args: Any) -> Answer:
    from gpu_resource_extensions.screens import render_disabled

    name, gpus = gpus_of_server(args.enable, manager)
    result = {"server_name": name, "disabled": manager.enable(name, gpus)}
    lines = [say("✓ 使用を再開しました: {}", args.enable), *render_disabled([result])]
    return (0, result, lambda _: "\n".join(lines))


def cmd_reclaim(manager: GPUResourceManagerV01, args: Any) -> Answer:
    ended = manager.reclaim_ended()
    result = {"ended_tasks": ended}
    return (
        0,
        result,
        lambda facts: say("✓ 終了したタスクの回収完了: {}", ", ".join(facts["ended_tasks"]) or say("なし")),
    )


def cmd_metrics(manager: None, args: Any) -> Answer:
    from gpu_resource_extensions.metrics import write_metrics

    write_metrics(args.metrics)
    return (0, {"metrics_file": args.metrics}, lambda facts: say("✓ メトリクスを書きました: {metrics_file}", **facts))


def cmd_run(manager: GPUResourceManagerV01, args: Any) -> Answer:
    from gpu_resource_extensions.screens import WaitingLine

    line, command = WaitingLine(args.tell, once=True), " ".join(map(quoted, args.job))
    how = manager, args.run, args.job, args.our_directory(), command, args.wait or 0, line, args.tell
    if args.any or args.on is not None:
        from gpu_resource_extensions.remote_run import run_anywhere

        code, granted = run_anywhere(*how, args.on)
    else:
        from gpu_resource_extensions.run_job import run_job

        code, granted = run_job(*how)
    return (code, {**granted, "exit_code": code}, lambda _: "")


def cmd_take(manager: GPUResourceManagerV01, args: Any) -> Answer:
    from gpu_resource_extensions.remote_run import take

    claim, job = args.take
    code, granted = take(manager, claim, job, args.our_directory(), args.tell)
    return (code, {**granted, "exit_code": code}, lambda _: "")
