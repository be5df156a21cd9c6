"""Whether blocks and streams are what an adapter takes them for: of themselves, and not of what was called before."""

from typing import Any

import torch
from torch import Tensor

from ppcl_toolkit.checking.witness import Witness, difference
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.capture import map_tensors, run_block, stack_calls, unpack
from ppcl_toolkit.running.images import is_refusal
from ppcl_toolkit.running.passage import Batch
from ppcl_toolkit.running.schedule import Runner


def check_repeats(runner: Runner, witness: Witness) -> None:
    """Call the transformer again: it must answer as before; raises `PpclError` where it does not."""
    if wrong := difference(runner.velocity(witness.batch).cpu(), witness.velocity, "velocity"):
        raise PpclError(
            f"adapter {runner.adapter.family}: two calls with the same arguments make {wrong}: the transformer draws "
            "random numbers (is it in training mode?), or keeps something from one call to the next"
        )


@torch.no_grad()
def check_alone(runner: Runner, witness: Witness, other: Batch) -> None:
    """Run every block as it was called, after the transformer has had another call: it must return what it did.

    The last comes first: what a block leaves for those behind it is that of the other call.

    Blocks of one batch are run when those of others have been, where a chunk of batches goes through a block. Raises
    `PpclError` with the first that reads something beside its arguments.
    """
    runner.velocity(other)
    runner.settle()
    for stack in reversed(runner.adapter.stacks):
        pairs = zip(runner.blocks(stack.path), witness.calls[stack.path], strict=True)
        for index, (block, call) in reversed([*enumerate(pairs)]):
            arguments, streams = runner.placement.bring((call.arguments, call.streams))
            with runner.placement.visit(block):
                output = run_block(block, stack, arguments, streams)
            if wrong := difference(output.of(stack.returns), unpack(stack, call.output).of(stack.returns)):
                raise PpclError(
                    f"adapter {runner.adapter.family}: {stack.path}[{index}], run after another call of the "
                    f"transformer, returns {wrong}: it reads something beside its arguments, which the "
                    "transformer sets on it, or keeps something"
                )


@torch.no_grad()
def check_streams(runner: Runner, batch: Batch) -> None:
    """Change the latents: the image that enters the first block must change with them; no block is run.

    Raises `PpclError` where it does not.
    """
    first = runner.adapter.stacks[0]
    if first.text is None:
        return
    runner.settle()
    given = dict(runner.placement.bring(batch))
    calls = []
    for latents in (given[runner.adapter.latents], shifted(given[runner.adapter.latents])):
        call = {**given, runner.adapter.latents: latents}
        calls.append(stack_calls(runner.transformer, runner.adapter, first.path, call).streams)
    flat = [list(tokens.shape) for tokens in calls[0] if tokens is not None and tokens.ndim != 3]
    if flat:
        raise PpclError(
            f"adapter {runner.adapter.family}: {first.path} is given {flat[0]} as a stream, {first.image!r} or "
            f"{first.text!r}: streams have tokens, [B, N, D]"
        )
    image, text = (difference(one, other) for one, other in zip(*calls, strict=True))
    if not image:
        raise PpclError(
            f"adapter {runner.adapter.family}: image of {first.path}: {first.image!r} does not change with the latents"
            f"{f', and {first.text!r}, its text, does' if text else ''}"
        )


@torch.no_grad()
def check_mask(runner: Runner, batch: Batch) -> None:
    """Hide the last token of the text by its mask and change it: the velocity must stay as it is.

    So must it without a mask, where all of the text counts.

    Raises `PpclError` where it does not.
    """
    named = runner.adapter.padded
    text = None if named is None else batch.get(named[0])
    if named is None or not isinstance(text, Tensor) or text.ndim != 3 or text.shape[1] < 2:
        return
    given, family = batch.get(named[1]), runner.adapter.family
    mask = torch.ones(text.shape[:2], dtype=given.dtype if isinstance(given, Tensor) else torch.bool)
    mask[:, -1] = 0
    other = text.clone()
    other[:, -1] = shifted(other[:, -1])
    pairs = ((text, mask), (other, mask), (text, torch.ones_like(mask)), (text, None))
    try:
        found = [runner.velocity({**batch, named[0]: value, named[1]: each}).cpu() for value, each in pairs]
    except Exception as error:
        if not is_refusal(error):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise PpclError(
            f"adapter {family}: text_mask: the transformer takes no mask of the text, {list(mask.shape)}, or "
            f"none, as {named[1]!r} ({said})"
        ) from error
    if wrong := difference(found[1], found[0], "velocity"):
        raise PpclError(
            f"adapter {family}: text_mask: where {named[1]!r} is 0 for a token of {named[0]!r}, another "
            f"one there makes {wrong}: it does not say which tokens are padding"
        )
    if wrong := difference(found[3], found[2], "velocity"):
        raise PpclError(
            f"adapter {family}: text_mask: without {named[1]!r} there is {wrong} than with one in which all of "
            f"{named[0]!r} counts, and batches without padding have none"
        )


def shifted(value: Any) -> Any:
    """Return other tensors of the same shape and type, of values in the same range."""
    return map_tensors(value, lambda tensor: tensor.flip(-1) * 0.5 + 0.25 if tensor.is_floating_point() else tensor)
