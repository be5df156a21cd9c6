"""Pipelines on devices that are too small for them; `test_pretend_placement.py` starts a process that has one."""

import pytest
import tiny
import torch
from runs import runner

from ppcl_toolkit.adapter import load_adapter
from ppcl_toolkit.running.images import run_pipeline
from ppcl_toolkit.running.placement import ROOM, Homes, Placement, callable_on, computing_on, device_of, fits
from ppcl_toolkit.running.schedule import Runner

CARD = torch.device("cuda", 0)
CALL = {"height": 8, "width": 8, "num_inference_steps": 3, "max_sequence_length": 8}
FLUX = load_adapter("flux")
SCRAPS = 10_000
"""Bytes, less than a layer: a scheduler keeps its timesteps on the device."""


def size(*modules):
    return sum(t.nbytes for m in modules for t in [*m.parameters(), *m.buffers()])


def drawn(pipeline):
    return run_pipeline(pipeline, ["a circle"], [torch.Generator().manual_seed(0)], CALL, "latent").cpu()


def homes(pipeline):
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return [address for part in parts for address in addresses(part)]


def addresses(module):
    return [tensor.data_ptr() for tensor in [*module.parameters(), *module.buffers()]]


@pytest.fixture
def pipeline():
    torch.cuda.set_per_process_memory_fraction(1.0)
    return tiny.flux_pipeline(12, 6)


def largest(pipeline):
    """Bytes of the largest part beside the transformer."""
    parts = pipeline.components.items()
    return max(size(part) for name, part in parts if isinstance(part, torch.nn.Module) and name != "transformer")


def sized(pipeline, case):
    """Bytes of a card: for the transformer beside one other part, for it alone, or for less than the transformer."""
    transformer = size(pipeline.transformer)
    weights = {"turns": transformer + largest(pipeline), "alone": transformer, "blocks": transformer // 2}[case]
    return int(weights / ROOM) + 1000


@pytest.mark.parametrize("case", ["all", "turns", "alone", "blocks", "streamed"])
def test_a_pipeline_draws_the_same_in_less_memory(pipeline, case):
    expected, before, encoder = drawn(pipeline), homes(pipeline), addresses(pipeline.text_encoder_2)
    whole = torch.cuda.mem_get_info(CARD)[1]
    others = largest(pipeline)
    if case in ("turns", "alone", "blocks"):
        torch.cuda.set_per_process_memory_fraction(sized(pipeline, case) / whole)
    torch.cuda.reset_peak_memory_stats(CARD)
    with callable_on(pipeline, CARD, streamed=case == "streamed"):
        found = [drawn(pipeline) for _ in range(2)]
        if case != "all":
            assert addresses(pipeline.text_encoder_2) == encoder, "what makes room goes home, and no copy of it is made"
    for each in found:
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)
    assert homes(pipeline) == before, "every weight is where it was, in the very memory"
    assert torch.cuda.memory_allocated(CARD) < SCRAPS
    assert not any("forward" in vars(module) for module in pipeline.transformer.modules())
    peak = torch.cuda.max_memory_allocated(CARD)
    if case in ("all", "turns"):
        assert peak > size(pipeline.transformer) + others
    elif case == "alone":
        assert size(pipeline.transformer) < peak < size(pipeline.transformer) + others
    else:
        assert peak < size(pipeline.transformer)


def test_the_teacher_goes_on_after_its_pipeline(pipeline):
    transformer = pipeline.transformer.requires_grad_(False)
    batch = tiny.flux_inputs()
    expected, before = transformer(**batch)[0], addresses(transformer)
    for streamed in (False, True):
        runner = Runner(transformer, FLUX, Placement(device=CARD, streamed=streamed))
        with runner.calling(pipeline):
            drawn(pipeline)
        torch.testing.assert_close(runner.velocity(batch).cpu(), expected, rtol=1e-4, atol=1e-4)
        resting = {block.device.type for s in FLUX.stacks for b in s.blocks(transformer) for block in b.parameters()}
        assert resting == {"cpu" if streamed else "cuda"}
        runner.leave()
        assert torch.cuda.memory_allocated(CARD) < SCRAPS
        assert addresses(transformer) == before


@pytest.mark.parametrize("share", [2.0, 0.5])
def test_a_transformer_computes_where_it_does_not_fit(pipeline, share):
    transformer = pipeline.transformer.requires_grad_(False)
    batch = tiny.flux_inputs()
    expected = transformer(**batch)[0]
    whole = torch.cuda.mem_get_info(CARD)[1]
    torch.cuda.set_per_process_memory_fraction(share * size(transformer) / whole)
    assert fits([transformer], CARD) == (share > 1)
    with computing_on(transformer, CARD):
        found = transformer(**{n: v.to(CARD) if isinstance(v, torch.Tensor) else v for n, v in batch.items()})[0]
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_a_visited_block_comes_home_to_its_memory():
    block = runner().transformer.transformer_blocks[0]
    before = addresses(block)
    away = Placement(device=CARD, streamed=True)
    with away.visit(block):
        assert {p.device.type for p in block.parameters()} == {"cuda"}
        with away.visit(block):
            assert {p.device.type for p in block.parameters()} == {"cuda"}
        assert {p.device.type for p in block.parameters()} == {"cuda"}
    assert addresses(block) == before


def test_a_block_that_is_called_is_visited_even_when_the_call_fails():
    block = torch.nn.Linear(2, 2).requires_grad_(False)
    before = addresses(block)
    with Placement(device=CARD, streamed=True).visiting(block):
        try:
            block(torch.ones(1, 3, device=CARD))
        except RuntimeError:
            pass
        else:
            raise AssertionError("a Linear of two features took three")
    assert addresses(block) == before


def test_a_streamed_teacher_rests_with_everything_but_its_blocks_on_the_device():
    teacher = runner()
    Placement(device=CARD, streamed=True).settle(teacher.transformer, FLUX, Homes())
    for name, parameter in teacher.transformer.named_parameters():
        assert parameter.is_cuda == ("transformer_blocks." not in name), name
    assert device_of(teacher.transformer, FLUX) == CARD
