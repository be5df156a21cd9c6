"""Low-rank modulation by numpy alone: what students and variants are held against."""

import copy

import numpy as np
import torch


def hand_made(transformer, kwargs, adapter, rank):
    """A teacher whose modulation linears are the projections that numpy finds in what they are given, and the bank.

    Only numpy and the stock model: [path of the layer] -> (weight, bias) of the full-size layer that does the same.
    """
    seen = {}
    paths = {
        f"{stack.path}.{index}.{name}": (stack.path, index, name)
        for stack in adapter.stacks
        for index, block in enumerate(stack.blocks(transformer))
        for name in stack.modulation
        if name in dict(block.named_modules())
    }
    handles = [
        transformer.get_submodule(path).register_forward_pre_hook(
            lambda _, given, path=path: seen.update({path: given[0]})
        )
        for path in paths
    ]
    with torch.no_grad():
        transformer(**kwargs)
    for handle in handles:
        handle.remove()
    teacher, bank = copy.deepcopy(transformer), {}
    for path, (stack, index, name) in paths.items():
        layer = teacher.get_submodule(path)
        e, w, b = (value.detach().double().numpy() for value in (seen[path], layer.weight, layer.bias))
        u, _, _ = np.linalg.svd(w @ np.cov(e.T, bias=True) @ w.T)
        up, down = u[:, :rank], u[:, :rank].T @ w
        bias = b + w @ e.mean(0) - up @ (down @ e.mean(0))
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(up @ down))
            layer.bias.copy_(torch.from_numpy(bias))
        state = {f"{name}.0.weight": down, f"{name}.1.weight": up, f"{name}.1.bias": bias}
        key = f"{stack}.{index}-{index}.modulation_{rank}"
        bank.setdefault(key, {}).update({n: torch.from_numpy(v).float() for n, v in state.items()})
    return teacher, bank
