"""Masks without data: code on the meta device that looks for the entries which hold."""

import contextlib

from torch.fx.experimental import _config


def all_hold() -> contextlib.AbstractContextManager[None]:
    """Let every entry of a mask on the meta device hold: what comes out must have the same shape whichever do."""
    return _config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
