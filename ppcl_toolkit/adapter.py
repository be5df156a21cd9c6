"""An architecture described as data: where its blocks are, and what a block's streams are called.

A family is one file `adapters/<family>.py` that exports `ADAPTER`. `package.module:NAME` and the entry-point group
`ppcl_toolkit.adapters` name adapters that live elsewhere.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.resources
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ppcl_toolkit.errors import PpclError, PpclWarning
from ppcl_toolkit.values import shortened

Stream = Literal["image", "text"]
Remap = Callable[[dict[str, Any], dict[str, Tensor], Mapping[str, Sequence[int]]], None]
Rows = Callable[[Mapping[str, Sequence[int]], Mapping[str, int]], Sequence[int]]
Example = Callable[[Mapping[str, Any], Mapping[str, Any], int], dict[str, Any]]
Noised = Callable[[Mapping[str, Any]], int]


def _must_be(described: Any, kind: Any, *names: str) -> None:
    for name in names:
        if not isinstance(value := getattr(described, name), kind):
            whose = f"{type(described).__name__} {(getattr(described, 'path', None) or described.family)!r}"
            wanted = {str: "a name", Mapping: "a mapping"}.get(kind, "a tuple, of one thing, too: (this,)")
            raise PpclError(f"{whose}: {name} is {shortened(value)}, and has to be {wanted}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One container of consecutive blocks.

    Module paths in `ffn`, `joint_attention`, `text_query`, `text_out` and `modulation` are relative to a block.
    """

    path: str
    """Module path of the `nn.ModuleList` in the transformer."""
    depth_key: str
    """Config key that holds its length."""
    index_keys: tuple[str, ...] = ()
    """Config keys that hold lists of block indices, renumbered when blocks go (SD3.5 `dual_attention_layers`)."""
    image: str = "hidden_states"
    """Forward argument of the image stream."""
    text: str | None = "encoder_hidden_states"
    """Forward argument of the text stream; None where blocks have one stream."""
    returns: tuple[Stream, ...] = ("text", "image")
    """Order of the streams that a block returns; one entry stands for a bare tensor."""
    ffn: Mapping[Stream, str] = field(default_factory=dict)
    """Feed-forward module of each stream, where a linear map may replace it (Eq. 9)."""
    joint_attention: str | None = None
    """Attention with separate text weights, where a text stream may be replaced (Eq. 8)."""
    attention_text: str = "encoder_hidden_states"
    """Argument of `joint_attention` by which the text enters: the `z` of Eq. 8."""
    text_mask: str | None = None
    """Argument, also of the transformer, that says which tokens of the text [B, N] are none of the padding; None where
    text cannot be masked. The transformer's own text argument is then called as that of the blocks."""
    text_query: tuple[str, ...] = ()
    """Modules that only make text queries: dead once nobody reads the text's own attention output."""
    text_out: tuple[str, ...] = ()
    """Modules that only project the text's attention output: dead likewise."""
    modulation: tuple[str, ...] = ()
    """Linear layers from the conditioning vector to shifts, scales and gates; empty where blocks have none of their own
    (shared or tabled by design), and then there is nothing to take out."""

    def __post_init__(self) -> None:
        """Raise `PpclError` for a field of another kind, as a tuple of one without its comma."""
        _must_be(self, str, "path", "depth_key", "image")
        _must_be(self, tuple | list, "index_keys", "returns", "text_query", "text_out", "modulation")
        _must_be(self, Mapping, "ffn")

    @property
    def streams(self) -> tuple[Stream, ...]:
        """Streams of a block, image first."""
        return ("image", "text") if self.text else ("image",)

    def argument(self, stream: Stream) -> str:
        """Forward argument that carries `stream`."""
        name = self.image if stream == "image" else self.text
        assert name is not None, f"{self.path} has no {stream} stream"
        return name

    def blocks(self, transformer: nn.Module) -> nn.ModuleList:
        """Return the container of this stack in `transformer`."""
        blocks = transformer.get_submodule(self.path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks


@dataclass(frozen=True, slots=True)
class TableRows:
    """Rows of a table that has a part for every stack, or several, one behind the other: `Adapter.tables`."""

    parts: tuple[tuple[str | None, int], ...]
    """Of each part: the path of a stack, and the rows of each of its blocks; or None, and rows that no block has."""

    def __call__(self, kept: Mapping[str, Sequence[int]], depths: Mapping[str, int]) -> list[int]:
        """Return the rows that stay where those blocks are kept."""
        found: list[int] = []
        start = 0
        for path, count in self.parts:
            for block in [0] if path is None else kept[path]:
                found += range(start + count * block, start + count * (block + 1))
            start += count * (1 if path is None else depths[path])
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A family of transformers: its stacks in forward order, and how a denoising call is made."""

    family: str
    transformer: str
    """Class name in diffusers, or `package.module:Class`: a `diffusers.ModelMixin` of one's own. Variants open where
    that module can be imported; it must not import this package."""
    pipeline: str | None = None
    """`package.module:Class` of a `diffusers.DiffusionPipeline` of one's own, where diffusers has none of it."""
    stacks: tuple[Stack, ...]
    latents: str = "hidden_states"
    """Argument that holds the noised latents, tokens or pixels second; reference tokens may follow the noised ones."""
    timestep: str = "timestep"
    """Argument that tells the level of noise; how, is seen from the pipeline's own steps."""
    packs: bool = False
    """Whether the pipeline packs latents into tokens, by its `_pack_latents`."""
    shared: tuple[str, ...] = ()
    """Arguments that have no batch dimension."""
    noised: Noised | None = None
    """`noised(call)` counts the noised tokens of a call; None where they are all of it, and of what is made of it."""
    noised_last: bool = False
    """Whether they are the last ones: references, and in what is made of a call the text, too, come before them."""
    remap: Remap | None = None
    """`remap(config, state_dict, kept)`, in place, for families whose other weights depend on block numbers."""
    tables: Mapping[str, Rows] = field(default_factory=dict)
    """Buffers with rows for every block, which the class makes of its depth and no file of weights has; of each,
    `rows(kept, depths)`: those that stay with the blocks that do. A shorter model has them along, and is `custom`."""
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Hub ids, and where their config differs from the class's defaults: `ppcl plan` needs no download for these."""
    guidance: str = "true_cfg_scale"
    """Argument of the pipeline that, above `unguided`, makes it run every picture twice: classifier-free guidance."""
    unguided: float = 1.0
    """Its value where no picture is. Of the prompt's velocity c and the negative's n, the run's is n + s (c - n), and
    c + s (c - n) for pipelines that are unguided at 0."""
    negatives_last: bool = False
    """Whether, where one call has the rows of negative prompts too, they are behind those of the prompts."""
    distilled: str = "guidance"
    """Argument by which a guidance-distilled model is told its guidance, where it is one."""
    others: tuple[int, ...] | Mapping[str, tuple[int, ...]] = ()
    """Parameters of each of the pipeline's other parts, text encoders and autoencoder, for `ppcl plan`; by hub id where
    models differ in them, the first for those that are not listed."""
    decoding: int = 3500
    """Bytes per pixel that its autoencoder takes to decode in half precision, for `ppcl plan`."""
    dtype: str = "bfloat16"
    """Of the published weights: a run in this one leaves them in their files, and the system reads pages of those."""
    example: Example | None = None
    """`example(config, call, references)`: the arguments of one call of the transformer for a recipe's `teacher.call`
    and so many reference images, shapes in place of tensors but of masks whose numbers matter; for `ppcl plan`."""

    def __post_init__(self) -> None:
        """Raise `PpclError` for a field of another kind, as a tuple of one without its comma."""
        _must_be(self, str, "family", "transformer", "latents", "timestep", "guidance", "distilled")
        _must_be(self, tuple | list, "stacks", "shared")
        _must_be(self, Mapping, "tables", "models")

    @property
    def class_name(self) -> str:
        """Name of the transformer's class, without the module that it comes from."""
        return self.transformer.rpartition(":")[2]

    def stack(self, path: str) -> Stack:
        """Return the stack at `path`; unknown paths are a `PpclError` that lists the known ones."""
        for stack in self.stacks:
            if stack.path == path:
                return stack
        known = ", ".join(stack.path for stack in self.stacks)
        raise PpclError(f"{self.family} has no stack {path!r}; it has: {known}")

    @property
    def checked(self) -> dict[str, Any]:
        """What a check against the pipeline is of, as JSON has it."""
        names = ("latents", "timestep", "packs", "guidance", "unguided", "negatives_last", "noised_last")
        own = {name: getattr(self, name) for name in names}
        stacks = [asdict(stack) for stack in self.stacks]
        found: dict[str, Any] = json.loads(json.dumps({**own, "shared": self.shared, "stacks": stacks}))
        return found

    @property
    def allows(self) -> dict[str, str]:
        """What may go, in words: blocks of which stacks, FFNs of which streams, text streams, modulation."""
        streams = [name for name in ("image", "text") if any(name in stack.ffn for stack in self.stacks)]
        return {
            "depth": ", ".join(stack.path for stack in self.stacks),
            "FFN": ", ".join(streams) or "-",
            "text": "yes" if any(stack.joint_attention for stack in self.stacks) else "-",
            "modulation": "yes" if any(stack.modulation for stack in self.stacks) else "-",
        }

    def others_of(self, model: str) -> tuple[int, ...]:
        """Return `others` of a model, by its hub id."""
        if isinstance(self.others, tuple):
            return self.others
        return self.others.get(model) or next(iter(self.others.values()))

    def scale(self, call: Mapping[str, Any]) -> float | None:
        """Return the s of n + s (c - n) that the pipeline's arguments ask for; None where they do not say."""
        value = call.get(self.guidance)
        return None if value is None else float(value) + 1 - self.unguided

    def noised_of(self, call: Mapping[str, Any], tokens: Tensor) -> Tensor:
        """Return the noised ones of the tokens [B, N, C] that a call has, or that are made of it."""
        if self.noised is None:
            return tokens
        count = self.noised(call)
        return tokens[:, tokens.shape[1] - count :] if self.noised_last else tokens[:, :count]

    @property
    def padded(self) -> tuple[str, str] | None:
        """The transformer's arguments of the text and of its mask; None where text cannot be masked."""
        stack = self.stacks[0]
        return None if stack.text_mask is None else (stack.argument("text"), stack.text_mask)

    def depths(self, transformer: nn.Module) -> dict[str, int]:
        """Return the number of blocks of each stack."""
        return {stack.path: len(stack.blocks(transformer)) for stack in self.stacks}


def available_adapters() -> list[str]:
    """List the names that `load_adapter` takes: shipped families, then installed entry points."""
    shipped = [
        entry.name.removesuffix(".py")
        for entry in importlib.resources.files("ppcl_toolkit.adapters").iterdir()
        if entry.name.endswith(".py") and not entry.name.startswith("_")
    ]
    return sorted(shipped) + sorted(set(_entry_points()) - set(shipped))


def installed_adapters() -> dict[str, Adapter]:
    """Return the adapters of all available names; one that cannot be loaded is left out, with a `PpclWarning`."""
    found = {}
    for name in available_adapters():
        try:
            found[name] = load_adapter(name)
        except PpclError as error:
            _warn_once(f"{error}; it is left out")
    return found


def load_adapter(name: str) -> Adapter:
    """Load an adapter by family name, entry-point name or `package.module:NAME`.

    The module is looked for where Python looks; `import_beside` finds one in another folder first. Raises `PpclError`
    with the choices when there is none of that name, and with the reason for one that cannot be imported.
    """
    if ":" in name:
        found = import_name(name, f"adapter {name!r}")
    elif point := _entry_points().get(name):
        found = _imported(point.load, f"adapter {name!r} (an entry point, {point.value})")
    elif name in available_adapters():
        found = import_name(f"ppcl_toolkit.adapters.{name}:ADAPTER", f"adapter {name!r}")
    else:
        raise PpclError(
            f"unknown adapter {name!r}; available: {', '.join(available_adapters())}, "
            "or package.module:NAME for one of your own"
        )
    if not isinstance(found, Adapter):
        raise PpclError(f"adapter {name!r} is a {type(found).__name__}, not a ppcl_toolkit.Adapter")
    return found


def import_beside(name: str, folder: str | Path) -> None:
    """Import the adapter `package.module:NAME` where its module lies in `folder`, as a recipe has it beside itself.

    So are the classes that it names. Later look-ups find modules by their names; nothing else is imported from there
    afterwards. Raises what `load_adapter` does.
    """
    if ":" in name:
        with looking_in(folder):
            adapter = load_adapter(name)
            for named in (adapter.transformer, adapter.pipeline or ""):
                if ":" in named:
                    import_name(named, f"{named!r}, which adapter {name!r} names,")
        top, home = name.partition(":")[0].partition(".")[0], Path(home_of(name))
        here = Path(folder).resolve()
        if home != here and ((here / f"{top}.py").is_file() or (here / top).is_dir()):
            raise PpclError(f"adapter {name!r}: {top} was imported from {home} before, and there is another in {here}")


@contextlib.contextmanager
def looking_in(*folders: str | Path) -> Iterator[None]:
    """Let Python look for modules in `folders` first, by their absolute paths, and as before afterwards."""
    added = [str(Path(folder).resolve()) for folder in folders]
    sys.path[:0] = added
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for place in added:
            sys.path.remove(place)


def home_of(name: str) -> str:
    """Return the folder where another process finds the module of `package.module:NAME`; nothing for other names."""
    if ":" not in name:
        return ""
    top = importlib.import_module(name.partition(":")[0].partition(".")[0])
    places = list(getattr(top, "__path__", [])) or [top.__file__ or ""]
    return str(Path(places[0]).resolve().parent)


def adapter_of(family: str, wanted: str = "auto") -> Adapter:
    """Return the adapter of a plan that a file holds: the one `wanted` by a user, or the installed one of its `family`.

    A name in a file names no code: `package.module:NAME` there is a `PpclError`, and nothing is imported.
    """
    if wanted != "auto":
        return load_adapter(wanted)
    if ":" in family:
        raise PpclError(
            f"a plan names the adapter {family!r}, which is code: files may only name installed adapters "
            f"({', '.join(available_adapters())}); give it yourself if you trust it, as the recipe's `adapter` or to "
            "load_compressed"
        )
    return load_adapter(family)


def adapter_for(transformer_class: str, wanted: str = "auto") -> Adapter:
    """Return the adapter `wanted` for a transformer class; `auto` is the one that names the class.

    Raises `PpclError` where it is for another class, or where there is none.
    """
    adapters = list(installed_adapters().values()) if wanted == "auto" else [load_adapter(wanted)]
    for adapter in adapters:
        if adapter.class_name == transformer_class:
            return adapter
    if wanted != "auto":
        raise PpclError(f"adapter {wanted!r} is for {adapters[0].transformer}, the teacher has a {transformer_class}")
    known = ", ".join(f"{a.family} ({a.transformer})" for a in adapters)
    raise PpclError(f"no adapter for {transformer_class}; available: {known}")


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group="ppcl_toolkit.adapters")}


def import_name(reference: str, what: str) -> object:
    """Return what `package.module:NAME` names; `PpclError` that begins with `what` where it cannot be imported."""
    module, _, name = reference.partition(":")
    return _imported(lambda: getattr(importlib.import_module(module), name), what)


def _imported(load: Callable[[], object], what: str) -> object:
    """Return what `load` does; whatever somebody else's module raises while it is imported is a `PpclError`."""
    try:
        return load()
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split()) or "no message"
        told = said if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {said}"
        # Not beside the recipe that a run keeps: files that were made name no code.
        advice = "; put its folder on PYTHONPATH, or the module beside your recipe"
        missing = isinstance(error, ModuleNotFoundError)
        raise PpclError(f"{what} cannot be imported: {told}{advice if missing else ''}") from error


@functools.cache
def _warn_once(message: str) -> None:
    """Warn of what is asked for again and again in one process."""
    warnings.warn(message, PpclWarning, stacklevel=3)
