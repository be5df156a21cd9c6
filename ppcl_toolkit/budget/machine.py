"""The machine that a plan is held against: one that is named, or the present one."""

import re
from dataclasses import dataclass

import torch

from ppcl_toolkit.budget.memory import Need
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.placement import host_bytes

ROOM = 0.9
"""Share of a device and of a host that a stage may take: kernels' workspaces and fragments are not counted."""
UNLIMITED = 10**15
_SCALES = {"": 1e9, "GB": 1e9, "G": 1e9, "GIB": 2**30, "MB": 1e6, "TB": 1e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Devices alike, and the host that they share; bytes."""

    card: int = UNLIMITED
    host: int = UNLIMITED
    devices: int = 1

    def has(self, need: Need) -> bool:
        """Tell whether there is so much for each device, with room to spare."""
        return need.device <= ROOM * self.card and need.host * self.devices <= ROOM * self.host


def machine_of(card: str | None, host: str | None, devices: int = 1) -> Machine | None:
    """Return the machine that is meant: sizes such as `24GB`, of this machine where there is none.

    None where no card is named and this machine has no GPU.
    """
    if card is None and not torch.cuda.is_available():
        if host is not None or devices > 1:
            raise PpclError("--card: there is no GPU here; say how much memory the one has that is meant, as in 24GB")
        return None
    own = torch.cuda.get_device_properties(0).total_memory if card is None else parse_bytes("--card", card)
    return Machine(card=own, host=host_bytes() if host is None else parse_bytes("--host", host), devices=devices)


def parse_bytes(option: str, text: str) -> int:
    """Return the bytes that `24GB`, `24` or `22.5 GiB` means."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _SCALES or float(match[1]) <= 0:
        raise PpclError(f"{option} {text!r}: expected a size such as 24GB")
    return int(float(match[1]) * _SCALES[match[2].upper()])
