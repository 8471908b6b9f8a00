"""The command line as its users meet it: a real process, its screens, its exit code, its two streams."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from conftest import BOTH_FILES, GUARD_S, PROJECT, names, running
from filelock import FileLock
from screens import CLI, Result, cli, finish, made_up_note, start
from wcwidth import wcswidth

from cli_v01 import HELP, build_parser
from gpu_resource_manager_v01 import GPUResourceManagerV01, this_requester

pytestmark = pytest.mark.usefixtures("made_pool")


def assert_refused(result: Result, code: int) -> None:
    """One message on stderr, and nothing on stdout that looks like success."""
    assert result.code == code, result
    assert result.err.startswith("✗ "), result.err
    assert result.err.count("✗") == 1, result.err
    assert "✓" not in result.out, result.out


def without_times(text: str) -> str:
    text = re.sub(r"要求元: .+@.+ \(PID \d+\)$", "要求元: WHO", text, flags=re.MULTILINE)
    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", "TIME", text)


@pytest.fixture
def busy(pool: Path) -> Path:
    """A pool in which the task ``running`` holds GPUs 0 and 1 of the first server."""
    GPUResourceManagerV01(pool).allocate_resources("running", 2, 1)
    return pool


@pytest.fixture
def locked(busy: Path) -> Iterator[Path]:
    """The same pool while another process, seen from the CLI, holds its lock."""
    with FileLock(busy.parent / ".resource.lock"):
        yield busy


# --- Whole screens --------------------------------------------------------------------------------

TOTALS_IDLE = """\
合計:
  GPU: 32/32 利用可能
  CPU: 256/256 利用可能
  実行中タスク: 0
  1 タスクの範囲: GPU 2-8、CPU 1-64
"""


def status_idle(pool: Path) -> str:
    """The first screen of all, in 80 columns; of a longer path, its end is shown."""
    path = str(pool)
    return f"""\
============================= GPU リソース状態 ==============================
┌────────────┬──────────────┬─────────┬──────────────┬─────────┬────────────┐
│サーバー    │GPU利用可/合計│GPU使用率│CPU利用可/合計│CPU使用率│実行中タスク│
├────────────┼──────────────┼─────────┼──────────────┼─────────┼────────────┤
│gpu-server-0│     8/8      │  0.0%   │    64/64     │  0.0%   │     0      │
│gpu-server-1│     8/8      │  0.0%   │    64/64     │  0.0%   │     0      │
│gpu-server-2│     8/8      │  0.0%   │    64/64     │  0.0%   │     0      │
│gpu-server-3│     8/8      │  0.0%   │    64/64     │  0.0%   │     0      │
└────────────┴──────────────┴─────────┴──────────────┴─────────┴────────────┘

{TOTALS_IDLE}
プール: {path if len(path) <= 72 else "…" + path[-71:]}
  架空のサーバー (登録: --reset --detect か --reset --server NAME:GPUS:CPUS)
"""


ALLOCATED = """\
リソース割り当てを試行中:
  タスクID: my_task_001
  GPU数: 4
  CPU数: 32

✓ リソース割り当て成功:
  サーバー: gpu-server-0
  GPU ID: [0, 1, 2, 3]
  CPU数: 32

✓ リソース割り当て成功！
  サーバー: gpu-server-0
  GPU ID: [0, 1, 2, 3]
  GPUデバイス文字列: 0,1,2,3
  CPU数: 32

使用ヒント:
  export CUDA_VISIBLE_DEVICES=0,1,2,3
  export CUDA_DEVICE_ORDER=PCI_BUS_ID

リソース解放:
  python cli_v01.py --release my_task_001
"""

RELEASED = """\
リソース解放を試行中: my_task_001
✓ リソース解放完了: my_task_001
✓ リソース解放成功！
"""

DETAIL = """\
============================= GPU リソース詳細 ==============================
gpu-server-0 (ID: 0)
  利用可能GPU: [4, 5, 6, 7] (4/8)
  利用可能CPU: 32/64
  実行中タスク: 1
    - my_task_001
      GPU ID: [0, 1, 2, 3]
      CPU数: 32
      開始時刻: TIME
      要求元: WHO

gpu-server-1 (ID: 1)
  利用可能GPU: [0, 1, 2, 3, 4, 5, 6, 7] (8/8)
  利用可能CPU: 64/64
  実行中タスク: 0

gpu-server-2 (ID: 2)
  利用可能GPU: [0, 1, 2, 3, 4, 5, 6, 7] (8/8)
  利用可能CPU: 64/64
  実行中タスク: 0

gpu-server-3 (ID: 3)
  利用可能GPU: [0, 1, 2, 3, 4, 5, 6, 7] (8/8)
  利用可能CPU: 64/64
  実行中タスク: 0

最終更新: TIME
プール: {pool}
  架空のサーバー (登録: --reset --detect か --reset --server NAME:GPUS:CPUS)
"""

RESET = "✓ システムリセット完了\n"


def test_init_names_the_new_file_and_shows_an_idle_pool(absent_pool: Path) -> None:
    made_up = "  架空のサーバー (登録: --reset --detect か --reset --server NAME:GPUS:CPUS)\n"
    screen = f"✓ 初期化完了 (既存の状態は上書きしません): {absent_pool}\n\n{TOTALS_IDLE}{made_up}"
    assert cli("--init") == (0, screen, "")
    assert names(absent_pool) == BOTH_FILES


def test_init_leaves_an_existing_file_unchanged(busy: Path) -> None:
    before = busy.read_bytes()
    assert cli("--init").code == 0
    assert busy.read_bytes() == before


def test_screens_from_the_first_status_to_the_reset(pool: Path) -> None:
    assert cli("--status") == (0, status_idle(pool), "")
    assert cli("--allocate", "my_task_001", "4", "32") == (0, ALLOCATED, made_up_note(pool))
    code, out, err = cli("--detail")
    assert (code, without_times(out), err) == (0, DETAIL.format(pool=pool), "")
    assert cli("--release", "my_task_001") == (0, RELEASED, "")
    assert cli("--allocate", "my_task_001", "4", "32") == (0, ALLOCATED, made_up_note(pool))
    assert cli("--reset", "--yes") == (0, RESET, "")
    assert cli("--status") == (0, status_idle(pool), "")


def test_status_table_lines_up_on_a_screen_whatever_the_names_and_numbers(busy: Path) -> None:
    document = json.loads(busy.read_text("utf-8"))
    for server, name in zip(document["servers"], ["計算機-甲", "1e5", "a", "007"], strict=True):
        server["server_name"] = name
    busy.write_text(json.dumps(document), "utf-8")
    screen = cli("--status").out
    table = [line for line in screen.splitlines() if line[0:1] in tuple("┌│├└")]
    assert len(table) == 8
    assert len({wcswidth(line) for line in [*screen.splitlines()[:1], *table]}) == 1, screen
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in table if line[0] == "│"]
    assert cells == [
        ["サーバー", "GPU利用可/合計", "GPU使用率", "CPU利用可/合計", "CPU使用率", "実行中タスク"],
        ["計算機-甲", "6/8", "25.0%", "63/64", "1.6%", "1"],
        ["1e5", "8/8", "0.0%", "64/64", "0.0%", "0"],
        ["a", "8/8", "0.0%", "64/64", "0.0%", "0"],
        ["007", "8/8", "0.0%", "64/64", "0.0%", "0"],
    ]


def test_version_is_one_line() -> None:
    assert cli("--version") == (0, "GPU リソースマネージャー v0.1\n", "")


def test_no_option_at_all_prints_the_help(absent_pool: Path) -> None:
    help_screen = cli("--help")
    assert cli() == help_screen
    assert help_screen.code == 0
    assert help_screen.err == ""
    assert help_screen.out.startswith("usage: python cli_v01.py コマンド")
    assert names(absent_pool) == []


def test_help_names_exactly_the_options_that_there_are() -> None:
    (explained, _, _) = cli("--help").out.partition("終了コード:")
    there_are = {option for action in build_parser()._actions for option in action.option_strings}
    assert set(re.findall(r"^  (?:(-h), )?(--[a-z-]+)", explained, re.MULTILINE)) == {
        ("-h" if option == "--help" else "", option) for option in there_are - {"-h"}
    }


def test_help_is_given_whatever_it_is_asked_with_unless_that_is_wrong() -> None:
    assert cli("--status", "--help") == cli("-h") == cli("--help")
    assert json.loads(cli("--help", "--json").out)["result"]["help"] == HELP.format("python cli_v01.py")
    assert cli("--help", "--unknown").code == 2


# --- The usage examples of the specification ------------------------------------------------------


def test_example_1_one_user_trains_and_releases(pool: Path) -> None:
    screen = cli("--allocate", "training_resnet50", "4", "32").out
    assert "  export CUDA_VISIBLE_DEVICES=0,1,2,3\n" in screen
    assert "  python cli_v01.py --release training_resnet50\n" in screen
    assert cli("--release", "training_resnet50").code == 0
    assert running(pool) == []


def test_example_2_a_third_user_gets_what_the_first_released() -> None:
    for user in ("user_a_task", "user_b_task"):
        assert cli("--allocate", user, "4", "32").code == 0
    assert "│gpu-server-0│     0/8      │ 100.0%  │     0/64     │ 100.0%  │     2      │" in cli("--status").out
    assert cli("--release", "user_a_task").code == 0
    third = cli("--allocate", "user_c_task", "4", "32")
    assert "  サーバー: gpu-server-0\n  GPU ID: [0, 1, 2, 3]\n" in third.out


EXAMPLE_3 = """\
import os, sys
from gpu_resource_manager_v01 import GPUResourceManagerV01

manager = GPUResourceManagerV01()
if "release" in sys.argv:
    print(manager.release_resources("my_task"))
else:
    granted = manager.allocate_resources("my_task", 4, 32)
    os.environ["CUDA_VISIBLE_DEVICES"] = granted["gpu_devices"]
    print(granted["gpu_ids"])
"""


def copy_the_two_files(directory: Path) -> None:
    """Copy command and library so that they never meet a pool of the machine that the tests run on."""
    shutil.copy(PROJECT / "cli_v01.py", directory)
    library = (PROJECT / "gpu_resource_manager_v01.py").read_text("utf-8")
    assert library.count(' = "/etc/gpu-resource-file"') == 1
    library = library.replace(' = "/etc/gpu-resource-file"', f' = "{directory}/no-machine-file"')
    (directory / "gpu_resource_manager_v01.py").write_text(library, "utf-8")


@pytest.mark.parametrize("variable", [True, False], ids=["GPU_RESOURCE_FILE", "beside-the-module"])
def test_example_3_a_script_elsewhere_and_the_cli_share_one_pool(
    variable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    checkout.mkdir()
    elsewhere.mkdir()
    copy_the_two_files(checkout)
    package = "gpu_resource_extensions"
    shutil.copytree(PROJECT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    (elsewhere / "train.py").write_text(EXAMPLE_3, "utf-8")
    (elsewhere / "gpu").symlink_to(checkout / "cli_v01.py")
    if not variable:
        monkeypatch.delenv("GPU_RESOURCE_FILE")

    def run(*args: str) -> Result:
        return finish(start(*args, cwd=elsewhere, env={"PYTHONPATH": str(checkout)}))

    assert run("train.py") == (0, "[0, 1, 2, 3]\n", "")
    assert "    - my_task\n" in run(str(checkout / "cli_v01.py"), "--detail").out
    assert "    - my_task\n" in run("gpu", "--detail").out, "and through a link to the command"
    assert run("train.py", "release") == (0, "True\n", "")
    used = tmp_path if variable else checkout
    assert run("gpu", "--status").out == status_idle(used / "resource_status.json")
    assert (checkout / "resource_status.json").exists() is not variable


# --- The answer is no: exit code 1 ----------------------------------------------------------------


def test_no_room_says_what_is_short_on_each_server(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    for server in range(4):
        manager.allocate_resources(f"big-{server}", 8, 60)
    before = pool.read_bytes()
    result = cli("--allocate", "late", "2", "5")
    assert result.code == 1
    assert result.out == "リソース割り当てを試行中:\n  タスクID: late\n  GPU数: 2\n  CPU数: 5\n\n"
    user = this_requester()["user"]
    assert without_times(result.err) == (
        "✗ リソース不足: GPU 2 個と CPU 5 個を同時に確保できるサーバーがありません\n"
        "  gpu-server-0: GPU 2 個・CPU 1 個不足\n"
        f"    big-0: GPU 8 個・CPU 60 個 (TIME から, {user})\n"
        "  gpu-server-1: GPU 2 個・CPU 1 個不足\n"
        f"    big-1: GPU 8 個・CPU 60 個 (TIME から, {user})\n"
        "  gpu-server-2: GPU 2 個・CPU 1 個不足\n"
        f"    big-2: GPU 8 個・CPU 60 個 (TIME から, {user})\n"
        "  gpu-server-3: GPU 2 個・CPU 1 個不足\n"
        f"    big-3: GPU 8 個・CPU 60 個 (TIME から, {user})\n"
        "  次の 1 件が解放されれば足ります: big-0\n"
        "  対処: 空きが出てから再実行するか、--wait で待ってください\n"
    )
    assert pool.read_bytes() == before


def test_no_room_says_when_the_free_gpus_are_merely_scattered(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    for server in range(4):
        manager.allocate_resources(f"most-{server}", 6, 1)
    result = cli("--allocate", "late", "4", "32")
    assert_refused(result, 1)
    assert [line for line in result.err.splitlines() if line[:3] != "   "][1:6] == [
        "  gpu-server-0: GPU 2 個不足",
        "  gpu-server-1: GPU 2 個不足",
        "  gpu-server-2: GPU 2 個不足",
        "  gpu-server-3: GPU 2 個不足",
        "  空きの合計 (GPU 8 個・CPU 252 個) は足りますが、複数のサーバーに分散しています",
    ]


def test_unknown_task_cannot_be_released(busy: Path) -> None:
    before = busy.read_bytes()
    assert cli("--release", "nobody") == (
        1,
        "リソース解放を試行中: nobody\n",
        "✗ タスクが見つかりません: nobody\n  対処: --detail で実行中のタスクIDを確認してください\n",
    )
    assert busy.read_bytes() == before


def test_preferred_server_without_room_falls_back_to_first_fit(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool)
    manager.allocate_resources("big", 8, 1, prefer_server_id=2)
    assert "  サーバー: gpu-server-1\n" in cli("--allocate", "a", "2", "1", "--prefer-server", "1").out
    assert "  サーバー: gpu-server-0\n" in cli("--prefer-server", "2", "--allocate", "b", "2", "1").out


# --- Wrong usage and bad parameters: exit code 2 --------------------------------------------------

BAD_TASK_IDS: list[str | bytes] = ["", " ", "　", "x" * 129, "a\tb", "a\x7fb", "-5", "- x", b"\xff", b"a\xed\xa0\x80"]
BAD_GPUS = ["1", "9", "0", "-2", "two", "True", "4.0", "1_0", " 4", "4\n", "４", "", "9" * 5000]
BAD_CPUS = ["0", "65", "-1", "1e1"]
BAD_PARAMETERS: list[tuple[str | bytes, ...]] = [
    *(("--allocate", "task", gpus, "1") for gpus in BAD_GPUS),
    *(("--allocate", "task", "2", cpus) for cpus in BAD_CPUS),
    *(("--allocate", task_id, "2", "1") for task_id in BAD_TASK_IDS),
    *(("--release", task_id) for task_id in BAD_TASK_IDS),
    ("--allocate", "running", "2", "1"),
    *(("--allocate", "task", "2", "1", "--prefer-server", server) for server in ("4", "-1", "x", "")),
]
BAD_USAGE = [
    ("--allocate", "a", "2", "1", "--allocate", "b", "2", "1"),
    ("--release", "a", "--release", "b"),
    ("--rese",),
    ("--rese", "--yes"),
    ("--stat",),
    ("--alloc", "task", "2", "1"),
    ("--allocate", "task", "2", "1", "--prefer", "1"),
    ("--init", "--status"),
    ("--status", "--detail"),
    ("--allocate", "task", "2", "1", "--release", "running"),
    ("--release", "running", "--reset", "--yes"),
    ("--status", "--version"),
    ("--prefer-server", "1"),
    ("--status", "--prefer-server", "1"),
    ("--release", "running", "--prefer-server", "0"),
    ("--yes",),
    ("--status", "--yes"),
    ("--allocate", "task", "2", "1", "--yes"),
    ("--allocate",),
    ("--allocate", "task", "2"),
    ("--allocate", "task", "2", "1", "1"),
    ("--allocate=task", "2", "1"),
    ("--release",),
    ("--status=now",),
    ("--unknown",),
    ("status",),
    ("",),
]


@pytest.mark.parametrize("args", BAD_PARAMETERS, ids=lambda args: repr(args)[:60])
def test_bad_parameter_is_refused_with_one_message_and_touches_nothing(
    args: tuple[str | bytes, ...], busy: Path
) -> None:
    before = busy.read_bytes()
    assert_refused(cli(*args), 2)
    assert busy.read_bytes() == before
    assert names(busy) == BOTH_FILES


@pytest.mark.parametrize("args", BAD_USAGE, ids=" ".join)
def test_wrong_usage_is_refused_with_one_message_and_touches_nothing(args: tuple[str, ...], busy: Path) -> None:
    before = busy.read_bytes()
    result = cli(*args)
    assert_refused(result, 2)
    assert result.out == ""
    assert result.err.endswith("\n  対処: python cli_v01.py --help で使い方を確認してください\n")
    assert busy.read_bytes() == before


def test_every_refusal_says_what_to_do_next(busy: Path) -> None:
    refusals: list[tuple[str, ...]] = [
        ("--allocate", "task", "9", "1"),
        ("--allocate", "task", "2", "65"),
        ("--allocate", "running", "2", "1"),
        ("--allocate", "task", "2", "1", "--prefer-server", "4"),
        ("--allocate", "", "2", "1"),
        ("--release", "x" * 129),
    ]
    assert [args for args in refusals if "してください" not in cli(*args).err] == []


def test_longest_task_id_is_accepted_and_can_be_released(pool: Path) -> None:
    task_id = "長" * 128
    assert cli("--allocate", task_id, "8", "64").code == 0
    assert running(pool) == [task_id]
    assert cli("--release", task_id).code == 0


# --- State file and lock: exit codes 74 and 75, readers that never wait ---------------------------

COMMANDS = [
    ("--init",),
    ("--status",),
    ("--detail",),
    ("--allocate", "task", "2", "1"),
    ("--release", "running"),
]
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-9],
    "not-utf-8": lambda data: b"\xff" + data,
    "later-version": lambda data: data.replace(b'"0.1"', b'"0.2"'),
    "gpu-lost": lambda data: data.replace(b"[0, 1]", b"[0]"),
}


@pytest.mark.parametrize(
    ("args", "damage"),
    [*((args, "cut") for args in COMMANDS), *((("--status",), damage) for damage in DAMAGES if damage != "cut")],
)
def test_damaged_state_file_is_reported_and_left_as_it_is(args: tuple[str, ...], damage: str, busy: Path) -> None:
    whole = busy.read_bytes()
    damaged = DAMAGES[damage](whole)
    assert damaged != whole
    busy.write_bytes(damaged)
    result = cli(*args)
    assert_refused(result, 74)
    assert result.err.startswith(f"✗ 状態ファイルのエラー: {busy}\n  原因: ")
    assert "\n  対処: " in result.err
    assert busy.read_bytes() == damaged
    assert names(busy) == BOTH_FILES


def test_reset_sets_a_damaged_state_file_aside_and_says_so(busy: Path) -> None:
    busy.write_bytes(b"{")
    result = cli("--reset", "--yes")
    assert (result.code, result.out) == (0, RESET)
    assert result.err.startswith("注意: 使えない状態ファイルを ")
    (aside,) = busy.parent.glob("resource_status.json.corrupt-*")
    assert aside.read_bytes() == b"{"
    assert cli("--status").out == status_idle(busy)


def test_missing_directory_is_reported_with_its_path(pool: Path) -> None:
    result = cli("--init", env={"GPU_RESOURCE_FILE": str(pool.parent / "missing" / "state.json")})
    assert_refused(result, 74)
    assert str(pool.parent / "missing") in result.err


@pytest.mark.parametrize("redirect", ["", ">&-"])
def test_relative_state_file_is_refused_even_in_a_vanished_directory(redirect: str, tmp_path: Path) -> None:
    vanished = tmp_path / "vanished"
    vanished.mkdir()
    remove = f"import os, sys; os.rmdir(os.getcwd()); os.execv({sys.executable!r}, [sys.executable, *sys.argv[1:]])"
    result = finish(
        start("-c", remove, str(CLI), "--status", cwd=vanished, redirect=redirect, env={"GPU_RESOURCE_FILE": "x.json"})
    )
    assert_refused(result, 2)
    assert "GPU_RESOURCE_FILE が絶対パスではありません: 'x.json'" in result.err
    assert "出力" not in result.err, "it is not the output that failed"


@pytest.mark.parametrize("args", [("--status",), ("--detail",)], ids=" ".join)
def test_readers_answer_while_another_process_holds_the_lock(args: tuple[str, ...], locked: Path) -> None:
    result = cli(*args)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("=====")


@pytest.mark.parametrize(
    "args", [("--allocate", "task", "2", "1"), ("--release", "running"), ("--reset", "--yes")], ids=" ".join
)
def test_lock_not_had_in_time_is_an_error_to_try_again(args: tuple[str, ...], locked: Path) -> None:
    # The command itself waits for a minute; here its main() runs with another default.
    program = (
        "import sys, cli_v01, gpu_resource_manager_v01 as library\n"
        "library.GPUResourceManagerV01.__init__.__defaults__ = (None, 0.2)\n"
        "sys.exit(cli_v01.main())"
    )
    before = locked.read_bytes()
    result = finish(start("-c", program, *args, env={"PYTHONPATH": str(PROJECT)}))
    assert_refused(result, 75)
    assert result.err.splitlines()[0] == "✗ ロック取得タイムアウト"
    assert str(locked.parent / ".resource.lock") in result.err
    assert "  対処: " in result.err
    assert locked.read_bytes() == before


# --- Interrupts: exit code 130 --------------------------------------------------------------------

INTERRUPTED = "✗ 中断しました\n  対処: --detail で現在の状態を確認できます\n"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Undo, for the children too, that a shell lets what it runs in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def has_open(process: subprocess.Popen[bytes], file: Path) -> bool:
    directory = Path(f"/proc/{process.pid}/fd")
    with contextlib.suppress(FileNotFoundError):  # a descriptor closed while we look
        return str(file) in [os.readlink(link) for link in directory.iterdir()]
    return False


@pytest.mark.usefixtures("interruptible")
def test_interrupt_while_waiting_for_the_lock_changes_nothing(locked: Path) -> None:
    before = locked.read_bytes()
    process = start(str(CLI), "--allocate", "task", "2", "1")
    guard = time.monotonic() + GUARD_S
    while not has_open(process, locked.parent / ".resource.lock"):
        assert process.poll() is None
        assert time.monotonic() < guard, "guard against a hang"
    process.send_signal(signal.SIGINT)
    result = finish(process)
    assert (result.code, result.err) == (130, INTERRUPTED)
    assert locked.read_bytes() == before
    assert names(locked) == BOTH_FILES


@pytest.mark.usefixtures("interruptible")
def test_interrupt_while_the_library_is_imported_is_no_crash(
    absent_pool: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # The first module that the library imports and the command has not yet sends the signal.
    fake = tmp_path_factory.mktemp("path")
    (fake / "json.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nsignal.pause()\n")
    assert cli("--init", env={"PYTHONPATH": str(fake)}) == (130, "", INTERRUPTED)
    assert names(absent_pool) == []


# --- Reset asks first -----------------------------------------------------------------------------


def question(pool: Path) -> str:
    return (
        "警告：すべての実行中タスクの記録がクリアされます！\n"
        f"  ファイル: {pool}\n"
        "  消える記録: running\n"
        "続行しますか？ [y/N]:\n"
    )


@contextlib.contextmanager
def reset_on_terminal(typed: bytes, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Start ``--reset`` with a terminal to ask on, at which ``typed`` has been typed already."""
    keyboard, terminal = pty.openpty()
    try:
        os.write(keyboard, typed)
        yield start(str(CLI), "--reset", stdin=terminal, env=env)
    finally:
        os.close(terminal)
        os.close(keyboard)


@pytest.mark.parametrize("typed", ["y\n", "Y\n", "yes\n", "YES\n", "はい\n"])
def test_reset_on_a_terminal_goes_ahead_after_yes(typed: str, busy: Path) -> None:
    with reset_on_terminal(typed.encode()) as process:
        assert finish(process) == (0, RESET, question(busy))
    assert running(busy) == []


@pytest.mark.parametrize("typed", [b"n\n", b"\n", b"\x04", b"yup\n", b"\xff\n"], ids=repr)
def test_reset_on_a_terminal_stops_after_anything_else(typed: bytes, busy: Path) -> None:
    before = busy.read_bytes()
    # This setting makes the reading of stdin strict, as it is under most locales.
    with reset_on_terminal(typed, env={"PYTHONIOENCODING": "utf-8"}) as process:
        assert finish(process) == (
            1,
            "",
            f"{question(busy)}✗ リセットを中止しました\n  対処: 消してよければ y と答えてください\n",
        )
    assert busy.read_bytes() == before


@pytest.mark.usefixtures("interruptible")
def test_interrupt_at_the_question_resets_nothing(busy: Path) -> None:
    before = busy.read_bytes()
    with reset_on_terminal(b"") as process:
        assert process.stderr is not None
        asked = b""
        while not asked.endswith(b"[y/N]:\n"):
            more = os.read(process.stderr.fileno(), 1 << 16)
            assert more, "the command ended without asking"
            asked += more
        process.send_signal(signal.SIGINT)
        result = finish(process)
    assert (asked.decode(), result.code, result.err) == (question(busy), 130, INTERRUPTED)
    assert busy.read_bytes() == before


@pytest.mark.parametrize("redirect", ["</dev/null", "<&-", "< <(echo y)"])
def test_reset_refuses_when_there_is_no_terminal_to_ask_on(redirect: str, busy: Path) -> None:
    before = busy.read_bytes()
    result = cli("--reset", redirect=redirect)
    assert_refused(result, 2)
    assert "--reset --yes" in result.err
    assert busy.read_bytes() == before


# --- Encodings and broken streams -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "encoding"),
    [
        ({"LANG": "C"}, "utf-8"),
        ({"LC_ALL": "C"}, "utf-8"),
        ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "ascii"),
        ({"PYTHONIOENCODING": "cp932"}, "cp932"),
        ({"PYTHONIOENCODING": "euc_jp"}, "euc_jp"),
        ({"PYTHONIOENCODING": "ascii"}, "ascii"),
    ],
    ids=str,
)
def test_command_succeeds_in_an_encoding_that_lacks_some_characters(
    env: dict[str, str], encoding: str, pool: Path
) -> None:
    def shown(text: str) -> str:
        return text.encode(encoding, "replace").decode(encoding)

    assert cli("--status", env=env, encoding=encoding) == (0, shown(status_idle(pool)), "")
    allocated = cli("--allocate", "my_task_001", "4", "32", env=env, encoding=encoding)
    assert allocated == (0, shown(ALLOCATED), shown(made_up_note(pool)))
    refused = cli("--release", "nobody", env=env, encoding=encoding)
    assert refused.code == 1
    assert refused.err.startswith(shown("✗ タスクが見つかりません: nobody\n"))


ALLOCATE = ("--allocate", "task", "2", "1")


@pytest.mark.parametrize(
    ("args", "redirect", "code"),
    [
        (("--status",), ">&-", 0),
        (("--help",), ">&-", 0),
        (ALLOCATE, ">&-", 0),
        (ALLOCATE, "2>&-", 0),
        (ALLOCATE, "<&- >&- 2>&-", 0),
        (("--release", "nobody"), "2>&-", 1),
        (("--release", "nobody"), "2>/dev/full", 1),
        (("--unknown",), "2>/dev/full", 2),
        (("--status",), ">/dev/full 2>&-", 74),
        (("--status",), ">/dev/full 2>/dev/full", 74),
    ],
)
def test_missing_or_broken_stream_keeps_the_exit_code(
    args: tuple[str, ...], redirect: str, code: int, busy: Path
) -> None:
    result = cli(*args, redirect=redirect)
    assert result.code == code, result
    assert running(busy) == (["running", "task"] if args == ALLOCATE else ["running"])


@pytest.mark.parametrize("args", [("--status",), ("--detail",), ("--help",), ("--version",), ALLOCATE], ids=" ".join)
def test_full_output_is_an_error(args: tuple[str, ...]) -> None:
    result = cli(*args, redirect=">/dev/full")
    assert_refused(result, 74)
    assert "  対処: " in result.err


@pytest.mark.parametrize("args", [("--status",), ("--detail",), ("--help",)], ids=" ".join)
def test_reader_that_has_enough_is_no_error(args: tuple[str, ...]) -> None:
    first_line = cli(*args).out.splitlines(keepends=True)[0]
    assert cli(*args, redirect="| head -n 1") == (0, first_line, "")
    reader, writer = os.pipe()
    os.close(reader)  # so that the very first write fails
    process = start(str(CLI), *args, stdout=writer)
    os.close(writer)
    assert finish(process) == (0, "", "")


# --- Task identifiers as text ---------------------------------------------------------------------


@pytest.mark.parametrize("task_id", ["~", "学習", "it's $HOME"])
def test_hint_releases_the_task_in_a_real_shell(task_id: str, pool: Path) -> None:
    hint = cli("--allocate", task_id, "2", "1").out.splitlines()[-1]
    printed = subprocess.run(["bash", "-c", f"printf '%s\\n' {hint}"], capture_output=True, check=True)
    assert printed.stdout.decode().splitlines()[3] == task_id


def test_escape_in_the_path_of_the_state_file_never_reaches_the_screen(tmp_path: Path) -> None:
    odd = tmp_path / "odd\x1b[31m"
    odd.mkdir()
    env = {"GPU_RESOURCE_FILE": str(odd / "resource_status.json")}
    assert "odd?[31m/resource_status.json" in cli("--init", env=env).out
    (odd / "resource_status.json").write_text("broken")
    result = cli("--status", env=env)
    assert "odd?[31m/resource_status.json" in result.err
    assert "\x1b" not in result.out + result.err


@pytest.mark.parametrize(
    "character", ["\x1b[2J", "\r", "\n", "\b", "\x07", "\x85", "\x9b31m", "\u2028", "\u202e"], ids=ascii
)
def test_control_character_never_reaches_the_screen(character: str, busy: Path) -> None:
    text = f"a{character}forged"
    for args in (
        ("--allocate", text, "2", "1"),
        ("--allocate", "a", text, "1"),
        ("--release", text),
        ("--status", text),
    ):
        result = cli(*args)
        assert_refused(result, 2)
        for stream in (result.out, result.err):
            assert character[0] == "\n" or character[0] not in stream, args
            assert not [line for line in stream.splitlines() if line.startswith("forged")], args
    assert running(busy) == ["running"]


@pytest.mark.parametrize(
    "task_id",
    ["1e5", "007", "../../x", "/etc/passwd", "$(touch x)", "it's", 'a "b" c', "#1", "~", "学習 その1", "a\\nb"],
)
def test_task_id_is_stored_and_shown_as_it_is_and_the_hint_releases_it(
    task_id: str, tmp_path: Path, pool: Path
) -> None:
    allocated = cli("--allocate", task_id, "2", "1", cwd=tmp_path)
    assert f"\n  タスクID: {task_id}\n" in allocated.out
    assert running(pool) == [task_id]
    assert f"    - {task_id}\n" in cli("--detail").out
    assert names(pool) == BOTH_FILES
    hint = shlex.split(allocated.out.splitlines()[-1])
    assert hint == ["python", "cli_v01.py", "--release", task_id]
    assert cli(*hint[2:]) == (0, RELEASED.replace("my_task_001", task_id), "")
    assert names(pool) == BOTH_FILES


# --- Packages: imported when needed, explained when missing ---------------------------------------


@pytest.mark.parametrize(
    ("args", "imported"),
    [
        (("--status",), {"tabulate"}),
        (("--detail",), set()),
        (("--allocate", "task", "2", "1"), {"filelock"}),
        (("--release", "running"), {"filelock"}),
    ],
    ids=str,
)
def test_command_imports_only_the_package_that_it_needs(args: tuple[str, ...], imported: set[str], busy: Path) -> None:
    assert imports(*args) & {"filelock", "tabulate"} == imported


@pytest.mark.parametrize("args", [(), ("--help",), ("--version",), ("--unknown",), ("--yes",)], ids=" ".join)
def test_help_and_usage_errors_import_nothing_of_ours(args: tuple[str, ...]) -> None:
    assert not imports(*args) & {"filelock", "tabulate", "gpu_resource_manager_v01"}


def imports(*args: str) -> set[str]:
    """Return the modules that the interpreter lists while the command runs."""
    trace = finish(start("-X", "importtime", str(CLI), *args)).err
    modules = set(re.findall(r"^import time:.*\| +(\S+)$", trace, flags=re.MULTILINE))
    assert "io" in modules
    return modules


@pytest.mark.parametrize(("package", "args"), [("filelock", ALLOCATE), ("tabulate", ("--status",))])
def test_missing_package_is_named_with_the_way_to_install_it(
    package: str, args: tuple[str, ...], busy: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = busy.read_bytes()
    path = tmp_path_factory.mktemp("path")
    (path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}', name='{package}')\n")
    result = cli(*args, env={"PYTHONPATH": str(path)})
    assert_refused(result, 2)
    assert package in result.err.splitlines()[0]
    assert "pip install -r requirements_v01.txt" in result.err
    assert busy.read_bytes() == before


def test_two_files_are_enough_to_allocate_and_what_else_is_needed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkout").mkdir()
    copy_the_two_files(tmp_path / "checkout")
    monkeypatch.delenv("GPU_RESOURCE_FILE")
    alone = str(tmp_path / "checkout" / "cli_v01.py")
    asked: list[tuple[str, ...]] = [
        ALLOCATE,
        ("--status",),
        ("--detail",),
        ("--release", "task"),
        (*ALLOCATE, "--wait"),
    ]
    for words in asked:
        assert finish(start(alone, *words)).code == 0
    refused: list[tuple[tuple[str, ...], int]] = [(("--run", "j", "2", "1", "--", "true"), 125)]
    for words, code in [*refused, (("--init", "--detect"), 2)]:
        result = finish(start(alone, *words))
        assert_refused(result, code)
        assert "gpu_resource_extensions" in result.err.splitlines()[1], "the remedy names what to copy"
        assert "pip install" not in result.err


def test_refused_duplicate_tells_programs_what_is_wrong(busy: Path) -> None:
    error = json.loads(cli("--allocate", "running", "2", "1", "--json").out)["error"]
    assert (error["code"], error["parameter"], error["value"]) == ("duplicate_task", "task_id", "running")
    assert error["problem"] and error["remedy"]
