"""What each of several processes with a pretended device does; `test_device.py` starts two."""

import copy

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


def trained(module: nn.Module, inputs: torch.Tensor) -> nn.Module:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(2):
        module(inputs).square().sum().backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return module


def talk(state: PartialState) -> None:
    own = torch.full((3,), state.process_index + 1.0, device=state.device)
    total = own.clone()
    distributed.all_reduce(total)
    assert total.tolist() == [3, 3, 3]
    parts = [torch.empty_like(own) for _ in range(2)]
    distributed.all_gather(parts, own)
    assert [part[0].item() for part in parts] == [1, 2]
    distributed.broadcast(own, 1)
    assert own.tolist() == [2, 2, 2]
    host = torch.ones(2)
    distributed.all_reduce(host)
    assert host.tolist() == [2, 2]
    assert gather_object([state.process_index]) == [0, 1]
    state.wait_for_everyone()


def shard(state: PartialState) -> None:
    """Weights, gradients and moments in two halves train as the whole does on the host."""
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    whole = trained(copy.deepcopy(network()), inputs)
    halves = network().to(state.device)
    mesh = init_device_mesh("cuda", (2,))
    for module in (halves[0], halves[2], halves):
        fully_shard(module, mesh=mesh)
    trained(halves, inputs.to(state.device))
    for (name, half), parameter in zip(halves.named_parameters(), whole.parameters(), strict=True):
        assert half.to_local().shape[0] == parameter.shape[0] // 2, name
        torch.testing.assert_close(half.full_tensor().cpu(), parameter.detach())


if __name__ == "__main__":
    state = PartialState()
    assert (state.num_processes, state.device) == (2, torch.device("cuda", state.process_index))
    assert torch.cuda.current_device() == state.process_index
    talk(state)
    shard(state)
    state.wait_for_everyone()
    distributed.destroy_process_group()
