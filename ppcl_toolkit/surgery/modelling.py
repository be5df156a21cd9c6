"""The modelling file of a variant that is no stock model: what is narrow in it as code, for readers and diffusers."""

import hashlib
import inspect
import string
import textwrap
from collections.abc import Sequence

from ppcl_toolkit.plan import Form
from ppcl_toolkit.surgery.narrow import Blueprint, NarrowBlock, bypass, keep_tables, reshape_block

_WIDTH = 116
_FILE = string.Template('''\
"""$name: $stock with narrow blocks, written by ppcl-toolkit.

$what

It needs torch and diffusers, and opens with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.
"""

import inspect
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from $library import $stock
$imports
from torch import Tensor, nn


$helpers


$classes


NARROW_BLOCKS = {
$table
}


class $name($stock):
    """$stock whose blocks in NARROW_BLOCKS are narrow."""

    _auto_class = "AutoModel"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for path, narrow in NARROW_BLOCKS.items():
            for index, kind in narrow.items():
                block = self.get_submodule(path)[index]
                reshape_block(block, kind.removed, kind.bypassed, kind.shrunk, kind.added, kind.factored)
                block.__class__ = kind
$tables
    # diffusers reads off the signature which entries of config.json belong here.
    __init__.__signature__ = inspect.signature($stock.__init__)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save the weights, and this file beside them."""
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(__file__, Path(save_directory, "@MODULE@.py"))


# The name under which diffusers looks for this file: inside its cache the module is called otherwise.
$name.__module__ = "@MODULE@"
''')

_CLASS = string.Template('''\
class $name($base):
    """$where."""

    removed = $removed
    bypassed = $bypassed
    shrunk = $shrunk
    added = $added
    factored = $factored
$forward

$name.__name__ = "$base"  # diffusers knows blocks by the name of their class''')


def write_modelling(
    stock: type, blocks: Sequence[tuple[object, Form]], tables: tuple[str, ...] = ()
) -> tuple[str, str]:
    """Return the name of a module that defines `Narrow<stock>` and its source; `blocks` are a student's, in order.

    `tables` are the paths of buffers that its file of weights has.

    The name contains a hash, because diffusers keeps the modelling files of all variants in one place.
    """
    names: dict[tuple[type, Blueprint], str] = {}
    found: dict[str, list[Form]] = {}
    table: dict[str, dict[int, str]] = {}
    position = {form.stack: 0 for _, form in blocks}
    for block, form in blocks:
        if isinstance(block, NarrowBlock):
            kind = (type(block).__bases__[0], block.blueprint)
            name = names.setdefault(kind, f"{kind[0].__name__}Narrow{len(names) + 1}")
            found.setdefault(name, []).append(form)
            table.setdefault(form.stack, {})[position[form.stack]] = name
        position[form.stack] += 1
    bases = sorted({(base.__module__, base.__name__) for base, _ in names})
    helpers = (bypass, reshape_block, *((keep_tables,) if tables else ()))
    source = _FILE.substitute(
        name=f"Narrow{stock.__name__}",
        stock=stock.__name__,
        library="diffusers" if stock.__module__.startswith("diffusers.") else stock.__module__,
        what=_summarise([form for _, form in blocks], tables),
        imports="\n".join(f"from {module} import {name}" for module, name in bases),
        helpers="\n\n".join(inspect.getsource(function) for function in helpers).rstrip(),
        classes="\n\n\n".join(_write_class(name, *kind, found[name]) for kind, name in names.items()),
        table="\n".join(_write_row(path, row) for path, row in table.items()),
        tables=f"        keep_tables(self, {tables!r})\n" if tables else "",
    )
    module = f"modeling_narrow_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    return module, source.replace("@MODULE@", module)


def _write_class(name: str, base: type, blueprint: Blueprint, forms: list[Form]) -> str:
    return _CLASS.substitute(
        name=name,
        base=base.__name__,
        where=_describe(forms),
        removed=repr(blueprint.removed),
        bypassed=repr(blueprint.bypassed),
        shrunk=repr(blueprint.shrunk),
        added=repr(blueprint.added),
        factored=repr(blueprint.factored),
        forward="".join(f"\n    {line}".rstrip(" ") for line in blueprint.source.splitlines()),
    )


def _write_row(path: str, row: dict[int, str]) -> str:
    entries = "".join(f"        {index}: {name},\n" for index, name in row.items())
    return f'    "{path}": {{\n{entries}    }},'


def _summarise(forms: Sequence[Form], tables: tuple[str, ...]) -> str:
    said = []
    if any(form.narrow_text or form.ffn for form in forms):
        said.append(
            "Text streams and feed-forward networks of some blocks are linear maps here (Eq. 8 and 9 of arXiv "
            "2511.16156, PPCL)."
        )
    if any(form.modulation for form in forms):
        said.append("Modulation layers of blocks are of low rank: two small linear maps in place of a large one.")
    if tables:
        said.append(f"Blocks are gone, and {', '.join(tables)} has the rows of those that are left.")
    return textwrap.fill(" ".join(said), _WIDTH)


def _describe(forms: list[Form]) -> str:
    texts = {
        "own": "",
        "tap": "the text that enters its attention is handed on",
        "inside": "its text comes from an earlier block",
        "end": "its text comes from an earlier block, and the text stream resumes here",
    }
    parts = [texts[forms[0].text], f"linear {' and '.join(forms[0].ffn)} FFN" if forms[0].ffn else ""]
    parts.append(f"modulation of rank {forms[0].modulation}" if forms[0].modulation else "")
    blocks = ", ".join(f"{form.first}" if form.first == form.last else f"{form.first}-{form.last}" for form in forms)
    text = f"{forms[0].stack} {blocks} of the teacher: {', '.join(part for part in parts if part)}"
    return textwrap.fill(text, _WIDTH - 8, subsequent_indent="    ")
