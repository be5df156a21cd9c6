"""Stage `export`: a variant from teacher and bank, as a folder that opens in diffusers, proved by opening it.

export: {dtype: bfloat16}
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl_toolkit.artifacts.card import write_card
from ppcl_toolkit.artifacts.pipeline import CALL, quiet
from ppcl_toolkit.artifacts.storage import Desk
from ppcl_toolkit.artifacts.variant import save_variant, verify_variant
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Plan
from ppcl_toolkit.running.capture import map_tensors
from ppcl_toolkit.running.placement import HOST, computing_on, moved
from ppcl_toolkit.running.schedule import Batch
from ppcl_toolkit.surgery.graph import sharing_copy

_RECORD = "variant.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One student as a pipeline folder."""

    name: str
    folder: Path
    plan: Plan
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
        found: dict[str, Any] = json.loads((record / _RECORD).read_text())
        return {"name": self.name, "path": str(self.folder), **found}


def export(
    pipeline: Any, student: nn.Module, variant: Variant, example: Batch, desk: Desk, *, device: torch.device = HOST
) -> None:
    """Write a variant's pipeline folder, and open it again in fresh processes to compare what it computes on `device`.

    The student is left as it is.
    """
    with quiet():
        _export(pipeline, student, variant, example, desk, device)


def _export(
    pipeline: Any, student: nn.Module, variant: Variant, example: Batch, desk: Desk, device: torch.device
) -> None:
    shutil.rmtree(variant.folder, ignore_errors=True)
    variant.folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, variant.dtype)
    student = sharing_copy(student).eval().requires_grad_(False).to(dtype)
    example = {
        name: map_tensors(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        for name, value in example.items()
    }
    with torch.no_grad(), computing_on(student, device):
        expected = student(**moved(example, device))[0].cpu()
    opens = save_variant(pipeline, student, variant.plan, example, variant.folder, adapter=variant.adapter)
    (variant.folder / CALL).write_text(json.dumps(dict(variant.call), indent=2) + "\n")
    (variant.folder / "README.md").write_text(write_card(variant.name, variant.plan, variant.covered))
    desk.progress(1, 2, "written")
    # Loaded weights lie elsewhere in memory, and kernels may round otherwise: half the digits must agree.
    tolerance = torch.finfo(dtype).eps ** 0.5 * float(expected.abs().max())
    difference = verify_variant(
        variant.folder, opens, example, expected, tolerance, device=device, adapter=variant.adapter
    )
    (desk.folder / _RECORD).write_text(json.dumps({"opens": opens, "difference": difference}))
    desk.progress(2, 2, "verified in a fresh process")
