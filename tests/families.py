"""Blocks of several families, tiny and real, with their stacks as data and one real call of each."""

import torch
from diffusers import QwenImageTransformer2DModel, SD3Transformer2DModel
from tiny import flux_inputs, flux_transformer, randomize

from ppcl_toolkit.adapter import Adapter, Stack, load_adapter
from ppcl_toolkit.mechanics.capture import Streams, stack_calls

SD3 = Adapter(
    family="sd3",
    transformer="SD3Transformer2DModel",
    stacks=(
        Stack(
            path="transformer_blocks",
            depth_key="num_layers",
            index_keys=("dual_attention_layers",),
            ffn={"image": "ff", "text": "ff_context"},
            joint_attention="attn",
            text_query=("attn.add_q_proj", "attn.norm_added_q"),
            text_out=("attn.to_add_out",),
        ),
    ),
)
QWEN_IMAGE = load_adapter("qwen_image")


def sd3_transformer(layers: int = 4) -> SD3Transformer2DModel:
    """SD3.5: the first two blocks have a second attention, the last one returns no text."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 2),
        qk_norm="rms_norm",
    )
    return randomize(transformer)


def sd3_inputs() -> dict:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 4, 3, 3, generator=g),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=g),
        "pooled_projections": torch.randn(2, 32, generator=g),
        "timestep": torch.tensor([300.0, 700.0]),
        "return_dict": False,
    }


def qwen_image_transformer(layers: int = 4) -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return randomize(transformer)


def qwen_image_inputs() -> dict:
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 9, 4, generator=g),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=g),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_shapes": [[(1, 3, 3)]] * 2,
        "return_dict": False,
    }


TRANSFORMERS = {
    "flux": lambda: (flux_transformer(), load_adapter("flux"), flux_inputs()),
    "sd3": lambda: (sd3_transformer(), SD3, sd3_inputs()),
    "qwenimage": lambda: (qwen_image_transformer(), QWEN_IMAGE, qwen_image_inputs()),
}


def blocks_of(family: str) -> list[tuple]:
    """(stack, block, arguments, streams) of every block, each with streams of its own."""
    transformer, adapter, kwargs = TRANSFORMERS[family]()
    found = []
    streams = None
    with torch.no_grad():
        for stack in adapter.stacks:
            calls = stack_calls(transformer, adapter, stack.path, kwargs, streams)
            g = torch.Generator().manual_seed(1)
            streams = Streams(*(torch.randn(value.shape, generator=g) for value in calls.streams))
            found += [(stack, b, a, streams) for b, a in zip(stack.blocks(transformer), calls.arguments, strict=True)]
    return found


FAMILIES = {family: lambda family=family: blocks_of(family) for family in TRANSFORMERS}


def block_call(stack: Stack, arguments: dict, streams: Streams) -> dict:
    return {**arguments, **{stack.argument(name): value for name, value in streams.of(stack.streams).items()}}
