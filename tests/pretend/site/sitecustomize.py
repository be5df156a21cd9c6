"""Python imports this at its start where this folder is on PYTHONPATH: the process gets the pretended GPU."""

import importlib.util
from pathlib import Path

path = Path(__file__).parents[1] / "device.py"
spec = importlib.util.spec_from_file_location("pretend_device", path)
device = importlib.util.module_from_spec(spec)
try:
    spec.loader.exec_module(device)
    device.activate()
except Exception as error:
    # Without it Python would say so and go on, on the CPU.
    raise SystemExit(f"no pretended GPU: {error}") from error
