"""What trains alone: one student block, the teacher's input to its first block, the teacher's output at its last.

Shapes: B batch, N tokens, D features.
"""

import contextlib
from typing import final

import torch
from torch import Tensor, nn

from ppcl_toolkit.adapter import Stack, Stream
from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.plan import Form
from ppcl_toolkit.running.capture import Streams, joint_text, run_block
from ppcl_toolkit.running.placement import HOST
from ppcl_toolkit.running.schedule import Reading
from ppcl_toolkit.statistics.moments import Moments
from ppcl_toolkit.training.loop import Optimization, autocast
from ppcl_toolkit.training.losses import Loss, relative_mse, without_padding
from ppcl_toolkit.training.shelf import Shelf

LINEAR_Z, LINEAR_H = "linear_text_z", "linear_text_h"
"""Names of the maps of Eq. 8 in a narrow block; those of Eq. 9 are `linear_ffn_image` and `linear_ffn_text`."""


def block_inputs(form: Form, reading: Reading) -> Streams:
    """Return what a block of this form is given: a narrow text stream takes the reference's packed h and z."""
    if not form.narrow_text:
        return reading.inputs
    assert reading.packed_text is not None, f"{form.key} has no reference to read"
    return Streams(reading.inputs.image, reading.packed_text)


def comparable(form: Form, output: Streams, target: Streams) -> Streams:
    """Return of a block's output what the teacher's output can be compared with."""
    if form.text == "inside" or output.text is None or target.text is None:
        return Streams(output.image)
    return Streams(output.image, output.text[:, : target.text.shape[1]])


class _Reads:
    """Where a form is read: the part of a `Reader` that every segment shares."""

    def __init__(self, form: Form, stack: Stack) -> None:
        self.form = form
        self.stack = stack
        self.first, self.last = form.first, form.last
        self.reference = form.reference


@final
class Segment(_Reads):
    """A student block in training (Eq. 6; with `wider`, Eq. 11 and 12)."""

    def __init__(
        self,
        form: Form,
        stack: Stack,
        student: nn.Module,
        optimization: Optimization,
        loss: Loss,
    ) -> None:
        super().__init__(form, stack)
        self.student = student
        self.optimization = optimization
        self._loss = loss
        self.wider: nn.Module | None = None
        """The block that this one was narrowed from, with its z."""
        self.alignment = 0.0
        """Weight of Eq. 12."""
        self._shelf = Shelf()

    def wait_on(self, shelf: Shelf) -> None:
        """Wait on that shelf between visits, from now on."""
        self._shelf = shelf
        self.place(HOST)

    def read(self, reading: Reading) -> None:
        """Take one training step on a batch."""
        if self.optimization.stopped:
            return
        with torch.enable_grad(), precision(reading):
            loss = self._objective(reading)
        self.optimization.step(loss)

    @torch.no_grad()
    def respond(self, reading: Reading) -> Streams:
        """Return what the student makes of a reading, in the teacher's dtype."""
        with precision(reading):
            output = run_block(self.student, self.stack, reading.arguments, block_inputs(self.form, reading))
        dtype = reading.inputs.image.dtype
        return Streams(output.image.to(dtype), None if output.text is None else output.text.to(dtype))

    def place(self, device: torch.device) -> None:
        """Move the student, and the optimizer's moments with it; on the host each tensor has its place on a shelf."""

        def move(name: str, tensor: Tensor) -> Tensor:
            return self._shelf.put(f"{self.form.key} {name}", tensor) if device.type == "cpu" else tensor.to(device)

        for name, tensor in (*self.student.named_parameters(), *self.student.named_buffers()):
            tensor.data = move(name, tensor.data)
        if self.wider is not None:
            self.wider.to(device)
        self.optimization.place(move)

    def _objective(self, reading: Reading) -> Tensor:
        with _watch(self.form, self.student, self.stack) as seen:
            output = run_block(self.student, self.stack, reading.arguments, block_inputs(self.form, reading))
        output = comparable(self.form, output, reading.target)
        loss = without_padding(self._loss, output, reading.target, reading.unpadded)
        if self.alignment:
            loss = loss + self.alignment * self._linear(output, reading, seen)
        return loss

    def _linear(self, output: Streams, reading: Reading, seen: list[Tensor]) -> Tensor:
        """Eq. 12: z and h of a text run, or the streams whose FFN is linear.

        Relative to the target's energy, a scale that the paper leaves open: raw, a text stream whose values are in the
        thousands would silence Eq. 11. Zero where all that is new is text that nobody reads.
        """
        names: set[Stream] = set(self.form.ffn) | ({"text"} if self.form.text == "end" else set())
        pairs = [(name, value, getattr(reading.target, name)) for name, value in output.of(tuple(names)).items()]
        if self.form.narrow_text and not self.form.ffn:
            assert self.wider is not None
            pairs.append(("text", seen[0], text_of(self.wider, self.stack, reading)))
        errors = [_misaligned(name, own, target, reading) for name, own, target in pairs]
        return torch.stack(errors).sum() if errors else output.image.new_zeros(())


@final
class LinearFit(_Reads):
    """Least squares for the new linear maps of a narrow block, from its wider form and the teacher's output."""

    def __init__(self, form: Form, stack: Stack, narrow: nn.Module, wider: nn.Module | None) -> None:
        super().__init__(form, stack)
        self._narrow, self._wider = narrow, wider
        self._moments: dict[str, Moments] = {}
        self.energy: dict[str, float] = {}

    def read(self, reading: Reading) -> None:
        """Add one batch's tokens."""
        with precision(reading):
            self._read(reading)

    def _read(self, reading: Reading) -> None:
        if self.form.ffn:
            # With its map at zero, a narrow block returns g of Eq. 9 itself.
            output = run_block(self._narrow, self.stack, reading.arguments, block_inputs(self.form, reading))
            g = comparable(self.form, output, reading.target)
            for name, value in g.of(self.form.ffn).items():
                pair = value, getattr(reading.target, name)
                self._add(f"linear_ffn_{name}", *(reading.tokens(name, side) for side in pair))
        elif self.form.narrow_text:
            assert reading.packed_text is not None
            h_BND, z_BND = reading.packed_text.chunk(2, dim=1)
            assert self._wider is not None
            own = text_of(self._wider, self.stack, reading)
            self._add(LINEAR_Z, reading.tokens("text", z_BND), reading.tokens("text", own))
            # SD3's last block returns no text, so there is no map for it.
            if self.form.text == "end" and reading.target.text is not None:
                self._add(LINEAR_H, reading.tokens("text", h_BND), reading.tokens("text", reading.target.text))

    def place(self, device: torch.device) -> None:
        """Move both blocks."""
        self._narrow.to(device)
        if self._wider is not None:
            self._wider.to(device)

    def solve(self, ridge: float) -> float:
        """Set the maps; return the share of the outputs' energy that the worst of them misses."""
        worst = 0.0
        for name, moments in self._moments.items():
            try:
                weight = moments.solve(ridge, bias=True)
            except PpclError as error:
                raise PpclError(f"{self.form.key}, {name}: {error}") from error
            linear = self._narrow.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            with torch.no_grad():
                linear.weight.copy_(weight[:, :-1])
                linear.bias.copy_(weight[:, -1])
            missed = moments.unexplained(weight) * float(moments.energy)
            worst = max(worst, missed / max(self.energy[name], 1e-30))
        return worst

    def _add(self, name: str, x: Tensor, y: Tensor) -> None:
        moments = self._moments.setdefault(name, Moments.zeros(x.shape[-1]))
        moments.add(x, y)
        self.energy[name] = self.energy.get(name, 0.0) + float(y.double().square().sum())


def _misaligned(name: Stream, own: Tensor, target: Tensor, reading: Reading) -> Tensor:
    """Return the relative squared error of one stream, to which padding adds nothing."""
    if name == "text" and reading.unpadded is not None:
        kept = reading.unpadded.repeat(1, target.shape[1] // reading.unpadded.shape[1])[:, :, None]
        own, target = own * kept, target * kept
    return relative_mse(Streams(own), Streams(target))


def precision(reading: Reading) -> contextlib.AbstractContextManager[None]:
    """Run fp32 students in the precision of the teacher that they are read from."""
    return autocast(reading.inputs.image.device, reading.inputs.image.dtype)


@torch.no_grad()
def text_of(block: nn.Module, stack: Stack, reading: Reading) -> Tensor:
    """Return the text that enters a block's joint attention, z of Eq. 8, [B, N, D]."""
    with joint_text(block, stack) as seen:
        run_block(block, stack, reading.arguments, reading.inputs)
    return seen[0]


def _watch(form: Form, block: nn.Module, stack: Stack) -> contextlib.AbstractContextManager[list[Tensor]]:
    return joint_text(block, stack) if form.narrow_text else contextlib.nullcontext([])
