"""Mutation testing: every operator, number and condition of some files changed in turn, and their tests run on it.

    python tests/mutate.py statistics surgery --share 0.2 --seed 1

Each mutant lives in a forked child of a process that has imported the rest. What no test notices is printed.
"""

import argparse
import ast
import contextlib
import copy
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import pytest  # noqa: E402
import tiny  # noqa: E402, F401 - what takes seconds is imported once
import torch  # noqa: E402, F401

TESTS = {
    "statistics/chains": ["chains"],
    "statistics/cka": ["cka", "chains"],
    "statistics/lowrank": ["modulation"],
    "statistics/moments": ["moments"],
    "statistics/products": ["cka", "chains", "moments"],
    "statistics/trend": ["chains", "intervals"],
    "surgery/assemble": ["assemble", "modulation_variant", "variant"],
    "surgery/costs": ["costs"],
    "surgery/graph": ["graph", "narrow"],
    "surgery/likeness": ["likeness"],
    "surgery/modelling": ["variant", "modulation_variant"],
    "surgery/narrow": ["narrow", "modulation_variant"],
    "surgery/source": ["graph", "narrow"],
}
"""Which tests of tests/unit are to notice, the quickest first."""
OTHER: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.MatMult: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or,
    ast.Or: ast.And, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.Pow: ast.Mult, ast.USub: ast.UAdd,
}  # fmt: skip
SECONDS = 120


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what a node may become."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.UnaryOp | ast.AugAssign) and type(node.op) in OTHER:
        yield _with(node, op=OTHER[type(node.op)]())
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        yield _with(node, ops=[OTHER[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Return) and node.value is not None:
        yield _with(node, value=ast.Constant(None))
    elif isinstance(node, ast.Expr | ast.Raise) and not isinstance(getattr(node, "value", None), ast.Constant):
        yield ast.Pass()


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def mutants(tree: ast.AST) -> Iterator[tuple[ast.AST, ast.AST, str]]:
    """Yield what is changed, into what, and the source with it; annotations, messages and invariants are left out."""
    silent = (ast.JoinedStr, ast.Assert, ast.Import, ast.ImportFrom)
    waiting = [tree]
    while waiting:
        parent = waiting.pop()
        for name, value in ast.iter_fields(parent):
            if name in ("annotation", "returns", "decorator_list") or isinstance(parent, ast.Raise):
                continue
            inner = value if isinstance(value, list) else [value]
            for place, node in enumerate(inner):
                # Lengths that are equal anyway are no difference.
                strict = isinstance(node, ast.keyword) and node.arg == "strict"
                if strict or not isinstance(node, ast.AST) or isinstance(node, silent):
                    continue
                waiting.append(node)
                for new in changes(node):
                    setattr(parent, name, [*inner[:place], new, *inner[place + 1 :]] if inner is value else new)
                    yield node, new, ast.unparse(ast.fix_missing_locations(tree))
                    setattr(parent, name, value)


def killed(name: str, source: str) -> bool:
    """Return whether the tests of a file notice that it has another source."""
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        # Of this process alone: other work may slow it down. What waits for ever takes none.
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS)), signal.alarm(30 * SECONDS)
        module = f"ppcl_toolkit.{name.replace('/', '.')}"
        code = compile(source, str(ROOT / f"ppcl_toolkit/{name}.py"), "exec")
        _forget()
        with contextlib.suppress(BaseException):
            own = SourceFileLoader.get_code
            SourceFileLoader.get_code = lambda self, asked: code if asked == module else own(self, asked)
            os._exit(_tested(name))
        os._exit(9)
    _, status = os.waitpid(child, 0)
    return status != 0


def _tested(name: str) -> int:
    files = [str(ROOT / f"tests/unit/test_{test}.py") for test in TESTS[name]]
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *files]))


def _forget() -> None:
    """Let what is ours be imported again: the package, the tests and what they share."""
    places = tuple(str(ROOT / folder) for folder in ("ppcl_toolkit", "tests", "adapters"))
    ours = [name for name, module in sys.modules.items() if (getattr(module, "__file__", "") or "").startswith(places)]
    for name in [*ours, *(name for name in sys.modules if name.split(".")[0] == "ppcl_toolkit")]:
        if name != "__main__":
            sys.modules.pop(name, None)


def main() -> None:
    """Count, and print what survives."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "rooms", nargs="*", default=["statistics"], help="statistics, surgery, or a file: surgery/graph"
    )
    parser.add_argument("--share", type=float, default=1.0, help="of all mutants, at random")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10**6)
    given = parser.parse_args()
    os.chdir(ROOT)
    rng, until, every = random.Random(given.seed), time.monotonic() + 60 * given.minutes, [0, 0]
    for name in (each for each in TESTS for room in given.rooms if each.startswith(room)):
        source, counts = (ROOT / f"ppcl_toolkit/{name}.py").read_text(), [0, 0]
        # What they import is imported once, by a process that runs them and does not end.
        assert not _tested(name) and not killed(name, source), f"the tests of {name} fail as it is"
        for old, new, mutant in mutants(ast.parse(source)):
            if rng.random() >= given.share or time.monotonic() > until:
                continue
            dead = killed(name, mutant)
            counts = [counts[0] + 1, counts[1] + dead]
            if not dead:
                was, now = (ast.unparse(each).splitlines()[0][:70] for each in (old, new))
                print(f"  {name}.py:{getattr(old, 'lineno', 0)}: {was!r} -> {now!r}", flush=True)  # noqa: T201
        every = [a + b for a, b in zip(every, counts, strict=True)]
        print(f"{name}: {counts[1]} of {counts[0]} killed", flush=True)  # noqa: T201
    print(f"{every[1]} of {every[0]} killed, {every[1] / max(every[0], 1):.0%}")  # noqa: T201


if __name__ == "__main__":
    main()
