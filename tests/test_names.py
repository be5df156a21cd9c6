"""The public names are what they say, whatever is imported before them."""

import importlib.util
import itertools
import subprocess
import sys

import pytest

import ppcl_toolkit

IMPORTS = (
    "import ppcl_toolkit.algorithm",
    "from ppcl_toolkit import export_target, compress",
    "from ppcl_toolkit import compress, Recipe, load_compressed",
)


@pytest.mark.parametrize("order", list(itertools.permutations(IMPORTS)), ids="; ".join)
def test_compress_is_a_function_in_any_order_of_imports(order):
    check = "assert callable(compress) and callable(export_target), (compress, export_target)"
    code = "; ".join([*order, "from ppcl_toolkit import export_target, compress", check, "import ppcl_toolkit as p"])
    code += "; assert p.compress is compress is p.algorithm.compress"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ppcl_toolkit.__all__)
def test_no_module_takes_the_place_of_a_public_name(name):
    assert not isinstance(getattr(ppcl_toolkit, name), type(ppcl_toolkit))
    assert importlib.util.find_spec(f"ppcl_toolkit.{name}") is None
