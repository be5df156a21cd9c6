"""Wan 2.1 and 2.2, text to video: blocks of one stream that look at the text, and tabled modulation.

Of Wan 2.2 the models of one transformer: the 14B has two, each for its part of the steps.
"""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: latents are an eighth of a frame, of Wan 2.2's autoencoder a sixteenth."""
    assert not references, "these make videos of text alone"
    pixels = 16 if config["in_channels"] == 48 else 8
    frames = (call.get("num_frames", 81) - 1) // 4 + 1
    rows, columns = call.get("height", 480) // pixels, call.get("width", 832) // pixels
    return {
        "hidden_states": (1, config["in_channels"], frames, rows, columns),
        "timestep": (1,),
        "encoder_hidden_states": (1, call.get("max_sequence_length", 512), config["text_dim"]),
    }


ADAPTER = Adapter(
    family="wan",
    transformer="WanTransformer3DModel",
    dtype="float32",
    guidance="guidance_scale",
    models={
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": {},
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": {
            "num_attention_heads": 24,
            "in_channels": 48,
            "out_channels": 48,
            "ffn_dim": 14336,
            "num_layers": 30,
        },
    },
    others=(5_680_910_336, 126_892_531),
    example=example,
    stacks=(Stack(path="blocks", depth_key="num_layers", text=None, returns=("image",), ffn={"image": "ffn"}),),
)
