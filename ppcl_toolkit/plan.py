"""What is removed and what becomes linear: plain data, versioned JSON, every structural rule.

Block numbers are the teacher's: 0-based, inclusive, per stack. Plans are sets of operations, and one bank serves every
plan whose forms it holds: that is what makes it plug and play.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from ppcl_toolkit.adapter import Stream
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.records import problems
from ppcl_toolkit.values import BLOCKS

_RANK = 2**16
"""More than any layer has rows."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(_Record):
    """Blocks `first` to `last` of a stack, for which one block stands in (Sec. 3.3)."""

    kind: Literal["interval"] = "interval"
    stack: str
    first: NonNegativeInt
    last: NonNegativeInt

    @property
    def removed(self) -> int:
        """Blocks that go."""
        return self.last - self.first

    def __str__(self) -> str:
        return f"{self.stack}[{self.first},{self.last}]"


class TextRun(_Record):
    """Blocks after `reference`, up to `last`, take their text from `reference` by linear maps (Eq. 8)."""

    kind: Literal["text_run"] = "text_run"
    stack: str
    reference: NonNegativeInt
    last: NonNegativeInt

    def __str__(self) -> str:
        return f"{self.stack} text [{self.reference},{self.last}]"


class FfnSwap(_Record):
    """The feed-forward networks of one block become linear maps (Eq. 9)."""

    kind: Literal["ffn_swap"] = "ffn_swap"
    stack: str
    block: NonNegativeInt
    streams: tuple[Stream, ...]

    def __str__(self) -> str:
        return f"{self.stack}[{self.block}] ffn {'+'.join(self.streams)}"


class ModulationSwap(_Record):
    """Modulation layers W e + b become W_k (e - m) + (b + W m) of rank k: two linear maps, D -> k -> rows."""

    kind: Literal["modulation_swap"] = "modulation_swap"
    stack: str
    rank: Annotated[int, Field(ge=1, le=_RANK)]
    blocks: tuple[NonNegativeInt, ...] | None = None
    """Blocks that are kept; None for all of the stack."""

    def __str__(self) -> str:
        blocks = "" if self.blocks is None else f"[{','.join(map(str, self.blocks))}]"
        return f"{self.stack}{blocks} modulation of rank {self.rank}"


AnyOperation = Interval | TextRun | FfnSwap | ModulationSwap
Operation = Annotated[AnyOperation, Field(discriminator="kind")]
_ORDER = {"interval": 0, "text_run": 1, "ffn_swap": 2, "modulation_swap": 3}


@dataclass(frozen=True, slots=True)
class Form:
    """One block of a student: the teacher's blocks it stands for, and what of it is narrow."""

    stack: str
    first: int
    last: int
    text: Literal["own", "tap", "inside", "end"] = "own"
    """`tap` also hands on its z (the reference of a run); `inside` reads z; `end` reads z and writes h."""
    reference: tuple[int, int] | None = None
    """Where an `inside` or `end` block finds its text: first and last block of the reference's own form."""
    ffn: tuple[Stream, ...] = ()
    """Streams whose FFN is a linear map."""
    modulation: int = 0
    """Rank of its modulation layers; 0 for whole ones."""

    @property
    def narrow_text(self) -> bool:
        """Whether the text stream of this block is replaced."""
        return self.text in ("inside", "end")

    @property
    def hands_on_z(self) -> bool:
        """Whether it returns the z of a run beside its text: a block in its place must, too."""
        return self.text in ("tap", "inside")

    @property
    def is_stock(self) -> bool:
        """Whether this is an unmodified block class (weights may differ)."""
        return self.text == "own" and not self.ffn and not self.modulation

    @property
    def is_teacher(self) -> bool:
        """Whether the weights are the teacher's own."""
        return self.first == self.last and not (self.narrow_text or self.ffn or self.modulation)

    @property
    def key(self) -> str:
        """Name of its weights in a bank; a tap has the weights of the block without the tap."""
        parts = [f"{self.stack}.{self.first}-{self.last}"]
        if self.narrow_text:
            assert self.reference is not None
            parts.append(f"text_{self.reference[0]}-{self.reference[1]}_{self.text}")
        if self.ffn:
            parts.append("ffn_" + "_".join(self.ffn))
        if self.modulation:
            parts.append(f"modulation_{self.modulation}")
        return ".".join(parts)

    @property
    def previous(self) -> "Form | None":
        """The wider form that this one is made from; None for a teacher block."""
        if self.modulation:
            return replace(self, modulation=0)
        if self.ffn:
            return replace(self, ffn=())
        if self.narrow_text:
            return replace(self, text="own", reference=None)
        return replace(self, last=self.first) if self.last > self.first else None


class Plan(_Record):
    """The operations that turn a teacher into a student, in the order in which they apply."""

    version: Literal[1] = 1
    family: str
    teacher: str = ""
    """Where the teacher came from: hub id and revision, or path and hash."""
    depths: dict[str, Annotated[int, Field(ge=0, le=BLOCKS)]]
    """Number of blocks of each stack of the teacher, in forward order."""
    operations: tuple[Operation, ...] = ()
    history: tuple[dict[str, Any], ...] = ()
    """Where this plan is a composed one: what was done, oldest first, each in the numbers of its own teacher."""

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """Depth operations."""
        return tuple(o for o in self.operations if isinstance(o, Interval))

    @property
    def text_runs(self) -> tuple[TextRun, ...]:
        """Text streams that become linear."""
        return tuple(o for o in self.operations if isinstance(o, TextRun))

    @property
    def ffn_swaps(self) -> tuple[FfnSwap, ...]:
        """Feed-forward networks that become linear."""
        return tuple(o for o in self.operations if isinstance(o, FfnSwap))

    @property
    def modulation_swaps(self) -> tuple[ModulationSwap, ...]:
        """Modulation layers of low rank."""
        return tuple(o for o in self.operations if isinstance(o, ModulationSwap))

    @property
    def is_depth_only(self) -> bool:
        """Whether the student is a stock class with fewer blocks."""
        return not (self.text_runs or self.ffn_swaps or self.modulation_swaps)

    def with_operations(self, operations: Iterable[AnyOperation]) -> "Plan":
        """Return the plan of other operations for the same teacher; a `ValueError` says which rule they break."""
        ordered = sorted(operations, key=lambda o: _ORDER[o.kind])
        return type(self).model_validate({**dict(self), "operations": tuple(ordered)})

    def forms(self) -> Iterator[Form]:
        """Yield the student's blocks, stack by stack in forward order."""
        for stack, depth in self.depths.items():
            interval_at = {i.first: i for i in self.intervals if i.stack == stack}
            index = 0
            while index < depth:
                last = interval_at[index].last if index in interval_at else index
                yield self._narrowed(Form(stack, index, last))
                index = last + 1

    def kept(self) -> dict[str, list[int]]:
        """Return the teacher's block number of each student block, per stack."""
        kept: dict[str, list[int]] = {stack: [] for stack in self.depths}
        for form in self.forms():
            kept[form.stack].append(form.first)
        return kept

    def compose(self, later: "Plan") -> "Plan":
        """Return the one plan that does what this one does and then `later`, whose teacher is this one's student.

        Block numbers are those of this plan's teacher; both plans are kept in its history. What `later` removes takes
        its linear maps along: a text run that vanishes inside an interval, FFNs and modulation of blocks that go.
        """
        forms = {stack: [form for form in self.forms() if form.stack == stack] for stack in self.depths}
        _rule(
            {stack: len(own) for stack, own in forms.items()} == later.depths,
            f"the later plan is for a teacher with blocks {later.depths}",
        )
        intervals = [*self.intervals]
        for each in later.intervals:
            span = forms[each.stack][each.first : each.last + 1]
            first, last = span[0], span[-1]
            carrying = all(form.hands_on_z for form in span)
            _rule(carrying == first.hands_on_z == last.hands_on_z, f"{each}: a text run begins or ends inside it")
            whole = Interval(stack=each.stack, first=first.first, last=last.last)
            intervals = [i for i in intervals if not _covers(whole, i.stack, i.first)] + [whole]
        runs = [run for run in self.text_runs if not any(_covers(i, run.stack, run.reference, 1) for i in intervals)]
        # The block that ends a run may stand in for more, and ends it still.
        ends = {(i.stack, i.first): i.last for i in intervals}
        closing = {run: next(f.first for f in forms[run.stack] if f.last == run.last) for run in runs}
        runs = [r.model_copy(update={"last": ends.get((r.stack, closing[r]), r.last)}) for r in runs]
        runs += [
            TextRun(stack=r.stack, reference=forms[r.stack][r.reference].first, last=forms[r.stack][r.last].last)
            for r in later.text_runs
        ]
        swaps = [s for s in self.ffn_swaps if not any(_covers(i, s.stack, s.block, 1) for i in intervals)]
        swaps += [s.model_copy(update={"block": forms[s.stack][s.block].first}) for s in later.ffn_swaps]
        kept = (_without_covered(swap, intervals) for swap in self.modulation_swaps)
        modulation = [swap for swap in kept if swap.blocks != ()]
        modulation += [
            s if s.blocks is None else s.model_copy(update={"blocks": tuple(forms[s.stack][b].first for b in s.blocks)})
            for s in later.modulation_swaps
        ]
        composed = any("operations" in entry for entry in self.history)
        added = [later] if composed else [self, later]
        history = (*self.history, *(plan.model_dump(mode="json", exclude={"history"}) for plan in added))
        return self.model_copy(update={"history": history}).with_operations([*intervals, *runs, *swaps, *modulation])

    def save(self, path: Path) -> None:
        """Write this plan as JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Read a plan; a broken one is a `PpclError` that names the field."""
        try:
            return cls.model_validate_json(path.read_text())
        except ValidationError as error:
            raise PpclError(f"{path} is not a plan: {problems(error)}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise PpclError(f"{path} is not a plan: {error}") from error

    def _narrowed(self, form: Form) -> Form:
        interval_ends = {(i.stack, i.first): i.last for i in self.intervals}
        for run in self.text_runs:
            if run.stack == form.stack:
                if form.first == run.reference:
                    form = replace(form, text="tap")
                elif run.reference < form.first <= run.last:
                    text: Literal["inside", "end"] = "end" if form.last == run.last else "inside"
                    source = interval_ends.get((run.stack, run.reference), run.reference)
                    form = replace(form, text=text, reference=(run.reference, source))
        for swap in self.ffn_swaps:
            if swap.stack == form.stack and swap.block == form.first:
                form = replace(form, ffn=swap.streams)
        for low in self.modulation_swaps:
            if low.stack == form.stack and (low.blocks is None or form.first in low.blocks):
                form = replace(form, modulation=low.rank)
        return form

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        ranks = [_ORDER[o.kind] for o in self.operations]
        _rule(ranks == sorted(ranks), "operations come in the order intervals, text runs, FFN swaps, modulation")
        for operation in self.operations:
            depth = self.depths.get(operation.stack)
            _rule(depth is not None, f"{operation}: the teacher has no such stack, it has {list(self.depths)}")
            end = _last_block(operation)
            _rule(end < (depth or 0), f"{operation}: the stack has blocks 0 to {(depth or 0) - 1}")
        _check_spans([(i.stack, i.first, i.last, i) for i in self.intervals])
        _check_spans([(r.stack, r.reference, r.last, r) for r in self.text_runs])
        firsts = {(f.stack, f.first): f for f in self._depth_forms()}
        for run in self.text_runs:
            _rule((run.stack, run.reference) in firsts, f"{run}: its reference is inside a removed interval")
            ends = {f.last: f.first for f in firsts.values() if f.stack == run.stack}
            _rule(run.last in ends, f"{run}: its end is inside an interval that reaches further")
            _rule(ends[run.last] > run.reference, f"{run}: intervals leave no block after its reference")
        seen = set()
        for swap in self.ffn_swaps:
            _rule((swap.stack, swap.block) in firsts, f"{swap}: the block is removed by an interval")
            _rule((swap.stack, swap.block) not in seen, f"{swap}: the block is listed twice")
            _rule(bool(swap.streams), f"{swap}: no stream is named")
            seen.add((swap.stack, swap.block))
            in_run = any(r.stack == swap.stack and r.reference < swap.block <= r.last for r in self.text_runs)
            _rule(not (in_run and "text" in swap.streams), f"{swap}: a text run already removes this text FFN")
        self._check_modulation(firsts.keys())
        return self

    def _check_modulation(self, kept: Collection[tuple[str, int]]) -> None:
        seen: set[tuple[str, int]] = set()
        for swap in self.modulation_swaps:
            _rule(swap.blocks != (), f"{swap}: no block is named")
            every = [block for stack, block in kept if stack == swap.stack]
            for block in every if swap.blocks is None else swap.blocks:
                _rule(block in every, f"{swap}: block {block} is removed by an interval")
                _rule((swap.stack, block) not in seen, f"{swap}: block {block} has low rank already")
                seen.add((swap.stack, block))

    def _depth_forms(self) -> Iterator[Form]:
        depth_only = self.model_construct(family=self.family, depths=self.depths, operations=self.intervals)
        return depth_only.forms()


def trained_forms(plans: Iterable[Plan]) -> list[Form]:
    """Return every form that learns for `plans`, wider ones before those trained from them."""
    forms: dict[str, Form] = {}
    for plan in plans:
        for form in plan.forms():
            chain: list[Form] = []
            whole = replace(form, modulation=0)
            link: Form | None = replace(whole, text="own") if form.text == "tap" else whole
            while link is not None and not link.is_teacher:
                chain.append(link)
                link = link.previous
            forms.update({link.key: link for link in reversed(chain)})
    return list(forms.values())


def low_rank_forms(plans: Iterable[Plan]) -> list[Form]:
    """Return every form of low-rank modulation that a bank for `plans` must hold, each beside its `previous`."""
    return list({form.key: form for plan in plans for form in plan.forms() if form.modulation}.values())


def _last_block(operation: AnyOperation) -> int:
    if isinstance(operation, ModulationSwap):
        return max(operation.blocks or (0,))
    return operation.block if isinstance(operation, FfnSwap) else operation.last


def _without_covered(swap: ModulationSwap, intervals: Iterable[Interval]) -> ModulationSwap:
    """Return a swap of those blocks that no interval removes."""
    if swap.blocks is None:
        return swap
    gone = {block for block in swap.blocks for i in intervals if _covers(i, swap.stack, block, 1)}
    return swap.model_copy(update={"blocks": tuple(block for block in swap.blocks if block not in gone)})


def _covers(interval: Interval, stack: str, block: int, after: int = 0) -> bool:
    """Whether `block` is one of the interval's, from the one `after` its first on."""
    return interval.stack == stack and interval.first + after <= block <= interval.last


def _rule(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _check_spans(spans: list[tuple[str, int, int, Interval | TextRun]]) -> None:
    for _, first, last, what in spans:
        _rule(first < last, f"{what}: needs at least two blocks, first below last")
    ordered = sorted(spans, key=lambda span: span[:3])
    for (stack, _, last, one), (other_stack, first, _, other) in zip(ordered, ordered[1:], strict=False):
        _rule(stack != other_stack or first > last, f"{one} and {other} overlap")
