"""RBlockLoss and split_pair on the dicts and named tuples of models with auxiliary outputs."""

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
from torchvision.models import googlenet, inception_v3
from torchvision.models.googlenet import GoogLeNetOutputs
from torchvision.models.inception import InceptionOutputs
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, fcn_resnet50, lraspp_mobilenet_v3_large

from rblock_fx import PairError, RBlockLoss, SettingError, apply_rblock, split_pair
from tests.oracles import rblock_loss, rblock_loss_with_auxiliary

# What each model gives, made of its main and two more tensors, with the weights of the latter; the last has none.
OUTPUTS = {
    "GoogLeNet": (lambda main, a, b: GoogLeNetOutputs(main, a, b), (0.3, 0.3)),
    "Inception v3": (lambda main, a, _: InceptionOutputs(main, a), (0.4, 0.0)),
    "segmentation": (lambda main, a, _: OrderedDict(out=main, aux=a), (0.5, 0.0)),
    "segmentation, auxiliary output first": (lambda main, a, _: {"aux": a, "out": main}, (0.5, 0.0)),
    "auxiliary outputs switched off": (lambda main, _, __: GoogLeNetOutputs(main, None, None), (0.0, 0.0)),
    "no auxiliary head": (lambda main, _, __: OrderedDict(out=main), (0.0, 0.0)),
}

cases = st.tuples(st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 6), st.floats(0, 1), st.floats(0.3, 8))


def drawn(seed, rows, classes):
    """Three tensors of logits of a pair, class indices, probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (3, 2 * rows, classes))
    return logits, rng.integers(0, classes, rows), rng.dirichlet(np.ones(classes), rows)


@given(cases, st.sampled_from(sorted(OUTPUTS)), st.sampled_from(["sum", "mean"]), st.booleans())
def test_the_main_output_goes_by_equation_4_and_the_others_by_the_weighted_criterion(case, kind, reduction, soft):
    seed, rows, classes, alpha, temperature = case
    logits, indices, probabilities = drawn(seed, rows, classes)
    target = probabilities if soft else indices
    build, weights = OUTPUTS[kind]
    loss = RBlockLoss(alpha=alpha, temperature=temperature, reduction=reduction)
    got = loss(build(*torch.tensor(logits)), torch.tensor(target)).item()
    auxiliary = list(zip(weights, logits[1:], strict=True))
    expected = rblock_loss_with_auxiliary(logits[0], auxiliary, target, alpha, temperature, reduction)
    assert got == pytest.approx(expected, rel=1e-9)


@given(cases, st.floats(0, 2), st.floats(0, 2))
def test_weights_are_given_by_name_or_as_one_number(case, weight1, weight2):
    seed, rows, classes, alpha, temperature = case
    logits, target, _ = drawn(seed, rows, classes)
    output = GoogLeNetOutputs(
        logits=torch.tensor(logits[0]), aux_logits1=torch.tensor(logits[1]), aux_logits2=torch.tensor(logits[2])
    )
    for aux_weights, weights in [
        ({"aux_logits1": weight1, "aux_logits2": weight2}, (weight1, weight2)),
        (weight1, (weight1, weight1)),
    ]:
        loss = RBlockLoss(alpha=alpha, temperature=temperature, aux_weights=aux_weights)
        expected = rblock_loss_with_auxiliary(
            logits[0], zip(weights, logits[1:], strict=True), target, alpha, temperature
        )
        assert loss(output, torch.tensor(target)).item() == pytest.approx(expected, rel=1e-9)


def test_outputs_of_any_name_are_trained_with_a_weight_and_left_out_by_zero():
    main, deep = torch.randn(8, 3), torch.randn(8, 3)
    target = torch.randint(3, (4,))
    output = namedtuple("Deep", ["deep", "logits", "features"])(deep, main, [torch.randn(2, 2)])
    loss = RBlockLoss(aux_weights={"deep": 0.7, "features": 0})
    expected = rblock_loss_with_auxiliary(main, [(0.7, deep)], target, 0.1, 3.0)
    assert loss(output, target).item() == pytest.approx(expected, rel=1e-5)
    assert RBlockLoss(aux_weights=0)(output, target).item() == RBlockLoss()(main, target).item()


def reference(inputs, target):
    """What torchvision's segmentation reference minimises."""
    losses = {name: F.cross_entropy(x, target, ignore_index=255) for name, x in inputs.items()}
    return losses["out"] + 0.5 * losses["aux"] if "aux" in losses else losses["out"]


def dense_target(rows, classes, size):
    """Labels of (rows, size, size), of which the first rows of pixels are void."""
    target = torch.randint(classes, (rows, size, size))
    target[:, : size // 4] = 255
    return target


def dense_loss(logits, target, alpha, temperature):
    """Eq. 1-5 with every position as a sample: the cross-entropy over those with a label, the KL over all."""
    positions = torch.cat([z.movedim(1, -1).reshape(-1, z.shape[1]) for z in logits.detach().chunk(2)])
    labels = target.flatten()
    has_label = labels != 255
    cross_entropy = rblock_loss(positions[has_label.repeat(2)], labels[has_label], 0, temperature)
    divergence = rblock_loss(positions, labels.where(has_label, 0), 1, temperature)
    return (1 - alpha) * cross_entropy + alpha * divergence


@pytest.mark.parametrize("auxiliary", [True, False])
def test_of_n_rows_it_is_torchvisions_reference_criterion(auxiliary):
    output = {"out": torch.randn(3, 5, 8, 8)} | ({"aux": torch.randn(3, 5, 8, 8)} if auxiliary else {})
    target = dense_target(3, 5, 8)
    loss = RBlockLoss(nn.CrossEntropyLoss(ignore_index=255), alpha=0.4, reduction="mean")
    assert loss(output, target).item() == reference(output, target).item()


def test_at_alpha_0_it_is_the_mean_or_the_sum_of_torchvisions_reference_criterion_over_the_sub_models():
    output = OrderedDict(out=torch.randn(6, 5, 8, 8), aux=torch.randn(6, 5, 8, 8))
    target = dense_target(3, 5, 8)
    first, second = split_pair(output)
    both = reference(first, target).item() + reference(second, target).item()
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    assert RBlockLoss(criterion, alpha=0)(output, target).item() == pytest.approx(both, rel=1e-6)
    assert RBlockLoss(criterion, alpha=0, reduction="mean")(output, target).item() == pytest.approx(both / 2, rel=1e-6)


def test_the_kl_counts_the_positions_that_the_criterion_ignores():
    logits, target = torch.randn(6, 5, 8, 8, dtype=torch.double), dense_target(3, 5, 8)
    loss = RBlockLoss(nn.CrossEntropyLoss(ignore_index=255), alpha=0.3, temperature=2.0)
    assert loss({"out": logits}, target).item() == pytest.approx(dense_loss(logits, target, 0.3, 2.0), rel=1e-9)


def test_a_criterion_of_ones_own_is_called_with_each_half_of_each_output_and_the_whole_target():
    calls = []

    def dice(logits, target):
        calls.append((tuple(logits.shape), logits.dtype, target))
        return logits.mean()

    target = {"masks": dense_target(3, 5, 8), "note": "dense"}
    output = {"out": torch.randn(6, 5, 8, 8).bfloat16(), "aux": torch.randn(6, 5, 4, 4).bfloat16()}
    RBlockLoss(dice)(output, target)
    assert sorted(shape for shape, _, _ in calls) == [(3, 5, 4, 4)] * 2 + [(3, 5, 8, 8)] * 2
    assert {dtype for _, dtype, _ in calls} == {torch.float32}
    assert all(given is target for _, _, given in calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_auxiliary_logits_in_half_precision_are_computed_on_in_float32(dtype):
    main, auxiliary = (20 * torch.randn(2, 8, 1000)).to(dtype)
    target = torch.randint(1000, (4,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = RBlockLoss()(InceptionOutputs(main, auxiliary), target)
    assert loss.dtype == torch.float32
    expected = rblock_loss_with_auxiliary(main.double(), [(0.4, auxiliary.double())], target, 0.1, 3.0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_terms_are_those_of_the_main_output():
    main, auxiliary, target = torch.randn(8, 3), torch.randn(8, 3), torch.randint(3, (4,))
    loss = RBlockLoss()
    assert loss.terms(InceptionOutputs(main, auxiliary), target) == loss.terms(main, target)
    with pytest.raises(PairError, match="terms: 8 logits for 8 targets are one model's output"):
        loss.terms({"out": main}, torch.randint(3, (8,)))


@pytest.mark.parametrize("kind", ["GoogLeNet", "segmentation"])
def test_it_compiles_into_one_graph_with_the_output(kind):
    build, _ = OUTPUTS[kind]
    loss = RBlockLoss()
    compiled = torch.compile(lambda main, a, b, y: loss(build(main, a, b), y), backend="eager", fullgraph=True)
    logits, target = torch.randn(3, 8, 5), torch.randint(5, (4,))
    assert compiled(*logits, target).item() == pytest.approx(loss(build(*logits), target).item())


def trained(model, sites, size, target, criterion):
    """The output and the loss of one step, as torchvision's references make it, in which every parameter moves."""
    apply_rblock(model, sites, input_size=(3, size, size)).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = model(torch.randn(len(target), 3, size, size))
    loss = criterion(output, target)
    loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert not torch.equal(parameter, before[name]), name
    return output, loss.item()


@pytest.mark.parametrize(
    ("build", "sites", "size", "output_type", "weights"),
    [
        # aux1 hangs on the block before the first site, aux2 behind it
        (googlenet, ["inception4c", "inception5b"], 64, GoogLeNetOutputs, {"aux_logits1": 0.3, "aux_logits2": 0.3}),
        # 299 is the smallest side that its auxiliary head takes
        (inception_v3, ["Mixed_6e", "Mixed_7c"], 299, InceptionOutputs, {"aux_logits": 0.4}),
    ],
)
def test_torchvisions_inceptions_train_with_their_auxiliary_heads(build, sites, size, output_type, weights):
    model = build(weights=None, num_classes=5, aux_logits=True, init_weights=False)
    target = torch.randint(5, (2,))
    output, loss = trained(model, sites, size, target, RBlockLoss(alpha=0.2))
    assert isinstance(output, output_type)
    values = {name: value.detach() for name, value in output._asdict().items()}
    auxiliary = [(weight, values[name]) for name, weight in weights.items()]
    assert len(auxiliary) + 1 == len(values)
    assert loss == pytest.approx(rblock_loss_with_auxiliary(values["logits"], auxiliary, target, 0.2, 3.0), rel=1e-4)
    model.eval()
    logits = model(torch.randn(2, 3, size, size))
    assert RBlockLoss()(logits, target).item() == F.cross_entropy(logits, target).item()


@pytest.mark.parametrize(
    ("build", "sites", "options"),
    [
        (fcn_resnet50, ["backbone.layer3", "backbone.layer4"], {"aux_loss": True}),
        (deeplabv3_mobilenet_v3_large, ["backbone.6", "backbone.12"], {"aux_loss": True}),
        (lraspp_mobilenet_v3_large, ["backbone.6", "backbone.12"], {}),
    ],
)
def test_torchvisions_segmentation_models_train_in_its_reference_loop(build, sites, options):
    model = build(weights=None, weights_backbone=None, num_classes=5, **options)
    target = dense_target(2, 5, 32)
    criterion = RBlockLoss(nn.CrossEntropyLoss(ignore_index=255))
    output, loss = trained(model, sites, 32, target, criterion)
    assert set(output) == {"out", "aux"} if options else {"out"}
    expected = dense_loss(output["out"], target, 0.1, 3.0)
    if "aux" in output:
        expected += 0.5 * dense_loss(output["aux"], target, 0, 1.0)
    assert loss == pytest.approx(expected, rel=1e-5)
    output = model.eval()(torch.randn(2, 3, 32, 32))
    assert criterion(output, target).item() == reference(output, target).item()


def test_the_two_heads_of_timms_distilled_training_are_refused_with_the_call_that_works():
    model = timm.create_model("repvit_m0_9", num_classes=5)
    apply_rblock(model, input_size=(3, 64, 64)).train()
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(5, (2,))
    model.set_distilled_training(True)
    with pytest.raises(PairError, match=r"got a tuple of 2, .*model\.set_distilled_training\(False\)"):
        RBlockLoss()(model(images), labels)
    model.set_distilled_training(False)
    assert RBlockLoss()(model(images), labels).isfinite()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([torch.zeros(4, 3)] * 3, r"got a list of 3, whose outputs have no names.*criterion\(output\[0\], labels\)"),
        ({"main": torch.zeros(4, 3)}, r"a dict of 'main'; expected one main .*\{'out': output\['main'\]\}"),
        (namedtuple("Heads", "a b")(torch.zeros(4, 3), None), r"a Heads of 'a'; .*criterion\(output\.a, labels\)"),
        (
            {"out": None, "aux": torch.zeros(4, 3)},
            "a dict of 'aux'; expected one main output, called 'out' or 'logits'",
        ),
        ({}, "a dict of nothing; expected one main output"),
        (
            {"out": torch.zeros(4, 3), "logits": torch.zeros(4, 3)},
            "a dict of 'out', 'logits'; expected one main output",
        ),
        (
            {"out": torch.zeros(4, 3), "aux": torch.zeros(2, 3)},
            r"'aux' is of shape \(2, 3\), expected a tensor of 4 rows",
        ),
        (
            {"out": torch.zeros(2, 3), "aux": torch.zeros(4, 3)},
            r"'aux' is of shape \(4, 3\), expected a tensor of 2 rows",
        ),
        ({"out": torch.zeros(4, 3), "aux": torch.zeros(())}, r"'aux' is of shape \(\), expected a tensor of 4 rows"),
        (
            {"out": torch.zeros(4, 3), "aux": [1]},
            r"'aux' is a list, .*torch\.cat\(\[x, x\]\).*aux_weights=\{'aux': 0\}",
        ),
        ({"out": torch.zeros(3, 3), "aux": torch.zeros(3, 3)}, r"got 3 logits \(3, 3\) for 2 targets; expected 4"),
        (
            {"out": torch.zeros(4, 3), "aux": torch.zeros(4, 3), "deep": torch.zeros(4, 3)},
            r"without a weight: 'deep'; give .*RBlockLoss\(aux_weights=\{'aux': 0\.5, 'deep': 0\.4\}\)",
        ),
    ],
)
def test_outputs_that_cannot_be_read_are_refused(output, message):
    with pytest.raises(PairError, match=message):
        RBlockLoss()(output, torch.zeros(2, dtype=torch.long))


def test_a_mapping_has_to_name_every_auxiliary_output():
    output = GoogLeNetOutputs(*torch.zeros(3, 4, 3))
    with pytest.raises(PairError, match=r"without a weight: 'aux_logits2'.*'aux_logits2': 0\.4, 'aux_logits1': 0\.2\}"):
        RBlockLoss(aux_weights={"aux_logits1": 0.2})(output, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    "aux_weights", [-0.1, float("nan"), float("inf"), True, "0.5", [0.5], {"aux": -1}, {"aux": "1"}]
)
def test_weights_outside_their_range_are_refused(aux_weights):
    with pytest.raises(
        SettingError, match=r"is neither a weight in \[0, inf\) nor a mapping.*aux_weights=\{'aux': 0\.5\}"
    ):
        RBlockLoss(aux_weights=aux_weights)


@pytest.mark.parametrize("name", ["out", "logits"])
def test_the_main_output_takes_no_weight(name):
    with pytest.raises(SettingError, match=f"names '{name}', the main output, which has Eq. 4's weights"):
        RBlockLoss(aux_weights={name: 1.0, "aux": 0.5})


def test_weights_that_were_given_show():
    assert repr(RBlockLoss(aux_weights={"aux": 0.2})).endswith("reduction='sum', aux_weights={'aux': 0.2})")
    assert "aux_weights" not in repr(RBlockLoss())


def test_split_pair_keeps_the_type_of_torchvisions_outputs():
    rows = torch.arange(6).reshape(6, 1)
    for output in [GoogLeNetOutputs(rows, None, rows + 10), OrderedDict(out=rows, aux=rows + 10)]:
        for index, half in enumerate(split_pair(output)):
            assert type(half) is type(output)
            values = list(half.values() if isinstance(half, dict) else half)
            assert values[0].flatten().tolist() == [0 + 3 * index, 1 + 3 * index, 2 + 3 * index]
            assert values[-1].flatten().tolist() == [10 + 3 * index, 11 + 3 * index, 12 + 3 * index]
            assert len(values) == len(output)


@dataclass
class Prediction:
    logits: torch.Tensor


@pytest.mark.parametrize(
    "wrap", [Prediction, lambda logits: UserDict(out=logits), lambda logits: {"out": {1}, "x": logits}]
)
def test_split_pair_refuses_containers_that_it_cannot_split(wrap):
    with pytest.raises(
        PairError, match=r"split what is inside a (Prediction|UserDict|set); .*split_pair\(\{'out': logits\}\)"
    ):
        split_pair({"main": torch.zeros(4, 3), "other": wrap(torch.zeros(4, 3))})
