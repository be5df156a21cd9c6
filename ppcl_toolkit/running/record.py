"""Runs of a pipeline as samples: what its transformer is called with, and the clean latents that belong to it.

A row is one entry of a batch as the transformer sees it; shapes: B rows, N tokens, C channels.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import map_tensors
from ppcl_toolkit.running.images import run_pipeline
from ppcl_toolkit.running.noise import Sample
from ppcl_toolkit.running.noising import stepping
from ppcl_toolkit.running.rows import Uneven, as_given, row, stacked


class _Recorded(BaseException):
    """The first call is recorded, and the rest of the run is not wanted: nobody on the way may take it for an error."""


def denoised(pipeline: Any, adapter: Adapter, texts: Sequence[str], call: Mapping[str, Any], seed: int) -> list[Sample]:
    """Make the images of `texts`; return the calls of the first step, each with the latents that the run ends with."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts))]
    with _recording(pipeline.transformer, adapter) as seen, stepping(pipeline.scheduler, seen.stepped):
        run_pipeline(pipeline, texts, generators, call, "latent")
    assert seen.latents is not None, "the run took no step"
    if len(stacked(seen.calls[0][adapter.latents])) > 1 and (names := _one_for_each_row(adapter, seen.calls[0])):
        # By chance, or because a sample has its own: then those of a single prompt are as many as its rows, too.
        for name in names & _one_for_each_row(adapter, first_call(pipeline, adapter, texts[0], seed, call)):
            raise PpclError(
                f"adapter {adapter.family}: shared names {name!r}, of which the pipeline passes one for each sample: a "
                "batch would give all of them the first's"
            )
    # As the transformer has them: what a pipeline returns may be in another shape or scale.
    latents = seen.latents.cpu()
    # A second call belongs to the negative prompt, if the first has no more rows than there are images.
    apart = len(seen.calls[0][adapter.latents]) == len(latents)
    return [
        sample
        for number, arguments in enumerate(seen.calls)
        for sample in split(adapter, arguments, latents, negative=apart and number == 1)
    ]


def split(adapter: Adapter, arguments: dict[str, Any], latents: Tensor, *, negative: bool = False) -> list[Sample]:
    """Return a sample for each row of a call; guidance may put a second call for the same latents behind the first.

    All rows are of the `negative` prompt, or its rows come before as many of the prompts themselves, or behind them.
    """
    arguments = dict(arguments)
    tokens = arguments.pop(adapter.latents)
    listed, tokens = isinstance(tokens, list), stacked(tokens)
    arguments.pop(adapter.timestep)
    arguments.pop("return_dict", None)
    latents = as_given(latents, tokens, adapter)
    rows, count = len(tokens), len(latents)
    others = tokens.shape[1] - latents.shape[1]
    reference = (tokens[:, :others] if adapter.noised_last else tokens[:, -others:]) if others else None
    return [
        Sample(
            latents=latents[i % count : i % count + 1],
            arguments={n: v if n in adapter.shared else _one(v, n, i, tokens, listed) for n, v in arguments.items()},
            reference=None if reference is None else reference[i : i + 1],
            listed=listed,
            negative=negative or (i >= count if adapter.negatives_last else i < rows - count),
        )
        for i in range(rows)
    ]


def _one_for_each_row(adapter: Adapter, arguments: Mapping[str, Any]) -> set[str]:
    """Return what is `shared` and has as many parts as a call has rows."""
    rows = len(stacked(arguments[adapter.latents]))
    given = {name: arguments.get(name) for name in adapter.shared}
    parts = {n: v for n, v in given.items() if isinstance(v, list) or (isinstance(v, Tensor) and v.ndim)}
    return {name for name, value in parts.items() if len(value) == rows}


def first_call(pipeline: Any, adapter: Adapter, text: str, seed: int, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run calls its transformer with first; it is cut short there."""
    with _recording(pipeline.transformer, adapter, first_only=True) as seen, contextlib.suppress(_Recorded):
        run_pipeline(pipeline, [text], [torch.Generator().manual_seed(seed)], call, "latent")
    return seen.calls[0]


def _one(value: Any, name: str, index: int, tokens: Tensor, listed: bool) -> Any:
    try:
        return row(value, index, len(tokens), listed=listed)
    except Uneven as found:
        raise PpclError(
            f"the pipeline passes {found} of {name} for {len(tokens)} samples: name it in the adapter's `shared` where "
            "it has no batch dimension, or use samples.batch: 1"
        ) from found


@final
class _Seen:
    """What a run calls a transformer with at its first step, and the latents [B, ...] behind its last."""

    def __init__(self, adapter: Adapter) -> None:
        self._changing = (adapter.latents, adapter.timestep)
        self.calls: list[dict[str, Any]] = []
        self.latents: Tensor | None = None
        self._count = 0

    def called(self, arguments: dict[str, Any]) -> None:
        """Take a call: those of the first step are kept; `PpclError` where a later one is told something else."""
        self._count += 1
        if self.latents is None:
            self.calls.append({name: _resting(value) for name, value in arguments.items()})
        elif self._count <= len(self.calls):
            kept = self.calls[self._count - 1]
            for name in kept.keys() - {*self._changing}:
                if not _is_same(arguments.get(name), kept[name]):
                    raise PpclError(
                        f"the pipeline passes another {name} at a later step than at the first, which is what samples "
                        "keep; what turns that off belongs in `teacher.call`"
                    )

    def stepped(self, given: Mapping[str, Any], latents: Tensor) -> None:
        """Take a step; `PpclError` where it had more calls than the first one."""
        if self._count > len(self.calls):
            raise PpclError(
                f"the pipeline calls its transformer {self._count} times at timestep {float(given['timestep']):g}, and "
                "less often at the first step, which is what samples keep: do without what it begins later (skipped "
                "layers, another guidance) in `teacher.call`"
            )
        self.latents, self._count = latents, 0


@contextlib.contextmanager
def _recording(transformer: Any, adapter: Adapter, *, first_only: bool = False) -> Iterator[_Seen]:
    """Collect the arguments of the calls of the first denoising step: two where guidance makes a call of its own."""
    signature = inspect.signature(type(transformer).forward)
    seen = _Seen(adapter)

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = dict(signature.bind(module, *args, **kwargs).arguments)
        bound.pop("self")
        seen.called(bound)
        if first_only:
            raise _Recorded

    handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def _is_same(value: Any, kept: Any) -> bool:
    """Whether tensors are the same but for rounding; what is none is looked at by the check."""
    tensors: list[list[Tensor]] = [[], []]
    for each, found in zip((value, kept), tensors, strict=True):
        map_tensors(each, found.append)
    return len(tensors[0]) == len(tensors[1]) and all(
        one.shape == other.shape and torch.allclose(one.detach().cpu().float(), other.float(), rtol=1e-2, atol=1e-2)
        for one, other in zip(*tensors, strict=True)
    )


def _resting(value: Any) -> Any:
    return map_tensors(value, lambda tensor: tensor.detach().cpu().clone())
