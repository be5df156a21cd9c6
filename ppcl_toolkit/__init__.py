"""Compress Diffusion Transformers with PPCL (arXiv 2511.16156).

from ppcl_toolkit import Recipe, compress
compress(Recipe.load("tiny"), "runs/tiny")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppcl_toolkit.adapter import Adapter, Stack
    from ppcl_toolkit.algorithm import compress, export_target
    from ppcl_toolkit.artifacts.variant import load_compressed
    from ppcl_toolkit.errors import PpclError, PpclWarning
    from ppcl_toolkit.kit.trial import check_adapter
    from ppcl_toolkit.plan import Plan
    from ppcl_toolkit.recipe import Recipe

__all__ = [
    "Adapter",
    "Plan",
    "PpclError",
    "PpclWarning",
    "Recipe",
    "Stack",
    "check_adapter",
    "compress",
    "export_target",
    "load_compressed",
]

# No module has one of these names: importing it would put it in the place of what it holds.
_HOME = {
    "Adapter": "adapter",
    "Plan": "plan",
    "PpclError": "errors",
    "PpclWarning": "errors",
    "Recipe": "recipe",
    "Stack": "adapter",
    "check_adapter": "kit.trial",
    "compress": "algorithm",
    "export_target": "algorithm",
    "load_compressed": "artifacts.variant",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and diffusers take seconds, and `ppcl --help` needs neither."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
