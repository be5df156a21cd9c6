"""Variants on disk: complete diffusers pipeline folders, saved, opened and verified.

A depth-only variant is `stock`: plain diffusers opens it. A width-pruned one is `custom`, and so is a shorter one whose
class has tables by the numbers of blocks: it carries a generated modelling file for `trust_remote_code=True`, and
`load_compressed` rebuilds it from its plan without running any code from the folder.
"""

import copy
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ppcl_toolkit import processes
from ppcl_toolkit.adapter import Adapter, adapter_of, home_of
from ppcl_toolkit.artifacts.classes import check_source, homes, library_of, pipeline_class, stock_class
from ppcl_toolkit.artifacts.files import MANIFEST, damage, put, read_manifest, sync, told, write_manifest
from ppcl_toolkit.errors import PpclError, PpclWarning
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.records import FileName, check_configs, read_record, reading
from ppcl_toolkit.running.capture import Streams, map_tensors
from ppcl_toolkit.running.placement import HOST, has_room
from ppcl_toolkit.surgery.assemble import Calls, example_calls, is_stock, narrow_blocks, own_tables, student_blocks
from ppcl_toolkit.surgery.modelling import write_modelling

Opens = Literal["stock", "custom"]
_CALLS = "block_calls.json"
"""Which only a custom variant has."""


class ShardIndex(BaseModel):
    """Which file has which weight, as `*.safetensors.index.json` says it."""

    weight_map: dict[str, FileName]


def save_variant(
    pipeline: DiffusionPipeline,
    transformer: nn.Module,
    plan: Plan,
    kwargs: Mapping[str, Any],
    folder: Path,
    *,
    adapter: str = "auto",
    texts: Mapping[str, str] = MappingProxyType({}),
) -> Opens:
    """Write `pipeline` with the student `transformer` of `plan` as a complete diffusers folder; return how it opens.

    `kwargs` is an example call of the transformer: the shapes of its block calls are stored. Types are kept. The folder
    appears by rename with a manifest of all its files, and must not exist before. `adapter` is that of the recipe,
    `texts` are further files. Raises `PpclError` when the plan does not fit the transformer.
    """
    if folder.exists():
        raise PpclError(f"{folder} exists already; a variant is written to a new folder")
    known = adapter_of(plan.family, adapter)
    blocks = student_blocks(transformer, known, plan)
    stock = stock_class(known)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    student = copy.copy(transformer)
    vars(student).pop("save_pretrained", None)
    shell: Any = copy.copy(pipeline)
    shell.register_modules(transformer=student)
    with processes.alone():
        shell.save_pretrained(partial)
    for config in [partial / "model_index.json", *partial.glob("*/config.json")]:
        _edit_json(config, {"_name_or_path": None})
    plan.save(partial / "plan.json")
    if not is_stock(known, plan):
        module, source = write_modelling(stock, blocks, own_tables(known, plan))
        (partial / "transformer" / f"{module}.py").write_text(source)
        name = f"Narrow{stock.__name__}"
        auto_map = {"AutoModel": f"{module}.{name}"}
        _edit_json(partial / "transformer" / "config.json", {"_class_name": name, "auto_map": auto_map})
        _edit_json(partial / "model_index.json", {"transformer": [module, name]})
        calls = example_calls(transformer, known, kwargs)
        (partial / _CALLS).write_text(json.dumps(_to_json(calls), indent=1) + "\n")
    for name, text in texts.items():
        (partial / name).write_text(text)
    write_manifest(partial)
    for path in partial.rglob("*"):
        sync(path)
    put(partial, folder)
    return "stock" if is_stock(known, plan) else "custom"


def load_compressed(
    folder: str | Path, *, adapter: Adapter | None = None, verify: bool = True, **options: Any
) -> DiffusionPipeline:
    """Open a variant; `options` are those of `DiffusionPipeline.from_pretrained`.

    A custom variant is rebuilt from its plan: no code from the folder runs. `adapter` is needed for families that
    are not installed by name. All files are compared with the manifest first, by name and size and, to `verify`, by
    SHA-256; a variant without one opens with a `PpclWarning`. Raises `PpclError` for what is no variant, or is broken,
    and names the file.
    """
    folder, options = Path(folder), {"use_safetensors": True, **options}
    check_manifest(folder, verify=verify)
    if not (folder / "model_index.json").is_file():
        raise PpclError(f"{folder} is no pipeline folder: it has no model_index.json")
    index = read_record(folder / "model_index.json", dict[str, Any])
    if not isinstance(index.get("_class_name"), str):
        raise PpclError(f"{folder / 'model_index.json'} is damaged or of something else: it has no _class_name")
    plan = Plan.load(folder / "plan.json")
    check_configs(folder)
    _check_weights(folder)
    _check_libraries(folder, index)
    try:
        if plan.is_depth_only and not (folder / _CALLS).is_file():
            check_source(folder / "model_index.json", index.get("transformer"), adapter)
            opened: DiffusionPipeline = pipeline_class(adapter).from_pretrained(folder, **options)
            return opened
        known = adapter or adapter_of(plan.family)
        transformer = _rebuild(folder, plan, known, options)
        return open_with(folder, index, transformer, options, pipeline_class(known))
    except PpclError as error:
        raise error if str(folder) in str(error) else PpclError(f"{folder}: {error}") from error
    except Exception as error:  # diffusers raises whatever its parts raise
        raise PpclError(f"{folder} cannot be opened: {first_line(error)}") from error


def check_manifest(folder: Path, *, verify: bool = True) -> None:
    """Raise `PpclError` where a variant's files are not as its manifest lists them; warn where it has none."""
    files = read_manifest(folder)
    if files is None and (folder / "plan.json").is_file():
        what = "an earlier version made it, or something else has saved it again"
        warnings.warn(f"{folder} has no {MANIFEST}, {what}: its files are not checked", PpclWarning, stacklevel=3)
    if wrong := damage(folder, files or {}, most=math.inf if verify else -1):
        raise PpclError(
            f"{folder} is not as it was exported: {told(wrong)}; export or copy it again, or delete "
            f"its {MANIFEST} where it was changed on purpose"
        )


def verify_variant(
    folder: Path,
    opens: Opens,
    kwargs: Mapping[str, Any],
    expected: Tensor,
    tolerance: float,
    *,
    device: torch.device = HOST,
    adapter: str = "auto",
) -> float:
    """Open a variant in a fresh process as its users will, run its transformer, and compare with `expected`.

    It runs on `device`, block by block where it does not fit there beside what this process has on it.

    Returns the largest absolute difference; beyond `tolerance` it is a `PpclError`. Loaded weights lie elsewhere in
    memory, so outputs may differ in the last bits. A custom variant is opened twice: while this package cannot be
    imported, and then by `load_compressed`.
    """
    worst = 0.0
    how = {"opens": opens, "adapter": adapter, "dtype": str(expected.dtype).split(".")[-1], "device": str(device)}
    for way, found in _run_elsewhere(folder, how, kwargs).items():
        if found.shape != expected.shape:
            raise PpclError(f"{folder}, opened as {way}, returns {list(found.shape)} for {list(expected.shape)}")
        difference = (found.double() - expected.detach().cpu().double()).abs().max().item()
        if not difference <= tolerance:
            raise PpclError(f"{folder}, opened as {way}, differs by {difference:.3g}, more than {tolerance:.3g}")
        worst = max(worst, difference)
    return worst


def _rebuild(folder: Path, plan: Plan, adapter: Adapter, options: Mapping[str, Any]) -> nn.Module:
    """Let diffusers load the weights into a class that narrows its blocks when it is made."""
    stock = stock_class(adapter)
    stored = folder / _CALLS
    with reading(stored):
        found = _from_json(read_record(stored, dict[str, list[Any]]))
        calls = {path: (arguments, Streams(*streams)) for path, (arguments, streams) in found.items()}
        if missing := [path for path in plan.depths if path not in calls]:
            raise PpclError(f"{stored} is damaged or of something else: it has no call of {missing[0]}")
    known = ("low_cpu_mem_usage", "disable_mmap", "use_safetensors")
    chosen = {name: options[name] for name in known if name in options}
    dtype = options.get("dtype", options.get("torch_dtype"))
    if isinstance(dtype, dict):
        dtype = dtype.get("transformer", dtype.get("default"))

    def narrowed(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, *args, **kwargs)
        self.__class__ = stock
        narrow_blocks(self, adapter, plan, calls)

    # Tracing asks torch for its functions, once a process; loaders put others in their place.
    torch.overrides.get_overridable_functions()
    narrowed.__signature__ = inspect.signature(stock.__init__)  # type: ignore[attr-defined]
    loader: Any = type(stock.__name__, (stock,), {"__init__": narrowed, "load_config": classmethod(_without_code)})
    model, report = loader.from_pretrained(folder / "transformer", output_loading_info=True, dtype=dtype, **chosen)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise PpclError(f"{folder / 'transformer'} does not fit its plan, {problem}: {report[problem][:4]}")
    assert not any(value.is_meta for value in model.state_dict().values())
    return model


def _without_code(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a config without what names the code of the class, which is not run: diffusers would complain of it."""
    found = super(cls, cls).load_config(*args, **kwargs)
    (found[0] if isinstance(found, tuple) else found).pop("auto_map", None)
    return found


def open_with(
    folder: Path,
    index: dict[str, Any],
    transformer: nn.Module,
    options: Mapping[str, Any],
    kind: type[DiffusionPipeline] = DiffusionPipeline,
) -> DiffusionPipeline:
    """Open the folder with `transformer` in place of its own, whose class diffusers would have to run code for."""
    with tempfile.TemporaryDirectory() as place:
        for entry in folder.iterdir():
            if entry.name not in ("model_index.json", "transformer"):
                Path(place, entry.name).symlink_to(entry.resolve())
        stock = type(transformer)
        index = {**index, "transformer": [library_of(stock), stock.__name__]}
        Path(place, "model_index.json").write_text(json.dumps(index))
        # Which parts may be given a pipeline's own class knows: Wan's transformer is an optional one.
        own = getattr(diffusers, str(index.get("_class_name")), None)
        if kind is DiffusionPipeline and isinstance(own, type) and issubclass(own, DiffusionPipeline):
            kind = own
        pipeline: Any = kind.from_pretrained(place, transformer=transformer, **options)
    pipeline.register_to_config(_name_or_path=str(folder))
    opened: DiffusionPipeline = pipeline
    return opened


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_libraries(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse parts of a pipeline that diffusers would import from anywhere else than from its own two libraries."""
    for name, part in index.items():
        library = part[0] if isinstance(part, list) and part and name != "transformer" else None
        # Others are lists of numbers that a pipeline takes.
        if isinstance(library, str) and library not in ("diffusers", "transformers"):
            raise PpclError(
                f"{folder / 'model_index.json'} takes {name} from {library!r}; diffusers or transformers may"
            )


def _check_weights(folder: Path) -> None:
    """Find files of weights that are missing or cut off, before a loader trips over them."""
    files = set(folder.glob("*/*.safetensors"))
    for index in folder.glob("*/*.safetensors.index.json"):
        files |= {index.parent / shard for shard in read_record(index, ShardIndex).weight_map.values()}
    if not any(file.parent.name == "transformer" for file in files):
        raise PpclError(f"{folder / 'transformer'} holds no *.safetensors")
    for file in sorted(files):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise PpclError(f"{file} is missing, cut off or corrupt: {error}") from error


_ELSEWHERE = """
import importlib, json, sys
place = sys.argv[1]
how = json.load(open(f"{place}/how.json"))
sys.modules["ppcl_toolkit"] = None  # importing it fails from here on
sys.path[:0] = how["homes"]
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
tensors, device = load_file(f"{place}/given.safetensors"), torch.device(how["device"])
def restore(value):
    if isinstance(value, dict):
        return tensors[value["tensor"]].to(device) if "tensor" in value else {k: restore(v) for k, v in value.items()}
    return [restore(item) for item in value] if isinstance(value, list) else value
kwargs = {**restore(json.load(open(f"{place}/given.json"))), "return_dict": False}
@torch.no_grad()
def run(pipeline):
    if how["offload"]:
        options = {"offload_type": "block_level", "num_blocks_per_group": 1}
        pipeline.transformer.enable_group_offload(onload_device=device, **options)
    else:
        pipeline.transformer.to(device)
    made = pipeline.transformer(**kwargs)[0]
    return (torch.stack(made) if isinstance(made, list) else made).cpu().contiguous()
folder, opens, options = how["folder"], how["opens"], {"dtype": getattr(torch, how["dtype"])}
module, _, name = how["pipeline"].partition(":")
kind = getattr(importlib.import_module(module), name) if name else DiffusionPipeline
outputs = {opens: run(kind.from_pretrained(folder, trust_remote_code=opens == "custom", **options))}
if opens == "custom":
    del sys.modules["ppcl_toolkit"]
    from ppcl_toolkit.artifacts.variant import load_compressed
    from ppcl_toolkit.adapter import import_beside, load_adapter
    import_beside(how["adapter"], how["home"])
    known = None if how["adapter"] == "auto" else load_adapter(how["adapter"])
    outputs["rebuilt"] = run(load_compressed(folder, adapter=known, **options))
save_file(outputs, f"{place}/outputs.safetensors")
"""


def _run_elsewhere(folder: Path, how: dict[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    known = adapter_of(Plan.load(folder / "plan.json").family, how["adapter"])
    # Beside the variant, where a run that is killed finds what is left of it.
    with tempfile.TemporaryDirectory(dir=folder.parent.resolve(), prefix=".", suffix=".partial") as place:
        tensors: dict[str, Tensor] = {}

        def keep(tensor: Tensor) -> dict[str, Any]:
            tensors[f"{len(tensors)}"] = tensor.detach().cpu().contiguous().clone()
            return {"tensor": f"{len(tensors) - 1}"}

        Path(place, "given.json").write_text(json.dumps(map_tensors(dict(kwargs), keep)))
        save_file(tensors, f"{place}/given.safetensors")
        weights = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
        how |= {"folder": str(folder.resolve()), "offload": not has_room(weights, torch.device(how["device"]))}
        how |= {"home": home_of(how["adapter"]), "homes": homes(known), "pipeline": known.pipeline or ""}
        Path(place, "how.json").write_text(json.dumps(how))
        # diffusers copies modelling files there before it runs them.
        environment = {**os.environ, "HF_MODULES_CACHE": f"{place}/modules", "PYTHONPATH": _absolute_path()}
        command = [sys.executable, "-c", _ELSEWHERE, place]
        done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip() or "no message").splitlines()[-1]
            raise PpclError(f"{folder} does not open as {how['opens']} in a fresh process: {reason}")
        return load_file(f"{place}/outputs.safetensors")


def _absolute_path() -> str:
    """Return PYTHONPATH as it was meant where this process began: another folder is another meaning."""
    given = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(str(Path(entry).absolute()) for entry in given.split(os.pathsep) if entry)


def _edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    """Set entries of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    kept = {key: value for key, value in content.items() if key not in changes or value is not None}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def _to_json(calls: Calls) -> dict[str, Any]:
    """Describe calls by the shapes and types of their tensors."""

    def describe(tensor: Tensor) -> dict[str, Any]:
        return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).split(".")[-1]}

    return {path: map_tensors([arguments, tuple(streams)], describe) for path, (arguments, streams) in calls.items()}


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(item) for item in value)
    if isinstance(value, dict) and value.keys() == {"shape", "dtype"}:
        dtype = getattr(torch, str(value["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise PpclError(f"block_calls.json: {value['dtype']!r} is no type of tensors")
        return torch.empty(value["shape"], dtype=dtype, device="meta")
    return {key: _from_json(item) for key, item in value.items()} if isinstance(value, dict) else value
