"""The benchmarks run, and say what they should; how fast anything is, they tell, not a test."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TRACE = "submit_time_s,num_gpu,duration_s\n0,8,100\n10,8,100\n20,8,100\n30,8,100\n40,2,50\n50,8,10\n"


def attempt(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)


def run(*words: object) -> str:
    done = attempt(*words)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_one_command_prints_every_section_and_another_makes_the_table_of_the_readme(tmp_path: Path) -> None:
    trace, rows, page = (tmp_path / name for name in ("trace.csv", "rows.json", "README.md"))
    trace.write_text(TRACE)
    words = ("--rounds", 1, "--seconds", 0.05, "--directory", tmp_path, "--json", rows)
    text = run(BENCHMARKS / "run.py", trace, *words)
    found = json.loads(rows.read_text(encoding="utf-8"))
    assert {row["section"] for row in found} == {"start", "change", "contention", "read", "scaling", "replay"}
    assert all(row["what"] in text for row in found)
    # Of one round on a busy machine, the exponent of a growth may come out as anything.
    assert all(row["ratio"] > 0 for row in found if row["section"] != "scaling")
    assert sorted(tmp_path.iterdir()) == [rows, trace]  # it cleans up

    page.write_text("before\n<!-- speed -->\nold\n\nlines\n<!-- /speed -->\nafter\n")
    for _ in range(2):  # what it has written it can replace
        run(BENCHMARKS / "readme_table.py", rows, page)
        lines = page.read_text(encoding="utf-8").splitlines()
        assert (lines[:2], lines[-2:]) == (["before", "<!-- speed -->"], ["<!-- /speed -->", "after"])
        assert lines[2] == "| 何を | 何と比べて | 比 |" and len(lines) > 10
        [ratio] = [row["ratio"] for row in found if row["what"] == "--detail"]
        assert f"| `--detail` | `import argparse, json` | {ratio:.2f} |" in lines


def test_readme_table_refuses_a_page_without_its_place(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("<!-- speed -->\n")
    (tmp_path / "rows.json").write_text("[]")
    done = attempt(BENCHMARKS / "readme_table.py", tmp_path / "rows.json", page)
    assert done.returncode == 1 and "<!-- /speed -->" in done.stderr
    assert page.read_text() == "<!-- speed -->\n"


def replay(tmp_path: Path, trace: str) -> dict[str, dict[str, Any]]:
    (tmp_path / "trace.csv").write_text(trace)
    run(BENCHMARKS / "replay.py", tmp_path / "trace.csv", "--json", tmp_path / "outcomes.json")
    outcomes = json.loads((tmp_path / "outcomes.json").read_text(encoding="utf-8"))
    return {outcome.pop("policy"): outcome for outcome in outcomes}


def test_replay_writes_what_each_policy_did_to_jobs_of_each_size(tmp_path: Path) -> None:
    found = replay(tmp_path, TRACE)
    limits = [f"passed over {limit}" for limit in (4, 8, 16, 32, 64)]
    killed = ["5% killed, leases", "5% killed, none"]
    assert [*found] == ["no line", "strict FIFO", *limits, "no limit", *killed]
    # Four jobs of 8 GPUs fill the pool; the one of 2 starts when the first ends, at 100, and the last
    # one of 8 when the second does, at 110. 32 GPU-seconds per second are to be had for 50 s.
    assert found["strict FIFO"] == {
        "refused": 0,
        "mean_wait_s": (60 + 60) / 6,
        "p95_wait_s": 60,
        "longest_wait_s": 60,
        "gpu_use": 8 * (50 + 40 + 30 + 20) / (32 * 50),
        "by_gpus": {
            "2": {"jobs": 1, "mean_wait_s": 60, "longest_wait_s": 60},
            "8": {"jobs": 5, "mean_wait_s": 12, "longest_wait_s": 60},
        },
    }
    assert found["no line"]["refused"] == 2
    assert found["no line"]["by_gpus"] == {"8": {"jobs": 4, "mean_wait_s": 0, "longest_wait_s": 0}}


def test_strict_fifo_lets_nobody_pass_and_the_line_of_the_library_does(tmp_path: Path) -> None:
    rows = [(0, 6, 100), *[(1, 8, 100)] * 3, (2, 8, 100), (3, 2, 10)]  # 2 GPUs are free all the time
    text = "".join(f"{submit},{gpus},{duration}\n" for submit, gpus, duration in rows)
    found = replay(tmp_path, "submit_time_s,num_gpu,duration_s\n" + text)
    assert found["strict FIFO"]["by_gpus"]["2"]["longest_wait_s"] == 98
    assert found["passed over 32"]["by_gpus"]["2"]["longest_wait_s"] == 0


def test_made_up_load_has_the_demand_and_the_mix_that_it_was_asked_for(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    words = ("--demand", 0.5, "--mix", "1:0.5", "2:0.5", "--seed", 3, "--jobs", 20000)
    run(BENCHMARKS / "made_up_load.py", trace, *words)
    heading, *lines = trace.read_text().split()
    jobs = [[float(cell) for cell in line.split(",")] for line in lines]
    assert heading == "submit_time_s,num_gpu,duration_s" and len(jobs) == 20000
    assert jobs == sorted(jobs, key=lambda job: job[0])
    assert {gpus for _, gpus, _ in jobs} == {1, 2}
    used = sum(gpus * duration_s for _, gpus, duration_s in jobs) / (32 * jobs[-1][0])
    assert abs(used - 0.5) < 0.05


def test_two_checkouts_are_compared_in_turns(tmp_path: Path) -> None:
    words = ("--other", BENCHMARKS.parent, "--rounds", 1, "--directory", tmp_path)
    text = run(BENCHMARKS / "beside.py", *words)
    for what in ("allocate, 4 servers", "release, 1000 servers", "--allocate", "--release", "--status", "--detail"):
        assert what in text
    assert not [*tmp_path.iterdir()]
