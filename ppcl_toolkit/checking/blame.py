"""Errors of a transformer, or of an adapter's own functions, that come of what the adapter says."""

import contextlib
from collections.abc import Iterator

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.images import is_refusal


@contextlib.contextmanager
def fitting(adapter: Adapter) -> Iterator[None]:
    """Say of what fails here, where the machine is not to blame, that the adapter does not fit: a `PpclError`."""
    try:
        yield
    except PpclError:
        raise
    except Exception as error:
        if not is_refusal(error) and not isinstance(error, AssertionError):
            raise
        said = f"{type(error).__name__} {' '.join(str(error).split())[:300]}".strip()
        raise PpclError(
            f"adapter {adapter.family}: its transformer does not run as the adapter tells ({said}): look at `image`, "
            "`text` and `returns` of its stacks, and at `noised`, `remap` and `tables` where it has them"
        ) from error
