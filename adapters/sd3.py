"""SD3 and SD3.5: dual-stream blocks, some with a second attention over the image; the last one returns no text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppcl_toolkit.adapter import Adapter, Stack

BLOCKS = "transformer_blocks"


def remap(config: dict[str, Any], state: dict[str, Tensor], _: Mapping[str, Sequence[int]]) -> None:
    """Make the last of the blocks that are kept one that ends the text stream, as the stock class has it there.

    Of its text modulation (shift, scale, gate of the attention, then the same of the FFN) scale and shift stay, in the
    order of `AdaLayerNormContinuous`; what made its text output goes.
    """
    last = f"{BLOCKS}.{config['num_layers'] - 1}."
    for name in [name for name in state if name.startswith((f"{last}ff_context.", f"{last}attn.to_add_out."))]:
        del state[name]
    modulation = f"{last}norm1_context.linear"
    # Of low rank, it is a pair whose second has the rows; a block whose text is narrow already has none.
    for name in [f"{modulation}{layer}.{kind}" for layer in ("", ".1") for kind in ("weight", "bias")]:
        if name in state and len(state[name]) == 6 * config["num_attention_heads"] * config["attention_head_dim"]:
            shift, scale = state[name].chunk(6)[:2]
            state[name] = torch.cat([scale, shift])


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: latents are an eighth of the picture; CLIP's 77 tokens stand before T5's."""
    assert not references, "SD3 has no editing models"
    text = 77 + call.get("max_sequence_length", 256)
    return {
        "hidden_states": (1, config["in_channels"], call.get("height", 1024) // 8, call.get("width", 1024) // 8),
        "encoder_hidden_states": (1, text, config["joint_attention_dim"]),
        "pooled_projections": (1, config["pooled_projection_dim"]),
        "timestep": (1,),
    }


ADAPTER = Adapter(
    family="sd3",
    transformer="SD3Transformer2DModel",
    guidance="guidance_scale",
    remap=remap,
    models={
        "stabilityai/stable-diffusion-3.5-large": {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        "stabilityai/stable-diffusion-3.5-medium": {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    },
    dtype="float16",
    others=(4_762_310_656, 694_659_840, 123_650_304, 83_819_683),
    decoding=1_541,
    example=example,
    stacks=(
        Stack(
            path=BLOCKS,
            depth_key="num_layers",
            index_keys=("dual_attention_layers",),
            ffn={"image": "ff", "text": "ff_context"},
            joint_attention="attn",
            text_query=("attn.add_q_proj", "attn.norm_added_q"),
            text_out=("attn.to_add_out",),
            modulation=("norm1.linear", "norm1_context.linear"),
        ),
    ),
)
