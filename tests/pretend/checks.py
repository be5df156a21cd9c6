"""What the pretended device promises: tests of a process that has two of them, of 80 MB; `test_device.py` starts it."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

MIXED = {
    "add": lambda gpu, cpu: gpu + cpu,
    "add in place": lambda gpu, cpu: cpu.add_(gpu),
    "add to a scalar in place": lambda gpu, cpu: cpu.sum().add_(gpu.sum()),
    "matmul": lambda gpu, cpu: gpu @ cpu,
    "linear": lambda gpu, cpu: functional.linear(gpu, gpu, cpu[0]),
    "cat": lambda gpu, cpu: torch.cat([gpu, cpu]),
    "stack of scalars": lambda gpu, cpu: torch.stack([gpu.sum(), cpu.sum()]),
    "where": lambda gpu, cpu: torch.where(gpu > 0, gpu, cpu),
    "index_select": lambda gpu, _: gpu.index_select(0, torch.tensor([0])),
    "gather": lambda gpu, _: gpu.gather(0, torch.zeros(1, 4, dtype=torch.long)),
    "embedding": lambda gpu, _: functional.embedding(torch.tensor([1]), gpu),
    "layer_norm": lambda gpu, cpu: functional.layer_norm(gpu, (4,), cpu[0]),
    "attention": lambda gpu, cpu: functional.scaled_dot_product_attention(gpu[None], cpu[None], gpu[None]),
    "conv2d": lambda gpu, cpu: functional.conv2d(gpu[None, None], cpu[None, None]),
    "index with a device's index": lambda _, cpu: cpu[torch.tensor([0]).cuda()],
    "another device": lambda gpu, _: gpu + gpu.to("cuda:1"),
    "a scalar of another device": lambda gpu, _: gpu + gpu.sum().to("cuda:1"),
    "mse_loss": lambda gpu, cpu: functional.mse_loss(gpu, cpu),
    "out": lambda gpu, cpu: torch.mul(cpu, cpu, out=gpu),
}
FREE = {
    "a scalar on the host": lambda gpu: gpu + torch.tensor(2.0),
    "a scalar on the host in place": lambda gpu: gpu.clone().mul_(torch.tensor(2.0)),
    "indices on the host": lambda gpu: gpu[torch.tensor([0, 1])],
    "a mask on the host": lambda gpu: gpu[torch.tensor([True, False, True, False])],
    "assignment at indices on the host": lambda gpu: gpu.clone().index_put_(
        (torch.tensor([0]),), torch.tensor(1.0).cuda()
    ),
    "where with a scalar": lambda gpu: torch.where(gpu > 0, gpu, torch.tensor(0.0)),
}


@pytest.fixture(autouse=True)
def _clean():
    torch.cuda.set_device(0)
    torch.cuda.synchronize()
    for index in range(2):
        torch.cuda.reset_peak_memory_stats(index)
    yield


@pytest.mark.parametrize("operation", MIXED)
def test_mixed_devices_raise(operation):
    cpu = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match=r"tensors to be on the same device|indices should be|the same device type"):
        MIXED[operation](cpu.cuda(), cpu)


@pytest.mark.parametrize("operation", FREE)
def test_what_cuda_takes_from_the_host_is_taken(operation):
    values = torch.arange(16.0).view(4, 4)
    assert FREE[operation](values.cuda()).device == torch.device("cuda:0")


def test_tensors_are_the_devices_and_numpy_refuses_them():
    made = torch.ones(3, device="cuda")
    assert (made.is_cuda, made.device, torch.empty(2, device="cuda:1").device.index) == (
        True,
        torch.device("cuda:0"),
        1,
    )
    assert repr(made) == "tensor([1., 1., 1.], device='cuda:0')"
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        np.asarray(made)


def test_a_module_keeps_its_parameters_when_it_moves():
    module = nn.Linear(4, 4)
    before = list(module.parameters())
    module.to("cuda")
    assert all(one is other for one, other in zip(before, module.parameters(), strict=True))
    assert type(module.weight.data) is torch.Tensor
    assert copy.deepcopy(module).weight.device == module.weight.device == torch.device("cuda:0")
    assert torch.equal(copy.deepcopy(module).cpu().weight, module.cpu().weight)


def test_devices_are_distinct():
    assert (torch.cuda.is_available(), torch.cuda.device_count(), torch.cuda.current_device()) == (True, 2, 0)
    with torch.cuda.device(1):
        assert torch.empty(1, device="cuda").device.index == torch.cuda.current_device() == 1
    torch.cuda.set_device("cuda:1")
    assert torch.ones(1).cuda().device.index == 1
    assert torch.ones(2, device="cuda:0").to("cuda:1").sum().item() == 2
    assert (torch.ones(2, device="cuda:0") * 2).device.index == 0
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(1, device="cuda:2")


def test_a_late_copy_is_there_when_somebody_has_waited():
    values = torch.arange(6.0).view(2, 3)
    source = values.cuda()
    event = torch.cuda.Event()
    waits = {
        "synchronize": torch.cuda.synchronize,
        "item": lambda: source.sum().item(),
        "a blocking copy to the host": lambda: source.cpu(),
        "a blocking copy from the host": lambda: torch.ones(1).cuda(),
        "an event": lambda: (event.record(), event.synchronize()),
        "the stream": lambda: torch.cuda.current_stream().synchronize(),
    }
    for name, wait in waits.items():
        for own in (source, source.T, source.bfloat16()):
            late = own.to("cpu", non_blocking=True)
            assert late.isnan().all(), name
            wait()
            assert torch.equal(late.float(), own.cpu().float()), name
    assert torch.equal(source.long().to("cpu", non_blocking=True), torch.full((2, 3), -1))


def test_a_late_copy_has_the_values_of_its_time():
    source = torch.ones(3, device="cuda")
    late = source.to("cpu", non_blocking=True)
    source.zero_()
    torch.cuda.synchronize()
    assert late.tolist() == [1, 1, 1]


def test_memory_that_is_not_pinned_is_never_late():
    plain = torch.zeros(3)
    plain.copy_(torch.ones(3, device="cuda"), non_blocking=True)
    assert plain.tolist() == [1, 1, 1]


def test_the_device_sees_late_copies_in_the_order_of_its_stream():
    late = torch.ones(3, device="cuda").to("cpu", non_blocking=True)
    back = late[1:].to("cuda", non_blocking=True)
    assert late.isnan().all()
    assert (back + 1).tolist() == [2, 2]
    assert late.tolist() == [1, 1, 1]


def test_pinned_memory_is_used_again_in_the_order_of_the_stream():
    pinned = torch.ones(3).pin_memory()
    there = pinned.cuda(non_blocking=True)
    pinned.copy_(there * 2, non_blocking=True)
    torch.cuda.synchronize()
    assert (there.tolist(), pinned.tolist()) == ([1, 1, 1], [2, 2, 2])


def test_a_late_copy_keeps_its_gradient():
    source = torch.ones(3, device="cuda", requires_grad=True)
    late = (source * 2).to("cpu", non_blocking=True)
    torch.cuda.synchronize()
    late.square().sum().backward()
    assert source.grad.tolist() == [8, 8, 8]


def test_pinned_memory_must_not_change_under_a_copy():
    pinned = torch.ones(3).pin_memory()
    assert pinned.is_pinned()
    assert not torch.ones(3).is_pinned()
    pinned.cuda(non_blocking=True)
    torch.cuda.synchronize()
    pinned.add_(1)
    assert pinned.cuda(non_blocking=True).tolist() == [2, 2, 2]
    pinned.cuda(non_blocking=True)
    pinned.add_(1)
    with pytest.raises(RuntimeError, match="pinned memory was changed before"):
        torch.cuda.synchronize()


def test_live_and_peak_bytes_are_counted_for_each_device():
    before = [torch.cuda.memory_allocated(index) for index in range(2)]
    one = torch.empty(1000, device="cuda:0")
    other = torch.empty(256, device="cuda:1")
    assert [torch.cuda.memory_allocated(i) - before[i] for i in range(2)] == [4096, 1024]
    view = one.view(10, 100)[2:, ::3].T
    total = one + one
    assert torch.cuda.memory_allocated() - before[0] == 2 * 4096
    del view, total, other
    one.mul_(2).relu_()
    assert [torch.cuda.memory_allocated(i) - before[i] for i in range(2)] == [4096, 0]
    assert [torch.cuda.max_memory_allocated(i) - before[i] for i in range(2)] == [8192, 1024]
    torch.cuda.reset_peak_memory_stats(0)
    assert torch.cuda.max_memory_allocated("cuda:0") - before[0] == 4096
    one.untyped_storage().resize_(0)
    assert torch.cuda.memory_allocated() == before[0]
    one.untyped_storage().resize_(4000)
    assert torch.cuda.memory_allocated() - before[0] == 4096


def test_memory_ends():
    assert torch.cuda.get_device_properties(1).total_memory == torch.cuda.mem_get_info()[1] == 80_000_000
    held = torch.empty(15_000_000, device="cuda")
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"CUDA out of memory. Tried to allocate .* GPU 0"):
        torch.empty(6_000_000, device="cuda")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        held.add(1)
    assert torch.empty_like(held, device="cuda:1").numel() == held.numel()
    del held
    assert torch.empty(15_000_000, device="cuda").device.type == "cuda"


def trained(device, *, form="foreach", half=False, recompute=False):
    """The weights of a small network after three steps of AdamW."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 8)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, **({form: True} if form else {"foreach": False}))
    inputs = torch.randn(4, 8).to(device)
    for _ in range(3):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            outputs = checkpoint(network, inputs, use_reentrant=False) if recompute else network(inputs)
        assert outputs.dtype == (torch.bfloat16 if half else torch.float32)
        outputs.float().square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().cpu().flatten() for parameter in network.parameters()])


@pytest.mark.parametrize(
    "options",
    [{}, {"form": ""}, {"form": "fused"}, {"half": True}, {"recompute": True}, {"half": True, "recompute": True}],
)
def test_training_gives_the_same_weights_as_the_host(options):
    # Normalisation is made of other operators, and autocast gives it another precision.
    close = {"rtol": 2e-2, "atol": 1e-3} if options.get("half") else {}
    torch.testing.assert_close(trained("cuda", **options), trained("cpu", **options), **close)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: functional.conv2d(x[None], x[:, :, :3, None]),
        lambda x: functional.conv3d(x[None, None], x[None, None, :2, :2, :2]),
        lambda x: functional.conv1d(x, x[:, :, :3], padding=1),
        lambda x: functional.group_norm(x, 2),
        lambda x: functional.interpolate(x[None], scale_factor=2.0, mode="nearest"),
        lambda x: functional.rms_norm(x, x.shape[-1:]),
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * 1j),
        lambda x: torch.linalg.cholesky(x @ x.mT + 4 * torch.eye(4, device=x.device)),
        lambda x: torch.sort(x.flatten()).values.unfold(0, 4, 2).softmax(-1),
    ],
)
def test_operators_and_their_gradients_give_the_host_values(compute):
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        inputs = torch.randn(4, 4, 4).to(device).requires_grad_()
        made = compute(inputs)
        made.square().sum().backward()
        assert inputs.grad.device.type == made.device.type == device
        results.append((made.detach().cpu(), inputs.grad.cpu()))
    torch.testing.assert_close(*results)


def test_attention_is_the_hosts_but_for_the_last_digits():
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    mask = torch.rand(2, 1, 6, 6) > 0.3
    found = functional.scaled_dot_product_attention(q.cuda(), k.cuda(), v.cuda(), attn_mask=mask.cuda())
    torch.testing.assert_close(found.cpu(), functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def test_results_are_written_into_given_tensors():
    values, into = torch.ones(3, 2, device="cuda"), torch.empty(0, device="cuda")
    assert torch.add(values, values, out=into) is into
    assert (into.tolist(), into.device) == ((values * 2).tolist(), values.device)


def test_streams_do_not_change_what_is_computed():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        made = torch.ones(3, device="cuda") * 2
    made.record_stream(stream)
    torch.cuda.current_stream().wait_stream(stream)
    stream.record_event().synchronize()
    assert made.tolist() == [2, 2, 2]


def test_seeds_give_the_hosts_numbers():
    numbers = [torch.randn(4, device=d, generator=torch.Generator(d).manual_seed(1)).cpu() for d in ("cpu", "cuda")]
    assert torch.equal(*numbers)
    assert torch.randn(4, device="cuda", generator=torch.Generator("cuda")).device.type == "cuda"


def test_files_keep_what_is_on_the_device(tmp_path):
    weights = {"weight": torch.arange(4.0).cuda()}
    save_file(weights, tmp_path / "weights.safetensors")
    assert load_file(tmp_path / "weights.safetensors", device="cuda")["weight"].tolist() == [0, 1, 2, 3]
    torch.save(weights, tmp_path / "weights.pt")
    assert torch.load(tmp_path / "weights.pt")["weight"].device.type == "cuda"


def test_a_process_started_here_has_the_devices_too():
    code = "import torch; print(torch.cuda.device_count(), torch.ones(2, device='cuda').sum().item())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("2 2.0\n", "")
