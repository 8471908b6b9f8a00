#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["filelock>=3.30", "tabulate[widechars]>=0.9"]
# ///
"""Command line of the GPU resource manager: parse, call the library, show the answer.

Results go to stdout; errors (``✗ …``, with what to do next) to stderr, never as a traceback.
Reads from the ground up: rendering (dict in, text out), commands, the parser, ``main``.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:  # imported where they are used: help and usage errors need neither
    import logging

    from gpu_resource_manager_v01 import Allocation, GPUResourceManagerV01, State, Summary

EXIT_OK = 0
EXIT_NO = 1  # the answer is no: no room, unknown task, not confirmed
EXIT_USAGE = 2  # wrong usage, bad parameters, a package is missing
EXIT_IO = 74  # EX_IOERR: the state file cannot be read or written, or the output cannot
EXIT_AGAIN = 75  # EX_TEMPFAIL: lock not had in time
EXIT_INTERRUPTED = 130  # 128 + SIGINT

VERSION = "0.1"

#: exit code and text for stdout
Answer = tuple[int, str]


# --- Rendering ------------------------------------------------------------------------------------


def render_status(summary: Summary) -> str:
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
    align = ["left"] + ["center"] * 5
    # A name such as "1e5" is a name: no cell is to be read as a number.
    table = tabulate(rows, headers, tablefmt="simple_outline", colalign=align, disable_numparse=True)
    return f"{'=' * 33} GPU リソース状態 {'=' * 33}\n{table}\n\n{render_totals(summary)}"


def render_totals(summary: Summary) -> str:
    return (
        "合計:\n"
        f"  GPU: {summary['total_available_gpus']}/{summary['total_gpus']} 利用可能\n"
        f"  CPU: {summary['total_available_cpus']}/{summary['total_cpus']} 利用可能\n"
        f"  実行中タスク: {summary['total_running_tasks']}"
    )


def render_detail(state: State) -> str:
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
                f"    - {task['task_id']}",
                f"      GPU ID: {task['allocated_gpus']}",
                f"      CPU数: {task['allocated_cpus']}",
                f"      開始時刻: {task['start_time']}",
            ]
        lines.append("")
    return "\n".join([*lines, f"最終更新: {state['last_updated']}"])


def render_allocation(allocation: Allocation) -> str:
    devices = allocation["gpu_devices"]
    server = f"  サーバー: {allocation['server_name']}\n  GPU ID: {allocation['gpu_ids']}\n"
    cpus = f"  CPU数: {allocation['cpu_count']}\n"
    return (
        f"✓ リソース割り当て成功:\n{server}{cpus}\n"
        f"✓ リソース割り当て成功！\n{server}  GPUデバイス文字列: {devices}\n{cpus}\n"
        f"使用ヒント:\n  export CUDA_VISIBLE_DEVICES={devices}\n\n"
        f"リソース解放:\n  python cli_v01.py --release {quote(allocation['task_id'])}"
    )


def quote(word: str) -> str:
    """Quote ``word`` for a POSIX shell, but only if it needs it: Japanese letters do not."""
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else "'" + word.replace("'", "'\"'\"'") + "'"


# --- Commands: each returns its exit code and what goes to stdout ---------------------------------


def cmd_init(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    # Construction has made the state file if there was none.
    totals = render_totals(manager.get_resource_summary())
    return EXIT_OK, f"✓ 初期化完了 (既存の状態は上書きしません): {manager.resource_file}\n\n{totals}"


def cmd_status(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    return EXIT_OK, render_status(manager.get_resource_summary())


def cmd_detail(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    return EXIT_OK, render_detail(manager.get_detailed_status())


def cmd_allocate(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    task_id, gpus, cpus = args.allocate
    # Shown before the wait for the lock, not after it.
    show(f"リソース割り当てを試行中:\n  タスクID: {task_id}\n  GPU数: {gpus}\n  CPU数: {cpus}\n")
    allocation = manager.allocate_resources(task_id, gpus, cpus, args.prefer_server)
    if allocation is None:  # why is on the screen already, as the library has logged it
        show_error("  対処: 空きが出てから再実行してください (使用中のタスクは --detail で確認できます)")
        return EXIT_NO, ""
    return EXIT_OK, render_allocation(allocation)


def cmd_release(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    show(f"リソース解放を試行中: {args.release}")
    if not manager.release_resources(args.release):  # again the library has logged the reason
        show_error("  対処: --detail で実行中のタスクIDを確認してください")
        return EXIT_NO, ""
    return EXIT_OK, f"✓ リソース解放完了: {args.release}\n✓ リソース解放成功！"


def cmd_reset(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    if not args.yes:
        if sys.stdin is None or not sys.stdin.isatty():
            show_error("✗ 確認するための端末がないため、リセットしません")
            show_error("  対処: 確認を省くには --reset --yes を指定してください")
            return EXIT_USAGE, ""
        # On stderr, for stdout may be a file.
        show_error("警告：すべての実行中タスクの記録がクリアされます！\n続行しますか？ [y/N]:")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            show_error("✗ リセットを中止しました")
            return EXIT_NO, ""
    manager.reset_resources()
    return EXIT_OK, "✓ システムリセット完了"


# --- The parser -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        show_error(f"✗ 引数が正しくありません: {message}\n  対処: python cli_v01.py --help で使い方を確認してください")
        raise SystemExit(EXIT_USAGE)


def integer(text: str) -> int:
    """Read a plain decimal number; ``int`` alone would take "1_0", " 4" and digits of other scripts."""
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"整数ではありません: {text!r}")
    return int(text)


def build_parser() -> Parser:
    parser = Parser(
        prog="cli_v01.py",
        description="GPU リソースマネージャー: 数台の GPU サーバーを数人で共有する",
        epilog="終了コード: 0 成功 / 1 空きなし・該当タスクなし / 2 引数の誤り / 74 読み書きの失敗 / "
        "75 ロック取得タイムアウト / 130 中断",
        allow_abbrev=False,
    )
    commands = parser.add_mutually_exclusive_group()

    def add_command(option: str, command: Callable[..., Answer], text: str) -> None:
        commands.add_argument(option, dest="command", action="store_const", const=command, help=text)

    add_command("--init", cmd_init, "状態ファイルがなければ作成する")
    add_command("--status", cmd_status, "リソース状態を表示する")
    add_command("--detail", cmd_detail, "サーバーとタスクの詳細を表示する")
    commands.add_argument(
        "--allocate",
        nargs=3,
        action="append",
        metavar=("TASK_ID", "GPUS", "CPUS"),
        help="タスクに GPU (2-8) と CPU (1-64) を割り当てる",
    )
    commands.add_argument("--release", action="append", metavar="TASK_ID", help="タスクのリソースを解放する")
    add_command("--reset", cmd_reset, "すべてのタスクの記録を消す (確認あり)")
    commands.add_argument("--version", action="version", version=f"GPU リソースマネージャー v{VERSION}")
    parser.add_argument("--prefer-server", type=integer, metavar="ID", help="--allocate で優先するサーバー ID")
    parser.add_argument("--yes", action="store_true", help="--reset の確認を省く")
    return parser


def parse(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; ``command`` is the function to call, or ``None`` if none was asked for."""
    words = sys.argv[1:] if argv is None else list(argv)
    for word in words:
        if _UNSAFE.search(word) or "\n" in word:  # no refusal, by whomever, is to show it as it is
            parser.error(f"制御文字を含む引数は使えません: {word!r}")
    args = parser.parse_args(words)
    for option, values in (("--allocate", args.allocate), ("--release", args.release)):
        if values and len(values) > 1:  # argparse would forget all but the last
            parser.error(f"{option} は一度だけ指定してください")
    if args.allocate:
        args.command = cmd_allocate
        [(task_id, *counts)] = args.allocate
        try:
            args.allocate = (task_id, *map(integer, counts))
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --allocate: {error}")
    elif args.release:
        args.command = cmd_release
        [args.release] = args.release
    if args.prefer_server is not None and args.command is not cmd_allocate:
        parser.error("--prefer-server は --allocate と一緒に指定してください")
    if args.yes and args.command is not cmd_reset:
        parser.error("--yes は --reset と一緒に指定してください")
    return args


# --- Output and main ------------------------------------------------------------------------------

# Could move the cursor, or reverse or split the text, of the terminal that shows it: from an argument,
# or from the path of the state file.
_UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def show(text: str) -> None:
    """Write a text to stdout at once; an ``OSError`` is for ``main``."""
    print(_UNSAFE.sub("?", text), flush=True)


def show_error(text: str) -> None:
    """Write a text to stderr at once."""
    if sys.stderr is not None:  # print(file=None) would write to stdout
        try:
            print(_UNSAFE.sub("?", text), file=sys.stderr, flush=True)
        except OSError:  # nowhere is left to say so
            discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Drop what a broken stream still holds, or the interpreter would try, and complain, once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run(argv: Sequence[str] | None) -> Answer:
    """Carry out one command. The one place where errors of the library become exit codes."""
    parser = build_parser()
    args = parse(parser, argv)
    if args.command is None:
        return EXIT_OK, parser.format_help().rstrip()
    try:
        import gpu_resource_manager_v01 as library
    except ImportError as error:
        return missing_package(error)
    try:
        with library_warnings_on_stderr(library.logger):
            answer: Answer = args.command(library.GPUResourceManagerV01(), args)
            return answer
    except ImportError as error:
        return missing_package(error)
    except library.ResourceManagerError as error:
        show_error(f"✗ {error}")
        if isinstance(error, library.InvalidRequestError):
            return EXIT_USAGE, ""
        return (EXIT_AGAIN if isinstance(error, library.LockTimeoutError) else EXIT_IO), ""


def missing_package(error: ImportError) -> Answer:
    show_error(
        f"✗ 必要なパッケージを読み込めません: {error}\n  対処: pip install -r requirements_v01.txt を実行してください"
    )
    return EXIT_USAGE, ""


@contextmanager
def library_warnings_on_stderr(logger: logging.Logger) -> Iterator[None]:
    """Show what the library logs as a warning: why there is no room, that a file was set aside."""
    from logging import WARNING, Handler, LogRecord

    class ScreenHandler(Handler):
        def emit(self, record: LogRecord) -> None:
            show_error(f"✗ {record.getMessage()}")

    handler = ScreenHandler(WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a legacy encoding may lack ✓
    code = EXIT_IO  # until the command has done its work
    try:
        try:
            code, text = run(argv)
        except SystemExit as request:  # argparse after --help, --version and wrong usage
            code, text = int(request.code or 0), ""
        if text:
            show(text)
        elif sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        show_error("✗ 中断しました\n  対処: --detail で現在の状態を確認できます")
        return EXIT_INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # a reader such as ``head`` may go when it has enough
            show_error(
                f"✗ 出力できません: {error.strerror}\n  対処: 出力先を直し、--detail で現在の状態を確かめてください"
            )
            code = EXIT_IO
        if sys.stdout is not None:
            discard(sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
