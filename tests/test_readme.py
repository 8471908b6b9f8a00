"""The README tells the truth: every block of commands on the page runs, and shows what the page shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import PROJECT

from cli_v01 import HELP, build_parser, parse
from gpu_resource_manager_v01 import check_state, decode_state

README = (PROJECT / "README_v01.md").read_text("utf-8")


class Block(NamedTuple):
    language: str
    text: str


BLOCKS = [Block(*match) for match in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]
SHELL = [block.text for block in BLOCKS if block.language == "bash"]
SET_UP = [text for text in SHELL if "-m venv" in text]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the project, whose ``python`` and ``python3`` are the ones that run this test."""
    monkeypatch.delenv("GPU_RESOURCE_FILE")
    copy = tmp_path / "checkout"
    copy.mkdir()
    for path in PROJECT.iterdir():
        if path.suffix in (".py", ".txt", ".toml", ".md"):
            shutil.copy(path, copy)
    for directory in ("tests", "gpu_resource_extensions"):
        shutil.copytree(PROJECT / directory, copy / directory, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "train_resnet50.py").write_text("import os; assert os.environ['CUDA_VISIBLE_DEVICES'] == '0,1,2,3'\n")
    commands = tmp_path / "bin"
    commands.mkdir()
    # No package is fetched a second time: the new environment sees those of the one that tests.
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    share = f"""
        "$@" || exit
        if [ "$2 $3" = "-m venv" ]; then
            printf '%s\\n' {shlex.join(packages)} >"$(echo "$4"/lib/python*/site-packages)/packages.pth"
        fi
    """
    for name in ("python", "python3"):
        script = f'#!/bin/sh\nset -- {shlex.quote(sys.executable)} "$@"{share}'
        (commands / name).write_text(script, "utf-8")
        (commands / name).chmod(0o755)
    (commands / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (commands / "sudo").chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return copy


def bash(text: str, directory: Path) -> str:
    """Run a block as somebody who pastes it, and return what it writes to stdout."""
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=directory, capture_output=True, encoding="utf-8", check=False
    )
    assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_commands_of_the_page_work_from_top_to_bottom_and_show_what_it_shows(checkout: Path, tmp_path: Path) -> None:
    screen = ""
    shared = str(tmp_path / "gpu-pool")
    group = str(os.getgid())
    for block in BLOCKS:
        if block.language == "bash" and block.text not in SET_UP:
            screen = bash(block.text.replace("/srv/gpu-pool", shared).replace("gpu-users", group), checkout)
        elif block.language == "text":
            assert screen.endswith(block.text)
    assert os.listdir(shared), "the pool for several users was used"


def test_python_examples_use_the_pool_and_return_what_they_took(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "gpu-server-0")
    elsewhere = checkout.parent / "elsewhere"
    elsewhere.mkdir()
    for example in [block.text for block in BLOCKS if block.language == "python"]:
        (elsewhere / "train.py").write_text(example, "utf-8")
        said = bash(f"PYTHONPATH={checkout} python train.py", elsewhere)
        assert said == "gpu-server-0 の GPU [0, 1, 2, 3] を使います\n"
        document = decode_state((checkout / "resource_status.json").read_bytes())
        assert [server["running_tasks"] for server in document["servers"]] == [[]] * 4


def test_exactly_two_commands_set_up_a_fresh_machine(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests are collected, not run once more: that is what .ci/run does with the second command.
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only")
    main_job, tests = SET_UP
    assert README.split("<!-- test -->\n```bash\n")[1].startswith(tests), "what .ci/run looks for"
    assert "使用ヒント:\n  export CUDA_VISIBLE_DEVICES=0,1,2,3\n" in bash(main_job, checkout)
    assert "15_gpu_devices_format" in bash(tests, checkout)


def test_sample_of_the_state_file_is_a_valid_one() -> None:
    [sample] = [block.text for block in BLOCKS if block.language == "json"]
    check_state(json.loads(sample))


def test_commands_within_the_text_are_commands() -> None:
    found = re.findall(r"`[^`\n]*cli_v01\.py (--[^`\n]*)`", README)
    assert found
    for line in [line.replace("TASK_ID", "task") for line in found]:
        words, _, job = line.partition(" -- ")
        assert parse(build_parser(), shlex.split(words), shlex.split(job) or None)


def test_page_names_every_option_and_exit_code() -> None:
    parser = build_parser()
    options = [action.option_strings[-1] for action in parser._actions if action.dest not in ("help", "version")]
    assert [option for option in options if option not in README] == []
    exit_codes = HELP.split("終了コード:")[1]
    assert re.findall(r"(?:  |/ )(\d+)", exit_codes) == re.findall(r"^\| (\d+) \|", README, re.MULTILINE)


def test_page_names_every_code_of_the_json_output() -> None:
    source = (PROJECT / "cli_v01.py").read_text("utf-8")
    codes = set(re.findall(r'(?:EXIT_\w+,|return EXIT_IO,|else EXIT_AGAIN,)\s+"([a-z_]+)"', source))
    assert len(codes) >= 12
    assert [code for code in codes if f"`{code}`" not in README] == []


def test_readme_md_is_the_same_page() -> None:
    assert os.readlink(PROJECT / "README.md") == "README_v01.md"


def test_uv_would_install_what_the_requirements_name() -> None:
    """The block at the head of the CLI (PEP 723) and the requirements name the same run-time packages."""
    listed = (PROJECT / "requirements_v01.txt").read_text("utf-8").splitlines()
    required = [line for line in listed if line and not line.startswith(("#", "pytest"))]
    header = (PROJECT / "cli_v01.py").read_text("utf-8").split("# ///")[1]
    assert re.findall(r'"([^"]+)"', header.split("dependencies = ")[1]) == required


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_runs_the_cli_with_nothing_installed(checkout: Path) -> None:
    assert "合計:\n" in bash("uv run cli_v01.py --status", checkout)


def test_commands_that_are_only_shown_name_what_there_is(tmp_path: Path) -> None:
    """The blocks in ``sh`` take long or need a file of the reader's, so they are not run as they stand."""
    lines = [line for block in BLOCKS if block.language == "sh" for line in block.text.splitlines()]
    assert len(lines) >= 5
    for line in lines:
        interpreter, *words = shlex.split(line, comments=True)
        assert interpreter == ".venv/bin/python"
        words = [sys.executable, *words] + (["--collect-only", "-q"] if "pytest" in words else ["--help"])
        shown = subprocess.run(words, cwd=PROJECT, capture_output=True, encoding="utf-8", check=False)
        assert shown.returncode == 0, f"{line}\n{shown.stdout}\n{shown.stderr}"
