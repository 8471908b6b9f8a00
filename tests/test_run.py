"""``--run``, ``--export``, ``--wait`` and ``--json`` as their users meet them."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import GUARD_S, running
from screens import CLI, cli, finish, made_up_note, start

from gpu_resource_manager_v01 import GPUResourceManagerV01

HERE = "gpu-server-1"
RUN = ("--run", "job", "2", "4", "--")

pytestmark = pytest.mark.usefixtures("made_pool")


@pytest.fixture(autouse=True)
def signals_work() -> Iterator[None]:
    """Undo, for the children too, that ``nohup`` or a shell's background lets us ignore signals."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGQUIT)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RESOURCE_SERVER", HERE)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


# --- Running a command ------------------------------------------------------------------------------


def test_command_gets_its_gpus_and_the_pool_gets_them_back(pool: Path) -> None:
    script = 'echo "$CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER $OMP_NUM_THREADS"'
    says = f"{made_up_note(pool)}✓ {HERE} の GPU 0,1 で実行します: job\n"
    assert cli(*RUN, "sh", "-c", script) == (0, "0,1 PCI_BUS_ID 4\n", says)
    assert running(pool) == []


def test_omp_num_threads_of_the_user_stands(pool: Path) -> None:
    assert cli(*RUN, "sh", "-c", "echo $OMP_NUM_THREADS", env={"OMP_NUM_THREADS": "1"}).out == "1\n"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -TERM $$"], 128 + 15),
        (["sh", "-c", "kill -KILL $$"], 128 + 9),
        (["/no/such/command"], 127),
        (["no-such-command"], 127),
        (["/etc/passwd"], 126),
        (["/"], 126),
    ],
    ids=lambda value: str(value),
)
def test_exit_code_is_that_of_the_command(pool: Path, command: list[str], code: int) -> None:
    assert cli(*RUN, *command).code == code
    assert running(pool) == []


def test_our_own_failures_have_codes_of_their_own(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("--run", "job", "9", "4", "--", "true").code == 125
    assert cli("--run", "job", "2", "4").code == 125
    assert cli("--run", "job", "2", "4", "--").code == 125
    assert cli("--allocate", "all", "8", "4", "--prefer-server", "1").code == 0
    assert cli(*RUN, "true").code == 75
    pool.write_text("broken")
    assert cli(*RUN, "true").code == 125
    pool.unlink()
    result = cli(*RUN, "true")
    assert (result.code, pool.exists()) == (125, False)
    assert "--init --server NAME:GPUS:CPUS" in result.err
    assert cli("--init").code == 0
    monkeypatch.delenv("GPU_RESOURCE_SERVER")
    result = cli(*RUN, "true")
    assert result.code == 125
    assert "--add-server NAME:GPUS:CPUS" in result.err


def test_caller_that_ignores_sigchld_changes_nothing(pool: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
    )
    assert finish(start("-c", script, str(CLI), *RUN, "sh", "-c", "exit 4")).code == 4


def test_script_without_an_interpreter_line_runs(pool: Path) -> None:
    script = pool.parent / "script"
    script.write_text("echo hello $1\n")
    script.chmod(0o755)
    assert cli(*RUN, str(script), "world").out == "hello world\n"


def test_terminal_that_goes_away_ends_the_command(pool: Path) -> None:
    terminal = Terminal(sys.executable, str(CLI), *RUN, "sh", "-c", "echo started; exec sleep 1000")
    terminal.expect("started")
    os.close(terminal.screen)
    _, status = os.waitpid(terminal.pid, 0)
    assert os.waitstatus_to_exitcode(status) in (128 + signal.SIGHUP, 74), "74: nobody is left to be told"
    assert running(pool) == []


def test_streams_of_the_command_are_its_own(pool: Path) -> None:
    result = cli(*RUN, "sh", "-c", "cat; echo err >&2", redirect="< <(printf 'a\\0b')")
    assert result.out == "a\0b"
    assert result.err == f"{made_up_note(pool)}✓ {HERE} の GPU 0,1 で実行します: job\nerr\n"
    assert finish(start(str(CLI), *RUN, "sh", "-c", "yes | head -1")).out == "y\n", "SIGPIPE works as ever"


def test_words_after_the_dashes_are_the_command_s_own(pool: Path) -> None:
    assert cli(*RUN, "printf", "%s.", "--json", "--", "--wait", "\x1b").out == "--json.--.--wait.\x1b."


def test_job_with_a_name_that_is_taken_is_refused(pool: Path) -> None:
    cli("--allocate", "job", "2", "1")
    assert cli(*RUN, "true").code == 125
    assert running(pool) == ["job"]


@pytest.mark.parametrize("name", ["TERM", "HUP", "INT", "QUIT", "USR1", "USR2"])
def test_signal_sent_to_us_reaches_the_command_once(pool: Path, name: str) -> None:
    script = (
        "import os, signal, sys\n"
        f"signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIG{name}])\n"
        "os.write(1, b'ready\\n')\n"
        f"signal.sigwait([signal.SIG{name}])\n"
        f"print(bool(signal.sigtimedwait([signal.SIG{name}], 0.2)), flush=True)\n"
        "sys.exit(5)\n"
    )
    process = start(str(CLI), *RUN, sys.executable, "-c", script)
    assert process.stdout
    assert process.stdout.read(6) == b"ready\n"
    process.send_signal(getattr(signal, f"SIG{name}"))
    result = finish(process)
    assert (result.code, result.out) == (5, "False\n")
    assert running(pool) == []


class Terminal:
    """A session leader on a terminal of its own: what somebody sits at."""

    def __init__(self, *command: str) -> None:
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            os.execvp(command[0], command)
        self.seen = ""

    def expect(self, text: str) -> str:
        while text not in self.seen:
            assert select.select([self.screen], [], [], GUARD_S)[0], self.seen
            self.seen += os.read(self.screen, 4096).decode()
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def end(self) -> int:
        while True:
            try:
                if not os.read(self.screen, 4096):
                    break
            except OSError:  # the terminal of a process that is gone
                break
        _, status = os.waitpid(self.pid, 0)
        os.close(self.screen)
        return os.waitstatus_to_exitcode(status)


COUNTS_INTERRUPTS = (
    "import signal, time\n"
    "count = 0\n"
    "def handler(*args):\n"
    "    global count\n"
    "    count += 1\n"
    "signal.signal(signal.SIGINT, handler)\n"
    "print('ready', flush=True)\n"
    "while not count:\n"
    "    time.sleep(0.01)\n"
    "time.sleep(0.3)\n"
    "print(f'interrupts={count}', flush=True)\n"
)


def test_control_c_in_a_terminal_reaches_the_command_once(pool: Path) -> None:
    terminal = Terminal(sys.executable, str(CLI), *RUN, sys.executable, "-c", COUNTS_INTERRUPTS)
    terminal.expect("ready")
    terminal.type("\x03")
    terminal.expect("interrupts=1")
    assert terminal.end() == 0
    assert running(pool) == []


def test_command_has_the_terminal(pool: Path) -> None:
    terminal = Terminal(
        sys.executable, str(CLI), *RUN, "sh", "-c", "test -t 0 && test -t 1 && test -t 2 && read x && echo got-$x"
    )
    terminal.expect("実行します")
    terminal.type("word\n")
    terminal.expect("got-word")
    assert terminal.end() == 0


def test_job_control_of_a_shell_works(pool: Path) -> None:
    script = pool.parent / "job.py"
    script.write_text(
        "import os, select, signal, sys\n"
        "signal.signal(signal.SIGCONT, lambda *args: os.write(1, b'continued\\n'))\n"
        "print('started', flush=True)\n"
        # With a time limit, for a signal just ahead of a read without one would be noticed only after it.
        "while not select.select([sys.stdin], [], [], 0.1)[0]:\n"
        "    pass\n"
        "print('got-' + input())\n"
    )
    command = f"{sys.executable} {CLI} --run job 2 4 -- {sys.executable} {script}"
    terminal = Terminal("bash", "--norc", "--noprofile", "-i")
    terminal.type("PS1='prom''pt> '\n")
    terminal.expect("prompt> ")
    terminal.type(command + "\n")
    terminal.expect("started\r\n")
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.expect("prompt> ")
    assert running(pool) == ["job"]
    terminal.type("fg\n")
    terminal.expect("continued")
    terminal.type("word\n")
    terminal.expect("got-word")
    terminal.expect("prompt> ")
    terminal.type("exit $?\n")
    assert terminal.end() == 0
    assert running(pool) == []


def test_interrupt_while_waiting_for_room_leaves_the_line(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    assert manager.allocate_resources("all", 8, 1, local=True)
    process = start(str(CLI), "--run", "job", "2", "4", "--wait", "--", "true")
    assert process.stderr
    first = process.stderr.readline().decode()
    assert first == "待機中 (1 番目): GPU 2 個と CPU 4 個を同時に確保できるサーバーがありません\n"
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert "waiting" not in json.loads(pool.read_text("utf-8"))
    assert os.listdir(pool.parent / ".leases") == []


@pytest.mark.parametrize(
    "command", [("--allocate", "late", "8", "1", "--prefer-server", "1"), ("--run", "late", "8", "1")]
)
def test_wait_that_is_too_long_ends_with_75(pool: Path, command: tuple[str, ...]) -> None:
    manager = GPUResourceManagerV01(pool)
    for server in range(4):
        assert manager.allocate_resources(f"all-{server}", 8, 1)
    before = [
        task["task_id"] for server in manager.get_detailed_status()["servers"] for task in server["running_tasks"]
    ]
    more = ["--", "true"] if command[0] == "--run" else []
    result = cli(*command, "--wait", "0.1", *more)
    assert result.code == 75
    assert "✗ " in result.err
    assert running(pool) == before


def test_waiting_line_on_a_terminal_is_one_line(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    assert manager.allocate_resources("all", 8, 1, local=True)
    terminal = Terminal(sys.executable, str(CLI), "--run", "job", "2", "4", "--wait", "--", "echo", "done")
    terminal.expect("待機中 (1 番目)")
    assert manager.release_resources("all")
    waited, started, rest = terminal.expect("done").split("\r\n")
    assert waited.endswith(f"を同時に確保できるサーバーがありません\r\x1b[K{made_up_note(pool).rstrip()}")
    assert (started, rest) == (f"✓ {HERE} の GPU 0,1 で実行します: job", "")
    assert terminal.end() == 0


# --- For a shell ------------------------------------------------------------------------------------


def export(shell: str, words: str, then: str) -> subprocess.CompletedProcess[str]:
    script = f'set -e; eval "$({sys.executable} {CLI} {words} --export)"; {then}'
    return subprocess.run([shell, "-c", script], capture_output=True, encoding="utf-8", check=False, timeout=GUARD_S)


@pytest.mark.parametrize("shell", [name for name in ("bash", "dash") if shutil.which(name)])
def test_export_sets_the_environment_of_a_shell_or_stops_it(pool: Path, shell: str) -> None:
    result = export(shell, '--allocate "it\'s; \\$x" 2 4', 'echo "$CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS $GPU_TASK_ID"')
    assert (result.returncode, result.stdout) == (0, "0,1 4 it's; $x\n")
    for words, code in (("--allocate job 8 4", 1), ("--allocate job 9 4", 2), ("--allocate job", 2), ("--allokate", 2)):
        result = export(shell, words, "echo reached")
        assert (result.returncode, result.stdout) == (code, ""), result
        assert result.stderr.startswith("✗ ")
    careless = f'eval "$({sys.executable} {CLI} --allocate job 8 4 --export)"; echo "$CUDA_VISIBLE_DEVICES"'
    result = subprocess.run([shell, "-c", careless], capture_output=True, encoding="utf-8", check=False)
    assert result.stdout == "-1\n", "a shell that goes on sees no GPU"


def test_export_that_is_terminated_while_it_waits_stops_the_shell(pool: Path) -> None:
    assert GPUResourceManagerV01(pool).allocate_resources("all", 8, 1, local=True)
    process = start(str(CLI), "--allocate", "late", "2", "1", "--wait", "--export")
    assert process.stderr
    process.stderr.readline()
    process.terminate()
    result = finish(process)
    assert (result.code, result.out) == (143, "export CUDA_VISIBLE_DEVICES=-1\n(exit 143)\n")
    assert "waiting" not in json.loads(pool.read_text("utf-8"))


# --- For programs -----------------------------------------------------------------------------------


def document(*words: str, code: int = 0) -> Any:
    result = cli(*words)
    assert result.code == code, result
    found = json.loads(result.out)
    assert found["schema"] == 1
    assert found["ok"] is (code == 0)
    return found["result"] if code == 0 else found["error"]


def test_every_command_answers_with_one_document(pool: Path) -> None:
    assert document("--init", "--json")["total_gpus"] == 32
    assert document("--allocate", "t", "2", "4", "--json")["gpu_ids"] == [0, 1]
    assert document("--status", "--json")["total_running_tasks"] == 1
    assert document("--detail", "--json")["servers"][0]["running_tasks"][0]["task_id"] == "t"
    assert document("--release", "t", "--json") == {"task_id": "t"}
    assert document("--run", "r", "2", "4", "--json", "--", "true")["exit_code"] == 0
    assert document("--reset", "--yes", "--json")["resource_file"] == str(pool)
    assert document("--version", "--json") == {"version": "0.1"}


def test_every_failure_is_one_document_too(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def code(*words: str, exit_code: int) -> Any:
        error = document(*words, "--json", code=exit_code)
        assert error["message"]
        return error["code"]

    assert code("--unknown", exit_code=2) == "usage"
    assert code("--allocate", "t", "99", "1", exit_code=2) == "invalid_request"
    assert code("--release", "t", exit_code=1) == "unknown_task"
    for server in range(4):
        cli("--allocate", f"t{server}", "8", "1")
    assert code("--allocate", "t0", "2", "1", exit_code=2) == "duplicate_task"
    error = document("--allocate", "late", "2", "1", "--json", code=1)
    assert (error["code"], error["fewest_releases"], error["waiting"]) == ("no_capacity", ["t0"], 0)
    assert code("--allocate", "late", "2", "1", "--wait", "0.1", exit_code=75) == "no_capacity"
    assert code("--reset", exit_code=2) == "not_confirmed"
    assert code("--init", "--server", "a:8:64", exit_code=1) == "pool_conflict"
    error = document("--run", "r", "2", "4", "--json", "--", "/no/such/command", code=127)
    assert error["code"] == "command_not_started"
    pool.write_text("broken")
    error = document("--status", "--json", code=74)
    assert (error["code"], error["path"]) == ("state_file", str(pool))
    pool.unlink()
    error = document("--status", "--json", code=74)
    assert (error["code"], error["path"]) == ("no_pool", str(pool))


# --- Describing machines ------------------------------------------------------------------------------


def test_pool_of_real_machines_is_described_once_and_changed_on_purpose(
    absent_pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = os.uname().nodename
    described = ("--server", f"{host}:4:32", "--server", "node2:16:128", "--min-gpus", "1")
    monkeypatch.delenv("GPU_RESOURCE_SERVER")
    assert cli("--init", *described).code == 0
    assert cli("--init", *described).code == 0, "the same again"
    assert cli("--init").code == 0
    before = absent_pool.read_bytes()
    result = cli("--init", "--server", "a:8:64")
    assert (result.code, "--reset" in result.err) == (1, True)
    assert cli("--init", "--min-gpus", "2").code == 1
    assert absent_pool.read_bytes() == before
    assert cli("--allocate", "one", "1", "1").code == 0
    assert cli("--allocate", "big", "16", "128").code == 0
    assert cli("--allocate", "too-big", "17", "1").code == 2
    assert cli("--run", "here", "3", "1", "--", "sh", "-c", "test $CUDA_VISIBLE_DEVICES = 1,2,3").code == 0
    assert cli("--reset", "--yes", "--server", "a:8:64").code == 0
    assert GPUResourceManagerV01(absent_pool).get_resource_summary()["total_gpus"] == 8
    assert running(absent_pool) == []


def test_reset_to_another_description_refuses_while_tasks_run(pool: Path) -> None:
    cli("--allocate", "t", "2", "1")
    terminal = Terminal(sys.executable, str(CLI), "--reset", "--server", "a:8:64")
    terminal.expect("[y/N]:")
    terminal.type("y\n")
    terminal.expect("--reset --yes")
    assert terminal.end() == 1
    assert running(pool) == ["t"]


@pytest.mark.parametrize(
    "words",
    [
        ("--server", "a"),
        ("--server", "a:8"),
        ("--server", "a:x:8"),
        ("--server", "a:0:8"),
        ("--server", "a:8:0"),
        ("--server", "a:99999:8"),
        ("--server", ":8:8"),
        ("--server", "a:8:8", "--server", "A:8:8"),
        ("--min-gpus", "0"),
        ("--min-gpus", "9"),
        ("--server", "a:4:8", "--min-gpus", "5"),
        ("--server", "a:4:8", "--detect"),
    ],
    ids=" ".join,
)
def test_description_that_makes_no_sense_is_refused_and_makes_nothing(
    absent_pool: Path, words: tuple[str, ...]
) -> None:
    result = cli("--init", *words)
    assert result.code == 2
    assert result.err.startswith("✗ ")
    assert not absent_pool.exists()


FAKE_NVML = r"""
#include <stdlib.h>
#include <string.h>
static int code(void) { const char *text = getenv("FAKE_NVML_CODE"); return text ? atoi(text) : 0; }
int nvmlInit_v2(void) { return code(); }
int nvmlInitWithFlags(unsigned int flags) { return code(); }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = atoi(getenv("FAKE_NVML_COUNT")); return 0; }
const char *nvmlErrorString(int result) { return "fake error"; }
"""


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a small libnvidia-ml.so.1 that answers as the environment says."""
    pytest.importorskip("pynvml")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("nvml")
    (directory / "nvml.c").write_text(FAKE_NVML)
    library = str(directory / "libnvidia-ml.so.1")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, str(directory / "nvml.c")], check=True)
    return str(directory)


def test_detected_machine_is_a_server_and_can_run(
    absent_pool: Path, nvml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GPU_RESOURCE_SERVER")
    env = {"LD_LIBRARY_PATH": nvml, "FAKE_NVML_COUNT": "3"}
    assert cli("--init", "--detect", "--min-gpus", "1", env=env).code == 0
    [server] = GPUResourceManagerV01(absent_pool).get_detailed_status()["servers"]
    assert (server["server_name"], server["total_gpus"]) == (os.uname().nodename, 3)
    assert server["total_cpus"] == os.cpu_count()
    assert cli("--run", "t", "3", "1", "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES").out == "0,1,2\n"


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"FAKE_NVML_COUNT": "0"}, "GPU はありません"),
        ({"FAKE_NVML_COUNT": "4", "FAKE_NVML_CODE": "9"}, "NVML"),  # NVML_ERROR_DRIVER_NOT_LOADED
        ({"FAKE_NVML_COUNT": "4", "FAKE_NVML_CODE": "18"}, "NVML"),  # NVML_ERROR_LIB_RM_VERSION_MISMATCH
        ({"LD_LIBRARY_PATH": ""}, "NVML"),  # no library at all
    ],
    ids=["none", "driver-missing", "version-mismatch", "no-library"],
)
def test_cannot_know_is_not_taken_for_zero(absent_pool: Path, nvml: str, env: dict[str, str], reason: str) -> None:
    result = cli("--init", "--detect", env={"LD_LIBRARY_PATH": nvml, **env})
    assert result.code == 2
    assert reason in result.err
    assert "--init --server NAME:GPUS:CPUS" in result.err
    assert not absent_pool.exists()


def test_missing_package_is_said(absent_pool: Path, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "pynvml.py").write_text("raise ImportError('No module named pynvml')")
    result = cli("--init", "--detect", env={"PYTHONPATH": str(tmp_path / "lib")})
    assert result.code == 2
    assert f"この Python ({sys.executable}) に pip で nvidia-ml-py をインストール" in result.err
    assert not absent_pool.exists()
