#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["filelock>=3.30", "tabulate[widechars]>=0.9", "wcwidth<0.3"]
# ///
"""Command line of the GPU resource manager: parse, call the library, show the answer.

Results go to stdout; errors (``✗ …``, with what to do next) to stderr, never as a traceback.
Reads from the ground up: rendering (dict in, text out), running a job, commands, the parser, ``main``.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # imports are most of a start, so the others stand where they are used
    import signal
    from collections.abc import Mapping, Sequence
    from typing import Any, NoReturn, TextIO

    from gpu_resource_manager_v01 import Allocation, GPUResourceManagerV01, ServerDescription, State, Summary

EXIT_OK = 0
EXIT_NO = 1  # the answer is no: no room, unknown task, not confirmed
EXIT_USAGE = 2  # wrong usage, bad parameters, a package is missing
EXIT_IO = 74  # EX_IOERR: the state file cannot be read or written, or the output cannot
EXIT_AGAIN = 75  # EX_TEMPFAIL: lock not had in time
EXIT_OURS = 125  # of --run: our own failure, not the command's
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127
EXIT_INTERRUPTED = 130  # 128 + SIGINT

VERSION = "0.1"
#: of the documents that ``--json`` prints
SCHEMA = 1


class Answer:
    """What a command has to say: exit code, text for people, and the same for programs (``--json``)."""

    def __init__(self, code: int, text: str, result: Mapping[str, object]) -> None:
        self.code = code
        self.text = text
        self.result = result


class Stopped(KeyboardInterrupt):
    """We are to end because of a signal; ends like a Ctrl-C, with another exit code."""


class Refusal(Exception):  # noqa: N818 - a "no" is an answer too
    """A command is not carried out: exit code, name for programs, text for people, further facts."""

    def __init__(self, code: int, name: str, message: str, facts: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.name = name
        self.facts = facts or {}


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
    text = (
        "合計:\n"
        f"  GPU: {summary['total_available_gpus']}/{summary['total_gpus']} 利用可能\n"
        f"  CPU: {summary['total_available_cpus']}/{summary['total_cpus']} 利用可能\n"
        f"  実行中タスク: {summary['total_running_tasks']}"
    )
    if "total_waiting" in summary:
        text += f"\n  待機中の要求: {summary['total_waiting']}"
    if "ended_tasks" in summary:
        text += f"\n  終了済み (次の変更で回収): {', '.join(summary['ended_tasks'])}"
    return text


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
                f"    - {task['task_id']}" + (" (終了済み: 次の変更で回収)" if task.get("ended") is True else ""),
                f"      GPU ID: {task['allocated_gpus']}",
                f"      CPU数: {task['allocated_cpus']}",
                f"      開始時刻: {task['start_time']}",
            ]
            if "user" in task:
                lines.append(one_line(f"      要求元: {task['user']}@{task.get('host')} (PID {task.get('pid')})"))
        lines.append("")
    for position, request in enumerate(state.get("waiting", []), start=1):
        lines.append(
            f"待機中 {position}: {request['task_id']}"
            + one_line(f" (GPU {request['required_gpus']}, CPU {request['required_cpus']}, {request.get('user')})")
            + (" (終了済み)" if request.get("ended") is True else "")
        )
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


def one_line(text: str) -> str:
    return text.replace("\n", "?")


def job_environment(allocation: Allocation) -> dict[str, str]:
    """Return what a job needs to keep to its GPUs and CPUs."""
    return {
        "CUDA_VISIBLE_DEVICES": allocation["gpu_devices"],
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the numbering of NVML, and so of the pool
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(allocation["cpu_count"])),
        "GPU_TASK_ID": allocation["task_id"],
    }


def render_export(allocation: Allocation) -> str:
    return "\n".join(f"export {name}={quote(value)}" for name, value in job_environment(allocation).items())


def render_failed_export(code: int) -> str:
    """Return what hides every GPU and then fails: no job is to start on all GPUs since none was granted.

    -1 rather than nothing, since programs take an empty value for one that is not set.
    """
    return f"export CUDA_VISIBLE_DEVICES=-1\n(exit {code})"


def quote(word: str) -> str:
    """Quote ``word`` for a POSIX shell, but only if it needs it: Japanese letters do not."""
    plain = word and all(letter.isalnum() or letter in "_@%+=:,./-" for letter in word)
    return word if plain else "'" + word.replace("'", "'\"'\"'") + "'"


# --- Running a job ----------------------------------------------------------------------------------

_SI_KERNEL = 0x80  # <asm-generic/siginfo.h>: sent by the kernel, here the terminal


def spawn(job: list[str], environment: Mapping[str, str], mask: set[int | signal.Signals]) -> int:
    """Start a command as a shell would, with this signal mask, and return its pid."""
    import signal
    from shutil import which

    # SIGPIPE and SIGXFSZ are ignored by Python, and what is ignored stays so through exec.
    restored = [signal.SIGPIPE, signal.SIGXFSZ]
    try:
        return os.posix_spawnp(job[0], job, environment, setsigmask=mask, setsigdef=restored)
    except OSError as error:
        script = which(job[0])
        if error.errno == errno.ENOEXEC and script is not None:  # without "#!", which every shell runs
            shell = ["sh", script, *job[1:]]
            return os.posix_spawn("/bin/sh", shell, environment, setsigmask=mask, setsigdef=restored)
        # A directory of PATH that we may not search makes the search end with EACCES as well.
        if "/" not in job[0] and which(job[0], os.F_OK) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
        raise


def run_job(job: list[str], environment: Mapping[str, str]) -> int:
    """Run a command as a shell would, forwarding signals to it, and return its exit code.

    It stays in our process group: a Ctrl-C or Ctrl-Z in the terminal reaches it, and a job-controlling
    shell handles both of us as one. So what the terminal sends is not forwarded, but what ``kill`` sends
    to us is.
    """
    import signal

    forwarded = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
    watched = forwarded | {signal.SIGCHLD}
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it was ignored, nobody would hear of the end
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        try:
            pid = spawn(job, environment, mask)
        except OSError as error:
            show_error(f"✗ コマンドを実行できません: {job[0]}: {error.strerror}")
            return EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE
        while True:
            received = signal.sigwaitinfo(watched)
            if received.si_signo != signal.SIGCHLD:
                # A terminal that goes away tells only the leader of its session.
                ours_alone = received.si_signo == signal.SIGHUP and os.getsid(0) == os.getpid()
                if received.si_code != _SI_KERNEL or ours_alone:
                    os.kill(pid, received.si_signo)
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
    finally:
        while signal.sigtimedwait(watched, 0):  # came too late for the job, and is not meant for us
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class WaitingLine:
    """One line on stderr about the place in the queue: rewritten on a terminal, else printed anew."""

    def __init__(self, once: bool = False) -> None:
        self.once = once
        self.shown = False
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
    # Construction has made the state file if there was none.
    summary = manager.get_resource_summary()
    text = f"✓ 初期化完了 (既存の状態は上書きしません): {manager.resource_file}\n\n{render_totals(summary)}"
    return Answer(EXIT_OK, text, {"resource_file": manager.resource_file, **summary})


def cmd_status(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    summary = manager.get_resource_summary()
    return Answer(EXIT_OK, "" if args.json else render_status(summary), {**summary})


def cmd_detail(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    state = manager.get_detailed_status()
    return Answer(EXIT_OK, render_detail(state), {**state})


def cmd_allocate(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    task_id, gpus, cpus = args.allocate
    if not args.json and not args.export:  # shown before the wait for the lock, not after it
        show(f"リソース割り当てを試行中:\n  タスクID: {task_id}\n  GPU数: {gpus}\n  CPU数: {cpus}\n")
    line = WaitingLine()
    allocation = manager.allocate_resources(
        task_id, gpus, cpus, args.prefer_server, wait_s=args.wait or 0, on_wait=line, local=args.export
    )
    line.end()
    if allocation is None:
        message, facts = args.warnings.last
        raise Refusal(
            EXIT_NO if args.wait is None else EXIT_AGAIN,
            "no_capacity",
            f"{message}\n  対処: 空きが出てから再実行するか、--wait で待ってください",
            facts,
        )
    text = render_export(allocation) if args.export else render_allocation(allocation)
    return Answer(EXIT_OK, text, {**allocation})


def cmd_run(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    from gpu_resource_manager_v01 import ResourceManagerError

    task_id, gpus, cpus = args.run
    line = WaitingLine(once=True)
    command = " ".join(map(quote, args.job))
    code = None
    try:
        with manager.allocation(task_id, gpus, cpus, wait_s=args.wait or 0, on_wait=line, command=command) as granted:
            line.end(f"✓ {granted['server_name']} の GPU {granted['gpu_devices']} で実行します: {task_id}")
            code = run_job(args.job, {**os.environ, **job_environment(granted)})
    except (ResourceManagerError, KeyboardInterrupt) as error:
        if code is None:
            raise
        # The job's exit code stands; what it held is taken back by the next change of anybody.
        show_error(f"✗ 解放を記録できませんでした: {error}\n  対処: 次のコマンドが自動で回収します")
    return Answer(code, "", {**granted, "exit_code": code})


def cmd_release(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    if not args.json:
        show(f"リソース解放を試行中: {args.release}")
    if not manager.release_resources(args.release, force=args.force):
        message, _ = args.warnings.last
        remedy = "--detail で実行中のタスクIDを確認してください"
        raise Refusal(EXIT_NO, "unknown_task", f"{message}\n  対処: {remedy}", {"task_id": args.release})
    return Answer(EXIT_OK, f"✓ リソース解放完了: {args.release}\n✓ リソース解放成功！", {"task_id": args.release})


def cmd_reset(manager: GPUResourceManagerV01, args: argparse.Namespace) -> Answer:
    if not args.yes:
        if sys.stdin is None or not sys.stdin.isatty():
            raise Refusal(
                EXIT_USAGE,
                "not_confirmed",
                "確認するための端末がないため、リセットしません\n"
                "  対処: 確認を省くには --reset --yes を指定してください",
            )
        # On stderr, for stdout may be a file.
        show_error("警告：すべての実行中タスクの記録がクリアされます！\n続行しますか？ [y/N]:")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Refusal(EXIT_NO, "not_confirmed", "リセットを中止しました\n  対処: 消してよければ y と答えてください")
    described = args.servers is not None or args.min_gpus is not None
    manager.reset_resources(args.servers, args.min_gpus, force=args.yes or not described)
    return Answer(EXIT_OK, "✓ システムリセット完了", {"resource_file": manager.resource_file})


# --- The parser -----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def _get_formatter(self) -> argparse.HelpFormatter:
        # Asked for at every argument; without a width it would import ``shutil`` to look at the terminal.
        return argparse.HelpFormatter(self.prog, width=80)

    def error(self, message: str) -> NoReturn:
        remedy = "python cli_v01.py --help で使い方を確認してください"
        raise Refusal(EXIT_USAGE, "usage", f"引数が正しくありません: {message}\n  対処: {remedy}")


def is_number(text: str) -> bool:
    """Tell whether it is a plain decimal number; ``int`` would take "1_0", " 4" and digits of other scripts."""
    return text.isascii() and text.isdigit() and len(text) <= 9


def integer(text: str) -> int:
    if not is_number(text.removeprefix("-")):
        raise argparse.ArgumentTypeError(f"整数ではありません: {text!r}")
    return int(text)


def seconds(text: str) -> float:
    whole, point, fraction = text.partition(".")
    if not is_number(whole) or (point and not is_number(fraction)):
        raise argparse.ArgumentTypeError(f"秒数ではありません: {text!r}")
    return float(text)


def server_description(text: str) -> ServerDescription:
    name, *counts = text.rsplit(":", 2)
    if len(counts) != 2:
        raise argparse.ArgumentTypeError(f"NAME:GPUS:CPUS の形ではありません: {text!r}")
    gpus, cpus = map(integer, counts)
    return name, gpus, cpus


def detected_server() -> ServerDescription:
    """Return this machine: host name, GPUs by NVML (package ``nvidia-ml-py``), CPUs by the kernel.

    :raises Refusal: the number of GPUs cannot be known here, or it is 0.
    """

    from gpu_resource_manager_v01 import host_name

    def refusal(problem: str, remedy: str) -> Refusal:
        remedy += "--init --server NAME:GPUS:CPUS で台数を指定してください"
        return Refusal(EXIT_USAGE, "detection_failed", f"{problem}\n  対処: {remedy}")

    try:
        import pynvml
    except ImportError as error:
        problem = f"GPU の数が分かりません: nvidia-ml-py を読み込めません ({error})"
        raise refusal(problem, ".venv/bin/pip install nvidia-ml-py を実行するか、") from error
    try:
        pynvml.nvmlInit()
        try:
            gpus: int = pynvml.nvmlDeviceGetCount()
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        raise refusal(f"GPU の数が分かりません: NVML: {error}", "ドライバを確認するか、") from error
    if not gpus:
        raise refusal("この計算機に NVIDIA GPU はありません", "")
    return host_name(), gpus, os.cpu_count() or 1


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
  --reset                          すべてのタスクの記録を消す (確認あり)
  --version                        バージョンを表示する
  -h, --help                       この使い方を表示する

オプション:
  --prefer-server ID               --allocate で優先するサーバー ID
  --wait [SECONDS]                 --allocate と --run で、空くまで順番を待つ (秒数を省くと無期限)
  --export                         --allocate の結果を eval "$(…)" のための行で出力する
  --force                          --release で他の利用者のタスクも解放する
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
    parser.add_argument("-h", "--help", action="store_true")
    commands = parser.add_mutually_exclusive_group()
    for option, command in (
        ("--init", cmd_init),
        ("--status", cmd_status),
        ("--detail", cmd_detail),
        ("--reset", cmd_reset),
    ):
        commands.add_argument(option, dest="command", action="store_const", const=command)
    for option in ("--allocate", "--run"):
        commands.add_argument(option, nargs=3, action="append", metavar=("TASK_ID", "GPUS", "CPUS"))
    commands.add_argument("--release", action="append", metavar="TASK_ID")
    commands.add_argument("--version", action="store_true")
    parser.add_argument("--prefer-server", type=integer, metavar="ID")
    parser.add_argument("--wait", nargs="?", type=seconds, const=float("inf"), metavar="SECONDS")
    parser.add_argument("--server", dest="servers", action="append", type=server_description, metavar="NAME:GPUS:CPUS")
    parser.add_argument("--min-gpus", type=integer, metavar="N")
    for option in ("--export", "--force", "--detect", "--yes", "--json"):
        parser.add_argument(option, action="store_true")
    return parser


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
    for option, values in (("--allocate", args.allocate), ("--run", args.run), ("--release", args.release)):
        if values and len(values) > 1:  # argparse would forget all but the last
            parser.error(f"{option} は一度だけ指定してください")
    if args.release:
        args.command = cmd_release
        [args.release] = args.release
    for name, command in (("allocate", cmd_allocate), ("run", cmd_run)):
        if values := getattr(args, name):
            args.command = command
            [(task_id, *counts)] = values
            try:
                setattr(args, name, (task_id, *map(integer, counts)))
            except argparse.ArgumentTypeError as error:
                parser.error(f"argument --{name}: {error}")
    if (args.command is cmd_run) != bool(job):
        parser.error("コマンドは --run TASK_ID GPUS CPUS -- COMMAND … の形で指定してください")
    for option, given, commands in (
        ("--prefer-server", args.prefer_server is not None, [cmd_allocate]),
        ("--wait", args.wait is not None, [cmd_allocate, cmd_run]),
        ("--export", args.export, [cmd_allocate]),
        ("--force", args.force, [cmd_release]),
        ("--server", args.servers, [cmd_init, cmd_reset]),
        ("--detect", args.detect, [cmd_init, cmd_reset]),
        ("--min-gpus", args.min_gpus is not None, [cmd_init, cmd_reset]),
        ("--yes", args.yes, [cmd_reset]),
    ):
        if given and args.command not in commands:
            names = "・".join("--" + command.__name__.removeprefix("cmd_") for command in commands)
            parser.error(f"{option} は {names} と一緒に指定してください")
    if args.json and args.export:
        parser.error("--json と --export は一緒に指定できません")
    if args.detect and args.servers:
        parser.error("--detect と --server は一緒に指定できません")
    return args


# --- Output and main ------------------------------------------------------------------------------

# Could move the cursor, or reverse or split the text, of the terminal that shows it: from an argument,
# or from the path of the state file.
UNSAFE = "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"


def safe(text: str) -> str:
    # What can be printed is safe, and to know that saves making the expression at every start.
    return text if text.replace("\n", "").isprintable() else re.sub(UNSAFE, "?", text)


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


class Warnings:
    """The last warning of the library, which says why the answer is no."""

    def __init__(self) -> None:
        self.last: tuple[str, Mapping[str, object]] = ("", {})

    def listen(self, logger: Any) -> None:
        from logging import WARNING, Handler, LogRecord

        class Listener(Handler):
            def emit(listener, record: LogRecord) -> None:  # noqa: N805
                facts = record.args[0] if isinstance(record.args, tuple) and record.args else None
                self.last = (record.getMessage(), dict(vars(facts)) if isinstance(facts, Exception) else {})

        logger.addHandler(Listener(WARNING))


def run(words: Sequence[str], job: list[str] | None) -> Answer:
    """Carry out one command. The one place where errors of the library become exit codes.

    :raises Refusal: it was not carried out.
    """
    help_alone = not ({*words} - {"-h", "--help", "--json"} or job)
    if not help_alone:
        if __name__ == "__main__":  # not in a program that calls ``main``: there, signals are its own
            end_waits_on_signals()
        args = parse(build_parser(), words, job)
    if help_alone or args.help or (args.command is None and not args.version):
        return Answer(EXIT_OK, HELP.rstrip(), {"help": HELP})
    if args.version:
        return Answer(EXIT_OK, f"GPU リソースマネージャー v{VERSION}", {"version": VERSION})
    try:
        library = imported_library()
        try:
            args.warnings = Warnings()
            args.warnings.listen(library.logger)
            if args.detect:
                args.servers = [detected_server()]
            described = {} if args.command is cmd_reset else {"servers": args.servers, "min_gpus": args.min_gpus}
            manager = library.GPUResourceManagerV01(**described)
            done: Answer = args.command(manager, args)
            if args.warnings.last[0]:  # such as that a file was set aside
                show_error(f"注意: {args.warnings.last[0]}")
            return done
        except library.ResourceManagerError as error:
            code, name = classified(error, library)
            raise Refusal(code, name, str(error), vars(error)) from error
    except ImportError as error:
        remedy = "python3 -m venv .venv && .venv/bin/pip install -r requirements_v01.txt を実行してください"
        message = f"必要なパッケージを読み込めません: {error}\n  対処: {remedy}"
        raise Refusal(EXIT_USAGE, "missing_package", message) from error


def imported_library() -> Any:
    """Import the library, and keep its compiled form: without that, a start takes a quarter longer.

    Containers that set PYTHONDONTWRITEBYTECODE mean the packages that they have compiled already, and
    ``python -B`` means it.
    """
    as_told = sys.dont_write_bytecode
    if os.environ.get("PYTHONDONTWRITEBYTECODE") and __name__ == "__main__":
        sys.dont_write_bytecode = False
    try:
        import gpu_resource_manager_v01
    finally:
        sys.dont_write_bytecode = as_told
    return gpu_resource_manager_v01


def classified(error: Exception, library: Any) -> tuple[int, str]:
    """Return the exit code and the name for programs of an error of the library."""
    for kind, code, name in (
        (library.DuplicateTaskError, EXIT_USAGE, "duplicate_task"),
        (library.InvalidRequestError, EXIT_USAGE, "invalid_request"),
        (library.NotOwnerError, EXIT_NO, "not_owner"),
        (library.PoolConflictError, EXIT_NO, "pool_conflict"),
        (library.NoCapacityError, EXIT_AGAIN, "no_capacity"),
        (library.LockTimeoutError, EXIT_AGAIN, "lock_timeout"),
    ):
        if isinstance(error, kind):
            return code, name
    return EXIT_IO, "state_file"


def answer(words: Sequence[str], job: list[str] | None) -> tuple[int, str]:
    """Carry out one command and return its exit code and what goes to stdout."""
    try:
        done = run(words, job)
        return done.code, as_json({"ok": True, "result": done.result}) if "--json" in words else done.text
    except Refusal as refusal:
        refused = refusal
    except KeyboardInterrupt as stop:
        code = int(stop.args[0]) if isinstance(stop, Stopped) else EXIT_INTERRUPTED
        refused = Refusal(code, "interrupted", "中断しました\n  対処: --detail で現在の状態を確認できます")
    code = refused.code
    if "--run" in words and code in (EXIT_NO, EXIT_USAGE, EXIT_IO):
        code = EXIT_OURS
    if "--json" in words:
        error = {"code": refused.name, "message": str(refused), **refused.facts}
        return code, as_json({"ok": False, "error": error})
    show_error(f"✗ {refused}")
    return code, render_failed_export(code) if "--export" in words else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a legacy encoding may lack ✓
    words = sys.argv[1:] if argv is None else list(argv)
    job = None
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
        return EXIT_INTERRUPTED
    return code


def as_json(document: Mapping[str, object]) -> str:
    import json

    return json.dumps({"schema": SCHEMA, **document}, ensure_ascii=False, allow_nan=False, default=str)


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
