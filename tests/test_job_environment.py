"""A job sees the world of the user who starts it, not that of the tool; and what is wrong is said ahead of a wait."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from conftest import GUARD_S, PROJECT, running
from screens import CLI, Result, cli, finish, start

from cli_v01 import seconds
from gpu_resource_manager_v01 import GPUResourceManagerV01

HOST = os.uname().nodename
PACKAGES = ["filelock", "tabulate", "wcwidth"]
SYSTEM = "/usr/bin:/bin"

#: what a job sees
SEEN = "import json, os, sys; print(json.dumps({**os.environ, 'prefix': sys.prefix}))"


@pytest.fixture
def real_pool(pool: Path) -> Path:
    """A pool with this machine in it, as a user has one."""
    GPUResourceManagerV01(pool, servers=[(HOST, 8, 64)])
    return pool


def make_environment(directory: Path, with_packages: bool = False) -> Path:
    """Make a virtual environment without ``pip``, and with links to the packages of the tool if it is to have them."""
    venv.create(directory, symlinks=True)
    [site] = directory.glob("lib/python*/site-packages")
    for name in PACKAGES if with_packages else ():
        spec = importlib.util.find_spec(name)
        assert spec and spec.origin
        here = Path(spec.origin)
        here = here.parent if here.name == "__init__.py" else here
        (site / here.name).symlink_to(here)
    return directory


def copy_the_tool(directory: Path) -> None:
    """Copy the modules; this machine's own file is out of their sight."""
    shutil.copy(PROJECT / "cli_v01.py", directory)
    library = (PROJECT / "gpu_resource_manager_v01.py").read_text("utf-8")
    setting = 'MACHINE_FILE = "/etc/gpu-resource-file"'
    assert library.count(setting) == 1
    library = library.replace(setting, f'MACHINE_FILE = "{directory}/no-machine-file"')
    (directory / "gpu_resource_manager_v01.py").write_text(library, "utf-8")
    package = "gpu_resource_extensions"
    shutil.copytree(PROJECT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with a ``.venv`` beside it, an environment of a user, one without packages, and links."""
    directory = tmp_path_factory.mktemp("place")
    (directory / "checkout").mkdir()
    copy_the_tool(directory / "checkout")
    make_environment(directory / "checkout" / ".venv", with_packages=True)
    make_environment(directory / "mine", with_packages=True)
    make_environment(directory / "bare")
    (directory / "link").symlink_to("checkout")
    (directory / "commands").mkdir()
    (directory / "commands" / "gpu-resource").symlink_to("../checkout/cli_v01.py")
    return directory


def shell(
    words: Sequence[object],
    pool: Path,
    path: Sequence[object],
    more: Mapping[str, object] | None = None,
    cwd: Path | None = None,
) -> Result:
    """Run a command in an environment with this PATH, these variables and no others."""
    environment = {"LANG": "C.UTF-8", "HOME": "/nowhere", "GPU_RESOURCE_FILE": str(pool)}
    environment |= {"PATH": ":".join(map(str, path)), **{name: str(value) for name, value in (more or {}).items()}}
    ran = subprocess.run(
        [str(word) for word in words],
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=GUARD_S,
        check=False,
    )
    return Result(ran.returncode, ran.stdout, ran.stderr)


def seen_by_a_job(
    tool: Sequence[object],
    pool: Path,
    path: Sequence[object],
    more: Mapping[str, object] | None = None,
    cwd: Path | None = None,
) -> dict[str, str]:
    """Return the environment of ``python`` in a job, and the ``prefix`` of that ``python``."""
    ran = shell([*tool, "--run", "t", "1", "1", "--", "python", "-c", SEEN], pool, path, more, cwd)
    assert ran.code == 0, ran
    seen: dict[str, str] = json.loads(ran.out)
    return seen


def activated(environment: Path) -> dict[str, object]:
    """Return what ``activate`` sets beside PATH."""
    return {"VIRTUAL_ENV": environment, "VIRTUAL_ENV_PROMPT": f"({environment.name}) "}


# --- The environment of the tool is not that of the job -------------------------------------------


@pytest.mark.parametrize("entered_by", ["checkout", "link"])
@pytest.mark.parametrize("started_by", ["checkout", "link"])
def test_job_of_an_activated_tool_gets_the_next_python_of_the_user(
    place: Path, real_pool: Path, entered_by: str, started_by: str
) -> None:
    tools, mine = place / entered_by / ".venv", place / "mine"
    command = ["python", place / started_by / "cli_v01.py"]
    seen = seen_by_a_job(command, real_pool, [tools / "bin", mine / "bin", SYSTEM], activated(tools))
    assert seen["prefix"] == str(mine)
    assert seen["PATH"] == f"{mine}/bin:{SYSTEM}"
    assert "VIRTUAL_ENV" not in seen and "VIRTUAL_ENV_PROMPT" not in seen


def test_environment_of_the_tool_may_be_a_link(place: Path, real_pool: Path, tmp_path: Path) -> None:
    (tmp_path / "checkout").mkdir()
    copy_the_tool(tmp_path / "checkout")
    tools, mine = place / "checkout" / ".venv", place / "mine"
    (tmp_path / "checkout" / ".venv").symlink_to(tools)
    for entered in (tools, tmp_path / "checkout" / ".venv"):
        command = ["python", tmp_path / "checkout" / "cli_v01.py"]
        seen = seen_by_a_job(command, real_pool, [entered / "bin", mine / "bin", SYSTEM], activated(entered))
        assert (seen["prefix"], seen["PATH"]) == (str(mine), f"{mine}/bin:{SYSTEM}")


def test_activation_by_a_shell_is_undone(place: Path, real_pool: Path) -> None:
    """What ``activate`` itself does, in the shells that it is for."""
    tools, mine = place / "checkout" / ".venv", place / "mine"
    run = f'. "{tools}/bin/activate" && python cli_v01.py --run t 1 1 -- python -c "$SEEN"'
    ran = shell(["bash", "-c", run], real_pool, [mine / "bin", SYSTEM], {"SEEN": SEEN}, cwd=place / "checkout")
    assert ran.code == 0, ran
    seen = json.loads(ran.out)
    assert (seen["prefix"], seen["PATH"]) == (str(mine), f"{mine}/bin:{SYSTEM}")
    assert "VIRTUAL_ENV" not in seen


def test_job_without_another_python_is_refused_and_not_run_by_the_tool_s(place: Path, real_pool: Path) -> None:
    tools, empty = place / "checkout" / ".venv", place / "commands"
    words = [tools / "bin" / "python", place / "checkout" / "cli_v01.py", "--run", "t", "1", "1", "--", "python", "-V"]
    ran = shell(words, real_pool, [tools / "bin", empty], activated(tools))
    assert (ran.code, ran.out) == (127, "")
    assert ran.err.startswith("✗ コマンドを実行できません: python: ")


@pytest.mark.parametrize("python", ["checkout/.venv", "mine"], ids=["of the tool", "of the user"])
def test_environment_of_the_user_is_left_alone(place: Path, real_pool: Path, python: str) -> None:
    mine = place / "mine"
    command = [place / python / "bin" / "python", place / "checkout" / "cli_v01.py"]
    seen = seen_by_a_job(command, real_pool, [mine / "bin", SYSTEM], activated(mine))
    assert (seen["prefix"], seen["PATH"]) == (str(mine), f"{mine}/bin:{SYSTEM}")
    assert (seen["VIRTUAL_ENV"], seen["VIRTUAL_ENV_PROMPT"]) == (str(mine), "(mine) ")


def test_environment_of_the_user_stays_though_the_tool_s_is_ahead_of_it(place: Path, real_pool: Path) -> None:
    tools, mine = place / "checkout" / ".venv", place / "mine"
    command = ["python", place / "checkout" / "cli_v01.py"]
    seen = seen_by_a_job(command, real_pool, [tools / "bin", mine / "bin", SYSTEM], activated(mine))
    assert (seen["prefix"], seen["VIRTUAL_ENV"]) == (str(mine), str(mine))


def test_other_venv_directories_are_not_those_of_the_tool(place: Path, real_pool: Path, tmp_path: Path) -> None:
    """A project of the user has one of that name too, and is where the command is typed."""
    mine = make_environment(tmp_path / "project" / ".venv")
    command = [place / "mine" / "bin" / "python", place / "checkout" / "cli_v01.py"]
    path = [mine / "bin", SYSTEM]
    seen = seen_by_a_job(command, real_pool, path, activated(mine), cwd=tmp_path / "project")
    assert (seen["prefix"], seen["VIRTUAL_ENV"]) == (str(mine), str(mine))


@pytest.mark.parametrize("name", ["lab", ".venv"])
@pytest.mark.parametrize("is_active", [True, False])
def test_environment_that_the_tool_was_installed_into_is_left_alone(
    real_pool: Path, tmp_path: Path, name: str, is_active: bool
) -> None:
    environment = make_environment(tmp_path / name, with_packages=True)
    [site] = environment.glob("lib/python*/site-packages")
    copy_the_tool(site)
    command = environment / "bin" / "gpu-resource"
    command.write_text(f"#!{environment}/bin/python\nfrom cli_v01 import run\nrun()\n")
    command.chmod(0o755)
    more = activated(environment) if is_active else {}
    seen = seen_by_a_job([command], real_pool, [environment / "bin", SYSTEM], more, cwd=tmp_path)
    assert (seen["prefix"], seen["PATH"]) == (str(environment), f"{environment}/bin:{SYSTEM}")
    assert seen.get("VIRTUAL_ENV") == (str(environment) if is_active else None)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_environment_that_uv_makes_for_a_script_is_not_that_of_the_job(
    place: Path, real_pool: Path, tmp_path: Path, version: str
) -> None:
    """``uv run cli_v01.py``: an environment below its cache, entered as if it was activated."""
    its = make_environment(tmp_path / f"environments-{version}" / "cli-v01-abc", with_packages=True)
    mine, script = place / "mine", place / "checkout" / "cli_v01.py"
    path = [its / "bin", mine / "bin", SYSTEM]
    seen = seen_by_a_job([its / "bin" / "python", script], real_pool, path, {"VIRTUAL_ENV": its})
    assert (seen["prefix"], seen["PATH"]) == (str(mine), f"{mine}/bin:{SYSTEM}")
    assert "VIRTUAL_ENV" not in seen


@pytest.mark.parametrize(
    ("path", "left"),
    [
        ("{tools}:/b:/a", "/b:/a"),
        ("/b:{tools}:/a:{tools}", "/b:/a"),
        (":/a::{tools}:/b:", ":/a::/b:"),
        ("/a:/a:{tools}", "/a:/a"),
        ("{tools}/bin:/a", "{tools}/bin:/a"),
        ("{place}/checkout:{place}/checkout/bin:{tools}", "{place}/checkout:{place}/checkout/bin"),
        ("relative/bin:bin:{tools}", "relative/bin:bin"),
        ("/a/.venv/bin:{place}/link/.venv/bin", "/a/.venv/bin"),
    ],
)
def test_rest_of_path_stays_in_its_order_with_its_empty_entries(
    place: Path, real_pool: Path, path: str, left: str
) -> None:
    facts = {"place": place, "tools": place / "checkout" / ".venv" / "bin"}
    words = [facts["tools"] / "python", place / "checkout" / "cli_v01.py", "--run", "t", "1", "1", "--"]
    ran = shell([*words, "/bin/sh", "-c", 'echo "$PATH"'], real_pool, [path.format(**facts)])
    assert (ran.code, ran.out) == (0, left.format(**facts) + "\n"), ran


def test_job_keeps_every_other_variable_and_gets_those_of_its_gpus(place: Path, real_pool: Path) -> None:
    tools = place / "checkout" / ".venv"
    more = {"PYTHONPATH": "/a:/b", "CONDA_PREFIX": "/opt/conda", "MY-OWN": "x y", "EMPTY": ""}
    command = ["python", place / "checkout" / "cli_v01.py"]
    seen = seen_by_a_job(command, real_pool, [tools / "bin", SYSTEM, place / "mine" / "bin"], more)
    assert {name: seen[name] for name in more} == more
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["GPU_TASK_ID"]) == ("0", "t")


# --- ./cli_v01.py finds the packages beside it ----------------------------------------------------


@pytest.mark.parametrize("script", ["checkout/cli_v01.py", "link/cli_v01.py", "commands/gpu-resource"])
@pytest.mark.parametrize("directory", ["checkout", "commands", "/"])
def test_script_finds_the_packages_of_the_venv_beside_it(
    place: Path, real_pool: Path, script: str, directory: str
) -> None:
    """Its first line takes the first python3 of PATH, which has none."""
    path = [place / "bare" / "bin", SYSTEM]

    def typed(*words: str) -> Result:
        return shell([place / script, *words], real_pool, path, cwd=place / directory)

    assert typed("--init").code == 0
    assert typed("--allocate", "t", "1", "1").code == 0
    assert "│" in typed("--status").out, "which needs tabulate"
    assert typed("--release", "t").code == 0
    ran = typed("--run", "t", "1", "1", "--", "python", "-c", "import sys; print(sys.prefix)")
    assert (ran.code, ran.out) == (0, f"{place / 'bare'}\n"), "and the job has its own python"


def test_script_may_be_named_by_where_one_stands(place: Path, real_pool: Path) -> None:
    path = [place / "bare" / "bin", SYSTEM]
    assert shell(["./cli_v01.py", "--status"], real_pool, path, cwd=place / "checkout").code == 0
    assert shell(["../link/cli_v01.py", "--status"], real_pool, path, cwd=place / "commands").code == 0
    assert shell(["gpu-resource", "--status"], real_pool, [*path, place / "commands"], cwd=Path("/")).code == 0


def test_interpreter_that_has_the_packages_needs_no_other(real_pool: Path, tmp_path: Path) -> None:
    (tmp_path / "checkout").mkdir()
    copy_the_tool(tmp_path / "checkout")
    beside, mine = tmp_path / "checkout" / ".venv" / "bin", make_environment(tmp_path / "mine", with_packages=True)
    beside.mkdir(parents=True)
    (beside / "python").write_text("#!/bin/sh\nexit 9\n")
    (beside / "python").chmod(0o755)
    words = [mine / "bin" / "python", tmp_path / "checkout" / "cli_v01.py", "--allocate", "t", "1", "1"]
    assert shell(words, real_pool, [SYSTEM]).code == 0


def test_interpreter_with_a_filelock_that_is_too_old_gives_way_to_the_venv_beside(
    place: Path, real_pool: Path, tmp_path: Path
) -> None:
    old = make_environment(tmp_path / "old")
    [packages] = (old / "lib").glob("python*/site-packages")
    (packages / "filelock.py").write_text("class FileLock: pass\n")
    words = [old / "bin" / "python", place / "checkout" / "cli_v01.py", "--allocate", "t", "1", "1"]
    ran = shell(words, real_pool, [SYSTEM])
    assert ran.code == 0, ran
    assert ran.out.count("t\n") == 2, "nothing is said twice: its name at the head, and at the end"


@pytest.mark.parametrize("beside", ["nothing", "an empty .venv"])
def test_without_packages_one_line_says_how_to_install_them(real_pool: Path, tmp_path: Path, beside: str) -> None:
    (tmp_path / "checkout").mkdir()
    copy_the_tool(tmp_path / "checkout")
    bare = make_environment(tmp_path / "bare")
    if beside != "nothing":
        make_environment(tmp_path / "checkout" / ".venv")
    words = [bare / "bin" / "python", tmp_path / "checkout" / "cli_v01.py", "--allocate", "t", "1", "1"]
    ran = shell(words, real_pool, [SYSTEM])
    assert ran.code == 2
    assert ran.err.startswith("✗ 必要なパッケージを読み込めません: ")
    assert "pip install -r requirements_v01.txt" in ran.err
    assert running(real_pool) == []


# --- A command that cannot be started does not wait -----------------------------------------------


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("no-such-command", 127),
        ("./no-such-command", 127),
        ("/no/such/command", 127),
        ("", 127),
        ("{directory}/not-executable", 126),
        ("not-executable", 126),
        ("{directory}", 126),
        ("/", 126),
    ],
)
@pytest.mark.parametrize("wait", [("--wait",), ("--wait", "1d"), ()], ids=" ".join)
def test_command_that_cannot_be_started_is_refused_ahead_of_the_wait(
    real_pool: Path, tmp_path: Path, command: str, code: int, wait: tuple[str, ...]
) -> None:
    assert GPUResourceManagerV01(real_pool).allocate_resources("all", 8, 64)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "not-executable").write_text("#!/bin/sh\n")
    command = command.format(directory=tmp_path / "bin")
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    before = real_pool.stat()
    result = cli("--run", "t", "2", "1", *wait, "--", command, "x", env=env)
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith(f"✗ コマンドを実行できません: {command}: "), result.err
    assert "待機中" not in result.err
    error = json.loads(cli("--run", "t", "2", "1", *wait, "--json", "--", command, env=env).out)["error"]
    assert (error["code"], error["word"]) == ("command_not_started", command)
    after = real_pool.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns), "it was never in line"
    assert not (tmp_path / ".leases").exists()


def test_command_is_looked_for_as_the_job_will_see_it(place: Path, real_pool: Path) -> None:
    """What only the environment of the tool has is no command of the user."""
    tools = place / "checkout" / ".venv"
    only_there = tools / "bin" / "only-there"
    only_there.write_text("#!/bin/sh\n")
    only_there.chmod(0o755)
    words = ["python", place / "checkout" / "cli_v01.py", "--run", "t", "1", "1", "--wait", "--", "only-there"]
    ran = shell(words, real_pool, [tools / "bin", SYSTEM], activated(tools))
    assert ran.code == 127


# --- A name of its own ----------------------------------------------------------------------------

NAME = re.compile(r"[^-\s][^\s]*-\d{8}-\d{6}-\S+")


def names_of_jobs_at_once(pool: Path, prefix: Sequence[str], count: int) -> list[str]:
    """Start jobs with ``-`` all at once; return the name of each, which it says and which its document has."""
    GPUResourceManagerV01(pool, servers=[(HOST, count, count)])
    environment = {**os.environ, "LANG": "C.UTF-8"}
    words = ["--run", "-", "1", "1", "--json", "--", "sh", "-c", "echo $GPU_TASK_ID"]
    command = [*prefix, sys.executable, str(CLI), *words]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(count)
    ]
    names = []
    for result in [finish(process) for process in processes]:
        assert result.code == 0, result
        job, document = result.out.split()[0], result.out.splitlines()[-1]
        assert json.loads(document)["result"]["task_id"] == job
        assert f"タスクID: {job}\n" in result.err
        assert f"で実行します: {job}\n" in result.err
        names.append(job)
    return names


def test_names_of_20_jobs_started_at_once_differ_and_are_said(pool: Path) -> None:
    names = names_of_jobs_at_once(pool, [], 20)
    assert len({*names}) == 20
    assert [name for name in names if not NAME.fullmatch(name)] == []
    assert running(pool) == []


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="only root can make namespaces")
def test_names_of_jobs_in_containers_differ_though_their_pids_are_the_same(pool: Path) -> None:
    names = names_of_jobs_at_once(pool, ["unshare", "--pid", "--fork", "--mount-proc"], 12)
    assert len({*names}) == 12


def test_names_of_20_reservations_made_at_once_differ_and_are_said(pool: Path) -> None:
    GPUResourceManagerV01(pool, servers=[(HOST, 20, 20)])
    results = [finish(one) for one in [start(str(CLI), "--allocate", "-", "1", "1") for _ in range(20)]]
    assert {result.code for result in results} == {0}
    names = running(pool)
    assert len({*names}) == 20
    assert {result.out.split("\n")[1] for result in results} == {f"  タスクID: {name}" for name in names}
    for result in results:
        assert cli(*result.out.rstrip().rpartition("python cli_v01.py ")[2].split()).code == 0, "its hint releases it"
    assert running(pool) == []


def test_name_that_was_made_is_in_the_document_and_in_the_lines_for_a_shell(real_pool: Path) -> None:
    name = json.loads(cli("--allocate", "-", "1", "1", "--json").out)["result"]["task_id"]
    assert running(real_pool) == [name]
    exported = cli("--allocate", "-", "1", "1", "--export").out
    [line] = [line for line in exported.splitlines() if "GPU_TASK_ID" in line]
    assert line == f"export GPU_TASK_ID={running(real_pool)[1]}"


@pytest.mark.parametrize(
    ("command", "part"),
    [
        (["true"], "-true-"),
        (["sh", "train.sh"], "-train.sh-"),
        ([sys.executable, "-u", "/some/where/train model.py", "--lr", "1"], "-train_model.py-"),
        (["env", "学習.py"], "-学習.py-"),
        (["sh", "-c", "true; $(x) .sh"], "-true____x__.sh-"),
    ],
    ids=lambda value: str(value)[-12:],
)
def test_name_that_was_made_tells_the_user_and_the_program(real_pool: Path, command: list[str], part: str) -> None:
    result = cli("--run", "-", "1", "1", "--", *command)
    [name] = re.findall(r"^タスクID: (.*)$", result.err, re.MULTILINE)
    assert part in name, name
    assert NAME.fullmatch(name)
    user = cli("--run", "t", "1", "1", "--", "id", "-un").out.strip()
    assert name.startswith(f"{user[:40]}-")


def test_names_that_begin_with_a_dash_are_refused_all_the_same(real_pool: Path) -> None:
    for name in ("--", "-x", "-1"):
        assert cli("--allocate", name, "1", "1").code == 2
    assert cli("--release", "-").code in (1, 2)
    assert running(real_pool) == []


# --- How long to wait -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "time_s"),
    [
        ("0", 0),
        ("90", 90),
        ("1.5", 1.5),
        ("0.25", 0.25),
        ("90s", 90),
        ("5m", 300),
        ("2h", 7200),
        ("1d", 86400),
        ("1.5h", 5400),
        ("007m", 420),
    ],
)
def test_time_to_wait_is_read(real_pool: Path, text: str, time_s: float) -> None:
    assert seconds(text) == time_s
    assert cli("--allocate", "t", "1", "1", "--wait", text).code == 0
    assert cli("--run", "u", "1", "1", "--wait", text, "--", "true").code == 0


@pytest.mark.parametrize(
    "text",
    [
        *["5x", "", " ", "m", "5 m", "5M", "5mm", "5ms", "1h30m", "1e3", "1_0", "-5", "+5", ".5", "5.", "1.2.3"],
        *["٣", "５", "inf", "nan", "0x10", "five", "1,5", "99999999999", "999999999d"],
    ],
)
def test_time_that_makes_no_sense_is_refused(real_pool: Path, text: str) -> None:
    before = real_pool.read_bytes()
    refused = cli("--allocate", "t", "1", "1", f"--wait={text}")
    assert (refused.code, refused.out.count("✓")) == (2, 0), refused
    ran = cli("--run", "t", "1", "1", f"--wait={text}", "--", "echo", "it runs")
    assert (ran.code, ran.out, ran.err.split("\n")[0]) == (125, "", refused.err.split("\n")[0])
    assert real_pool.read_bytes() == before


# --- What hints call the command ------------------------------------------------------------------


def hints(words: Sequence[object], pool: Path, place: Path) -> list[str]:
    """Return the lines that tell the user what to type next."""
    path = [place / "commands", place / "mine" / "bin", SYSTEM]

    def typed(*more: str) -> Result:
        return shell([*words, *more], pool, path, cwd=place / "checkout")

    granted, refused, helped = typed("--allocate", "t", "1", "1"), typed("--alocate"), typed("--help")
    assert (granted.code, refused.code, helped.code) == (0, 2, 0), (granted, refused)
    [asked] = [line for line in refused.err.splitlines() if "--help" in line]
    return [granted.out.rstrip().splitlines()[-1].strip(), asked.partition("対処: ")[2], helped.out.splitlines()[0]]


@pytest.mark.parametrize("by", ["gpu-resource", "commands/gpu-resource", "python commands/gpu-resource"])
def test_hints_name_the_link_by_which_we_were_started(place: Path, real_pool: Path, by: str) -> None:
    words = by.replace("commands/", f"{place}/commands/").split(" ")
    assert hints(words, real_pool, place) == [
        "gpu-resource --release t",
        "gpu-resource --help で使い方を確認してください",
        "usage: gpu-resource コマンド [オプション]",
    ]


@pytest.mark.parametrize("by", ["./cli_v01.py", "python cli_v01.py", "python ../link/cli_v01.py", "python -m cli_v01"])
def test_hints_name_the_script_otherwise(place: Path, real_pool: Path, by: str) -> None:
    assert hints(by.split(" "), real_pool, place) == [
        "python cli_v01.py --release t",
        "python cli_v01.py --help で使い方を確認してください",
        "usage: python cli_v01.py コマンド [オプション]",
    ]
