"""What modulation layers are fed, against hooks on the whole model; adapters that name something else are refused."""

import copy

import pytest
import torch
from families import TRANSFORMERS
from runs import DUAL, FLUX, SINGLE
from tiny import flux_inputs, flux_transformer
from torch import nn

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.running.conditioning import Layer, replaced, sources, vectors
from ppcl_toolkit.running.placement import Placement
from ppcl_toolkit.running.schedule import Runner


def layers_of(runner):
    return [
        Layer(stack.path, index, path)
        for stack in runner.adapter.stacks
        for index, block in enumerate(runner.blocks(stack.path))
        for path in stack.modulation
        if path in dict(block.named_modules())
    ]


def hooked(transformer, layers, kwargs):
    """What the layers are given in a forward of the whole model."""
    seen = {}
    for layer in layers:
        module = transformer.get_submodule(str(layer))
        module.register_forward_pre_hook(lambda _, given, layer=layer: seen.update({layer: given[0]}))
    with torch.no_grad():
        transformer(**kwargs)
    return seen


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_it_is_what_the_whole_model_feeds_them(family, streamed):
    transformer, adapter, kwargs = TRANSFORMERS[family]()
    runner = Runner(transformer, adapter, Placement(streamed=streamed))
    layers = layers_of(runner)
    expected = hooked(copy.deepcopy(transformer), layers, kwargs)
    found = vectors(runner, layers, kwargs, prove=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[layer]) for layer, value in found.items())


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_one_vector_feeds_all_but_where_references_have_their_own(family):
    transformer, adapter, kwargs = TRANSFORMERS[family]()
    runner = Runner(transformer, adapter)
    found = vectors(runner, layers_of(runner), kwargs)
    origin = sources(found)
    assert origin.keys() == found.keys()
    if family == "zero_cond_t":
        # The image stream of a sample with references is modulated by two vectors, its text by one.
        assert {layer.path: len(found[layer]) for layer in set(origin.values())} == {"img_mod.1": 4, "txt_mod.1": 2}
    else:
        assert len(set(origin.values())) == 1


def test_no_attention_and_no_ffn_runs():
    transformer = flux_transformer()
    runner = Runner(transformer, FLUX)
    ran = []
    for name, module in transformer.named_modules():
        if name.endswith(("attn", ".ff", ".ff_context", "proj_mlp")):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    vectors(runner, layers_of(runner), flux_inputs(), prove=True)
    assert not ran


def refused(layer, change=lambda _: None):
    transformer = flux_transformer()
    change(transformer)
    with pytest.raises(PpclError) as caught:
        vectors(Runner(transformer, FLUX), [layer], flux_inputs(), prove=True)
    return str(caught.value)


def test_a_layer_of_the_streams_is_refused():
    found = refused(Layer(DUAL.path, 1, "attn.to_q"))
    assert found.startswith("transformer_blocks.1.attn.to_q is fed [2, 9, 32] for 2 samples")


def test_a_layer_that_never_runs_is_refused():
    layer = Layer(SINGLE.path, 0, "spare")
    assert "is never run" in refused(layer, lambda t: setattr(t.single_transformer_blocks[0], "spare", nn.Linear(2, 2)))


def test_a_layer_that_is_fed_by_more_than_the_conditioning_is_refused():
    def mix(transformer):
        def add_image(_, args, kwargs):
            return args, {**kwargs, "temb": kwargs["temb"] + kwargs["hidden_states"].mean(1)}

        transformer.transformer_blocks[2].register_forward_pre_hook(add_image, with_kwargs=True)

    assert "2.norm1.linear is fed by more than the conditioning" in refused(Layer(DUAL.path, 2, "norm1.linear"), mix)


@torch.no_grad()
def test_pairs_run_in_place_of_layers_for_a_while():
    transformer, kwargs = flux_transformer(), flux_inputs()
    runner = Runner(transformer, FLUX)
    by_hand = copy.deepcopy(transformer)
    states = {}
    for layer in layers_of(runner)[::2]:
        module = by_hand.get_submodule(str(layer))
        g = torch.Generator().manual_seed(len(states))
        down, up = torch.randn(2, 32, generator=g), torch.randn(len(module.weight), 2, generator=g)
        states[layer] = {"0.weight": down, "1.weight": up, "1.bias": torch.ones(len(up))}
        module.weight.copy_(up @ down)
        module.bias.fill_(1)
    before = runner.velocity(kwargs)
    with replaced(runner, states):
        found = runner.velocity(kwargs)
    assert torch.allclose(found, by_hand(**kwargs)[0], atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)
    assert torch.equal(runner.velocity(kwargs), before)
