"""Chroma: dual-stream blocks, then many that run both streams as one; modulation is a table by the numbers of blocks.

Rows of `mod_proj` say which vector a small network makes, and the class fills them in by their numbers: three of each
single block, six of each dual one, six more of its text; the two last are those of the output. A shorter model has the
rows of its own blocks with its weights, so it is `custom`.
"""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack, TableRows

DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: a token is 16x16 pixels; the text is padded, and masked with the image behind it."""
    assert not references, "Chroma has no editing models"
    image = call.get("height", 1024) // 16 * (call.get("width", 1024) // 16)
    text = call.get("max_sequence_length", 512)
    return {
        "hidden_states": (1, image, config["in_channels"]),
        "encoder_hidden_states": (1, text, config["joint_attention_dim"]),
        "timestep": (1,),
        "img_ids": (image, 3),
        "txt_ids": (text, 3),
        "attention_mask": (1, text + image),
    }


ADAPTER = Adapter(
    family="chroma",
    transformer="ChromaTransformer2DModel",
    packs=True,
    shared=("img_ids", "txt_ids"),
    guidance="guidance_scale",
    tables={"time_text_embed.mod_proj": TableRows(((SINGLE, 3), (DUAL, 6), (DUAL, 6), (None, 2)))},
    models={"lodestones/Chroma1-HD": {}, "lodestones/Chroma1-Base": {}},
    others=(4_762_310_656, 83_819_683),
    decoding=1_541,
    example=example,
    stacks=(
        Stack(
            path=DUAL,
            depth_key="num_layers",
            ffn={"image": "ff", "text": "ff_context"},
            joint_attention="attn",
            text_query=("attn.add_q_proj", "attn.norm_added_q"),
            text_out=("attn.to_add_out",),
        ),
        Stack(path=SINGLE, depth_key="num_single_layers", text=None, returns=("image",)),
    ),
)
