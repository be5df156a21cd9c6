"""Its adapter, in a file of its own: the other one is all that a variant needs to be opened."""

from ppcl_toolkit import Adapter
from ppcl_toolkit.adapter import Stack

ADAPTER = Adapter(
    family="own_dit",
    transformer="own_net:OwnDit",
    pipeline="own_net:OwnPipeline",
    latents="pixels",
    timestep="level",
    stacks=(
        Stack(
            path="trunk",
            depth_key="depth",
            image="tokens",
            text=None,
            returns=("image",),
            ffn={"image": "mlp"},
            modulation=("shift",),
        ),
    ),
)
