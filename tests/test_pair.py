"""Rows and names of a pair's outputs: split_pair, auxiliary outputs, doubled targets, missing pairs."""

import copy
import pickle
import warnings
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models import googlenet
from torchvision.models.googlenet import GoogLeNetOutputs
from torchvision.models.inception import InceptionOutputs
from torchvision.models.segmentation import fcn_resnet50

from rblock_fx import ConversionError, PairError, RBlockLoss, apply_rblock, remove_rblock, split_pair
from rblock_fx.errors import RBlockWarning
from tests.oracles import rblock_loss

# Ways to pack a main output and two more, with the number of auxiliary outputs.
OUTPUTS = {
    "GoogLeNet": (lambda main, a, b: GoogLeNetOutputs(main, a, b), 2),
    "Inception v3": (lambda main, a, _: InceptionOutputs(main, a), 1),
    "segmentation": (lambda main, a, _: OrderedDict(aux=a, out=main), 1),
    "other names": (lambda main, a, b: {"deep": a, "logits": main, "edge": b}, 2),
    "None": (lambda main, _, __: GoogLeNetOutputs(main, None, None), 0),
    "one": (lambda main, _, __: main, 0),
}


@given(
    st.sampled_from(sorted(OUTPUTS)), st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 6), st.floats(0, 1),
    st.floats(0, 2), st.sampled_from(["mean", "sum"]),
)  # fmt: skip
def test_auxiliary_outputs_add_their_weighted_criterion(kind, seed, rows, classes, alpha, weight, combine):
    rng = np.random.default_rng(seed)
    logits, target = rng.normal(0, 3, (3, 2 * rows, classes)), rng.integers(0, classes, rows)
    pack, count = OUTPUTS[kind]
    loss = RBlockLoss(alpha=alpha, aux_weight=weight, combine=combine)
    got = loss(pack(*torch.tensor(logits)), torch.tensor(target)).item()
    auxiliary = [(weight, others) for others in logits[1 : 1 + count]]
    assert got == pytest.approx(rblock_loss(logits[0], target, alpha, 3.0, combine, auxiliary), rel=1e-9)


def test_n_rows_get_the_plain_criterion_of_all_outputs():
    output, target = {"out": torch.randn(3, 5, 8, 8), "aux": torch.randn(3, 5, 8, 8)}, torch.randint(5, (3, 8, 8))
    expected = F.cross_entropy(output["out"], target) + 0.4 * F.cross_entropy(output["aux"], target)
    assert torch.equal(RBlockLoss()(output, target), expected)


def test_a_criterion_gets_float32_halves_and_the_target_itself():
    calls = []

    def dice(logits, target):
        calls.append((tuple(logits.shape), logits.dtype, target))
        return logits.mean()

    target = {"masks": torch.randint(5, (3, 8, 8)), "note": "dense"}
    RBlockLoss(dice)({"out": torch.randn(6, 5, 8, 8).half(), "aux": torch.randn(6, 5, 4, 4).half()}, target)
    assert sorted(shape for shape, _, _ in calls) == [(3, 5, 4, 4)] * 2 + [(3, 5, 8, 8)] * 2
    assert all(dtype == torch.float32 and given is target for _, dtype, given in calls)


def test_terms_are_those_of_the_main_output():
    main, target = torch.randn(8, 3), torch.randint(3, (4,))
    assert RBlockLoss().terms(InceptionOutputs(main, torch.randn(8, 3)), target) == RBlockLoss().terms(main, target)


@pytest.mark.parametrize(
    ("build", "sites", "target"),
    [
        (lambda: googlenet(num_classes=5, init_weights=False), ["inception4c", "inception5b"], torch.arange(2)),
        (
            lambda: fcn_resnet50(weights_backbone=None, num_classes=5, aux_loss=True),
            ["backbone.layer3", "backbone.layer4"],
            torch.randint(5, (2, 64, 64)),
        ),
    ],
    ids=["GoogLeNet", "FCN"],
)
def test_torchvision_models_train_with_their_auxiliary_heads(build, sites, target):
    model = apply_rblock(build(), sites, input_size=(3, 64, 64)).train()
    RBlockLoss(model=model)(model(torch.randn(2, 3, 64, 64)), target).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters())


TENSOR = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([TENSOR] * 3, r"got a list of 3 outputs without names; pass the main one, criterion\(output\[0\], labels\)"),
        ({"main": TENSOR}, r"expected one main output called 'out' or 'logits', got a dict of 'main'"),
        (namedtuple("Heads", "a b")(TENSOR, None), "expected one main output .* got a Heads of 'a'"),
        ({"out": None, "aux": TENSOR}, "expected one main output .* got a dict of 'aux'"),
        ({}, "expected one main output .* got a dict of nothing"),
        ({"out": TENSOR, "logits": TENSOR}, "expected one main output .* got a dict of 'out', 'logits'"),
        ({"out": TENSOR, "aux": TENSOR[:2]}, r"expected 4 rows in 'aux' like in 'out', got shape \(2, 3\)"),
        ({"out": TENSOR, "aux": TENSOR[0, 0]}, r"expected 4 rows in 'aux' like in 'out', got shape \(\)"),
        ({"out": TENSOR, "aux": [1]}, r"expected 4 rows in 'aux' .* got a list; .*RBlockLoss\(aux_weight=0\)"),
        ({"out": {"logits": TENSOR}}, r"expected logits \(2N, classes, ...\) in 'out', got a dict"),
        ("logits", r"expected logits \(2N, classes, ...\), got a str; .*criterion\(model\(images\), labels\)"),
        (TENSOR[0, 0], r"expected logits \(2N, classes, ...\), got shape \(\)"),
    ],
)
def test_outputs_without_a_clear_pair_are_rejected(output, message):
    with pytest.raises(PairError, match=message):
        RBlockLoss()(output, torch.zeros(2, dtype=torch.long))


def test_aux_weight_0_skips_outputs_of_any_kind():
    logits, target = torch.randn(4, 3), torch.zeros(2, dtype=torch.long)
    output = {"logits": logits, "hidden_states": (torch.randn(4, 2),)}
    assert torch.equal(RBlockLoss(aux_weight=0)(output, target), RBlockLoss()(logits, target))


def build(method="bdropdml"):
    return apply_rblock(timm.create_model("test_resnet", num_classes=5), method=method, input_size=(3, 32, 32))


@pytest.mark.parametrize("target", [torch.arange(3), torch.randn(3, 5).softmax(1)], ids=["indices", "soft"])
def test_with_a_model_doubled_targets_train_as_single_ones(target):
    model = build().train()
    output = model(torch.randn(3, 3, 32, 32))
    loss = RBlockLoss(alpha=0.5, model=nn.DataParallel(model))
    assert torch.equal(loss(output, torch.cat([target, target])), loss(output, target))
    assert loss.terms(output, torch.cat([target, target])) == loss.terms(output, target)
    for wrong in (torch.cat([target, target.flip(0)]), target):
        rows = output[: len(wrong)]
        with pytest.raises(PairError, match=rf"expected N targets for 2N rows.*got {len(wrong)} targets"):
            loss(rows, wrong)


@pytest.mark.parametrize(("method", "training"), [("bdropdml", False), ("dropblock", True)])
def test_with_a_model_evaluation_and_one_model_stay_plain(method, training):
    model = build(method).train(training)
    output, labels = model(torch.randn(2, 3, 32, 32)), torch.tensor([3, 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(RBlockLoss(model=model)(output, labels), F.cross_entropy(output, labels))


def test_validating_a_copy_while_the_model_trains_stays_plain():
    model = build().train()
    average, labels = copy.deepcopy(model).eval(), torch.tensor([3, 3, 3, 3])
    loss = RBlockLoss(model=model)
    with torch.no_grad():
        output = average(torch.randn(4, 3, 32, 32))
    for target in (labels, torch.tensor([0, 1, 2, 3])):
        assert torch.equal(loss(output, target), F.cross_entropy(output, target))
    with pytest.raises(PairError, match=r"got 4 targets for 4 rows with gradients; .*under torch.no_grad\(\)"):
        loss(average(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3]))


def test_an_unconverted_model_is_rejected():
    with pytest.raises(ConversionError, match=r"RBlockLoss: ResNet is not converted.*apply_rblock\(model"):
        RBlockLoss(model=timm.create_model("test_resnet"))


def test_a_model_restored_later_gets_the_plain_criterion():
    model = build().train()
    loss = RBlockLoss(model=model)
    output, labels = remove_rblock(model)(torch.randn(2, 3, 32, 32)), torch.tensor([3, 3])
    assert torch.equal(loss(output, labels), F.cross_entropy(output, labels))


def test_the_model_is_not_part_of_the_loss():
    model = build()
    loss = RBlockLoss(model=model)
    assert [type(module) for module in loss.modules()] == [RBlockLoss, nn.CrossEntropyLoss]
    assert not loss.state_dict()
    assert copy.deepcopy(loss)._model.model is model
    both = copy.deepcopy(nn.ModuleList([model, loss]))
    assert both[1]._model.model is both[0]
    pickled = pickle.dumps(loss)
    assert len(pickled) < 5000
    assert not pickle.loads(pickled).is_attached


def test_n_rows_with_gradients_warn_once_without_a_model():
    loss, logits, labels = RBlockLoss(), torch.randn(4, 3, requires_grad=True), torch.arange(4) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(logits.detach(), labels)
        loss(logits, labels[:2])
        with torch.no_grad():
            loss(logits, labels)
    with pytest.warns(RBlockWarning, match=r"expected 2N rows .* got 4 rows with gradients.*model=model") as record:
        assert torch.equal(loss(logits, labels), F.cross_entropy(logits, labels))
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(logits, labels)


@given(st.integers(1, 5))
def test_split_pair_keeps_types_and_the_order_of_halves(rows):
    first, second = torch.arange(2 * rows).chunk(2)
    whole = torch.cat([first, second])
    for output in (
        GoogLeNetOutputs(whole, None, whole + 10),
        OrderedDict(out=whole, aux=whole + 10),
        {"out": whole, "aux": [whole + 10, ("note", 3)]},
        whole,
    ):
        for half, expected in zip(split_pair(output), (first, second), strict=True):
            assert type(half) is type(output)
            values = half.values() if isinstance(half, dict) else half if isinstance(half, tuple) else [half]
            assert torch.equal(next(iter(values)), expected)
    nested = split_pair({"out": whole, "aux": [whole + 10, ("note", 3)]})[1]["aux"]
    assert torch.equal(nested[0], second + 10)
    assert nested[1] == ("note", 3)


@dataclass
class Prediction:
    logits: torch.Tensor


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(3, 2), r"expected an even number of rows \(2N\), got shape \(3, 2\)"),
        (torch.zeros(()), r"expected an even number of rows \(2N\), got shape \(\)"),
        ({"a": TENSOR, "b": torch.zeros(5)}, r"expected an even number of rows \(2N\), got shape \(5,\)"),
        ({"a": 1}, r"no tensor in dict; pass an output: split_pair\(model\(images\)\)"),
        ({"a": TENSOR, "b": Prediction(TENSOR)}, r"cannot split a Prediction; .*split_pair\(\{'out': logits\}\)"),
        (UserDict(out=TENSOR), "cannot split a UserDict"),
        ({"out": {1}}, "cannot split a set"),
    ],
)
def test_split_pair_rejects_other_outputs(output, message):
    with pytest.raises(PairError, match=message):
        split_pair(output)
