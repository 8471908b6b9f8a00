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

import argparse
import io
import os
import sys

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

VERSION = "0.1"
SCHEMA = 1  # of the documents that ``--json`` prints


class Stopped(KeyboardInterrupt):
    """We are to end because of a signal; ends like a Ctrl-C, with another exit code."""


class Refusal(Exception):  # noqa: N818 - a "no" is an answer too
    """A command is not carried out: exit code, name for programs, text for people, further facts."""

    def __init__(self, code: int, name: str, problem: str, remedy: str = "", facts: Any = None) -> None:
        super().__init__(f"{problem}\n  対処: {remedy}" if remedy else problem)
        self.code, self.name, self.facts = code, name, facts or {}


# --- Rendering ------------------------------------------------------------------------------------


def render_status(summary: Mapping[str, Any]) -> str:
    from tabulate import tabulate

    headers = ["サーバー", "GPU利用可/合計", "GPU使用率", "CPU利用可/合計", "CPU使用率", "実行中タスク"]
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
    # A name such as "1e5" is a name: no cell is to be read as a number.
    align = ["left"] + ["center"] * 5
    table = tabulate(rows, headers, tablefmt="simple_outline", colalign=align, disable_numparse=True)
    return f"{'=' * 33} GPU リソース状態 {'=' * 33}\n{table}\n\n{render_totals(summary)}"


def render_totals(summary: Mapping[str, Any]) -> str:
    lines = [
        "合計:",
        f"  GPU: {summary['total_available_gpus']}/{summary['total_gpus']} 利用可能",
        f"  CPU: {summary['total_available_cpus']}/{summary['total_cpus']} 利用可能",
        f"  実行中タスク: {summary['total_running_tasks']}",
    ]
    if "total_waiting" in summary:
        lines.append(f"  待機中の要求: {summary['total_waiting']}")
    if "ended_tasks" in summary:
        lines.append(f"  終了済み (次の変更で回収): {', '.join(summary['ended_tasks'])}")
    return "\n".join(lines)


def render_detail(state: Mapping[str, Any]) -> str:
    lines = [f"{'=' * 33} GPU リソース詳細 {'=' * 33}"]
    for server in state["servers"]:
        lines += [
            f"{server['server_name']} (ID: {server['server_id']})",
            f"  利用可能GPU: {server['available_gpus']} ({len(server['available_gpus'])}/{server['total_gpus']})",
            f"  利用可能CPU: {server['available_cpus']}/{server['total_cpus']}",
            f"  実行中タスク: {len(server['running_tasks'])}",
        ]
        for task in server["running_tasks"]:
            lines += [
                f"    - {task['task_id']}" + (" (終了済み: 次の変更で回収)" if task.get("ended") is True else ""),
                f"      GPU ID: {task['allocated_gpus']}",
                f"      CPU数: {task['allocated_cpus']}",
                f"      開始時刻: {task['start_time']}",
            ]
            if "user" in task:
                who = f"      要求元: {task['user']}@{task.get('host')} (PID {task.get('pid')})"
                lines.append(who.replace("\n", "?"))
            for process in task.get("processes", ()):
                lines.append(f"      プロセス: {process['pid']} ({process['user']}) {process['command']}".rstrip())
        lines.append("")
    for position, request in enumerate(state.get("waiting", []), start=1):
        who = str(request.get("user")).replace("\n", "?")
        what = f"{request['task_id']} (GPU {request['required_gpus']}, CPU {request['required_cpus']}, {who})"
        lines.append(f"待機中 {position}: {what}" + (" (終了済み)" if request.get("ended") is True else ""))
    return "\n".join([*lines, f"最終更新: {state['last_updated']}"])


def render_allocation(allocation: Mapping[str, Any]) -> str:
    devices = allocation["gpu_devices"]
    server = f"  サーバー: {allocation['server_name']}\n  GPU ID: {allocation['gpu_ids']}\n"
    cpus = f"  CPU数: {allocation['cpu_count']}\n"
    return (
        f"✓ リソース割り当て成功:\n{server}{cpus}\n"
        f"✓ リソース割り当て成功！\n{server}  GPUデバイス文字列: {devices}\n{cpus}\n"
        f"使用ヒント:\n  export CUDA_VISIBLE_DEVICES={devices}\n  export CUDA_DEVICE_ORDER=PCI_BUS_ID\n\n"
        f"リソース解放:\n  python cli_v01.py --release {quote(allocation['task_id'])}"
    )


def quote(word: str) -> str:
    """Quote ``word`` for a POSIX shell, but only if it needs it: Japanese letters do not."""
    plain = word and all(letter.isalnum() or letter in "_@%+=:,./-" for letter in word)
    return word if plain else "'" + word.replace("'", "'\"'\"'") + "'"


class WaitingLine:
    """One line on stderr about the place in the queue: rewritten on a terminal, else printed anew."""

    def __init__(self, once: bool = False) -> None:
        self.once, self.shown = once, False
        self.terminal = sys.stderr is not None and sys.stderr.isatty()

    def __call__(self, position: int, reason: str) -> None:
        text = f"待機中 ({position} 番目): {reason.splitlines()[0]}"
        if self.terminal:
            from shutil import get_terminal_size

            fits = (get_terminal_size().columns or 80) // 2  # Japanese letters take two columns each
            print(f"\r\x1b[K{safe(text)[:fits]}", end="", file=sys.stderr, flush=True)
        elif not (self.once and self.shown):
            show_error(text)
        self.shown = True

    def end(self, text: str = "") -> None:
        """Put ``text`` in the place of the line."""
        if self.terminal and self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if text and (self.terminal or not self.shown):
            show_error(text)


# --- Commands -------------------------------------------------------------------------------------


def cmd_init(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    head = f"✓ 初期化完了 (既存の状態は上書きしません): {manager.resource_file}\n\n"
    result = {"resource_file": manager.resource_file, **manager.get_resource_summary()}  # construction has made it
    return (EXIT_OK, result, lambda summary: head + render_totals(summary))


def cmd_status(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    return (EXIT_OK, {**manager.get_resource_summary()}, render_status)


def cmd_detail(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    return (EXIT_OK, {**manager.get_detailed_status()}, render_detail)


def cmd_allocate(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    from gpu_resource_manager_v01 import NoCapacityError

    task_id, gpus, cpus = args.allocate
    # Shown before the wait for the lock, not after it.
    args.output.progress(f"リソース割り当てを試行中:\n  タスクID: {task_id}\n  GPU数: {gpus}\n  CPU数: {cpus}\n")
    line = WaitingLine()
    try:
        allocation = manager.obtain_resources(
            task_id, gpus, cpus, args.prefer_server, wait_s=args.wait or 0, on_wait=line, local=args.export
        )
    except NoCapacityError as error:
        code = EXIT_NO if args.wait is None else EXIT_AGAIN
        problem, remedy = f"リソース不足: {error}", "空きが出てから再実行するか、--wait で待ってください"
        raise Refusal(code, "no_capacity", problem, remedy, vars(error)) from error
    finally:
        line.end()
    # The order is that of NVML, by which the pool counts; CUDA's own puts the fastest card first.
    return (EXIT_OK, {**allocation, "cuda_device_order": "PCI_BUS_ID"}, render_allocation)


def cmd_run(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    from gpu_resource_extensions.leases import descendants
    from gpu_resource_extensions.run_job import Job, job_environment
    from gpu_resource_manager_v01 import ResourceManagerError, named_processes

    task_id, gpus, cpus = args.run
    line = WaitingLine(once=True)
    code, command = None, " ".join(map(quote, args.job))

    def say_who_is_left(pid: int) -> None:
        who = named_processes([process._asdict() for process in descendants(pid)])
        stop = f"終わるまで GPU は返りません (--stop {quote(task_id)} で終了できます)"
        show_error(f"注意: タスク {task_id} のプロセスがまだ動いています: {who}。{stop}")

    job = Job(args.job, say_who_is_left)
    try:
        with manager.allocation(
            task_id, gpus, cpus, wait_s=args.wait or 0, on_wait=line, command=command, keeper=job.kept
        ) as granted:
            line.end(f"✓ {granted['server_name']} の GPU {granted['gpu_devices']} で実行します: {task_id}")
            try:
                code = job.run({**os.environ, **job_environment(granted)})
            except OSError as error:
                show_error(f"✗ コマンドを実行できません: {args.job[0]}: {error.strerror}")
                code = EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE
    except (ResourceManagerError, KeyboardInterrupt) as error:
        if code is None:
            raise
        # The job's exit code stands; what it held is taken back by the next change of anybody.
        show_error(f"✗ 解放を記録できませんでした: {error}\n  対処: 次のコマンドが自動で回収します")
    return (code, {**granted, "exit_code": code}, lambda _: "")


def cmd_release(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    task_id = args.release
    args.output.progress(f"リソース解放を試行中: {task_id}")
    if not manager.release_resources(task_id, force=args.force):
        raise unknown_task(task_id)
    return (EXIT_OK, {"task_id": task_id}, "✓ リソース解放完了: {task_id}\n✓ リソース解放成功！".format_map)


def cmd_stop(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    task_id, grace_s = args.stop, 10.0 if args.grace is None else args.grace
    args.output.progress(f"タスクのプロセスを終了中: {task_id}")
    if not manager.stop_task(task_id, grace_s, force=args.force):
        raise unknown_task(task_id)
    return (EXIT_OK, {"task_id": task_id}, "✓ プロセスは終了し、GPU は空きました: {task_id}".format_map)


def unknown_task(task_id: str) -> Refusal:
    from gpu_resource_manager_v01 import UNKNOWN_TASK

    remedy = "--detail で実行中のタスクIDを確認してください"
    return Refusal(EXIT_NO, "unknown_task", UNKNOWN_TASK % task_id, remedy, {"task_id": task_id})


def show_warnings() -> None:
    """Show what the library warns of, such as that a task still runs."""
    import logging

    from gpu_resource_manager_v01 import UNKNOWN_TASK

    notes = logging.Handler(logging.WARNING)
    notes.addFilter(lambda record: record.msg != UNKNOWN_TASK)  # that is a refusal here
    notes.emit = lambda record: show_error(f"注意: {record.getMessage()}")  # type: ignore[method-assign]
    logging.getLogger("gpu_resource_manager_v01").addHandler(notes)


def cmd_reset(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    if not args.yes:
        if sys.stdin is None or not sys.stdin.isatty():
            problem, remedy = "確認するための端末がないため、リセットしません", "--reset --yes を指定してください"
            raise Refusal(EXIT_USAGE, "not_confirmed", problem, f"確認を省くには {remedy}")
        # On stderr, for stdout may be a file.
        show_error("警告：すべての実行中タスクの記録がクリアされます！\n続行しますか？ [y/N]:")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Refusal(EXIT_NO, "not_confirmed", "リセットを中止しました", "消してよければ y と答えてください")
    # Without a word to the contrary, another description is refused while there are tasks.
    force = True if args.force else None if args.yes or (args.servers is None and args.min_gpus is None) else False
    manager.reset_resources(args.servers, args.min_gpus, force=force)
    return (EXIT_OK, {"resource_file": manager.resource_file}, lambda _: "✓ システムリセット完了")


# --- The parser -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def _get_formatter(self) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(self.prog, width=80)  # without a width, it imports ``shutil`` to find one

    def error(self, message: str) -> NoReturn:
        remedy = "python cli_v01.py --help で使い方を確認してください"
        raise Refusal(EXIT_USAGE, "usage", f"引数が正しくありません: {message}", remedy)


def is_number(text: str) -> bool:
    """Tell whether it is a plain decimal number; ``int`` would take "1_0", " 4" and digits of other scripts."""
    return text.isascii() and text.isdigit() and len(text) <= 9


def integer(text: str) -> int:
    if not is_number(text.removeprefix("-")):
        raise argparse.ArgumentTypeError(f"整数ではありません: {text!r}")
    return int(text)


def seconds(text: str) -> float:
    if not all(map(is_number, text.split(".", 1))):
        raise argparse.ArgumentTypeError(f"秒数ではありません: {text!r}")
    return float(text)


def server_description(text: str) -> ServerDescription:
    name, *counts = text.rsplit(":", 2)
    if len(counts) != 2:
        raise argparse.ArgumentTypeError(f"NAME:GPUS:CPUS の形ではありません: {text!r}")
    gpus, cpus = map(integer, counts)
    return name, gpus, cpus


#: a text of its own, for argparse would take a fifth of a start to make one
HELP = """\
usage: cli_v01.py コマンド [オプション]

GPU リソースマネージャー: 数台の GPU サーバーを数人で共有する

コマンド:
  --init                           状態ファイルがなければ作成する
  --status                         リソース状態を表示する
  --detail                         サーバーとタスクの詳細を表示する
  --allocate TASK_ID GPUS CPUS     タスクに GPU (2-8) と CPU (1-64) を割り当てる
  --run TASK_ID GPUS CPUS -- コマンド …
                                   コマンドをこの計算機の GPU で実行し、終わったら解放する
  --release TASK_ID                タスクのリソースを解放する
  --stop TASK_ID                   タスクのプロセスを終了させて解放する
  --reset                          すべてのタスクの記録を消す (確認あり)
  --version                        バージョンを表示する
  -h, --help                       この使い方を表示する

オプション:
  --prefer-server ID               --allocate で優先するサーバー ID
  --wait [SECONDS]                 --allocate と --run で、空くまで順番を待つ (秒数を省くと無期限)
  --export                         --allocate の結果を eval "$(…)" のための行で出力する
  --force                          --release、--stop で他の利用者のタスクも対象にする。
                                   --release、--reset で動いているタスクの記録も消す
  --grace SECONDS                  --stop で強制終了するまでの秒数 (指定しなければ 10)
  --server NAME:GPUS:CPUS          --init と --reset で実際のサーバーを登録する (繰り返し可)
  --detect                         --init と --reset でこの計算機を調べて登録する
  --min-gpus N                     --init と --reset で 1 タスクの最小 GPU 数を決める
  --yes                            --reset の確認を省く
  --json                           結果を 1 つの JSON 文書で出力する

終了コード:
  0 成功 / 1 答えは「いいえ」 / 2 引数の誤り / 74 読み書きの失敗 / 75 後で再試行 /
  125 --run の失敗 / 126 実行不可 / 127 コマンドなし / 130 中断
"""


def build_parser() -> Parser:
    parser = Parser(prog="cli_v01.py", allow_abbrev=False, add_help=False)
    commands = parser.add_mutually_exclusive_group()
    for command in (cmd_init, cmd_status, cmd_detail, cmd_reset):
        commands.add_argument(option_of(command), dest="command", action="store_const", const=command)
    for command in (cmd_allocate, cmd_run):
        commands.add_argument(option_of(command), nargs=3, action="append", metavar=("TASK_ID", "GPUS", "CPUS"))
    for command in (cmd_release, cmd_stop):
        commands.add_argument(option_of(command), action="append", metavar="TASK_ID")
    commands.add_argument("--version", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--json", action="store_true")
    for option, (_, settings) in OPTIONS.items():
        parser.add_argument(option, **(settings or {"action": "store_true"}))
    return parser


def option_of(command: Callable[..., Answer]) -> str:
    return "--" + command.__name__.removeprefix("cmd_")


#: with which commands an option can be used, and what ``argparse`` is told about it
OPTIONS: dict[str, tuple[list[Callable[..., Answer]], dict[str, Any]]] = {
    "--prefer-server": ([cmd_allocate], {"type": integer, "metavar": "ID"}),
    "--wait": ([cmd_allocate, cmd_run], {"nargs": "?", "type": seconds, "const": float("inf"), "metavar": "SECONDS"}),
    "--export": ([cmd_allocate], {}),
    "--force": ([cmd_release, cmd_stop, cmd_reset], {}),
    "--grace": ([cmd_stop], {"type": seconds, "metavar": "SECONDS"}),
    "--server": ([cmd_init, cmd_reset], {"action": "append", "type": server_description, "dest": "servers"}),
    "--detect": ([cmd_init, cmd_reset], {}),
    "--min-gpus": ([cmd_init, cmd_reset], {"type": integer, "metavar": "N"}),
    "--yes": ([cmd_reset], {}),
}


def parse(parser: Parser, words: Sequence[str], job: list[str] | None) -> argparse.Namespace:
    """Read the words before ``--``; ``command`` is the function to call, or ``None`` if none was asked for."""
    for word in words:
        if safe(word) != word or "\n" in word:  # no refusal, by whomever, is to show it as it is
            parser.error(f"制御文字を含む引数は使えません: {word!r}")
    args = parser.parse_args(words)
    args.job = job
    if args.help and not args.export:
        args.command = None
        return args
    for command in (cmd_allocate, cmd_run, cmd_release, cmd_stop):
        name = option_of(command).removeprefix("--")
        values = getattr(args, name) or []
        if len(values) > 1:  # argparse would forget all but the last
            parser.error(f"--{name} は一度だけ指定してください")
        for value in values:
            args.command = command
            try:
                one_word = command in (cmd_release, cmd_stop)
                setattr(args, name, value if one_word else (value[0], *map(integer, value[1:])))
            except argparse.ArgumentTypeError as error:
                parser.error(f"argument --{name}: {error}")
    if (args.command is cmd_run) != bool(job):
        parser.error("コマンドは --run TASK_ID GPUS CPUS -- COMMAND … の形で指定してください")
    for option, (commands, settings) in OPTIONS.items():
        given = getattr(args, settings.get("dest", option.removeprefix("--").replace("-", "_")))
        if given is not None and given is not False and args.command not in commands:
            parser.error(f"{option} は {'・'.join(map(option_of, commands))} と一緒に指定してください")
    for one, other in (("json", "export"), ("detect", "servers")):
        if getattr(args, one) and getattr(args, other):
            parser.error(f"--{one} と --{other.removesuffix('s')} は一緒に指定できません")
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
    """Write a text to stderr at once."""
    if sys.stderr is not None:  # print(file=None) would write to stdout
        try:
            print(safe(text), file=sys.stderr, flush=True)
        except OSError:  # nowhere is left to say so
            discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Drop what a broken stream still holds, or the next to write, be it an exit, would try it once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def carry_out(words: Sequence[str], job: list[str] | None, output: Output) -> tuple[int, str]:
    """Carry out one command or raise :class:`Refusal`; here alone errors of the library become exit codes."""
    help_alone = not ({*words} - {"-h", "--help", "--json"} or job)
    if not help_alone:
        if __name__ == "__main__":  # not in a program that calls ``main``: there, signals are its own
            end_waits_on_signals()
        args = parse(build_parser(), words, job)
        args.output = output
        if args.export and args.allocate and not can_show(args.allocate[0]):
            remedy = "この端末の文字コードで表せるタスクIDを指定してください"
            raise Refusal(EXIT_USAGE, "usage", f"タスクIDを正確に出力できません: {args.allocate[0]!r}", remedy)
    if help_alone or args.help or (args.command is None and not args.version):
        return output.done((EXIT_OK, {"help": HELP}, lambda _: HELP.rstrip()))
    if args.version:
        return output.done((EXIT_OK, {"version": VERSION}, "GPU リソースマネージャー v{version}".format_map))
    # Without our modules in their compiled form a start takes a quarter longer. Containers that set this mean
    # the packages that they have compiled already, and ``python -B`` means it.
    if os.environ.get("PYTHONDONTWRITEBYTECODE") and __name__ == "__main__":
        sys.dont_write_bytecode = False
    try:
        import gpu_resource_manager_v01 as library

        try:
            if args.detect:
                from gpu_resource_extensions.detect_gpus import detected_server

                args.servers = [detected_server()]
            if args.command not in (cmd_init, cmd_status, cmd_detail):  # who changes the pool loads ``logging`` anyway
                show_warnings()
            described = {} if args.command is cmd_reset else {"servers": args.servers, "min_gpus": args.min_gpus}
            return output.done(args.command(library.GPUResourceManagerV01(**described), args))
        except library.ResourceManagerError as error:
            codes = [CODES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in CODES]
            raise Refusal(*(codes or [(EXIT_IO, "state_file")])[0], str(error), facts=vars(error)) from error
    except ImportError as error:
        remedy = "python3 -m venv .venv && .venv/bin/pip install -r requirements_v01.txt を実行してください"
        if "gpu_resource_extensions" in str(error):
            remedy = "gpu_resource_extensions を cli_v01.py と同じディレクトリに置いてください"
        raise Refusal(EXIT_USAGE, "missing_package", f"必要なパッケージを読み込めません: {error}", remedy) from error


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
        refused = Refusal(code, "interrupted", "中断しました", "--detail で現在の状態を確認できます")
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
            remedy = "出力先を直し、--detail で現在の状態を確かめてください"
            show_error(f"✗ 出力できません: {error.strerror}\n  対処: {remedy}")
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


if __name__ == "__main__":
    # All is written and flushed; taking the interpreter apart, import by import, is a tenth of a start.
    os._exit(main())
