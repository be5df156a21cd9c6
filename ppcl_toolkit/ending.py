"""How a command ends before it is through: by a signal, in one line and with an exit code, and its children with it."""

import signal
from types import FrameType
from typing import final

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@final
class Ended(BaseException):
    """A signal came; no handler of errors on the way may take it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.code = 128 + number
        """What a shell says of a process that a signal ended."""


def end_on_signals() -> None:
    """Let SIGINT and SIGTERM raise `Ended` where the program is: children that it waits for end with it.

    The second signal ends the process at once.
    """
    for number in _SIGNALS:
        signal.signal(number, _end)


def _end(number: int, _: FrameType | None) -> None:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    raise Ended(number)
