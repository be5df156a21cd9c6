"""Z-Image: two refiners, which stay, then blocks of one stream; the transformer is told how much there is of the image.

Latents and texts are lists with a tensor for each sample.
"""

from collections.abc import Mapping
from typing import Any

from ppcl_toolkit.adapter import Adapter, Stack


def example(config: Mapping[str, Any], call: Mapping[str, Any], references: int) -> dict[str, Any]:
    """Shapes of one call: latents are an eighth of the picture, a prompt is rarely longer than 128 tokens.

    Lists of one sample are tensors here.
    """
    assert not references, "Z-Image-Edit is another class"
    rows, columns = call.get("height", 1024) // 8, call.get("width", 1024) // 8
    text = min(call.get("max_sequence_length", 128), 128)
    return {
        "x": (1, config["in_channels"], 1, rows, columns),
        "t": (1,),
        "cap_feats": (1, text, config["cap_feat_dim"]),
    }


ADAPTER = Adapter(
    family="z_image",
    transformer="ZImageTransformer2DModel",
    latents="x",
    timestep="t",
    guidance="guidance_scale",
    unguided=0.0,
    negatives_last=True,
    models={"Tongyi-MAI/Z-Image-Turbo": {}, "Tongyi-MAI/Z-Image": {}},
    dtype="float32",
    others=(4_022_468_096, 83_819_683),
    decoding=1_541,
    example=example,
    stacks=(
        Stack(
            path="layers",
            depth_key="n_layers",
            image="x",
            text=None,
            returns=("image",),
            ffn={"image": "feed_forward"},
            modulation=("adaLN_modulation.0",),
        ),
    ),
)
