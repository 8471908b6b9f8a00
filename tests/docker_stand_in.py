"""A program in the place of ``docker``, where no engine is to be had: a daemon, and a client that knows no more than

docker run [OPTION …] IMAGE COMMAND …, wait, stop, kill, rm, inspect --format={{.State.Status}}, ps --filter label=…

As with docker, what runs in a container is a child of the daemon, and not of the client. But it is no more than a
process of this machine, that sees all of it. There is one image, ``bench``; "created" a container stays as long as
there is a file ``slow`` beside the socket of the daemon.

python docker_stand_in.py SOCKET  # the daemon; the client finds it by DOCKER_HOST
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

IMAGE = "bench"
#: options of ``run`` that take a value, and those that take none
VALUED = {
    "--name", "--label", "--stop-timeout", "--gpus", "--cpus", "--env", "--user", "--group-add", "--mount", "--workdir",
    "--shm-size", "--volume",
}  # fmt: skip
PLAIN = {"--rm", "--init", "--interactive", "--tty"}
PASSED_ON = signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2
POLL_S = 0.02


def close(streams: list[int]) -> None:
    for stream in streams:
        os.close(stream)


class Container:
    def __init__(self, asked: dict[str, Any]) -> None:
        self.id, self.options = os.urandom(32).hex(), asked["options"]
        self.name = self.options["--name"][-1]
        self.status, self.code = "created", 0
        self.has_started, self.has_ended = threading.Event(), threading.Event()

    def run(self, words: list[str], streams: list[int], slow: str) -> int:
        """Run a command with the streams of a client; return its exit code, or that of docker."""
        while os.path.exists(slow):
            time.sleep(POLL_S)
        environment = dict(pair.split("=", 1) for pair in self.options["--env"])
        try:
            self.process = subprocess.Popen(
                words,
                cwd=self.options["--workdir"][-1],
                env={"PATH": os.environ["PATH"], **environment},
                stdin=streams[0] if "--interactive" in self.options else subprocess.DEVNULL,
                stdout=streams[1],
                stderr=streams[2],
                start_new_session=True,
            )
        except OSError as error:
            os.write(streams[2], f"[FATAL tini (7)] exec {words[0]} failed: {error.strerror}\n".encode())
            return 127 if isinstance(error, FileNotFoundError) else 126
        finally:
            close(streams)
            self.status = "running"
            self.has_started.set()
        code = self.process.wait()
        self.code = code if code >= 0 else 128 - code
        self.status = "exited"
        self.has_ended.set()
        return self.code

    def stop(self) -> None:
        self.process.terminate()
        if not self.has_ended.wait(float(self.options["--stop-timeout"][-1])):
            self.process.kill()
            self.has_ended.wait()


class Daemon:
    def __init__(self, path: str) -> None:
        self.slow = os.path.join(os.path.dirname(path), "slow")
        self.containers: list[Container] = []
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_DFL)  # in the containers too, whoever has started us
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            server.listen(100)
            while True:
                threading.Thread(target=self.serve, args=server.accept()[:1], daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(BrokenPipeError):
            data, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
            connection.sendall(json.dumps(self.answer(json.loads(data), streams)).encode())

    def answer(self, asked: dict[str, Any], streams: list[int]) -> tuple[int, str, str]:
        """Return an exit code, and what the client is to write to its two streams."""
        if asked["verb"] == "run":
            return self.run(asked, streams)
        if asked["verb"] == "ps":
            labelled = [it for it in self.containers if asked["label"] in it.options["--label"]]
            return 0, "".join(f"{it.id}\n" for it in labelled), ""
        found = [it for it in self.containers if asked["container"] in (it.id, it.name)]
        if not found:
            return 1, "", f"Error response from daemon: No such container: {asked['container']}\n"
        [container] = found
        container.has_started.wait()
        if asked["verb"] == "inspect":
            return 0, f"{container.status}\n", ""
        if asked["verb"] == "wait":
            container.has_ended.wait()
            return 0, f"{container.code}\n", ""
        if asked["verb"] == "kill":
            container.process.send_signal(asked["signal"])
        elif asked["verb"] == "stop":
            container.stop()
        else:
            container.process.kill()
            self.containers.remove(container)
        return 0, f"{asked['container']}\n", ""

    def run(self, asked: dict[str, Any], streams: list[int]) -> tuple[int, str, str]:
        if asked["image"] != IMAGE:
            close(streams)
            return 125, "", f"docker: Error response from daemon: pull access denied for {asked['image']}\n"
        container = Container(asked)
        self.containers.append(container)
        code = container.run(asked["words"], streams, self.slow)
        with contextlib.suppress(ValueError):
            self.containers.remove(container)
        return code, "", ""


def ask(asked: dict[str, Any], streams: list[int] = []) -> tuple[int, str, str]:  # noqa: B006 - it stays empty
    path = os.environ["DOCKER_HOST"].removeprefix("unix://")
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
        except OSError:
            return 1, "", f"Cannot connect to the Docker daemon at unix://{path}. Is the docker daemon running?\n"
        socket.send_fds(connection, [json.dumps(asked).encode()], streams)
        answer = b""
        while part := connection.recv(1 << 20):
            answer += part
    code, out, err = json.loads(answer)
    return code, out, err


def client(verb: str, words: list[str]) -> int:
    if verb == "run":
        options: dict[str, list[str]] = {}
        while words[0].startswith("-"):
            option, _, value = words.pop(0).partition("=")
            assert option in VALUED | PLAIN, f"no option of docker run that is known here: {option}"
            options.setdefault(option, []).append(value or words.pop(0) if option in VALUED else "")
        name = options["--name"][-1]

        def pass_on(number: int, _: object) -> None:
            ask({"verb": "kill", "container": name, "signal": number})

        for number in PASSED_ON:
            signal.signal(number, pass_on)
        code, out, err = ask({"verb": verb, "options": options, "image": words[0], "words": words[1:]}, [0, 1, 2])
        code = 125 if err.startswith("Cannot connect") else code
    elif verb == "ps":
        code, out, err = ask({"verb": verb, "label": words[words.index("--filter") + 1].removeprefix("label=")})
    else:
        [asked] = [int(word.partition("=")[2]) for word in words if word.startswith("--signal=")] or [9]
        code, out, err = ask({"verb": verb, "container": words[-1], "signal": asked})
    sys.stdout.write(out)
    sys.stderr.write(err)
    return code


if __name__ == "__main__":
    if os.path.basename(sys.argv[0]) == "docker":
        sys.exit(client(sys.argv[1], sys.argv[2:]))
    Daemon(sys.argv[1])
