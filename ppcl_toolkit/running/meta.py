"""The meta device, where code runs without data: what it has not, and some transformers ask for."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.experimental import _config


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Let every entry of a mask on the meta device hold, and autocast be none there.

    What comes out must have the same shape whichever entries do.
    """
    own: Any = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[Any]:
        if device_type == "meta":
            return contextlib.nullcontext()
        return own(device_type, *args, **kwargs)

    torch.autocast = autocast  # type: ignore[assignment, misc]
    try:
        with _config.patch(meta_nonzero_assume_all_nonzero=True):  # type: ignore[attr-defined]
            yield
    finally:
        torch.autocast = own  # type: ignore[misc]
