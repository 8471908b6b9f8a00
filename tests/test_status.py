"""``--status`` and ``--detail`` as people see them: whole screens, measured in columns, in both languages."""

from __future__ import annotations

import json
import os
import pty
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, names
from screens import CLI, Result, cli, finish, start
from wcwidth import wcswidth, wcwidth

from gpu_resource_extensions.leases import boot_id
from gpu_resource_manager_v01 import GPUResourceManagerV01, encode_state, host_name

#: ages that cannot become others while a test runs
DAYS_3, HOURS_2, MINUTES_5 = 3 * 86400 + 2 * 3600, 2 * 3600 + 1800, 5 * 60 + 30
CHANGED = "2026-01-02T03:04:05"  # when the pool was last changed
LONG = "gpu-server-in-the-basement-of-building-12-next-to-the-stairs"  # 60 letters
LONG_TASK = "ablation-of-the-learning-rate-and-of-the-batch-size-number-17"
ROOM = "moves to the new room in the second week of May, ask the administrator for the key"
IDLE = "│     8/8      │  0.0%   │    64/64     │  0.0%   │     0      │"  # a server in the table, behind its name


def ago(age_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - age_s))


def by(user: str, pid: int) -> dict[str, Any]:
    return {"user": user, "host": "node", "pid": pid}


def lease(number: int) -> dict[str, str]:
    """Tie a record to a lease; as its file is missing, it counts as living."""
    return {"lease": f"{number:032x}"}


def task(task_id: str, gpus: Sequence[int], cpus: int, start_time: str, **more: Any) -> dict[str, Any]:
    return {"task_id": task_id, "allocated_gpus": [*gpus], "allocated_cpus": cpus, "start_time": start_time, **more}


def request(task_id: str, gpus: int, cpus: int, asked_time: str, **more: Any) -> dict[str, Any]:
    asked = {"task_id": task_id, "required_gpus": gpus, "required_cpus": cpus, "asked_time": asked_time}
    return {**asked, "passed_over": 0, **more}


def server(
    name: str, gpus: int = 8, cpus: int = 64, tasks: Sequence[dict[str, Any]] = (), out: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """Describe a server, some of whose GPUs may be ``out`` of service, for a reason each."""
    held = {gpu for task in tasks for gpu in task["allocated_gpus"]} | {*(out or {})}
    found = {
        "server_name": name,
        "total_gpus": gpus,
        "available_gpus": [gpu for gpu in range(gpus) if gpu not in held],
        "total_cpus": cpus,
        "available_cpus": cpus - sum(task["allocated_cpus"] for task in tasks),
        "running_tasks": [*tasks],
    }
    return {**found, "disabled": {str(gpu): why for gpu, why in out.items()}} if out else found


def write(
    pool: Path, servers: Sequence[dict[str, Any]], waiting: Sequence[dict[str, Any]] = (), min_gpus: int | None = 1
) -> None:
    """Make these servers, numbered in this order, the document of the pool."""
    state: Any = {
        "servers": [{"server_id": number, **server} for number, server in enumerate(servers)],
        "last_updated": CHANGED,
        "version": "0.1+disabled" if any("disabled" in server for server in servers) else "0.1",
    }
    if waiting:
        state["waiting"] = [*waiting]
    if min_gpus is not None:
        state["min_gpus_per_task"] = min_gpus
    pool.write_bytes(encode_state(state))  # which checks it


def shown(*args: str, columns: int | None = None, language: str | None = None, pool: Path | None = None) -> str:
    """Return the screen of a command that succeeds without a word on stderr."""
    env = {} if columns is None else {"COLUMNS": str(columns)}
    env |= {} if language is None else {"GPU_RESOURCE_LANG": language}
    env |= {} if pool is None else {"GPU_RESOURCE_FILE": str(pool)}
    result = cli(*args, env=env)
    assert (result.code, result.err) == (0, "")
    return result.out


def path_line(pool: Path, columns: int = 80, heading: str = "プール: ") -> str:
    """Name a pool with an ASCII path; of one that is too long, its end."""
    room = columns - (8 if heading == "プール: " else len(heading))
    path = str(pool)
    return heading + (path if len(path) <= room else "…" + path[1 - room :])


def padded(text: str, columns: int) -> str:
    missing: int = columns - wcswidth(text)
    return text + " " * missing


def table(rows: Sequence[Sequence[str]]) -> str:
    """Title and table by their rule: names to the left, all else centred, as wide as the longest name needs."""
    wide = max(8, *(wcswidth(row[0]) for row in rows))
    lines = ["─" * columns for columns in (wide, 14, 9, 14, 9, 12)]
    rest = wide + 65 - 18
    screen = [
        f"{'=' * (rest // 2)} GPU リソース状態 {'=' * (rest - rest // 2)}",
        f"┌{'┬'.join(lines)}┐",
        f"│{padded('サーバー', wide)}│GPU利用可/合計│GPU使用率│CPU利用可/合計│CPU使用率│実行中タスク│",
        f"├{'┼'.join(lines)}┤",
    ]
    for name, *facts in rows:
        centred = [f"{fact:^{len(line)}}" for fact, line in zip(facts, lines[1:], strict=True)]
        screen.append("│".join(["", padded(name, wide), *centred, ""]))
    return "\n".join([*screen, f"└{'┴'.join(lines)}┘"])


# --- Pools ----------------------------------------------------------------------------------------


def make_lab(pool: Path) -> None:
    """Four servers: one busy, one with broken GPUs, one full, one out of service; two requests wait."""
    resnet = task("resnet50", [0, 1, 2, 3], 32, ago(DAYS_3), **by("alice", 4711), **lease(1))
    notebook = task("notebook", [5], 8, ago(MINUTES_5), **by("bob", 4712))
    ablation = task(LONG_TASK, [0, 1, 2, 3], 32, ago(HOURS_2), **by("carol", 4713), **lease(2))
    servers = [
        server("gpu-server-0", tasks=[resnet, notebook]),
        server("gpu-server-1", out={3: "", 6: "ECC errors", 7: "ECC errors"}),
        server("gpu-server-2", 4, 32, [ablation]),
        server("gpu-server-3", 2, 16, out={0: ROOM, 1: ROOM}),
    ]
    sweep = request("sweep-17", 8, 16, ago(MINUTES_5), **by("dave", 4714), **lease(3))
    # Asked by a machine whose clock is ahead of ours.
    local = request("eval", 2, 1, ago(-3600), **by("erin", 4715), **lease(4), only_server_name="gpu-server-2")
    write(pool, servers, [sweep, local])


def make_japanese(pool: Path) -> None:
    name = "画像認識モデルのファインチューニング実験第十二回バッチサイズ比較"
    first = task("学習その1", [0, 1, 2, 3], 32, ago(DAYS_3), **by("山田", 4711), **lease(1))
    edited = task(name, [0, 2, 3, 7], 8, "yesterday", **by("佐藤", 4712))
    servers = [server("計算機-甲", tasks=[first]), server("計算機-乙", tasks=[edited], out={5: "ファン故障"})]
    write(pool, servers, [request("評価", 8, 1, ago(MINUTES_5), **lease(2))], min_gpus=2)


def make_40_tasks(pool: Path) -> None:
    """Jobs and reservations of one GPU each on four servers, and 16 requests that wait."""
    running = [
        task(
            f"task-{n:02}",
            [n % 6],
            1,
            ago((n + 1) * 86400 + 7200),
            **by(f"user-{n % 3}", n),
            **lease(n) if n % 2 else {},
        )
        for n in range(24)
    ]
    servers = [server(f"lab-server-{n}", tasks=running[6 * n : 6 * n + 6]) for n in range(4)]
    line = [
        request(f"task-{n:02}", 8, 64, ago((n + 1) * 86400 + 7200), **by(f"user-{n % 3}", n), **lease(n))
        for n in range(24, 40)
    ]
    write(pool, servers, line)


def make_100_servers(pool: Path) -> None:
    """A hundred servers, on every tenth of which a job runs."""
    jobs = [task(f"job-{n:02}", [0, 1], 16, ago(HOURS_2), **by("alice", n), **lease(n)) for n in range(10)]
    write(pool, [server(f"node-{n:03}", tasks=[] if n % 10 else [jobs[n // 10]]) for n in range(100)])


def make_long_names(pool: Path) -> None:
    job = task(LONG_TASK, [0, 1], 16, ago(HOURS_2), **by("a-user-with-a-very-long-name", 4711), **lease(1))
    write(pool, [server(LONG, tasks=[job]), server("b", out={0: "fan"}), server(LONG[:-1], out={0: "fan"})])


def make_made_up(pool: Path) -> None:
    GPUResourceManagerV01(pool)


POOLS: dict[str, Callable[[Path], None]] = {
    "lab": make_lab,
    "japanese": make_japanese,
    "40-tasks": make_40_tasks,
    "100-servers": make_100_servers,
    "long-names": make_long_names,
    "made-up": make_made_up,
}

# --- --status: who has what, what is out of service, which pool it is --------------------------------

LAB = """\
============================= GPU リソース状態 ==============================
┌────────────┬──────────────┬─────────┬──────────────┬─────────┬────────────┐
│サーバー    │GPU利用可/合計│GPU使用率│CPU利用可/合計│CPU使用率│実行中タスク│
├────────────┼──────────────┼─────────┼──────────────┼─────────┼────────────┤
│gpu-server-0│     3/8      │  62.5%  │    24/64     │  62.5%  │     2      │
│gpu-server-1│     5/8      │  0.0%   │    64/64     │  0.0%   │     0      │
│gpu-server-2│     0/4      │ 100.0%  │     0/32     │ 100.0%  │     1      │
│gpu-server-3│     0/2      │  0.0%   │     0/16     │  0.0%   │     0      │
└────────────┴──────────────┴─────────┴──────────────┴─────────┴────────────┘

合計:
  GPU: 8/22 利用可能
  CPU: 88/176 利用可能
  実行中タスク: 3
  待機中の要求: 2
  1 タスクの範囲: GPU 1-8、CPU 1-64
  使用停止: gpu-server-1 の GPU 3
  使用停止: gpu-server-1 の GPU 6-7 (ECC errors)
"""
BELOW_60 = """\
  使用停止: gpu-server-3 の GPU 0-1 (moves to the new room …

サーバー     GPU   CPU  タスク        利用者  経過    種類
gpu-server…  0-3   32   resnet50      alice   3 日    ジョブ
gpu-server…  5     8    notebook      bob     5 分    予約
gpu-server…  0-3   32   ablation-of…  carol   2 時間  ジョブ
-            8 個  16   sweep-17      dave    5 分    待機
gpu-server…  2 個  1    eval          erin    0 秒    待機

"""
BELOW_80 = """\
  使用停止: gpu-server-3 の GPU 0-1 (moves to the new room in the second week o…

サーバー      GPU   CPU  タスク                           利用者  経過    種類
gpu-server-0  0-3   32   resnet50                         alice   3 日    ジョブ
gpu-server-0  5     8    notebook                         bob     5 分    予約
gpu-server-2  0-3   32   ablation-of-the-learning-rate-…  carol   2 時間  ジョブ
-             8 個  16   sweep-17                         dave    5 分    待機
gpu-server-2  2 個  1    eval                             erin    0 秒    待機

"""
BELOW_120 = """\
  使用停止: gpu-server-3 の GPU 0-1 (moves to the new room in the second week of May, ask the administrator for the key)

サーバー      GPU   CPU  タスク                                                         利用者  経過    種類
gpu-server-0  0-3   32   resnet50                                                       alice   3 日    ジョブ
gpu-server-0  5     8    notebook                                                       bob     5 分    予約
gpu-server-2  0-3   32   ablation-of-the-learning-rate-and-of-the-batch-size-number-17  carol   2 時間  ジョブ
-             8 個  16   sweep-17                                                       dave    5 分    待機
gpu-server-2  2 個  1    eval                                                           erin    0 秒    待機

"""


@pytest.mark.parametrize(
    ("columns", "below"),
    [(60, BELOW_60), (80, BELOW_80), (120, BELOW_120), (None, BELOW_80)],
    ids=["60", "80", "120", "none"],
)
def test_status_says_who_has_what_in_the_columns_of_the_screen(columns: int | None, below: str, pool: Path) -> None:
    make_lab(pool)
    assert shown("--status", columns=columns) == f"{LAB}{below}{path_line(pool, columns or 80)}\n"


@pytest.mark.parametrize("columns", ["", "0", "-60", "wide", "６０", "60.5", "9" * 40])
def test_columns_that_are_no_number_of_columns_count_as_80(columns: str, pool: Path) -> None:
    make_lab(pool)
    assert cli("--status", env={"COLUMNS": columns}) == (0, f"{LAB}{BELOW_80}{path_line(pool)}\n", "")


JAPANESE = """\
============================ GPU リソース状態 ============================
┌─────────┬──────────────┬─────────┬──────────────┬─────────┬────────────┐
│サーバー │GPU利用可/合計│GPU使用率│CPU利用可/合計│CPU使用率│実行中タスク│
├─────────┼──────────────┼─────────┼──────────────┼─────────┼────────────┤
│計算機-甲│     4/8      │  50.0%  │    32/64     │  50.0%  │     1      │
│計算機-乙│     3/8      │  50.0%  │    56/64     │  12.5%  │     1      │
└─────────┴──────────────┴─────────┴──────────────┴─────────┴────────────┘

合計:
  GPU: 7/16 利用可能
  CPU: 88/128 利用可能
  実行中タスク: 2
  待機中の要求: 1
  1 タスクの範囲: GPU 2-8、CPU 1-64
  使用停止: 計算機-乙 の GPU 5 (ファン故障)

"""
JAPANESE_TASKS = {
    60: """\
サーバー   GPU      CPU  タスク         利用者  経過  種類
計算機-甲  0-3      32   学習その1      山田    3 日  ジョブ
計算機-乙  0,2-3,7  8    画像認識モデ…  佐藤    ?     予約
-          8 個     1    評価           -       5 分  待機

""",
    80: """\
サーバー   GPU      CPU  タスク                             利用者  経過  種類
計算機-甲  0-3      32   学習その1                          山田    3 日  ジョブ
計算機-乙  0,2-3,7  8    画像認識モデルのファインチューニ…  佐藤    ?     予約
-          8 個     1    評価                               -       5 分  待機

""",
    120: """\
サーバー   GPU      CPU  タスク                                                            利用者  経過  種類
計算機-甲  0-3      32   学習その1                                                         山田    3 日  ジョブ
計算機-乙  0,2-3,7  8    画像認識モデルのファインチューニング実験第十二回バッチサイズ比較  佐藤    ?     予約
-          8 個     1    評価                                                              -       5 分  待機

""",
}


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_status_lines_up_with_japanese_names(columns: int, pool: Path) -> None:
    make_japanese(pool)
    expected = f"{JAPANESE}{JAPANESE_TASKS[columns]}{path_line(pool, columns)}\n"
    assert shown("--status", columns=columns) == expected


@pytest.mark.parametrize("columns", [60, 80, 120, None])
def test_status_lists_40_tasks_in_a_line_each(columns: int | None, pool: Path) -> None:
    make_40_tasks(pool)
    lines = ["サーバー      GPU   CPU  タスク   利用者  経過   種類"]
    for n in range(40):
        where, gpus = (f"lab-server-{n // 6}", f"{n % 6}") if n < 24 else ("-", "8 個")
        kind = ("ジョブ" if n % 2 else "予約") if n < 24 else "待機"
        cpus = 1 if n < 24 else 64
        age = padded(f"{n + 1} 日", 5)
        lines.append(f"{where:<12}  {padded(gpus, 4)}  {cpus:<3}  task-{n:02}  user-{n % 3}  {age}  {kind}")
    screen = [
        table([(f"lab-server-{n}", "2/8", "75.0%", "58/64", "9.4%", "6") for n in range(4)]),
        "",
        "合計:",
        "  GPU: 8/32 利用可能",
        "  CPU: 232/256 利用可能",
        "  実行中タスク: 24",
        "  待機中の要求: 16",
        "  1 タスクの範囲: GPU 1-8、CPU 1-64",
        "",
        *lines,
        "",
        path_line(pool, columns or 80),
        "",
    ]
    assert shown("--status", columns=columns) == "\n".join(screen)


@pytest.mark.parametrize("columns", [60, 80, 120, None])
def test_status_shows_100_servers(columns: int | None, pool: Path) -> None:
    make_100_servers(pool)
    busy = "│     6/8      │  25.0%  │    48/64     │  25.0%  │     1      │"
    tasks = ["サーバー  GPU  CPU  タスク  利用者  経過    種類"]
    tasks += [f"node-{n:02}0  0-1  16   job-{n:02}  alice   2 時間  ジョブ" for n in range(10)]
    screen = [
        "=========================== GPU リソース状態 ============================",
        "┌────────┬──────────────┬─────────┬──────────────┬─────────┬────────────┐",
        "│サーバー│GPU利用可/合計│GPU使用率│CPU利用可/合計│CPU使用率│実行中タスク│",
        "├────────┼──────────────┼─────────┼──────────────┼─────────┼────────────┤",
        *(f"│node-{n:03}{IDLE if n % 10 else busy}" for n in range(100)),
        "└────────┴──────────────┴─────────┴──────────────┴─────────┴────────────┘",
        "",
        "合計:",
        "  GPU: 780/800 利用可能",
        "  CPU: 6240/6400 利用可能",
        "  実行中タスク: 10",
        "  1 タスクの範囲: GPU 1-8、CPU 1-64",
        "",
        *tasks,
        "",
        path_line(pool, columns or 80),
        "",
    ]
    assert shown("--status", columns=columns) == "\n".join(screen)


LONG_BELOW = {
    60: """\
  使用停止: b の GPU 0 (fan)
  使用停止: gpu-server-in-the-basement-of-building-12-next-…

サーバー    GPU  CPU  タスク      利用者      経過    種類
gpu-serve…  0-1  16   ablation-…  a-user-wi…  2 時間  ジョブ

""",
    80: """\
  使用停止: b の GPU 0 (fan)
  使用停止: gpu-server-in-the-basement-of-building-12-next-to-the-stair の GPU …

サーバー           GPU  CPU  タスク            利用者             経過    種類
gpu-server-in-th…  0-1  16   ablation-of-the…  a-user-with-a-ve…  2 時間  ジョブ

""",
    120: """\
  使用停止: b の GPU 0 (fan)
  使用停止: gpu-server-in-the-basement-of-building-12-next-to-the-stair の GPU 0 (fan)

サーバー                                        GPU  CPU  タスク            利用者                        経過    種類
gpu-server-in-the-basement-of-building-12-nex…  0-1  16   ablation-of-the…  a-user-with-a-very-long-name  2 時間  ジョブ

""",
}


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_name_of_60_letters_widens_the_table_and_nothing_else(columns: int, pool: Path) -> None:
    make_long_names(pool)
    rows = [
        (LONG, "6/8", "25.0%", "48/64", "25.0%", "1"),
        ("b", "7/8", "0.0%", "64/64", "0.0%", "0"),
        (LONG[:-1], "7/8", "0.0%", "64/64", "0.0%", "0"),
    ]
    totals = "合計:\n  GPU: 20/24 利用可能\n  CPU: 176/192 利用可能\n  実行中タスク: 1\n"
    expected = f"{table(rows)}\n\n{totals}  1 タスクの範囲: GPU 1-8、CPU 1-64\n{LONG_BELOW[columns]}"
    assert shown("--status", columns=columns) == f"{expected}{path_line(pool, columns)}\n"


def test_age_is_in_the_largest_unit_that_makes_a_whole_one(pool: Path) -> None:
    hour, day = 3600, 86400
    ages = {90: "1 分", hour - 30: "59 分", 1.5 * hour: "1 時間", 23.5 * hour: "23 時間", 1.5 * day: "1 日"}
    ages |= {100.5 * day: "100 日"}
    tasks = [task(f"t{number}", [number], 1, ago(age_s), user="u") for number, age_s in enumerate(ages)]
    write(pool, [server("a", tasks=tasks)])
    lines = [f"a         {n}    1    t{n}      u       {padded(age, 7)}  予約" for n, age in enumerate(ages.values())]
    assert "\n".join(["  種類", *lines, ""]) in shown("--status")


# --- --status: whether its pool is a real one, and what has ended --------------------------------------

FOUR_IDLE = table([(f"gpu-server-{number}", "8/8", "0.0%", "64/64", "0.0%", "0") for number in range(4)])
FOUR_TOTALS = "合計:\n  GPU: 32/32 利用可能\n  CPU: 256/256 利用可能\n  実行中タスク: 0\n"
MADE_UP = "  架空のサーバー (登録: {0} --detect か {0} --server NAME:GPUS:CPUS)\n"


def test_pool_of_the_default_four_is_said_to_be_made_up(made_pool: Path) -> None:
    limits = "  1 タスクの範囲: GPU 2-8、CPU 1-64\n"
    expected = f"{FOUR_IDLE}\n\n{FOUR_TOTALS}{limits}\n{path_line(made_pool)}\n{MADE_UP.format('--reset')}"
    assert shown("--status") == expected


def test_described_pool_has_a_least_number_of_1_and_no_such_word(pool: Path) -> None:
    assert cli("--init", "--server", "a:4:16", "--server", "計算機:2:128").code == 0
    rows = [("a", "4/4", "0.0%", "16/16", "0.0%", "0"), ("計算機", "2/2", "0.0%", "128/128", "0.0%", "0")]
    totals = "合計:\n  GPU: 6/6 利用可能\n  CPU: 144/144 利用可能\n  実行中タスク: 0\n"
    expected = f"{table(rows)}\n\n{totals}  1 タスクの範囲: GPU 1-4、CPU 1-128\n\n{path_line(pool)}\n"
    assert shown("--status") == expected


def test_described_pool_states_the_least_number_that_was_asked_for(pool: Path) -> None:
    assert cli("--init", "--server", "a:4:16", "--min-gpus", "2").code == 0
    assert shown("--status") == (
        f"{table([('a', '4/4', '0.0%', '16/16', '0.0%', '0')])}\n\n"
        "合計:\n  GPU: 4/4 利用可能\n  CPU: 16/16 利用可能\n  実行中タスク: 0\n"
        f"  1 タスクの範囲: GPU 2-4、CPU 1-16\n\n{path_line(pool)}\n"
    )


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tool, whose pool is beside it whatever the machine that the tests run on names."""
    directory = tmp_path / "checkout"
    directory.mkdir()
    shutil.copy(PROJECT / "cli_v01.py", directory)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PROJECT / "gpu_resource_extensions", directory / "gpu_resource_extensions", ignore=ignored)
    library = (PROJECT / "gpu_resource_manager_v01.py").read_text("utf-8")
    assert library.count(' = "/etc/gpu-resource-file"') == 1
    library = library.replace(' = "/etc/gpu-resource-file"', f' = "{directory}/no-machine-file"')
    (directory / "gpu_resource_manager_v01.py").write_text(library, "utf-8")
    monkeypatch.delenv("GPU_RESOURCE_FILE")
    return directory


def test_pool_beside_the_tool_that_nobody_has_made_is_shown_as_what_would_be_made(checkout: Path) -> None:
    pool = checkout / "resource_status.json"
    before = names(pool)
    note = f"  まだありません。最初の割り当てか --init が作ります\n{MADE_UP.format('--init')}"
    status = f"{FOUR_IDLE}\n\n{FOUR_TOTALS}  1 タスクの範囲: GPU 2-8、CPU 1-64\n\n{path_line(pool)}\n{note}"
    assert finish(start(str(checkout / "cli_v01.py"), "--status")) == (0, status, "")
    idle = "\n  利用可能GPU: [0, 1, 2, 3, 4, 5, 6, 7] (8/8)\n  利用可能CPU: 64/64\n  実行中タスク: 0\n\n"
    servers = "".join(f"gpu-server-{number} (ID: {number}){idle}" for number in range(4))
    changed = ""  # never
    detail = f"{'=' * 29} GPU リソース詳細 {'=' * 30}\n{servers}最終更新: {changed}\nプール: {pool}\n{note}"
    assert finish(start(str(checkout / "cli_v01.py"), "--detail")) == (0, detail, "")
    assert {*names(pool)} - {*before} <= {"__pycache__"}


def test_ended_tasks_are_named_and_their_gpus_are_free(pool: Path) -> None:
    here = {"boot": boot_id(), "host": host_name(), "user": "alice", "pid": 4711}
    (pool.parent / ".leases").mkdir()
    for number in (1, 2):  # nobody holds these
        (pool.parent / ".leases" / f"{number:032x}").write_bytes(b"")
    gone = task("gone", [0, 1], 4, CHANGED, **here, **lease(1))
    lost = task("lost", [2, 3], 4, ago(HOURS_2), **here, **lease(3))
    write(pool, [server("a", tasks=[gone, lost])], [request("gave-up", 2, 1, CHANGED, **here, **lease(2))])
    assert shown("--status") == (
        f"{table([('a', '6/8', '25.0%', '60/64', '6.2%', '1')])}\n\n"
        "合計:\n  GPU: 6/8 利用可能\n  CPU: 60/64 利用可能\n  実行中タスク: 1\n"
        "  終了済み (次の変更で回収): gone, gave-up\n  1 タスクの範囲: GPU 1-8、CPU 1-64\n\n"
        "サーバー  GPU  CPU  タスク  利用者  経過    種類\n"
        "a         2-3  4    lost    alice   2 時間  ジョブ\n\n"
        f"{path_line(pool)}\n"
    )
    detail = shown("--detail")
    assert "    - gone (終了済み: 次の変更で回収)\n" in detail
    assert "    - lost\n" in detail
    assert "待機中 1: gave-up (GPU 2, CPU 1, alice) (終了済み)\n" in detail


@pytest.mark.parametrize("directory", ["d" * 200, "実験" * 30], ids=["ascii", "japanese"])
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_end_of_a_long_path_is_shown_and_detail_shows_it_whole(directory: str, columns: int, tmp_path: Path) -> None:
    pool = tmp_path / directory / "resource_status.json"
    pool.parent.mkdir()
    write(pool, [server("a")])
    end = str(pool)
    while wcswidth(f"プール: …{end}") > columns:
        end = end[1:]
    assert shown("--status", columns=columns, pool=pool).splitlines()[-1] == f"プール: …{end}"
    assert end.endswith("/resource_status.json")
    assert shown("--detail", columns=columns, pool=pool).splitlines()[-1] == f"プール: {pool}"


# --- --detail ----------------------------------------------------------------------------------------

DETAIL = """\
============================= GPU リソース詳細 ==============================
計算機-甲 (ID: 0)
  利用可能GPU: [4] (1/8)
  利用可能CPU: 24/64
  使用停止: 計算機-甲 の GPU 6
  使用停止: 計算機-甲 の GPU 7 ({ROOM})
  実行中タスク: 2
    - 学習その1
      GPU ID: [0, 1, 2, 3]
      CPU数: 32
      開始時刻: 2026-01-02T03:04:05
      要求元: 山田@node (PID 4711)
      プロセス: 4711 (山田@node)
    - notebook
      GPU ID: [5]
      CPU数: 8
      開始時刻: 2026-01-02T03:04:05
      要求元: bob@node (PID 4712)

{LONG} (ID: 1)
  利用可能GPU: [0, 1] (2/2)
  利用可能CPU: 16/16
  実行中タスク: 0

待機中 1: sweep-17 (GPU 8, CPU 16, dave)
待機中 2: 評価 (GPU 1, CPU 1, 山田)
最終更新: 2026-01-02T03:04:05
プール: {pool}
"""


@pytest.mark.parametrize("columns", [60, 80, 120, None])
def test_detail_is_the_long_form_whatever_the_screen(columns: int | None, pool: Path) -> None:
    job = task("学習その1", [0, 1, 2, 3], 32, CHANGED, **by("山田", 4711), **lease(1))
    reservation = task("notebook", [5], 8, CHANGED, **by("bob", 4712))
    servers = [server("計算機-甲", tasks=[job, reservation], out={6: "", 7: ROOM}), server(LONG, 2, 16)]
    sweep = request("sweep-17", 8, 16, CHANGED, **by("dave", 4713), **lease(2))
    write(pool, servers, [sweep, request("評価", 1, 1, CHANGED, **by("山田", 4714), **lease(3))])
    expected = DETAIL.replace("{ROOM}", ROOM).replace("{LONG}", LONG).replace("{pool}", str(pool))
    assert shown("--detail", columns=columns) == expected


# --- Measured: nothing wraps ---------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["ja", "en"])
@pytest.mark.parametrize("columns", [30, 40, 41, 60, 80, 120, 300])
@pytest.mark.parametrize("name", POOLS)
def test_no_line_about_tasks_and_what_is_out_of_service_is_wider_than_the_screen(
    name: str, columns: int, language: str, pool: Path
) -> None:
    POOLS[name](pool)
    lines = shown("--status", columns=columns, language=language).splitlines()
    limits = [line.startswith(("  1 タスクの範囲: ", "  One task may have: ")) for line in lines].index(True)
    below = [line for line in lines[limits + 1 :] if not line.startswith(("  架空の", "  made-up"))]
    listed = {"lab": 12, "japanese": 8, "40-tasks": 44, "100-servers": 14, "long-names": 7, "made-up": 2}
    assert len(below) == listed[name]
    assert [line for line in below if wcswidth(line) > columns] == []


@pytest.mark.parametrize("columns", [1, 7])
def test_screen_that_holds_hardly_anything_is_no_reason_to_hang(columns: int, pool: Path) -> None:
    make_lab(pool)
    lines = shown("--status", columns=columns).splitlines()
    assert lines[-1].startswith("プール: ")


@pytest.mark.parametrize("language", ["ja", "en"])
@pytest.mark.parametrize("name", POOLS)
def test_title_is_as_wide_as_the_table(name: str, language: str, pool: Path) -> None:
    POOLS[name](pool)
    title, *lines = shown("--status", language=language).splitlines()
    framed = [line for line in lines if line.startswith(("┌", "│", "├", "└"))]
    assert {wcswidth(line) for line in framed} == {wcswidth(title)}
    before, after = (len(side) - len(side.lstrip("=")) for side in (title, title[::-1]))
    assert after - before in (0, 1), "where the rest is odd, one more on the right"


@pytest.mark.parametrize("language", ["ja", "en"])
@pytest.mark.parametrize("name", [name for name in POOLS if name != "long-names"])
def test_everything_is_within_80_columns_where_names_have_at_most_12(name: str, language: str, pool: Path) -> None:
    POOLS[name](pool)
    assert [line for line in shown("--status", language=language).splitlines() if wcswidth(line) > 80] == []


# --- In English ----------------------------------------------------------------------------------------

LAB_IN_ENGLISH = """\
============================ GPU resources =============================
┌────────────┬─────────────┬───────┬─────────────┬───────┬─────────────┐
│Server      │GPUs free/all│GPU use│CPUs free/all│CPU use│Running tasks│
├────────────┼─────────────┼───────┼─────────────┼───────┼─────────────┤
│gpu-server-0│     3/8     │ 62.5% │    24/64    │ 62.5% │      2      │
│gpu-server-1│     5/8     │ 0.0%  │    64/64    │ 0.0%  │      0      │
│gpu-server-2│     0/4     │100.0% │    0/32     │100.0% │      1      │
│gpu-server-3│     0/2     │ 0.0%  │    0/16     │ 0.0%  │      0      │
└────────────┴─────────────┴───────┴─────────────┴───────┴─────────────┘

Total:
  GPU: 8/22 available
  CPU: 88/176 available
  Running tasks: 3
  Waiting requests: 2
  One task may have: GPU 1-8, CPU 1-64
  Out of service: gpu-server-1 GPU 3
  Out of service: gpu-server-1 GPU 6-7 (ECC errors)
  Out of service: gpu-server-3 GPU 0-1 (moves to the new room in the second wee…

Server        GPU  CPU  Task                           User   Age    Kind
gpu-server-0  0-3  32   resnet50                       alice  3 d    job
gpu-server-0  5    8    notebook                       bob    5 min  reservation
gpu-server-2  0-3  32   ablation-of-the-learning-rat…  carol  2 h    job
-             8    16   sweep-17                       dave   5 min  waiting
gpu-server-2  2    1    eval                           erin   0 s    waiting

"""
JAPANESE_IN_ENGLISH = """\
=========================== GPU resources ===========================
┌─────────┬─────────────┬───────┬─────────────┬───────┬─────────────┐
│Server   │GPUs free/all│GPU use│CPUs free/all│CPU use│Running tasks│
├─────────┼─────────────┼───────┼─────────────┼───────┼─────────────┤
│計算機-甲│     4/8     │ 50.0% │    32/64    │ 50.0% │      1      │
│計算機-乙│     3/8     │ 50.0% │    56/64    │ 12.5% │      1      │
└─────────┴─────────────┴───────┴─────────────┴───────┴─────────────┘

Total:
  GPU: 7/16 available
  CPU: 88/128 available
  Running tasks: 2
  Waiting requests: 1
  One task may have: GPU 2-8, CPU 1-64
  Out of service: 計算機-乙 GPU 5 (ファン故障)

Server     GPU      CPU  Task                           User  Age    Kind
計算機-甲  0-3      32   学習その1                      山田  3 d    job
計算機-乙  0,2-3,7  8    画像認識モデルのファインチュ…  佐藤  ?      reservation
-          8        1    評価                           -     5 min  waiting

"""
DETAIL_IN_ENGLISH = """\
========================== GPU resources in detail ==========================
a (ID: 0)
  Available GPUs: [4] (1/8)
  Available CPUs: 24/64
  Out of service: a GPU 6
  Out of service: a GPU 7 (fan)
  Running tasks: 2
    - train
      GPU ID: [0, 1, 2, 3]
      CPUs: 32
      Start: 2026-01-02T03:04:05
      Asked by: alice@node (PID 4711)
      Process: 4711 (alice@node)
    - notebook
      GPU ID: [5]
      CPUs: 8
      Start: 2026-01-02T03:04:05
      Asked by: bob@node (PID 4712)

b (ID: 1)
  Available GPUs: [0, 1] (2/2)
  Available CPUs: 16/16
  Running tasks: 0

Waiting 1: sweep (GPU 8, CPU 16, dave)
Last change: 2026-01-02T03:04:05
Pool: {pool}
"""


@pytest.mark.parametrize(("make", "screen"), [(make_lab, LAB_IN_ENGLISH), (make_japanese, JAPANESE_IN_ENGLISH)])
def test_status_in_english(make: Callable[[Path], None], screen: str, pool: Path) -> None:
    make(pool)
    assert shown("--status", language="en") == f"{screen}{path_line(pool, heading='Pool: ')}\n"


def test_made_up_pool_in_english(made_pool: Path) -> None:
    screen = shown("--status", language="en")
    assert screen.endswith(
        "\n  One task may have: GPU 2-8, CPU 1-64\n\n"
        f"{path_line(made_pool, heading='Pool: ')}\n"
        "  made-up servers (use --reset --detect or --reset --server NAME:GPUS:CPUS)\n"
    )


def make_ascii(pool: Path) -> None:
    """Two servers, a job, a reservation, a request that waits and broken GPUs; no Japanese name."""
    job = task("train", [0, 1, 2, 3], 32, CHANGED, **by("alice", 4711), **lease(1))
    reservation = task("notebook", [5], 8, CHANGED, **by("bob", 4712))
    servers = [server("a", tasks=[job, reservation], out={6: "", 7: "fan"}), server("b", 2, 16)]
    write(pool, servers, [request("sweep", 8, 16, CHANGED, **by("dave", 4713), **lease(2))])


def test_detail_in_english(pool: Path) -> None:
    make_ascii(pool)
    assert shown("--detail", language="en") == DETAIL_IN_ENGLISH.format(pool=pool)


COMMANDS: list[tuple[int, list[str]]] = [
    (0, []),
    (0, ["--help"]),
    (0, ["-h"]),
    (0, ["--version"]),
    (0, ["--init"]),
    (1, ["--init", "--server", "c:2:2"]),
    (1, ["--init", "--min-gpus", "2"]),
    (2, ["--init", "--server", "c:2"]),
    (2, ["--init", "--server", "c:two:2"]),
    (2, ["--init", "--server", "c:0:2"]),
    (2, ["--init", "--server", "-c:1:2"]),
    (2, ["--init", "--server", "c:1:2", "--server", "C:1:2"]),
    (2, ["--init", "--min-gpus", "9"]),
    (2, ["--init", "--server", "c:1:2", "--detect"]),
    (0, ["--status"]),
    (2, ["--status", "--watch"]),
    (2, ["--status", "--watch", "soon"]),
    (0, ["--detail"]),
    (2, ["--detail", "--watch"]),
    (0, ["--allocate", "new", "1", "1"]),
    (0, ["--allocate", "-", "1", "1"]),
    (0, ["--allocate", "new", "1", "1", "--prefer-server", "b"]),
    (0, ["--allocate", "new", "1", "1", "--export"]),
    (1, ["--allocate", "new", "3", "1"]),
    (75, ["--allocate", "new", "3", "1", "--wait", "0.1"]),
    (2, ["--allocate", "new", "1", "1", "--wait", "5x"]),
    (2, ["--allocate", "notebook", "1", "1"]),
    (2, ["--allocate", "sweep", "1", "1"]),
    (2, ["--allocate", "new", "9", "1"]),
    (2, ["--allocate", "new", "0", "1"]),
    (2, ["--allocate", "new", "two", "1"]),
    (2, ["--allocate", "new", "1", "65"]),
    (2, ["--allocate", "new", "1", "1", "--prefer-server", "c"]),
    (2, ["--allocate", " ", "1", "1"]),
    (2, ["--allocate", "x" * 129, "1", "1"]),
    (2, ["--allocate", "-x", "1", "1"]),
    (2, ["--allocate", "a\tb", "1", "1"]),
    (2, ["--allocate", "new", "1"]),
    (2, ["--allocate", "new", "1", "1", "--allocate", "newer", "1", "1"]),
    (2, ["--allocate", "new", "1", "1", "--yes"]),
    (0, ["--release", "notebook"]),
    (0, ["--release", "sweep"]),
    (1, ["--release", "nobody"]),
    (1, ["--release", "train"]),
    (0, ["--release", "train", "--force"]),
    (2, ["--release", "a", "b"]),
    (1, ["--stop", "nobody"]),
    (1, ["--stop", "notebook"]),
    (1, ["--stop", "train"]),
    (0, ["--run", "new", "1", "1", "--", "true"]),
    (0, ["--run", "-", "1", "1", "--", "true"]),
    (127, ["--run", "new", "1", "1", "--", "/no/such/command"]),
    (126, ["--run", "new", "1", "1", "--", "/"]),
    (125, ["--run", "new", "1", "1", "true"]),
    (125, ["--run", "new", "1", "1"]),
    (125, ["--run", "notebook", "1", "1", "--", "true"]),
    (2, ["--reset"]),
    (0, ["--reset", "--yes"]),
    (1, ["--reset", "--yes", "--server", "c:2:2"]),
    (0, ["--reset", "--yes", "--force", "--server", "c:2:2"]),
    (0, ["--add-server", "c:4:8"]),
    (2, ["--add-server", "a:4:8"]),
    (2, ["--add-server", "c"]),
    (2, ["--add-server", "c:4:0"]),
    (0, ["--remove-server", "b"]),
    (1, ["--remove-server", "a"]),
    (2, ["--remove-server", "c"]),
    (0, ["--disable", "b:0,1", "--reason", "no power"]),
    (0, ["--disable", "a"]),
    (2, ["--disable", "a:99"]),
    (2, ["--disable", "c"]),
    (2, ["--disable", "a", "--reason", "x" * 201]),
    (0, ["--enable", "a"]),
    (2, ["--enable", "a:99"]),
    (2, ["--enable", "c"]),
    (2, ["--unknown"]),
    (2, ["status"]),
    (2, ["--init", "--status"]),
]


def keys(value: Any) -> Any:
    """Return the keys of a JSON document at every level, with its codes, and of what kind the other values are."""
    if isinstance(value, dict):
        return {key: value[key] if key == "code" else keys(value[key]) for key in value}
    return [keys(entry) for entry in value] if isinstance(value, list) else type(value)


def assert_english(result: Result) -> None:
    """The streams hold no letter that takes two columns, as all Japanese ones do."""
    assert [letter for letter in result.out + result.err if wcwidth(letter) == 2] == [], result


@pytest.mark.parametrize(("code", "words"), COMMANDS, ids=lambda it: " ".join(it)[:60] if isinstance(it, list) else "")
def test_every_command_speaks_english_and_tells_programs_the_same_in_both_languages(
    code: int, words: list[str], pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "b")

    def answer(language: str, *more: str) -> Result:
        shutil.rmtree(pool.parent / ".leases", ignore_errors=True)
        make_ascii(pool)
        end = words.index("--") if "--" in words else len(words)
        return cli(*words[:end], *more, *words[end:], env={"GPU_RESOURCE_LANG": language})

    english = answer("en")
    assert english.code == code, english
    assert_english(english)
    if code not in (0, 75):
        lines = english.err.splitlines()
        assert lines[0].startswith("✗ "), english
        assert any(line.startswith("  What to do: ") for line in lines), english
    results = [answer(language, "--json") for language in ("ja", "en")]
    assert results[0].code == results[1].code
    documents = [json.loads(result.out) for result in results]
    assert keys(documents[0]) == keys(documents[1])


def test_wait_that_is_too_long_is_explained_in_english(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_ascii(pool)
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "b")
    assert cli("--allocate", "first", "1", "1", "--prefer-server", "b").code == 0
    english = cli("--run", "new", "2", "1", "--wait", "0.1", "--", "true", env={"GPU_RESOURCE_LANG": "en"})
    assert english.code == 75
    assert "✗ " in english.err
    assert_english(english)


DAMAGES: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"servers": [',
    "not-utf-8": b"\xff",
    "nested": b"[" * 100_000,
    "not-finite": b"[NaN]",
    "a-list": b"[]",
    "no-version": b"{}",
    "later-version": b'{"version": "0.2"}',
    "no-servers": b'{"version": "0.1", "last_updated": "", "servers": []}',
    "servers-missing": b'{"version": "0.1", "last_updated": ""}',
    "no-object": b'{"version": "0.1", "last_updated": "", "servers": [1]}',
}
EDITS: dict[str, tuple[str, str]] = {
    "negative": ('"available_cpus": 24', '"available_cpus": -24'),
    "cpus": ('"available_cpus": 24', '"available_cpus": 25'),
    "type": ('"available_cpus": 24', '"available_cpus": "24"'),
    "order": ("[0, 1, 2, 3]", "[1, 0, 2, 3]"),
    "twice": ("[0, 1, 2, 3]", "[0, 1, 2, 5]"),
    "same-name": ('"task_id": "notebook"', '"task_id": "train"'),
    "same-id": ('"server_id": 1', '"server_id": 0'),
    "blank-name": ('"task_id": "notebook"', '"task_id": " "'),
    "dashed-name": ('"task_id": "notebook"', '"task_id": "-n"'),
    "long-name": ('"task_id": "notebook"', f'"task_id": "{"n" * 129}"'),
    "odd-name": ('"task_id": "notebook"', '"task_id": "\\u001b"'),
    "number-as-name": ('"task_id": "notebook"', '"task_id": 7'),
    "odd-server": ('"server_name": "b"', '"server_name": "\\u001b"'),
    "lease": (f'"lease": "{2:032x}"', '"lease": 7'),
    "disabled": ('"7": "fan"', '"4": "fan"'),
}


@pytest.mark.parametrize("damage", [*DAMAGES, *EDITS])
def test_broken_file_is_explained_in_english(damage: str, pool: Path) -> None:
    make_ascii(pool)
    before, after = (part.encode() for part in EDITS.get(damage, ("", "")))
    content = DAMAGES[damage] if damage in DAMAGES else pool.read_bytes().replace(before, after)
    assert content != pool.read_bytes()
    pool.write_bytes(content)
    english = cli("--status", env={"GPU_RESOURCE_LANG": "en"})
    assert english.code == 74
    assert english.err.startswith(f"✗ Error of the state file: {pool}\n  Reason: ")
    assert_english(english)
    documents = [json.loads(cli("--status", "--json", env={"GPU_RESOURCE_LANG": it}).out) for it in ("ja", "en")]
    assert keys(documents[0]) == keys(documents[1])


def test_place_without_a_pool_is_explained_in_english(pool: Path) -> None:
    (pool.parent / "directory").mkdir()
    os.mkfifo(pool.parent / "fifo")
    places = {"resource_status.json": 74, "missing/resource_status.json": 74, "directory": 74, "fifo": 74}
    asked = {str(pool.parent / name): code for name, code in places.items()} | {"relative.json": 2}
    for place, code in asked.items():
        for words in (["--status"], ["--detail"], ["--allocate", "new", "2", "1"], ["--release", "new"]):
            english = cli(*words, env={"GPU_RESOURCE_LANG": "en", "GPU_RESOURCE_FILE": place})
            assert english.code == code, english
            assert "\n  What to do: " in english.err
            assert_english(english)


def test_what_the_system_lacks_is_explained_in_english(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    make_ascii(pool)
    full = cli("--status", redirect=">/dev/full", env={"GPU_RESOURCE_LANG": "en"})
    assert full.code == 74
    assert_english(full)
    path = tmp_path_factory.mktemp("path")
    for package, words in {"filelock": ["--release", "notebook"], "tabulate": ["--status"]}.items():
        (path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}')\n", "utf-8")
        lacking = cli(*words, env={"GPU_RESOURCE_LANG": "en", "PYTHONPATH": str(path)})
        assert lacking.code == 2
        assert lacking.err.startswith("✗ A package is missing: ")
        assert_english(lacking)


@pytest.mark.parametrize(("typed", "code"), [("y", 0), ("n", 1)])
def test_reset_asks_in_english(typed: str, code: int, pool: Path) -> None:
    make_ascii(pool)
    keyboard, terminal = pty.openpty()
    try:
        os.write(keyboard, f"{typed}\n".encode())
        result = finish(start(str(CLI), "--reset", stdin=terminal, env={"GPU_RESOURCE_LANG": "en"}))
    finally:
        os.close(terminal)
        os.close(keyboard)
    assert result.code == code
    assert f"  File: {pool}\n  Records that go: notebook, sweep\n" in result.err
    assert_english(result)


# --- Which language ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["--status"], ["--detail"], ["--release", "x"]])
def test_another_language_is_refused(words: list[str], pool: Path) -> None:
    make_ascii(pool)
    for language in ("fr", "EN", "en_US.UTF-8", " "):
        refused = cli(*words, env={"GPU_RESOURCE_LANG": language})
        assert (refused.code, refused.out) == (2, "")
        assert refused.err == (
            f"✗ GPU_RESOURCE_LANG の言語はありません: {language!r}\n"
            "  対処: ja か en を指定するか、指定をやめてください\n"
        )
    error = json.loads(cli(*words, "--json", env={"GPU_RESOURCE_LANG": "fr"}).out)["error"]
    assert error["code"] == "usage"


@pytest.mark.parametrize("locale", ["C", "en_US.UTF-8", "ja_JP.UTF-8", "fr_FR.UTF-8"])
def test_without_another_word_the_screens_are_japanese_whatever_the_locale(locale: str, pool: Path) -> None:
    make_lab(pool)
    expected = (0, f"{LAB}{BELOW_80}{path_line(pool)}\n", "")
    for language in ({}, {"GPU_RESOURCE_LANG": ""}, {"GPU_RESOURCE_LANG": "ja"}):
        env = {"LANG": locale, "LC_ALL": locale, "LC_MESSAGES": locale, "LANGUAGE": locale, **language}
        assert cli("--status", env={**env, "PYTHONUTF8": "1"}) == expected
