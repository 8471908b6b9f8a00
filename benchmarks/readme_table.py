#!/usr/bin/env python3
"""Write the table of speed into the README, from the result of ``run.py``.

    python benchmarks/run.py --json RESULT.json
    python benchmarks/readme_table.py RESULT.json README_v01.md

What stands between the lines ``<!-- speed -->`` and ``<!-- /speed -->`` is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

BARE, LOCKING, SHOWING = (f"import argparse, json{more}" for more in ("", ", filelock", ", tabulate"))
WRITE, FLOCK = "write+fsync+rename+fsync", "bare blocking flock"


class Line(NamedTuple):
    """One line of the table: two texts of the README, and the rows of the result that it shows."""

    what: str
    floor: str
    rows: tuple[tuple[str, str], ...]
    figure: str = "ratio"


def of_processes(count: int) -> Line:
    rows = tuple((f"{count} processes at once: {figure}", FLOCK) for figure in ("changes/s", "CPU per change"))
    what = f"{count} プロセスが同時に要求: 毎秒の変更数 (大きいほど速い)、変更あたりの CPU"
    return Line(what, "期限なしの `flock`", rows)


def of_servers(count: int) -> Line:
    rows = tuple((f"{change}, {count} servers", WRITE) for change in ("allocate", "release"))
    return Line(f"割り当て、解放 ({count} 台、7 割使用中)", "同じ内容の write + fsync + rename + fsync", rows)


LINES = (
    Line("`--help`、引数の誤り", f"`{BARE}`", (("--help", BARE), ("--unknown", BARE))),
    Line("`--detail`", f"`{BARE}`", (("--detail", BARE),)),
    Line("`--status`", f"`{SHOWING}`", (("--status", SHOWING),)),
    Line("`--allocate`、`--release`", f"`{LOCKING}`", (("--allocate", LOCKING), ("--release", LOCKING))),
    Line("1000 台での `--allocate` コマンド", "4 台での同じコマンド", (("--allocate, 1000 servers", "--allocate"),)),
    *map(of_servers, (4, 100, 1000)),
    Line(
        "割り当て (4 台)",
        "SQLite (rollback、EXTRA)、SQLite (WAL、FULL)",
        (("allocate, 4 servers", "SQLite rollback, EXTRA"), ("allocate, 4 servers", "SQLite WAL, FULL")),
    ),
    *map(of_processes, (8, 32)),
    Line(
        "8 プロセスが繰り返し要求: 最も長い待ち時間",
        "期限なしの `flock`",
        (("8 processes closed loop: longest wait", FLOCK),),
    ),
    Line(
        "同: 最も遅いプロセスの変更数",
        "最も速いプロセスの変更数",
        (("8 processes closed loop: slowest/fastest process", FLOCK),),
        "median",
    ),
    Line(
        "状態を読む `get_resource_summary` (100 台)",
        "同じ内容の `json.loads`",
        (("get_resource_summary, 100 servers", "json.loads"),),
    ),
    Line(
        "台数、1 台のタスク数に対する増え方",
        "線形 (指数 1)",
        (("exponent of growth with servers", "linear"), ("exponent of growth with tasks of one server", "linear")),
    ),
)


def table(result: list[dict[str, Any]]) -> str:
    """Return the table in Markdown; a row that the result lacks is a ``KeyError``."""
    found = {(row["what"], row["floor"]): row for row in result}
    text = "| 何を | 何と比べて | 比 |\n|---|---|---|\n"
    for line in LINES:
        figures = "、".join(f"{found[key][line.figure]:.2f}" for key in line.rows)
        text += f"| {line.what} | {line.floor} | {figures} |\n"
    return text


def with_table(page: str, result: list[dict[str, Any]]) -> str:
    """Return ``page`` with the table between its two markers."""
    parts = re.split(r"(?<=^<!-- speed -->\n)(?:.*\n)*?(?=<!-- /speed -->$)", page, flags=re.MULTILINE)
    if len(parts) != 2:
        raise ValueError("the page needs the lines <!-- speed --> and <!-- /speed -->, once")
    return table(result).join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="what run.py has written with --json")
    parser.add_argument("page", type=Path, metavar="README.md")
    args = parser.parse_args()
    result = json.loads(args.result.read_text(encoding="utf-8"))
    args.page.write_text(with_table(args.page.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
