"""The project can be installed: what comes along, what the command and the types do, and what an old Python says."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT

from cli_v01 import VERSION

MODULES = ["gpu_resource_manager_v01.py", "cli_v01.py"]
RUN_TIME = {"filelock", "tabulate", "wcwidth"}

#: what somebody writes who uses the library in a project of their own
USER = """\
import gpu_resource_manager_v01 as gpus
from gpu_resource_extensions.leases import Lease

manager = gpus.GPUResourceManagerV01()


def free(pool: gpus.GPUResourceManagerV01) -> int:
    state: gpus.State = pool.get_detailed_status()
    return sum(len(server["available_gpus"]) for server in state["servers"])


def train(task_id: str) -> list[int]:
    try:
        with manager.allocation(task_id, 2, 8, wait_s=60.0) as granted:
            reveal_type(granted["gpu_ids"])
            return granted["gpu_ids"]
    except gpus.NoCapacityError as error:
        reveal_type(error)
        reveal_type(error.required_gpus)
        raise
    except gpus.LockTimeoutError as error:
        reveal_type(error.lock_file)
        raise


reveal_type(manager)
reveal_type(manager.resource_file)
reveal_type(manager.release_resources("task"))
reveal_type(gpus.MIN_GPUS_PER_TASK)
reveal_type(Lease)
"""

#: the type of each ``reveal_type`` above
REVEALED = [
    "list[int]",
    "gpu_resource_manager_v01.NoCapacityError",
    "int",
    "str",
    "gpu_resource_manager_v01.GPUResourceManagerV01",
    "str",
    "bool",
    "int",
    "def (name: str, descriptor: int) -> gpu_resource_extensions.leases.Lease",
]


def run(*command: object, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that finds the project only if it is installed."""
    world = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=directory, env=world, capture_output=True, encoding="utf-8", check=False)


def packages(python: Path) -> set[str]:
    listed = run(python, "-m", "pip", "list", "--format=json", directory=python.parent)
    assert listed.returncode == 0, listed.stderr
    return {package["name"] for package in json.loads(listed.stdout)}


class Installed:
    """A virtual environment with nothing but the project in it."""

    def __init__(self, directory: Path, brought: set[str]) -> None:
        self.commands, self.brought = directory / "bin", brought
        self.python = self.commands / "python"
        self.mypy_cache = directory / "mypy"  # the first check reads the types of the standard library


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A copy of the checkout, for setuptools builds in the directory that it installs from."""
    place = tmp_path_factory.mktemp("installed")
    checkout = place / "checkout"
    checkout.mkdir()
    for name in [*MODULES, "pyproject.toml", "README_v01.md", "LICENSE"]:
        shutil.copy(PROJECT / name, checkout)
    for name in ("gpu_resource_extensions", "gpu_resource_manager_v01-stubs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / name, checkout / name, symlinks=True, ignore=ignore)
    made = run(sys.executable, "-m", "venv", place / "venv", directory=place)
    assert made.returncode == 0, made.stdout + made.stderr
    python = place / "venv" / "bin" / "python"
    before = packages(python)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    # Any one package tells whether there is an index, so that no other failure is taken for that.
    index = run(*pip, "--retries=0", "--timeout=20", "download", "--no-deps", "wcwidth", directory=place)
    if index.returncode != 0:
        pytest.skip(f"pip cannot reach an index: {index.stderr.strip().splitlines()[-1]}")
    result = run(*pip, "install", checkout, directory=place)
    assert result.returncode == 0, result.stdout + result.stderr
    shutil.rmtree(checkout)  # what was installed stands on its own
    return Installed(place / "venv", packages(python) - before)


def test_installing_brings_the_run_time_packages_and_nothing_else(installed: Installed) -> None:
    assert installed.brought == {"gpu-resource-manager"} | RUN_TIME


def test_the_command_runs_from_anywhere(installed: Installed, tmp_path: Path) -> None:
    command = installed.commands / "gpu-resource"
    version = run(command, "--version", directory=tmp_path)
    assert (version.returncode, version.stderr) == (0, "") and VERSION in version.stdout
    shown = run(command, "--help", directory=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "--allocate" in shown.stdout
    made = run(command, "--init", "--server", "gpu-server-0:8:64", directory=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    granted = run(command, "--allocate", "task", "2", "8", directory=tmp_path)
    assert (granted.returncode, granted.stderr) == (0, "")
    refused = run(command, "--allocate", "task", "2", "8", directory=tmp_path)
    assert refused.returncode == 2 and "✗" in refused.stderr, "exit codes are those of the script"
    returned = run(command, "--release", "task", directory=tmp_path)
    assert (returned.returncode, returned.stderr) == (0, "")


def test_the_library_and_every_extension_can_be_imported_from_another_directory(
    installed: Installed, tmp_path: Path
) -> None:
    extensions = sorted(path.stem for path in (PROJECT / "gpu_resource_extensions").glob("[!_]*.py"))
    extensions = [
        name for name in extensions if name not in ("airflow_tasks", "airflow_example_dag")
    ]  # by Airflow alone
    assert extensions
    names = ["gpu_resource_manager_v01", "cli_v01", *(f"gpu_resource_extensions.{name}" for name in extensions)]
    program = f"import sys, {', '.join(names)}; print(*(sys.modules[name].__file__ for name in {names}), sep='\\n')"
    result = run(installed.python, "-c", program, directory=tmp_path)
    assert result.returncode == 0, result.stderr
    environment = installed.commands.parent
    assert [path for path in result.stdout.splitlines() if not Path(path).is_relative_to(environment)] == []


def check(source: str, installed: Installed, directory: Path) -> tuple[int, list[str]]:
    """Check the file of a user as their own ``mypy --strict`` does; return the exit code and what it says."""
    pytest.importorskip("mypy")
    (directory / "user.py").write_text(source, "utf-8")
    options = ["--strict", "--config-file=", "--hide-error-context", f"--cache-dir={installed.mypy_cache}"]
    result = run(
        *(sys.executable, "-m", "mypy", *options, "--python-executable", installed.python, "user.py"),
        directory=directory,
    )
    assert result.stderr == ""
    return result.returncode, result.stdout.splitlines()


def test_a_type_checker_sees_the_types(installed: Installed, tmp_path: Path) -> None:
    code, said = check(USER, installed, tmp_path)
    assert re.findall('Revealed type is "(.*)"', "\n".join(said)) == REVEALED
    assert code == 0, said


@pytest.mark.parametrize(
    ("mistake", "kind"),
    [
        ('manager.allocate_resources("task", "2", 8)', "arg-type"),
        ('manager.allocate_resources("task", 2, 8)["gpu_ids"]', "index"),
        ("manager.allocate(2)", "attr-defined"),
        ("gpus.NoRoomError", "attr-defined"),
    ],
)
def test_a_type_checker_finds_the_mistake(mistake: str, kind: str, installed: Installed, tmp_path: Path) -> None:
    source = f"import gpu_resource_manager_v01 as gpus\n\nmanager = gpus.GPUResourceManagerV01()\n{mistake}\n"
    code, said = check(source, installed, tmp_path)
    assert code == 1
    assert [line.rpartition("[")[2] for line in said if ": error: " in line] == [f"{kind}]"]
    assert said[0].startswith("user.py:4: ")


# --- What the files say about it ------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings tomli
    result: dict[str, Any] = toml.loads((PROJECT / "pyproject.toml").read_text("utf-8"))
    return result


@pytest.fixture
def header(settings: dict[str, Any]) -> dict[str, Any]:
    """What uv reads at the head of the CLI (PEP 723)."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    block = (PROJECT / "cli_v01.py").read_text("utf-8").split("# /// script\n")[1].split("# ///\n")[0]
    result: dict[str, Any] = toml.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))
    return result


def bounds(lines: list[str]) -> dict[str, str]:
    """Return the bounds of each package that requirements name, without extras and comments."""
    found = [re.match(r"([\w-]+)(?:\[\w+\])?([^#]*)", line) for line in lines]
    return {match[1]: match[2].strip() for match in found if match}


def requirements(name: str) -> dict[str, str]:
    return bounds((PROJECT / name).read_text("utf-8").splitlines())


def test_project_and_requirements_and_script_header_name_the_same_packages(
    settings: dict[str, Any], header: dict[str, Any]
) -> None:
    project = bounds(settings["project"]["dependencies"])
    required = requirements("requirements_v01.txt")
    assert project.keys() == RUN_TIME
    assert required.keys() == RUN_TIME | {"pytest"}
    assert bounds(header["dependencies"]) == {name: required[name] for name in RUN_TIME}
    # A bound that only makes the start faster is not put on the environment of somebody else.
    assert project == {name: required[name] for name in RUN_TIME} | {"wcwidth": ""}


def test_optional_packages_are_those_that_the_tests_run_with(settings: dict[str, Any]) -> None:
    tested = requirements("requirements_tests.txt") | requirements("requirements_services.txt")
    extras = dict(settings["project"]["optional-dependencies"])
    assert list(bounds(extras.pop("airflow"))) == ["apache-airflow"]  # tested in environments of their own
    for extra in extras.values():
        for name, bound in bounds(extra).items():
            assert tested[name] == bound


def test_one_python_is_the_oldest_everywhere(settings: dict[str, Any], header: dict[str, Any]) -> None:
    oldest = settings["project"]["requires-python"]
    assert header["requires-python"] == oldest
    assert ">=" + settings["tool"]["mypy"]["python_version"] == oldest
    assert settings["tool"]["ruff"]["target-version"] == "py" + oldest.removeprefix(">=").replace(".", "")


def test_one_version_everywhere(settings: dict[str, Any]) -> None:
    assert settings["project"]["version"] == VERSION


def test_the_stub_is_the_module_and_can_be_read_as_a_stub(tmp_path: Path) -> None:
    """In a stub ``name = first | second`` names a type, even in a function: such a name is to be annotated."""
    pytest.importorskip("mypy")
    stub = PROJECT / "gpu_resource_manager_v01-stubs" / "__init__.pyi"
    assert os.readlink(stub) == "../gpu_resource_manager_v01.py"
    # What the module imports is not looked into: that needs packages which only .ci/run has.
    options = ["--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
    checked = run(sys.executable, "-m", "mypy", *options, stub, directory=PROJECT)
    assert checked.returncode == 0, checked.stdout + checked.stderr


# --- An older Python is told which one is needed --------------------------------------------------


def old_python(version: str) -> str:
    """Return the path of that Python; what a version manager puts on ``PATH`` may be there and not run."""
    path = shutil.which(f"python{version}")
    if path is None or subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"there is no python{version} here")
    return path


@pytest.mark.parametrize("module", MODULES)
def test_an_old_python_can_read_the_file_to_its_end(module: str) -> None:
    """Else it would name a line that it does not understand, before the first line of ours is run."""
    ast.parse((PROJECT / module).read_text("utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize("version", ["3.8", "3.9"])
@pytest.mark.parametrize("words", [["--status"], ["--status", "--json"], []])
def test_an_old_python_is_told_by_the_cli_in_one_line(version: str, words: list[str], tmp_path: Path) -> None:
    result = run(old_python(version), "-B", PROJECT / "cli_v01.py", *words, directory=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert "3.10" in line


@pytest.mark.parametrize("version", ["3.8", "3.9"])
def test_an_old_python_is_told_by_the_library(version: str) -> None:
    result = run(old_python(version), "-B", "-c", "import gpu_resource_manager_v01", directory=PROJECT)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and "3.10" in last
