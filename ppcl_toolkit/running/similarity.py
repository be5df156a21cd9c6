"""What reads the outputs of a teacher's blocks for CKA (Eq. 3, Fig. 5)."""

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple, final

import torch
from torch import Tensor

from ppcl_toolkit.adapter import Stack
from ppcl_toolkit.running.schedule import Reading
from ppcl_toolkit.statistics.chains import ChainedCka, Heatmap


class Similarities(NamedTuple):
    """What is summed up of one stream of a stack."""

    chained: ChainedCka
    plain: Heatmap


@final
class CkaReader:
    """Hands the outputs of one block to the sums of each stream of its stack."""

    def __init__(self, stack: Stack, block: int, sums: Mapping[str, Similarities]) -> None:
        self.stack = stack
        self.first = self.last = block
        self.reference: tuple[int, int] | None = None
        self._sums = sums
        self.numbers: Iterator[int] = itertools.count()
        """Numbers of the batches that are to come."""
        self._visited = False
        self._carried_z = torch.zeros((), dtype=torch.float64)

    @property
    def hands_on_z(self) -> bool:
        """Whether more than the text leaves this block: it is in a text run of a teacher that is narrow already."""
        return bool(self._carried_z)

    def read(self, reading: Reading) -> None:
        """Take the output of the next batch of `numbers`."""
        number = next(self.numbers)
        outputs = reading.own(reading.target).of(self.stack.streams)
        if "text" in outputs and reading.unpadded is not None:
            outputs["text"] = _at_rest(outputs["text"], reading.unpadded)
        text = reading.target.text
        self._carried_z += text is not None and text.shape[1] != reading.text_tokens
        for stream, (chained, plain) in self._sums.items():
            if stream in outputs:
                chained.observe(self.last, outputs[stream], number)
                plain.observe(number, self.last, outputs[stream])
            if self.last == plain.depth - 1:
                plain.close(number, reading.target.image.device)
        if not self._visited:
            self._follow()

    def place(self, _device: torch.device) -> None:
        """Follow the chains of all batches that shared a visit: nothing of them moves, nor stays."""
        self._visited = True
        self._follow()

    def state(self) -> dict[str, Tensor]:
        """Return in how many batches z was handed on."""
        return {"carried_z": self._carried_z}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self._carried_z = tensors["carried_z"]

    def _follow(self) -> None:
        for chained, _ in self._sums.values():
            chained.follow(self.last)


def _at_rest(text_BND: Tensor, unpadded_BN: Tensor) -> Tensor:
    """Put a sample's mean in the place of its padding: centred it is zero, and CKA does not see it."""
    own = unpadded_BN[:, :, None]
    mean = (text_BND.double() * own).sum(1, keepdim=True) / own.sum(1, keepdim=True)
    return torch.where(own, text_BND.double(), mean).to(torch.promote_types(text_BND.dtype, torch.float32))
