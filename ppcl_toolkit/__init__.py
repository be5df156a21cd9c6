"""Compress Diffusion Transformers with PPCL (arXiv 2511.16156).

from ppcl_toolkit import Recipe, compress
compress(Recipe.load("tiny"), "runs/tiny")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppcl_toolkit.adapter import Adapter, Stack
    from ppcl_toolkit.artifacts.variant import load_compressed
    from ppcl_toolkit.compress import compress, export_target
    from ppcl_toolkit.errors import PpclError
    from ppcl_toolkit.plan import Plan
    from ppcl_toolkit.recipe import Recipe

__all__ = ["Adapter", "Plan", "PpclError", "Recipe", "Stack", "compress", "export_target", "load_compressed"]

_HOME = {
    "Adapter": "adapter",
    "Plan": "plan",
    "PpclError": "errors",
    "Recipe": "recipe",
    "Stack": "adapter",
    "compress": "compress",
    "export_target": "compress",
    "load_compressed": "artifacts.variant",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and diffusers take seconds, and `ppcl --help` needs neither."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOME[name]}")
    # The function `compress` takes the place that importing its module has just given to the module, whoever asked.
    globals().update({public: getattr(home, public) for public, place in _HOME.items() if place == _HOME[name]})
    return globals()[name]
