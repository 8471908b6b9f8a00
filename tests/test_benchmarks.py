"""The benchmarks run, and say what they should; how fast anything is, they tell, not a test."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TRACE = "submit_time_s,num_gpu,duration_s\n0,8,100\n10,8,100\n20,8,100\n30,8,100\n40,2,50\n50,8,10\n"


def run(*words: object) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_one_command_prints_every_section_and_the_same_as_json(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(TRACE)
    rows = tmp_path / "rows.json"
    words = ("--rounds", 1, "--seconds", 0.05, "--directory", tmp_path, "--json", rows)
    text = run(BENCHMARKS / "run.py", tmp_path / "trace.csv", *words)
    found = json.loads(rows.read_text(encoding="utf-8"))
    assert {row["section"] for row in found} == {"start", "change", "contention", "read", "scaling", "replay"}
    assert all(row["ratio"] > 0 and row["what"] in text for row in found)
    assert sorted(tmp_path.iterdir()) == [rows, tmp_path / "trace.csv"]  # it cleans up
