"""What may go beside the intervals and text runs that are detected."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import FfnSwap, Interval, Plan, TextRun
from ppcl_toolkit.recipe import Recipe, Width
from ppcl_toolkit.running.schedule import Runner
from ppcl_toolkit.surgery.costs import Costs
from ppcl_toolkit.training.substitution import Candidate

_KINDS = {"interval": "intervals", "text_run": "text streams", "ffn_swap": "blocks' FFNs"}


def ffn_candidates(runner: Runner, width: Width) -> list[FfnSwap]:
    """Return every block whose FFNs may become linear."""
    if not width.ffn_blocks:
        return []
    found = []
    for stack in runner.adapter.stacks:
        for index, block in enumerate(stack.blocks(runner.transformer)):
            # Blocks of one stack may differ: the last one of SD3 has no text FFN.
            modules = dict(block.named_modules())
            streams = tuple(stream for stream, path in stack.ffn.items() if path in modules)
            if streams:
                found.append(FfnSwap(stack=stack.path, block=index, streams=streams))
    return found


def allowed(
    candidates: Iterable[Candidate], plan: Plan, costs: Costs, given: Collection[Candidate] = ()
) -> tuple[list[Candidate], list[str]]:
    """Return the candidates that the architecture allows, and for every stack and kind why others are left out.

    Those that are `given` stay: where they cannot be, that is an error, which comes when they are measured.
    """
    found, refused = [], defaultdict(list)
    for candidate in candidates:
        try:
            if candidate not in given:
                costs(plan.with_operations([candidate]))
            found.append(candidate)
        except PpclError as error:
            refused[candidate.stack, candidate.kind].append(str(error))
    said = [
        f"{len(reasons)} {_KINDS[kind]} of {stack} cannot go and are left out: {reasons[0]}"
        for (stack, kind), reasons in refused.items()
    ]
    return found, said


def more_candidates(runner: Runner, plan: Plan, found: Sequence[Candidate], recipe: Recipe) -> Iterator[Candidate]:
    """Yield what a program tries beside what was found, and what of that the recipe has not given."""
    if recipe.intervals.strategy != "given":
        for stack, depth in plan.depths.items():
            kinds = [type(block) for block in runner.blocks(stack)]
            for first in range(recipe.intervals.first_block.get(stack, 0), depth):
                for last in range(first + 1, min(first + recipe.select.longest, depth)):
                    # Between blocks that are narrow already, some return more than others.
                    if len(set(kinds[first : last + 1])) == 1:
                        yield Interval(stack=stack, first=first, last=last)
    for operation in found if not recipe.width.given else ():
        yield from _parts(operation, recipe.width.text_blocks)


def _parts(operation: Candidate, most: int) -> Iterator[Candidate]:
    """Yield what is in a text run, up to `most` blocks, and FFNs without the text's."""
    if isinstance(operation, TextRun):
        for reference in range(operation.reference, operation.last):
            for last in range(reference + 1, min(reference + most, operation.last) + 1):
                yield TextRun(stack=operation.stack, reference=reference, last=last)
    elif isinstance(operation, FfnSwap) and len(operation.streams) > 1:
        yield operation.model_copy(update={"streams": tuple(s for s in operation.streams if s != "text")})
