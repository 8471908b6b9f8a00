"""Which pool a command uses, who makes it, and that nobody is given GPUs of a made-up pool without a word.

Real processes of a copy of the checkout, whose machine's file lies beside it instead of in /etc.
"""

from __future__ import annotations

import compileall
import contextlib
import json
import logging
import os
import pty
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ALICE, GUARD_S, PROJECT, Children, become, running
from screens import Result, finish, made_up_note, start

from gpu_resource_manager_v01 import (
    GPUResourceManagerV01,
    InvalidRequestError,
    NoPoolError,
    PoolConflictError,
    ResourceManagerError,
    StateFileError,
    UnusableStateFileError,
)

HOST = os.uname().nodename


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout, compiled; the machine's file is ``machine-file`` beside it."""
    directory = tmp_path_factory.mktemp("original") / "checkout"
    directory.mkdir()
    shutil.copy(PROJECT / "cli_v01.py", directory)
    library = (PROJECT / "gpu_resource_manager_v01.py").read_text("utf-8")
    setting = 'MACHINE_FILE = "/etc/gpu-resource-file"'
    assert library.count(setting) == 1
    beside = 'MACHINE_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "machine-file")'
    (directory / "gpu_resource_manager_v01.py").write_text(library.replace(setting, beside), "utf-8")
    package = "gpu_resource_extensions"
    shutil.copytree(PROJECT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(directory, quiet=1)
    return directory


class Checkout:
    """A copy of the checkout, and what is typed there."""

    def __init__(self, directory: Path, environment: dict[str, str]) -> None:
        self.directory, self.environment = directory, environment
        self.script, self.machine_file = directory / "cli_v01.py", directory / "machine-file"
        self.default = directory / "resource_status.json"

    def cli(self, *words: str, place: str | None = None, **more: str) -> Result:
        """Run a command, with ``place`` in ``GPU_RESOURCE_FILE``, and further variables."""
        env = {**self.environment, **more, **({} if place is None else {"GPU_RESOURCE_FILE": place})}
        return finish(start(str(self.script), *words, env=env))

    def library(self, code: str, *words: str, place: str | None = None) -> Result:
        """Run a program that uses the library."""
        env = {"PYTHONPATH": str(self.directory), **({} if place is None else {"GPU_RESOURCE_FILE": place})}
        head = "import sys\nfrom gpu_resource_manager_v01 import GPUResourceManagerV01, NoPoolError\n"
        return finish(start("-c", head + code, *words, env=env, cwd=self.directory))

    def used(self, place: str | None = None) -> str:
        """Return the pool that ``--status`` shows."""
        result = self.cli("--status", "--json", place=place)
        assert result.code == 0, result
        return str(json.loads(result.out)["result"]["resource_file"])


@pytest.fixture
def checkout(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    monkeypatch.delenv("GPU_RESOURCE_FILE")
    monkeypatch.delenv("GPU_RESOURCE_SERVER", raising=False)
    return Checkout(Path(shutil.copytree(original, tmp_path / "checkout")), {})


@pytest.fixture
def places(checkout: Checkout, tmp_path: Path) -> Path:
    """A directory for pools, with one in it that was described."""
    directory = tmp_path / "places"
    directory.mkdir()
    GPUResourceManagerV01(directory / "real.json", servers=[(HOST, 8, 64)])
    return directory


def tree(directory: Path) -> dict[str, object]:
    """Return all that lies below a directory, but for what Python compiles: contents of files, targets of links."""
    found: dict[str, object] = {}
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        if "__pycache__" not in path.parts:
            is_file, is_link = stat.S_ISREG(mode), stat.S_ISLNK(mode)
            found[str(path)] = path.read_bytes() if is_file else os.readlink(path) if is_link else stat.S_IFMT(mode)
    return found


def code_of(result: Result) -> str:
    """Return the name for programs of a refusal, or "" for what was done."""
    document = json.loads(result.out.splitlines()[-1])
    return "" if document["ok"] else str(document["error"]["code"])


#: every command that looks at a pool; the job behind ``--run`` says that it has run
COMMANDS: dict[str, tuple[str, ...]] = {
    "init": ("--init",),
    "init-described": ("--init", "--server", f"{HOST}:4:32"),
    "status": ("--status",),
    "detail": ("--detail",),
    "allocate": ("--allocate", "t", "2", "1"),
    "allocate-wait": ("--allocate", "t", "2", "1", "--wait", "0.01"),
    "export": ("--allocate", "t", "2", "1", "--export"),
    "run": ("--run", "t", "2", "1", "--", "echo", "it runs"),
    "release": ("--release", "t"),
    "stop": ("--stop", "t"),
    "reset": ("--reset", "--yes"),
    "reset-described": ("--reset", "--yes", "--server", f"{HOST}:4:32"),
    "add-server": ("--add-server", "node9:4:32"),
    "remove-server": ("--remove-server", HOST),
    "disable": ("--disable", HOST),
    "enable": ("--enable", HOST),
}
INIT = {"init", "init-described"}


def in_json(words: tuple[str, ...]) -> tuple[str, ...]:
    if "--export" in words:
        return tuple("--json" if word == "--export" else word for word in words)
    at = words.index("--") if "--" in words else len(words)
    return (*words[:at], "--json", *words[at:])


def assert_refused(checkout: Checkout, name: str, exit_code: int, code: str, place: str | None, *said: str) -> None:
    """The command is refused with this code, says all that, and leaves everything as it is."""
    words = COMMANDS[name]
    exit_code = 125 if name == "run" else exit_code
    before = tree(checkout.directory.parent)
    result = checkout.cli(*words, place=place)
    assert (result.code, result.err[:2]) == (exit_code, "✗ "), result
    assert "it runs" not in result.out and "✓" not in result.out
    for text in said:
        assert text in result.err, result.err
    assert "対処: " in result.err
    result = checkout.cli(*in_json(words), place=place)
    assert (result.code, code_of(result)) == (exit_code, code), result
    assert tree(checkout.directory.parent) == before, "nothing was made"


# --- Which place wins -----------------------------------------------------------------------------


@pytest.mark.parametrize("argument", [True, False])
@pytest.mark.parametrize("variable", ["named", "empty", None])
@pytest.mark.parametrize("machine", [True, False])
def test_argument_wins_over_variable_over_machine_s_file_over_beside_the_module(
    checkout: Checkout, places: Path, argument: bool, variable: str | None, machine: bool
) -> None:
    names = ("argument", "variable", "machine")
    by_argument, by_variable, by_machine = (str(places / f"{name}.json") for name in names)
    for path in (by_argument, by_variable, by_machine):
        GPUResourceManagerV01(path, servers=[(HOST, 8, 64)])
    if machine:
        checkout.machine_file.write_text(f"{by_machine}\n")
    place = {"named": by_variable, "empty": "", None: None}[variable]
    expected = by_machine if machine else str(checkout.default)
    expected = by_variable if variable == "named" else expected
    assert checkout.used(place) == expected
    expected = by_argument if argument else expected
    program = "print(GPUResourceManagerV01(*sys.argv[1:]).resource_file)"
    shown = checkout.library(program, *[by_argument][: int(argument)], place=place)
    assert (shown.code, shown.out) == (0, f"{expected}\n")


@pytest.mark.parametrize(
    "text", ["{0}", "{0}\n", "{0}\n# a note\n", "  {0}  \r\n", "{0}\n/another/place.json\n"], ids=ascii
)
def test_first_line_of_the_machine_s_file_names_the_pool(checkout: Checkout, places: Path, text: str) -> None:
    checkout.machine_file.write_text(text.format(places / "real.json"))
    assert checkout.used() == str(places / "real.json")


@pytest.mark.parametrize("name", ["プール.json", "with blank.json"])
def test_place_may_have_any_name(checkout: Checkout, places: Path, name: str) -> None:
    (places / "real.json").rename(places / name)
    checkout.machine_file.write_text(f"{places / name}\n", "utf-8")
    assert checkout.used() == str(places / name)


@pytest.mark.parametrize("command", COMMANDS)
def test_environment_that_drops_every_variable_finds_the_pool_of_the_machine(
    checkout: Checkout, places: Path, command: str
) -> None:
    """As cron, ``sudo -i`` and ``ssh host command`` do."""
    checkout.machine_file.write_text(f"{places / 'real.json'}\n")
    words = ["--init", "--server", f"{HOST}:8:64"] if command == "init-described" else COMMANDS[command]
    ran = subprocess.run(
        ["env", "-i", sys.executable, str(checkout.script), *words],
        capture_output=True,
        encoding="utf-8",
        timeout=GUARD_S,
        cwd="/",
        check=False,
    )
    refused = {"release": "t", "stop": "t", "remove-server": HOST}  # an unknown task, the last server
    assert ran.returncode == (1 if command in refused else 0), ran
    assert "架空" not in ran.stdout + ran.stderr
    assert not checkout.default.exists()
    assert sorted(os.listdir(places)) in (
        [".resource.lock", "real.json"],
        [".leases", ".resource.lock", "real.json"],
    )


# --- A place without a pool -----------------------------------------------------------------------


def by_variable(checkout: Checkout, path: Path) -> str:
    return str(path)


def by_machine_s_file(checkout: Checkout, path: Path) -> None:
    checkout.machine_file.write_text(f"{path}\n", "utf-8")


Named = Callable[[Checkout, Path], str | None]
BOTH_WAYS = pytest.mark.parametrize("named", [by_variable, by_machine_s_file])


@BOTH_WAYS
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in INIT])
def test_mistyped_or_deleted_pool_is_no_pool_and_is_not_made(
    checkout: Checkout, places: Path, command: str, named: Named
) -> None:
    typo = places / "rael.json"
    place = named(checkout, typo)
    assert_refused(checkout, command, 74, "no_pool", place, f"✗ プールがありません: {typo}\n", "--init --detect")


@BOTH_WAYS
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in INIT])
def test_mistyped_directory_is_no_pool_and_is_not_made(
    checkout: Checkout, places: Path, command: str, named: Named
) -> None:
    typo = places / "palces" / "real.json"
    place = named(checkout, typo)
    said = f"✗ プールがありません: {typo}\n", "ディレクトリを作ってください"
    assert_refused(checkout, command, 74, "no_pool", place, *said)


@BOTH_WAYS
@pytest.mark.parametrize("command", sorted(INIT))
def test_init_makes_the_pool_that_is_named_and_nothing_else(
    checkout: Checkout, places: Path, command: str, named: Named
) -> None:
    place = named(checkout, places / "new.json")
    before = tree(checkout.directory.parent)
    assert checkout.cli(*COMMANDS[command], place=place).code == 0
    made = {name for name in tree(checkout.directory.parent) if name not in before}
    assert made == {str(places / "new.json")}
    assert checkout.cli(*COMMANDS["allocate"], place=place).code == 0


@BOTH_WAYS
@pytest.mark.parametrize("command", sorted(INIT))
def test_init_makes_no_directory(checkout: Checkout, places: Path, command: str, named: Named) -> None:
    place = named(checkout, places / "palces" / "new.json")
    assert_refused(checkout, command, 74, "state_file", place, str(places / "palces"))


@BOTH_WAYS
def test_remedy_of_a_missing_pool_works(checkout: Checkout, places: Path, named: Named) -> None:
    path = places / "palces" / "new.json"
    place = named(checkout, path)
    refused = checkout.cli("--allocate", "t", "2", "1", place=place)
    assert "ディレクトリを作ってください" in refused.err
    path.parent.mkdir()
    refused = checkout.cli("--allocate", "t", "2", "1", place=place)
    remedy = refused.err.partition("対処: ")[2]
    assert "--init --server NAME:GPUS:CPUS" in remedy
    assert checkout.cli("--init", "--server", "node1:8:64", place=place).code == 0
    granted = checkout.cli("--allocate", "t", "2", "1", place=place)
    assert (granted.code, granted.err, running(path)) == (0, "", ["t"])


# --- Places that are of no use --------------------------------------------------------------------


def an_empty_file(checkout: Checkout, places: Path) -> None:
    checkout.machine_file.write_text("")


def an_empty_first_line(checkout: Checkout, places: Path) -> None:
    checkout.machine_file.write_text(f"  \n{places / 'real.json'}\n")


def a_directory(checkout: Checkout, places: Path) -> None:
    checkout.machine_file.mkdir()


def a_loop(checkout: Checkout, places: Path) -> None:
    checkout.machine_file.symlink_to(checkout.machine_file)


def a_file_without_rights(checkout: Checkout, places: Path) -> None:
    by_machine_s_file(checkout, places / "real.json")
    checkout.machine_file.chmod(0)


USELESS = [an_empty_file, an_empty_first_line, a_directory, a_loop]
USELESS += [a_file_without_rights] if os.geteuid() else []  # root may read everything


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("make", USELESS)
def test_machine_s_file_that_is_of_no_use_is_an_error_and_never_skipped(
    checkout: Checkout, places: Path, command: str, make: Callable[[Checkout, Path], None]
) -> None:
    make(checkout, places)
    said = f"✗ 状態ファイルのエラー: {checkout.machine_file}\n"
    assert_refused(checkout, command, 74, "state_file", None, said)


@pytest.mark.parametrize("command", ["status", "allocate"])
def test_machine_s_file_that_is_a_link_to_what_is_not_mounted_is_an_error_too(
    checkout: Checkout, places: Path, command: str
) -> None:
    checkout.machine_file.symlink_to(places / "not mounted")
    assert_refused(checkout, command, 74, "state_file", None, str(checkout.machine_file))


@pytest.mark.parametrize("make", USELESS)
def test_variable_wins_over_a_machine_s_file_that_is_of_no_use(
    checkout: Checkout, places: Path, make: Callable[[Checkout, Path], None]
) -> None:
    make(checkout, places)
    assert checkout.used(str(places / "real.json")) == str(places / "real.json")


def test_machine_s_file_that_we_may_not_read_is_an_error(lab: Path, children: Children) -> None:
    class Here(GPUResourceManagerV01):
        MACHINE_FILE = str(lab / "machine-file")
        RESOURCE_FILE = str(lab / "resource_status.json")

    (lab / "machine-file").write_text(f"{lab}/real.json\n")
    (lab / "machine-file").chmod(0o600)
    del os.environ["GPU_RESOURCE_FILE"]

    def work() -> None:
        become(ALICE, [], 0o022)
        with pytest.raises(StateFileError, match="machine-file") as refused:
            Here()
        assert not isinstance(refused.value, NoPoolError)

    assert children.run(work) == 0
    assert os.listdir(lab) == ["machine-file"]


@BOTH_WAYS
@pytest.mark.parametrize("command", COMMANDS)
def test_relative_place_is_refused(checkout: Checkout, places: Path, command: str, named: Named) -> None:
    place = named(checkout, Path("resource_status.json"))
    said = "RESOURCE_FILE" if place else str(checkout.machine_file)
    assert_refused(checkout, command, 2, "invalid_request", place, said, "/ で始まる")


@pytest.mark.parametrize("relative", ["./x.json", "../x.json", "~/x.json", " ", "$HOME/x.json"])
def test_places_that_only_a_shell_would_understand_are_relative_too(checkout: Checkout, relative: str) -> None:
    assert_refused(checkout, "allocate", 2, "invalid_request", relative)


@BOTH_WAYS
@pytest.mark.parametrize("command", COMMANDS)
def test_directory_is_no_pool_and_stays_as_it_is(checkout: Checkout, places: Path, command: str, named: Named) -> None:
    (places / ".resource.lock").touch()  # of the other pool there
    (places / "directory").mkdir()
    (places / "directory" / "something").touch()
    place = named(checkout, places / "directory")
    said = f"✗ 状態ファイルのエラー: {places / 'directory'}\n", "ディレクトリです"
    assert_refused(checkout, command, 74, "state_file", place, *said)


@BOTH_WAYS
def test_link_to_nothing_is_not_a_missing_pool_and_can_be_reset(checkout: Checkout, places: Path, named: Named) -> None:
    (places / "link.json").symlink_to("nowhere.json")
    (places / ".resource.lock").touch()
    place = named(checkout, places / "link.json")
    for command in ("status", "detail", "init", "allocate", "run", "add-server"):
        assert_refused(checkout, command, 74, "state_file", place, "--reset --yes")
    assert checkout.cli("--reset", "--yes", "--server", "node1:8:64", place=place).code == 0
    assert checkout.cli("--allocate", "t", "2", "1", place=place).code == 0
    assert running(places / "link.json") == ["t"]
    [aside] = places.glob("link.json.corrupt-*")
    assert os.readlink(aside) == "nowhere.json"


# --- The place beside the module ------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "detail"])
def test_looking_at_the_default_place_shows_the_made_up_pool_and_makes_nothing(
    checkout: Checkout, command: str
) -> None:
    before = tree(checkout.directory)
    result = checkout.cli(*COMMANDS[command])
    assert (result.code, result.err) == (0, "")
    assert "gpu-server-3" in result.out
    assert "まだありません。最初の割り当てか --init が作ります" in result.out
    assert "架空のサーバー (登録: --init --detect か --init --server NAME:GPUS:CPUS)" in result.out
    document = json.loads(checkout.cli(*COMMANDS[command], "--json").out)["result"]
    assert (document["resource_file"], document["last_updated"]) == (str(checkout.default), "")
    assert [server["server_name"] for server in document["servers"]] == [f"gpu-server-{n}" for n in range(4)]
    assert tree(checkout.directory) == before
    made = checkout.cli("--allocate", "t", "2", "1")
    assert (made.code, made.err) == (0, made_up_note(checkout.default)), "which the first allocation makes"
    result = checkout.cli(*COMMANDS[command])
    assert "まだありません" not in result.out
    assert "架空のサーバー (登録: --reset --detect か --reset --server NAME:GPUS:CPUS)" in result.out


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("status", "detail")])
def test_default_place_has_a_pool_after_any_other_command(checkout: Checkout, command: str) -> None:
    checkout.cli(*COMMANDS[command])
    assert checkout.default.exists()


@pytest.mark.parametrize("command", ["status", "detail"])
def test_screens_name_the_pool_that_they_show(checkout: Checkout, places: Path, command: str) -> None:
    real = checkout.cli(*COMMANDS[command], place=str(places / "real.json"), COLUMNS="500")
    assert f"\nプール: {places / 'real.json'}\n" in real.out
    assert "架空" not in real.out and "まだ" not in real.out
    made_up = checkout.cli(*COMMANDS[command], COLUMNS="500")
    assert f"\nプール: {checkout.default}\n" in made_up.out


@pytest.mark.parametrize("name", ["site-packages", "dist-packages"])
@pytest.mark.parametrize("command", COMMANDS)
def test_installed_module_must_be_told_the_place(original: Path, tmp_path: Path, name: str, command: str) -> None:
    directory = Path(shutil.copytree(original, tmp_path / "lib" / name))
    installed = Checkout(directory, {"GPU_RESOURCE_FILE": ""})
    assert_refused(installed, command, 74, "no_pool", None, "GPU_RESOURCE_FILE")


@BOTH_WAYS
def test_remedy_of_an_installed_module_works(original: Path, tmp_path: Path, named: Named) -> None:
    directory = Path(shutil.copytree(original, tmp_path / "lib" / "site-packages"))
    installed = Checkout(directory, {"GPU_RESOURCE_FILE": ""})
    refused = installed.library(
        "try:\n    GPUResourceManagerV01()\nexcept NoPoolError as error:\n    print(error.remedy)", place=""
    )
    assert "/etc/gpu-resource-file の 1 行目か GPU_RESOURCE_FILE" in refused.out, refused
    place = named(installed, tmp_path / "pool.json")
    refused = installed.cli("--status", place=place)
    assert (refused.code, "--init --server NAME:GPUS:CPUS" in refused.err) == (74, True)
    assert installed.cli("--init", "--server", "node1:8:64", place=place).code == 0
    assert installed.cli("--allocate", "t", "2", "1", place=place).code == 0
    argument = installed.library("print(GPUResourceManagerV01(sys.argv[1]).resource_file)", str(tmp_path / "x.json"))
    assert (argument.code, argument.out) == (0, f"{tmp_path / 'x.json'}\n"), "an argument is a place too"


# --- The library ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["servers", "min_gpus", "create"])
def test_construction_makes_the_pool_that_the_environment_names_only_if_it_is_told_to(
    absent_pool: Path, kind: str
) -> None:
    with pytest.raises(NoPoolError):
        GPUResourceManagerV01()
    with pytest.raises(NoPoolError):
        GPUResourceManagerV01(create=False)
    assert os.listdir(absent_pool.parent) == []
    if kind == "servers":
        manager = GPUResourceManagerV01(servers=[("node1", 4, 32)])
    else:
        manager = GPUResourceManagerV01(min_gpus=3) if kind == "min_gpus" else GPUResourceManagerV01(create=True)
    assert manager.resource_file == str(absent_pool)
    overview = GPUResourceManagerV01().get_overview()
    assert overview["total_gpus"] == (4 if kind == "servers" else 32)
    assert overview["min_gpus_per_task"] == {"servers": 1, "min_gpus": 3, "create": 2}[kind]
    with pytest.raises(PoolConflictError):
        GPUResourceManagerV01(servers=[("node2", 4, 32)])


@pytest.mark.parametrize("error", [NoPoolError, UnusableStateFileError, StateFileError, ResourceManagerError])
def test_missing_pool_is_caught_as_each_of_these(absent_pool: Path, error: type[Exception]) -> None:
    with pytest.raises(error):
        GPUResourceManagerV01()


@pytest.mark.parametrize("create", [None, False, True])
def test_pool_that_vanishes_under_a_manager_is_missing(made_pool: Path, create: bool | None) -> None:
    manager = GPUResourceManagerV01(create=create)
    made_pool.unlink()
    uses: list[Callable[[], object]] = [
        lambda: manager.allocate_resources("t", 2, 1),
        lambda: manager.release_resources("t"),
        lambda: manager.add_server("node1", 1, 1),
        manager.get_overview,
        manager.get_detailed_status,
    ]
    for use in uses:
        with pytest.raises(NoPoolError):
            use()
    assert not made_pool.exists()


# --- What nobody has ------------------------------------------------------------------------------


def test_every_grant_of_made_up_servers_is_said(checkout: Checkout, places: Path) -> None:
    place = str(places / "made-up.json")
    assert checkout.cli("--init", place=place).code == 0
    note = made_up_note(Path(place))
    assert checkout.cli("--allocate", "a", "2", "1", place=place).err == note
    assert checkout.cli("--allocate", "b", "2", "1", "--wait", place=place).err == note
    exported = checkout.cli(*COMMANDS["export"], place=place, GPU_RESOURCE_SERVER="gpu-server-0")
    assert (exported.code, exported.err) == (0, note)
    in_json = checkout.cli("--allocate", "c", "2", "1", "--json", place=place)
    assert (code_of(in_json), in_json.err) == ("", note)
    assert checkout.cli("--release", "a", place=place).err == "", "but nothing else is"
    ran = checkout.cli(*COMMANDS["run"][:1], "r", *COMMANDS["run"][2:], place=place, GPU_RESOURCE_SERVER="gpu-server-0")
    assert (ran.code, ran.out, ran.err.startswith(note)) == (0, "it runs\n", True)


def test_grant_that_was_waited_for_is_said_too(checkout: Checkout, places: Path) -> None:
    place = places / "made-up.json"
    manager = GPUResourceManagerV01(place)
    for number in range(4):
        assert manager.allocate_resources(f"all-{number}", 8, 1)
    env = {"GPU_RESOURCE_FILE": str(place)}
    process = start(str(checkout.script), "--allocate", "late", "2", "1", "--wait", env=env)
    assert process.stderr and process.stderr.readline().decode().startswith("待機中")
    assert manager.release_resources("all-2")
    result = finish(process)
    assert (result.code, result.err) == (0, made_up_note(place))


def test_made_up_servers_are_told_from_real_ones_beside_them(checkout: Checkout, places: Path) -> None:
    place = str(places / "made-up.json")
    assert checkout.cli("--init", place=place).code == 0
    assert checkout.cli("--add-server", "node1:16:64", place=place).code == 0
    assert checkout.cli("--allocate", "a", "2", "1", place=place).err == made_up_note(Path(place))
    assert checkout.cli("--allocate", "b", "12", "1", place=place).err == "", "node1 is there"
    assert checkout.cli("--allocate", "c", "2", "1", "--prefer-server", "node1", place=place).err == ""
    status = checkout.cli("--status", place=place)
    assert "架空のサーバー (登録" in status.out
    assert json.loads(checkout.cli("--status", "--json", place=place).out)["result"]["made_up"] is True


def test_library_logs_a_grant_of_made_up_servers_and_none_of_real_ones(
    made_pool: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    manager = GPUResourceManagerV01()
    assert caplog.records == []
    grants: list[Callable[[], object]] = [
        lambda: manager.allocate_resources("a", 2, 1),
        lambda: manager.obtain_resources("b", 2, 1, wait_s=1),
    ]
    for grant in grants:
        caplog.clear()
        assert grant()
        [record] = caplog.records
        assert (record.levelno, "架空" in record.getMessage()) == (logging.WARNING, True)
        assert str(made_pool) in record.getMessage()
    caplog.clear()
    real = GPUResourceManagerV01(tmp_path / "real.json", servers=[("node1", 8, 64)])
    assert real.allocate_resources("a", 2, 1)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_described_pool_is_nowhere_called_made_up(checkout: Checkout, places: Path) -> None:
    place = str(places / "real.json")
    for words in COMMANDS.values():
        if "--reset" not in words and "--init" not in words:
            result = checkout.cli(*words, place=place)
            assert "架空" not in result.out + result.err
    overview = json.loads(checkout.cli("--status", "--json", place=place).out)["result"]
    assert overview["made_up"] is False


def test_reset_with_servers_makes_a_made_up_pool_a_real_one(checkout: Checkout, places: Path) -> None:
    place = str(places / "made-up.json")
    assert checkout.cli("--init", place=place).code == 0
    assert checkout.cli("--reset", "--yes", "--server", f"{HOST}:8:64", place=place).code == 0
    assert "架空" not in checkout.cli("--status", place=place).out
    assert checkout.cli("--allocate", "t", "1", "1", place=place).err == ""


# --- The least number of GPUs ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "least"),
    [
        ((), 2),
        (("--min-gpus", "1"), 1),
        (("--min-gpus", "8"), 8),
        (("--server", "a:8:64"), 1),
        (("--server", "a:8:64", "--min-gpus", "2"), 2),
        (("--server", "a:16:64", "--server", "b:4:64", "--min-gpus", "12"), 12),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
@pytest.mark.parametrize("command", ["--init", "--reset"])
def test_described_pool_has_a_minimum_of_1_and_a_made_up_one_of_2_unless_it_is_said(
    checkout: Checkout, places: Path, command: str, words: tuple[str, ...], least: int
) -> None:
    place = str(places / "new.json")
    if command == "--reset":
        assert checkout.cli("--init", place=place).code == 0
        words = ("--yes", *words)
    assert checkout.cli(command, *words, place=place).code == 0
    status = json.loads(checkout.cli("--status", "--json", place=place).out)["result"]
    assert status["min_gpus_per_task"] == least
    assert f"1 タスクの範囲: GPU {least}-" in checkout.cli("--status", place=place).out
    refused = checkout.cli("--allocate", "t", str(least - 1), "1", place=place)
    assert (refused.code, f"{least}-" in refused.err) == (2, True)
    assert checkout.cli("--allocate", "t", str(least), "1", place=place).code == 0


@pytest.mark.parametrize(("gpus", "least", "code"), [(16, 12, 0), (16, 16, 0), (16, 17, 2), (8, 8, 0), (8, 9, 2)])
@pytest.mark.parametrize("again", [False, True], ids=["as it is", "described again"])
def test_reset_checks_the_minimum_against_the_pool_at_hand(
    checkout: Checkout, places: Path, gpus: int, least: int, code: int, again: bool
) -> None:
    pool, described = places / "new.json", ("--server", f"a:{gpus}:64")
    place = str(pool)
    assert checkout.cli("--init", *described, place=place).code == 0
    before = pool.read_bytes()
    words = ("--reset", "--yes", *(described if again else ()), "--min-gpus", str(least))
    result = checkout.cli(*words, place=place)
    assert result.code == code
    if code:
        assert f"1-{gpus}" in result.err
        assert pool.read_bytes() == before
        assert code_of(checkout.cli(*words, "--json", place=place)) == "invalid_request"
    else:
        assert checkout.cli("--allocate", "t", str(least), "1", place=place).code == 0


def test_reset_keeps_the_minimum_unless_it_is_told_another(checkout: Checkout, places: Path) -> None:
    place = str(places / "new.json")
    assert checkout.cli("--init", "--server", "a:8:64", "--min-gpus", "4", place=place).code == 0
    assert checkout.cli("--reset", "--yes", place=place).code == 0
    assert checkout.cli("--allocate", "t", "3", "1", place=place).code == 2
    assert checkout.cli("--allocate", "t", "4", "1", place=place).code == 0


@pytest.mark.parametrize("least", [0, -1, 9, True, 1.0, "1"])
def test_library_checks_the_minimum_before_it_makes_anything(absent_pool: Path, least: int) -> None:
    with pytest.raises(InvalidRequestError):
        GPUResourceManagerV01(servers=[("a", 8, 64)], min_gpus=least)
    assert os.listdir(absent_pool.parent) == []


def test_pool_that_cannot_be_read_is_reset_with_a_minimum_that_fits_what_is_made(
    checkout: Checkout, places: Path
) -> None:
    pool = places / "new.json"
    pool.write_text("broken")
    result = checkout.cli("--reset", "--yes", "--min-gpus", "9", place=str(pool))
    assert (result.code, pool.read_text()) == (2, "broken")
    assert checkout.cli("--reset", "--yes", "--min-gpus", "8", place=str(pool)).code == 0


# --- The question ahead of a reset ----------------------------------------------------------------


@contextlib.contextmanager
def somebody_types(text: str) -> Iterator[int]:
    """A terminal to ask on, at which that has been typed already."""
    keyboard, terminal = pty.openpty()
    try:
        os.write(keyboard, text.encode())
        yield terminal
    finally:
        os.close(terminal)
        os.close(keyboard)


@pytest.mark.parametrize("force", [False, True])
def test_question_of_a_reset_names_the_file_and_the_records_that_would_go(
    checkout: Checkout, places: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    pool = places / "real.json"
    manager = GPUResourceManagerV01(pool)
    words = ["--reset", *["--force"] * force]
    env = {"GPU_RESOURCE_FILE": str(pool)}

    def asked() -> str:
        with somebody_types("n\n") as terminal:
            result = finish(start(str(checkout.script), *words, env=env, stdin=terminal))
        assert (result.code, result.out) == (1, "")
        return result.err

    empty = f"  ファイル: {pool}\n  消える記録: なし\n続行しますか？ [y/N]:\n"
    assert empty in asked()
    assert manager.allocate_resources("予約-1", 1, 1) and manager.allocate_resources("予約-2", 1, 1)
    with manager.allocation("living", 6, 1):
        waiter = start(str(checkout.script), "--allocate", "waits", "2", "1", "--wait", env=env)
        assert waiter.stderr and waiter.stderr.readline().decode().startswith("待機中")
        before = pool.read_bytes()
        records = "予約-1, 予約-2, living, waits" if force else "予約-1, 予約-2, waits"
        assert f"  ファイル: {pool}\n  消える記録: {records}\n続行しますか？ [y/N]:\n" in asked()
        assert pool.read_bytes() == before
        with somebody_types("はい\n") as terminal:
            result = finish(start(str(checkout.script), *words, env=env, stdin=terminal))
        assert result.code == 0
        assert running(pool) == ([] if force else ["living"])
        assert finish(waiter).code == 75


def test_question_of_a_reset_is_asked_for_a_pool_that_cannot_be_read(checkout: Checkout, places: Path) -> None:
    pool = places / "real.json"
    pool.write_text("broken")
    with somebody_types("y\n") as terminal:
        process = start(str(checkout.script), "--reset", env={"GPU_RESOURCE_FILE": str(pool)}, stdin=terminal)
        result = finish(process)
    assert (result.code, f"  ファイル: {pool}\n  消える記録: なし\n" in result.err) == (0, True)
    assert running(pool) == []
