"""LTX-Video, text to video: blocks of one stream that look at the text, and tabled modulation."""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: a token is 32x32 pixels of eight frames; the text is padded."""
    assert not references, "these make videos of text alone"
    frames = (call.get("num_frames", 161) - 1) // 8 + 1
    rows, columns = call.get("height", 512) // 32, call.get("width", 704) // 32
    text = call.get("max_sequence_length", 128)
    return {
        "hidden_states": (1, frames * rows * columns, config["in_channels"]),
        "encoder_hidden_states": (1, text, config["caption_channels"]),
        "timestep": (1,),
        "encoder_attention_mask": (1, text),
        **{"num_frames": frames, "height": rows, "width": columns},
    }


ADAPTER = Adapter(
    family="ltx_video",
    transformer="LTXVideoTransformer3DModel",
    guidance="guidance_scale",
    models={"Lightricks/LTX-Video": {}},
    dtype="float32",
    others=(4_762_310_656, 419_193_649),
    example=example,
    stacks=(
        Stack(
            path="transformer_blocks",
            depth_key="num_layers",
            text=None,
            returns=("image",),
            ffn={"image": "ff"},
        ),
    ),
)
