"""Several processes at one work, forked from this one, as `torch.distributed.run` would start them."""

import os
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState

from ppcl_toolkit import processes


class Crowd:
    """Processes of a group on this machine: when one ends badly, the others are ended."""

    def __init__(self, count: int, work: Callable[[], object]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._said = tempfile.NamedTemporaryFile(prefix="crowd-")  # noqa: SIM115 - deleted with the object
        self._running = {self._forked(rank, count, port, work) for rank in range(count)}
        self.returncode = 0

    def _forked(self, rank: int, count: int, port: int, work: Callable[[], object]) -> int:
        if child := os.fork():
            return child
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        said = os.open(self._said.name, os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1), os.dup2(said, 2)
        PartialState._reset_state()
        try:
            torch.set_num_threads(1)
            processes.pick_device("cpu")
            work()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            os._exit(1)
        os._exit(0)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Wait for all of them; return what they said."""
        until = time.monotonic() + timeout
        while self._running:
            time.sleep(0.005)
            for child in [*self._running]:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    self._running.discard(child)
                    self.returncode = self.returncode or os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                self.returncode = self.returncode or -signal.SIGALRM
            if self.returncode:
                for other in self._running:
                    os.kill(other, signal.SIGKILL)
        return Path(self._said.name).read_text(), None


def together(count: int, work: Callable[..., object], *given: object, timeout: float = 400) -> None:
    """Run `work(rank, *given)` in `count` processes that have found each other, and fail where one of them does."""
    crowd = Crowd(count, lambda: work(processes.world()[0], *given))
    said, _ = crowd.communicate(timeout)
    assert crowd.returncode == 0, said[-3000:]
