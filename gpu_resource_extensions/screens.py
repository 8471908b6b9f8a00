"""What screens show beyond those of the specification: who has what, what is out of service, which pool it is.

Facts in, lines out. Widths are columns of the screen, of which a Japanese letter takes two.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from gpu_resource_manager_v01 import ResourceManagerError, printable, say

KINDS = {"job": "ジョブ", "reservation": "予約", "waiting": "待機"}
TASK, MIN_TASK = 3, 16  # the column of the task list that gives way first, and how far
MIN_CELL = 4  # columns that each keeps, however narrow the screen is


def screen(descriptor: int = 1) -> tuple[int, int]:
    """Return columns and lines of the screen behind a stream; ``shutil`` would cost a twentieth of a start."""
    try:
        size = os.get_terminal_size(descriptor)
    except OSError:  # no terminal
        size = os.terminal_size((0, 0))
    asked = os.environ.get("COLUMNS", "")
    wide = int(asked) if asked.isascii() and asked.isdigit() and len(asked) < 6 else 0
    return wide or size.columns or 80, size.lines or 24


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
    """Return ``text``, shortened to ``most`` columns at its end."""
    if width(text) > most:
        text = text[:most] + "…"
        while width(text) > most and text != "…":
            text = text[:-2] + "…"
    return text


def render_below(summary: Mapping[str, Any]) -> list[str]:
    """Return what ``--status`` shows below the totals but for the pool; ``summary`` is an overview."""
    most = screen()[0]
    lines = [cut(line, most) for line in render_disabled(summary["servers"])]
    return [*lines, "", *render_tasks(summary["tasks"], most)] if summary["tasks"] else lines


def cut_path(path: str, heading: str) -> str:
    """Return the end of ``path`` that fits on the screen behind ``heading``."""
    path, most = printable(path), screen()[0] - width(heading)
    if width(path) > most:
        path = "…" + path[-max(1, most) :]
        while width(path) > most and path != "…":
            path = "…" + path[2:]
    return path


def render_tasks(tasks: Sequence[Mapping[str, Any]], most: int) -> list[str]:
    """Return a heading and a line for each task, at most ``most`` columns wide."""
    rows = [list(map(say, ("サーバー", "GPU", "CPU", "タスク", "利用者", "経過", "種類")))]
    for task in tasks:
        waits = task["kind"] == "waiting"
        gpus = say("{} 個", task["required_gpus"]) if waits else ranges(task["allocated_gpus"])
        cpus = task["required_cpus" if waits else "allocated_cpus"]
        since = age(task.get("asked_time" if waits else "start_time"))
        who = task.get("server_name") or "-", gpus, cpus, task["task_id"], task.get("user", "-"), since
        rows.append([*(printable(str(fact)) for fact in who), say(KINDS[task["kind"]])])
    widths = [max(map(width, cells)) for cells in zip(*rows, strict=True)]
    too_much = sum(widths) + 2 * len(widths) - 2 - most
    shrinks = max(0, min(too_much, widths[TASK] - MIN_TASK))  # of the name of a task enough stays to know it by
    widths[TASK] -= shrinks
    for _ in range(too_much - shrinks):
        widest = widths.index(max(widths))
        widths[widest] = max(MIN_CELL, widths[widest] - 1)
    lines = []
    for row in rows:
        cells = [cut(cell, wide) for cell, wide in zip(row, widths, strict=True)]
        padded = [cell + " " * (wide - width(cell)) for cell, wide in zip(cells, widths, strict=True)]
        lines.append(cut("  ".join(padded).rstrip(), most))
    return lines


def ranges(gpus: Sequence[int]) -> str:
    """Return ascending indices as people write them: ``0-3,6``."""
    runs: list[list[int]] = []
    for gpu in gpus:
        if runs and gpu == runs[-1][-1] + 1:
            runs[-1].append(gpu)
        else:
            runs.append([gpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "-"


def unix_time_s(text: object) -> float | None:
    """Return the time that a document tells as local time; ``None`` if it tells none, for people may have edited it."""
    from datetime import datetime  # only where there are tasks

    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except (ValueError, OverflowError):
        return None


def age(since: object, now_s: float | None = None, say: Callable[..., str] = say, least: str = "{} 秒") -> str:
    """Return how long ago a time of the document was.

    :param say: what puts it into the language of who reads it.
    :param least: template of what was less than a minute ago, in seconds.
    """
    time_s = unix_time_s(since)
    if time_s is None:
        return "?"
    passed_s = (time.time() if now_s is None else now_s) - time_s
    for unit, unit_s in (("{} 日", 86400), ("{} 時間", 3600), ("{} 分", 60)):
        if passed_s >= unit_s:
            return say(unit, int(passed_s // unit_s))
    return say(least, max(0, int(passed_s)))


def ranges_by_reason(disabled: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return, of each reason for which GPUs of a server are out of service, those indices and the reason."""
    return [
        (ranges(sorted(int(gpu) for gpu, why in disabled.items() if why == reason)), reason)
        for reason in dict.fromkeys(disabled.values())
    ]


def render_disabled(servers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for the GPUs of a server that are out of service for the same reason."""
    lines = []
    for server in servers:
        for gpus, reason in ranges_by_reason(server.get("disabled", {})):
            line = say("  使用停止: {} の GPU {}", server["server_name"], gpus)
            lines.append(line + (f" ({reason})" if reason else ""))
    return lines


def _put(text: str, stream: TextIO) -> None:
    stream.write(text)
    stream.flush()


class WaitingLine:
    """One line on stderr about the place in the queue: rewritten on a terminal, else printed anew."""

    stands = False  # on the terminal, so that whatever comes next has to take its place

    def __init__(self, tell: Callable[[str], None], once: bool = False) -> None:
        """:param tell: shows any other text on stderr, in the place of this line."""
        self.tell, self.once, self.shown = tell, once, False
        self.terminal = sys.stderr is not None and sys.stderr.isatty()

    def __call__(self, position: int, reason: str) -> None:
        text = say("待機中 ({} 番目): {}", position, reason.splitlines()[0])
        if self.terminal:
            WaitingLine.stands = True  # ahead of the text, for a Ctrl-C may come at once
            # Two columns are left, for the "^C" that the terminal shows must not begin another line.
            _put(f"\r\x1b[K{cut(printable(text), screen(2)[0] - 3)}", sys.stderr)
        elif not (self.once and self.shown):
            self.tell(text)
        self.shown = True

    def end(self, text: str = "") -> None:
        """Put ``text`` in the place of the line."""
        if text and (self.terminal or not self.shown):
            self.tell(text)
        elif WaitingLine.stands:
            _put(self.cleared(), sys.stderr)

    @classmethod
    def cleared(cls) -> str:
        """Return what takes the line off the terminal; nothing if there is none."""
        stood, cls.stands = cls.stands, False
        return "\r\x1b[K" if stood else ""


class NoTerminalError(ResourceManagerError):
    """Asking: there is no terminal to show something on again and again."""

    exit_code, code = 2, "usage"
    template = "--watch を表示する端末がありません\n  対処: 端末で実行するか、--watch を外してください"


def watch(frame: Callable[[], str], every_s: float) -> None:
    """Show what ``frame`` returns, anew every so many seconds (0.1 at least), until a Ctrl-C.

    :raises NoTerminalError: stdout is no terminal.
    """
    if sys.stdout is None or not sys.stdout.isatty():
        raise NoTerminalError

    try:
        # The other screen of the terminal, without wrapping, so that a line of ours is a line there.
        _put("\x1b[?1049h\x1b[?7l", sys.stdout)
        while True:
            lines, room = frame().split("\n"), screen()[1]
            if len(lines) > room:
                lines[room - 1 :] = [say("… 他 {} 行", len(lines) - room + 1)]
            # Each line replaces the one in its place, and nothing is cleared ahead: so nothing flickers.
            _put("\x1b[H" + "\x1b[K\n".join(lines) + "\x1b[K\x1b[J", sys.stdout)
            time.sleep(min(max(0.1, every_s), 1e6))
    except KeyboardInterrupt as stop:
        if stop.args:  # no Ctrl-C, but a signal with an exit code of its own
            raise
    finally:
        _put("\x1b[?7h\x1b[?1049l", sys.stdout)
