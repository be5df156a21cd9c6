"""Counting floating-point operations, attention on a CPU included."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def counting() -> FlopCounterMode:
    """Return a counter of what runs inside it: products of matrices, two operations for each of their terms."""
    # torch has a formula for every device's fused attention but this one's.
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={fused: _attention})


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two products: [B, H, N, D] by [B, H, M, D], and [B, H, N, M] by [B, H, M, E]."""
    batch, heads, rows, features = query
    return int(2 * batch * heads * rows * key[2] * (features + value[3]))
