"""Connections between processes: who loses one ends, too.

Each process holds a connection to the first. The operating system closes it with its owner, however that ended, and
breaks it within a minute where the other machine is gone: no process need be awake for that, as it must be to answer.
Without it, who waits at the store of torch.distributed hears of the loss of the first process alone: launchers end the
workers of their own machine, an exchange of tensors ends after half an hour, and a wait for another process after two.
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

_ARRIVAL = 60.0
"""Seconds for a word from a connection that is being made."""
_GRACE = 2.0
"""Seconds in which a process that has lost another may end by itself: by a signal, or by an error of its own."""
_FAREWELL = b"."
_ties: list[socket.socket] = []


def bind(rank: int, count: int, store: Any, patience: timedelta) -> None:
    """Tie `count` processes that share a store, until `release`. All call this together."""
    if _ties:
        return
    if rank == 0:
        with socket.create_server(("", 0)) as listener:
            token = secrets.token_hex(16)
            store.set("ppcl/first", f"{listener.getsockname()[1]} {token}")
            found = _admitted(listener, token, count, patience)
    else:
        port, token = store.get("ppcl/first").decode().split()
        found = {0: socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=_ARRIVAL)}
        found[0].sendall(f"{token} {rank:8d}".encode())
    for other, tie in found.items():
        _keep_alive(tie)
        _ties.append(tie)
        threading.Thread(target=_guard, args=(other, tie), daemon=True).start()


def release() -> None:
    """Say farewell: from here on, this process may end."""
    while _ties:
        with contextlib.suppress(OSError):  # the other has said its farewell and ended
            _ties.pop().sendall(_FAREWELL)


def _admitted(listener: socket.socket, token: str, count: int, patience: timedelta) -> dict[int, socket.socket]:
    """Return the connections of the other processes, and of nobody else who knocks."""
    found: dict[int, socket.socket] = {}
    listener.settimeout(patience.total_seconds())
    while len(found) < count - 1:
        tie, _ = listener.accept()
        tie.settimeout(_ARRIVAL)
        try:
            said = tie.recv(len(token) + 9, socket.MSG_WAITALL).decode("ascii", "replace")
        except OSError:
            continue
        if secrets.compare_digest(said[: len(token)], token):
            found[int(said[len(token) :])] = tie
    return found


def _keep_alive(tie: socket.socket) -> None:
    """Let reading wait, and let the operating system ask now and then whether the other machine is there."""
    tie.settimeout(None)
    tie.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 5)):
        if hasattr(socket, name):
            tie.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _guard(other: int, tie: socket.socket) -> None:
    """Wait for the farewell of process `other`; without one it is dead, and so is the run."""
    try:
        said = tie.recv(1)
    except OSError:
        said = b""
    if said != _FAREWELL:
        time.sleep(_GRACE)
        sys.stderr.write(
            f"error: process {other} ended before the run did; what is finished is kept, and the same command goes on\n"
        )
        sys.stderr.flush()
        os._exit(1)
