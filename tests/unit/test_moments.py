import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcl_toolkit.errors import PpclError
from ppcl_toolkit.statistics.moments import Moments, in_parts

TOKENS, FEATURES = 60, 7


def tokens(seed=0, count=TOKENS):
    """Inputs and outputs [B, N, D] of something that is nearly linear."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, count // 3, FEATURES, generator=g, dtype=torch.float64) * torch.logspace(0, 2, FEATURES)
    weight = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    noise = torch.randn(x.shape, generator=g, dtype=torch.float64)
    return x, x + 0.1 * x @ weight.T + 0.3 * noise + 2.0


def counted(*batches):
    moments = Moments.zeros(FEATURES)
    for x, y in batches:
        moments.add(x, y)
    return moments


def equation_1(x, y):
    """(T(X) - X) X^T (X X^T)^-1, as the paper writes it: tokens are columns."""
    x, y = x.reshape(-1, FEATURES).T, y.reshape(-1, FEATURES).T
    return (y - x) @ x.T @ torch.linalg.inv(x @ x.T)


def test_solution_is_equation_1():
    x, y = tokens()
    torch.testing.assert_close(counted((x, y)).solve(0.0), equation_1(x, y))


def test_bias_is_equation_1_with_a_feature_of_ones():
    x, y = tokens()
    rows = x.reshape(-1, FEATURES)
    extended = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
    expected = torch.linalg.lstsq(extended, y.reshape(-1, FEATURES) - rows).solution.T
    solution = counted((x, y)).solve(0.0, bias=True)
    assert solution.shape == (FEATURES, FEATURES + 1)
    torch.testing.assert_close(solution, expected)


def test_ridge_is_relative_to_what_each_feature_varies_and_spares_the_bias():
    x, y = tokens()
    rows, update = x.reshape(-1, FEATURES), (y - x).reshape(-1, FEATURES)
    centred = rows - rows.mean(0)
    ridge = 0.1 * centred.square().sum(0).diag()
    expected = update.T @ rows @ torch.linalg.inv(rows.T @ rows + ridge)
    torch.testing.assert_close(counted((x, y)).solve(0.1), expected)
    torch.testing.assert_close(counted((1000 * x, 1000 * y)).solve(0.1), expected)
    # An unpenalised bias is the same as centring.
    expected = (update - update.mean(0)).T @ centred @ torch.linalg.inv(centred.T @ centred + ridge)
    torch.testing.assert_close(counted((x, y)).solve(0.1, bias=True)[:, :-1], expected)


@pytest.mark.parametrize(("mean", "bias"), [(0.0, False), (0.0, True), (1e6, True)])
def test_linear_maps_are_found_whatever_the_units_of_features(mean, bias):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 64, generator=g, dtype=torch.float64)
    weight = torch.randn(64, 64, generator=g, dtype=torch.float64) / 8
    # The two large features say as much as any other.
    size = torch.ones(64, dtype=torch.float64)
    size[:2] = 5e4
    center = torch.zeros(64, dtype=torch.float64)
    center[:2] = mean
    x = x * size + center
    moments = Moments.zeros(64)
    moments.add(x, x + (x - center) / size @ weight.T)
    assert moments.unexplained(moments.solve(bias=bias)) < 1e-9


@pytest.mark.parametrize("bias", [False, True])
def test_units_of_features_change_nothing_but_the_units_of_the_map(bias):
    x, y = tokens()
    units = torch.logspace(-6, 6, FEATURES, dtype=torch.float64)
    plain = counted((x, y)).solve(1e-3, bias=bias)
    moments = Moments.zeros(FEATURES)
    moments.add(x * units, x * units + (y - x))
    plain[:, :FEATURES] /= units
    torch.testing.assert_close(moments.solve(1e-3, bias=bias), plain, rtol=1e-6, atol=0)


def test_features_that_never_change_are_no_trouble():
    x, y = tokens()
    x[..., 2], y[..., 2] = 0.0, 0.0
    x[..., 4] = y[..., 4] = 7.0
    x[..., 5] = y[..., 5] = -3e4
    for bias in (False, True):
        found = counted((x, y)).solve(bias=bias)
        assert found.isfinite().all()
        assert not found[:, 2].any()
        others = [0, 1, 3, 6]
        update = (y - x)[..., others].reshape(-1, 4)
        left = update - (x @ found[:, :FEATURES].T + (found[:, -1] if bias else 0.0))[..., others].reshape(-1, 4)
        # What is constant serves as a bias, or there is one.
        extended = torch.cat([x[..., others].reshape(-1, 4), torch.ones(TOKENS, 1, dtype=x.dtype)], 1)
        missed = update - extended @ torch.linalg.lstsq(extended, update).solution
        assert float(left.square().sum() / missed.square().sum()) == pytest.approx(1.0, abs=1e-5)


def test_streaming_is_one_shot_and_merged_is_whole():
    parts = [tokens(seed, count) for seed, count in enumerate((3, 60, 21))]
    whole = counted(
        tuple(torch.cat([side.reshape(-1, FEATURES) for side in sides]) for sides in zip(*parts, strict=True))
    )
    for other in (counted(*parts), counted(parts[0]) + counted(*parts[1:])):
        for name, total in whole.tensors().items():
            torch.testing.assert_close(other.tensors()[name], total, msg=name)


@pytest.mark.parametrize("bias", [False, True])
def test_unexplained_is_the_share_that_a_second_pass_finds(bias):
    x, y = tokens()
    moments = counted((x, y))
    for weight in (moments.solve(bias=bias), 0.5 * moments.solve(0.2, bias=bias).float()):
        left = y - x - x @ weight[:, :FEATURES].T.double() - (weight[:, -1].double() if bias else 0.0)
        expected = left.square().sum() / (y - x).square().sum()
        assert moments.unexplained(weight) == pytest.approx(float(expected), rel=1e-6)


def test_unexplained_is_one_for_a_map_that_does_nothing_and_zero_for_a_perfect_one():
    x, _ = tokens()
    moments = counted((x, x + x @ torch.diag(torch.arange(7.0, dtype=x.dtype))))
    assert moments.unexplained(torch.zeros(FEATURES, FEATURES)) == pytest.approx(1.0)
    assert 0.0 <= moments.unexplained(moments.solve(0.0)) < 1e-12


def test_small_updates_of_large_activations_are_found():
    x, _ = tokens()
    x = x.float() + 1000.0
    weight = 1e-3 * torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(1))
    y = (x.double() + x.double() @ weight.T.double()).float()
    assert counted((x, y)).unexplained(weight) < 1e-6


def test_a_stream_that_nothing_happens_to_has_a_zero_map():
    x, _ = tokens()
    for same in (x, torch.zeros_like(x)):
        moments = counted((same, same))
        assert not moments.solve().any()
        assert moments.unexplained(moments.solve()) == 0.0


def test_too_few_tokens_are_an_error_without_a_ridge_and_solved_with_one():
    x, y = tokens()
    moments = counted((x[:1, :3], y[:1, :3]))
    with pytest.raises(PpclError, match="3 tokens of 7 features, ridge 0"):
        moments.solve(0.0)
    assert moments.unexplained(moments.solve(1e-9)) < 1e-5


def spread(kind, mean, tokens=3000, width=64):
    """Inputs and outputs [T, D] of a block whose features are unequal, or have a mean far from zero, in bf16."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    if kind == "all sizes":
        x = x * torch.arange(1, width + 1) ** -1.5 @ torch.linalg.qr(torch.randn(width, width, generator=g).double()).Q
    if kind == "two huge":
        x[:, 5:7] *= 300
    x[:, 3] += mean
    weight = torch.randn(width, width, generator=g, dtype=torch.float64) / width**0.5
    y = x + 0.03 * x.std(0) * torch.tanh(x / x.std() @ weight.T)
    return x.bfloat16(), y.bfloat16()


@pytest.mark.parametrize("mean", [0.0, 5000.0], ids=["centred", "far mean"])
@pytest.mark.parametrize("kind", ["equal", "all sizes", "two huge"])
def test_products_in_fp32_by_parts_fit_the_same_maps_as_fp64(kind, mean):
    x, y = spread(kind, mean)
    exact = Moments.zeros(x.shape[1])
    exact.add(x, y)
    count = torch.tensor(float(len(x)), dtype=torch.float64)
    parts, plain = Moments(*in_parts(x, y), count), Moments(*in_fp32(x, y), count)
    for name, total in exact.tensors().items():
        assert parts.tensors()[name].dtype == torch.float64
        torch.testing.assert_close(parts.tensors()[name], total, rtol=1e-8, atol=1e-8 * float(total.abs().max()))
    best = exact.solve()
    missed, error = exact.unexplained(best), (parts.solve() - best).norm() / best.norm()
    # What is left unexplained, by the exact sums: of the energy of the updates, and of what the best map leaves.
    assert abs(exact.unexplained(parts.solve()) - missed) < 1e-9
    assert parts.unexplained(best) == pytest.approx(missed, abs=1e-8)
    assert error < 1e-5
    # The parts are there for a reason: one product in fp32 is further off.
    assert (plain.solve(1e-5) - exact.solve(1e-5)).norm() > 3 * (parts.solve(1e-5) - exact.solve(1e-5)).norm()


def in_fp32(x, y):
    x, d = x.float(), y.float() - x.float()
    return [v.double() for v in (x.T @ x, d.T @ x, x.sum(0), d.sum(0), d.square().sum())]


@pytest.mark.parametrize("count", [1, 255, 257, 2048, 2050])
def test_parts_of_any_size_are_the_whole(count):
    x, y = (side.reshape(-1, FEATURES)[:count].bfloat16() for side in tokens(count=2100))
    whole = counted((x, y)).tensors().values()
    for part, total in zip(in_parts(x, y), whole, strict=False):
        torch.testing.assert_close(part, total, rtol=1e-7, atol=1e-7 * float(total.abs().max()))


def test_a_feature_that_is_always_zero_or_the_same_has_no_part_of_its_own():
    x, y = (side.reshape(-1, FEATURES).bfloat16() for side in tokens())
    x[:, 2], y[:, 2], x[:, 4], y[:, 4] = 0.0, 0.0, 7.0, 7.0
    for part, total in zip(in_parts(x, y), counted((x, y)).tensors().values(), strict=False):
        torch.testing.assert_close(part, total, rtol=1e-7, atol=1e-7 * float(total.abs().max()))


def test_values_that_are_no_numbers_are_an_error():
    x, y = tokens()
    y[0, 0, 0] = x[0, 0, 0] = torch.nan
    with pytest.raises(PpclError, match="is not finite: a block that learned before it has come apart"):
        counted((x, y)).solve()


def test_saved_is_loaded(tmp_path):
    moments = counted(tokens())
    save_file(moments.tensors(), tmp_path / "moments.safetensors")
    loaded = Moments.from_tensors(load_file(tmp_path / "moments.safetensors"))
    assert torch.equal(loaded.solve(), moments.solve())
    assert loaded.to("cpu").unexplained(loaded.solve()) == moments.unexplained(moments.solve())
