"""Values in few bits: weights rounded to bf16 without a bias, and the 8-bit moments of torchao as plain tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 to bf16, away from zero with the probability of the bits that bf16 has no room for."""
    low = torch.randint(1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return ((values.view(torch.int32) + low) & ~0xFFFF).view(torch.float32).bfloat16()


def packed(value: Tensor) -> dict[str, Tensor]:
    """Return the plain tensors that a moment consists of: one under no name, or those of an 8-bit one."""
    if _is_quantised(value):
        parts: Any = value
        return {".codes": parts.codes, ".scale": parts.scale, ".signed" if parts.signed else ".unsigned": parts.qmap}
    return {"": value}


def unpacked(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the moment of which `packed` made these."""
    if "" in parts:
        return parts[""]
    from torchao.optim.subclass_8bit import OptimState8bit

    signed = ".signed" in parts
    values = parts[".signed" if signed else ".unsigned"]
    made: Tensor = OptimState8bit(parts[".codes"], parts[".scale"], values, signed=signed, dtype=torch.float32)
    return made


def joined(moments: Sequence[Tensor], rows: Sequence[slice]) -> Tensor:
    """Join rows of the moments of several processes; 8-bit ones are rounded again, in other blocks."""
    values = torch.cat([plain(moment)[within] for moment, within in zip(moments, rows, strict=True)])
    like: Any = next((moment for moment in moments if _is_quantised(moment)), None)
    # torchao keeps small ones whole.
    if like is None or values.numel() < 4096 or values.numel() % like.block_size:
        return values
    made: Tensor = type(like).zeros(values.shape, like.signed, like.block_size, values.device, dtype=torch.float32)
    return made.copy_(values)


def plain(moment: Tensor) -> Tensor:
    """Return a moment's values."""
    quantised: Any = moment
    return quantised.dequantize() if _is_quantised(moment) else moment


def _is_quantised(value: Tensor) -> bool:
    return type(value).__name__ == "OptimState8bit"
