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

import gc
import io
import os

TYPE_CHECKING = False
if TYPE_CHECKING:  # imports are most of a start, so the others stand where they are used
    import argparse
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
EXIT_INTERRUPTED = 130  # 128 + SIGINT

COMMAND = "python cli_v01.py"  # as hints name us; ``run`` knows better
IS_COMMAND = False  # nothing else is done in this process
VERSION = "0.1"
SCHEMA = 1  # of the documents that ``--json`` prints


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


def title(text: str, wide: int = 77) -> str:
    rest = wide - 2 - sum(2 if letter > "\u3000" else 1 for letter in text)  # Japanese letters take two columns each
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
    bar = DataRow("│", "│", "│")
    ends = Line("┌", "─", "┬", "┐"), None, None, Line("└", "─", "┴", "┘")
    # The style ``simple_outline`` without padding, so that 80 columns hold it. The headings are a row like any other,
    # for ``tabulate`` would add two columns to each; and "1e5" is a name, no cell is to be read as a number.
    style, align = TableFormat(*ends, bar, bar, 0, None), ["left"] + ["center"] * 5
    table = tabulate([list(map(say, headers)), *rows], tablefmt=style, colalign=align, disable_numparse=True)
    top, heading, *rest = table.split("\n")
    table = "\n".join([top, heading, top.translate(str.maketrans("┌┬┐", "├┼┤")), *rest])
    lines, beyond, path = render_totals(summary), beside("screens"), summary["resource_file"]
    if beyond:
        lines = [beyond.cut(line, beyond.screen()[0]) for line in lines]
        lines += beyond.render_below(summary)
        path = beyond.cut_path(path, say("プール: {}", ""))  # --detail shows it whole
    head = [title(say("GPU リソース状態"), len(top)), table, ""]
    return "\n".join([*head, *lines, "", *render_pool(path, summary["last_updated"], summary["made_up"])])


def beside(name: str) -> Any:
    """Return a module that two files can do without for what the specification shows, or ``None`` without it."""
    import importlib

    try:
        return importlib.import_module(f"gpu_resource_extensions.{name}")
    except ImportError:
        return None


def render_pool(path: str, is_there: object, is_made_up: bool) -> list[str]:
    """Return which pool a screen shows, and whether it is a real one."""
    lines = [say("プール: {}", path)]
    if not is_there:
        lines.append(say("  まだありません。最初の割り当てか --init が作ります"))
    if is_made_up:
        how = "--reset" if is_there else "--init"
        lines.append(say("  架空のサーバー (登録: {0} --detect か {0} --server NAME:GPUS:CPUS)", how))
    return lines


def render_totals(summary: Mapping[str, Any]) -> list[str]:
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
    return lines


def render_detail(state: Mapping[str, Any]) -> str:
    from gpu_resource_manager_v01 import usable_cpus

    lines = [title(say("GPU リソース詳細"))]
    for server in state["servers"]:
        gpus = server["available_gpus"]
        lines += [
            f"{server['server_name']} (ID: {server['server_id']})",
            say("  利用可能GPU: {} ({}/{})", gpus, len(gpus), server["total_gpus"]),
            say("  利用可能CPU: {}/{}", usable_cpus(server), server["total_cpus"]),
        ]
        if "disabled" in server and (beyond := beside("screens")):
            lines += beyond.render_disabled([server])
        lines.append(say("  実行中タスク: {}", len(server["running_tasks"])))
        for task in server["running_tasks"]:
            lines += [
                f"    - {task['task_id']}" + (say(" (終了済み: 次の変更で回収)") if task.get("ended") is True else ""),
                f"      GPU ID: {task['allocated_gpus']}",
                say("      CPU数: {}", task["allocated_cpus"]),
                say("      開始時刻: {}", task["start_time"]),
            ]
            if "user" in task:
                who = f"{task['user']}@{task.get('host')} (PID {task.get('pid')})"
                lines.append(say("      要求元: {}", who.replace("\n", "?")))
            for process in task.get("processes", ()):
                who = f"{process['pid']} ({process['user']}) {process['command']}".rstrip()
                lines.append(say("      プロセス: {}", who))
        lines.append("")
    for position, request in enumerate(state.get("waiting", []), start=1):
        asked = request["required_gpus"], request["required_cpus"], str(request.get("user")).replace("\n", "?")
        line = say("待機中 {}: {} (GPU {}, CPU {}, {})", position, request["task_id"], *asked)
        lines.append(line + (say(" (終了済み)") if request.get("ended") is True else ""))
    lines.append(say("最終更新: {}", state["last_updated"]))
    return "\n".join([*lines, *render_pool(state["resource_file"], state["last_updated"], state["made_up"])])


def render_allocation(allocation: Mapping[str, Any]) -> str:
    from gpu_resource_manager_v01 import quoted

    devices = allocation["gpu_devices"]
    server = say("  サーバー: {}\n  GPU ID: {}\n", allocation["server_name"], allocation["gpu_ids"])
    cpus = say("  CPU数: {}\n", allocation["cpu_count"])
    release = f"  {COMMAND} --release {quoted(allocation['task_id'])}"
    return (
        say("✓ リソース割り当て成功:\n{}{}\n", server, cpus)
        + say("✓ リソース割り当て成功！\n{}  GPUデバイス文字列: {}\n{}\n", server, devices, cpus)
        + say("使用ヒント:\n  export CUDA_VISIBLE_DEVICES={}\n  export CUDA_DEVICE_ORDER=PCI_BUS_ID\n\n", devices)
        + say("リソース解放:\n{}", release)
    )


# --- Commands -------------------------------------------------------------------------------------


def cmd_init(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    def render(facts: Mapping[str, Any]) -> str:
        head = say("✓ 初期化完了 (既存の状態は上書きしません): {}\n", facts["resource_file"])
        # Of the lines about the pool, whether it is a real one: where it is stands at the head.
        return "\n".join([head, *render_totals(facts), *render_pool("", True, facts["made_up"])[1:]])

    return (EXIT_OK, status_facts(manager), render)  # construction has made it


def status_facts(manager: GPUResourceManagerV01) -> dict[str, Any]:
    return {"resource_file": manager.resource_file, **manager.get_overview()}


def cmd_status(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    if args.watch is not None:
        from gpu_resource_extensions.screens import watch

        watch(lambda: safe(render_status(status_facts(manager))), args.watch)
    return (EXIT_OK, status_facts(manager), render_status)


def cmd_detail(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    from gpu_resource_manager_v01 import is_made_up

    state = manager.get_detailed_status()
    facts = {**state, "resource_file": manager.resource_file, "made_up": is_made_up(state)}
    return (EXIT_OK, facts, render_detail)


def cmd_allocate(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    from gpu_resource_manager_v01 import NoCapacityError

    task_id, gpus, cpus = args.allocate
    if task_id == "-":
        from gpu_resource_extensions.run_job import new_task_id

        task_id = new_task_id(["reservation"])
    text = "リソース割り当てを試行中:\n  タスクID: {}\n  GPU数: {}\n  CPU数: {}\n"
    args.output.progress(say(text, task_id, gpus, cpus))  # ahead of the wait for the lock
    prefer, beyond = None, beside("screens") if args.wait is not None else None
    line = beyond.WaitingLine(show_error) if beyond else None
    if args.prefer_server is not None:
        servers = beside("servers")  # two files are enough for ids
        known = servers and manager.get_resource_summary()["servers"]
        prefer = servers.server_id_of(args.prefer_server, known) if servers else integer(args.prefer_server)
    try:
        allocation = manager.obtain_resources(
            task_id, gpus, cpus, prefer, wait_s=args.wait or 0, on_wait=line, local=args.export
        )
    except NoCapacityError as error:
        code = EXIT_NO if args.wait is None else EXIT_AGAIN
        raise Refusal(code, "no_capacity", say("リソース不足: {}", error), when_to_retry(args), vars(error)) from error
    finally:
        if line:
            line.end()
    # The order is that of NVML, by which the pool counts; CUDA's own puts the fastest card first.
    return (EXIT_OK, {**allocation, "cuda_device_order": "PCI_BUS_ID"}, render_allocation)


def when_to_retry(args: argparse.Namespace) -> str:
    text = "空きが出てから再実行するか、--wait で待ってください"
    return say(text if args.wait is None else "空きが出てから再実行してください")


def cmd_release(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    args.output.progress(say("リソース解放を試行中: {}", args.release))
    if not manager.release_resources(args.release, force=args.force):
        raise unknown_task(args.release)
    text = "✓ リソース解放完了: {task_id}\n✓ リソース解放成功！"
    return (EXIT_OK, {"task_id": args.release}, lambda facts: say(text, **facts))


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
    if not args.yes:
        from gpu_resource_extensions.server_commands import ask_before_reset

        ask_before_reset(manager, args.force, show_error)
    # Without a word to the contrary, another description is refused while there are tasks.
    force = True if args.force else None if args.yes or (args.servers is None and args.min_gpus is None) else False
    manager.reset_resources(args.servers, args.min_gpus, force=force)
    return (EXIT_OK, {"resource_file": manager.resource_file}, lambda _: say("✓ システムリセット完了"))


def command_of(option: str) -> Callable[..., Answer]:
    """Return what carries out a command: a function above, or one of those that two files can do without."""
    name = "cmd_" + name_of(option)
    if name in globals():
        found: Callable[..., Answer] = globals()[name]
    else:
        from gpu_resource_extensions import server_commands

        found = getattr(server_commands, name)
    return found


def opened(args: argparse.Namespace) -> GPUResourceManagerV01:
    """Return what carries out the commands on the pool; ``--init`` and a description make one where there is none."""
    from gpu_resource_manager_v01 import GPUResourceManagerV01

    if args.detect:
        from gpu_resource_extensions.detect_gpus import detected_server

        args.servers = [detected_server()]
    if args.command not in ("--status", "--detail"):  # who changes the pool loads ``logging`` anyway
        show_warnings()
        from filelock import lock_descriptor  # noqa: F401 - needed anyway: known ahead of half an answer
    described = {} if args.command == "--reset" else {"servers": args.servers, "min_gpus": args.min_gpus}
    create = {"--init": True, "--status": False, "--detail": False}.get(args.command)
    limit: Any = {"lock_timeout_s": 10} if create is False else {}  # for a look nobody waits a minute
    return GPUResourceManagerV01(create=create, **limit, **described)


# --- The parser -----------------------------------------------------------------------------------


def wrong_usage(message: str) -> NoReturn:
    remedy = say("{} --help で使い方を確認してください", COMMAND)
    raise Refusal(EXIT_USAGE, "usage", say("引数が正しくありません: {}", message), remedy)


def wrong_value(template: str, text: str) -> argparse.ArgumentTypeError:
    from argparse import ArgumentTypeError

    return ArgumentTypeError(say(template, text))


def is_number(text: str) -> bool:
    """Tell whether it is a plain decimal number; ``int`` would take "1_0", " 4" and digits of other scripts."""
    return text.isascii() and text.isdigit() and len(text) <= 9


def integer(text: str) -> int:
    if not is_number(text.removeprefix("-")):
        raise wrong_value("整数ではありません: {!r}", text)
    return int(text)


def seconds(text: str) -> float:
    """Return a time in seconds: 90, 1.5, 90s, 5m, 2h or 1d."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number = text[:-1] if text[-1:] in units else text
    if not all(map(is_number, number.split(".", 1))):
        raise wrong_value("時間ではありません (90、5m、2h、1d のように指定します): {!r}", text)
    return float(number) * units.get(text[-1], 1)


def server_description(text: str) -> ServerDescription:
    name, *counts = text.rsplit(":", 2)
    if len(counts) != 2:
        raise wrong_value("NAME:GPUS:CPUS の形ではありません: {!r}", text)
    gpus, cpus = map(integer, counts)
    return name, gpus, cpus


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
  --reclaim                        この計算機で終了したタスクを回収する (定期実行用)
  --metrics FILE                   Prometheus のメトリクスをファイルに書く (node_exporter 用)
  --take CLAIM JOB                 --any と --on が接続先で使う (手では使わない)
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
  --wait [SECONDS]                 --allocate と --run で、空くまで待つ (90、5m、2h、1d。省くと無期限)
  --any                            --run を、空きのあるサーバーで ssh により実行する
  --on NAME                        --run を、そのサーバーで ssh により実行する
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
  GPU_RESOURCE_FILE                状態ファイルか postgresql:// か redis://
                                   (なければ /etc/gpu-resource-file の 1 行目)
  GPU_RESOURCE_SERVER              この計算機にあたるサーバーの名前
  GPU_RESOURCE_LANG                en: English
  GPU_RESOURCE_SSH                 --any と --on の ssh コマンド (なければ ssh)
  GPU_RESOURCE_REMOTE              その接続先のコマンド (なければ gpu-resource)

終了コード:
  0 成功 / 1 答えは「いいえ」 / 2 引数の誤り / 74 読み書きの失敗 / 75 後で再試行 /
  125 --run の失敗 / 126 実行不可 / 127 コマンドなし / 130 中断
"""


def build_parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(prog="cli_v01.py", allow_abbrev=False, add_help=False)
    # Without a width, it imports ``shutil`` to find one.
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=80)
    parser.error = wrong_usage  # type: ignore[method-assign]
    commands = parser.add_mutually_exclusive_group()
    for option in ("--init", "--status", "--detail", "--reset", "--reclaim"):
        commands.add_argument(option, dest="command", action="store_const", const=option)
    for option in WITH_VALUE:
        commands.add_argument(option, nargs={"--allocate": 3, "--run": 3, "--take": 2}.get(option), action="append")
    commands.add_argument("--version", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    for option, (_, settings) in OPTIONS.items():
        parser.add_argument(option, **(settings or {"action": "store_true"}))
    return parser


def name_of(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


#: of the commands that need a value, what makes it of the words
WITH_VALUE: dict[str, Callable[[Any], Any]] = {
    "--allocate": task_request,
    "--run": task_request,
    "--take": list,
    "--release": str,
    "--stop": str,
    "--add-server": server_description,
    "--remove-server": str,
    "--disable": str,
    "--enable": str,
    "--metrics": str,
}

#: with which commands an option can be used, all if none is named, and what ``argparse`` is told about it
OPTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "--prefer-server": (["--allocate"], {"metavar": "ID"}),
    "--wait": (["--allocate", "--run"], {"nargs": "?", "type": seconds, "const": float("inf"), "metavar": "SECONDS"}),
    "--any": (["--run"], {}),
    "--on": (["--run"], {"metavar": "NAME"}),
    "--export": (["--allocate"], {}),
    "--force": (["--release", "--stop", "--reset"], {}),
    "--grace": (["--stop"], {"type": seconds, "metavar": "SECONDS"}),
    "--server": (["--init", "--reset"], {"action": "append", "type": server_description, "dest": "servers"}),
    "--detect": (["--init", "--reset"], {}),
    "--min-gpus": (["--init", "--reset"], {"type": integer, "metavar": "N"}),
    "--reason": (["--disable"], {"metavar": "TEXT"}),
    "--watch": (["--status"], {"nargs": "?", "type": seconds, "const": 2.0, "metavar": "SECONDS"}),
    "--yes": (["--reset"], {}),
    "--json": ([], {}),
}


def parse(parser: argparse.ArgumentParser, words: Sequence[str], job: list[str] | None) -> argparse.Namespace:
    """Read the words before ``--``; ``command`` is the option that names it, or ``None`` if none was asked for."""
    from argparse import ArgumentTypeError

    for word in words:
        if safe(word) != word or "\n" in word:  # no refusal, by whomever, is to show it as it is
            wrong_usage(say("制御文字を含む引数は使えません: {!r}", word))
    args = parser.parse_args(words)
    args.job = job
    if args.help and not args.export:
        args.command = None
        return args
    for option, value_of in WITH_VALUE.items():
        values = getattr(args, name_of(option)) or []
        if len(values) > 1:  # argparse would forget all but the last
            wrong_usage(say("{} は一度だけ指定してください", option))
        for value in values:
            args.command = option
            try:
                setattr(args, name_of(option), value_of(value))
            except ArgumentTypeError as error:
                wrong_usage(f"argument {option}: {error}")
    if (args.command == "--run") != bool(job):
        wrong_usage(say("コマンドは --run TASK_ID GPUS CPUS -- COMMAND … の形で指定してください"))
    found = {option: getattr(args, name_of(settings.get("dest", option))) for option, (_, settings) in OPTIONS.items()}
    given = {option for option, value in found.items() if value is not None and value is not False}  # 0 is one
    for option in given:
        commands = OPTIONS[option][0]
        if commands and args.command not in commands:
            wrong_usage(say("{} は {} と一緒に指定してください", option, say("・").join(commands)))
    for one, other in (("--json", "--export"), ("--detect", "--server"), ("--json", "--watch"), ("--any", "--on")):
        if {one, other} <= given:
            wrong_usage(say("{} と {} は一緒に指定できません", one, other))
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
            from gpu_resource_manager_v01 import quoted

            return code, "\n".join(f"export {name}={quoted(it)}" for name, it in job_environment(result).items())
        return code, render(result)

    def refused(self, refusal: Refusal, code: int) -> tuple[int, str]:
        """Return the same for a command that was not carried out; people are told on stderr."""
        if self.json:
            return code, self._json(ok=False, error={"code": refusal.name, "message": str(refusal), **refusal.facts})
        text, remedy = f"✗ {refusal}", "\n" + say("  対処: {}", "")
        if "example" in refusal.facts:
            text = text.replace(remedy, "\n" + say("  例: {}", refusal.facts["example"]) + remedy)
        show_error(text)
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
    beyond = sys.modules.get("gpu_resource_extensions.screens")  # without it there is no such line
    if sys.stderr is not None:  # print(file=None) would write to stdout
        try:
            print((beyond.WaitingLine.cleared() if beyond else "") + safe(text), file=sys.stderr, flush=True)
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
    args = parse(build_parser(), words, job)
    args.output, args.tell, args.unknown_task, args.our_directory = output, show_error, unknown_task, our_directory
    if args.export and args.allocate and not can_show(args.allocate[0]):
        problem = say("タスクIDを正確に出力できません: {!r}", args.allocate[0])
        remedy = say("この端末の文字コードで表せるタスクIDを指定してください")
        raise Refusal(EXIT_USAGE, "usage", problem, remedy)
    if args.help or (args.command is None and not args.version):
        text = say(HELP, COMMAND)
        return output.done((EXIT_OK, {"help": text}, lambda _: text.rstrip()))
    if args.version:
        return output.done((EXIT_OK, {"version": VERSION}, lambda _: say("GPU リソースマネージャー v{}", VERSION)))
    try:
        import gpu_resource_manager_v01 as library

        try:
            manager = None if args.command == "--metrics" else opened(args)  # a pool that cannot be opened has some too
            return output.done(command_of(args.command)(manager, args))
        except library.MissingPackageError:
            raise
        except library.ResourceManagerError as error:
            code, name = code_of(error)
            remedy = when_to_retry(args) if name == "no_capacity" else ""
            raise Refusal(code, name, str(error), remedy, facts=vars(error)) from error
    except ImportError as error:
        problem = say("必要なパッケージを読み込めません: {}", getattr(error, "reason", error))
        remedy = "cd {} && python3 -m venv .venv && .venv/bin/pip install -r requirements_v01.txt を実行してください"
        if hasattr(error, "package"):  # that only this pool needs
            problem, _, remedy = str(error).partition("\n" + say("  対処: {}", ""))
            raise Refusal(EXIT_USAGE, "missing_package", problem, remedy) from error
        if "gpu_resource_extensions" in str(error):
            remedy = "gpu_resource_extensions を {} に置いてください"
        elif IS_COMMAND:
            go_on_in_own_environment()
        raise Refusal(EXIT_USAGE, "missing_package", problem, say(remedy, our_directory())) from error


#: exit code and name for programs of each error of the library; those of the extensions bear theirs
CODES = {
    "DuplicateTaskError": (EXIT_USAGE, "duplicate_task"),
    "InvalidRequestError": (EXIT_USAGE, "invalid_request"),
    "NotOwnerError": (EXIT_NO, "not_owner"),
    "TaskRunningError": (EXIT_NO, "task_running"),
    "PoolConflictError": (EXIT_NO, "pool_conflict"),
    "NoPoolError": (EXIT_IO, "no_pool"),
    "NoCapacityError": (EXIT_AGAIN, "no_capacity"),
    "LockTimeoutError": (EXIT_AGAIN, "lock_timeout"),
    "ResourceManagerError": (EXIT_IO, "state_file"),  # all others
}


def code_of(error: Exception) -> tuple[int, str]:
    """Return the exit code and the name for programs of an error."""
    code, name = next(CODES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in CODES)
    return getattr(error, "exit_code", code), getattr(error, "code", name)


def right_line(words: Sequence[str], job: list[str] | None) -> dict[str, str]:
    """Return as ``example`` a command near to one of wrong usage that would have worked, if there is any."""
    found = beside("right_input")
    line = found and found.right_line(words, job, lambda *tried: parse(build_parser(), *tried), Refusal)
    return {"example": f"{COMMAND} {line}"} if line else {}


def answer(words: Sequence[str], job: list[str] | None) -> tuple[int, str]:
    """Return exit code and stdout of one command, be it carried out, refused or interrupted."""
    output = Output(words)
    try:
        return carry_out(words, job, output)
    except Refusal as refusal:
        refused = refusal
        if refusal.name in ("usage", "invalid_request", "duplicate_task"):
            refused.facts = {**refusal.facts, **right_line(words, job)}
    except KeyboardInterrupt as stop:
        code = stop.args[0] if stop.args else EXIT_INTERRUPTED  # of a signal
        refused = Refusal(code, "interrupted", say("中断しました"), say("--detail で現在の状態を確認できます"))
    is_ours = ("--run" in words or "--take" in words) and refused.code in (EXIT_NO, EXIT_USAGE, EXIT_IO)
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
        raise KeyboardInterrupt(128 + number)

    for terminating in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(terminating) is signal.SIG_DFL:  # else somebody, such as nohup, ignores it for us
            signal.signal(terminating, stop)


def our_directory() -> str:
    return os.path.dirname(os.path.realpath(__file__))


def go_on_in_own_environment() -> None:
    """Begin anew as the Python of the ``.venv`` beside this file, if there is one and we are not it."""
    python = os.path.join(our_directory(), ".venv", "bin", "python")
    if os.path.exists(python) and sys.executable != python:
        os.execv(python, [python, *sys.argv])  # noqa: S606 - it is our own


def run() -> NoReturn:
    """Be the command: of a script, and of the console script of an installation."""
    global COMMAND, IS_COMMAND
    gc.set_threshold(100_000)  # a start leaves no garbage, and looking for some is a twentieth of it
    COMMAND = COMMAND if sys.argv[0].endswith(".py") else os.path.basename(sys.argv[0])
    end_waits_on_signals()
    IS_COMMAND = True
    # Without our modules in their compiled form a start takes a quarter longer. Containers that set this mean
    # the packages that they have compiled already, and ``python -B`` means it.
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        sys.dont_write_bytecode = False
    # All is written and flushed; taking the interpreter apart, import by import, is a tenth of a start.
    os._exit(main())


if __name__ == "__main__":
    run()
