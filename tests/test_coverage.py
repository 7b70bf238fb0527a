import itertools

import pytest
import scipy.optimize
import torch
from hypothesis import given
from hypothesis import strategies as st

from rblock_fx.errors import SettingError
from rblock_fx.masks.coverage import block_centre_probability, coverage
from tests.oracles import coverage_by_enumeration, coverage_by_simulation, eq8, eq18, eq19

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
blocks = st.sampled_from([1, 3, 5, 7, 9])
gammas = st.floats(0, 1)
drop_probs = st.floats(0, 0.999)


@given(st.integers(1, 4).flatmap(lambda k: st.tuples(st.just(2 * k + 1), *[st.integers(2 * k, 60)] * 2)), gammas)
def test_coverage_is_equation_8_wherever_it_holds(case, gamma):
    block_size, m, n = case
    assert coverage(gamma, (m, n), block_size) == pytest.approx(eq8(gamma, m, n, block_size), abs=1e-12)


@given(shapes, blocks, gammas)
def test_coverage_is_the_enumerated_expectation(shape, block_size, gamma):
    assert coverage(gamma, shape, block_size) == pytest.approx(
        coverage_by_enumeration(gamma, shape, block_size), abs=1e-12
    )


@given(shapes, blocks, drop_probs)
def test_gamma_inverts_coverage(shape, block_size, drop_prob):
    gamma = block_centre_probability(drop_prob, shape, block_size)
    assert 0 <= gamma <= drop_prob + 1e-15
    assert coverage(gamma, shape, block_size) == pytest.approx(drop_prob, abs=1e-12)


@given(shapes, blocks, st.floats(0.001, 0.99))
def test_gamma_is_the_root_that_brentq_finds(shape, block_size, drop_prob):
    root = scipy.optimize.brentq(
        lambda gamma: coverage_by_enumeration(gamma, shape, block_size) - drop_prob, 0, 1, xtol=1e-15
    )
    assert block_centre_probability(drop_prob, shape, block_size) == pytest.approx(root, rel=1e-9, abs=1e-12)


@given(shapes, blocks, st.lists(gammas, min_size=2, max_size=2, unique=True).map(sorted))
def test_coverage_rises_with_gamma(shape, block_size, pair):
    low, high = pair
    assert coverage(low, shape, block_size) <= coverage(high, shape, block_size) + 1e-15


@given(st.integers(1, 3).flatmap(lambda k: st.tuples(st.just(2 * k + 1), *[st.integers(2 * k + 1, 40)] * 2)), gammas)
def test_equation_20_orders_the_three_rates(case, gamma):
    block_size, m, n = case
    middle = coverage(gamma, (m, n), block_size)
    assert eq19(gamma, m, n, block_size) <= middle + 1e-12
    assert middle <= eq18(gamma, block_size) + 1e-12


@pytest.mark.parametrize(
    ("shape", "block_size", "drop_prob"),
    [
        ((56, 56), 7, 0.1),
        ((14, 14), 7, 0.1),
        ((7, 7), 7, 0.1),
        ((4, 4), 3, 0.2),
        ((32, 32), 3, 0.5),
        ((9,), 5, 0.3),
        ((4, 5, 6), 3, 0.2),
    ],
)
def test_simulated_coverage_is_the_requested_rate(shape, block_size, drop_prob):
    gamma = block_centre_probability(drop_prob, shape, block_size)
    mean, error = coverage_by_simulation(gamma, shape, block_size, draws=4000, seed=1)
    assert abs(mean - drop_prob) < 4 * error


@pytest.mark.parametrize(
    ("shape", "block_size", "drop_prob", "reached"),
    [
        ((56, 56), 7, 0.1, 0.090),
        ((14, 14), 7, 0.1, 0.074),
        ((7, 7), 7, 0.1, 0.055),
        ((4, 4), 3, 0.2, 0.130),
        ((32, 32), 3, 0.5, 0.388),
    ],
)
def test_eq6_reaches_the_rates_of_the_design(shape, block_size, drop_prob, reached):
    gamma = block_centre_probability(drop_prob, shape, block_size, "eq6")
    assert gamma == drop_prob / block_size**2
    assert coverage(gamma, shape, block_size) == pytest.approx(reached, abs=6e-4)


@given(
    st.integers(1, 3).flatmap(lambda k: st.tuples(st.just(2 * k + 1), *[st.integers(2 * k + 1, 40)] * 2)), drop_probs
)
def test_equation_7(case, drop_prob):
    b, m, n = case
    expected = m * n / (b**2 * (m - b + 1) * (n - b + 1)) * drop_prob
    assert block_centre_probability(drop_prob, (m, n), b, "eq7") == pytest.approx(expected, rel=1e-12)


def test_eq7_rejects_maps_smaller_than_a_block():
    with pytest.raises(SettingError, match=r"eq7' needs.*block_size=7 on a map of 4x9. Use calibration='exact'"):
        block_centre_probability(0.1, (4, 9), 7, "eq7")


@pytest.mark.parametrize("kind", [float, torch.float64])
def test_newton_reaches_coverage_in_288_cases(kind):
    errors = []
    for shape, block_size, drop_prob in itertools.product(
        [(1, 1), (3, 5), (7, 7), (14, 14), (56, 56), (112, 112), (9,), (4, 5, 6)],
        [1, 3, 7, 9],
        [0.0, 0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 0.99],
    ):
        rate = drop_prob if kind is float else torch.tensor(drop_prob, dtype=kind)
        gamma = float(block_centre_probability(rate, shape, block_size))
        errors.append(abs(coverage(gamma, shape, block_size) - drop_prob))
    assert len(errors) == 288
    assert max(errors) < 1e-15


@pytest.mark.parametrize(("drop_prob", "bound"), [(0.999, 1e-15), (1 - 1e-6, 1e-15), (1 - 1e-9, 8e-10)])
def test_newton_is_as_close_to_rates_near_one_as_stated(drop_prob, bound):
    for shape, block_size in itertools.product([(1, 1), (3, 5), (7, 7), (112, 112), (9,), (4, 5, 6)], [1, 3, 7, 15]):
        gamma = block_centre_probability(drop_prob, shape, block_size)
        assert abs(coverage(gamma, shape, block_size) - drop_prob) < bound


@given(shapes, blocks, drop_probs, st.sampled_from(["exact", "eq6"]))
def test_gamma_of_a_float32_tensor_is_the_hosts(shape, block_size, drop_prob, calibration):
    rate = torch.tensor(drop_prob)
    got = block_centre_probability(rate, shape, block_size, calibration)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(block_centre_probability(rate.item(), shape, block_size, calibration), rel=2e-7)
