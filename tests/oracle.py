"""A process that knows diffusers alone: it opens variants and answers recorded calls, one line of JSON each.

Run as `python oracle.py`; a line `{"folder", "call", "answer", "trust"}` names a variant, files of one call of a
transformer and of what this one makes of it, and whether its own code may run. What comes back is `{"kind", "error"}`.
"""

import json
import sys
from typing import Any

import torch
from diffusers import DiffusionPipeline


@torch.no_grad()
def answer(folder: str, call: str, into: str, *, trust: bool) -> str:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, trust_remote_code=trust)
    pipeline.transformer.requires_grad_(False)  # by which torch chooses how it multiplies, gradients or not
    made = pipeline.transformer(**torch.load(call))[0]
    torch.save(torch.stack(made) if isinstance(made, list) else made, into)
    return type(pipeline.transformer).__module__


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        said = {"kind": "", "error": ""}
        try:
            said["kind"] = answer(asked["folder"], asked["call"], asked["answer"], trust=asked["trust"])
        except Exception as error:  # reported where the test is
            said["error"] = f"{type(error).__name__}: {error}"
        assert not any(name.startswith("ppcl") for name in sys.modules)
        sys.stdout.write(f"{json.dumps(said)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
