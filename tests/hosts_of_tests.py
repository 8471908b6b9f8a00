"""Several machines on one, for the tests of what happens between machines.

Each host is a set of namespaces with a real sshd in it: it has a name, an address, processes, a clock since its
start, ``/etc``, ``/run``, ``/dev/shm``, ``/var/log``, ``/var/tmp``, a boot id and a machine id of its own. All the
rest is the file system of this machine, the same on every host, as a lab has its home directories by NFS: above all
``lab.directory``. The network of a lab ends at this machine, which it reaches, and is reached by, at ``lab.gateway``.
Nothing is left on this machine, and only files if the tests are killed: a host lives no longer than a pipe that they
hold.

    with lab_of_hosts("node1", "node2") as lab:
        node1, node2 = lab.hosts["node1"], lab.hosts["node2"]
        node1.pool_is(f"postgresql://gpu@{lab.gateway}:{port}/gpu")
        assert node1.run(["ssh", "node2", "hostname"]).out == "node2\\n"
        with terminal(node1, ["ssh", "-t", "node2", "trap 'echo; exit 7' INT; cat"]) as screen:
            screen.type(b"hello\\n")
            screen.read_until(b"hello\\r\\nhello\\r\\n")
            screen.type(b"\\x03")
            assert screen.end() == 7
        node2.reboot()

Users of every host: ``root``, and one for each login shell, ``alice`` (bash), ``dashy``, ``fishy`` and ``tcshy``. Each
logs in everywhere with a key and no questions.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import random
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from select import select
from typing import IO, NamedTuple

import pytest
from conftest import ALICE, GUARD_S, PROJECT
from screens import CLI, Result


class User(NamedTuple):
    uid: int
    shell: str


USERS = {
    "root": User(0, "/bin/bash"),
    "alice": User(ALICE, "/bin/bash"),
    "dashy": User(61011, "/bin/dash"),
    "fishy": User(61012, "/usr/bin/fish"),
    "tcshy": User(61013, "/usr/bin/tcsh"),
}
PROGRAMS = ["ip", "unshare", "nsenter", "setpriv", "setsid", "mount", "sshd", "ssh", "ssh-keygen"]
PROGRAMS += ["bash", "dash", "fish", "tcsh"]
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
USER_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/games"  # what Debian's sshd gives to a user
SECRETS = ("shadow", "gshadow", "sudoers", "private", "ssh_host_", "krb5.keytab")  # of the real /etc, not to be copied
#: for tests of networks (RFC 2544), so that nothing real has an address there; a lab takes 16 of them
ADDRESSES = ipaddress.IPv4Network("198.18.0.0/15")
UNLOCK_TERMINAL, OPEN_TERMINAL = 0x40045431, 0x5441  # TIOCSPTLCK, TIOCGPTPEER of <asm-generic/ioctls.h>
LIMIT_S = 2 * GUARD_S  # after which a command that hangs is ended: some wait a minute for a sign of life

# The first process of a host. It ends with the tests, which hold the other end of its standard input, and all that
# runs there ends with it. With SIGCHLD ignored, orphans leave no zombies.
BOOT = """
set -eu
read -r pid rest </proc/self/stat  # this /proc still has the numbers that the tests know
echo "$pid"
read -r network_is_there
ip link set lo up
ip address add {address} dev eth0
ip link set eth0 up
echo {name} >/proc/sys/kernel/hostname
mount -n -t proc -o nosuid,nodev,noexec proc /proc
mount -n --bind {machine}/boot_id /proc/sys/kernel/random/boot_id
mount -n -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts /dev/pts
mount -n --bind {machine}/etc /etc
mount -n --bind {machine}/log /var/log
{covers}
mkdir -m 755 /run/sshd /run/real-local-bin
mkdir -m 1777 /run/lock
mount -n --bind /usr/local/bin /run/real-local-bin
mount -n --bind {directory}/bin /usr/local/bin
{sshd} -f {directory}/sshd_config -E {machine}/log/sshd.log
echo started
exec env --ignore-signal=CHLD cat >/dev/null
"""

SSHD_CONFIG = """
AddressFamily inet
HostKey {directory}/machines/host_key
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
AuthorizedKeysFile %h/.ssh/authorized_keys
AcceptEnv LANG LC_*
MaxStartups 100
# A client that has gone silent is noticed after four or, by older releases, eight of these seconds.
ClientAliveInterval 1
"""

SSH_CONFIG = """
Host *
    BatchMode yes
    StrictHostKeyChecking yes
    UserKnownHostsFile {directory}/known_hosts
    SendEnv LANG LC_*
"""

# What pip makes for the command.
ENTRY = """#!{python}
import sys
sys.path.insert(0, {project!r})
from cli_v01 import run
sys.exit(run())
"""


@cache
def why_no_hosts() -> str | None:
    """Tell why hosts cannot be made here; ``None`` if they can."""
    if os.geteuid() != 0:
        return "only root can make hosts"
    if missing := [program for program in PROGRAMS if not shutil.which(program, path=SYSTEM_PATH)]:
        return f"not installed, see .ci/install-services: {' '.join(missing)}"
    attempt = "mount -n -t proc proc /proc && ip link add type bridge && ip link add type veth"
    tried = subprocess.run([*_unshare(), attempt], env={"PATH": SYSTEM_PATH}, capture_output=True, text=True)
    return f"no namespaces can be made here: {tried.stderr.strip()}" if tried.returncode else None


@contextlib.contextmanager
def lab_of_hosts(*names: str) -> Iterator[Lab]:
    """Make a lab of these hosts, in a directory of its own; where that cannot be, the test is skipped."""
    if reason := why_no_hosts():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="lab-") as directory, Lab(Path(directory), names) as lab:
        yield lab


class Lab:
    """Hosts, and the switch that their network cards are plugged into."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.directory = directory
        self.network = _free_network()
        self.gateway = str(self.network[1])
        self.addresses = {name: str(self.network[2 + number]) for number, name in enumerate(names)}
        self.hosts: dict[str, Host] = {}
        self.ssh_config = directory / "ssh_config"  # for ``ssh -F`` on this machine, as root
        self._uplink = f"lab{uuid.uuid4().hex[:10]}"
        self._switch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Lab:
        try:
            self._make_files()
            self._start_network()
            self.hosts = {name: Host(self, name) for name in self.addresses}
            for host in self.hosts.values():
                host.switch_on()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts.values():
            host.switch_off()
        if self._switch is not None:
            # It would go with the switch, but a moment later.
            subprocess.run(["ip", "link", "delete", self._uplink], env={"PATH": SYSTEM_PATH}, capture_output=True)
            with self._switch:
                self._switch.kill()

    def _make_files(self) -> None:
        """Write what all hosts have in common."""
        self.directory.chmod(0o755)
        machines, bin_, homes = (self.directory / name for name in ("machines", "bin", "homes"))
        machines.mkdir(0o700)
        for path in (bin_, homes):
            path.mkdir()
            path.chmod(0o755)
        for real in os.listdir("/usr/local/bin"):  # the interpreter may be there
            (bin_ / real).symlink_to(f"/run/real-local-bin/{real}")
        command = bin_ / "gpu-resource"
        command.unlink(missing_ok=True)
        command.write_text(ENTRY.format(python=sys.executable, project=str(PROJECT)))
        command.chmod(0o755)
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", machines / key], check=True)
        for user, (uid, _) in USERS.items():
            ssh = homes / user / ".ssh"
            ssh.mkdir(parents=True)
            shutil.copy(machines / "user_key", ssh / "id_ed25519")
            shutil.copy(machines / "user_key.pub", ssh / "authorized_keys")
            for path in (ssh.parent, ssh, *ssh.iterdir()):
                os.chown(path, uid, uid)
        known = (machines / "host_key.pub").read_text()
        entries = [f"{name},{address} {known}" for name, address in self.addresses.items()]
        (self.directory / "known_hosts").write_text("".join(entries))
        (self.directory / "known_hosts").chmod(0o644)
        (self.directory / "sshd_config").write_text(SSHD_CONFIG.format(directory=self.directory))
        here = [f"Host {name}\n    HostName {address}\n" for name, address in self.addresses.items()]
        here += [SSH_CONFIG.format(directory=self.directory), f"    IdentityFile {homes}/root/.ssh/id_ed25519\n"]
        self.ssh_config.write_text("".join(here))

    def _start_network(self) -> None:
        # A network namespace and what is in it live as long as a process in it.
        self._switch = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec cat"],
            env={"PATH": SYSTEM_PATH},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._switch.stdout is not None
        self._switch.stdout.readline()
        _ip(
            f"link add {self._uplink} type veth peer name uplink netns {self._switch.pid}",
            f"address add {self.gateway}/{self.network.prefixlen} dev {self._uplink}",
            f"link set {self._uplink} up",
        )
        self.at_switch("link add bridge up type bridge", "link set uplink master bridge up")

    def at_switch(self, *commands: str) -> None:
        """Give commands of ip(8) at the switch."""
        assert self._switch is not None
        _ip(*commands, at=["nsenter", f"--target={self._switch.pid}", "--net"])


class Process(subprocess.Popen[bytes]):
    """A command on a host. Signals go to the command; ``pid`` is the process that waits for it on this machine."""

    def command_pid(self) -> int | None:
        """Return the number of the command on this machine; ``None`` if it has ended."""
        while self.poll() is None:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, IndexError):  # it is about to start or end
                return _child(_child(self.pid))
        return None

    def send_signal(self, sig: int) -> None:
        if pid := self.command_pid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sig)


class Host:
    """A machine of a lab."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.lab, self.name, self.address = lab, name, lab.addresses[name]
        self.pid = 0  # of its first process
        self._machine = lab.directory / "machines" / name
        self._init: subprocess.Popen[bytes] | None = None
        self._port = ""  # of the switch
        self._started: list[Process] = []
        self._make_files()

    def _make_files(self) -> None:
        """Write what this host has for itself, through all its starts."""
        for part in ("log", "var_tmp"):
            (self._machine / part).mkdir(parents=True)
        (self._machine / "var_tmp").chmod(0o1777)
        shutil.copytree("/etc", self._machine / "etc", symlinks=True, ignore=_not_copied)
        real = [line for line in Path("/etc/passwd").read_text().splitlines() if line.split(":")[0] not in USERS]
        homes = self.lab.directory / "homes"
        ours = [f"{user}:x:{uid}:{uid}::{homes}/{user}:{shell}" for user, (uid, shell) in USERS.items()]
        groups = [f"{user}:x:{uid}:" for user, (uid, _) in USERS.items() if uid]
        names = [f"{address} {name}" for name, address in self.lab.addresses.items()]
        self._write("passwd", *ours, *real)
        self._write("group", *Path("/etc/group").read_text().splitlines(), *groups)
        # A star is no password at all; an exclamation mark would lock the account.
        self._write("shadow", *(f"{line.split(':')[0]}:*:19000::::::" for line in [*ours, *real]))
        (self._machine / "etc/shadow").chmod(0o600)
        self._write("nsswitch.conf", *(f"{what}: files" for what in ("passwd", "group", "shadow", "hosts")))
        self._write("hosts", "127.0.0.1 localhost", *names)
        self._write("hostname", self.name)
        self._write("machine-id", uuid.uuid4().hex)
        self._write("ssh/ssh_config", SSH_CONFIG.format(directory=self.lab.directory))

    def _write(self, name: str, *lines: str) -> None:
        path = self._machine / "etc" / name
        path.unlink(missing_ok=True)  # it may be a link
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        path.chmod(0o644)

    def pool_is(self, place: str) -> None:
        """Write the machine's file, ``/etc/gpu-resource-file``."""
        self._write("gpu-resource-file", place)

    # Life and death

    def switch_on(self) -> None:
        """Start the machine, with a boot id of this start; returns once sshd answers."""
        (self._machine / "boot_id").write_text(f"{uuid.uuid4()}\n")
        script = BOOT.format(
            name=self.name,
            address=f"{self.address}/{self.lab.network.prefixlen}",
            machine=shlex.quote(str(self._machine)),
            directory=shlex.quote(str(self.lab.directory)),
            sshd=shutil.which("sshd", path=SYSTEM_PATH),
            covers="\n".join(_covers(self._machine, self.lab.directory)),
        )
        with open(self._machine / "log/boot.log", "wb") as log:
            self._init = subprocess.Popen(
                [*_unshare(), script],
                env={"PATH": SYSTEM_PATH},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                umask=0o022,
                start_new_session=True,  # a Ctrl-C in the terminal of the tests is for the tests
            )
        assert self._init.stdin is not None
        self.pid = int(self._said())
        self._port = f"port{uuid.uuid4().hex[:10]}"  # that of the last start may take a moment to vanish
        card = "02:00:" + ":".join(f"{byte:02x}" for byte in ipaddress.IPv4Address(self.address).packed)
        self.lab.at_switch(
            f"link add {self._port} type veth peer name eth0 address {card} netns {self.pid}",
            f"link set {self._port} master bridge up",
        )
        self._init.stdin.write(b"\n")
        self._init.stdin.flush()
        self._said()
        _wait_for_sshd(self.address)

    def _said(self) -> bytes:
        """Return the next line that the first process prints."""
        assert self._init is not None and self._init.stdout is not None
        line = self._init.stdout.readline()
        assert line, f"{self.name} did not start: {(self._machine / 'log/boot.log').read_text()}"
        return line

    def switch_off(self) -> None:
        """End all that runs here; returns once nothing does."""
        if self._init is not None:
            if self._init.poll() is None:
                os.kill(self.pid, signal.SIGKILL)
            for process in self._started:
                process.wait()
            with self._init:  # the kernel reports the first process as ended only after all others
                pass
        self._init, self._started, self.pid = None, [], 0

    def reboot(self) -> None:
        """Start anew. As in an orderly shutdown, whoever is connected is told; not so after ``cut_network()``."""
        self.switch_off()
        self.switch_on()

    def kill(self) -> None:
        """Let the machine die for good, as without power: nobody is told."""
        self.cut_network()
        self.switch_off()

    def cut_network(self) -> None:
        """Pull the cable out: nothing arrives or leaves, and nobody is told."""
        self.lab.at_switch(f"link set {self._port} down")

    def join_network(self) -> None:
        self.lab.at_switch(f"link set {self._port} up")

    # Processes

    def start(
        self,
        words: Sequence[str | bytes],
        *,
        user: str = "alice",
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] = subprocess.PIPE,
        stderr: int | IO[bytes] = subprocess.PIPE,
    ) -> Process:
        """Start a command, without a shell, with what a user has who logs in; in the home directory if no ``cwd``."""
        assert self._init is not None, f"{self.name} is off"
        uid, shell = USERS[user]
        home = str(self.lab.directory / "homes" / user)
        login = {"HOME": home, "USER": user, "LOGNAME": user, "SHELL": shell, "LANG": "C.UTF-8"}
        enter = [*_NEW, "nsenter", f"--target={self.pid}", "--all", *_WAIT]
        become = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--init-groups", "env", f"--chdir={cwd or home}"]
        process = Process(
            [*enter, *become, "--", *words],
            env={**login, "PATH": USER_PATH if uid else SYSTEM_PATH, **(env or {})},
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            umask=0o022,
        )
        self._started.append(process)
        return process

    def run(
        self,
        words: Sequence[str | bytes],
        *,
        user: str = "alice",
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        input: bytes = b"",  # noqa: A002 - as ``subprocess`` has it
        timeout: float = LIMIT_S,
    ) -> Result:
        """Start a command as ``start`` does, wait for its end and return its code and what it printed."""
        process = self.start(words, user=user, env=env, cwd=cwd, stdin=subprocess.PIPE)
        try:
            out, err = process.communicate(input, timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return Result(process.returncode, out.decode(errors="surrogateescape"), err.decode(errors="surrogateescape"))

    def processes(self) -> dict[int, list[str]]:
        """Return the words of each process that lives here, by its number on this machine, where it can be killed."""
        found: dict[int, list[str]] = {}
        if not self.pid:
            return found
        here = os.readlink(f"/proc/{self.pid}/ns/pid")
        for pid in filter(str.isdigit, os.listdir("/proc")):
            # It may end while we look, and not all that runs on this machine is ours to look at.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if os.readlink(f"/proc/{pid}/ns/pid") == here:
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="surrogateescape")
                    words = command.rstrip("\0").split("\0")
                    if words[0] and words[: len(_WAIT)] != _WAIT:  # a zombie has no words
                        found[int(pid)] = words
        return found

    def sshd_sessions(self) -> list[int]:
        """Return the processes of sshd, but for the one that listens: two for each connection, the root's first."""
        titles = {pid: words[0] for pid, words in self.processes().items()}
        sessions = [
            pid for pid, title in titles.items() if title.startswith(("sshd: ", "sshd-session: ", "sshd-auth: "))
        ]
        return sorted(pid for pid in sessions if "[listener]" not in titles[pid])


class Terminal:
    """The terminal of a command on a host, 80 by 24.

    Type a Ctrl-C only once the process that is to get it has shown itself: a shell that is just starting one may
    swallow it.
    """

    def __init__(self, descriptor: int, process: Process) -> None:
        self.process, self.seen = process, b""  # all that the command has printed
        self._descriptor, self._read = descriptor, 0

    def type(self, keys: bytes) -> None:
        while keys:
            keys = keys[os.write(self._descriptor, keys) :]

    def read_until(self, text: bytes) -> bytes:
        """Return what comes up to ``text``, with it, after what was read before."""
        end = time.monotonic() + LIMIT_S
        while (found := self.seen.find(text, self._read)) < 0:
            assert self._more(end - time.monotonic()), f"{text!r} is not in {self.seen[self._read :]!r}"
        start, self._read = self._read, found + len(text)
        return self.seen[start : self._read]

    def end(self) -> int:
        """Wait for the end of the command, and return its code, or minus its signal."""
        end = time.monotonic() + LIMIT_S
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it goes on after {self.seen!r}"
            if not self._more(0.05):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.05)
        while self._more(0):
            pass
        return self.process.returncode

    def hang_up(self) -> None:
        """Close the terminal, as when its window is closed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _more(self, seconds: float) -> bool:
        """Read on; tell whether something came in that time."""
        if self._descriptor < 0 or not select([self._descriptor], [], [], max(0, seconds))[0]:
            return False
        try:
            self.seen += os.read(self._descriptor, 65536)
        except OSError:  # no process has the terminal any more
            return False
        return True


@contextlib.contextmanager
def terminal(
    host: Host,
    words: Sequence[str | bytes],
    *,
    user: str = "alice",
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Iterator[Terminal]:
    """Start a command as ``host.start`` does, on a terminal of that host; leaving hangs up and ends it."""
    descriptor = os.open(f"/proc/{host.pid}/root/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, UNLOCK_TERMINAL, struct.pack("i", 0))
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(fcntl.ioctl(descriptor, OPEN_TERMINAL, os.O_RDWR | os.O_NOCTTY), "r+b", buffering=0) as theirs:
        os.fchown(theirs.fileno(), USERS[user].uid, -1)
        # In a session of its own, so that a Ctrl-C is not for the process on this machine that waits for the command.
        process = host.start(
            ["setsid", "--ctty", *words],
            user=user,
            env={"TERM": "xterm", **(env or {})},
            cwd=cwd,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
        )
    screen = Terminal(descriptor, process)
    try:
        yield screen
    finally:
        screen.hang_up()
        process.kill()
        process.wait()


# What the above is made of

# What waits for a command: nsenter(1) would stop as the command does, and not go on with it. Without a limit.
_WAIT = ["timeout", "--foreground", "0"]
_NEW = ["env", "--default-signal"]  # the tests may have been started in the background, with signals ignored


def _unshare() -> list[str]:
    """Return the command that runs the shell script after it in namespaces of its own, its clock starting at zero."""
    since_start = int(time.clock_gettime(time.CLOCK_BOOTTIME)), int(time.clock_gettime(time.CLOCK_MONOTONIC))
    clocks = ["--time", f"--boottime=-{since_start[0]}", f"--monotonic=-{since_start[1]}"]
    return [*_NEW, "unshare", "--net", "--uts", "--ipc", "--mount", "--pid", *clocks, "--kill-child", "sh", "-c"]


def _ip(*commands: str, at: Sequence[str] = ()) -> None:
    """Give commands of ip(8), all or, if one fails, none after it."""
    done = subprocess.run(
        [*at, "ip", "-batch", "-"], input="\n".join(commands), env={"PATH": SYSTEM_PATH}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{commands}: {done.stderr}"


def _free_network() -> ipaddress.IPv4Network:
    """Return a network that this machine knows no way to, for another lab may be running."""
    command = ["ip", "-json", "route", "show", "root", str(ADDRESSES)]
    routes = subprocess.run(command, env={"PATH": SYSTEM_PATH}, stdout=subprocess.PIPE, check=True).stdout
    taken = [ipaddress.ip_network(route["dst"]) for route in json.loads(routes)]
    networks = [network for network in ADDRESSES.subnets(new_prefix=28) if not any(map(network.overlaps, taken))]
    return random.SystemRandom().choice(networks)


def _not_copied(directory: str, names: list[str]) -> list[str]:
    """Return what a host does not get of the real ``/etc``: secrets, and what is no file."""
    kinds = (os.path.islink, os.path.isfile, os.path.isdir)
    files = {name for name in names if any(kind(os.path.join(directory, name)) for kind in kinds)}
    return [name for name in names if name not in files or name.startswith(SECRETS)]


def _covers(machine: Path, directory: Path) -> list[str]:
    """Return the commands that put other directories over some of this machine's, with what must be seen in them.

    They are what each host has for itself, and what only its owner may enter, in which the checkout or the
    interpreter may be: on a host every user can run them.
    """
    seen = dict.fromkeys([directory, CLI, PROJECT / "gpu_resource_manager_v01.py", PROJECT / "gpu_resource_extensions"])
    seen.update(dict.fromkeys([Path(sys.prefix), Path(sys.base_prefix)]))
    covers = {Path("/run"): "755", Path("/dev/shm"): "1777", Path("/var/tmp"): ""}
    for path in seen:
        closed = [above for above in path.parents if not above.stat().st_mode & stat.S_IXOTH]
        covers.update(dict.fromkeys(closed[-1:], "755"))
    commands = []
    for number, (place, mode) in enumerate(covers.items()):
        cover = machine / (f"cover{number}" if mode else "var_tmp")
        cover.mkdir(exist_ok=True)
        if mode:
            commands.append(f"mount -n -t tmpfs -o mode={mode} tmpfs {shlex.quote(str(cover))}")
        for path in seen:
            if place in path.parents:
                there = cover / path.relative_to(place)
                real, parent, target = (shlex.quote(str(name)) for name in (path, there.parent, there))
                commands.append(f"mkdir -p {target}" if path.is_dir() else f"mkdir -p {parent}; : >>{target}")
                commands.append(f"mount -n --bind {real} {target}")
        commands.append(f"mount -n --rbind {shlex.quote(str(cover))} {shlex.quote(str(place))}")
    return commands


def _wait_for_sshd(address: str) -> None:
    end = time.monotonic() + GUARD_S
    while True:
        with socket.socket() as client:
            client.settimeout(GUARD_S)
            if client.connect_ex((address, 22)) == 0:
                return
        assert time.monotonic() < end, f"no sshd at {address}"
        time.sleep(0.01)


def _child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
