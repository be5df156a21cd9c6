"""The parts of the check that need a transformer's own forward, in their order."""

from typing import Any

import torch
from torch import Tensor

from ppcl_toolkit.checking.alone import check_alone, check_mask, check_repeats, check_streams, shifted
from ppcl_toolkit.checking.dead import check_networks
from ppcl_toolkit.checking.joint import check_attention, check_modulation
from ppcl_toolkit.checking.witness import Witness, check_blocks, check_given, witnessed
from ppcl_toolkit.running.capture import map_tensors
from ppcl_toolkit.running.passage import Batch
from ppcl_toolkit.running.schedule import Runner

_LESS = 0.1


@torch.no_grad()
def check_forward(runner: Runner, call: Batch) -> Witness:
    """Check blocks and streams on one call of a transformer, and on other latents at another level of noise.

    Returns what was seen of the first; raises `PpclError` with what would go wrong.
    """
    latents, timestep = runner.adapter.latents, runner.adapter.timestep
    other = {**call, latents: shifted(call[latents]), timestep: _nearer(call[timestep])}
    check_streams(runner, call)
    check_mask(runner, call)
    # One witness at a time: it has what every block returns.
    witness = witnessed(runner, other)
    check_given(runner, witness)
    check_repeats(runner, witness)
    check_blocks(runner, witness)
    witness = witnessed(runner, call)
    check_blocks(runner, witness)
    check_alone(runner, witness, other)
    check_attention(runner, witness)
    check_networks(runner, witness)
    check_modulation(runner, witness)
    return witness


def _nearer(told: Any) -> Any:
    """Return what tells another level of noise, wherever levels begin: near the other end, or near none."""

    def less(tensor: Tensor) -> Tensor:
        return (tensor * _LESS).to(tensor.dtype)

    return map_tensors(told, less) if not isinstance(told, int | float) else type(told)(told * _LESS)
