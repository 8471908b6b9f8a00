"""Wrong usage is answered with a command that would have worked, and each of these does work."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
from conftest import PROJECT, needed
from screens import Result, cli, finish, start

from gpu_resource_manager_v01 import GPUResourceManagerV01

#: what is typed, and the example; "busy" runs already, on made-up servers of which this machine is the last
EXAMPLES = {
    # A job without its --.
    "--run t 2 8 python train.py --lr 3": "--run t 2 8 -- python train.py --lr 3",
    "--run t 2 8 python train.py --json --wait 5": "--run t 2 8 -- python train.py --json --wait 5",
    "--run t 2 8 --wait python train.py": "--run t 2 8 --wait -- python train.py",
    "--run t 2 8 --wait 5m python train.py": "--run t 2 8 --wait 5m -- python train.py",
    "--run t 2 8 --json python train.py": "--run t 2 8 --json -- python train.py",
    "--wait 5m --run t 2 8 python train.py": "--wait 5m --run t 2 8 -- python train.py",
    "--run t 0,1 8 python train.py": "--run t 2 8 -- python train.py",
    "--run t 32 4 python train.py": "--run t 4 32 -- python train.py",
    "--run 2 8 python train.py": "--run - 2 8 -- python train.py",
    "--run 2 8 t python train.py": "--run t 2 8 -- python train.py",
    "--run 2 8 env python train.py": "--run - 2 8 -- env python train.py",
    "--run t 4 python train.py": "--run t 4 32 -- python train.py",
    "--run t --gpus 2 --cpus 8 python train.py": "--run t 2 8 -- python train.py",
    "--run python train.py": "--run - 2 16 -- python train.py",
    "--run test 2 8 python train.py": "--run test 2 8 -- python train.py",
    "--run t 2 8 sh -c 'echo $HOME'": "--run t 2 8 -- sh -c 'echo $HOME'",
    "--run -- t 2 8 python train.py": "--run t 2 8 -- python train.py",
    "--allocate t 2 8 -- python train.py": "--run t 2 8 -- python train.py",
    # Names and numbers.
    "--allocate t 32 4": "--allocate t 4 32",
    "--run t 32 4 -- python train.py": "--run t 4 32 -- python train.py",
    "--allocate 4 32 t": "--allocate t 4 32",
    "--allocate 4 t 32": "--allocate t 4 32",
    "--allocate 32 4 t": "--allocate t 4 32",
    "--allocate t 0,1 8": "--allocate t 2 8",
    "--allocate t 0-3 8": "--allocate t 4 8",
    "--allocate t [0,1] 8": "--allocate t 2 8",
    "--allocate t GPU0,GPU1 8": "--allocate t 2 8",
    "--allocate t 4GPU 32CPU": "--allocate t 4 32",
    "--allocate t --gpus 4 --cpus=32": "--allocate t 4 32",
    "--allocate t 100 100": "--allocate t 8 64",
    "--allocate t 9999999999 8": "--allocate t 8 8",
    "--allocate t 0 8": "--allocate t 2 8",
    "--allocate t -2 8": "--allocate t 2 8",
    "--allocate t 2 -8": "--allocate t 2 1",
    "--allocate t 1 8": "--allocate t 2 8",
    "--allocate t 2.0 8": "--allocate t 2 8",
    "--allocate t ２ ８": "--allocate t 2 8",
    "--allocate t 4": "--allocate t 4 32",
    "--allocate t": "--allocate t 2 16",
    "--allocate 4 32": "--allocate - 4 32",
    "--allocate t 2 8 16": "--allocate t 2 8",
    "--allocate -x 2 8": "--allocate x 2 8",
    "--allocate '' 2 8": "--allocate - 2 8",
    "--allocate ' ' 2 8": "--allocate - 2 8",
    "--allocate 'a\tb' 2 8": "--allocate ab 2 8",
    f"--allocate {'x' * 129} 2 8": "--allocate - 2 8",
    "--allocate busy 2 8": "--allocate - 2 8",
    "--run busy 2 8 -- python train.py": "--run - 2 8 -- python train.py",
    "--allocate '実験 1' 32 4": "--allocate '実験 1' 4 32",
    # Commands.
    "--release a b": "--release a",
    "--release a --release b": "--release a",
    "--stop a b": "--stop a",
    "status": "--status",
    "release a": "--release a",
    "run t 2 8 -- python train.py": "--run t 2 8 -- python train.py",
    "-status": "--status",
    "—status": "--status",
    "--Status": "--status",
    "--staus": "--status",
    "--stat": "--status",
    "--alocate t 2 8": "--allocate t 2 8",
    "--relase a": "--release a",
    "reset --yes": "--reset --yes",
    "--allocate --help": "--help",
    "--status --detail": "--status",
    # Options.
    "--allocate t 2 8 --prefer 1": "--allocate t 2 8 --prefer-server 1",
    "--allocate t 2 8 --prefer_server=1 --wiat": "--allocate t 2 8 --prefer-server 1 --wait",
    "--allocate=t 2 8": "--allocate t 2 8",
    "--reset --yes --servers a:8:64": "--reset --yes --server a:8:64",
    "--status --wait 5m": "--status",
    "--allocate t 2 8 --force": "--allocate t 2 8",
    "--release a --yes": "--release a",
    "--allocate t 2 8 --json --export": "--allocate t 2 8 --export",
    "--allocate t 2 8 --wait 5min": "--allocate t 2 8 --wait 5m",
    "--allocate t 2 8 --wait=90sec": "--allocate t 2 8 --wait 90s",
    "--allocate t 2 8 --wait 10 m": "--allocate t 2 8 --wait 10m",
    "--allocate t 2 8 --wait 1h30m": "--allocate t 2 8 --wait 90m",
    "--allocate t 2 8 --wait 5分": "--allocate t 2 8 --wait 5m",
    "--allocate t 2 8 --wait 2時間": "--allocate t 2 8 --wait 2h",
    "--allocate t 2 8 --prefer-server gpu-srver-3": "--allocate t 2 8 --prefer-server gpu-server-3",
    "--allocate t 2 8 --prefer-server nowhere": "--allocate t 2 8 --prefer-server gpu-server-0",
    "--allocate t 32 4 --prefer-server 2": "--allocate t 4 32 --prefer-server 2",
    # Servers.
    "--reset --yes --min-gpus 0": "--reset --yes --min-gpus 1",
    "--reset --yes --min-gpus 99": "--reset --yes --min-gpus 8",
    "--reset --yes --server a:4:32 --min-gpus 9": "--reset --yes --server a:4:32 --min-gpus 4",
    "--init --min-gpus 0": "--init --min-gpus 2",
    "--reset --yes --server a:8": "--reset --yes --server a:8:64",
    "--reset --yes --server a 8 64 b 4 32": "--reset --yes --server a:8:64 --server b:4:32",
    "--reset --yes --server a:8GPU:64": "--reset --yes --server a:8:64",
    "--add-server name 8 64": "--add-server name:8:64",
    "--add-server name:0:64": "--add-server name:1:64",
    "--disable gpu-server-1 3": "--disable gpu-server-1:3",
    "--disable gpu-server-1:0-3": "--disable gpu-server-1:0,1,2,3",
    "--disable GPU-SERVER-1 --reason fan is broken": "--disable gpu-server-1 --reason 'fan is broken'",
    "--enable gpu-server-1:GPU0,GPU1": "--enable gpu-server-1:0,1",
}

#: the same, of what needs the package prometheus-client
METRICS = {
    "--metrcs x.prom": "--metrics x.prom",
    "--metrics a.prom b.prom": "--metrics a.prom",
}

#: of these no example is given
WITHOUT = [
    "--rese",  # abbreviations and typos of what deletes everything
    "--res",
    "--rest",
    "--rset --yes",
    "--rel a",
    "--releas a",
    "--remove gpu-server-3",
    "--reset --dry-run",  # without what is not known, more would go
    "--reset gpu-server-1",
    "--reset --yes --force --status",
    "--release a --dry-run",
    "--remove-server gpu-server-9",
    "--release ''",
    "--release",  # nothing says which, or what
    "--run t 2 8",
    "--run test 2 8",
    "--run t 2 8 --wait 5m",
    "--wait 5m",
    "train.py",
    "--frobnicate",
    "--allocate t 2 8 --wait 1:30",  # minutes, or hours
    "--allocate t 2 8 --wait -5",
    "--disable gpu-server-1:9",  # the refusal names what there is
    "--disable nowhere",
    "--add-server gpu-server-1 8 64",  # would be refused
    "--init --server a 8 64",
    "--status --watch",  # right; what it lacks is a terminal
]


@pytest.fixture
def directory(made_pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a script and its interpreter, on a server of a pool where three tasks run."""
    manager = GPUResourceManagerV01(made_pool)
    for task_id in ("busy", "a", "b"):
        assert manager.allocate_resources(task_id, 2, 8)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "train.py").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "gpu-server-3")
    return tmp_path


def example_in(refused: Result) -> list[str]:
    """Return the example of a refusal, which stands between the problem and what to do."""
    if refused.out.startswith("{"):
        return [json.loads(refused.out)["error"]["example"]]
    lines = refused.err.splitlines()
    assert lines[-1].startswith("  対処: ")
    assert not any(line.startswith("  例: ") for line in lines[:-2])
    return [line.removeprefix("  例: ") for line in lines[-2:-1] if line.startswith("  例: ")]


@pytest.mark.parametrize(("typed", "right"), EXAMPLES.items())
def test_example_is_shown_and_works(typed: str, right: str, directory: Path) -> None:
    refused = cli(*shlex.split(typed), cwd=directory)
    assert refused.code in (2, 125)
    assert example_in(refused) == [f"python cli_v01.py {right}"]
    if not right.startswith("--stop"):  # which is for jobs that live
        done = cli(*shlex.split(right), cwd=directory)
        assert done.code == 0, done.err


@pytest.mark.services
@pytest.mark.parametrize(("typed", "right"), METRICS.items())
def test_example_of_metrics_is_shown_and_works(typed: str, right: str, directory: Path) -> None:
    needed("prometheus_client")
    test_example_is_shown_and_works(typed, right, directory)


@pytest.mark.parametrize("typed", WITHOUT)
def test_no_example_where_the_meaning_is_not_plain(typed: str, directory: Path) -> None:
    refused = cli(*shlex.split(typed), cwd=directory)
    assert refused.code in (2, 125)
    assert example_in(refused) == []


def test_numbers_are_those_of_a_server_in_service(pool: Path) -> None:
    manager = GPUResourceManagerV01(pool, servers=[("small", 2, 16), ("big", 4, 8)], min_gpus=1)
    manager.disable("big", [0])
    for typed, right in {"t 9 99": "t 3 8", "t 4 16": "t 3 8", "t 0 16": "t 1 16", "t 3": "t 3 6"}.items():
        refused = cli("--allocate", *typed.split())
        assert example_in(refused) == [f"python cli_v01.py --allocate {right}"]
        assert cli("--allocate", *right.split()).code == 0
        assert cli("--release", "t").code == 0


def test_job_gets_the_numbers_of_this_machine(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GPUResourceManagerV01(pool, servers=[("small", 2, 16), ("big", 4, 8)])
    monkeypatch.setenv("GPU_RESOURCE_SERVER", "small")
    assert example_in(cli("--run", "t", "4", "8", "env", "true")) == ["python cli_v01.py --run t 2 8 -- env true"]


def test_json_has_the_example_beside_the_message(directory: Path) -> None:
    error = json.loads(cli("--json", "--allocate", "t", "32", "4").out)["error"]
    assert error["example"] == "python cli_v01.py --json --allocate t 4 32"
    assert "例" not in error["message"]
    assert "example" not in json.loads(cli("--json", "--frobnicate").out)["error"]


def test_without_a_pool_only_what_needs_none(absent_pool: Path) -> None:
    assert example_in(cli("--init", "--server", "a", "8", "64")) == ["python cli_v01.py --init --server a:8:64"]
    assert example_in(cli("--allocate", "t", "0,1", "8")) == []
    assert not absent_pool.exists()


def test_a_right_command_does_not_load_it(made_pool: Path) -> None:
    code = "import sys, cli_v01; cli_v01.main(['--status']); sys.exit('right_input' in ' '.join(sys.modules))"
    assert finish(start("-c", code, cwd=PROJECT)).code == 0
