import pytest
import torch

from ppcl_toolkit.statistics.cka import ChainedCka, Kernel, cka, heatmap


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(x, y):
    """Appendix 6 for one pair [N, D], step by step."""
    n = len(x)
    h = torch.eye(n, dtype=x.dtype) - torch.ones(n, n, dtype=x.dtype) / n

    def gram(z):
        z = z - z.mean(0)
        z = z / z.norm()
        return h @ (z @ z.T) @ h

    def hsic(k, m):
        return torch.trace(k @ h @ m @ h) / (n - 1) ** 2

    k, m = gram(x), gram(y)
    return hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)], ids=["features", "gram", "square"])
def test_cka_is_the_appendix_step_by_step(shape):
    x, y = features(3, *shape), features(3, *shape, seed=1)
    y = y + 0.5 * x + 3.0
    expected = torch.stack([naive(a, b) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(cka(x, y), expected)


@pytest.mark.parametrize("shape", [(2, 40, 8), (2, 8, 40)])
def test_cka_does_not_see_rotations_scales_and_shifts(shape):
    x, y = features(*shape), features(*shape, seed=1)
    x = x + y
    rotation = torch.linalg.qr(features(shape[2], shape[2], seed=2)).Q
    torch.testing.assert_close(cka(x, x), torch.ones(2, dtype=x.dtype))
    torch.testing.assert_close(cka(x, 1e4 * y @ rotation + 7.0), cka(x, y))
    torch.testing.assert_close(cka(x, y), cka(y, x))


def test_cka_sees_other_linear_maps():
    x = features(2, 40, 8)
    stretch = torch.diag(torch.logspace(0, 1.5, 8, dtype=x.dtype))
    assert (cka(x, x @ stretch) < 0.9).all()


def test_low_precision_is_computed_in_fp32_and_large_values_stay_in_range():
    x = features(1, 30, 12).to(torch.bfloat16)
    assert Kernel.of(x).matrix.dtype == torch.float32
    torch.testing.assert_close(cka(x.float() * 1e15, x.float() * 1e-15), torch.ones(1, dtype=torch.float64))
    # Massive activations in one feature, as in trained transformers.
    outlier = x.double() + 0.0
    outlier[..., 3] = 5000.0
    torch.testing.assert_close(cka(outlier.float(), x.float()), cka(outlier, x.double()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(1, 512, 64), (1, 64, 512)])
def test_blocks_that_hardly_differ_are_told_apart_in_fp32(shape):
    x, noise = features(*shape).float(), features(*shape, seed=1).float()
    one, two = (1 - float(cka(x, x + size * noise)) for size in (1e-3, 2e-3))
    expected = [1 - float(cka(x.double(), x.double() + size * noise)) for size in (1e-3, 2e-3)]
    assert [one, two] == pytest.approx(expected, abs=3e-7)
    assert 0 < expected[0] < expected[1] < 1e-5


@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 4, 9), (2, 1, 9)])
def test_equal_tokens_are_like_nothing(shape):
    x = features(*shape).float()
    same = x[:, :1].expand(*shape) * 1.1
    assert not cka(same, x).any()
    assert not cka(same, same).any()


def test_heatmap_is_all_pairs():
    activations = [features(2, 9, 4, seed=s) for s in range(3)]
    table = heatmap(activations)
    assert table.shape == (3, 3)
    for i in range(3):
        for j in range(3):
            torch.testing.assert_close(table[i, j], cka(activations[i], activations[j]).mean())


def test_kernels_of_different_shapes_do_not_compare():
    with pytest.raises(AssertionError):
        Kernel.of(features(1, 4, 9)).similarity(Kernel.of(features(1, 9, 4)))


def observed(outputs, weights, batches=((0, 1, 2),)):
    """Feed samples in groups, all blocks of a group before the next group, or block by block."""
    chained = ChainedCka(len(outputs))
    for number, rows in enumerate(batches):
        for block, output in enumerate(outputs):
            chained.observe(number, block, output[list(rows)], weights[block])
        chained.close(number)
    return chained.means()


def test_chains_are_equation_3_written_out():
    outputs = [features(3, 7, 5, seed=s).float() for s in range(4)]
    weights = [None, *(0.3 * features(5, 5, seed=10 + s).float() for s in range(3))]
    chained, plain = observed(outputs, weights)
    for u in range(4):
        assert chained[u, u] == 1.0
        x = outputs[u].double()
        for k in range(u + 1, 4):
            x = x + x @ weights[k].T.double()
            expected = sum(naive(a.double(), b) for a, b in zip(outputs[u], x, strict=True)) / 3
            assert float(chained[u, k]) == pytest.approx(float(expected), abs=1e-5)
            assert chained[k, u] == 0.0
    torch.testing.assert_close(plain, heatmap(outputs), atol=1e-5, rtol=0)


def test_samples_count_alike_however_they_are_batched():
    outputs = [features(3, 7, 5, seed=s).float() for s in range(3)]
    weights = [None, *(0.3 * features(5, 5, seed=10 + s).float() for s in range(2))]
    whole = observed(outputs, weights)
    torch.testing.assert_close(observed(outputs, weights, ((0,), (1, 2))), whole, atol=1e-6, rtol=0)
    streamed = ChainedCka(3)
    for block, output in enumerate(outputs):
        for number in range(3):
            streamed.observe(number, block, output[number, None], weights[block])
    with pytest.raises(AssertionError, match="on its way"):
        streamed.means()
    for number in range(3):
        streamed.close(number)
    torch.testing.assert_close(streamed.means(), whole, atol=1e-6, rtol=0)


def test_a_block_that_was_never_observed_has_no_number():
    chained = ChainedCka(3)
    for block in range(2):
        chained.observe(0, block, features(1, 7, 5, seed=block), torch.zeros(5, 5) if block else None)
    chained.close(0)
    table, plain = chained.means()
    assert table[:2, 2].isnan().all() and plain[2, :2].isnan().all()
    assert not table[:2, :2].isnan().any() and table.diagonal().tolist() == [1.0, 1.0, 1.0]
