#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["filelock>=3.30", "tabulate[widechars]>=0.9", "wcwidth<0.3"]
# ///
"""Command line of the GPU resource manager: parse, call the library, show the answer.

Results go to stdout; errors (``✗ …``, with what to do next) to stderr, never as a traceback.
Reads from the ground up: rendering (dict in, text out), commands, the parser, output and ``main``.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - the first thing that an older one gets to read
    print("✗ Python 3.10 以降が必要です (Python 3.10 or later is needed): " + sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import argparse
import io
import os

TYPE_CHECKING = False
if TYPE_CHECKING:  # imports are most of a start, so the others stand where they are used
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, NoReturn, TextIO

    from gpu_resource_manager_v01 import GPUResourceManagerV01, ServerDescription

    #: of a command: exit code, facts for programs, and a function that puts them in words
    Answer = tuple[int, Mapping[str, Any], Callable[[Any], str]]

EXIT_OK = 0
EXIT_NO = 1  # the answer is no: no room, unknown task, not confirmed
EXIT_USAGE = 2  # wrong usage, bad parameters, a package is missing
EXIT_IO = 74  # EX_IOERR: the state file cannot be read or written, or the output cannot
EXIT_AGAIN = 75  # EX_TEMPFAIL: lock not had in time
EXIT_OURS = 125  # of --run: our own failure, not the command's
EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 126, 127  # of --run, as a shell has them
EXIT_INTERRUPTED = 130  # 128 + SIGINT

COMMAND = "python cli_v01.py"  # as hints name us; ``run`` knows better
VERSION = "0.1"
SCHEMA = 1  # of the documents that ``--json`` prints


class Stopped(KeyboardInterrupt):
    """We are to end because of a signal; ends like a Ctrl-C, with another exit code."""


class Refusal(Exception):  # noqa: N818 - a "no" is an answer too
    """A command is not carried out: exit code, name for programs, text for people, further facts."""

    def __init__(self, code: int, name: str, problem: str, remedy: str = "", facts: Any = None) -> None:
        super().__init__(f"{problem}\n{say('  対処: {}', remedy)}" if remedy else problem)
        self.code, self.name, self.facts = code, name, facts or {}


def say(template: str, /, *facts: object, **named: object) -> str:
    """Return ``template`` with its facts, in the language asked for."""
    if os.environ.get("GPU_RESOURCE_LANG") == "en":
        from gpu_resource_manager_v01 import say as say_in_english

        return say_in_english(template, *facts, **named)
    return template.format(*facts, **named)


# --- Rendering ------------------------------------------------------------------------------------


def screen() -> tuple[int, int]:
    """Return columns and lines of the screen; ``shutil`` would cost a twentieth of a start."""
    try:
        size = os.get_terminal_size(1 if os.isatty(1) else 2)
    except OSError:  # no terminal
        size = os.terminal_size((0, 0))
    asked = os.environ.get("COLUMNS", "")
    return (int(asked) if is_number(asked) else 0) or size.columns or 80, size.lines or 24


def width(text: str) -> int:
    """Return how many columns a line takes; without the package one a letter, as ``tabulate`` has it then."""
    if text.isascii():
        return len(text)
    try:
        from wcwidth import wcswidth
    except ImportError:
        return len(text)
    return max(0, int(wcswidth(text)))


def cut(text: str, most: int) -> str:
    """Return ``text``, shortened to ``most`` columns."""
    while width(text) > most:
        text = text.removesuffix("…")[:-1] + "…"
    return text


def one_line(value: object) -> str:
    return safe(str(value).replace("\n", "?"))


def title(text: str, wide: int = 77) -> str:
    rest = wide - width(text) - 2
    return f"{'=' * (rest // 2)} {text} {'=' * (rest - rest // 2)}"


def render_status(summary: Mapping[str, Any]) -> str:
    from tabulate import DataRow, Line, TableFormat, tabulate

    headers = "サーバー", "GPU利用可/合計", "GPU使用率", "CPU利用可/合計", "CPU使用率", "実行中タスク"
    rows = [
        [
            server["server_name"],
            f"{server['available_gpus']}/{server['total_gpus']}",
            server["gpu_utilization"],
            f"{server['available_cpus']}/{server['total_cpus']}",
            server["cpu_utilization"],
            str(server["running_tasks"]),
        ]
        for server in summary["servers"]
    ]
    bar, most = DataRow("│", "│", "│"), screen()[0]
    ends = Line("┌", "─", "┬", "┐"), None, None, Line("└", "─", "┴", "┘")
    # The style ``simple_outline`` without padding, so that 80 columns hold it. The headings are a row like any other,
    # for ``tabulate`` would add two columns to each; and "1e5" is a name, no cell is to be read as a number.
    style, align = TableFormat(*ends, bar, bar, 0, None), ["left"] + ["center"] * 5
    table = tabulate([list(map(say, headers)), *rows], tablefmt=style, colalign=align, disable_numparse=True)
    top, heading, *rest = table.split("\n")
    table = "\n".join([top, heading, top.translate(str.maketrans("┌┬┐", "├┼┤")), *rest])
    lines = [title(say("GPU リソース状態"), len(top)), table, "", render_totals(summary)]
    lines += [f"  {line}" for line in render_disabled(summary["servers"])]
    if summary["tasks"]:
        lines += ["", *render_tasks(summary["tasks"], most)]
    path = one_line(summary["resource_file"])
    while width(say("プール: {}", path)) > most:  # --detail shows it whole
        path = "…" + path.removeprefix("…")[1:]
    return "\n".join([*lines, "", *render_pool(summary, path)])


def render_tasks(tasks: Sequence[Mapping[str, Any]], most: int) -> list[str]:
    """Return a heading and a line for each task, at most ``most`` columns wide."""
    heads = "サーバー", "GPU", "CPU", "タスク", "利用者", "経過", "種類"
    kinds = {"job": say("ジョブ"), "reservation": say("予約"), "waiting": say("待機")}
    rows = [list(map(say, heads))]
    for task in tasks:
        waits = task["kind"] == "waiting"
        gpus = say("{} 個", task["required_gpus"]) if waits else ranges(task["allocated_gpus"])
        cpus = task["required_cpus" if waits else "allocated_cpus"]
        since = age(task.get("asked_time" if waits else "start_time"))
        who = task.get("server_name") or "-", gpus, cpus, task["task_id"], task.get("user", "-"), since
        rows.append([*map(one_line, who), kinds[task["kind"]]])
    widths = [max(map(width, cells)) for cells in zip(*rows, strict=True)]
    while sum(widths) + 2 * len(widths) - 2 > most and max(widths) > 4:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in rows:
        cells = [cut(cell, wide) for cell, wide in zip(row, widths, strict=True)]
        padded = [cell + " " * (wide - width(cell)) for cell, wide in zip(cells, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return lines


def ranges(gpus: Sequence[int]) -> str:
    """Return indices as people write them: ``0-3,6``."""
    runs: list[list[int]] = []
    for gpu in gpus:
        if runs and gpu == runs[-1][-1] + 1:
            runs[-1].append(gpu)
        else:
            runs.append([gpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "-"


def age(since: object) -> str:
    """Return how long ago a time of the document was."""
    import time

    try:
        parts = [int(part) for part in str(since).replace("T", "-").replace(":", "-").split("-")]
        year, month, day, hour, minute, second = parts
        passed_s = time.time() - time.mktime((year, month, day, hour, minute, second, 0, 0, -1))
    except (ValueError, OverflowError):  # somebody has edited it
        return "?"
    for unit, unit_s in (("{} 日", 86400), ("{} 時間", 3600), ("{} 分", 60)):
        if passed_s >= unit_s:
            return say(unit, int(passed_s // unit_s))
    return say("{} 秒", max(0, int(passed_s)))


def render_disabled(servers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for the GPUs of a server that are out of service for the same reason."""
    lines = []
    for server in servers:
        disabled: dict[str, str] = server.get("disabled", {})
        for reason in dict.fromkeys(disabled.values()):
            gpus = ranges([int(gpu) for gpu, why in disabled.items() if why == reason])
            line = say("使用停止: {} の GPU {}", server["server_name"], gpus)
            lines.append(line + (f" ({reason})" if reason else ""))
    return lines


def render_pool(pool: Mapping[str, Any], path: str) -> list[str]:
    """Return which pool a screen shows, and whether it is a real one."""
    from gpu_resource_manager_v01 import is_made_up

    lines = [say("プール: {}", path)]
    if not pool["last_updated"]:
        lines.append(say("  まだありません。最初の割り当てか --init が作ります"))
    if is_made_up(pool["servers"]):
        how = "--reset" if pool["last_updated"] else "--init"
        lines.append(say("  架空のサーバーです (登録: {0} --detect か {0} --server NAME:GPUS:CPUS)", how))
    return lines


def render_totals(summary: Mapping[str, Any]) -> str:
    most_gpus, most_cpus = (max(server[key] for server in summary["servers"]) for key in ("total_gpus", "total_cpus"))
    lines = [
        say("合計:"),
        say("  GPU: {}/{} 利用可能", summary["total_available_gpus"], summary["total_gpus"]),
        say("  CPU: {}/{} 利用可能", summary["total_available_cpus"], summary["total_cpus"]),
        say("  実行中タスク: {}", summary["total_running_tasks"]),
    ]
    if "total_waiting" in summary:
        lines.append(say("  待機中の要求: {}", summary["total_waiting"]))
    if "ended_tasks" in summary:
        lines.append(say("  終了済み (次の変更で回収): {}", ", ".join(summary["ended_tasks"])))
    lines.append(say("  1 タスクの範囲: GPU {}-{}、CPU 1-{}", summary["min_gpus_per_task"], most_gpus, most_cpus))
    return "\n".join(lines)


def render_detail(state: Mapping[str, Any]) -> str:
    lines = [title(say("GPU リソース詳細"))]
    for server in state["servers"]:
        gpus = server["available_gpus"]
        lines += [
            f"{server['server_name']} (ID: {server['server_id']})",
            say("  利用可能GPU: {} ({}/{})", gpus, len(gpus), server["total_gpus"]),
            say("  利用可能CPU: {}/{}", server["available_cpus"], server["total_cpus"]),
            *(f"  {line}" for line in render_disabled([server])),
            say("  実行中タスク: {}", len(server["running_tasks"])),
        ]
        for task in server["running_tasks"]:
            lines += [
                f"    - {task['task_id']}" + (say(" (終了済み: 次の変更で回収)") if task.get("ended") is True else ""),
                f"      GPU ID: {task['allocated_gpus']}",
                say("      CPU数: {}", task["allocated_cpus"]),
                say("      開始時刻: {}", task["start_time"]),
            ]
            if "user" in task:
                who = f"{task['user']}@{task.get('host')} (PID {task.get('pid')})"
                lines.append(say("      要求元: {}", one_line(who)))
            for process in task.get("processes", ()):
                who = f"{process['pid']} ({process['user']}) {process['command']}".rstrip()
                lines.append(say("      プロセス: {}", who))
        lines.append("")
    for position, request in enumerate(state.get("waiting", []), start=1):
        asked = request["required_gpus"], request["required_cpus"], one_line(request.get("user"))
        line = say("待機中 {}: {} (GPU {}, CPU {}, {})", position, request["task_id"], *asked)
        lines.append(line + (say(" (終了済み)") if request.get("ended") is True else ""))
    lines.append(say("最終更新: {}", state["last_updated"]))
    return "\n".join([*lines, *render_pool(state, one_line(state["resource_file"]))])


def render_allocation(allocation: Mapping[str, Any]) -> str:
    devices = allocation["gpu_devices"]
    server = say("  サーバー: {}\n  GPU ID: {}\n", allocation["server_name"], allocation["gpu_ids"])
    cpus = say("  CPU数: {}\n", allocation["cpu_count"])
    release = f"  {COMMAND} --release {quote(allocation['task_id'])}"
    return (
        say("✓ リソース割り当て成功:\n{}{}\n", server, cpus)
        + say("✓ リソース割り当て成功！\n{}  GPUデバイス文字列: {}\n{}\n", server, devices, cpus)
        + say("使用ヒント:\n  export CUDA_VISIBLE_DEVICES={}\n  export CUDA_DEVICE_ORDER=PCI_BUS_ID\n\n", devices)
        + say("リソース解放:\n{}", release)
    )


def quote(word: str) -> str:
    """Quote ``word`` for a POSIX shell, but only if it needs it: Japanese letters do not."""
    plain = word and all(letter.isalnum() or letter in "_@%+=:,./-" for letter in word)
    return word if plain else "'" + word.replace("'", "'\"'\"'") + "'"


class WaitingLine:
    """One line on stderr about the place in the queue: rewritten on a terminal, else printed anew."""

    stands = False  # on the terminal, so that whatever comes next has to take its place

    def __init__(self, once: bool = False) -> None:
        self.once, self.shown = once, False
        self.terminal = sys.stderr is not None and sys.stderr.isatty()

    def __call__(self, position: int, reason: str) -> None:
        text = say("待機中 ({} 番目): {}", position, reason.splitlines()[0])
        if self.terminal:
            print(f"\r\x1b[K{cut(safe(text), screen()[0] - 1)}", end="", file=sys.stderr, flush=True)
            WaitingLine.stands = True
        elif not (self.once and self.shown):
            show_error(text)
        self.shown = True

    def end(self, text: str = "") -> None:
        """Put ``text`` in the place of the line."""
        if text and (self.terminal or not self.shown):
            show_error(text)
        elif WaitingLine.stands:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            WaitingLine.stands = False


def watch(frame: Callable[[], str], every_s: float) -> None:
    """Show what ``frame`` returns, anew every so many seconds, until a Ctrl-C."""
    import time

    # The other screen of the terminal, without wrapping, so that a line of ours is a line there.
    print("\x1b[?1049h\x1b[?7l", end="")
    try:
        while True:
            lines, room = safe(frame()).split("\n"), screen()[1]
            if len(lines) > room:
                lines[room - 1 :] = [say("… 他 {} 行", len(lines) - room + 1)]
            print("\x1b[H" + "\x1b[K\n".join(lines) + "\x1b[K\x1b[J", end="", flush=True)
            time.sleep(every_s)
    except KeyboardInterrupt as stop:
        if isinstance(stop, Stopped):
            raise
    finally:
        print("\x1b[?7h\x1b[?1049l", end="", flush=True)


# --- Commands -------------------------------------------------------------------------------------


def cmd_init(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    head = say("✓ 初期化完了 (既存の状態は上書きしません): {}\n\n", manager.resource_file)
    result = {"resource_file": manager.resource_file, **manager.get_overview()}  # construction has made it
    return (EXIT_OK, result, lambda summary: head + render_totals(summary))


def cmd_status(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    def summary() -> dict[str, Any]:
        return {"resource_file": manager.resource_file, **manager.get_overview()}

    if args.watch is not None:
        if not sys.stdout.isatty():
            remedy = say("端末で実行するか、--watch を外してください")
            raise Refusal(EXIT_USAGE, "usage", say("--watch を表示する端末がありません"), remedy)
        watch(lambda: render_status(summary()), max(0.1, args.watch))
    return (EXIT_OK, summary(), render_status)


def cmd_detail(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    return (EXIT_OK, {**manager.get_detailed_status(), "resource_file": manager.resource_file}, render_detail)


def cmd_allocate(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    from gpu_resource_manager_v01 import NoCapacityError

    task_id, gpus, cpus = args.allocate
    task_id = task_id if task_id != "-" else new_task_id("reservation")
    # Shown before the wait for the lock, not after it.
    text = "リソース割り当てを試行中:\n  タスクID: {}\n  GPU数: {}\n  CPU数: {}\n"
    args.output.progress(say(text, task_id, gpus, cpus))
    prefer = None if args.prefer_server is None else server_id_of(args.prefer_server, manager)
    line = WaitingLine()
    try:
        allocation = manager.obtain_resources(
            task_id, gpus, cpus, prefer, wait_s=args.wait or 0, on_wait=line, local=args.export
        )
    except NoCapacityError as error:
        code = EXIT_NO if args.wait is None else EXIT_AGAIN
        problem, remedy = say("リソース不足: {}", error), say("空きが出てから再実行するか、--wait で待ってください")
        raise Refusal(code, "no_capacity", problem, remedy, vars(error)) from error
    finally:
        line.end()
    # The order is that of NVML, by which the pool counts; CUDA's own puts the fastest card first.
    return (EXIT_OK, {**allocation, "cuda_device_order": "PCI_BUS_ID"}, render_allocation)


def new_task_id(program: str) -> str:
    """Return an identifier that nobody else has: who, what, when, and our pid."""
    import time

    from gpu_resource_manager_v01 import user_name

    what = "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in os.path.basename(program))
    return f"{user_name(os.getuid())[:40]}-{what[:40]}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def server_id_of(text: str, manager: GPUResourceManagerV01) -> int:
    """Return the server that ``--prefer-server`` names: by its id, else by its name."""
    known = {server["server_id"]: server["server_name"] for server in manager.get_resource_summary()["servers"]}
    for server_id, name in [*((key, str(key)) for key in known), *known.items()]:
        if name == text:
            return int(server_id)
    listed = ", ".join(f"{server_id} ({name})" for server_id, name in known.items())
    problem, remedy = say("サーバーがありません: {}", text), say("{} のいずれかを指定してください", listed)
    raise Refusal(EXIT_USAGE, "invalid_request", problem, remedy)


def cmd_run(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    from gpu_resource_extensions.leases import descendants
    from gpu_resource_extensions.run_job import Job, check_command, job_environment, users_environment
    from gpu_resource_manager_v01 import ResourceManagerError, named_processes

    task_id, gpus, cpus = args.run
    line = WaitingLine(once=True)
    code, command = None, " ".join(map(quote, args.job))
    environment = users_environment(os.path.dirname(os.path.realpath(__file__)))

    def not_started(error: OSError) -> Refusal:
        code = EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE
        problem = say("コマンドを実行できません: {}: {}", args.job[0], error.strerror)
        return Refusal(code, "command_not_started", problem, say("コマンドの綴り、PATH、実行権限を確認してください"))

    try:
        check_command(args.job[0], environment)  # ahead of the wait
    except OSError as error:
        raise not_started(error) from error
    if task_id == "-":
        scripts = [word for word in args.job if word.endswith((".py", ".sh"))]
        task_id = new_task_id([*scripts, args.job[0]][0])
        show_error(say("タスクID: {}", task_id))

    def say_who_is_left(pid: int) -> None:
        who = named_processes([process._asdict() for process in descendants(pid)])
        stop = say("終わるまで GPU は返りません (--stop {} で終了できます)", quote(task_id))
        show_error(say("注意: タスク {} のプロセスがまだ動いています: {}。{}", task_id, who, stop))

    job = Job(args.job, say_who_is_left)
    try:
        with manager.allocation(
            task_id, gpus, cpus, wait_s=args.wait or 0, on_wait=line, command=command, keeper=job.kept
        ) as granted:
            line.end(say("✓ {} の GPU {} で実行します: {}", granted["server_name"], granted["gpu_devices"], task_id))
            try:
                code = job.run({**environment, **job_environment(granted)})
            except OSError as error:  # it has vanished meanwhile
                refusal = not_started(error)
                show_error(f"✗ {refusal}")
                code = refusal.code
    except (ResourceManagerError, KeyboardInterrupt) as error:
        if code is None:
            raise
        # The job's exit code stands; what it held is taken back by the next change of anybody.
        show_error(say("✗ 解放を記録できませんでした: {}\n  対処: 次のコマンドが自動で回収します", error))
    return (code, {**granted, "exit_code": code}, lambda _: "")


def cmd_release(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    task_id = args.release
    args.output.progress(say("リソース解放を試行中: {}", task_id))
    if not manager.release_resources(task_id, force=args.force):
        raise unknown_task(task_id)
    return (EXIT_OK, {"task_id": task_id}, lambda _: say("✓ リソース解放完了: {}\n✓ リソース解放成功！", task_id))


def cmd_stop(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    task_id, grace_s = args.stop, 10.0 if args.grace is None else args.grace
    args.output.progress(say("タスクのプロセスを終了中: {}", task_id))
    if not manager.stop_task(task_id, grace_s, force=args.force):
        raise unknown_task(task_id)
    return (EXIT_OK, {"task_id": task_id}, lambda _: say("✓ プロセスは終了し、GPU は空きました: {}", task_id))


def unknown_task(task_id: str) -> Refusal:
    from gpu_resource_manager_v01 import UNKNOWN_TASK

    remedy = say("--detail で実行中のタスクIDを確認してください")
    return Refusal(EXIT_NO, "unknown_task", say(UNKNOWN_TASK) % task_id, remedy, {"task_id": task_id})


def show_warnings() -> None:
    """Show what the library warns of, such as that a task still runs."""
    import logging

    from gpu_resource_manager_v01 import UNKNOWN_TASK

    notes = logging.Handler(logging.WARNING)
    notes.addFilter(lambda record: record.msg != say(UNKNOWN_TASK))  # that is a refusal here
    notes.emit = lambda record: show_error(say("注意: {}", record.getMessage()))  # type: ignore[method-assign]
    logging.getLogger("gpu_resource_manager_v01").addHandler(notes)


def cmd_reset(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    from gpu_resource_manager_v01 import StateFileError

    if not args.yes:
        if sys.stdin is None or not sys.stdin.isatty():
            problem = say("確認するための端末がないため、リセットしません")
            remedy = say("確認を省くには --reset --yes を指定してください")
            raise Refusal(EXIT_USAGE, "not_confirmed", problem, remedy)
        try:
            tasks = manager.get_overview()["tasks"]
        except StateFileError:  # which is what a reset is for
            tasks = []
        cleared = ", ".join(task["task_id"] for task in tasks if task["kind"] != "job" or args.force)
        # On stderr, for stdout may be a file.
        show_error(say("警告：すべての実行中タスクの記録がクリアされます！"))
        show_error(say("  ファイル: {}\n  消える記録: {}", manager.resource_file, cleared or say("なし")))
        show_error(say("続行しますか？ [y/N]:"))
        if sys.stdin.readline().strip().lower() not in ("y", "yes", "はい"):
            remedy = say("消してよければ y と答えてください")
            raise Refusal(EXIT_NO, "not_confirmed", say("リセットを中止しました"), remedy)
    # Without a word to the contrary, another description is refused while there are tasks.
    force = True if args.force else None if args.yes or (args.servers is None and args.min_gpus is None) else False
    manager.reset_resources(args.servers, args.min_gpus, force=force)
    return (EXIT_OK, {"resource_file": manager.resource_file}, lambda _: say("✓ システムリセット完了"))


def cmd_add_server(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    name, gpus, cpus = args.add_server
    server_id = manager.add_server(name, gpus, cpus)
    result = {"server_id": server_id, "server_name": name, "total_gpus": gpus, "total_cpus": cpus}
    return (EXIT_OK, result, lambda _: say("✓ サーバーを追加しました: {} (ID: {})", name, server_id))


def cmd_remove_server(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    name = args.remove_server
    manager.remove_server(name)
    return (EXIT_OK, {"server_name": name}, lambda _: say("✓ サーバーを外しました: {}", name))


def cmd_disable(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    name, gpus = args.disable
    result = {"server_name": name, "disabled": manager.disable(name, gpus, args.reason or "")}
    lines = [f"✓ {line}" for line in render_disabled([result])]
    lines.append(say("  そこで動いているタスクは、終わるまでそのまま続きます"))
    return (EXIT_OK, result, lambda _: "\n".join(lines))


def cmd_enable(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    name, gpus = args.enable
    manager.enable(name, gpus)
    what = name if gpus is None else say("{} の GPU {}", name, ranges(gpus))
    return (EXIT_OK, {"server_name": name}, lambda _: say("✓ 使用を再開しました: {}", what))


# --- The parser -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def _get_formatter(self) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(self.prog, width=80)  # without a width, it imports ``shutil`` to find one

    def error(self, message: str) -> NoReturn:
        remedy = say("{} --help で使い方を確認してください", COMMAND)
        raise Refusal(EXIT_USAGE, "usage", say("引数が正しくありません: {}", message), remedy)


def is_number(text: str) -> bool:
    """Tell whether it is a plain decimal number; ``int`` would take "1_0", " 4" and digits of other scripts."""
    return text.isascii() and text.isdigit() and len(text) <= 9


def integer(text: str) -> int:
    if not is_number(text.removeprefix("-")):
        raise argparse.ArgumentTypeError(say("整数ではありません: {!r}", text))
    return int(text)


def seconds(text: str) -> float:
    """Return a time in seconds: 90, 1.5, 90s, 5m, 2h or 1d."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number = text[:-1] if text[-1:] in units else text
    if not all(map(is_number, number.split(".", 1))):
        raise argparse.ArgumentTypeError(say("時間ではありません (90、5m、2h、1d のように指定します): {!r}", text))
    return float(number) * units.get(text[-1], 1)


def server_description(text: str) -> ServerDescription:
    name, *counts = text.rsplit(":", 2)
    if len(counts) != 2:
        raise argparse.ArgumentTypeError(say("NAME:GPUS:CPUS の形ではありません: {!r}", text))
    gpus, cpus = map(integer, counts)
    return name, gpus, cpus


def gpus_of_server(text: str) -> tuple[str, list[int] | None]:
    """Return a server and GPUs on it; ``None``: all of them."""
    name, colon, gpus = text.rpartition(":")
    return (name, [integer(gpu) for gpu in gpus.split(",")]) if colon else (text, None)


def task_request(values: Sequence[str]) -> tuple[str, int, int]:
    task_id, gpus, cpus = values
    return task_id, integer(gpus), integer(cpus)


#: a text of its own, for argparse would take a fifth of a start to make one
HELP = """\
usage: {} コマンド [オプション]

GPU リソースマネージャー: 数台の GPU サーバーを数人で共有する

コマンド:
  --init                           状態ファイルがなければ作成する
  --status                         リソース状態を表示する
  --detail                         サーバーとタスクの詳細を表示する
  --allocate TASK_ID GPUS CPUS     タスクに GPU と CPU を割り当てる
  --run TASK_ID GPUS CPUS -- コマンド …
                                   コマンドをこの計算機の GPU で実行し、終わったら解放する
  --release TASK_ID                タスクのリソースを解放する
  --stop TASK_ID                   タスクのプロセスを終了させて解放する
  --reset                          すべてのタスクの記録を消す (確認あり)
  --add-server NAME:GPUS:CPUS      サーバーを追加する
  --remove-server NAME             使われていないサーバーを外す
  --disable NAME[:GPU,…]           サーバーか GPU に新しいタスクを入れない
  --enable NAME[:GPU,…]            その使用を再開する
  --version                        バージョンを表示する
  -h, --help                       この使い方を表示する
  TASK_ID を - にすると、--allocate と --run は重ならない名前を付けて、それを表示する

オプション:
  --prefer-server ID               --allocate で優先するサーバーの ID か名前
  --wait [SECONDS]                 --allocate と --run で、空くまで順番を待つ (90、5m、2h、1d。省くと無期限)
  --export                         --allocate の結果を eval "$(…)" のための行で出力する
  --force                          --release、--stop で他の利用者のタスクも対象にする。
                                   --release、--reset で動いているタスクの記録も消す
  --grace SECONDS                  --stop で強制終了するまでの秒数 (指定しなければ 10)
  --server NAME:GPUS:CPUS          --init と --reset で実際のサーバーを登録する (繰り返し可)
  --detect                         --init と --reset でこの計算機を調べて登録する
  --min-gpus N                     --init と --reset で 1 タスクの最小 GPU 数を決める
  --reason TEXT                    --disable の理由 (--status に表示される)
  --watch [SECONDS]                --status を Ctrl-C まで繰り返す (秒数を省くと 2)
  --yes                            --reset の確認を省く
  --json                           結果を 1 つの JSON 文書で出力する

環境変数:
  GPU_RESOURCE_FILE                状態ファイル (なければ /etc/gpu-resource-file の 1 行目)
  GPU_RESOURCE_SERVER              この計算機にあたるサーバーの名前
  GPU_RESOURCE_LANG                en: English

終了コード:
  0 成功 / 1 答えは「いいえ」 / 2 引数の誤り / 74 読み書きの失敗 / 75 後で再試行 /
  125 --run の失敗 / 126 実行不可 / 127 コマンドなし / 130 中断
"""


def build_parser() -> Parser:
    parser = Parser(prog="cli_v01.py", allow_abbrev=False, add_help=False)
    commands = parser.add_mutually_exclusive_group()
    for command in (cmd_init, cmd_status, cmd_detail, cmd_reset):
        commands.add_argument(option_of(command), dest="command", action="store_const", const=command)
    for command in WITH_VALUE:
        count = 3 if command in (cmd_allocate, cmd_run) else None
        commands.add_argument(option_of(command), nargs=count, action="append")
    commands.add_argument("--version", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--json", action="store_true")
    for option, (_, settings) in OPTIONS.items():
        parser.add_argument(option, **(settings or {"action": "store_true"}))
    return parser


def option_of(command: Callable[..., Answer]) -> str:
    return "--" + command.__name__.removeprefix("cmd_").replace("_", "-")


#: of the commands that need a value, what makes it of the words
WITH_VALUE: dict[Callable[..., Answer], Callable[[Any], Any]] = {
    cmd_allocate: task_request,
    cmd_run: task_request,
    cmd_release: str,
    cmd_stop: str,
    cmd_add_server: server_description,
    cmd_remove_server: str,
    cmd_disable: gpus_of_server,
    cmd_enable: gpus_of_server,
}

#: with which commands an option can be used, and what ``argparse`` is told about it
OPTIONS: dict[str, tuple[list[Callable[..., Answer]], dict[str, Any]]] = {
    "--prefer-server": ([cmd_allocate], {"metavar": "ID"}),
    "--wait": ([cmd_allocate, cmd_run], {"nargs": "?", "type": seconds, "const": float("inf"), "metavar": "SECONDS"}),
    "--export": ([cmd_allocate], {}),
    "--force": ([cmd_release, cmd_stop, cmd_reset], {}),
    "--grace": ([cmd_stop], {"type": seconds, "metavar": "SECONDS"}),
    "--server": ([cmd_init, cmd_reset], {"action": "append", "type": server_description, "dest": "servers"}),
    "--detect": ([cmd_init, cmd_reset], {}),
    "--min-gpus": ([cmd_init, cmd_reset], {"type": integer, "metavar": "N"}),
    "--reason": ([cmd_disable], {"metavar": "TEXT"}),
    "--watch": ([cmd_status], {"nargs": "?", "type": seconds, "const": 2.0, "metavar": "SECONDS"}),
    "--yes": ([cmd_reset], {}),
}


def parse(parser: Parser, words: Sequence[str], job: list[str] | None) -> argparse.Namespace:
    """Read the words before ``--``; ``command`` is the function to call, or ``None`` if none was asked for."""
    for word in words:
        if safe(word) != word or "\n" in word:  # no refusal, by whomever, is to show it as it is
            parser.error(say("制御文字を含む引数は使えません: {!r}", word))
    args = parser.parse_args(words)
    args.job = job
    if args.help and not args.export:
        args.command = None
        return args
    for command, value_of in WITH_VALUE.items():
        option = option_of(command)
        name = option.removeprefix("--").replace("-", "_")
        values = getattr(args, name) or []
        if len(values) > 1:  # argparse would forget all but the last
            parser.error(say("{} は一度だけ指定してください", option))
        for value in values:
            args.command = command
            try:
                setattr(args, name, value_of(value))
            except argparse.ArgumentTypeError as error:
                parser.error(f"argument {option}: {error}")
    if (args.command is cmd_run) != bool(job):
        parser.error(say("コマンドは --run TASK_ID GPUS CPUS -- COMMAND … の形で指定してください"))
    for option, (commands, settings) in OPTIONS.items():
        given = getattr(args, settings.get("dest", option.removeprefix("--").replace("-", "_")))
        if given is not None and given is not False and args.command not in commands:
            parser.error(say("{} は {} と一緒に指定してください", option, say("・").join(map(option_of, commands))))
    for one, other in (("json", "export"), ("detect", "servers"), ("json", "watch")):
        if getattr(args, one) and getattr(args, other) is not None and getattr(args, other) is not False:
            parser.error(say("--{} と --{} は一緒に指定できません", one, other.removesuffix("s")))
    return args


# --- Output and main ------------------------------------------------------------------------------


class Output:
    """What differs with ``--json`` (for programs) and ``--export`` (for ``eval`` in a shell): told apart only here."""

    def __init__(self, words: Sequence[str]) -> None:  # be they right or wrong otherwise
        self.json, self.export = "--json" in words, "--export" in words

    def _json(self, **content: object) -> str:
        import json

        document = {"schema": SCHEMA, **content}
        text = json.dumps(document, ensure_ascii=False, allow_nan=False, default=str)
        # Exact in every locale: what it lacks, or what no screen is to show as it is, is escaped.
        return text if can_show(text) else json.dumps(document, allow_nan=False, default=str)

    def progress(self, text: str) -> None:
        """Tell people what a command is about to do."""
        if not self.json and not self.export:
            show(text)

    def done(self, answer: Answer) -> tuple[int, str]:
        """Return the exit code and what goes to stdout."""
        code, result, render = answer
        if self.json:  # on a line of its own, whatever a job has written ahead of it
            return code, "\n" * ("exit_code" in result) + self._json(ok=True, result=result)
        if self.export and "gpu_devices" in result:
            from gpu_resource_extensions.run_job import job_environment

            return code, "\n".join(f"export {name}={quote(it)}" for name, it in job_environment(result).items())
        return code, render(result)

    def refused(self, refusal: Refusal, code: int) -> tuple[int, str]:
        """Return the same for a command that was not carried out; people are told on stderr."""
        if self.json:
            return code, self._json(ok=False, error={"code": refusal.name, "message": str(refusal), **refusal.facts})
        show_error(f"✗ {refusal}")
        # Hides every GPU, then fails, so that no job starts on all of them; -1, for an empty value counts as unset.
        return code, f"export CUDA_VISIBLE_DEVICES=-1\n(exit {code})" if self.export else ""


def safe(text: str) -> str:
    """Return lines of text without what could harm the terminal: from an argument, or from a path."""
    if text.replace("\n", "").isprintable():  # what can be printed is safe
        return text
    from gpu_resource_manager_v01 import printable

    return "\n".join(map(printable, text.split("\n")))


def can_show(text: str) -> bool:
    """Tell whether stdout would get ``text`` exactly as it is."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        return text.encode(encoding).decode(encoding) == text == safe(text)
    except UnicodeError:
        return False


def show(text: str) -> None:
    """Write a text to stdout at once; another ``OSError`` is for ``main``."""
    try:
        print(safe(text), flush=True)
    except BrokenPipeError:  # a reader such as ``head`` goes when it has enough; the command goes on
        discard(sys.stdout)


def show_error(text: str) -> None:
    """Write a text to stderr at once, in the place of the line of a wait."""
    if sys.stderr is not None:  # print(file=None) would write to stdout
        try:
            print(("\r\x1b[K" if WaitingLine.stands else "") + safe(text), file=sys.stderr, flush=True)
            WaitingLine.stands = False
        except OSError:  # nowhere is left to say so
            discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Drop what a broken stream still holds, or the next to write, be it an exit, would try it once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def carry_out(words: Sequence[str], job: list[str] | None, output: Output) -> tuple[int, str]:
    """Carry out one command or raise :class:`Refusal`; here alone errors of the library become exit codes."""
    if os.environ.get("GPU_RESOURCE_LANG") not in (None, "", "ja", "en"):
        language, remedy = os.environ["GPU_RESOURCE_LANG"], "ja か en を指定するか、指定をやめてください"
        raise Refusal(EXIT_USAGE, "usage", say("GPU_RESOURCE_LANG の言語はありません: {!r}", language), say(remedy))
    help_alone = not ({*words} - {"-h", "--help", "--json"} or job)
    if not help_alone:
        args = parse(build_parser(), words, job)
        args.output = output
        if args.export and args.allocate and not can_show(args.allocate[0]):
            problem = say("タスクIDを正確に出力できません: {!r}", args.allocate[0])
            remedy = say("この端末の文字コードで表せるタスクIDを指定してください")
            raise Refusal(EXIT_USAGE, "usage", problem, remedy)
    if help_alone or args.help or (args.command is None and not args.version):
        text = say(HELP, COMMAND)
        return output.done((EXIT_OK, {"help": text}, lambda _: text.rstrip()))
    if args.version:
        return output.done((EXIT_OK, {"version": VERSION}, lambda _: say("GPU リソースマネージャー v{}", VERSION)))
    try:
        import gpu_resource_manager_v01 as library

        try:
            if args.detect:
                from gpu_resource_extensions.detect_gpus import detected_server

                args.servers = [detected_server()]
            if args.command not in (cmd_init, cmd_status, cmd_detail):  # who changes the pool loads ``logging`` anyway
                show_warnings()
            described = {} if args.command is cmd_reset else {"servers": args.servers, "min_gpus": args.min_gpus}
            create = {cmd_init: True, cmd_status: False, cmd_detail: False}.get(args.command)
            return output.done(args.command(library.GPUResourceManagerV01(create=create, **described), args))
        except library.MissingPackageError:
            raise
        except library.ResourceManagerError as error:
            codes = [CODES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in CODES]
            raise Refusal(*(codes or [(EXIT_IO, "state_file")])[0], str(error), facts=vars(error)) from error
    except ImportError as error:
        problem = say("必要なパッケージを読み込めません: {}", getattr(error, "reason", error))
        remedy = "python3 -m venv .venv && .venv/bin/pip install -r requirements_v01.txt を実行してください"
        if "gpu_resource_extensions" in str(error):
            remedy = "gpu_resource_extensions を cli_v01.py と同じディレクトリに置いてください"
        raise Refusal(EXIT_USAGE, "missing_package", problem, say(remedy)) from error


#: exit code and name for programs of each error; all others are about the state file
CODES = {
    "DuplicateTaskError": (EXIT_USAGE, "duplicate_task"),
    "InvalidRequestError": (EXIT_USAGE, "invalid_request"),
    "KeeperError": (EXIT_OURS, "not_started"),
    "DetectionError": (EXIT_USAGE, "detection_failed"),
    "NotOwnerError": (EXIT_NO, "not_owner"),
    "TaskRunningError": (EXIT_NO, "task_running"),
    "NotStoppableError": (EXIT_NO, "not_stoppable"),
    "PoolConflictError": (EXIT_NO, "pool_conflict"),
    "ServerNeededError": (EXIT_NO, "server_needed"),
    "NoPoolError": (EXIT_IO, "no_pool"),
    "NoCapacityError": (EXIT_AGAIN, "no_capacity"),
    "LockTimeoutError": (EXIT_AGAIN, "lock_timeout"),
}


def answer(words: Sequence[str], job: list[str] | None) -> tuple[int, str]:
    """Return exit code and stdout of one command, be it carried out, refused or interrupted."""
    output = Output(words)
    try:
        return carry_out(words, job, output)
    except Refusal as refusal:
        refused = refusal
    except KeyboardInterrupt as stop:
        code = int(stop.args[0]) if isinstance(stop, Stopped) else EXIT_INTERRUPTED
        remedy = say("--detail で現在の状態を確認できます")
        refused = Refusal(code, "interrupted", say("中断しました"), remedy)
    is_ours = "--run" in words and refused.code in (EXIT_NO, EXIT_USAGE, EXIT_IO)
    return output.refused(refused, EXIT_OURS if is_ours else refused.code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a legacy encoding may lack ✓
    words, job = sys.argv[1:] if argv is None else list(argv), None
    if "--" in words:
        words, job = words[: words.index("--")], words[words.index("--") + 1 :]
    code = EXIT_IO  # until the command has done its work
    try:
        code, text = answer(words, job)
        if text:
            show(text)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            remedy = say("出力先を直し、--detail で現在の状態を確かめてください")
            show_error(say("✗ 出力できません: {}\n  対処: {}", error.strerror, remedy))
            code = EXIT_IO
        if sys.stdout is not None:
            discard(sys.stdout)
    except KeyboardInterrupt:  # while the answer was being written
        code = EXIT_INTERRUPTED
    return code


def end_waits_on_signals() -> None:
    """Let SIGTERM and SIGHUP end a wait like Ctrl-C, with its place in line given up."""
    import signal

    def stop(number: int, frame: object) -> NoReturn:
        raise Stopped(128 + number)

    for terminating in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(terminating) is signal.SIG_DFL:  # else somebody, such as nohup, ignores it for us
            signal.signal(terminating, stop)


def see_packages_beside_us() -> None:
    """Let the packages of the ``.venv`` beside this file be found by an interpreter that has none of its own."""
    beside = os.path.join(os.path.dirname(os.path.realpath(__file__)), ".venv")
    if os.path.realpath(sys.prefix) != beside and os.path.isdir(beside + "/lib"):
        for version in os.listdir(beside + "/lib"):
            sys.path.append(f"{beside}/lib/{version}/site-packages")


def run() -> NoReturn:
    """Be the command: of a script, and of the console script of an installation."""
    global COMMAND
    name = os.path.basename(sys.argv[0])
    COMMAND = COMMAND if name.endswith(".py") else name
    if {*sys.argv[1:]} - {"-h", "--help", "--json"}:
        end_waits_on_signals()
    see_packages_beside_us()
    # Without our modules in their compiled form a start takes a quarter longer. Containers that set this mean
    # the packages that they have compiled already, and ``python -B`` means it.
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        sys.dont_write_bytecode = False
    # All is written and flushed; taking the interpreter apart, import by import, is a tenth of a start.
    os._exit(main())


if __name__ == "__main__":
    run()
