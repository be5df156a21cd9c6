"""Students from a transformer and a plan: blocks dropped and narrowed in place, weights of a bank loaded."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Adapter, Stack
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Form, Interval, Plan
from ppcl_toolkit.running.capture import Arguments, Streams, stack_calls
from ppcl_toolkit.running.meta import without_data
from ppcl_toolkit.running.placement import device_of, moved
from ppcl_toolkit.surgery.copies import meta_copy, sharing_copy
from ppcl_toolkit.surgery.narrow import NarrowBlock, keep_tables, low_rank, narrow

Calls = dict[str, tuple[Arguments, Streams]]
"""An example call of a block of each stack, by the stack's path."""


@torch.no_grad()
def example_calls(transformer: nn.Module, adapter: Adapter, kwargs: Mapping[str, Any]) -> Calls:
    """Record how `transformer(**kwargs)` calls the first block of each stack, on the meta device; no block is run."""
    kwargs = moved(dict(kwargs), device_of(transformer, adapter))
    calls: Calls = {}
    before = None
    for stack in adapter.stacks:
        with without_data():
            recorded = stack_calls(transformer, adapter, stack.path, kwargs, before)
        calls[stack.path] = moved((recorded.arguments[0], recorded.streams), torch.device("meta"))
        # Shapes are all that matters here, and a stack does not change those of its streams.
        before = recorded.streams
    return calls


def reshape(transformer: nn.Module, adapter: Adapter, plan: Plan, kwargs: Mapping[str, Any]) -> None:
    """Turn a teacher into the student of `plan`, in place: fewer blocks, narrow blocks, and the teacher's weights.

    An interval keeps the weights of its first block; a new linear map is zero. `kwargs` is an example call. It works
    without weights (meta device) too. An empty plan changes nothing.
    """
    calls = example_calls(transformer, adapter, kwargs)
    drop_blocks(transformer, adapter, plan)
    narrow_blocks(transformer, adapter, plan, calls)


def student_of(
    transformer: nn.Module,
    adapter: Adapter,
    plan: Plan,
    bank: Mapping[str, Mapping[str, Tensor]],
    kwargs: Mapping[str, Any],
) -> nn.Module:
    """Return the student of `plan`: a teacher's blocks, and the bank's where the plan has other forms.

    What is the teacher's shares its memory: who trains the student gives it weights of its own first.
    """
    student = sharing_copy(transformer)
    reshape(student, adapter, plan, kwargs)
    load_bank(student, adapter, plan, bank)
    return student


def drop_blocks(transformer: nn.Module, adapter: Adapter, plan: Plan) -> None:
    """Keep one block of each interval of `plan`, in place; what is left is a stock model of the config it then has.

    A table of the adapter is the exception: its rows are not those of the stock class, and are weights from then on.

    Raises `PpclError` when the plan was made for another depth, or when the stock class of the new depth has other
    weights and the adapter has no `remap`.
    """
    depths = adapter.depths(transformer)
    if plan.depths != depths:
        raise PpclError(f"the plan is for a teacher with blocks {plan.depths}, this one has {depths}")
    if not plan.intervals:
        return
    model: Any = transformer
    # diffusers passes over the entries it believes to be defaults, whatever they are.
    config = {**model.config, "_use_default_values": []}
    kept = plan.kept()
    for stack in adapter.stacks:
        blocks = stack.blocks(transformer)
        for index in reversed(range(len(blocks))):
            if index not in kept[stack.path]:
                del blocks[index]
        config.update(_renumbered(stack, config, kept[stack.path]))
    _cut_tables(transformer, adapter, plan)
    state = transformer.state_dict()
    if adapter.remap is not None:
        adapter.remap(config, state, kept)
    model.register_to_config(**config)
    _fit(transformer, adapter, state)


def standing_in(transformer: nn.Module, adapter: Adapter, form: Form, block: nn.Module) -> nn.Module:
    """Return `block`, the first of an interval or a copy of it, in the shape that the student has in its place.

    That is another one where the stock class shapes a block by its position: SD3's last one makes no text. Weights are
    shared, and the transformer is not touched.
    """
    if adapter.remap is None or form.first == form.last:
        return block
    interval = Interval(stack=form.stack, first=form.first, last=form.last)
    plan = Plan(family=adapter.family, depths=adapter.depths(transformer), operations=(interval,))
    student = meta_copy(transformer)
    blocks = adapter.stack(form.stack).blocks(student)
    # Modules of its own: what is given keeps its parameters as they are.
    blocks[form.first] = copy.deepcopy(block, {id(parameter): parameter for parameter in block.parameters()})
    drop_blocks(student, adapter, plan)
    return blocks[plan.kept()[form.stack].index(form.first)]


def narrow_blocks(transformer: nn.Module, adapter: Adapter, plan: Plan, calls: Calls) -> None:
    """Narrow the blocks of a transformer that already has the depth of the student, in place.

    It then refuses to save itself: under the stock name diffusers would open it with parameters missing.
    """
    for block, form in student_blocks(transformer, adapter, plan):
        arguments, streams = calls[form.stack]
        narrow(block, adapter.stack(form.stack), form, arguments, streams)
    keep_tables(transformer, own_tables(adapter, plan))
    if not is_stock(adapter, plan):
        vars(transformer)["save_pretrained"] = _refuse_to_save


def is_stock(adapter: Adapter, plan: Plan) -> bool:
    """Whether the stock class is the student of `plan`, once its config says how many blocks there are."""
    return plan.is_depth_only and not own_tables(adapter, plan)


def own_tables(adapter: Adapter, plan: Plan) -> tuple[str, ...]:
    """Return the buffers in which the student of `plan` has other rows than the stock class, by path."""
    return tuple(adapter.tables) if plan.intervals else ()


def student_blocks(transformer: nn.Module, adapter: Adapter, plan: Plan) -> list[tuple[nn.Module, Form]]:
    """Pair the blocks of a student with their forms; other numbers of blocks are a `PpclError`."""
    forms = list(plan.forms())
    blocks = [(stack.path, block) for stack in adapter.stacks for block in stack.blocks(transformer)]
    if [path for path, _ in blocks] != [form.stack for form in forms]:
        raise PpclError(f"the plan leaves {len(forms)} blocks, the transformer has {adapter.depths(transformer)}")
    return [(block, form) for (_, block), form in zip(blocks, forms, strict=True)]


def count_parameters(transformer: nn.Module, adapter: Adapter, plan: Plan, kwargs: Mapping[str, Any]) -> int:
    """Count the parameters of the student of `plan` without touching the teacher."""
    calls = example_calls(transformer, adapter, kwargs)
    student = meta_copy(transformer)
    drop_blocks(student, adapter, plan)
    narrow_blocks(student, adapter, plan, calls)
    return sum(parameter.numel() for parameter in student.parameters())


def load_bank(transformer: nn.Module, adapter: Adapter, plan: Plan, bank: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load every block of a reshaped student that is not the teacher's own from `bank`, by `Form.key`, strictly.

    Of low-rank modulation the bank has those layers alone: the others are those of the form before. Raises `PpclError`
    with the key when weights are missing or are those of another form.
    """
    for block, form in student_blocks(transformer, adapter, plan):
        if form.is_teacher:
            continue
        own = block.state_dict()
        weights = _banked(bank, form, block, own)
        try:
            weights = {name: value.to(own[name]) if name in own else value for name, value in weights.items()}
            # Assigned, not copied into memory that may be the teacher's.
            block.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            raise PpclError(f"the weights of {form.key} in the bank do not fit: {error}") from error


def _banked(
    bank: Mapping[str, Mapping[str, Tensor]], form: Form, block: nn.Module, own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return all weights of a form; what is the teacher's is the block's `own`."""
    if form.key not in bank:
        raise PpclError(f"the bank has no weights for {form.key}")
    if not form.modulation or form.previous is None:
        return dict(bank[form.key])
    whole = dict(own) if form.previous.is_teacher else _banked(bank, form.previous, block, own)
    factored = tuple(f"{path}." for path, _ in block.blueprint.factored) if isinstance(block, NarrowBlock) else ()
    return {name: value for name, value in whole.items() if not name.startswith(factored)} | dict(bank[form.key])


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise PpclError("this transformer is saved by save_variant: no stock class fits it")


def _cut_tables(transformer: nn.Module, adapter: Adapter, plan: Plan) -> None:
    kept, depths = plan.kept(), plan.depths
    for path, rows in adapter.tables.items():
        parent, _, name = path.rpartition(".")
        owner = transformer.get_submodule(parent)
        setattr(owner, name, getattr(owner, name)[list(rows(kept, depths))])
    keep_tables(transformer, adapter.tables)


def _renumbered(stack: Stack, config: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    """Return the config entries of `stack` for the blocks that are `kept`."""
    entries: dict[str, Any] = {stack.depth_key: len(kept)}
    for key in stack.index_keys:
        marked = config[key]
        entries[key] = type(marked)(index for index, block in enumerate(kept) if block in marked)
    return entries


def _fit(transformer: nn.Module, adapter: Adapter, state: dict[str, Tensor]) -> None:
    """Load `state` into `transformer` with the blocks that its stock class has for its config.

    A block can depend on its position: SD3's last one returns no text.
    """
    stock = stock_of(transformer)
    for stack in adapter.stacks:
        blocks = stack.blocks(transformer)
        for index, (own, other) in enumerate(zip(blocks, stack.blocks(stock), strict=True)):
            kind = own.blueprint if isinstance(own, NarrowBlock) else None
            if kind and not kind.source:
                low_rank(other, kind.factored)
            # What is narrow already is no matter of its position.
            if _shapes(own) != _shapes(other) and not (kind and kind.source):
                blocks[index] = other.train(own.training)
    if adapter.remap is None and _shapes(transformer) != {name: value.shape for name, value in state.items()}:
        different = sorted({name for name, _ in set(_shapes(stock).items()) ^ {(n, v.shape) for n, v in state.items()}})
        raise PpclError(f"{adapter.family} of this depth has other weights and no remap: {', '.join(different[:4])}")
    if adapter.remap is not None:
        try:
            transformer.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            said = " ".join(str(error).split())[:200]
            raise PpclError(
                f"{adapter.family} of this depth has other weights than its remap leaves: {said}"
            ) from error


def stock_of(transformer: nn.Module, *, buffers: bool = False) -> nn.Module:
    """Return the stock model of a transformer's config, without weights; with values of what is no weight, if asked.

    Raises `PpclError` where its class makes none of it.
    """
    kind: Any = type(transformer)
    with _weightless() if buffers else torch.device("meta"):
        try:
            made: nn.Module = kind.from_config(transformer.config)
        # What a constructor makes of a config that is wrong is unbounded.
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise PpclError(
                f"{kind.__name__} cannot be made with fewer blocks ({said}): something else of its config depends on "
                "their number, and is the work of a `remap`"
            ) from error
    return made


@contextlib.contextmanager
def _weightless() -> Iterator[None]:
    """Have modules that are made keep the shapes of their weights alone, and their buffers whole."""
    own = nn.Module.register_parameter

    def register(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        own(module, name, None if value is None else nn.Parameter(value.detach().to("meta"), requires_grad=False))

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = own  # type: ignore[method-assign]


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}
