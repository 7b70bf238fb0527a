"""RBlockLoss around criteria of every kind: their reduction, their targets, their attributes."""

import copy
import functools
import pickle

import numpy as np
import pytest
import timm.loss
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rblock_fx import RBlockLoss, SettingError
from tests.oracles import agreement, cross_entropies, rblock_loss

CASES = st.tuples(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 7), st.floats(0, 1), st.floats(0.3, 8))


@pytest.mark.parametrize("criterion", [nn.BCEWithLogitsLoss(), nn.MSELoss(), nn.L1Loss(reduction="sum")])
def test_outputs_without_a_class_axis_have_one_label(criterion):
    logits, target = torch.randn(8), torch.randint(2, (4,)).float()
    expected = RBlockLoss(criterion, alpha=0.3)(logits[:, None], target[:, None])
    assert RBlockLoss(criterion, alpha=0.3)(logits, target).item() == pytest.approx(expected.item())


class OwnLoss(nn.BCEWithLogitsLoss):
    pass


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (None, "softmax"),
        (nn.CrossEntropyLoss(), "softmax"),
        (timm.loss.SoftTargetCrossEntropy(), "softmax"),
        (F.binary_cross_entropy_with_logits, "softmax"),
        (nn.BCEWithLogitsLoss(), "bernoulli"),
        (OwnLoss(), "bernoulli"),
        (timm.loss.BinaryCrossEntropy(), "bernoulli"),
        (timm.loss.AsymmetricLossMultiLabel(), "bernoulli"),
        (nn.MSELoss(), "mse"),
        (nn.L1Loss(), "mse"),
        (nn.SmoothL1Loss(), "mse"),
        (nn.HuberLoss(), "mse"),
    ],
)
def test_the_divergence_follows_the_criterion(criterion, expected):
    assert RBlockLoss(criterion).divergence == expected
    assert RBlockLoss(criterion, divergence="mse").divergence == "mse"


@pytest.mark.parametrize("positions", [(), (3, 2)])
@pytest.mark.parametrize("kind", [nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss])
def test_every_reduction_has_the_same_share_of_divergence(kind, positions):
    logits, target = torch.randn(10, 4, *positions), torch.rand(5, 4, *positions).softmax(1)
    losses = {name: RBlockLoss(kind(reduction=name), alpha=0.4) for name in ("mean", "sum", "none")}
    mean, total, each = (loss(logits, target) for loss in losses.values())
    assert each.shape == kind(reduction="none")(logits[:5], target).shape
    assert each.mean().item() == pytest.approx(mean.item(), rel=1e-5)
    assert each.sum().item() == pytest.approx(total.item(), rel=1e-5)


def test_losses_per_element_get_the_divergence_of_the_position():
    logits, target = torch.randn(8, 3, 5, dtype=torch.double), torch.rand(4, 3, 5, dtype=torch.double)
    got = RBlockLoss(nn.MSELoss(reduction="none"), alpha=0.4)(logits, target)
    first, second = logits.chunk(2)
    distance = agreement(first.numpy(), second.numpy(), "mse", 3.0)[:, None] / 2
    expected = 0.6 * ((first - target) ** 2 + (second - target) ** 2) / 2 + 0.4 * torch.tensor(distance)
    torch.testing.assert_close(got, expected)


def test_losses_per_sample_get_the_divergence_of_the_sample():
    logits, target = torch.randn(8, 3, 5, dtype=torch.double), torch.randint(3, (4, 5))

    def per_sample(z, y):
        return F.cross_entropy(z, y, reduction="none").mean(1)

    got = RBlockLoss(per_sample, alpha=0.4)(logits, target)
    for index in range(4):
        rows = np.concatenate([logits[index].T, logits[index + 4].T])
        assert got[index].item() == pytest.approx(rblock_loss(rows, target[index], 0.4, 3.0))
    whole = RBlockLoss(lambda z, y: F.cross_entropy(z, y)[None], alpha=0.4)(logits, target)
    assert whole.tolist() == [pytest.approx(got.mean().item())]


def test_a_partial_function_has_its_reduction():
    logits, target = torch.randn(8, 3), torch.randint(3, (4,))
    expected = RBlockLoss(nn.CrossEntropyLoss(reduction="sum", ignore_index=1))(logits, target)
    criterion = functools.partial(F.cross_entropy, reduction="sum", ignore_index=1)
    assert RBlockLoss(criterion)(logits, target).item() == pytest.approx(expected.item())


def test_mixup_may_set_and_restore_the_reduction():
    logits, (first, second) = torch.randn(8, 3), torch.randint(3, (2, 4))
    weight = torch.rand(4)
    loss = RBlockLoss(alpha=0.25)
    assert loss.reduction == "mean"
    loss.reduction = "none"
    assert loss.criterion.reduction == "none"
    mixed = (weight * loss(logits, first) + (1 - weight) * loss(logits, second)).mean()
    loss.reduction = "mean"
    target = weight[:, None] * F.one_hot(first, 3) + (1 - weight[:, None]) * F.one_hot(second, 3)
    assert mixed.item() == pytest.approx(rblock_loss(logits, target, 0.25, 3.0), rel=1e-5)
    with pytest.raises(SettingError, match=r"criterion cross_entropy has no reduction .*nn\.CrossEntropyLoss\(\)"):
        RBlockLoss(F.cross_entropy).reduction = "none"


@given(CASES, st.lists(st.booleans(), min_size=6, max_size=6), st.sampled_from([-100, 255]))
def test_samples_without_a_label_train_with_the_divergence(case, labelled, ignored):
    seed, rows, classes, alpha, temperature = case
    rng = np.random.default_rng(seed)
    logits, target = rng.normal(0, 3, (2 * rows, classes)), rng.integers(0, classes, rows)
    has_label = np.array(labelled[:rows])
    halves = np.split(logits, 2)
    plain = sum(cross_entropies(half[has_label], target[has_label]).sum() for half in halves) / max(has_label.sum(), 1)
    expected = (1 - alpha) * plain + alpha * agreement(*halves, "softmax", temperature).mean()
    output = torch.tensor(logits, requires_grad=True)
    criterion = nn.CrossEntropyLoss(ignore_index=ignored)
    labels = torch.tensor(np.where(has_label, target, ignored))
    loss = RBlockLoss(criterion, alpha=alpha, temperature=temperature, combine="sum")(output, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert torch.isfinite(output.grad).all()


def test_n_rows_get_the_plain_criterion_of_any_kind():
    one, masks = torch.randn(4, 1, 5, 5), torch.rand(4, 1, 5, 5)
    for criterion in (F.mse_loss, nn.BCEWithLogitsLoss(reduction="none")):
        assert torch.equal(RBlockLoss(criterion)(one, masks), criterion(one, masks))
    labels = torch.full((4,), -100)
    assert RBlockLoss()(torch.randn(4, 3), labels).isnan()  # as the criterion returns it


def test_attributes_of_the_criterion_are_readable():
    loss = RBlockLoss(nn.CrossEntropyLoss(ignore_index=255))
    assert loss.ignore_index == 255
    assert isinstance(loss.criterion, nn.CrossEntropyLoss)
    for missing in ("no_such_attribute", "_private"):
        with pytest.raises(AttributeError, match=missing):
            getattr(loss, missing)
    assert not hasattr(RBlockLoss(F.cross_entropy), "reduction")
    expected = "alpha=0.1, temperature=3, divergence=mse_loss, combine=mean, aux_weight=0.4"
    assert f"cross_entropy, {expected}" in repr(RBlockLoss(F.cross_entropy, divergence=F.mse_loss))


def test_a_copy_and_a_pickle_are_the_same_loss():
    logits, target = torch.randn(8, 3), torch.randint(3, (4,))
    loss = RBlockLoss(nn.CrossEntropyLoss(label_smoothing=0.1), alpha=0.3, combine="sum")
    for again in (copy.deepcopy(loss), copy.copy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(again(logits, target), loss(logits, target))


ONE_CLASS = r"needs at least two classes on axis 1, got shape \(4,.*divergence='bernoulli'"
SUMS = r"float targets that sum to 1 over axis 1, got sums from .*divergence='bernoulli' .*'mse'"


@pytest.mark.parametrize(
    ("settings", "output", "target", "message"),
    [
        ({}, torch.randn(8, 1), torch.zeros(4).long(), ONE_CLASS),
        ({}, torch.randn(8), torch.zeros(4), ONE_CLASS),
        ({"criterion": F.mse_loss}, torch.randn(8, 1, 5, 5), torch.rand(4, 1, 5, 5), ONE_CLASS),
        (
            {"criterion": nn.BCEWithLogitsLoss(), "divergence": "softmax"},
            torch.randn(8, 1),
            torch.ones(4, 1),
            ONE_CLASS,
        ),
        ({}, torch.randn(8, 3), torch.tensor([[1.0, 1.0, 0.0]] * 4), SUMS),
        ({"criterion": F.mse_loss}, torch.randn(8, 3), torch.full((4, 3), torch.nan), SUMS),
    ],
)
def test_outputs_that_are_not_one_softmax_are_rejected(settings, output, target, message):
    with pytest.raises(SettingError, match=message):
        RBlockLoss(**settings)(output, target)


def test_an_explicit_softmax_takes_multi_hot_targets():
    logits, labels = torch.randn(8, 3), torch.ones(4, 3)
    loss = RBlockLoss(nn.BCEWithLogitsLoss(), divergence="softmax", alpha=1.0)(logits, labels)
    assert loss.item() == pytest.approx(rblock_loss(logits, labels, 1.0, 3.0), rel=1e-5)
