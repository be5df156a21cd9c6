"""Fresh processes without the seconds that imports take: forked from one that has imported them and run nothing yet."""

import contextlib
import functools
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_own = subprocess.run


class Nursery:
    """Forks what `subprocess.run` is asked for, python with `-c` or `-m`, and ends with the process that asks.

    What it runs finds libraries imported, and no own module. `start` makes the process to fork from.
    """

    def __init__(self, start: Callable[[socket.socket], Any]) -> None:
        self._asks, answers = socket.socketpair()
        start(answers)
        answers.close()

    def run(self, command: Any, **given: Any) -> subprocess.CompletedProcess[str]:
        """Do as `subprocess.run` does, for text that is captured."""
        if command[0] != sys.executable:
            return _own(command, **given)
        asked = {"words": [*map(str, command[1:])], "cwd": str(given.get("cwd") or Path.cwd())}
        asked |= {"env": dict(given.get("env") or os.environ), "input": given.get("input", "")}
        with tempfile.TemporaryDirectory() as place:
            _send(self._asks, {**asked, "place": place})
            code = int(_receive(self._asks))
            said = [Path(place, name).read_text(errors="replace") for name in ("out", "err")]
        return subprocess.CompletedProcess(command, code, *said)


def forked(answers: socket.socket) -> None:
    """Fork from the process that asks, before it does anything."""
    if os.fork() == 0:
        for inherited in {int(path.name) for path in Path("/proc/self/fd").iterdir()} - {0, 1, 2, answers.fileno()}:
            with contextlib.suppress(OSError):
                os.close(inherited)
        _serve(answers)
        os._exit(0)


def started(answers: socket.socket) -> None:
    """Fork from a new process, whatever that which asks has done."""
    number = answers.fileno()
    subprocess.Popen([sys.executable, __file__, f"{number}"], pass_fds=[number], start_new_session=True)


def adopt(*, early: bool = False) -> None:
    """Have this process verify exports and measure memory in forked processes, of one that starts with the first.

    Those that commands and scripts start are new ones, imports and all. `early` is for a script that has run nothing
    yet: it is what they are forked from, and libraries are imported once.
    """
    nursery = functools.cache(lambda: Nursery(forked if early else started))
    if early:
        _import()
        nursery()
    from ppcl_toolkit.artifacts import variant
    from ppcl_toolkit.stages import evaluate

    for module in (variant, evaluate):
        module.subprocess = SimpleNamespace(run=lambda *args, **given: nursery().run(*args, **given))


def _serve(answers: socket.socket) -> None:
    with contextlib.suppress(OSError, ValueError):  # who asked has ended
        while asked := json.loads(_receive(answers)):
            child = os.fork()
            if child == 0:
                answers.close()
                _become(**asked)
            _, status = os.waitpid(child, 0)
            _send(answers, os.waitstatus_to_exitcode(status))


def _become(words: list[str], cwd: str, env: dict[str, str], input: str, place: str) -> None:
    """Run a script or a module as a process of its own does; never returns."""
    os.chdir(cwd)
    os.environ.clear(), os.environ.update(env)
    Path(place, "in").write_text(input)
    for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", 577), ("err", 577))):
        os.dup2(os.open(Path(place, name), flags, 0o600), number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "r" if n == 0 else "w", closefd=False) for n in range(3))  # noqa: SIM115
    from diffusers.utils import dynamic_modules_utils

    dynamic_modules_utils.HF_MODULES_CACHE = env.get("HF_MODULES_CACHE", dynamic_modules_utils.HF_MODULES_CACHE)
    for known in [name for name in sys.modules if name.split(".")[0] == "ppcl_toolkit"]:
        del sys.modules[known]
    how, what, *sys.argv = words
    code = 0
    try:
        if how == "-m":
            sys.argv = [what, *sys.argv]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv = [how, *sys.argv]
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else end.code is not None
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def _send(to: socket.socket, value: Any) -> None:
    line = json.dumps(value).encode()
    to.sendall(len(line).to_bytes(8) + line)


def _receive(whence: socket.socket) -> str:
    return _exactly(whence, int.from_bytes(_exactly(whence, 8))).decode()


def _exactly(whence: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = whence.recv(count - len(found))
        if not part:
            raise OSError("nobody asks any more")
        found += part
    return found


def _import() -> None:
    from diffusers import FluxPipeline, QwenImagePipeline, StableDiffusion3Pipeline  # noqa: F401


if __name__ == "__main__":
    _import()
    _serve(socket.socket(fileno=int(sys.argv[1])))
