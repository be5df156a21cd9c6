"""Classes of transformers and of pipelines: those of diffusers, and those of one's own that an adapter names."""

from pathlib import Path
from typing import Any

import diffusers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from torch import nn

from ppcl_toolkit.adapter import Adapter, home_of, import_name
from ppcl_toolkit.errors import PpclError


def stock_class(adapter: Adapter) -> Any:
    """Return the class of an adapter's transformer.

    One of one's own is a `diffusers.ModelMixin` with a `ConfigMixin`, by which it is saved and opened. `PpclError`
    where there is none of that name, or it is something else.
    """
    found = _class(adapter, "transformer", adapter.transformer, (ModelMixin, ConfigMixin))
    if found.__mro__.index(ConfigMixin) < found.__mro__.index(nn.Module):
        raise PpclError(f"{adapter.transformer}: ConfigMixin must be the last of its bases, or no weights can be read")
    return found


def pipeline_class(adapter: Adapter | None) -> Any:
    """Return the class that opens an adapter's pipelines."""
    if adapter is None or adapter.pipeline is None:
        return DiffusionPipeline
    return _class(adapter, "pipeline", adapter.pipeline, (DiffusionPipeline,))


def library_of(stock: type) -> str:
    """Return the module from which a folder's `model_index.json` takes a class."""
    return "diffusers" if stock.__module__.startswith("diffusers.") else stock.__module__


def homes(adapter: Adapter) -> list[str]:
    """Return the folders where another process finds an adapter's own classes."""
    named = (adapter.transformer, adapter.pipeline or "")
    return [home for home in dict.fromkeys(map(home_of, named)) if home]


def check_source(where: Path, part: Any, adapter: Adapter | None) -> None:
    """Raise a `PpclError` where a transformer is not from diffusers, nor of the class that `adapter` names.

    `part` is what `where`, a folder's `model_index.json`, says of it: a name there names no code.
    """
    library, name = part if isinstance(part, list) and len(part) == 2 else (None, None)
    if library in (None, "diffusers"):
        return
    own = f"{library}:{name}"
    if adapter is None or (adapter.transformer != own and f"{library_of(stock_class(adapter))}:{name}" != own):
        raise PpclError(
            f"{where} takes its transformer from {library!r}, which is code: name it in an adapter of yours, "
            f"transformer={own!r}, and give that, as the recipe's `adapter` or to load_compressed"
        )


def _class(adapter: Adapter, field: str, name: str, kinds: tuple[type, ...]) -> Any:
    what = f"adapter {adapter.family!r}: {field} {name!r}"
    found = import_name(name, what) if ":" in name else getattr(diffusers, name, None)
    if found is None:
        raise PpclError(f"{what}: diffusers has no such class; package.module:Class names one of your own")
    if not isinstance(found, type) or not all(issubclass(found, kind) for kind in kinds):
        wanted = " and ".join(f"diffusers.{kind.__name__}" for kind in kinds)
        raise PpclError(f"{what} is {getattr(found, '__name__', found)!r}, which is no {wanted}")
    return found
