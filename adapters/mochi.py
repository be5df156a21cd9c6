"""Mochi 1, text to video: dual-stream blocks, of which the last one only reads the text."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ppcl_toolkit.adapter import Adapter, Stack

BLOCKS = "transformer_blocks"


def remap(config: dict[str, Any], state: dict[str, Tensor], _: Mapping[str, Sequence[int]]) -> None:
    """Make the last of the blocks that are kept one that only reads the text, as the stock class has it there.

    Of its text modulation (scale and gate of the attention, then of the FFN) the first scale stays; what made its text
    output goes.
    """
    last = f"{BLOCKS}.{config['num_layers'] - 1}."
    for name in [name for name in state if name.startswith((f"{last}ff_context.", f"{last}attn1.to_add_out."))]:
        del state[name]
    for kind in ("weight", "bias"):
        if (whole := state.pop(f"{last}norm1_context.linear.{kind}", None)) is not None:
            state[f"{last}norm1_context.linear_1.{kind}"] = whole.chunk(4)[0].clone()


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: latents are an eighth of a frame, and six frames; the text is padded."""
    assert not references, "Mochi has no editing models"
    rows, columns = call.get("height", 480) // 8, call.get("width", 848) // 8
    frames = (call.get("num_frames", 19) - 1) // 6 + 1
    text = call.get("max_sequence_length", config["max_sequence_length"])
    return {
        "hidden_states": (1, config["in_channels"], frames, rows, columns),
        "encoder_hidden_states": (1, text, config["text_embed_dim"]),
        "timestep": (1,),
        "encoder_attention_mask": (1, text),
    }


ADAPTER = Adapter(
    family="mochi",
    transformer="MochiTransformer3DModel",
    guidance="guidance_scale",
    remap=remap,
    models={"genmo/mochi-1-preview": {}},
    dtype="float32",
    others=(4_762_310_656, 459_748_611),
    example=example,
    stacks=(
        Stack(
            path=BLOCKS,
            depth_key="num_layers",
            returns=("image", "text"),
            ffn={"image": "ff", "text": "ff_context"},
            joint_attention="attn1",
            text_query=("attn1.add_q_proj", "attn1.norm_added_q"),
            text_out=("attn1.to_add_out",),
            # Not the text's: the last block has another one.
            modulation=("norm1.linear",),
        ),
    ),
)
