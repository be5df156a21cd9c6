"""Published PPCL checkpoints of Qwen-Image, read as variants of this toolkit.

They are diffusers folders for a model file that is not part of diffusers. Its blocks are numbered without gaps, after
depth pruning, so the plan made here is for a teacher of that depth. Three lists in `transformer/config.json` say what
else changed:

- `single_stream_index`: blocks without a text stream of their own. Each takes the text that entered the attention of
  the last block before it that has one, z, as `z + txt_proj(z)`.
- `ehs_proj_index`: of those, the blocks that write the text stream, `h + ehs_proj(h)`; the others hand it on.
- `ffn_proj_index`: blocks whose feed-forward networks are `g + img_ffn_proj(g)` and `g + txt_ffn_proj(g)`, with halved
  modulations.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ppcl_toolkit.adapter import Adapter, load_adapter
from ppcl_toolkit.artifacts.pipeline import quiet
from ppcl_toolkit.artifacts.variant import Opens, ShardIndex, open_with, save_variant
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Plan, TextRun
from ppcl_toolkit.records import read_record
from ppcl_toolkit.surgery.assemble import example_calls, narrow_blocks, student_blocks

KEYS = ("single_stream_index", "ffn_proj_index", "ehs_proj_index")
_NAMES = {"linear_text_z": "txt_proj", "linear_ffn_image": "img_ffn_proj", "linear_ffn_text": "txt_ffn_proj"}
_TEXT_END = "linear_text_h"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def import_published(source: Path, out: Path, *, pipeline: str | None = None) -> tuple[Plan, Opens]:
    """Write the published checkpoint in `source` as a variant; return its plan and how it opens.

    `source` is a pipeline folder, or a transformer's alone: `pipeline`, a folder or hub id, then gives the other parts.
    What no longer matters in a replaced text stream, its queries and its output projection, is left behind.
    Raises `PpclError` for anything else than a complete, consistent checkpoint of this format.
    """
    if out.exists():
        raise PpclError(f"{out} exists already; a variant is written to a new folder")
    whole = (source / "model_index.json").is_file()
    if not whole and pipeline is None:
        raise PpclError(f"{source} is no pipeline folder; if it is a transformer's, --pipeline gives the other parts")
    folder = source / "transformer" if whole else source
    config = read_config(folder)
    plan = plan_of(config, str(source))
    with quiet():
        transformer = build(plan, config, load_weights(folder))
        opened = _open_rest(str(source) if pipeline is None else pipeline, transformer)
        if not type(opened).__name__.startswith("QwenImage"):
            raise PpclError(f"{pipeline or source} is a {type(opened).__name__}, and the checkpoint is of Qwen-Image")
        opens = save_variant(opened, transformer, plan, example_call(transformer), out)
    return plan, opens


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a published transformer; one of another format is a `PpclError`."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise PpclError(f"{path} cannot be read: {error}") from error
    stock = load_adapter("qwen_image").transformer
    if not isinstance(config, dict) or config.get("_class_name") != stock:
        raise PpclError(f"{path} is not of a {stock}: only published Qwen-Image checkpoints can be imported")
    if missing := [key for key in KEYS if key not in config]:
        raise PpclError(f"{path} has no {', '.join(missing)}: it is not in the published pruning format")
    return config


def plan_of(config: Mapping[str, Any], teacher: str) -> Plan:
    """Return the plan by which a teacher of the checkpoint's own depth becomes the checkpoint."""
    (stack,) = load_adapter("qwen_image").stacks
    single, ffn, ends = (_indices(config, key) for key in KEYS)
    if 0 in single:
        raise PpclError("single_stream_index holds 0, and no block before it has a text stream to take from")
    if stray := sorted(ends - single):
        raise PpclError(f"ehs_proj_index holds {stray}, which single_stream_index lacks")
    runs = [TextRun(stack=stack.path, reference=r, last=last) for r, last in _runs(sorted(single))]
    for run in runs:
        if len(inside := sorted(i for i in ends if run.reference < i <= run.last)) > 1:
            raise PpclError(f"ehs_proj_index holds {inside}: blocks {run.reference + 1} to {run.last} write text twice")
    swaps = [
        FfnSwap(stack=stack.path, block=i, streams=("image",) if i in single else ("image", "text"))
        for i in sorted(ffn)
    ]
    imported = {"imported": "published Qwen-Image pruning format", **{key: list(config[key]) for key in KEYS}}
    return Plan(
        family="qwen_image",
        teacher=teacher,
        depths={stack.path: _depth(config)},
        operations=(*runs, *swaps),
        history=(imported,),
    )


def build(plan: Plan, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """Return the narrow transformer of `plan` with the published `weights`, in their own types."""
    adapter = load_adapter(plan.family)
    (stack,) = adapter.stacks
    stock = getattr(diffusers, adapter.transformer)
    known = {key: value for key, value in config.items() if key not in KEYS and not key.startswith("_")}
    # Blocks hold most weights, and theirs come from the file; what surrounds them has constants that no file has.
    transformer = stock.from_config({**known, stack.depth_key: 0}).to(next(iter(weights.values())).dtype)
    with torch.device("meta"):
        full = stock.from_config(known)
    transformer.set_submodule(stack.path, stack.blocks(full))
    transformer.register_to_config(**{stack.depth_key: _depth(config)})
    narrow_blocks(transformer, adapter, plan, example_calls(transformer, adapter, example_call(transformer)))
    transformer.load_state_dict(_renamed(transformer, adapter, plan, weights), strict=True, assign=True)
    return transformer.eval().requires_grad_(False)


def example_call(transformer: nn.Module) -> dict[str, Any]:
    """Return a small call of a Qwen-Image transformer; only its shapes matter."""
    config: Any = transformer.config
    like = next(transformer.parameters())
    return {
        "hidden_states": like.new_zeros(1, 4, config.in_channels),
        "encoder_hidden_states": like.new_zeros(1, 3, config.joint_attention_dim),
        "timestep": like.new_ones(1),
        "img_shapes": [[(1, 2, 2)]],
        "return_dict": False,
    }


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Read every tensor of a transformer's folder; missing, cut off and pickled files are a `PpclError`."""
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        files = sorted({folder / shard for shard in read_record(index, ShardIndex).weight_map.values()})
    if not files:
        raise PpclError(f"{folder} holds no *.safetensors; pickled weights (*.bin) are not read")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            weights.update(load_file(file))
        except (OSError, SafetensorError) as error:
            raise PpclError(f"{file} is missing, cut off or corrupt: {error}") from error
    if not weights:
        raise PpclError(f"{files[0]} holds no tensors")
    return weights


def _indices(config: Mapping[str, Any], key: str) -> set[int]:
    found, depth = config[key], _depth(config)
    if not isinstance(found, list) or not all(type(index) is int and 0 <= index < depth for index in found):
        raise PpclError(f"{key} is {found!r}: expected a list of block numbers from 0 to {depth - 1}")
    if len(set(found)) < len(found):
        raise PpclError(f"{key} is {found!r}: a block is listed twice")
    return set(found)


def _depth(config: Mapping[str, Any]) -> int:
    depth = config.get("num_layers")
    if type(depth) is not int or depth < 1:
        raise PpclError(f"num_layers is {depth!r}: expected the number of blocks")
    return depth


def _runs(single: list[int]) -> Iterator[tuple[int, int]]:
    """Yield reference and last block of every group of consecutive blocks without a text stream."""
    for index in single:
        if index - 1 not in single:
            last = index
            while last + 1 in single:
                last += 1
            yield index - 1, last


def _renamed(transformer: nn.Module, adapter: Adapter, plan: Plan, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the published tensors the names of the transformer; what remains or is missing is a `PpclError`."""
    published = _published_names(transformer, adapter, plan)
    if missing := [name for name in published.values() if name is not None and name not in weights]:
        raise PpclError(f"the checkpoint lacks {len(missing)} tensors: {', '.join(missing[:4])}")
    (stack,) = adapter.stacks
    narrow = [index for index, form in enumerate(plan.forms()) if form.narrow_text]
    dead = tuple(f"{stack.path}.{i}.{path}." for i in narrow for path in (*stack.text_query, *stack.text_out))
    known = set(published.values())
    if unexpected := [name for name in weights if name not in known and not name.startswith(dead)]:
        raise PpclError(f"the checkpoint has {len(unexpected)} unexpected tensors: {', '.join(unexpected[:4])}")
    state = {}
    like = next(iter(weights.values()))
    for name, wanted in transformer.state_dict().items():
        origin = published[name]
        # A run that writes no text hands it on: h + 0 h.
        state[name] = like.new_zeros(wanted.shape) if origin is None else weights[origin]
        if state[name].shape != wanted.shape:
            shapes = f"{list(state[name].shape)}, and its indices ask for {list(wanted.shape)}"
            raise PpclError(f"{origin} of the checkpoint is {shapes}")
    return state


def _published_names(transformer: nn.Module, adapter: Adapter, plan: Plan) -> dict[str, str | None]:
    """Return the published name of each of the transformer's tensors; None for one that the format leaves out."""
    (stack,) = adapter.stacks
    names: dict[str, str | None] = {name: name for name in transformer.state_dict()}
    ends = plan.history[-1][KEYS[2]]
    first = 0
    for index, (block, form) in enumerate(student_blocks(transformer, adapter, plan)):
        first = first if form.narrow_text else index
        for name in block.state_dict():
            linear, _, part = name.partition(".")
            path = f"{stack.path}.{index}.{name}"
            if linear in _NAMES:
                names[path] = f"{stack.path}.{index}.{_NAMES[linear]}.{part}"
            elif linear == _TEXT_END:
                # Blocks inside a run do not read the text stream, so it does not matter which of them writes it.
                writer = next((i for i in ends if first < i <= index), None)
                names[path] = None if writer is None else f"{stack.path}.{writer}.ehs_proj.{part}"
    return names


def _open_rest(path: str, transformer: nn.Module) -> DiffusionPipeline:
    """Open the pipeline at `path` around `transformer`; its other parts keep the types they are stored in."""
    folder = Path(path)
    dtype = next(transformer.parameters()).dtype
    try:
        if not folder.exists():
            return DiffusionPipeline.from_pretrained(path, transformer=transformer, dtype=dtype)
        index = read_record(folder / "model_index.json", dict[str, Any])
        dtypes = {name: _stored_dtype(folder / name) or dtype for name in index if not name.startswith("_")}
        return open_with(folder, index, transformer, {"dtype": {**dtypes, "default": dtype}})
    except Exception as error:  # diffusers raises whatever its parts raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PpclError(f"{path} cannot be opened as a pipeline around the transformer: {reason}") from error


def _stored_dtype(folder: Path) -> torch.dtype | None:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a dict
        return next((_DTYPES[name] for name in _DTYPES if name in found), None)
    return None
