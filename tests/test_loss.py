"""RBlockLoss against Eq. 1-5 in NumPy, for every divergence, reduction, and kind of target."""

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rblock_fx import PairError, RBlockLoss, SettingError
from tests.oracles import agreement, cross_entropies, rblock_loss

CASES = st.tuples(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 7), st.floats(0, 1), st.floats(0.3, 8))
COMBINE = st.sampled_from(["mean", "sum"])


def draw(seed, rows, classes):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, (2 * rows, classes)), rng.integers(0, classes, rows), rng.dirichlet(np.ones(classes), rows)


@given(CASES, COMBINE, st.booleans())
def test_class_indices_and_probabilities_match_eq_1_to_5(case, combine, soft):
    seed, rows, classes, alpha, temperature = case
    logits, indices, probabilities = draw(seed, rows, classes)
    target = probabilities if soft else indices
    loss = RBlockLoss(alpha=alpha, temperature=temperature, combine=combine)
    got = loss(torch.tensor(logits), torch.tensor(target))
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(rblock_loss(logits, target, alpha, temperature, combine), rel=1e-9)


@given(CASES)
def test_every_position_of_a_dense_output_is_a_sample(case):
    seed, rows, classes, alpha, temperature = case
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2 * rows, classes, 3, 2, generator=generator, dtype=torch.double)
    target = torch.randint(classes, (rows, 3, 2), generator=generator)
    positions = torch.cat([z.movedim(1, -1).reshape(-1, classes) for z in logits.chunk(2)])
    expected = rblock_loss(positions, target.flatten(), alpha, temperature)
    assert RBlockLoss(alpha=alpha, temperature=temperature)(logits, target).item() == pytest.approx(expected, rel=1e-9)


@given(CASES, st.sampled_from(["bernoulli", "mse"]), COMBINE, st.sampled_from([(), (2,), (3, 2)]))
def test_labels_and_regression_match_their_divergence(case, kind, combine, positions):
    seed, rows, width, alpha, temperature = case
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (2 * rows, width - 1, *positions))
    target = rng.integers(0, 2, (rows, width - 1, *positions)).astype(float)
    criterion = nn.BCEWithLogitsLoss() if kind == "bernoulli" else nn.MSELoss()
    got = RBlockLoss(criterion, alpha=alpha, temperature=temperature, combine=combine)(
        *map(torch.tensor, (logits, target))
    )
    first, second = (np.moveaxis(z, 1, -1).reshape(-1, width - 1) for z in np.split(logits, 2))
    plain = 0
    for half in np.split(logits, 2):
        log_loss = np.logaddexp(0, np.where(target == 1, -half, half))
        plain += (log_loss if kind == "bernoulli" else (half - target) ** 2).mean()
    both = (1 - alpha) * plain + alpha * agreement(first, second, kind, temperature).mean()
    assert got.item() == pytest.approx(both if combine == "sum" else both / 2, rel=1e-9)


@given(CASES)
def test_the_two_halves_are_exchangeable(case):
    seed, rows, classes, alpha, temperature = case
    logits, indices, _ = draw(seed, rows, classes)
    first, second = torch.tensor(logits).chunk(2)
    loss = RBlockLoss(alpha=alpha, temperature=temperature)
    here, there = (loss(torch.cat(halves), torch.tensor(indices)) for halves in ((first, second), (second, first)))
    assert here.item() == pytest.approx(there.item())


@pytest.mark.parametrize("divergence", ["softmax", "bernoulli", "mse"])
def test_gradients_flow_through_both_halves(divergence):
    logits = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    target = torch.randint(4, (3,))
    loss = RBlockLoss(alpha=0.5, divergence=divergence)
    assert torch.autograd.gradcheck(lambda z: loss(z, target), (logits,))
    RBlockLoss(alpha=1.0, divergence=divergence)(logits, target).backward()
    assert (logits.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("divergence", ["softmax", "bernoulli"])
def test_classes_ruled_out_by_both_halves_do_not_count(divergence):
    logits = torch.randn(6, 4)
    logits[:, 3] = -torch.inf
    logits.requires_grad_()
    target = torch.randint(3, (3,))
    loss = RBlockLoss(alpha=0.5, divergence=divergence)
    whole = loss(logits, target)
    assert whole.item() == pytest.approx(loss(logits[:, :3], target).item())
    whole.backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, target = (20 * torch.randn(8, 1000)).to(dtype), torch.randint(1000, (4,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = RBlockLoss()(logits, target)
        soft = RBlockLoss()(logits, torch.full((4, 1000), 0.1 / 999).scatter(1, target[:, None], 0.9).to(dtype))
    assert loss.dtype == soft.dtype == torch.float32
    assert loss.item() == pytest.approx(rblock_loss(logits.double(), target, 0.1, 3.0), rel=1e-4)


def test_a_callable_gets_both_outputs_without_temperature():
    logits, target = torch.randn(8, 3), torch.randint(3, (4,))
    got = RBlockLoss(alpha=0.25, divergence=F.mse_loss)(logits, target)
    assert got.item() == pytest.approx(RBlockLoss(alpha=0.25, divergence="mse")(logits, target).item())
    calls = []
    RBlockLoss(divergence=lambda *halves: calls.append(halves) or halves[0].mean())(logits, target)
    assert [torch.equal(half, given) for half, given in zip(logits.chunk(2), calls[0], strict=True)] == [True, True]


@given(CASES)
def test_terms_are_the_unweighted_sums_over_sub_models(case):
    seed, rows, classes, _, temperature = case
    logits, target, _ = draw(seed, rows, classes)
    criterion, divergence = RBlockLoss(temperature=temperature).terms(torch.tensor(logits), torch.tensor(target))
    first, second = np.split(logits, 2)
    assert criterion.item() == pytest.approx(sum(cross_entropies(half, target).mean() for half in (first, second)))
    p, q = (scipy.special.softmax(half / temperature, axis=1) for half in (first, second))
    assert divergence.item() == pytest.approx(((p - q) * np.log(p / q)).sum(1).mean(), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("target", [torch.randint(3, (4,)), torch.randn(4, 3).softmax(1)], ids=["indices", "soft"])
def test_it_compiles_into_one_graph(target):
    loss = RBlockLoss(alpha=0.3)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    logits = torch.randn(8, 3, requires_grad=True)
    assert compiled(logits, target).item() == pytest.approx(loss(logits, target).item())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, r"RBlockLoss: alpha must be in \[0, 1\], got -0.1"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ({"alpha": float("nan")}, r"alpha must be in \[0, 1\], got nan"),
        ({"alpha": "0.1"}, r"alpha must be in \[0, 1\], got '0.1'"),
        ({"alpha": True}, r"alpha must be in \[0, 1\], got True"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
        ({"criterion": nn.CrossEntropyLoss}, "criterion must be a loss instance or function, got <class"),
        ({"criterion": "ce"}, "criterion must be a loss instance or function, got 'ce'"),
        ({"divergence": "kl"}, "divergence must be 'softmax', 'bernoulli', 'mse' or a callable, got 'kl'"),
        ({"combine": "none"}, "combine must be 'mean' or 'sum', got 'none'"),
        ({"reduction": "sum"}, "reduction belongs to the criterion; use combine='mean' or combine='sum'"),
        ({"aux_weight": -1}, "aux_weight must be a number >= 0, got -1"),
        ({"aux_weight": float("inf")}, "aux_weight must be a number >= 0, got inf"),
    ],
)
def test_settings_outside_their_range_are_rejected(settings, message):
    with pytest.raises(SettingError, match=message):
        RBlockLoss(**settings)


def test_numpy_numbers_are_accepted():
    logits, target = torch.randn(8, 3), torch.randint(3, (4,))
    loss = RBlockLoss(alpha=np.float32(0.25), temperature=np.int64(2), aux_weight=np.float64(0.5))(logits, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(rblock_loss(logits, target, 0.25, 2), rel=1e-5)


def test_other_numbers_of_rows_are_rejected():
    loss, target = RBlockLoss(), torch.randint(3, (4,))
    for rows in (3, 5, 12):
        with pytest.raises(PairError, match=rf"expected 8 rows .* or 4 .* for 4 targets, got shape \({rows}, 3\)"):
            loss(torch.randn(rows, 3), target)
    with pytest.raises(PairError, match="expected a tensor of N targets, got a list"):
        loss(torch.randn(4, 3), [1, 2])
    with pytest.raises(PairError, match=r"terms: expected 2N logits for N targets, got 4 for 4"):
        loss.terms(torch.randn(4, 3), target)
