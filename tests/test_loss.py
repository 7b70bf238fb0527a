import numpy as np
import pytest
import timm.loss
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rblock_fx import PairError, RBlockLoss, SettingError, split_pair
from tests.oracles import rblock_loss

cases = st.tuples(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 7), st.floats(0, 1), st.floats(0.3, 8))


def drawn(seed, rows, classes):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, (2 * rows, classes)), rng.integers(0, classes, rows), rng.dirichlet(np.ones(classes), rows)


@given(cases, st.sampled_from(["sum", "mean"]))
def test_equations_1_to_5_with_class_indices(case, reduction):
    seed, rows, classes, alpha, temperature = case
    logits, indices, _ = drawn(seed, rows, classes)
    loss = RBlockLoss(alpha=alpha, temperature=temperature, reduction=reduction)
    got = loss(torch.tensor(logits), torch.tensor(indices)).item()
    assert got == pytest.approx(rblock_loss(logits, indices, alpha, temperature, reduction), rel=1e-9)
    single = loss(torch.tensor(logits, dtype=torch.float32), torch.tensor(indices)).item()
    assert single == pytest.approx(got, rel=2e-4, abs=1e-4)


@given(cases)
def test_equations_1_to_5_with_probabilities(case):
    seed, rows, classes, alpha, temperature = case
    logits, _, probabilities = drawn(seed, rows, classes)
    loss = RBlockLoss(alpha=alpha, temperature=temperature)
    got = loss(torch.tensor(logits), torch.tensor(probabilities)).item()
    assert got == pytest.approx(rblock_loss(logits, probabilities, alpha, temperature), rel=1e-9)


@given(cases)
def test_dense_outputs_are_samples_at_every_position(case):
    seed, rows, classes, alpha, temperature = case
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2 * rows, classes, 3, 2, generator=generator, dtype=torch.double)
    target = torch.randint(classes, (rows, 3, 2), generator=generator)
    loss = RBlockLoss(alpha=alpha, temperature=temperature)
    positions = [z.movedim(1, -1).reshape(-1, classes) for z in logits.chunk(2)]
    expected = rblock_loss(torch.cat(positions), target.flatten(), alpha, temperature)
    assert loss(logits, target).item() == pytest.approx(expected, rel=1e-9)


@given(cases)
def test_equal_sub_models_leave_the_criterion_alone(case):
    seed, rows, classes, alpha, temperature = case
    logits, indices, _ = drawn(seed, rows, classes)
    half = torch.tensor(logits[:rows])
    loss = RBlockLoss(alpha=alpha, temperature=temperature)(torch.cat((half, half)), torch.tensor(indices))
    assert loss.item() == pytest.approx(2 * (1 - alpha) * F.cross_entropy(half, torch.tensor(indices)).item(), rel=1e-9)


@given(cases)
def test_the_halves_are_exchangeable(case):
    seed, rows, classes, alpha, temperature = case
    logits, indices, _ = drawn(seed, rows, classes)
    first, second = torch.tensor(logits).chunk(2)
    loss = RBlockLoss(alpha=alpha, temperature=temperature)
    target = torch.tensor(indices)
    assert loss(torch.cat((first, second)), target).item() == pytest.approx(
        loss(torch.cat((second, first)), target).item()
    )


def test_gradients_flow_through_both_distributions():
    logits = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
    target = torch.randint(4, (3,))
    assert torch.autograd.gradcheck(lambda z: RBlockLoss(alpha=0.5)(z, target), (logits,))
    RBlockLoss(alpha=1.0)(logits, target).backward()
    assert (logits.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    "criterion",
    [
        None,
        nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.tensor([1.0, 2.0, 3.0])),
        timm.loss.LabelSmoothingCrossEntropy(0.1),
        lambda logits, target: F.multi_margin_loss(logits, target),
    ],
)
def test_any_criterion_is_wrapped_and_is_itself_on_n_logits(criterion):
    logits, target = torch.randn(8, 3), torch.randint(3, (8,))
    plain = criterion or F.cross_entropy
    loss = RBlockLoss(criterion, alpha=0.25, temperature=2.0)
    assert loss(logits, target).item() == plain(logits, target).item()
    first, second = logits.chunk(2)
    expected = 0.75 * (plain(first, target[:4]) + plain(second, target[:4]))
    without = RBlockLoss(alpha=1.0, temperature=2.0)(logits, target[:4])
    assert loss(logits, target[:4]).item() == pytest.approx((expected + 0.25 * without).item(), rel=1e-5)


def test_soft_targets_of_mixup_reach_timms_criterion():
    logits, target = torch.randn(8, 3), torch.softmax(torch.randn(4, 3), 1)
    loss = RBlockLoss(timm.loss.SoftTargetCrossEntropy(), alpha=0.1, temperature=3.0)(logits, target)
    assert loss.item() == pytest.approx(rblock_loss(logits, target, 0.1, 3.0), rel=1e-5)


def test_classes_that_both_sub_models_rule_out_do_not_count():
    logits = torch.randn(6, 4)
    logits[:, 3] = -torch.inf
    logits.requires_grad_()
    target = torch.randint(3, (3,))
    loss = RBlockLoss(alpha=0.5)(logits, target)
    assert loss.item() == pytest.approx(RBlockLoss(alpha=0.5)(logits[:, :3], target).item())
    loss.backward()
    assert torch.isfinite(logits.grad).all()


def test_the_terms_add_up_to_the_loss():
    logits, target = torch.randn(8, 3), torch.randint(3, (4,))
    loss = RBlockLoss(alpha=0.3, temperature=2.0)
    criterion, divergence = loss.terms(logits, target)
    assert loss(logits, target).item() == pytest.approx((0.7 * criterion + 0.3 * 4 * divergence).item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_on_in_float32(dtype):
    logits, target = (20 * torch.randn(8, 1000)).to(dtype), torch.randint(1000, (4,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = RBlockLoss()(logits, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(rblock_loss(logits.double(), target, 0.1, 3.0), rel=1e-4)


def test_the_criterion_is_a_child_and_shows():
    loss = RBlockLoss(nn.CrossEntropyLoss(), alpha=0.2)
    assert isinstance(loss.criterion, nn.CrossEntropyLoss)
    assert "alpha=0.2, temperature=3, reduction='sum'" in repr(loss)


@pytest.mark.parametrize("rows", [3, 5, 12])
def test_other_ratios_of_logits_to_targets_are_refused(rows):
    with pytest.raises(PairError, match=rf"got {rows} logits \({rows}, 3\) for 4 targets; expected 8 .* or 4"):
        RBlockLoss()(torch.randn(rows, 3), torch.randint(3, (4,)))


def test_outputs_and_targets_that_are_no_tensors_are_refused():
    with pytest.raises(PairError, match=r"got str\. Pass a tensor, or a dict .*criterion\(model\(images\), labels\)"):
        RBlockLoss()("logits", torch.randint(3, (2,)))
    with pytest.raises(PairError, match=r"expected logits of \(2N, classes, \.\.\.\), got dict in 'out'"):
        RBlockLoss()({"out": {"logits": torch.randn(4, 3)}}, torch.randint(3, (2,)))
    with pytest.raises(PairError, match=r"expected logits of \(2N, classes, \.\.\.\), got \(4,\)"):
        RBlockLoss()(torch.randn(4), torch.randint(3, (2,)))
    with pytest.raises(PairError, match="expected targets with N rows, got list without any"):
        RBlockLoss()(torch.randn(4, 3), [1, 2])
    with pytest.raises(PairError, match="4 logits for 4 targets are one model's output"):
        RBlockLoss().terms(torch.randn(4, 3), torch.randint(3, (4,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, r"alpha=-0.1 is not in \[0, 1\]"),
        ({"alpha": 1.5}, r"alpha=1.5 is not in \[0, 1\]"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"alpha": "0.1"}, "alpha=0.1 is not in"),
        ({"criterion": nn.CrossEntropyLoss}, r"criterion=<class .* is no loss that can be called"),
        ({"criterion": "ce"}, "criterion='ce' is no loss"),
        ({"temperature": 0.0}, "temperature=0.0 is not a positive number"),
        ({"temperature": float("inf")}, "temperature=inf is not a positive number"),
        ({"reduction": "none"}, "reduction='none' is neither 'sum'"),
    ],
)
def test_settings_outside_their_range_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        RBlockLoss(**options)


def test_split_pair_keeps_the_nesting():
    output = {"out": torch.arange(6).reshape(6, 1), "aux": [torch.arange(4), (torch.zeros(2), "note")]}
    first, second = split_pair(output)
    assert first["out"].flatten().tolist() == [0, 1, 2]
    assert second["out"].flatten().tolist() == [3, 4, 5]
    assert second["aux"][0].tolist() == [2, 3]
    assert second["aux"][1][1] == "note"


@pytest.mark.parametrize("output", [torch.zeros(3, 2), torch.zeros(()), {"a": torch.zeros(4), "b": torch.zeros(5)}])
def test_split_pair_refuses_what_is_no_pair(output):
    with pytest.raises(PairError, match=r"expected an even number of rows \(2N\)"):
        split_pair(output)


def test_split_pair_refuses_what_holds_no_tensor():
    with pytest.raises(PairError, match="no tensor in dict"):
        split_pair({"a": 1})
