"""Chroma: dual-stream blocks, then many that run both streams as one; modulation is a table by the numbers of blocks.

Rows of `mod_proj` say which vector a small network makes, and the class fills them in by their numbers. A shorter model
has the rows of its own blocks with its weights, so it is `custom`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack

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


def rows(kept: Mapping[str, Sequence[int]], depths: Mapping[str, int]) -> list[int]:
    """Rows of the blocks that are kept: three of each single one, six of each dual one, six more of its text, two last.

    The two last are those of the output.
    """
    image = 3 * depths[SINGLE]
    text = image + 6 * depths[DUAL]
    last = text + 6 * depths[DUAL]
    found = [3 * block + row for block in kept[SINGLE] for row in range(3)]
    found += [start + 6 * block + row for start in (image, text) for block in kept[DUAL] for row in range(6)]
    return [*found, last, last + 1]


ADAPTER = Adapter(
    family="chroma",
    transformer="ChromaTransformer2DModel",
    packs=True,
    shared=("img_ids", "txt_ids"),
    guidance="guidance_scale",
    tables={"time_text_embed.mod_proj": rows},
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
