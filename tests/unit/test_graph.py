"""The traced block is the block: bit for bit over real diffusers classes, and what cannot be traced is refused."""

import pytest
import torch
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowJointTransformerBlock
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.models.transformers.transformer_cogview4 import CogView4TransformerBlock
from families import FAMILIES, block_call
from tiny import randomize
from torch import nn

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.surgery import graph
from ppcl_toolkit.surgery.source import write_forward


def run_source(trace: graph.Trace, block: nn.Module, call: dict):
    namespace = {"torch": torch}
    exec(write_forward(trace, "hidden_states"), namespace)
    with torch.no_grad():
        return namespace["forward"](block, **call)


@pytest.mark.parametrize("family", FAMILIES)
def test_source_computes_what_the_block_computes(family):
    for stack, block, arguments, streams in FAMILIES[family]():
        call = block_call(stack, arguments, streams)
        trace = graph.trace(block, call, stack.ffn.values())
        longer = block_call(stack, *other_length(arguments, streams))
        with torch.no_grad():
            for given in (call, longer):
                expected = block(**given)
                found = run_source(trace, block, given)
                assert type(found) is type(expected)
                assert all(a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def other_length(arguments, streams):
    """The same call for one sample of the batch of two."""
    # Where reference tokens have a time of their own, a second row of it follows for each sample.
    rows = {"temb": slice(None, None, 2), "modulate_index": slice(1)}
    kept = {n: v[rows[n]] if n in rows and v is not None else v for n, v in arguments.items()}
    return kept, type(streams)(*(value[:1] for value in streams))


def test_absent_argument_stays_where_it_is_only_handed_on():
    (stack, block, arguments, streams), *_ = FAMILIES["qwenimage"]()
    source = write_forward(graph.trace(block, block_call(stack, arguments, streams), stack.ffn.values()), stack.image)
    assert "encoder_hidden_states_mask=encoder_hidden_states_mask" in source
    assert "modulate_index is not None" in source  # The block looks at this one.


def test_source_refuses_what_was_taken_for_granted():
    (stack, block, arguments, streams), *_ = FAMILIES["flux"]()
    call = block_call(stack, arguments, streams)
    trace = graph.trace(block, call, stack.ffn.values())
    with pytest.raises(NotImplementedError, match="joint_attention_kwargs"):
        run_source(trace, block, {**call, "joint_attention_kwargs": {"scale": 2.0}})
    with pytest.raises(NotImplementedError, match="float16"):
        run_source(trace, block, {**call, "hidden_states": streams.image.half()})


class Routed(nn.Module):
    def __init__(self, question):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.question = question

    def forward(self, hidden_states):
        return self.linear(hidden_states) if self.question(hidden_states) else hidden_states


@pytest.mark.parametrize(
    "question",
    [
        lambda x: x.sum() > 0,
        lambda x: x.max().item() > 0,
        lambda x: bool(x.any()),
        lambda x: x.shape[1] + 1 > 2,
        lambda x: len(x) > 1,
    ],
)
def test_path_that_depends_on_data_or_size_is_refused(question):
    with pytest.raises(PpclError, match="Routed cannot be traced"):
        graph.trace(Routed(question), {"hidden_states": torch.randn(2, 3, 4)}, ())


def test_tracing_does_not_touch_the_block():
    (stack, block, arguments, streams), *_ = FAMILIES["flux"]()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    graph.trace(block, block_call(stack, arguments, streams), stack.ffn.values())
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
    assert not any("forward" in vars(module) for module in block.modules())


class Modulated(nn.Module):
    def __init__(self, calls):
        super().__init__()
        self.linear = nn.Linear(4, 12)
        self.calls = calls

    def forward(self, hidden_states, temb):
        _, scale, shift = self.linear(temb).chunk(3, dim=-1)
        if self.calls > 1:
            hidden_states = hidden_states * self.linear(temb + 1).chunk(3, dim=-1)[0]
        return hidden_states * scale + shift


@pytest.mark.parametrize(("calls", "shrunk"), [(1, {"linear": ((1, 2), 3)}), (2, {})])
def test_rows_that_nobody_reads_go_unless_the_layer_is_shared(calls, shrunk):
    call = {"hidden_states": torch.randn(2, 3, 4), "temb": torch.randn(2, 1, 4)}
    trace = graph.trace(Modulated(calls), call, ())
    graph.shrink(trace)
    assert trace.shrunk == shrunk


def test_path_that_depends_on_rank_is_fixed():
    trace = graph.trace(Routed(lambda x: x.ndim == 3), {"hidden_states": torch.randn(2, 3, 4)}, ())
    assert trace.used() == {"linear"}


def test_parallel_ffn_is_refused():
    block = randomize(AuraFlowJointTransformerBlock(32, 2, 16))
    call = {
        "hidden_states": torch.randn(2, 9, 32),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "temb": torch.randn(2, 32),
    }
    with pytest.raises(PpclError, match="parallel to the attention"):
        graph.replace_ffn(graph.trace(block, call, ("ff", "ff_context")), "ff", "linear_ffn_image")


def test_shared_ffn_is_refused():
    block = randomize(CogView4TransformerBlock(32, 2, 16, 8))
    call = {
        "hidden_states": torch.randn(2, 9, 32),
        "encoder_hidden_states": torch.randn(2, 5, 32),
        "temb": torch.randn(2, 8),
    }
    with pytest.raises(PpclError, match="called 2 times"):
        graph.replace_ffn(graph.trace(block, call, ("ff",)), "ff", "linear_ffn_image")


def test_ffn_over_joined_streams_is_refused():
    block = randomize(CogVideoXBlock(32, 2, 16, 8))
    call = {name: torch.randn(2, length, 32) for name, length in (("hidden_states", 9), ("encoder_hidden_states", 5))}
    trace = graph.trace(block, {**call, "temb": torch.randn(2, 8)}, ("ff",))
    with pytest.raises(PpclError, match="no residual|also serves another stream"):
        graph.replace_ffn(trace, "ff", "linear_ffn_image")
