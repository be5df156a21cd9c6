import pytest
import torch

import ppcl_toolkit.statistics.cka as module
from ppcl_toolkit.statistics.cka import Gram, centred, cka, fewest_rows, heatmap, rescaled


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


def test_rescaled_features_have_a_norm_of_one_whatever_they_had():
    x = features(3, 9, 4) * torch.tensor([1e-12, 1.0, 1e12], dtype=torch.float64)[:, None, None]
    found = rescaled(x)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(3, dtype=x.dtype))
    torch.testing.assert_close(found, x / x.flatten(1).norm(dim=1)[:, None, None])
    assert (rescaled(torch.zeros(1, 9, 4)) == 0).all()


def test_cka_sees_other_linear_maps():
    x = features(2, 40, 8)
    stretch = torch.diag(torch.logspace(0, 1.5, 8, dtype=x.dtype))
    assert (cka(x, x @ stretch) < 0.9).all()


def test_low_precision_is_computed_in_fp32_and_large_values_stay_in_range():
    x = features(1, 30, 12).to(torch.bfloat16)
    assert centred(x).dtype == torch.float32
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


@pytest.mark.parametrize("slab", [2**26, 40], ids=["whole", "token by token"])
@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 4, 9)], ids=["features", "gram"])
def test_heatmap_is_all_pairs(monkeypatch, slab, shape):
    monkeypatch.setattr(module, "_SLAB", slab)
    activations = [features(*shape, seed=s) for s in range(3)]
    table = heatmap(activations)
    assert table.shape == (3, 3)
    for i in range(3):
        for j in range(3):
            pairs = zip(activations[i], activations[j], strict=True)
            torch.testing.assert_close(table[i, j], sum(naive(a, b) for a, b in pairs) / 2)


def test_activations_that_do_not_vary_are_like_nothing_in_a_heatmap():
    x = features(1, 9, 4).float()
    table = heatmap([x, x[:, :1].expand(1, 9, 4), x])
    torch.testing.assert_close(table, torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1]], dtype=torch.float64))


def test_features_of_different_tokens_do_not_compare():
    with pytest.raises(AssertionError):
        cka(features(1, 4, 9), features(1, 9, 4))


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 1100, 2050])
def test_a_gram_matrix_in_bands_is_the_whole(tokens):
    x, y = features(2, tokens, 3), features(2, tokens, 3, seed=1)
    expected = torch.stack([((a @ a.T) * (b @ b.T)).sum() for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(Gram.of(x).inner(Gram.of(y)), expected)


@pytest.mark.parametrize("shape", [(2, 40, 6), (2, 6, 6), (2, 3, 6)])
def test_fewer_rows_have_the_same_covariance(shape):
    x = features(*shape)
    # Rows that depend on each other, and a sample of zeros.
    x[0, 1], x[1] = x[0, 0], 0.0
    rows = fewest_rows(x)
    assert rows.shape == (2, min(shape[1:]), 6)
    torch.testing.assert_close(rows.mT @ rows, x.mT @ x)
