"""Run the command line as its users do: a real process, its two streams, its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from conftest import GUARD_S, PROJECT

CLI = PROJECT / "cli_v01.py"


def made_up_note(pool: Path) -> str:
    """Return what a command says on stderr that was given GPUs which nobody has."""
    how = "--reset --detect か --reset --server NAME:GPUS:CPUS で登録してください"
    return f"注意: 架空のサーバーから割り当てました: {pool} (実際の計算機は {how})\n"


class Result(NamedTuple):
    code: int
    out: str
    err: str


def start(
    *args: str | bytes,
    env: Mapping[str, str] | None = None,
    redirect: str = "",
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.PIPE,
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start the interpreter with ``args``; ``redirect`` is what a user types after the command."""
    # Of the developer's settings none that change what is printed, how it is buffered or imported.
    personal = ("PYTHON", "LC_", "LANG", "COLUMNS", "FORCE_COLOR")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(personal)}
    command: list[str | bytes] = [sys.executable, *args]
    if redirect:
        command = ["bash", "-o", "pipefail", "-c", f'exec "$@" {redirect}', "bash", *command]
    return subprocess.Popen(
        command,
        env={**clean, "LANG": "C.UTF-8", **(env or {})},
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        cwd=cwd,
    )


def finish(process: subprocess.Popen[bytes], encoding: str = "utf-8") -> Result:
    """Wait for the end; whatever happened, the interpreter itself must never have complained."""
    with process:
        try:
            out, err = process.communicate(timeout=GUARD_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    result = Result(process.returncode, (out or b"").decode(encoding), err.decode(encoding))
    for complaint in ("Traceback", "Exception ignored", "Fatal Python error"):
        assert complaint not in result.err, result.err
    return result


def cli(
    *args: str | bytes,
    encoding: str = "utf-8",
    env: Mapping[str, str] | None = None,
    redirect: str = "",
    cwd: Path | None = None,
) -> Result:
    return finish(start(str(CLI), *args, env=env, redirect=redirect, cwd=cwd), encoding)
