"""Similarities of a stack: against Eq. 3 to 5 and Appendix 6 written out in fp64."""

import contextlib
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import ppcl_toolkit.statistics.chains as module
from ppcl_toolkit.statistics.chains import ChainedCka, Heatmap
from ppcl_toolkit.statistics.trend import differences, trend_intervals

SHAPES = pytest.mark.parametrize("tokens, width", [(7, 5), (5, 7), (6, 6)], ids=["features", "gram", "square"])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive(x, y):
    """Appendix 6 for one pair [N, D], step by step, in fp64."""
    n = len(x)
    h = torch.eye(n, dtype=torch.float64) - torch.ones(n, n, dtype=torch.float64) / n
    k, m = (h @ (z.double() / z.double().norm()) @ z.double().T @ h for z in (x, y))
    return torch.trace(k @ m) / (torch.trace(k @ k) * torch.trace(m @ m)).sqrt()


def equation_3(outputs, weights):
    """cka(u, k) of all blocks in fp64, averaged over samples; outputs are [B, N, D]."""
    table = torch.eye(len(outputs), dtype=torch.float64)
    for u, start in enumerate(outputs):
        for k in range(u + 1, len(outputs)):
            x = start.double()
            for block in range(u + 1, k + 1):
                x = x + x @ weights[block].T.double()
            table[u, k] = sum(naive(a, b) for a, b in zip(start, x, strict=True)) / len(start)
    return table


def stack(depth=4, tokens=7, width=5, samples=3):
    outputs = [random(samples, tokens, width, seed=s) for s in range(depth)]
    return outputs, [None, *(0.3 * random(width, width, seed=10 + s) for s in range(depth - 1))]


def chained(outputs, weights, batches=((0, 1, 2),), visits=1):
    """Let batches of those samples pass; `visits` batches share one visit of a block."""
    sums = ChainedCka(weights)
    for first in range(0, len(batches), visits):
        for block, output in enumerate(outputs):
            for rows in batches[first : first + visits]:
                sums.observe(block, output[list(rows)])
            sums.follow(block)
    return sums.means()


@SHAPES
def test_chains_are_equation_3_written_out(tokens, width):
    outputs, weights = stack(tokens=tokens, width=width)
    torch.testing.assert_close(chained(outputs, weights), equation_3(outputs, weights), atol=1e-6, rtol=0)


def learned(spectrum, update, depth=8, tokens=300, seed=0):
    """Outputs [1, N, D] of blocks that change features of unequal size a little, in bf16, and their probes (Eq. 1)."""
    width = len(spectrum)
    turn = torch.linalg.qr(random(width, width, seed=seed, dtype=torch.float64)).Q
    x = random(4000 + tokens, width, seed=seed + 1, dtype=torch.float64) * spectrum @ turn.T
    outputs, weights = [x[None, 4000:]], [None]
    for block in range(1, depth):
        one, two = (random(width, width, seed=seed + 2 * block + i, dtype=torch.float64) / width**0.5 for i in (0, 1))
        y = x + update * x.std() * torch.tanh(x / x.std() @ one.T) @ two.T
        y = y.bfloat16().double()
        gram = x[:4000].T @ x[:4000]
        gram += 1e-6 * gram.diagonal().mean() * torch.eye(width, dtype=gram.dtype)
        weights.append(torch.linalg.solve(gram, x[:4000].T @ (y - x)[:4000]).T.float())
        outputs.append(y[None, 4000:])
        x = y
    return outputs, weights


SPECTRA = {
    "equal features": torch.ones(96, dtype=torch.float64),
    "features of all sizes": torch.arange(1, 97, dtype=torch.float64) ** -2,
    "two huge features": torch.cat([torch.tensor([300.0, 100.0]), torch.ones(94)]).double(),
}


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("update", [1e-3, 0.03, 0.3])
def test_differences_are_exact_enough_for_the_trend(spectrum, update):
    outputs, weights = learned(spectrum, update)
    found = differences(chained([output.float() for output in outputs], weights, ((0,),)))
    exact = differences(equation_3(outputs, weights))
    # Algorithm 1 acts on differences that are a millionth apart.
    assert (found - exact).abs().max() < 1e-7
    # It asks whether a difference is larger than the one before it.
    rises, exact_rises = (d[0, 2:] - d[0, 1:-1] for d in (found, exact))
    clear = exact_rises.abs() > 2e-7
    assert torch.equal(rises[clear] > 0, exact_rises[clear] > 0)
    if update > 0.1:
        assert clear.any() and trend_intervals(found) == trend_intervals(exact)


def test_samples_count_alike_however_they_are_batched():
    outputs, weights = stack()
    whole = chained(outputs, weights)
    torch.testing.assert_close(chained(outputs, weights, ((0,), (1, 2))), whole, atol=1e-7, rtol=0)


@pytest.mark.parametrize("together", [16, 2, 1])
def test_sharing_visits_changes_no_bit(monkeypatch, together):
    outputs, weights = stack(samples=6)
    batches = ((0, 1), (2,), (3, 4, 5), (1, 2))
    alone = chained(outputs, weights, batches)
    monkeypatch.setattr(module, "_TOGETHER", together)
    assert torch.equal(chained(outputs, weights, batches, visits=3), alone)


def test_half_precision_around_it_changes_no_bit():
    outputs, weights = stack(tokens=40, width=32)
    exact = chained(outputs, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (outputs[0] @ weights[1]).dtype == torch.bfloat16
        assert torch.equal(chained(outputs, weights), exact)


@contextlib.contextmanager
def tf32_allowed():
    settings = torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32"
    try:
        yield settings
    finally:
        settings.fp32_precision = before


def test_products_of_fast_formats_are_off_inside_and_as_they_were_outside():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "mm" in func.__name__:
                seen.append(torch.backends.cuda.matmul.fp32_precision)
            return func(*args, **(kwargs or {}))

    outputs, weights = stack()
    with tf32_allowed() as settings:
        with Watch():
            chained(outputs, weights)
            heat(outputs)
        assert set(seen) == {"ieee"}
        assert settings.fp32_precision == "tf32"


class Ledger(TorchDispatchMode):
    """Bytes of tensors that were made inside and are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_iter(args) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known | given:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _forget(self, key, size):
        self._known.discard(key)
        self.now -= size


def peak(depth, batches, visits):
    outputs, weights = stack(depth=depth, tokens=80, width=64, samples=batches)
    with Ledger() as ledger:
        chained(outputs, weights, [(sample,) for sample in range(batches)], visits)
    return ledger.peak


def test_memory_grows_neither_with_the_depth_nor_with_the_batches_of_a_chunk():
    few, deep, many = peak(4, 16, 16), peak(12, 16, 16), peak(4, 64, 64)
    matrix = 64 * 64 * 4
    # Of 16 samples the rows of the chain and the Gram matrix it started with, and what is at work with one more.
    assert 2 * 16 * matrix < few < 2.6 * 16 * matrix
    assert deep < 1.05 * few and many < 1.05 * few


def test_a_block_that_was_never_observed_has_no_number():
    outputs, weights = stack(depth=3)
    table = chained(outputs[:2], weights)
    assert table[:2, 2].isnan().all()
    assert not table[:2, :2].isnan().any() and table.diagonal().tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(chained(outputs[:2], [*weights[:2], None])[:2, :2], table[:2, :2])


def test_a_block_without_a_probe_is_noticed():
    sums = ChainedCka([None, None, torch.zeros(5, 5)])
    with pytest.raises(AssertionError, match="block 1 has no probe"):
        sums.observe(1, random(1, 7, 5))


def heat(outputs, batches=((0, 1, 2),), visits=1):
    sums = Heatmap(len(outputs))
    for first in range(0, len(batches), visits):
        numbers = range(first, min(first + visits, len(batches)))
        for block, output in enumerate(outputs):
            for number in numbers:
                sums.observe(number, block, output[list(batches[number])])
        for number in numbers:
            sums.close(number, outputs[0].device)
    return sums.means()


@SHAPES
def test_pairs_of_outputs_are_appendix_6_written_out(tokens, width):
    outputs, _ = stack(tokens=tokens, width=width)
    table = heat(outputs)
    for one in range(4):
        for other in range(4):
            pairs = zip(outputs[one], outputs[other], strict=True)
            expected = sum(naive(a, b) for a, b in pairs) / 3
            assert float(table[one, other]) == pytest.approx(float(expected), abs=1e-6)
    assert torch.equal(heat(outputs, ((0,), (1, 2)), visits=2), heat(outputs, ((0,), (1, 2))))


def test_a_heatmap_keeps_only_as_much_as_it_may(monkeypatch):
    outputs, _ = stack()
    bytes_of_a_batch = sum(output[:1].nbytes for output in outputs)
    monkeypatch.setattr(module, "_HELD", 2 * bytes_of_a_batch)
    batches = ((0,), (1,), (2,))
    assert torch.equal(heat(outputs, batches), heat([output[:2] for output in outputs], ((0,), (1,))))
    assert torch.equal(heat(outputs, batches, visits=3), heat(outputs, batches))


def test_outputs_that_are_missing_leave_the_other_pairs_alone():
    sums = Heatmap(3)
    outputs, _ = stack(depth=3)
    for number, present in enumerate((range(3), range(2))):
        for block in present:
            sums.observe(number, block, outputs[block])
        with pytest.raises(AssertionError, match="on its way"):
            sums.means()
        sums.close(number, torch.device("cpu"))
    torch.testing.assert_close(sums.means(), heat(outputs))
    never = Heatmap(2)
    never.observe(0, 0, outputs[0])
    never.close(0, torch.device("cpu"))
    assert never.means()[0, 1].isnan() and never.means()[0, 0] == 1.0
