"""What a person sees on a terminal: ``--status --watch``, and texts that follow one another."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import GUARD_S, running
from screens import CLI, cli
from wcwidth import wcwidth

from gpu_resource_manager_v01 import GPUResourceManagerV01

HERE = "this-machine"
SEQUENCE = re.compile(r"\x1b\[(\?\d+[hl]|[HJK])")


class Screen:
    """The screen of a terminal, as far as we use one."""

    def __init__(self, columns: int, lines: int) -> None:
        self.columns, self.lines, self.wraps, self.is_other = columns, lines, True, False
        self.rows: list[list[str]] = [[]]  # of each the cells; the right half of a wide letter is empty
        self.line = self.column = 0
        self.scrolled = 0  # lines of the other screen that were lost at its top
        self.first: tuple[list[list[str]], int, int] = (self.rows, 0, 0)  # while the other screen is shown
        self._rest = ""

    def feed(self, text: str) -> None:
        text, self._rest = self._rest + text, ""
        while text:
            sequence = SEQUENCE.match(text)
            if sequence:
                self._obey(sequence[1])
                text = text[sequence.end() :]
            elif text[0] == "\x1b" and len(text) < 10:  # the rest of it has still to come
                self._rest, text = text, ""
            else:
                self._write(text[0])
                text = text[1:]

    def text(self) -> str:
        """Return what is on the screen, without blanks at the ends of its lines and empty lines at its end."""
        return "\n".join("".join(row).rstrip() for row in self.rows).rstrip("\n")

    def _obey(self, what: str) -> None:
        row = self.rows[self.line]
        if what == "H":
            self.line = self.column = 0
        elif what == "K":
            del row[self.column :]
        elif what == "J":
            del row[self.column :]
            del self.rows[self.line + 1 :]
        elif what in ("?7h", "?7l"):
            self.wraps = what == "?7h"
        elif what == "?1049h" and not self.is_other:
            self.first = self.rows, self.line, self.column
            self.rows, self.line, self.column, self.is_other = [[]], 0, 0, True
        elif what == "?1049l" and self.is_other:
            self.rows, self.line, self.column = self.first
            self.is_other = False
        else:
            raise AssertionError(f"not known, or not now: {what}")

    def _write(self, letter: str) -> None:
        if letter == "\r":
            self.column = 0
        elif letter == "\n":
            self._down()
        elif letter == "\x07":
            pass
        else:
            wide = wcwidth(letter)
            assert wide > 0, f"no letter: {letter!r}"
            if self.column + wide > self.columns:
                if self.wraps:
                    self._down()
                    self.column = 0
                else:
                    self.column = self.columns - wide
            row = self.rows[self.line]
            row += [" "] * (self.column + wide - len(row))
            row[self.column : self.column + wide] = [letter] + [""] * (wide - 1)
            self.column += wide

    def _down(self) -> None:
        self.line += 1
        if self.line == len(self.rows):
            self.rows.append([])
        if self.line == self.lines:
            self.line -= 1
            self.rows.pop(0)
            self.scrolled += self.is_other


class Terminal:
    """Somebody's terminal, with the command line as what runs on it."""

    def __init__(self, *words: str, columns: int = 80, lines: int = 24, env: dict[str, str] | None = None) -> None:
        personal = ("PYTHON", "LC_", "LANG", "COLUMNS", "LINES")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(personal)}
        self.screen, self.raw = Screen(columns, lines), ""
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self.pid, self.keyboard = pty.fork()
        if self.pid == 0:
            resize(0, columns, lines)
            os.execve(sys.executable, [sys.executable, str(CLI), *words], {**clean, "LANG": "C.UTF-8", **(env or {})})

    def look(self) -> bool:
        """Wait for more on the screen; ``False``: nothing more will come."""
        assert select.select([self.keyboard], [], [], GUARD_S)[0], f"guard against a hang: {self.raw!r}"
        try:
            data = os.read(self.keyboard, 1 << 16)
        except OSError:  # the terminal of a process that is gone
            data = b""
        text = self._decode(data)
        self.raw += text
        self.screen.feed(text)
        return bool(data)

    def wait_for(self, text: str) -> None:
        """Wait until ``text`` is on the screen."""
        self.wait_until(lambda: text in self.screen.text())

    def wait_until(self, holds: Callable[[], bool]) -> None:
        guard_s = time.monotonic() + GUARD_S
        while not holds():
            assert time.monotonic() < guard_s, f"guard against a hang: {self.screen.text()}"
            assert self.look(), self.screen.text()

    def type(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def end(self) -> int:
        """Look on until the command has ended, and return its exit code."""
        guard_s = time.monotonic() + GUARD_S
        while self.look():
            assert time.monotonic() < guard_s, f"guard against a hang: {self.screen.text()}"
        _, status = os.waitpid(self.pid, 0)
        os.close(self.keyboard)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def frames(self) -> list[str]:
        """Return what was written for each frame that is complete."""
        frames = [frame.partition("\x1b[J") for frame in self.raw.split("\x1b[H")[1:]]
        return [frame for frame, end, _ in frames if end]


def resize(terminal: int, columns: int, lines: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Start commands on terminals; none of them outlives the test."""
    started: list[Terminal] = []
    # Undo, for the children too, that a shell lets what it runs in the background ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def open_terminal(*words: str, columns: int = 80, lines: int = 24, env: dict[str, str] | None = None) -> Terminal:
        started.append(Terminal(*words, columns=columns, lines=lines, env=env))
        return started[-1]

    yield open_terminal
    signal.signal(signal.SIGINT, before)
    for one in started:
        if one.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
            os.close(one.keyboard)


@pytest.fixture
def small(pool: Path) -> GPUResourceManagerV01:
    """A pool of one server of 2 GPUs, which is this machine."""
    return GPUResourceManagerV01(pool, servers=[(HERE, 2, 16)])


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RESOURCE_SERVER", HERE)


def let_somebody_hold_gpus(pool: Path) -> None:
    """Place a task whose name is too long for most screens, and whose age never changes."""
    GPUResourceManagerV01(pool).allocate_resources("somebody-" + "s-very-long-name" * 7, 2, 1)
    document = json.loads(pool.read_text("utf-8"))
    document["servers"][0]["running_tasks"][0]["start_time"] = "unknown"
    pool.write_text(json.dumps(document), "utf-8")


Open = Callable[..., Terminal]
WATCH = ("--status", "--watch", "0.2")
INTERRUPTED = "✗ 中断しました\n  対処: --detail で現在の状態を確認できます"

# --- --status --watch -----------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_watch_shows_the_status_and_follows_what_others_do(terminal: Open) -> None:
    watching = terminal(*WATCH)
    idle = cli("--status").out
    watching.wait_until(lambda: watching.screen.text() == idle.rstrip("\n"))
    assert watching.screen.is_other, "what was on the terminal is still behind it"
    assert cli("--allocate", "somebody", "2", "1").code == 0
    watching.wait_for("somebody")
    assert cli("--release", "somebody").code == 0
    watching.wait_until(lambda: watching.screen.text() == idle.rstrip("\n"))
    watching.type("\x03")
    assert watching.end() == 0


@pytest.mark.usefixtures("small")
def test_control_c_leaves_the_last_status_on_the_terminal(terminal: Open, pool: Path) -> None:
    let_somebody_hold_gpus(pool)
    watching = terminal(*WATCH)
    watching.wait_for("somebody")
    watching.type("\x03")
    assert watching.end() == 0
    assert watching.screen.text() == cli("--status").out.rstrip("\n")
    assert not watching.screen.is_other
    assert watching.screen.wraps


@pytest.mark.usefixtures("small")
def test_watch_without_a_number_works(terminal: Open) -> None:
    watching = terminal("--status", "--watch")
    watching.wait_for("1 タスクの範囲")
    watching.type("\x03")
    assert watching.end() == 0
    assert watching.screen.text() == cli("--status").out.rstrip("\n")


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_ends_the_watch_and_gives_the_terminal_back(number: int, code: int, terminal: Open) -> None:
    watching = terminal(*WATCH)
    watching.wait_for("1 タスクの範囲")
    os.kill(watching.pid, number)
    assert watching.end() == code
    assert watching.screen.text() == INTERRUPTED
    assert not watching.screen.is_other
    assert watching.screen.wraps


@pytest.mark.usefixtures("small")
def test_nothing_is_cleared_ahead_so_that_nothing_flickers(terminal: Open) -> None:
    watching = terminal(*WATCH)
    watching.wait_until(lambda: len(watching.frames()) > 2)
    watching.type("\x03")
    assert watching.end() == 0
    before, *_ = watching.raw.partition("\x1b[H")
    assert SEQUENCE.findall(before) == ["?1049h", "?7l"]
    assert watching.raw.count("\x1b[J") == watching.raw.count("\x1b[H"), "only what is left below a frame is cleared"
    for frame in watching.frames():
        lines = frame.split("\r\n")
        assert all(line.endswith("\x1b[K") for line in lines), "each line clears what is left behind it"
        assert SEQUENCE.findall(frame) == ["K"] * len(lines)


@pytest.fixture
def big(pool: Path) -> Path:
    """A pool of 100 servers, whose status has 113 lines."""
    GPUResourceManagerV01(pool, servers=[(f"node-{number:03}", 8, 64) for number in range(100)])
    return pool


@pytest.mark.usefixtures("big")
@pytest.mark.parametrize(("lines", "more"), [(24, 90), (112, 2), (113, 0)])
def test_terminal_never_scrolls_and_says_how_many_lines_it_does_not_show(lines: int, more: int, terminal: Open) -> None:
    watching = terminal(*WATCH, lines=lines)
    watching.wait_until(lambda: len(watching.frames()) > 2)
    status = cli("--status").out.splitlines()
    assert len(status) == 113
    expected = [*status[: lines - 1], f"… 他 {more} 行"] if more else status
    assert watching.screen.text().splitlines() == expected
    watching.type("\x03")
    watching.wait_until(lambda: not watching.screen.is_other)
    assert watching.screen.scrolled == 0
    assert {frame.count("\n") for frame in watching.frames()} == {lines - 1}
    assert watching.end() == 0
    assert watching.screen.text().splitlines() == status[1 - lines :], "and the cursor is below the last line"


def test_window_that_changes_its_size_is_followed(terminal: Open, big: Path) -> None:
    let_somebody_hold_gpus(big)
    status = {columns: cli("--status", env={"COLUMNS": str(columns)}).out.splitlines() for columns in (60, 200)}
    assert status[60] != status[200]
    watching = terminal(*WATCH, columns=200, lines=200)
    watching.wait_until(lambda: watching.screen.text().splitlines() == status[200])
    resize(watching.keyboard, 60, 40)
    watching.wait_for("… 他 77 行")
    assert len(watching.screen.text().splitlines()) == 40
    resize(watching.keyboard, 60, 200)
    watching.wait_until(lambda: watching.screen.text().splitlines() == status[60])
    watching.type("\x03")
    assert watching.end() == 0


def test_columns_of_the_environment_go_before_those_of_the_window(terminal: Open, big: Path) -> None:
    let_somebody_hold_gpus(big)
    watching = terminal(*WATCH, columns=200, lines=200, env={"COLUMNS": "60"})
    status = cli("--status", env={"COLUMNS": "60"}).out.rstrip("\n")
    watching.wait_until(lambda: watching.screen.text() == status)
    watching.type("\x03")
    assert watching.end() == 0


@pytest.mark.usefixtures("small")
def test_status_on_a_terminal_is_as_wide_as_the_window(terminal: Open, pool: Path) -> None:
    let_somebody_hold_gpus(pool)
    for columns in (90, 120):
        once = terminal("--status", columns=columns, lines=40)
        assert once.end() == 0
        assert once.screen.text() == cli("--status", env={"COLUMNS": str(columns)}).out.rstrip("\n")


@pytest.mark.usefixtures("small")
def test_watch_is_refused_where_no_terminal_shows_it() -> None:
    for words in (WATCH, ("--status", "--watch")):
        refused = cli(*words)
        assert (refused.code, refused.out) == (2, "")
        assert refused.err.startswith("✗ --watch を表示する端末がありません\n  対処: ")


@pytest.mark.usefixtures("small")
def test_watch_is_refused_for_programs_even_on_a_terminal(terminal: Open) -> None:
    asked = terminal(*WATCH, "--json")
    assert asked.end() == 2
    assert "\x1b" not in asked.raw
    assert json.loads(asked.raw)["error"]["code"] == "usage"
    assert cli(*WATCH, "--json").code == 2


@pytest.mark.usefixtures("small")
def test_file_that_breaks_meanwhile_ends_the_watch_with_a_word(terminal: Open, pool: Path) -> None:
    watching = terminal(*WATCH, columns=200)
    watching.wait_for("1 タスクの範囲")
    broken = pool.with_name("broken")
    broken.write_text("{", "utf-8")
    broken.replace(pool)
    assert watching.end() == 74
    assert not watching.screen.is_other
    assert watching.screen.wraps
    first, reason, remedy = watching.screen.text().splitlines()
    assert first == f"✗ 状態ファイルのエラー: {pool}"
    assert reason.startswith("  原因: JSON として読めません")
    assert remedy.startswith("  対処: ")


# --- Texts never run into each other ----------------------------------------------------------------

WAITING = "待機中 (1 番目): GPU 2 個と CPU 4 個を同時に確保できるサーバーがありません"
ASKED = "リソース割り当てを試行中:\n  タスクID: late\n  GPU数: 2\n  CPU数: 4\n\n"
COMMANDS = {"run": "", "allocate": ASKED}  # and what is on the screen ahead of the wait


def wait_for_room(terminal: Open, command: str, wait: tuple[str, ...] = (), columns: int = 100) -> Terminal:
    """Start a command on a terminal that waits for GPUs which another task holds."""
    job = ("--", "echo", "job") if command == "run" else ()
    return terminal(f"--{command}", "late", "2", "4", "--wait", *wait, *job, columns=columns, lines=40)


@pytest.fixture
def full(small: GPUResourceManagerV01) -> GPUResourceManagerV01:
    assert small.allocate_resources("all", 2, 1)
    return small


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("columns", [100, 60])
@pytest.mark.parametrize("command", COMMANDS)
def test_interrupted_wait_leaves_its_refusal_alone(command: str, columns: int, terminal: Open, pool: Path) -> None:
    waiting = wait_for_room(terminal, command, columns=columns)
    waiting.wait_for("待機中 (1 番目): GPU 2 個と")
    waiting.type("\x03")
    assert waiting.end() == 130
    assert "\r\x1b[K✗ " in waiting.raw
    assert waiting.screen.text() == f"{COMMANDS[command]}{INTERRUPTED}"
    assert running(pool) == ["all"]


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("command", COMMANDS)
def test_wait_whose_time_is_up_leaves_its_refusal_alone(command: str, terminal: Open) -> None:
    waiting = wait_for_room(terminal, command, ("2",))
    waiting.wait_for(WAITING)
    assert waiting.end() == 75
    assert "\r\x1b[K✗ " in waiting.raw
    before, _, refusal = waiting.screen.text().partition("✗ ")
    assert before == COMMANDS[command]
    assert "待機中" not in refusal
    assert "GPU 2 個と CPU 4 個を同時に確保できるサーバーがありません\n" in refusal


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("command", COMMANDS)
def test_wait_that_somebody_cancels_leaves_its_refusal_alone(command: str, terminal: Open) -> None:
    waiting = wait_for_room(terminal, command)
    waiting.wait_for(WAITING)
    assert cli("--release", "late").code == 0
    assert waiting.end() == 75
    assert "\r\x1b[K✗ " in waiting.raw
    before, _, refusal = waiting.screen.text().partition("✗ ")
    assert before == COMMANDS[command]
    assert "待機中" not in refusal
    assert "タスク 'late' の待機は取り消されました" in refusal


@pytest.mark.parametrize("command", COMMANDS)
def test_end_of_the_wait_takes_the_place_of_its_line(command: str, terminal: Open, full: GPUResourceManagerV01) -> None:
    waiting = wait_for_room(terminal, command)
    waiting.wait_for(WAITING)
    assert full.release_resources("all")
    assert waiting.end() == 0
    granted = "✓ this-machine の GPU 0,1 で実行します: late\njob" if command == "run" else "✓ リソース割り当て成功:\n"
    assert waiting.screen.text().startswith(f"{COMMANDS[command]}{granted}")
    assert "待機中" not in waiting.screen.text()


def test_line_of_the_wait_is_one_line_on_a_narrow_terminal(terminal: Open, full: GPUResourceManagerV01) -> None:
    first = wait_for_room(terminal, "run", columns=40)
    first.wait_for("待機中 (1 番目)")
    second = terminal("--run", "later", "2", "4", "--wait", "--", "echo", "job", columns=40)
    second.wait_for("待機中 (2 番目)")
    assert full.release_resources("late")
    assert first.end() == 75
    second.wait_for("待機中 (1 番目)")
    assert len(second.screen.text().splitlines()) == 1
    assert full.release_resources("all")
    assert second.end() == 0
    assert second.screen.text() == "✓ this-machine の GPU 0,1 で実行します:\nlater\njob"
