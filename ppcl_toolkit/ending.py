"""How a command ends before it is through: by a signal, its children with it, or by an error that nobody expected."""

import signal
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import final

_LOG = "ppcl-error.log"
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


def unexpected(error: Exception, folders: Iterable[Path]) -> str:
    """Return in one line an error that no other sentence is known for, and where its traceback was written.

    That is the first of `folders` that takes a file, or the system's folder for temporary ones.
    """
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    said = reason if len(reason) <= 300 else f"{reason[:297]}..."
    for folder in (*folders, Path(tempfile.gettempdir())):
        try:
            with (folder / _LOG).open("a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')}\n{''.join(traceback.format_exception(error))}\n")
        except OSError:
            continue
        return f"{said} (this is a mistake of ppcl's; {folder / _LOG} has the traceback, and --debug shows it)"
    return f"{said} (this is a mistake of ppcl's; --debug shows the traceback)"
