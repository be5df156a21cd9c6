"""Stage `export`: a variant from teacher and bank, as a folder that opens in diffusers, proved by opening it.

What it computes there is compared with the teacher in which the trained blocks stand at their places: not with itself.

export: {dtype: bfloat16}
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ppcl_toolkit.adapter import Adapter
from ppcl_toolkit.artifacts.card import write_card
from ppcl_toolkit.artifacts.files import CARD, MANIFEST, damage, digest, read_manifest, write_json
from ppcl_toolkit.artifacts.pipeline import CALL, quiet
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.artifacts.variant import Opens, save_variant, verify_variant
from ppcl_toolkit.checking.in_place import called_in_place
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.records import read_record
from ppcl_toolkit.running.capture import map_tensors
from ppcl_toolkit.running.placement import HOST
from ppcl_toolkit.running.schedule import Batch
from ppcl_toolkit.surgery.assemble import is_stock
from ppcl_toolkit.surgery.copies import sharing_copy

_RECORD = "variant.json"


class Exported(BaseModel):
    """What `variant.json` holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    opens: Opens
    difference: float
    """Largest absolute difference to what was trained, opened again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One student as a pipeline folder."""

    name: str
    folder: Path
    plan: Plan
    """In the block numbers of the first teacher, with all that was done before."""
    step: Plan
    """What this run adds, in the block numbers of its teacher."""
    dtype: str
    """Of the transformer on disk; the other parts stay as the teacher's are."""
    call: Mapping[str, Any]
    """Arguments of the pipeline that it was compressed for."""
    covered: Mapping[str, Any] = field(default_factory=dict)
    """What the calibration of its modulation covered, for the model card."""
    adapter: str = "auto"
    """That of the recipe."""

    def read(self, record: Path) -> dict[str, Any]:
        """Return {"name", "path", "opens", "difference"} of an exported variant; a missing folder is a `PpclError`."""
        if not (self.folder / "model_index.json").is_file():
            raise PpclError(f"{self.folder} is gone; delete {record} to export it again")
        found: Exported = read_record(record / _RECORD, Exported)
        return {"name": self.name, "path": str(self.folder), **found.model_dump()}

    def damage(self, record: Path, most: float) -> dict[str, str]:
        """Return what is not as it was exported; files are hashed where all together have at most `most` bytes."""
        exported = read_manifest(record)
        if exported is None:  # by an earlier version
            return {}
        if not (self.folder / MANIFEST).is_file():
            return {str(self.folder / MANIFEST): "is missing"}
        if digest(self.folder / MANIFEST) != digest(record / MANIFEST):
            return {str(self.folder / MANIFEST): "is not that of this export"}
        wrong = damage(self.folder, exported, most=most)
        return {str(self.folder / name): what for name, what in wrong.items()}


def export(
    taught: tuple[Any, Adapter],
    student: nn.Module,
    variant: Variant,
    example: Batch,
    desk: Desk,
    *,
    device: torch.device = HOST,
) -> None:
    """Write a variant's pipeline folder, and open it again in fresh processes to compare what it computes on `device`.

    `taught` are the teacher's pipeline and its adapter. The student is left as it is. Raises `PpclError` where the
    folder computes something else than the teacher with the student's blocks in place.
    """
    with quiet():
        _export(taught, student, variant, example, desk, device)


def _export(
    taught: tuple[Any, Adapter], student: nn.Module, variant: Variant, example: Batch, desk: Desk, device: torch.device
) -> None:
    pipeline, adapter = taught
    shutil.rmtree(variant.folder, ignore_errors=True)
    variant.folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, variant.dtype)
    student = sharing_copy(student).eval().requires_grad_(False).to(dtype)
    example = {
        name: map_tensors(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        for name, value in example.items()
    }
    expected = called_in_place(pipeline.transformer, adapter, variant.step, student, example, device)
    texts = {
        CALL: json.dumps(dict(variant.call), indent=2) + "\n",
        CARD: write_card(variant.name, variant.plan, variant.covered, stock=is_stock(adapter, variant.plan)),
    }
    opens = save_variant(pipeline, student, variant.plan, example, variant.folder, adapter=variant.adapter, texts=texts)
    desk.progress(1, 2, "written")
    # Loaded weights lie elsewhere in memory, and kernels may round otherwise: half the digits must agree.
    tolerance = torch.finfo(dtype).eps ** 0.5 * float(expected.abs().max())
    difference = verify_variant(
        variant.folder, opens, example, expected, tolerance, device=device, adapter=variant.adapter
    )
    write_json(desk.folder / _RECORD, Exported(opens=opens, difference=difference).model_dump())
    # What the run knows the variant by.
    shutil.copy(variant.folder / MANIFEST, desk.folder)
    desk.progress(2, 2, "verified in a fresh process")
