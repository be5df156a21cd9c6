"""Lumina-Image 2.0: two refiners side by side, which stay, then blocks of one stream.

It looks at the numbers of a mask, so there is no `example`: without weights there are none.
"""

from ppcl_toolkit.adapter import Adapter, Stack

ADAPTER = Adapter(
    family="lumina2",
    transformer="Lumina2Transformer2DModel",
    guidance="guidance_scale",
    models={"Alpha-VLLM/Lumina-Image-2.0": {"cap_feat_dim": 2304}},
    others=(2_614_341_888, 83_819_683),
    stacks=(
        Stack(
            path="layers",
            depth_key="num_layers",
            text=None,
            returns=("image",),
            ffn={"image": "feed_forward"},
            modulation=("norm1.linear",),
        ),
    ),
)
